"""Laws of taking over an older study."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from map_bo.data import Metric, Observations
from map_bo.loop.transfer.embedding import embed
from map_bo.loop.transfer.study import StartFrom, Study
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.prediction import predicted_mean
from map_bo.surrogates.quadratic import Quadratic

EXPERTS, TASKS = ("a", "b", "c", "d"), ("w", "x", "y", "z")


@st.composite
def studies(draw: st.DrawFn) -> tuple[Study, CoefficientSpace, tuple[Metric, ...]]:
    """A study of some experts and tasks, and a space and metrics that hold them all."""
    source = make_generator(draw(st.integers(0, 2**31)))
    experts = draw(st.permutations(EXPERTS))[: draw(st.integers(1, 4))]
    tasks = draw(st.permutations(TASKS))[: draw(st.integers(1, 4))]
    n = draw(st.integers(1, 6))
    metrics = {name: Metric(name, kind="unbounded") for name in TASKS}
    seen = Observations(
        torch.rand(n, len(experts), generator=source, dtype=torch.float64),
        torch.randn(n, len(tasks), generator=source, dtype=torch.float64),
        tuple(metrics[name] for name in tasks),
    )
    old = Study.of(seen, CoefficientSpace.box(experts), source={"from": "test"}, title="old")
    space = CoefficientSpace.box(draw(st.permutations(EXPERTS)))
    return old, space, tuple(metrics[name] for name in draw(st.permutations(TASKS)))


@settings(max_examples=50)
@given(studies())
def test_values_keep_their_names_and_nothing_is_made_up(
    case: tuple[Study, CoefficientSpace, tuple[Metric, ...]],
) -> None:
    old, space, metrics = case
    seen = embed(old, space, metrics, StartFrom("old")).observations
    for i, name in enumerate(space.names):
        expected = old.X[:, old.names.index(name)] if name in old.names else torch.zeros(len(seen))
        assert torch.equal(seen.X[:, i], expected.double())
    for j, metric in enumerate(metrics):
        if metric.name in old.metric_names:
            assert torch.equal(seen.Y[:, j], old.Y[:, old.metric_names.index(metric.name)])
        else:
            assert bool(seen.Y[:, j].isnan().all())
    assert not bool(seen.failed_rows.any())
    assert torch.equal(seen.incomplete, ~seen.measured.all(-1))


@settings(max_examples=50)
@given(studies(), st.randoms(use_true_random=False))
def test_the_order_of_the_old_rows_and_columns_changes_nothing(
    case: tuple[Study, CoefficientSpace, tuple[Metric, ...]], random: st.DataObject
) -> None:
    old, space, metrics = case
    columns = list(range(len(old.names)))
    tasks = list(range(len(old.metrics)))
    rows = list(range(len(old.X)))
    for order in (columns, tasks, rows):
        random.shuffle(order)  # type: ignore[attr-defined]
    other = replace(
        old,
        names=tuple(old.names[i] for i in columns),
        owner=tuple(old.owner[i] for i in columns),
        X=old.X[:, columns],
        metrics=tuple(old.metrics[j] for j in tasks),
        Y=old.Y[:, tasks],
        Yvar=old.Yvar[:, tasks],
        counts=old.counts[:, tasks],
    )
    first = embed(old, space, metrics, StartFrom("old")).observations.select(rows)
    second = embed(other.select(rows), space, metrics, StartFrom("old")).observations
    assert torch.equal(first.X, second.X)
    assert torch.equal(first.Y.nan_to_num(), second.Y.nan_to_num())


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 5))
def test_rows_that_lack_a_metric_change_nothing_in_its_fit(seed: int, more: int) -> None:
    source = make_generator(seed)
    metrics = tuple(Metric(name, kind="unbounded") for name in ("x", "z"))
    space = CoefficientSpace.box(("a", "b"))
    X = torch.rand(10 + more, 2, generator=source, dtype=torch.float64)
    Y = torch.stack([X.sum(-1), (X - 0.3).square().sum(-1)], -1)
    Y[10:, 1] = torch.nan
    seen = Observations(X, Y, metrics)
    at = torch.rand(4, 2, generator=source, dtype=torch.float64)
    whole = predicted_mean(Quadratic().fit(seen, space))(at)[:, 1]
    alone = predicted_mean(Quadratic().fit(seen.of("z"), space))(at)[:, 0]
    assert torch.allclose(whole, alone, atol=1e-6)
