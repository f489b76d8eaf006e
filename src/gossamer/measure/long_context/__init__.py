"""Long contexts: tasks of exact length made of real text, and what sparse attention costs on them."""

from collections.abc import Callable
from functools import partial

from gossamer.measure.long_context.frontier import Contender, Frontier, Row, Subject, draw, frontier
from gossamer.measure.long_context.isoflops import IsoFlops, isoflops
from gossamer.measure.long_context.law import SparseAttentionLaw, fit_sparse_attention_law, validate_law
from gossamer.measure.long_context.prediction import answers, decoded_nll
from gossamer.measure.long_context.reading import QuestionAnswering
from gossamer.measure.long_context.safety import (
    SafeSparsity,
    holm,
    max_safe_sparsity,
    paired_test,
    prompts_needed,
)
from gossamer.measure.long_context.sample import Sample
from gossamer.measure.long_context.stories import StoryFiltering, StoryMultihop, StoryRetrieval
from gossamer.measure.long_context.tasks import CommonWords, Needle, Task, VariableTracking
from gossamer.measure.long_context.words import WordTokenizer, small_vocabulary

TASKS: dict[str, Callable[..., Task]] = {
    "needle": Needle,
    "variable-tracking": VariableTracking,
    "common-words": CommonWords,
    "question-answering": QuestionAnswering,
    "question-answering-novel": partial(QuestionAnswering, source="novel"),
    "story-retrieval": StoryRetrieval,
    "story-multihop": StoryMultihop,
    "story-filtering": StoryFiltering,
}
"""Tasks by the name under which the command line knows them."""

__all__ = [
    "TASKS",
    "CommonWords",
    "Contender",
    "Frontier",
    "IsoFlops",
    "Needle",
    "QuestionAnswering",
    "Row",
    "SafeSparsity",
    "Sample",
    "SparseAttentionLaw",
    "StoryFiltering",
    "StoryMultihop",
    "StoryRetrieval",
    "Subject",
    "Task",
    "VariableTracking",
    "WordTokenizer",
    "answers",
    "decoded_nll",
    "draw",
    "fit_sparse_attention_law",
    "frontier",
    "holm",
    "isoflops",
    "max_safe_sparsity",
    "paired_test",
    "prompts_needed",
    "small_vocabulary",
    "validate_law",
]
