from __future__ import annotations

import dataclasses
import re
from html.parser import HTMLParser

import pytest

from map_bo.report.comparison.comparison import Comparison
from map_bo.report.comparison.page import PLOTS, comparison_html, comparison_markdown
from tests.report.fake_runs import comparison, failed, record

IMAGES = dict.fromkeys(PLOTS, b"png")


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def hostile() -> Comparison:
    found = comparison(seeds=2, more=[failed("<script>alert(1)</script>", "a | b <i>")])
    return dataclasses.replace(found, title='"><img src=x>')


def test_the_page_is_well_formed_and_accessible() -> None:
    text = comparison_html(comparison(seeds=2, more=[failed()]), IMAGES)
    page = Page(text)
    assert len(page.all("h1")) == 1
    assert len(page.all("table")) == len(page.all("caption")) >= 8
    assert all(attributes["alt"] for attributes in page.all("img"))
    assert all(attributes.get("scope") for attributes in page.all("th"))
    ids = {attributes["id"] for attributes in page.all("h2")}
    anchors = {a["href"] for a in page.all("a") if (a["href"] or "").startswith("#")}
    assert anchors == {f"#{name}" for name in ids}
    assert page.all("html") == [{"lang": "en"}]


def test_the_page_fetches_nothing_and_runs_nothing() -> None:
    text = comparison_html(comparison(seeds=2), IMAGES)
    assert "<script" not in text
    assert not re.search(r'(src|href)="(https?:)?//', text)
    assert all(str(a["src"]).startswith("data:") for a in Page(text).all("img"))


def test_names_are_escaped() -> None:
    text = comparison_html(hostile(), IMAGES)
    Page(text)
    assert "<script>" not in text
    assert "<img src=x>" not in text
    said = comparison_markdown(hostile())
    assert "<script>" not in said
    assert "a \\| b \\<i\\>" in said


def test_it_names_both_win_rates_and_the_reference_point() -> None:
    for text in (
        comparison_html(comparison(seeds=2), IMAGES),
        comparison_markdown(comparison(seeds=2)),
    ):
        for words in (
            "Per-objective win rate",
            "Dominance win rate",
            "reference point rot90",
            "(predicted)",
            "(real)",
        ):
            assert words in text, words


def test_a_single_variant_has_no_differences() -> None:
    from map_bo.report.comparison.comparison import compare

    found = compare([record({"seed": str(s)}) for s in range(2)], title="x")
    text = comparison_html(found, IMAGES)
    assert "Only the seed varied." in text
    assert "win rate" not in text


def test_markdown_tables_have_even_rows() -> None:
    width = None
    tables = 0
    for line in comparison_markdown(hostile()).splitlines():
        if not line.startswith("|"):
            width = None
            continue
        cells = len(re.findall(r"(?<!\\)\|", line))
        tables += width is None
        assert width in (None, cells)
        width = cells
    assert tables >= 8


@pytest.mark.parametrize("name", PLOTS)
def test_every_plot_is_embedded_and_linked(name: str) -> None:
    assert f"](comparison/{name}.png)" in comparison_markdown(comparison(seeds=2))
