from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from map_bo.data import Metric, Observations
from map_bo.errors import PreferenceError
from map_bo.report.normalised import OwnScores, normalised_rows, normalised_words
from map_bo.report.run.artifacts import write_report
from map_bo.report.run.cards import print_choice, print_summary
from map_bo.report.view import anchor_values
from map_bo.space import CoefficientSpace
from tests.report.fake_views import make_view

SPACE = CoefficientSpace.box(("math", "code"))
METRICS = (
    Metric("math"),
    Metric("code_loss", direction="min", kind="loss"),
    Metric("other", kind="unbounded"),
)
SEEN = Observations(
    torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]]).double(),
    torch.tensor([[0.2, 4.0, 1.0], [0.8, 3.0, 2.0], [0.9, 2.0, -1.0], [0.6, 2.5, 1.5]]).double(),
    METRICS,
)


def test_a_metric_is_divided_by_the_score_of_its_own_expert() -> None:
    own = OwnScores.of(SEEN, SPACE)
    assert own.experts == ("math", "code", "math")  # of other, the best
    assert own.values.tolist() == pytest.approx([0.8, 2.0, 2.0])
    shares = own.normalise(SEEN.Y)
    assert shares[1].tolist() == [1.0, pytest.approx(2 / 3), 1.0]
    assert shares[2].tolist() == [pytest.approx(1.125), 1.0, -0.5]
    assert shares[3].tolist() == pytest.approx([0.75, 0.8, 0.75])


def test_what_has_no_share_is_nan() -> None:
    only_base = SEEN.select(torch.tensor([True, False, False, False]))
    own = OwnScores.of(only_base, SPACE)
    assert own.experts == (None, None, None)
    assert bool(own.normalise(SEEN.Y).isnan().all())
    worthless = dataclasses.replace(SEEN, Y=-SEEN.Y.abs())
    assert bool(OwnScores.of(worthless, SPACE).values.isnan().all())
    assert torch.isnan(OwnScores.of(SEEN, SPACE).normalise(torch.tensor([0.4, 0.0, 1.0]))[1])
    assert "There is no such value for math, code_loss, other" in normalised_words(METRICS, own)


def test_a_bound_on_a_share_is_one_on_the_metric() -> None:
    own = OwnScores.of(SEEN, SPACE)
    assert own.bound("math", 0.95) == pytest.approx(0.76)
    assert own.bound("code_loss", 0.8) == pytest.approx(2.5)
    assert own.normalise(torch.tensor([0.76, 2.5, 1.0]))[:2].tolist() == pytest.approx([0.95, 0.8])
    assert own.is_minimised("code_loss")
    assert not own.is_minimised("math")
    with pytest.raises(PreferenceError, match="there is no metric 'maths'"):
        own.bound("maths", 0.9)
    with pytest.raises(PreferenceError, match="must be positive, got 0"):
        own.bound("math", 0.0)
    with pytest.raises(PreferenceError, match="'math' cannot be normalised"):
        OwnScores.of(SEEN.select(torch.tensor([True, False, False, False])), SPACE).bound("math", 1)


def test_the_longest_name_of_an_expert_counts() -> None:
    space = CoefficientSpace.box(("a", "a_b"))
    metrics = (Metric("a_b_c"),)
    X = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    seen = Observations(X, torch.tensor([[0.5], [0.25]]).double(), metrics)
    assert OwnScores.of(seen, space).experts == ("a_b",)


def test_rows_are_of_baselines_and_of_points_with_their_mean() -> None:
    view = make_view(2, evaluations=20, points=30, verify=3)
    own = OwnScores.of(view.seen, view.space)
    rows = normalised_rows(view)
    anchors = anchor_values(view)
    assert [row[0] for row in rows[: len(anchors)]] == [anchor.name for anchor in anchors]
    assert {row[1] for row in rows[: len(anchors)]} == {"real"}
    points = rows[len(anchors) :]
    assert {kind for _, kind, _ in points} == {"real", "predicted"}
    for label, kind, shares in points:
        row = int(label.split()[1])
        assert kind == ("real" if bool(view.front.verified[row]) else "predicted")
        values = view.front.real[row] if kind == "real" else view.front.mean[row]
        assert shares[:-1] == pytest.approx(own.normalise(values).tolist())
        assert shares[-1] == pytest.approx(sum(shares[:-1]) / 2)


def test_summary_page_and_table_show_it_only_where_it_is_asked_for(tmp_path: Path) -> None:
    plain = make_view(2, evaluations=20, points=30, verify=3)
    for asked in (False, True):
        view = dataclasses.replace(plain, normalised=asked)
        shown = io.StringIO()
        print_summary(view, Console(file=shown, width=120))
        assert ("Normalised by each expert's own" in shown.getvalue()) is asked
        write_report(view, tmp_path)
        page = (tmp_path / "report.html").read_text()
        assert ("Normalised by each expert" in page) is asked
        rows = list(csv.DictReader((tmp_path / "front.csv").read_text().splitlines()))
        assert any(name.startswith("normalised") for name in rows[0]) is asked
    own = OwnScores.of(plain.seen, plain.space)
    name = plain.metrics[0].name
    for i, row in enumerate(rows):
        predicted = float(own.normalise(plain.front.mean[i])[0])
        assert float(row[f"normalised:{name}"]) == pytest.approx(predicted)
        real = row[f"normalised_real:{name}"]
        assert bool(real) is bool(plain.front.verified[i])


def test_a_choice_shows_its_shares() -> None:
    own = OwnScores.of(SEEN, SPACE)
    shown = io.StringIO()
    y = torch.tensor([0.4, 2.5, 1.0]).double()
    print_choice(
        Console(file=shown, width=120),
        space=SPACE,
        metrics=METRICS,
        x=torch.tensor([0.5, 0.5]),
        mean=y,
        lower=y,
        upper=y,
        real=torch.full((3,), torch.nan).double(),
        own=own,
    )
    said = shown.getvalue()
    words = " ".join(said.split())
    assert "normalised" in said
    assert [line.split()[-1] for line in said.splitlines() if line.startswith("code_loss")] == [
        "0.800"
    ]
    assert "code_loss by code" in said
    assert "Where less is better (code_loss), the expert's value is divided" in words
