from __future__ import annotations

import copy
import itertools
import math
import re
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import ConfigurationError, OutputError
from gossamer.report import render_page, write_page
from gossamer.report.charts import bars, heat_map, log_ticks, quality_curve, short_kinds, split_name, spread_labels
from gossamer.report.wording import QUANTITIES, compare, figure, in_words, scaled, split_common

VOID = {"meta", "link", "br", "hr", "img", "input"}
FIGURES = {quantity.key: quantity for quantity in QUANTITIES}
DECODE, FILE, PERPLEXITY = FIGURES["decode_tokens_per_second"], FIGURES["file_bytes"], FIGURES["perplexity"]
MINIMAL = {
    "title": "small run",
    "model": {"name": "tiny"},
    "method": {"name": "wanda"},
    "dense": {"perplexity": 12.1},
    "sparse": {"perplexity": 14.3},
}


def speed(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.95 * median, "high": 1.05 * median}


def full_record() -> dict:
    return {
        **MINIMAL,
        "command": "gossamer prune demo --method wanda",
        "date": "2025-11-03",
        "python": "import gossamer",
        "model": {"name": "SmolLM2-135M", "licence": "Apache-2.0", "parameters": 134_515_008},
        "method": {
            "name": "wanda",
            "paper": {"title": "A Simple Approach", "authors": "Sun et al.", "year": 2023, "arxiv": "2306.11695"},
            "settings": {"pattern": "unstructured:row"},
        },
        "dense": {
            "perplexity": 12.1,
            "perplexity_error": 0.2,
            "file_bytes": 269_000_000,
            "memory_bytes": 269_000_000,
            "flops_per_token": 269_000_000,
            "prefill_tokens_per_second": speed(600),
            "decode_tokens_per_second": speed(20),
        },
        "sparse": {
            "perplexity": 14.3,
            "perplexity_error": 0.3,
            "file_bytes": 161_400_000,
            "memory_bytes": 269_000_000,
            "flops_per_token": 163_000_000,
            "prefill_tokens_per_second": speed(480),
            "decode_tokens_per_second": speed(20.4),
            "kl": 0.2,
            "top1_agreement": 0.8,
            "density": 0.5,
            "overall_density": 0.605,
        },
        "limit": {
            "read_bandwidth_bytes_per_second": 1.1e10,
            "decode_limit_dense": 40.0,
            "decode_limit_sparse": 66.0,
        },
        "layers": [
            {
                "name": f"model.layers.{depth}.{kind}.weight",
                "shape": [4, 8],
                "sparsity": 0.5,
                "error": 0.1 * depth + 0.1,
            }
            for depth in range(3)
            for kind in ("self_attn.q_proj", "mlp.down_proj")
        ],
        "curve": [
            {"method": method, "sparsity": sparsity, "perplexity": 12 + factor * sparsity}
            for method, factor in (("wanda", 4), ("magnitude", 90))
            for sparsity in (0.3, 0.5, 0.7)
        ],
        "generations": [{"prompt": "Once", "dense": "there was a king", "sparse": "there was a fish"}],
        "calibration": {"text": "WikiText-2", "sequences": 16, "length": 512, "seed": 0},
        "evaluation": {"text": "Moby Dick", "tokens": 32_768, "window": 1024, "stride": 512},
        "seconds": {"forward": 20.0, "selection": 0.9, "total": 21.0},
        "machine": {"cpu": "x86", "memory_bytes": 8_000_000_000},
        "versions": {"torch": "2.13.0"},
        "notes": ["batch 1"],
    }


class Document(HTMLParser):
    """Collects what tests ask about, and fails where an end tag does not close the innermost open one."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.references: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            self.attributes.append((name, value or ""))
            if name in ("src", "href", "srcset", "data", "poster", "action", "xlink:href"):
                self.references.append((tag, value or ""))
            if name == "id":
                self.ids.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def words(page: str) -> str:
    return " ".join(Document(page).text.split())


@pytest.mark.parametrize("record", [MINIMAL, full_record()], ids=["minimal", "full"])
def test_page_is_balanced_html_with_unique_ids(record):
    document = Document(render_page(record))
    assert document.open == []
    assert len(document.ids) == len(set(document.ids))
    assert document.tags.count("h1") == 1


def test_page_loads_nothing_from_anywhere():
    page = render_page(full_record())
    for tag, address in Document(page).references:
        assert address.startswith(("#", "data:")) or (tag == "a" and address.startswith("https://")), (tag, address)
    assert not re.search(r"url\(|@import|<link", page)
    assert "default-src 'none'" in page


def test_every_labelled_part_points_at_an_existing_id():
    document = Document(render_page(full_record()))
    labels = [value for name, value in document.attributes if name == "aria-labelledby"]
    assert labels
    assert set(labels) <= set(document.ids)


def test_headline_says_in_words_what_was_removed_and_what_it_cost():
    assert (
        "SmolLM2-135M with half of its block weights removed: file 0.60×, perplexity 12.1 → 14.3, decode 1.02×"
        in words(render_page(full_record()))
    )


@pytest.mark.parametrize(("density", "share"), [(0.25, "three quarters of"), (2 / 3, "a third of"), (0.4, "60% of")])
def test_headline_names_common_shares(density, share):
    record = copy.deepcopy(full_record())
    record["sparse"]["density"] = density
    assert f"with {share} its block weights removed" in words(render_page(record))


def test_unchanged_speed_is_called_no_faster_and_explained():
    text = words(render_page(full_record()))
    assert "no faster: 1.02×, within the spread" in text
    assert "bought size, not speed" in text


def test_real_speedup_is_not_explained_away():
    record = full_record()
    record["sparse"]["decode_tokens_per_second"] = speed(30)
    text = words(render_page(record))
    assert "50% faster" in text
    assert "does not run faster" not in text


@pytest.mark.parametrize(
    ("quantity", "dense", "sparse", "meaning", "sign", "text"),
    [
        (PERPLEXITY, 10.0, 12.0, "worse", "▲", "20% worse"),
        (PERPLEXITY, 47.0, 569.0, "worse", "▲", "12.1×, worse"),
        (FILE, 100, 60, "better", "▼", "40% smaller"),
        (FILE, 100, 100, "same", "=", "no smaller: 1.00×"),
        (FILE, 100, 104, "worse", "▲", "4.0% larger"),
        (DECODE, speed(20), speed(15), "worse", "▼", "25% slower"),
        (DECODE, speed(20), speed(19.5), "same", "=", "no faster: 0.97×, within the spread"),
        (DECODE, speed(20), speed(80), "better", "▲", "4.00×, faster"),
        (DECODE, speed(20), None, "unknown", "", "no comparison"),
        (FILE, math.nan, 60, "unknown", "", "no comparison"),
        (FILE, 0, 60, "unknown", "", "no comparison"),
    ],
)
def test_changes_are_judged_by_meaning_and_marked_with_a_sign(quantity, dense, sparse, meaning, sign, text):
    change = compare(quantity, dense, sparse)
    assert (change.meaning, change.sign, change.text) == (meaning, sign, text)


@given(st.floats(1e-3, 1e9), st.floats(1e-3, 1e9))
def test_speed_is_never_called_better_unless_it_rose(dense, sparse):
    assert (compare(DECODE, dense, sparse).meaning == "better") <= (sparse > dense)
    assert (compare(FILE, dense, sparse).meaning == "better") <= (sparse < dense)


def test_hostile_text_stays_text_wherever_it_stands():
    attack = "</style></script><script>alert(1)</script><img src=x onerror=alert(1)>\"' {{ 7 * 7 }} &amp;"

    def poison(value):
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        if isinstance(value, list):
            return [poison(item) for item in value]
        return attack + value if isinstance(value, str) else value

    record = poison(full_record())
    record["settings"] = {attack: attack}
    record["machine"][attack] = attack
    record["layers"] += [{"name": f"{attack}.{depth}.{attack}", "error": 0.5} for depth in range(2)]
    page = render_page(record)
    document = Document(page)
    assert document.open == []
    assert document.tags.count("script") == 1
    assert "img" not in document.tags
    assert "onerror" not in {name for name, _ in document.attributes}
    assert "{{ 7 * 7 }}" in document.text
    assert not any(tag == "a" for tag, _ in document.references)


def test_only_a_real_arxiv_identifier_becomes_a_link():
    record = full_record()
    assert ("a", "https://arxiv.org/abs/2306.11695") in Document(render_page(record)).references
    record["method"]["paper"]["arxiv"] = "javascript:alert(1)"
    assert "a" not in Document(render_page(record)).tags


@pytest.mark.parametrize("key", sorted(set(full_record()) - set(MINIMAL)))
def test_page_does_without_any_optional_part(key):
    record = full_record()
    del record[key]
    assert Document(render_page(record)).open == []
    record[key] = None
    assert Document(render_page(record)).open == []


@pytest.mark.parametrize(
    ("key", "heading"),
    [
        ("curve", "Quality against sparsity"),
        ("layers", "Layer by layer"),
        ("layers", "All layers"),
        ("generations", "The same prompt, twice"),
        ("calibration", "Calibration"),
        ("machine", "Machine"),
        ("notes", "Notes"),
        ("command", "On the command line"),
    ],
)
def test_missing_part_leaves_its_section_out(key, heading):
    def headings(record):
        return re.findall(r"<h[23][^>]*>([^<]*)", render_page(record))

    record = full_record()
    assert heading in headings(record)
    del record[key]
    assert heading not in headings(record)


def test_unknown_numbers_read_not_available():
    record = full_record()
    record["sparse"].update(perplexity=math.nan, kl=None, decode_tokens_per_second=None, file_bytes=math.nan)
    record["layers"][0].update(error=math.nan, sparsity=None)
    record["curve"][0]["perplexity"] = None
    record["machine"]["memory_bytes"] = None
    page = render_page(record)
    text = words(page)
    assert "perplexity 12.1 → n/a, decode n/a" in text
    assert "no comparison" in text
    assert "KL divergence n/a" in " ".join(re.sub(r"<[^>]+>", " ", page).split())
    assert not re.search(r"\b(nan|None|inf)\b", text)
    assert '"None' not in page
    assert '"nan' not in page


def test_every_layer_is_in_the_table_with_sortable_numbers():
    page = render_page(full_record())
    assert page.count('<tr><th scope="row">model.layers.') == 6
    assert '<td data-value="0.5">50.0%</td><td data-value="0.1">0.1</td>' in page


def test_same_record_gives_the_same_page_and_stays_unchanged():
    record = full_record()
    assert render_page(record) == render_page(copy.deepcopy(record))
    assert record == full_record()


def test_page_of_a_whole_model_stays_under_one_megabyte():
    record = full_record()
    record["layers"] = [
        {"name": f"model.layers.{depth}.mlp.proj_{kind}.weight", "shape": [576, 576], "sparsity": 0.5, "error": 0.1}
        for depth in range(80)
        for kind in range(7)
    ]
    assert len(render_page(record).encode()) < 1_000_000


@pytest.mark.parametrize("path", ["title", "model", "method.name", "dense.perplexity", "sparse.perplexity"])
def test_missing_required_key_is_named(path):
    record = copy.deepcopy(MINIMAL)
    section, _, key = path.rpartition(".")
    del (record[section] if section else record)[key]
    with pytest.raises(ConfigurationError, match=rf"lacks {re.escape(path)}") as caught:
        render_page(record)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "many"}, "layers of the run record is a str; it must be a list"),
        ({"dense": [1]}, "dense of the run record is a list; it must be a dict"),
        ({"curve": [3]}, r"curve\[0\] of the run record is a int"),
    ],
)
def test_section_of_the_wrong_kind_is_named(changes, message):
    with pytest.raises(ConfigurationError, match=message):
        render_page({**MINIMAL, **changes})
    with pytest.raises(ConfigurationError, match="is a list"):
        render_page([])


def test_page_is_written_whole_and_leaves_no_temporary_file(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    assert write_page(MINIMAL, path) == path
    assert path.read_text(encoding="utf-8") == render_page(MINIMAL)
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_failed_writing_keeps_the_old_page(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        write_page(MINIMAL, path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]


def test_incomplete_record_touches_no_file(tmp_path):
    with pytest.raises(ConfigurationError):
        write_page({}, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_missing_directory_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="cannot write the page"):
        write_page(MINIMAL, tmp_path / "nowhere" / "page.html")


def test_texts_part_at_a_word():
    cut = split_common("there was a king", "there was a kind man")
    assert (cut["common"], cut["dense"], cut["sparse"], cut["words"]) == ("there was a ", "king", "kind man", 3)


@given(st.text(), st.text(), st.text())
def test_cut_texts_can_be_put_together_again(common, dense, sparse):
    cut = split_common(common + dense, common + sparse)
    assert cut["common"] + cut["dense"] == (common + dense).strip()
    assert cut["common"] + cut["sparse"] == (common + sparse).strip()


@pytest.mark.parametrize(
    ("value", "text"),
    [(269_000_000, "269 MB"), (999_600, "1.00 MB"), (1_500, "1.50 kB"), (12, "12 B"), (None, "n/a"), (math.nan, "n/a")],
)
def test_sizes_have_three_digits_and_a_prefix(value, text):
    assert scaled(value, "B") == text


def test_figures_and_settings_read_naturally():
    assert [figure(value) for value in (47.123, 2025.4, 0.0561, 12.0, True)] == ["47.1", "2,025", "0.0561", "12", "n/a"]
    assert in_words({"a": [1, 2.5], "b": False, "c": None, "memory_bytes": 8e9}) == (
        "a 1, 2.5, b no, c n/a, memory_bytes 8.00 GB"
    )


def test_layer_names_give_kind_and_depth():
    assert split_name("model.layers.12.mlp.experts.3.w1.weight") == ("model.layers.mlp.experts.*.w1", 12)
    assert split_name("classifier.weight") is None
    assert short_kinds(["a.attn.out", "a.mlp.out", "a.mlp.up"]) == ["attn.out", "mlp.out", "mlp.up"]


def test_heat_map_places_layers_by_kind_and_depth_and_averages_experts():
    layers = [
        {"name": "h.0.a.weight", "error": 0.0},
        {"name": "h.1.a.weight", "error": 0.4},
        {"name": "h.1.e.0.weight", "error": 0.1},
        {"name": "h.1.e.1.weight", "error": 0.3},
        {"name": "h.0.e.0.weight", "error": None},
        {"name": "head.weight", "error": 9.0},
    ]
    heat = heat_map(layers, "error")
    assert [(cell.x, cell.y, cell.level) for cell in heat.cells] == [
        (0, 0, 0.0),
        (50, 0, 1.0),
        (0, 22, None),
        (50, 22, pytest.approx(0.5)),
    ]
    assert [tick.label for tick, _ in heat.rows] == ["a", "*"]
    assert heat_map(layers[:1], "error") is None


def test_curve_is_logarithmic_and_marks_the_method_of_the_run():
    rows = [{"method": "A", "sparsity": s, "perplexity": p} for s, p in ((0.1, 10), (0.2, 100), (0.3, 1000))]
    rows.append({"method": "b", "sparsity": 0.2, "perplexity": math.inf})
    curve = quality_curve(rows, "a", dense=10.0)
    (line,) = curve.lines
    assert line.highlighted
    first, second, third = line.points
    assert first.y - second.y == pytest.approx(second.y - third.y, abs=0.2)
    assert curve.dense_y == first.y
    assert quality_curve([{"method": "b"}], "a", None) is None


def test_curve_of_a_single_point_can_be_drawn():
    curve = quality_curve([{"method": "a", "sparsity": 0.5, "perplexity": 3.0}], "a", None)
    assert curve.lines[0].points[0].x == 50
    assert 0 < curve.lines[0].points[0].y < curve.height


@given(st.lists(st.floats(0, 320), min_size=1, max_size=12))
def test_labels_keep_their_distance_and_stay_above_the_axis(positions):
    placed = spread_labels(positions, gap=17, bottom=320)
    ordered = sorted(placed)
    assert all(below - above >= 17 - 1e-6 for above, below in itertools.pairwise(ordered))
    assert ordered[-1] <= 320


@given(st.floats(1, 1e6), st.floats(1.5, 1e8))
def test_log_ticks_stay_inside_the_axis_and_are_few(low, span):
    ticks = log_ticks(low, low * span)
    assert all(low <= tick <= low * span for tick in ticks)
    assert len(ticks) <= 10


def test_bars_share_a_scale_that_starts_at_zero():
    long, short, unknown = bars([{"value": 20.0, "limit": 40.0}, {"value": 10.0, "high": 12.0}, {"value": None}])
    assert (long.width, long.limit) == (50, 100)
    assert (short.width, short.high) == (25, 30)
    assert unknown.width is None
