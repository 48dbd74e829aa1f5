from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.quality import items
from benchmarks.quality.items import answers, cost_of, measure, reach, reached, table
from benchmarks.quality.items_baselines import Fidelities, Fixed, Ledger, Scoring, Step, play
from benchmarks.quality.items_cases import ItemCase, item_case
from map_bo.data import Metric, Observations
from map_bo.errors import ConfigError, DataError
from map_bo.examples.sets import ExampleOutcomes, Part, order_of
from map_bo.problems.problem import HasExamples, on_parts
from map_bo.rng import make_generator
from map_bo.samplers.allocation.front_doubt import FrontDoubt

Row = items.Row


@pytest.fixture(scope="module")
def case() -> ItemCase:
    return item_case("digits-mlp-2", epochs=1)


# --- the cost of a regret


@pytest.mark.parametrize(
    ("target", "expected"),
    [(0.5, 1.0), (0.25, 2.5), (0.22, 4.2), (0.15, 4 + 2 / 3), (0.1, 5.0), (0.05, math.inf)],
)
def test_a_regret_is_reached_when_it_stays(target: float, expected: float) -> None:
    curve = [(1.0, 0.4), (3.0, 0.2), (4.0, 0.25), (5.0, 0.1)]
    assert reach(curve, target) == pytest.approx(expected)


def test_nothing_is_reached_without_an_answer() -> None:
    assert math.isinf(reach([], 1.0))


def _rows(method: str, by_seed: dict[int, list[tuple[float, float]]], case: str = "a") -> list[Row]:
    return [
        {
            "case": case,
            "method": method,
            "seed": seed,
            "evaluations": cost,
            "most": 12.0,
            "spent": cost,
            "rows": round(cost),
            "seconds": 2 * cost,
            "regret": regret,
        }
        for seed, curve in by_seed.items()
        for cost, regret in curve
    ]


def test_the_target_is_the_mean_regret_of_the_default_at_the_end() -> None:
    full = _rows("full", {0: [(6.0, 0.3), (12.0, 0.1)], 1: [(6.0, 0.2), (12.0, 0.2)]})
    # The target is .15: one run meets it half-way to 6, the other one never.
    some = _rows("auto", {0: [(2.0, 0.2), (6.0, 0.1)], 1: [(2.0, 0.3), (6.0, 0.2)]})
    found = reached([*full, *some], "auto", ["a"])
    assert found is not None
    assert (found.never, found.pairs) == (1, 2)
    assert math.isinf(found.share)
    assert found.mean == pytest.approx(6 / 12)  # .25 at 2 and .15 at 6
    own = reached(full, "full", ["a"])
    assert own is not None
    assert own.mean == pytest.approx(1.0)


def test_a_share_is_a_median_over_seeds_and_over_cases() -> None:
    steady = [(12.0, 0.1)]
    full = [row for name in "abc" for row in _rows("full", dict.fromkeys(range(3), steady), name)]
    some = [
        row
        for name, costs in (("a", (1, 2, 9)), ("b", (3, 3, 3)), ("c", (6, 6, 6)))
        for row in _rows("auto", {i: [(float(c), 0.05)] for i, c in enumerate(costs)}, name)
    ]
    assert reached([*full, *some], "auto", ["a"]).share == pytest.approx(2 / 12)  # type: ignore[union-attr]
    pooled = reached([*full, *some], "auto", ["a", "b", "c"])
    assert pooled is not None
    assert pooled.share == pytest.approx(3 / 12)
    assert pooled.low <= pooled.share <= pooled.high
    assert pooled.mean_low <= pooled.mean <= pooled.mean_high
    assert pooled.pairs == 9
    assert reached([*full, *some], "absent", ["a"]) is None


def test_only_seeds_of_both_are_compared() -> None:
    full = _rows("full", {0: [(12.0, 0.1)], 1: [(12.0, 0.9)]})
    some = _rows("auto", {0: [(3.0, 0.2), (6.0, 0.1)]})
    found = reached([*full, *some], "auto", ["a"])
    assert found is not None
    assert found.share == pytest.approx(6 / 12)  # with seed 1 the target would be .5
    assert found.pairs == 1


def test_the_tables_say_what_was_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "CASES", ("a",))
    full = {seed: [(6.0, 0.3), (12.0, 0.1)] for seed in range(5)}
    some = {seed: [(2.0, 0.05), (6.0, 0.05)] for seed in range(5)}
    lines = table([*_rows("full", full), *_rows("fixed-100", some)])
    [line] = [
        one for one in lines if one.startswith("| the first 100 | a | 0.17 [0.17, 0.17] | 0.17")
    ]
    assert "| 0 of 5 |" in line
    [line] = [one for one in lines if one.startswith("| a | the first 100 |")]
    assert line.count("0.0500") == 2
    [line] = [one for one in lines if one.startswith("| the first 100 | ") and "-0.2500" in one]
    assert "-0.2500 [-0.2500, -0.2500]" in line  # at half of the cost


# --- what is answered, and what it cost


def _seen(counts: list[list[int]], size: int = 10) -> Observations:
    metrics = tuple(Metric(f"m{j}", resampling="same") for j in range(len(counts[0])))
    return Observations(
        torch.rand(len(counts), 2, generator=make_generator(0), dtype=torch.float64),
        torch.full((len(counts), len(metrics)), 0.5),
        metrics,
        examples=tuple(
            {
                metric.name: ExampleOutcomes(torch.arange(n), torch.ones(n), size, (True,))
                for metric, n in zip(metrics, row, strict=True)
            }
            for row in counts
        ),
    )


def test_a_cost_is_in_evaluations_of_all_examples() -> None:
    assert cost_of(_seen([[10, 10], [5, 10], [1, 1]])) == pytest.approx(1 + 0.75 + 0.1)
    assert cost_of(_seen([[10, 10]]).select([])) == 0


def test_an_answer_has_what_was_scored_within_its_cost() -> None:
    states = [_seen([[1, 1]] * n) for n in range(1, 6)]
    trail = [Step(0.5 * n, seen, 0.0) for n, seen in enumerate(states, 1)]
    found = answers(trail, 6.0, (0.05, 1 / 6, 0.3, 0.5, 1.0))
    told = [(cost, step.cost, len(step.seen)) for cost, step in found]
    # Nothing was scored by .3; the run ended at 2.5, near 3 and long before 6.
    assert told == [(pytest.approx(1.0), 1.0, 2), (pytest.approx(1.8), 1.5, 3), (3.0, 2.5, 5)]


def test_runs_are_kept_and_found_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(items, "CACHE", tmp_path)
    monkeypatch.setattr(items, "missing", lambda name: None)
    begun = []

    def run(name: str, method: str, seed: int, shares: Sequence[float]) -> list[Row]:
        begun.append((name, method, seed))
        costs = (12.0,) if method == "full" else [12.0 * share for share in shares]
        return _rows(method, {seed: [(cost, 0.1) for cost in costs]}, name)

    monkeypatch.setattr(items, "run", run)
    rows = measure(["a"], ["full"], range(2), until=math.inf, known=())
    assert len(begun) == 2
    assert measure(["a"], ["full"], range(3), until=0.0, known=()) == rows
    known = _rows("full", {2: [(12.0, 0.3)]})
    assert measure(["a"], ["full"], range(3), until=math.inf, known=known) == [*rows, *known]
    assert len(begun) == 2
    some = measure(["a"], ["auto"], [0], until=math.inf, known=(), largest=0.2)
    assert [row["evaluations"] for row in some] == pytest.approx([1.0, 1.5, 2.0])
    assert len(begun) == 5  # each of its costs is a run of its own
    assert measure(["a"], ["auto"], [0], until=0.0, known=()) == some
    part = _rows("auto", {1: [(2.0, 0.3)]})
    assert measure(["a"], ["auto"], [1], until=math.inf, known=part, largest=0.2)[2] == part[0]


# --- cases by example


def test_a_case_scores_the_examples_it_is_asked_for(case: ItemCase) -> None:
    problem = case.problem
    assert isinstance(problem, HasExamples)
    X = problem.space.sample(2, generator=make_generator(0))
    right = case.networks.right(X).double()
    first, second = problem.example_sets
    some = problem.on_examples({second: torch.tensor([5, 700, 3])})
    seen = some.evaluate(X, generator=make_generator(0))
    assert [metric.name for metric in seen.metrics] == [second]
    assert torch.equal(seen.Y[:, 0], right[:, 1, [5, 700, 3]].mean(-1))
    assert bool((seen.counts == 3).all())
    assert seen.examples[1][second].items.tolist() == [3, 5, 700]
    assert torch.equal(seen.examples[1][second].values[:, 0], right[1, 1, [3, 5, 700]])
    whole = problem.evaluate(X, generator=make_generator(0))
    assert torch.equal(whole.Y, case.case.truth(X))
    assert whole.examples[0][first].complete


def test_the_whole_is_what_the_problem_of_the_package_measures(case: ItemCase) -> None:
    X = case.problem.space.anchors().X
    whole = case.problem.evaluate(X, generator=make_generator(0))
    package = case.problem.full.evaluate(X, generator=make_generator(0))
    assert float((whole.Y - package.Y).abs().max()) * case.size < 1.5
    assert [m.name for m in whole.metrics] == [m.name for m in package.metrics]


def test_refuses_other_examples_and_cases(case: ItemCase) -> None:
    name = next(iter(case.problem.example_sets))
    for wanted in ({name: torch.tensor([797])}, {"absent": torch.tensor([0])}):
        with pytest.raises(DataError, match="there are no such examples"):
            case.problem.on_examples(wanted)
    with pytest.raises(ConfigError, match="no case 'concave-2' by example"):
        item_case("concave-2")


# --- runs by hand


def test_a_row_is_scored_further_on_the_same_order(case: ItemCase) -> None:
    ledger = Ledger(case, seed=3)
    x = torch.tensor([0.3, 0.6], dtype=torch.float64)
    ledger.take(Scoring(40, x))
    ledger.take(Scoring(100, x / 2))
    ledger.take(Scoring(60, row=0))
    seen = ledger.seen
    assert seen.counts[:, 0].tolist() == [60, 100]
    assert ledger.cost == pytest.approx(160 / 797)
    assert cost_of(seen) == pytest.approx(ledger.cost)
    for name, one in case.problem.example_sets.items():
        first = set(order_of(one, 3, name)[:60].tolist())
        assert set(seen.examples[0][name].items.tolist()) == first
        assert first <= set(seen.examples[1][name].items.tolist())
    parts = [Part(name, 0, 60) for name in case.problem.example_sets]
    again = on_parts(case.problem, parts, 3).evaluate(x.unsqueeze(0), generator=make_generator(0))
    assert torch.equal(again.Y, seen.Y[:1])
    assert torch.equal(again.Yvar, seen.Yvar[:1])


def test_a_run_by_hand_keeps_to_its_cost(case: ItemCase) -> None:
    steps = list(play(case, Fixed(100), 0, 0.5))
    assert [len(step.seen) for step in steps] == [1, 2, 3]  # a fourth would end above .5
    assert [step.cost for step in steps] == pytest.approx([n * 100 / 797 for n in (1, 2, 3)])
    assert list(play(case, Fixed(100), 0, 0.5, until=0.0)) == []
    rows = [len(step.seen) for step in play(case, Fixed(10, most_rows=2), 0, 12.0)]
    assert rows == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kg", "momf", "hvkg"])
def test_botorch_chooses_rows_and_shares(case: ItemCase, kind: str) -> None:
    policy = Fidelities(kind, restarts=1, raw=4)
    state = torch.random.get_rng_state()
    steps = [step for _, step in zip(range(6), play(case, policy, 0, 12.0), strict=False)]
    last = steps[-1].seen
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(last) == 5  # four anchors, one of them twice, and one of its own
    assert last.counts[:, 0].tolist()[:4] == [100, 100, 100, 797]
    assert 50 <= float(last.counts[-1, 0]) <= 797


# --- runs of the package


def test_a_run_of_the_package_is_followed_by_what_it_scored(case: ItemCase) -> None:
    steps = list(items.by_run(600)(case, 4, 3.0))
    by_hand = list(play(case, Fixed(600), 4, 3.0))
    assert [step.cost for step in steps] == pytest.approx([600 / 797 * n for n in (1, 2, 3)])
    assert [step.cost for step in steps] == pytest.approx([step.cost for step in by_hand])
    for one, other in zip(steps, by_hand, strict=True):
        assert torch.equal(one.seen.X, other.seen.X)
        assert torch.equal(one.seen.Y, other.seen.Y)
    assert sorted(step.seconds for step in steps) == [step.seconds for step in steps]


def test_a_small_budget_is_spent_as_it_would_be_alone() -> None:
    small = items.settings_of("auto", 5, 2.0)
    assert (small.budget, small.seed, small.verify) == (3, 5, 0)
    assert isinstance(small.items, FrontDoubt)
    assert small.items.begin * small.budget == pytest.approx(FrontDoubt().begin * 2)
    assert items.settings_of("auto", 5, 6.0).items == "auto"
    assert items.settings_of(100, 5, 2.0).items == 100


def test_an_arm_that_starts_anew_is_run_for_whole_costs() -> None:
    assert items.pieces("full") == [items.SHARES]
    assert items.pieces("auto") == [(share,) for share in items.SHARES]
    assert items.run("digits-mlp-2", "auto", 0, (1 / 12, 1 / 8)) == []
