from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from map_bo.choice import ChoiceAxis
from map_bo.data import Metric
from map_bo.report.run.cards import print_choice, print_summary
from map_bo.report.view import RunView
from map_bo.space import CoefficientSpace
from tests.report.fake_views import make_view


def printed(view: RunView, width: int = 80, encoding: str = "utf-8") -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    print_summary(view, Console(file=file, width=width))
    file.flush()
    return raw.getvalue().decode(encoding)


@pytest.mark.parametrize("m", [1, 2, 4, 8])
@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("certain", [False, True])
def test_nothing_is_wider_than_the_terminal_or_cut(m: int, width: int, certain: bool) -> None:
    view = make_view(
        m, d=max(m, 3), evaluations=12, points=20, loss=(0,), failures=(9,), certain=certain
    )
    text = printed(view, width)
    assert "\x1b" not in text  # not a terminal: no colour codes
    assert max(map(len, text.splitlines())) <= width
    assert "\u2026" not in text
    for name in ("rot90 loss", "worst of base and experts", "CUDA out of memory", "Notes"):
        assert name in text
    for row in view.front.verified.nonzero().flatten().tolist():
        assert any(line.split()[:1] == [str(row)] for line in text.splitlines())


@pytest.mark.parametrize("certain", [False, True])
def test_the_name_of_an_operator_leaves_room_for_the_numbers(certain: bool) -> None:
    view = make_view(4, d=4, points=20, loss=(0, 1, 2, 3), certain=certain)
    axis = ChoiceAxis("operator", ("task_arithmetic", "ties"))
    names = (*view.space.names[:3], "operator")
    space = CoefficientSpace(
        names, (0.0,) * 4, (1.0,) * 4, owner=(0, 1, 2, -1), experts=names[:3],
        defaults=(0.0,), choice=axis,
    )  # fmt: skip
    front = replace(view.front, X=view.front.X.clone())
    front.X[:, 3] = 0.0
    text = printed(replace(view, space=space, front=front), 80)
    assert "task_arithmetic" in text
    assert "\u2026" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_predicted_and_real_stand_apart() -> None:
    view = make_view(2, points=30, verify=2)
    text = printed(view)
    head = next(line for line in text.splitlines() if line.startswith("  ") and "real" in line)
    assert head.split() == ["coeff."] * 2 + ["predicted"] * 2 + ["real"] * 2
    row = int(view.front.verified.nonzero()[0])
    assert f"{float(view.front.real[row, 0]):.3f}" in text
    assert f"{float(view.front.mean[row, 0]):.3f} \u00b1" in text


def test_every_hypervolume_is_compared() -> None:
    view = make_view(2)
    text = printed(view)
    for name, value in view.summary["hypervolume"].items():
        line = next(line for line in text.splitlines() if line.strip().startswith(name))
        assert f"{value:.4f}" in line


def test_an_unverified_front_is_said_to_be_predicted() -> None:
    text = printed(make_view(2, verify=0))
    assert "No point was measured: all values are predictions." in text
    assert "not measured" in text
    assert "Optimism:" not in text


@pytest.mark.parametrize(
    ("points", "heading"),
    [(1, "The point of the front"), (4, "All 4 points"), (90, "7 of the 90 points")],
)
def test_the_heading_counts_the_points(points: int, heading: str) -> None:
    assert heading in printed(make_view(2, points=points, verify=1))


def test_many_failures_are_counted_and_their_first_line_shown() -> None:
    text = printed(make_view(2, failures=(5, 6, 7, 8, 9)))
    assert text.count("CUDA out of memory") == 3
    assert "and 2 more, see evaluations.csv" in text


def test_names_are_no_markup() -> None:
    metrics = (Metric("[bold]a[/bold]"), Metric("[/x]"))
    text = printed(make_view(2, metrics=metrics, title="[red]run", notes=["[link]"]), 120)
    for name in ("[bold]a[/bold]", "[/x]", "Run [red]run", "- [link]"):
        assert name in text


@pytest.mark.parametrize("m", [2, 6])
def test_an_output_of_ascii_alone_gets_ascii(m: int) -> None:
    metrics = tuple(Metric(f"\u4e2d{i}") for i in range(m))
    text = printed(
        make_view(m, metrics=metrics, evaluations=12, points=9), width=100, encoding="ascii"
    )
    assert "\\u4e2d0" in text
    assert (" +-0." in text) == (m == 2)


def test_a_choice_shows_coefficients_intervals_and_real_values() -> None:
    view = make_view(3, loss=(1,), verify=1)
    out = io.StringIO()
    for row in (0, 1):
        print_choice(
            Console(file=out, width=80),
            space=view.space,
            metrics=view.metrics,
            x=view.front.X[row],
            mean=view.front.mean[row],
            lower=view.front.lower[row],
            upper=view.front.upper[row],
            real=view.front.real[row],
        )
    text = out.getvalue()
    assert view.front.verified.tolist()[:2] == [True, False]
    for name, value in zip(view.space.names, view.front.X[0].tolist(), strict=True):
        assert f"{value:.4f}" in text
        assert name in text
    low, high = float(view.front.lower[0, 1]), float(view.front.upper[0, 1])
    assert f"{low:.3f} to {high:.3f}" in text
    assert f"{float(view.front.real[0, 2]):.3f}" in text
    assert text.count("not measured") == 3
    assert torch.isnan(view.front.real[1]).all()


def test_what_is_sure_stands_with_the_numbers() -> None:
    view = make_view(2, points=30, verify=2, certain=True)
    text = " ".join(printed(view, 120).split())
    assert "0.8123, 95 % interval 0.7712 to 0.8534 (128 posterior draws at" in text
    assert "+0.013 \u00b1 0.0042 +0.012 \u00b1 0.003 +0.010" in text
    assert "stopped expected regret still to be gained at most 0.005" in text
    assert "5 evaluations of the budget unused" in text
    row = int(view.front.verified.nonzero()[0])
    line = next(x.split() for x in printed(view, 120).splitlines() if x.split()[:1] == [str(row)])
    assert f"{float(view.front.corrected[row, 0]):.3f}" in line
    assert line[-1] == "<0.01", "the probability of the first point is 0.001"
    unverified = printed(make_view(2, points=30, verify=0, certain=True), 120)
    assert "Nothing was verified, so optimism was neither measured nor corrected." in " ".join(
        unverified.split()
    )


@pytest.mark.parametrize("width", [60, 120])
def test_how_likely_points_are_feasible_is_shown_and_explained(width: int) -> None:
    view = make_view(2, points=3, verify=1, certain=True)
    assert "feas." not in printed(view, width)
    likely = torch.full((3,), 0.37, dtype=torch.float64)
    text = printed(replace(view, front=replace(view.front, feasible=likely)), width)
    assert text.count("0.37") == 3
    assert "feas.: the probability that its evaluation works" in " ".join(text.split())


def test_plus_or_minus_is_ascii_where_the_output_is() -> None:
    for width in (80, 160):
        text = printed(make_view(6, evaluations=12, points=9, certain=True), width, "ascii")
        assert "+-" in text
        assert "\\xb1" not in text


def test_a_choice_shows_what_was_corrected() -> None:
    view = make_view(2, verify=1, certain=True)
    out = io.StringIO()
    print_choice(
        Console(file=out, width=80),
        space=view.space,
        metrics=view.metrics,
        x=view.front.X[1],
        mean=view.front.mean[1],
        lower=view.front.lower[1],
        upper=view.front.upper[1],
        real=view.front.real[1],
        corrected=view.front.corrected[1],
    )
    assert "corrected" in out.getvalue()
    assert f"{float(view.front.corrected[1, 0]):.3f}" in out.getvalue()
