"""What language models are told, with worked examples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.features.autointerp.clients import Message
from gossamer.features.autointerp.windows import Window

MARKER = "[EXPLANATION]:"


def _said(role: str, content: str) -> Message:
    return {"role": role, "content": content}


# ---------------------------------------------------------------------------------------------------- explaining

_EXPLAIN = f"""You study what a feature of a language model responds to. You are shown excerpts of text. The words at \
which the feature is active are set between << and >>; neighbouring ones together.
Find what the marked words have in common: which words they are, what they mean, or what comes before them.
- Be specific and brief: one line, no list of alternatives.
- Describe the pattern instead of repeating examples; do not mention the marks << and >>.
- Pass over excerpts that tell you nothing.
- End with one line that begins with {MARKER}"""
_WITH_STRENGTHS = "Below each excerpt stand the marked words with the strength of the feature, from 1 to 10."
_WITH_CONTRAST = "Excerpts in which nothing is marked are counterexamples: the feature is silent there."
_STEP_BY_STEP = f"""Think in steps before you answer:
1. List at most five of the marked words and say what they have in common.
2. Say what the words around them have in common, if anything.
3. Weigh both and write the explanation on the last line, after {MARKER}"""
_ONE_TOKEN = f"""You study what a feature of a language model responds to. You are shown the words at which it is \
active. Say in one short line which word or which kind of words they are. Begin the line with {MARKER}"""


@dataclass(frozen=True)
class _Lesson:
    excerpts: tuple[str, ...]
    strengths: tuple[str, ...]
    thoughts: str
    explanation: str


_LESSONS = (
    _Lesson(
        (
            "They were <<on cloud nine>> when the results came",
            "It is <<raining cats and dogs>>, so take",
            "the exam was a <<piece of cake>> for her",
        ),
        (
            '("on", 4), (" cloud", 9), (" nine", 8)',
            '("raining", 6), (" cats", 9), (" and", 5), (" dogs", 8)',
            '("piece", 7), (" of", 5), (" cake", 9)',
        ),
        '1. "cloud nine", "cats and dogs", "piece of cake": together they are set phrases.\n'
        "2. The words around them have nothing in common.\n3. Set phrases that are not meant literally.",
        "Idioms, phrases that are not meant literally.",
    ),
    _Lesson(
        (
            "a quick<<er>> way to the strong<<est>> bridge",
            "the young<<er>> of the two",
            "nobody ran fast<<er>> than her",
        ),
        ('("er", 8), ("est", 6)', '("er", 9)', '("er", 9)'),
        '1. "er", "est": endings.\n2. Before them stand adjectives: quick, strong, young, fast.\n'
        "3. Endings with which adjectives compare.",
        'The endings "er" and "est" of adjectives that compare.',
    ),
    _Lesson(
        (
            'put it back in the <<drawer>>," he said',
            "they kept letters in an old <<box>> under",
            "the <<cupboard>> was locked from",
        ),
        ('("drawer", 8)', '("box", 9)', '("cupboard", 7)'),
        '1. "drawer", "box", "cupboard": things that hold other things.\n2. Before them often stands "in the".\n'
        "3. Containers, as pieces of furniture or otherwise.",
        "Nouns for containers and furniture that things are kept in.",
    ),
)


def explanation(
    windows: Sequence[Window],
    maximum: float,
    contrast: Sequence[Window] = (),
    strengths: bool = False,
    step_by_step: bool = False,
    threshold: float = 0.3,
) -> list[Message]:
    """Asks for an explanation of windows."""
    rules = [
        _EXPLAIN,
        *([_WITH_STRENGTHS] if strengths else []),
        *([_WITH_CONTRAST] if contrast else []),
        *([_STEP_BY_STEP] if step_by_step else []),
    ]
    told = [_said("system", "\n".join(rules))]
    for lesson in _LESSONS:
        told.append(_said("user", _listed(lesson.excerpts, lesson.strengths if strengths else ())))
        thoughts = f"{lesson.thoughts}\n" if step_by_step else ""
        told.append(_said("assistant", f"{thoughts}{MARKER} {lesson.explanation}"))
    excerpts = [window.highlighted(window.marks(threshold)) for window in windows]
    details = [_strengths(window, maximum, threshold) for window in windows] if strengths else []
    shown = _listed(excerpts, details)
    if contrast:
        shown += "\n\nCounterexamples:\n" + _listed([window.text for window in contrast])
    return [*told, _said("user", shown)]


def single_token_explanation(words: Sequence[str]) -> list[Message]:
    """Asks for an explanation of a latent that is active at one token at a time."""
    return [
        _said("system", _ONE_TOKEN),
        _said("user", json.dumps(["Marie Curie", "Isaac Newton", "Charles Darwin"])),
        _said("assistant", f"{MARKER} Names of famous scientists."),
        _said("user", json.dumps(["ing", "ing", "ing"])),
        _said("assistant", f'{MARKER} The ending "ing".'),
        _said("user", json.dumps(list(words), ensure_ascii=False)),
    ]


def _listed(excerpts: Sequence[str], details: Sequence[str] = ()) -> str:
    lines = []
    for number, excerpt in enumerate(excerpts):
        lines.append(f"Excerpt {number + 1}: {one_line(excerpt)}")
        if details:
            lines.append(f"Strengths: {details[number]}")
    return "\n".join(lines)


def _strengths(window: Window, maximum: float, threshold: float) -> str:
    marks, strengths = window.marks(threshold), window.strengths(maximum)
    return ", ".join(
        f"({json.dumps(piece, ensure_ascii=False)}, {strength})"
        for piece, strength, marked in zip(window.pieces, strengths, marks)
        if marked
    )


def one_line(text: str) -> str:
    """A text with its line breaks written out."""
    return text.replace("\r", "").replace("\n", "\\n").strip()


def read_explanation(reply: str | None) -> str | None:
    """What follows the last mark in a reply; None if there is no mark, or nothing behind it."""
    _, mark, found = (reply or "").rpartition(MARKER)
    line = found.strip().split("\n")[0].strip()
    return line if mark and line else None


# ---------------------------------------------------------------------------------------------------- judging


@dataclass(frozen=True)
class Task:
    """A question about texts that is answered by 0 or 1.

    Attributes
    ----------
    rules
        What the judge is told.
    lessons
        Explanations with texts and right answers.
    """

    rules: str
    lessons: tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...]


DETECTION = Task(
    "You are told a feature of text. For every text say 1 if the feature is anywhere in it, and 0 if it is not. A "
    "feature may be a single word or a topic. {form}",
    (
        (
            "Names of the months of the year.",
            ("the treaty was signed in March, far from", "he put the letter back and left the"),
            (1, 0),
        ),
        (
            'The word "of" in front of a name.',
            ("a glass of water and some bread", "the Bishop of Durham and the King of Spain"),
            (0, 1),
        ),
    ),
)
FUZZING = Task(
    "You are told a feature of text. In every text some words are marked with << and >>. Say 1 if all the marked words "
    "belong to the feature, and 0 if the marks are wrong. {form}",
    (
        (
            "Names of the months of the year.",
            ("the treaty was signed in<< March>>, far from", "the treaty was<< signed>> in March, far from"),
            (1, 0),
        ),
        (
            'The word "of" in front of a name.',
            ("a<< glass>> of water and some bread", "the Bishop<< of>> Durham and the King<< of>> Spain"),
            (0, 1),
        ),
    ),
)
_ONE = "Answer with a single digit, 0 or 1."
_SEVERAL = "Answer with a list of 0 and 1, one for each text in order, such as [1, 0]."


def judged(task: Task, explanation: str, texts: Sequence[str]) -> list[Message]:
    """Asks for a verdict on every text."""
    single = len(texts) == 1
    told = [_said("system", task.rules.format(form=_ONE if single else _SEVERAL))]
    for feature, examples, answers in task.lessons:
        if single:
            for example, answer in zip(examples, answers):
                told += [_said("user", _question(feature, [example])), _said("assistant", str(answer))]
        else:
            told += [_said("user", _question(feature, examples)), _said("assistant", json.dumps(list(answers)))]
    return [*told, _said("user", _question(explanation, texts))]


def _question(feature: str, texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return f"Feature: {one_line(feature)}\nText: {one_line(texts[0])}"
    return f"Feature: {one_line(feature)}\n" + "\n".join(f"Text {i + 1}: {one_line(t)}" for i, t in enumerate(texts))


_SIMULATE = (
    "You are told what a feature of a language model responds to, and the tokens of a text. Say how active the feature "
    "is at every token, from 0 (silent) to 10. It is silent at most tokens. Answer with a list of numbers, one for "
    "each token in order."
)


def simulation(explanation: str, pieces: Sequence[str]) -> list[Message]:
    """Asks for the strength of a feature at every token."""
    return [
        _said("system", _SIMULATE),
        _said("user", _tokens("Names of the months of the year.", ["signed", " in", " March", ",", " far", " from"])),
        _said("assistant", "[0, 0, 10, 0, 0, 0]"),
        _said(
            "user", _tokens('The endings "er" and "est" of adjectives that compare.', ["the", " tall", "est", " of"])
        ),
        _said("assistant", "[0, 0, 9, 0]"),
        _said("user", _tokens(explanation, pieces)),
    ]


def _tokens(feature: str, pieces: Sequence[str]) -> str:
    return f"Feature: {one_line(feature)}\nTokens: {json.dumps(list(pieces), ensure_ascii=False)}"


_INTRUDER = (
    "You are shown numbered texts with marked words. All but one have the same feature at the marked words. Answer "
    "with the number of the one that does not belong, a single digit."
)


def intruder(texts: Sequence[str]) -> list[Message]:
    """Asks for the text that does not belong to the others."""
    lesson = ("the treaty was signed in<< March>>", "left the<< door>> open", "from<< May>> until the autumn")
    return [
        _said("system", _INTRUDER),
        _said("user", _numbered(lesson)),
        _said("assistant", "2"),
        _said("user", _numbered(texts)),
    ]


def _numbered(texts: Sequence[str]) -> str:
    return "\n".join(f"{number}: {one_line(text)}" for number, text in enumerate(texts, start=1))


# ---------------------------------------------------------------------------------------------------- surprisal

SURPRISAL = """A description is followed by sentences that it describes.

Description:
Names of the months of the year.
Sentences:
the treaty was signed in March, far from the capital
it rained from May until the end of September

Description:
Idioms, phrases that are not meant literally.
Sentences:
the exam was a piece of cake for her
they were on cloud nine when the results came

Description:
{description}
Sentences:
"""
UNRELATED = "Various unrelated sentences."


# ---------------------------------------------------------------------------------------------------- interventions

_STEER = (
    "A feature of a language model was made stronger at the end of each of these texts. Behind each text stand the "
    "next words that became more likely, with the gain in probability. Say in a few words which kind of output the "
    f"feature promotes. Begin the line with {MARKER}"
)
_STEERED = (
    (
        (
            ("He bought seven pounds of", (" apples", " pears", " plums"), (0.31, 0.12, 0.05)),
            ("After dinner there was", (" fruit", " apple", " grapes"), (0.22, 0.08, 0.04)),
        ),
        "fruit",
    ),
    (
        (
            ("The distance is about", (" 20", " 100", " 5"), (0.21, 0.11, 0.07)),
            ("we need at least", (" 3", " three", " 10"), (0.14, 0.1, 0.06)),
        ),
        "numbers",
    ),
)

Promoted = tuple[str, Sequence[str], Sequence[float]]
"""A text, the tokens that became more likely behind it, and by how much."""


def output_explanation(cases: Sequence[Promoted]) -> list[Message]:
    """Asks what a feature promotes."""
    told = [_said("system", _STEER)]
    for examples, answer in _STEERED:
        told += [_said("user", _promoted(examples)), _said("assistant", f"{MARKER} {answer}")]
    return [*told, _said("user", _promoted(cases))]


def _promoted(cases: Sequence[Promoted]) -> str:
    return "\n".join(
        f"Text: {one_line(text)}\nMore likely: " + ", ".join(f"{t!r} (+{p:.2f})" for t, p in zip(tokens, gains))
        for text, tokens, gains in cases
    )


_PASSAGES = (
    ("For the picnic she had packed", " two pears and a bag of cherries", "fruit"),
    ("The distance is about", " 20 miles, or 32", "numbers"),
    ("The letter had been opened by", " her sister before she came home", "female pronouns"),
    ("Behind the mountains lie the", " plains of northern India", "Asia"),
)


def passage_beginning() -> str:
    """Worked examples in front of a passage whose amplified feature is named."""
    return "".join(passage(text, more) + f'{feature}"\n\n' for text, more, feature in _PASSAGES)


def passage(text: str, continuation: str) -> str:
    """A passage up to where its amplified feature is named."""
    return f'<PASSAGE>\n{text}{continuation}\n\nThe above passage contains an amplified amount of "'
