"""The share of sampling noise that rows do not have in common, as outcomes of examples tell it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.examples.sets import ExampleOutcomes
from map_bo.examples.sharing import DIFFERS, differing_share, pooled
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.links import as_fitted
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic

RIGHT = Metric("right", resampling="same")


def scored(outcomes: Tensor, metrics: tuple[Metric, ...] = (RIGHT,)) -> Observations:
    """Return rows with outcomes ``r x n`` (NaN where an example was not scored) of one metric."""
    rows = len(outcomes)
    examples = []
    for row in outcomes:
        there = (~row.isnan()).nonzero().flatten()
        found = ExampleOutcomes(there, row[there], len(row), (True,))
        examples.append({metric.name: found for metric in metrics})  # each an evaluator's own
    mean = outcomes.nanmean(-1, keepdim=True).expand(-1, len(metrics))
    n = (~outcomes.isnan()).sum(-1, keepdim=True).expand(-1, len(metrics)).double()
    return Observations(
        torch.linspace(0, 1, rows).unsqueeze(-1),
        mean,
        metrics,
        Yvar=mean * (1 - mean) / n,
        counts=n,
        examples=tuple(examples),
    )


def alike(rho: float, rows: int, size: int, seed: int = 0) -> Tensor:
    """Return 0/1 outcomes that correlate by ``rho``: with that share of examples in common."""
    generator = make_generator(seed)
    common = (torch.rand(size, generator=generator, dtype=torch.float64) < 0.6).double()
    own = (torch.rand(rows, size, generator=generator, dtype=torch.float64) < 0.6).double()
    shared = torch.rand(rows, size, generator=generator, dtype=torch.float64) < rho**0.5
    return torch.where(shared, common, own)


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.9])
def test_many_rows_show_the_share(rho: float) -> None:
    share = float(differing_share(scored(alike(rho, 40, 2000))))
    assert share == pytest.approx(1 - rho, abs=0.05)


@pytest.mark.parametrize("rho", [0.0, 0.95])
def test_few_rows_or_examples_leave_it_near_the_usual_one(rho: float) -> None:
    def away(rows: int, size: int) -> float:
        return abs(float(differing_share(scored(alike(rho, rows, size)))) - DIFFERS)

    assert away(2, 500) < away(6, 500) < away(40, 500)
    assert away(6, 10) < away(6, 500)


def test_the_share_is_the_pooled_correlation() -> None:
    outcomes = torch.tensor(
        [[1, 1, 0, 0, 1, 0, 1, 1], [1, 0, 0, 0, 1, 0, 1, 1], [1, 1, 0, 1, 1, 0, 0, 1]]
    ).double()
    centred = outcomes - outcomes.mean(-1, keepdim=True)
    C = centred @ centred.mT
    size = C.diagonal().sqrt()
    pairs = torch.ones(3, 3).triu(1).bool()
    rho = float(C[pairs].sum() / (size * size.unsqueeze(-1))[pairs].sum())
    error = 0.2**2 / 2 + (1 - rho**2) ** 2 / 8
    weight = 0.15**2 / (0.15**2 + error)
    expected = DIFFERS + weight * (1 - rho - DIFFERS)
    assert float(differing_share(scored(outcomes))) == pytest.approx(expected, rel=1e-9)


@settings(max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 6), st.sampled_from([0.1, 10.0, 1e6]))
def test_order_and_unit_do_not_matter(seed: int, rows: int, unit: float) -> None:
    outcomes = torch.randn(rows, 30, generator=make_generator(seed), dtype=torch.float64)
    outcomes += torch.randn(30, generator=make_generator(seed + 1), dtype=torch.float64)
    loss = Metric("loss", "min", "unbounded", resampling="same")

    def share(values: Tensor) -> float:
        items = torch.arange(values.shape[-1])
        examples = [{"loss": ExampleOutcomes(items, row, len(row), (True,))} for row in values]
        Y = values.mean(-1, keepdim=True)
        X = torch.zeros(rows, 1)
        return float(differing_share(Observations(X, Y, (loss,), examples=tuple(examples))))

    base = share(outcomes)
    assert 0.05 <= base <= 1.0
    order = torch.randperm(rows, generator=make_generator(seed))
    items = torch.randperm(30, generator=make_generator(seed))
    assert share(outcomes[order]) == pytest.approx(base, rel=1e-9)
    assert share(outcomes[:, items]) == pytest.approx(base, rel=1e-9)
    assert share(unit * outcomes + 3 * unit) == pytest.approx(base, rel=1e-6)


def test_rows_with_some_of_the_examples_are_compared_on_what_both_have() -> None:
    outcomes = alike(0.6, 12, 1000)
    whole = float(differing_share(scored(outcomes)))
    some = outcomes.clone()
    some[::2, 500:] = torch.nan
    assert float(differing_share(scored(some))) == pytest.approx(whole, abs=0.05)
    apart = outcomes.clone()[:2]
    apart[0, 500:], apart[1, :495] = torch.nan, torch.nan
    assert bool(differing_share(scored(apart)).isnan())  # five in common


def test_what_says_nothing_is_not_a_number() -> None:
    outcomes = alike(0.5, 5, 100)
    bare = dataclasses.replace(scored(outcomes), examples=({},) * 5)
    assert bool(differing_share(bare).isnan())
    assert bool(differing_share(scored(outcomes).select([0])).isnan())
    assert bool(differing_share(scored(torch.ones(4, 100).double())).isnan())
    other = ({"else": row["right"]} for row in scored(outcomes).examples)
    assert bool(differing_share(dataclasses.replace(bare, examples=tuple(other))).isnan())
    no_mean = tuple(
        {"right": dataclasses.replace(row["right"], means=(False,))}
        for row in scored(outcomes).examples
    )
    assert bool(differing_share(dataclasses.replace(bare, examples=no_mean)).isnan())


def test_a_row_that_is_wrong_throughout_has_no_say() -> None:
    outcomes = alike(0.7, 10, 800)
    spoilt = torch.cat([outcomes, torch.zeros(3, 800).double()])
    found, expected = (float(differing_share(scored(one))) for one in (spoilt, outcomes))
    assert found == pytest.approx(expected, rel=1e-9)


def test_metrics_of_one_evaluator_are_told_apart_by_their_names() -> None:
    first, second = alike(0.2, 20, 600, 1), alike(0.9, 20, 600, 2)
    metrics = (Metric("set_b", resampling="same"), Metric("set_a", resampling="same"))
    items = torch.arange(600)
    examples = tuple(
        {
            "set": ExampleOutcomes(
                items, torch.stack([a, b], -1), 600, (True, True), ("set_a", "set_b")
            )
        }
        for a, b in zip(first, second, strict=True)
    )
    Y = torch.stack([second.mean(-1), first.mean(-1)], -1)
    seen = Observations(torch.rand(20, 1).double(), Y, metrics, examples=examples)
    found = differing_share(seen)
    assert float(found[0]) == pytest.approx(0.1, abs=0.06)
    assert float(found[1]) == pytest.approx(0.8, abs=0.08)
    unnamed = tuple({"set": dataclasses.replace(row["set"], metrics=())} for row in seen.examples)
    assert bool(differing_share(dataclasses.replace(seen, examples=unnamed)).isnan().all())


def test_surrogates_take_the_measured_share_where_examples_are_the_same() -> None:
    outcomes = alike(0.8, 16, 400)
    fresh, silent = Metric("fresh", resampling="fresh"), Metric("silent")
    seen = scored(outcomes, (RIGHT, fresh, silent))
    bare = dataclasses.replace(seen, examples=({},) * len(seen))
    share = float(differing_share(seen)[0])
    assert share < 0.28
    fitted, usual = as_fitted(seen), as_fitted(bare)
    torch.testing.assert_close(fitted.Yvar[:, 0], share * seen.Yvar[:, 0])
    torch.testing.assert_close(fitted.counts[:, 0], seen.counts[:, 0] / share)
    torch.testing.assert_close(usual.Yvar[:, 0], DIFFERS * seen.Yvar[:, 0])
    assert torch.equal(fitted.Yvar[:, 1:], seen.Yvar[:, 1:])
    assert torch.equal(fitted.counts[:, 1:], seen.counts[:, 1:])
    space = CoefficientSpace.box(("a",))
    for surrogate in (Quadratic(), GP()):
        one, other = (surrogate.fit(rows, space).training_targets()[1] for rows in (seen, bare))
        assert float(one[:, 0].mean()) < float(other[:, 0].mean())


def test_pooled_noise_has_one_correlation_and_leaves_independent_rows_alone() -> None:
    source = torch.Generator().manual_seed(2)
    root = torch.randn(4, 6, generator=source, dtype=torch.float64)
    whole = torch.zeros(1, 5, 5, dtype=torch.float64)
    whole[0, :4, :4] = root @ root.T
    whole[0, 4, 4] = 2.0
    seen = Observations(
        torch.rand(5, 2, generator=source),
        torch.rand(5, 1, generator=source),
        (Metric("a"),),
        whole.diagonal(dim1=-1, dim2=-2).T,
        covariance=whole,
    )
    found = pooled(seen).covariance
    assert found is not None
    torch.testing.assert_close(found[0].diagonal(), whole[0].diagonal())
    deviation = whole[0].diagonal().sqrt()
    before = (whole[0] / (deviation.unsqueeze(-1) * deviation))[:4, :4]
    after = (found[0] / (deviation.unsqueeze(-1) * deviation))[:4, :4]
    off = ~torch.eye(4, dtype=torch.bool)
    expected = max(0.0, float(before[off].mean()))
    torch.testing.assert_close(after[off], torch.full((12,), expected, dtype=torch.float64))
    assert not bool(found[0, 4, :4].any())
    assert pooled(dataclasses.replace(seen, covariance=None)).covariance is None
