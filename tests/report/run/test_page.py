from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from map_bo.data import Metric
from map_bo.report.page_style import STYLE
from map_bo.report.run.page import write_html
from map_bo.report.view import RunView
from tests.report.fake_views import make_view

VOID = {"meta", "link", "img", "br"}
PIXEL = (
    b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x00\x01\x00\x00\x00\x01\x08\x06\x00\x00\x00"
    b"\x1f\x15\xc4\x89\x00\x00\x00\nIDATx\x9cc\x00\x01\x00\x00\x05\x00\x01\r\n-\xb4\x00\x00\x00"
    b"\x00IEND\xaeB`\x82"
)


class Page(HTMLParser):
    """Reads a page, and fails where tags do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(view: RunView, folder: Path) -> tuple[Page, str]:
    plots = [folder / "front.png", folder / "progress.png"]
    for plot in plots:
        plot.write_bytes(PIXEL)
    write_html(view, folder / "report.html", plots)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return Page(text), text


@pytest.mark.parametrize("m", [1, 2, 4, 8])
def test_the_page_is_well_formed_and_says_what_it_must(m: int, tmp_path: Path) -> None:
    view = make_view(m, loss=(0,), evaluations=14, points=20, failures=(11,))
    page, text = page_of(view, tmp_path)
    assert text.startswith("<!DOCTYPE html>")
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all(
        "meta"
    )
    assert len(page.all("h1")) == len(page.all("main")) == 1
    for part in (
        "Run digits_four",
        "worst of base and experts",
        "RuntimeError: CUDA out of memory",
        "the front is kept where the evaluations support the surrogate",
        "0123456789abcdef",
        "2.13.0",
        f"All {len(view.seen)} evaluations",
        "map_bo commit",
    ):
        assert part in page.text
    titles = re.findall(r"<h2 id=.*?>(.*?)</h2>", text)
    assert titles == [
        "The run",
        "The front",
        "Hypervolume",
        "Evaluations",
        "Versions",
    ]


def test_tables_and_images_are_made_for_those_who_listen(tmp_path: Path) -> None:
    page, _ = page_of(make_view(2, failures=(7,)), tmp_path)
    assert len(page.all("caption")) == len(page.all("table")) == 6
    assert all(cell.get("scope") in ("col", "colgroup", "row") for cell in page.all("th"))
    images = page.all("img")
    assert len(images) == 2
    assert all(len(image["alt"] or "") > 60 for image in images)
    targets = {a["id"] for _, a in page.tags if "id" in a}
    assert {(a["href"] or "")[1:] for a in page.all("a")} == targets
    regions = [a for a in page.all("div") if a.get("class") == "scroll"]
    assert all(a.get("tabindex") == "0" and a.get("aria-label") for a in regions)


def test_the_rows_of_every_table_have_the_same_width(tmp_path: Path) -> None:
    _, text = page_of(make_view(3, failures=(7,), evaluations=12, points=9), tmp_path)
    for table in re.findall(r"<tbody>(.*?)</tbody>", text, flags=re.S):
        widths = set()
        for row in re.findall(r"<tr>(.*?)</tr>", table, flags=re.S):
            cells = re.findall(r"<t[hd]\b([^>]*)>", row)
            spans = (re.search(r'colspan="(\d+)"', cell) for cell in cells)
            widths.add(sum(int(span.group(1)) if span else 1 for span in spans))
        assert len(widths) == 1


def test_everything_is_in_the_one_file_and_nothing_runs(tmp_path: Path) -> None:
    page, text = page_of(make_view(2), tmp_path)
    assert page.all("script") == []
    assert "http:" not in text
    assert "https:" not in text
    assert "url(" not in text
    assert "@import" not in text
    sources = [a.get("src") or a.get("href") or "" for _, a in page.tags]
    assert all(source.startswith(("data:", "#", "")) for source in sources)
    assert sum(source.startswith("data:image/png;base64,iVBOR") for source in sources) == 2
    assert not any(name.startswith("on") for _, a in page.tags for name in a)


def test_every_name_is_escaped(tmp_path: Path) -> None:
    bad = '<b>&"x'
    metrics = (Metric(bad), Metric(f"{bad}'2", "min", "loss"))
    view = make_view(
        2, metrics=metrics, title=f"<script>{bad}", notes=[f"{bad} note"], failures=(7,)
    )
    page, text = page_of(view, tmp_path)
    assert "<b>" not in text
    assert page.all("script") == page.all("b") == []
    for part in (bad, f"{bad}'2", f"Run <script>{bad}", f"{bad} note"):
        assert part in page.text
    assert any(bad in (image["alt"] or "") for image in page.all("img"))


def test_predicted_and_real_cells_are_told_apart(tmp_path: Path) -> None:
    view = make_view(2, points=5, verify=2)
    _, text = page_of(view, tmp_path)
    table = re.search(
        r"representative points of the front.*?<tbody>(.*?)</tbody>", text, flags=re.S
    )
    assert table is not None
    rows = re.findall(r'<tr><th scope="row">(\d+)</th>(.*?)</tr>', table.group(1), flags=re.S)
    assert {int(point) for point, _ in rows} == set(range(5))
    for point, cells in rows:
        real = re.findall(r'<td class="real">(.*?)</td>', cells)
        predicted = re.findall(r'<td class="predicted">([\d.]+) <small>(.*?)</small>', cells)
        i = int(point)
        assert predicted[0][0] == f"{float(view.front.mean[i, 0]):.3f}"
        assert predicted[0][1].startswith(f"{float(view.front.lower[i, 0]):.3f} to ")
        verified = bool(view.front.verified[i])
        assert real == ([f"{float(v):.3f}" for v in view.front.real[i]] if verified else ["", ""])


def test_an_unverified_front_says_so_and_a_short_one_is_not_repeated(tmp_path: Path) -> None:
    page, _ = page_of(make_view(2, points=1, verify=0), tmp_path)
    assert "No point was measured: all values are predictions." in page.text
    assert "No evaluation failed." in page.text
    assert "Optimism is" not in page.text
    assert len(page.all("table")) == 4


def test_outliers_are_marked_among_the_evaluations(tmp_path: Path) -> None:
    view = make_view(2, points=1, verify=0)
    assert "(outlier)" not in page_of(view, tmp_path)[0].text
    one = {"evaluation": 4, "metric": view.metrics[1].name, "value": 0.0}
    summary = {**view.summary, "outliers": [one]}
    marked, _ = page_of(replace(view, summary=summary), tmp_path)
    assert marked.text.count(" (outlier)") == 1
    assert f"{float(view.seen.Y[3, 1]):.3f} (outlier)" in marked.text


def test_it_is_said_where_evaluations_are_estimates(tmp_path: Path) -> None:
    view = make_view(2, points=1, verify=0)
    assert "is estimated for all of them" not in page_of(view, tmp_path)[0].text
    noise = view.seen.Yvar.nan_to_num(0.01).T.diag_embed()
    seen = replace(view.seen, covariance=noise)
    assert "is estimated for all of them" in page_of(replace(view, seen=seen), tmp_path)[0].text


def test_without_plots_there_are_no_figures(tmp_path: Path) -> None:
    write_html(make_view(2), tmp_path / "report.html", [])
    assert "<figure" not in (tmp_path / "report.html").read_text()


def contrast(a: str, b: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_is_readable_in_light_and_dark() -> None:
    for block in re.findall(r":root \{(.*?)\}", STYLE, flags=re.S)[:2]:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        for ink in ("ink", "soft", "predicted", "real", "accent"):
            for paper in ("paper", "band"):
                assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)


def test_what_is_sure_stands_apart_and_in_tables_of_even_rows(tmp_path: Path) -> None:
    view = make_view(2, points=9, verify=2, certain=True)
    _, text = page_of(view, tmp_path)
    for name in ("corrected", "probability", "Optimism of the prediction", "stopped"):
        assert name in text
    assert "95 % interval 0.7712 to 0.8534" in text
    assert "&lt;0.01" in text
    assert f'<td class="predicted">{float(view.front.corrected[0, 0]):.3f}</td>' in text
    for table in re.findall(r"<table>.*?</table>", text, re.DOTALL):
        body = table.split("<tbody>")[1]
        widths = {len(re.findall(r"<t[hd][ >]", row)) for row in body.split("<tr>")[1:]}
        assert len(widths) == 1, widths
    _, plain = page_of(make_view(2, points=9, verify=2), tmp_path)
    assert "probability is" not in plain
    assert "Optimism of the prediction" not in plain


def test_what_was_not_measured_is_no_failure_in_the_table(tmp_path: Path) -> None:
    view = make_view(m=2)
    Y = view.seen.Y.clone()
    row = int(view.seen.ok.nonzero()[-1])
    Y[row, 1] = torch.nan
    before = page_of(view, tmp_path)[1]
    text = page_of(replace(view, seen=replace(view.seen, Y=Y)), tmp_path)[1]
    assert text.count("<td>not measured</td>") == before.count("<td>not measured</td>") + 1
    assert text.count("failed") == before.count("failed")
