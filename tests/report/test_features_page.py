"""The page in a real browser: found, opened, moved through by keyboard, at two sizes, without a word to the network."""

from __future__ import annotations

import base64
import json
import re
import shutil
import zlib

import pytest

from gossamer.errors import ConfigurationError, OutputError
from gossamer.report.features_page import FeaturesPage, render_features_page, write_features_page

PHONE = {"width": 360, "height": 740}
DESKTOP = {"width": 1280, "height": 900}


def unpacked(page, identifier):
    text = re.search(rf'<script type="text/plain" id="{identifier}">([^<]*)</script>', page)[1]
    return json.loads(zlib.decompress(base64.b64decode(text)))


def test_everything_of_every_feature_is_in_a_block(synthetic_page):
    wanted = synthetic_page(130)
    page = render_features_page(wanted, progress=False)
    index, words, text = (unpacked(page, f"data-{name}") for name in ("index", "words", "text"))
    assert index["count"] == wanted.exploration.statistics.counts.tolist()
    assert sum(len(unpacked(page, f"block-{number}")) for number in range(3)) == 130
    found = unpacked(page, "block-1")[6]  # feature 70
    first, length, _, document, position, active = found["strongest"][0]
    context = wanted.exploration.strongest[70][0]
    begin = document * 64 + context.begin
    assert [words[word] for word in text[first : first + length]] == wanted.exploration.pieces[begin : begin + length]
    assert (document, position) == (context.document, context.begin + context.centre)
    assert active == [3, 102, 20, 255, 27, 26], "levels of 0.4, 1 and 0.1, rounded up"
    assert found["promoted"][0][1] == pytest.approx(float(wanted.exploration.effects.rise[70, 0]), rel=1e-3)
    assert [words[word] for word in index["tokens"][70][::2]] == [
        wanted.token_texts[token] for token, _ in wanted.exploration.tokens[70]
    ]
    assert index["explained"]["70"].startswith("words about")
    assert index["score"]["70"] == 0.9, "a score without an answer does not count"


def test_the_page_is_the_same_for_the_same_values_and_holds_no_markup_of_others(synthetic_page):
    page = render_features_page(synthetic_page(20), progress=False)
    assert page == render_features_page(synthetic_page(20), progress=False)
    assert "</script>11" not in page
    assert "a model &amp; more" in page


def test_incomplete_facts_are_refused(synthetic_page, tmp_path):
    page = synthetic_page(20)
    parts = {name: getattr(page, name) for name in ("exploration", "cache", "token_texts")}
    with pytest.raises(ConfigurationError, match="the record lacks quality, tokens"):
        FeaturesPage({"title": "", "model": {}, "site": ""}, **parts)
    with pytest.raises(ConfigurationError, match="steered name feature 20; there are features from 0 to 19"):
        FeaturesPage(page.record, **parts, steered={20: []})
    with pytest.raises(OutputError, match="is a directory"):
        write_features_page(page, tmp_path, progress=False)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright, and Chromium")
    with playwright.sync_playwright() as driver:
        found = next((shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")), None)
        try:
            launched = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {error}")
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def file(synthetic_page, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "features.html"
    return write_features_page(synthetic_page(300), path, progress=False)


class Visit:
    """A page in a browser, and whatever went wrong on it."""

    def __init__(self, browser, file, viewport=DESKTOP, scheme="light", address=""):
        self.expect = pytest.importorskip("playwright.sync_api").expect
        self.context = browser.new_context(viewport=viewport, color_scheme=scheme, has_touch=viewport is PHONE)
        self.page, self.wrong, self.asked = self.context.new_page(), [], []
        self.page.on("console", lambda message: self.wrong.append(message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(f"file://{file}{address}")
        self.page.wait_for_selector("html[data-ready]", timeout=120_000)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.context.close()
        if error[0] is None:
            assert not self.wrong
            assert len(self.asked) == 1, "the page itself, and nothing else"

    def opened(self, feature):
        """Wait until a feature is shown."""
        self.expect(self.page.locator("#detail > h3")).to_have_text(f"Feature {feature}")

    def text(self, selector):
        return self.page.inner_text(selector)

    def search(self, words):
        self.page.fill("#query", words)
        self.expect(self.page.locator("#list")).to_have_attribute("data-searched", words)
        return [int(row.replace("#", "")) for row in self.page.locator(".row b").all_inner_texts()]


def test_features_are_found_by_token_explanation_and_number(browser, file):
    with Visit(browser, file) as visit:
        assert visit.text("h1") == "300 features of a model & more"
        assert visit.text("#found") == "297 features"
        assert visit.search("captain")[:3] == [120, 250, 3], "those explained by the word, then those firing on it"
        assert 120 in visit.search("words about captain <i>number 120")
        assert visit.search("#77")[0] == 77
        assert visit.search("no such word") == []
        assert "No feature found" in visit.text("#found")
        visit.page.select_option("#kind", "steered")
        assert visit.search("") == [5, 12]
        visit.page.select_option("#kind", "all")
        visit.page.select_option("#order", "seldom")
        assert set(visit.search("")[:3]) == {99, 199, 299}


def test_a_feature_shows_everything_that_is_known_of_it(browser, file, synthetic_page):
    wanted = synthetic_page(300)
    with Visit(browser, file, address="#f120") as visit:
        shown = visit.text("#detail")
        for part in ("Feature 120", "words about captain <i>number 120</i>", "detection 0.90", "[0.80, 0.95]",
                     "no answer", "7 abstained", "Strongest", "From the rest of its range", "promotes", "suppresses",
                     "by direction (cosine)", "by company (Jaccard)", "--layer 9 --steer 120"):  # fmt: skip
            assert part in shown, part
        assert visit.page.locator("#detail .chart rect.bar").count() == 24
        context = wanted.exploration.strongest[120][0]
        pieces = wanted.exploration.pieces[context.document * 64 + context.begin :][: len(context.tokens)]
        first = visit.page.locator("#detail .contexts li").first
        assert first.locator(".t").count() == 3
        centre = first.locator(".t.c").evaluate("e => e.firstChild.textContent")
        assert centre == pieces[context.centre].replace("\n", " ↵ ")
        assert not visit.page.locator("#detail i, #detail script").count(), "text is never markup"


def test_steered_texts_stand_side_by_side(browser, file):
    with Visit(browser, file, address="#f12") as visit:
        assert visit.page.locator(".steer .text").count() == 3
        assert "whales <swim>." in visit.text("#detail")
        boxes = [box.bounding_box() for box in visit.page.locator(".steer .text").all()]
        assert boxes[0]["y"] == boxes[1]["y"], "side by side on a desktop"
    with Visit(browser, file, PHONE, address="#f99") as visit:
        assert "Not active on any" in visit.text("#detail")


def test_the_keyboard_reaches_everything(browser, file):
    with Visit(browser, file) as visit:
        page = visit.page
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "query"
        page.keyboard.type("#42")
        page.keyboard.press("Enter")
        visit.opened(42)
        visit.search("")
        page.focus("#list")
        page.keyboard.press("ArrowDown")
        visit.opened(43)
        assert page.get_attribute("#list", "aria-activedescendant") == "row-43"
        assert page.get_attribute("#row-43", "aria-selected") == "true"
        page.keyboard.press("End")
        visit.opened(298)
        assert page.is_visible("#row-298")
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.id") == "detail"
        page.locator("#detail .near a").first.focus()
        target = page.locator("#detail .near a").first.inner_text()
        page.keyboard.press("Enter")
        visit.opened(int(target[1:]))


def test_what_is_clicked_has_a_name_and_text_is_readable(browser, file):
    contrast = """() => {
      const parse = (c) => c.match(/[\\d.]+/g).map(Number);
      const linear = (v) => (v <= 10 ? v / 3294.6 : ((v / 255 + 0.055) / 1.055) ** 2.4);
      const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
      const paper = parse(getComputedStyle(document.body).backgroundColor);
      return ["body", ".caption", ".where", ".row .what", ".scale-ends"].map((s) => {
        const ink = parse(getComputedStyle(document.querySelector(s)).color);
        const [a, b] = [light(ink.slice(0, 3)), light(paper.slice(0, 3))].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
      });
    }"""
    for scheme in ("light", "dark"):
        with Visit(browser, file, scheme=scheme) as visit:
            assert min(visit.page.evaluate(contrast)) > 4.5
            names = visit.page.evaluate(
                """() => [...document.querySelectorAll("input, select")].map((e) => e.labels.length)
                   .concat([...document.querySelectorAll("svg[role=img]")].map((e) => e.ariaLabel.length))"""
            )
            assert all(names)


def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser, file):
    with Visit(browser, file, PHONE) as visit:
        page = visit.page
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.locator(".row").nth(2).tap()
        visit.opened(2)
        visit.expect(page.locator("#detail > h3")).to_be_in_viewport()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.locator("#detail .t").first.tap()
        assert "touched: " in page.locator("#detail .where").first.inner_text()
        page.click("text=Back to the list")
        visit.expect(page.locator("#query")).to_be_in_viewport()


@pytest.mark.slow
def test_sixteen_thousand_features_stay_a_small_page(browser, synthetic_page, tmp_path):
    file = write_features_page(synthetic_page(16_384, contexts=2), tmp_path / "page.html", progress=False)
    with Visit(browser, file) as visit:
        page = visit.page
        assert visit.text("#found") == "16,221 features"
        assert page.locator(".row").count() < 60
        before = page.evaluate("document.querySelectorAll('*').length")
        page.evaluate("document.querySelector('#list').scrollTop = 8000 * 56")
        page.locator(".row", has_text="#80").first.wait_for()
        for feature in range(0, 16_000, 800):
            page.evaluate(f"location.hash = '#f{feature}'")
            visit.opened(feature)
        assert visit.search("whale")
        assert page.locator(".row").count() < 60
        assert page.evaluate("document.querySelectorAll('*').length") < before + 400, "what was shown is let go of"


def test_a_damaged_page_says_so(browser, file, tmp_path):
    text = file.read_text()
    broken = re.sub(r'(id="data-index">)[^<]{20}', r"\1" + "A" * 20, text)
    (tmp_path / "broken.html").write_text(broken)
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"file://{tmp_path / 'broken.html'}")
    page.wait_for_selector("#trouble:not([hidden])")
    assert "cannot be unpacked" in page.inner_text("#trouble")
    context.close()
