"""Parts of a problem: some of its evaluators' examples."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import map_bo
from map_bo.data import Metric, Observations
from map_bo.errors import DataError, EvaluationError, MapBoError
from map_bo.evaluators.evaluator import Measurement, accuracy, mean_loss, mean_probability
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.items import Items
from map_bo.evaluators.metrics import SeveralMetrics
from map_bo.examples.sets import ExampleOutcomes, Part
from map_bo.merging.vectors.live import LiveModel
from map_bo.problems.evaluation_cache import EvaluationCache
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.problem import (
    HasExamples,
    SummarisesExamples,
    check_wanted,
    digests_of_examples,
    on_parts,
)
from map_bo.rng import make_generator
from map_bo.tracking.jsonl import MemoryStore
from tests.loop.bowls import quick
from tests.merging.small_models import build, family

G = make_generator(0)
X = torch.tensor([[0.3, 0.1, 0.0], [0.2, 0.5, 0.9]], dtype=torch.float64)
SIZE = 50
INPUTS = torch.randn(SIZE, 5, generator=make_generator(1))
LABELS = torch.randint(0, 3, (SIZE,), generator=make_generator(2))


def right(model: nn.Module, items: Tensor) -> Tensor:
    found: Tensor = model(INPUTS[items]).argmax(-1) == LABELS[items]
    return found


def largest(model: nn.Module) -> float:
    with torch.no_grad():
        return float(model(INPUTS).softmax(-1).amax(-1).mean())


class Two(ExampleEvaluator):
    """The share of right answers and the most frequent answer's share, which is no mean."""

    digest = "two"
    size = SIZE

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return Metric("right"), Metric("mode")

    @property
    def means(self) -> tuple[bool, ...]:
        return True, False

    def prepare(self, model: nn.Module) -> None:
        """Nothing is read."""

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        answers = model(INPUTS[items]).argmax(-1)
        return torch.stack([(answers == LABELS[items]).double(), answers.double()], -1)

    def summary(self, outcomes: Tensor, items: Tensor | None = None) -> dict[str, Any]:
        share = float(outcomes[:, 1].long().bincount().max()) / len(outcomes)
        return {"right": float(outcomes[:, 0].mean()), "mode": share}


class Bare:
    """By example, without a base class, and without a way to call it."""

    size = SIZE

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        return right(model, items)


class Called(Bare):
    def __call__(self, model: nn.Module) -> float:
        raise AssertionError("it is scored by example")


EVALUATORS: Mapping[str, Any] = {
    "items": Items(right, SIZE, labels=LABELS, digest="fifty", batch_size=16),
    "plain": largest,
    "two": Two(),
    "ready": accuracy(INPUTS, LABELS, batch_size=16),
    "bare": Bare(),
    "called": Called(),
}


def problem(evaluators: Mapping[str, Any] = EVALUATORS, **settings: Any) -> MergedModelProblem:
    base, experts = family("mlp")
    settings = {"cache": False, **settings}
    return MergedModelProblem(
        build("mlp", 5), base=base, experts=experts, evaluators=evaluators, **settings
    )


def evaluate(made: Any, x: Tensor = X) -> Observations:
    seen: Observations = made.evaluate(x, generator=G)
    return seen


def test_the_model_has_what_the_evaluators_ask_for() -> None:
    assert build("mlp")(INPUTS).shape == (SIZE, 3)


def test_sets_are_those_of_the_evaluators_in_the_order_of_the_metrics() -> None:
    made = problem()
    assert isinstance(made, HasExamples)
    sets = made.example_sets
    assert list(sets) == list(EVALUATORS)
    assert {k: one.size for k, one in sets.items()} == dict.fromkeys(sets, SIZE) | {"plain": 1}
    assert [k for k, one in sets.items() if not one.divisible] == ["plain"]
    assert sets["two"].metrics == ("two_right", "two_mode")
    assert sets["items"].digest == "fifty"
    strata = sets["items"].strata
    assert strata is not None
    assert torch.equal(LABELS[strata == strata[0]], LABELS[LABELS == LABELS[0]])
    assert sets["ready"].strata is not None
    assert sets["bare"].strata is None
    assert list(made.restricted(("two_mode", "ready")).example_sets) == ["two", "ready"]
    assert made.restricted(("two_mode",)).example_sets["two"].metrics == ("two_mode",)


def test_outcomes_come_with_every_evaluation() -> None:
    seen = evaluate(problem())
    names = [metric.name for metric in seen.metrics]
    for i in range(len(X)):
        row = seen.examples[i]
        assert set(row) == set(EVALUATORS) - {"plain"}
        for key, outcomes in row.items():
            assert outcomes.complete
            assert outcomes.size == SIZE
            for name, j in outcomes.columns(key).items():
                if outcomes.means[j]:
                    mean = float(outcomes.values[:, j].mean())
                    assert mean == float(seen.Y[i, names.index(name)]), name
        assert row["two"].metrics == ("two_right", "two_mode")
        assert row["two"].means == (True, False)
    # All of them count the same answers, each in its own way.
    for key in ("ready", "bare", "called"):
        assert torch.equal(seen.examples[0][key].values, seen.examples[0]["items"].values)


@pytest.mark.parametrize("make", [accuracy, mean_loss, mean_probability])
def test_numbers_are_those_of_calling_the_evaluator(make: Any) -> None:
    evaluator = make(INPUTS, LABELS, 16)
    metrics = [Metric("a", kind="loss")]
    seen = evaluate(problem({"a": evaluator}, metrics=metrics))
    called = evaluate(problem({"a": lambda model: evaluator(model)}, metrics=metrics))
    for name in ("Y", "Yvar", "counts"):
        one, other = getattr(seen, name), getattr(called, name)
        assert torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0)), name
    assert called.examples == ({}, {})
    items = torch.tensor([40, 3, 17])
    part = evaluate(problem({"a": evaluator}, metrics=metrics).on_examples({"a": items}))
    whole = seen.examples[0]["a"].values[items.sort().values]
    torch.testing.assert_close(part.examples[0]["a"].values, whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(part.Y[0, 0], whole.mean(), rtol=1e-5, atol=1e-6)


class TestParts:
    def test_only_what_is_wanted_is_measured(self) -> None:
        made = problem()
        whole = evaluate(made)
        items = torch.tensor([7, 3, 49, 12])
        part = made.on_examples({"two": items, "items": items[:2]})
        assert [metric.name for metric in part.metrics] == ["items", "two_right", "two_mode"]
        assert list(part.evaluators) == ["items", "two"]
        assert part.space == made.space
        seen = evaluate(part)
        assert seen.metrics == part.metrics
        for i in range(len(X)):
            two = seen.examples[i]["two"]
            assert two.items.tolist() == [3, 7, 12, 49]
            assert torch.equal(two.values, whole.examples[i]["two"].values[two.items])
            assert not two.complete
            assert seen.Y[i, 1] == two.values[:, 0].mean()
            assert seen.Y[i, 2] == two.values[:, 1].long().bincount().max() / 4
            assert seen.examples[i]["items"].items.tolist() == [3, 7]
        assert seen.counts[0].tolist()[0] == 2
        # The whole is as it was.
        assert torch.equal(evaluate(made).Y, whole.Y)

    def test_all_examples_in_any_order_are_the_whole_to_the_last_bit(self) -> None:
        both = {"right": Items(right, SIZE, batch_size=7), "mean": mean_loss(INPUTS, LABELS)}
        made = problem(both, metrics=[Metric("right"), Metric("mean", "min", "loss")])
        shuffled = torch.randperm(SIZE, generator=make_generator(3))
        part = made.on_examples({"mean": shuffled, "right": shuffled})
        for name in ("Y", "Yvar"):
            assert torch.equal(getattr(evaluate(part), name), getattr(evaluate(made), name))

    def test_examples_are_scored_in_the_order_in_which_they_are_wanted(self) -> None:
        asked: list[list[int]] = []

        def score(model: nn.Module, items: Tensor) -> Tensor:
            asked.append(items.tolist())
            return torch.ones(len(items))

        part = problem({"a": Items(score, 20, batch_size=2)}).on_examples(
            {"a": torch.tensor([5, 1, 9])}
        )
        evaluate(part, X[:1])
        assert asked == [[5, 1], [9]]

    def test_positions_of_the_order_nest(self) -> None:
        made = problem()
        few, more = (
            evaluate(on_parts(made, [Part("items", 0, n), Part("plain", 0, 1)], 4))
            for n in (10, 20)
        )
        assert few.metrics == more.metrics
        first, both = few.examples[0]["items"], more.examples[0]["items"]
        assert set(first.items.tolist()) < set(both.items.tolist())
        assert torch.equal(first.row()[first.items], both.row()[first.items])
        rest = evaluate(on_parts(made, [Part("items", 10, 20)], 4)).examples[0]["items"]
        joined = first.joined(rest)
        assert torch.equal(joined.values, both.values)
        # Labels are in about their shares in every stretch.
        shares = LABELS[first.items].bincount(minlength=3)
        assert float((shares / 10 - LABELS.bincount() / SIZE).abs().max()) < 0.15

    def test_a_row_is_merged_once_however_many_evaluators_there_are(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        merges: list[int] = []
        write = LiveModel.write

        def counted(self: LiveModel, *given: Any) -> Any:
            merges.append(1)
            return write(self, *given)

        made = problem()
        made.prepare()
        monkeypatch.setattr(LiveModel, "write", counted)
        evaluate(made.on_examples({k: torch.arange(5) for k in EVALUATORS if k != "plain"}))
        assert len(merges) == len(X)

    def test_parts_of_parts(self) -> None:
        made = problem()
        part = made.on_examples({"two": torch.arange(5), "ready": torch.arange(9)})
        seen = evaluate(part.restricted(("ready",)))
        assert [metric.name for metric in seen.metrics] == ["ready"]
        assert len(seen.examples[0]["ready"]) == 9
        only = made.restricted(("two_mode",)).on_examples({"two": torch.arange(5)})
        seen = evaluate(only)
        assert [metric.name for metric in seen.metrics] == ["two_mode"]
        assert seen.examples[0]["two"].metrics == ("two_right", "two_mode")
        with pytest.raises(DataError, match="no evaluator 'ready'"):
            made.restricted(("two_mode",)).on_examples({"ready": torch.arange(5)})

    def test_a_part_is_built_again_elsewhere(self) -> None:
        made = problem({"ready": EVALUATORS["ready"]})
        part = made.on_examples({"ready": torch.tensor([4, 1])})
        again = pickle.loads(pickle.dumps(part))
        assert torch.equal(evaluate(again).Y, evaluate(part).Y)
        assert evaluate(again).examples[0]["ready"].items.tolist() == [1, 4]

    @pytest.mark.parametrize(
        ("wanted", "verdict"),
        [
            ({}, "no examples are wanted"),
            ({"itms": torch.arange(3)}, "no evaluator 'itms'"),
            ({"items": torch.tensor([50])}, "must be different ones of 50"),
            ({"items": torch.tensor([-1])}, "must be different ones of 50"),
            ({"items": torch.tensor([1, 1])}, "must be different ones of 50"),
            ({"items": torch.tensor([], dtype=torch.long)}, "must be different ones of 50"),
            ({"items": torch.tensor([0.5])}, "must be different ones of 50"),
            ({"items": torch.tensor([True, False])}, "must be different ones of 50"),
        ],
    )
    def test_examples_that_there_are_not_are_refused(
        self, wanted: dict[str, Tensor], verdict: str
    ) -> None:
        with pytest.raises(DataError, match=verdict):
            problem().on_examples(wanted)

    def test_lists_of_indices_will_do(self) -> None:
        sets = problem().example_sets
        found = check_wanted({"items": [2, 1]}, sets)  # type: ignore[dict-item]
        assert found["items"].tolist() == [2, 1]


class TestSummaries:
    def test_outcomes_of_two_parts_make_what_scoring_them_at_once_does(self) -> None:
        made = problem()
        assert isinstance(made, SummarisesExamples)
        for key in ("items", "two", "ready", "bare", "called"):
            first = evaluate(on_parts(made, [Part(key, 0, 15)], 4), X[:1])
            rest = evaluate(on_parts(made, [Part(key, 15, 40)], 4), X[:1])
            once = evaluate(on_parts(made, [Part(key, 0, 40)], 4), X[:1])
            joined = first.examples[0][key].joined(rest.examples[0][key])
            found = made.summarise(key, joined)
            assert list(found) == [metric.name for metric in once.metrics]
            for j, seen in enumerate(found.values()):
                assert isinstance(seen, Measurement)
                assert seen.value == pytest.approx(float(once.Y[0, j]), abs=1e-12)
        whole = evaluate(made, X[:1])
        found = made.summarise("two", whole.examples[0]["two"])
        assert [one.value for one in found.values() if isinstance(one, Measurement)] == (
            whole.Y[0, 2:4].tolist()
        )

    def test_what_is_wrong_is_told_of_each_metric(self) -> None:
        made = problem({"a": Items(right, SIZE, metrics=["b", "c"])})
        failed = ExampleOutcomes(torch.arange(3), torch.full((3, 2), torch.nan), SIZE, (True, True))
        found = made.summarise("a", failed)
        assert list(found) == ["a_b", "a_c"]
        assert all(isinstance(one, EvaluationError) for one in found.values())
        for name in ("plain", "nobody"):
            with pytest.raises(DataError, match=f"no evaluator '{name}' scores by example"):
                problem().summarise(name, failed)


class TestWhatGoesWrong:
    def test_failed_examples_are_kept_as_such(self, caplog: pytest.LogCaptureFixture) -> None:
        def score(model: nn.Module, items: Tensor) -> Tensor:
            return torch.where(items < 5, torch.nan, right(model, items).double())

        class Foreign(Bare):
            def score(self, model: nn.Module, items: Tensor) -> Tensor:
                return score(model, items)

            def __call__(self, model: nn.Module) -> float:
                raise AssertionError

        seen = evaluate(problem({"own": Items(score, SIZE), "foreign": Foreign()}), X[:1])
        for key in ("own", "foreign"):
            values = seen.examples[0][key].values[:, 0]
            assert values.isnan().nonzero().flatten().tolist() == [0, 1, 2, 3, 4]
            assert seen.Y[0, 0] == values[5:].mean()
        assert seen.counts.tolist() == [[45.0, 45.0]]
        assert sum("5 of 50 examples failed" in line for line in caplog.messages) == 2
        assert "evaluator 'own'" in caplog.text

    def test_an_evaluator_that_fails_leaves_the_others_alone(self) -> None:
        def broken(model: nn.Module, items: Tensor) -> Tensor:
            return torch.full((len(items),), torch.nan)

        made = problem({"a": Items(broken, 20), "b": Items(right, SIZE)})
        [reason] = evaluate(made, X[:1]).failures
        assert reason is not None
        assert "'a' raised EvaluationError: 20 of 20 examples failed" in reason
        seen = evaluate(made.on_examples({"a": torch.arange(5), "b": torch.arange(5)}), X[:1])
        assert list(seen.examples[0]) == ["b"]
        assert seen.Y[0].isfinite().tolist() == [False, True]
        assert "5 of 5 examples failed" in (seen.failures[0] or "")

    def test_a_size_that_changes_fails_the_evaluation(self) -> None:
        class Growing(Bare):
            size = 10

            def score(self, model: nn.Module, items: Tensor) -> Tensor:
                return torch.ones(len(items))

            def __call__(self, model: nn.Module) -> float:
                return 1.0

        data, foreign = list(range(10)), Growing()
        own = Items(lambda model, items: torch.ones(len(items)), lambda: len(data))
        made = problem({"own": own, "foreign": foreign})
        assert evaluate(made, X[:1]).failures == (None,)
        data.append(10)
        foreign.size = 9
        [reason] = evaluate(made, X[:1]).failures
        assert "there were 10 examples, and now there are 11" in (reason or "")
        assert "there were 10 examples, and now there are 9" in (reason or "")

    def test_outcomes_outside_the_bounds_of_the_metric_are_refused(self) -> None:
        def grades(model: nn.Module, items: Tensor) -> Tensor:
            return (items == 3) * 4.0  # whose mean is within the bounds

        [reason] = evaluate(problem({"a": Items(grades, SIZE)}), X[:1]).failures
        assert "outcomes of 'a' go from 0 to 4, and the metric's bounds are [0.0, 1.0]" in str(
            reason
        )
        for made in (
            problem({"a": Items(grades, SIZE, metric=Metric("grade", upper=4.0))}),
            problem({"a": Items(grades, SIZE)}, metrics=[Metric("a", upper=4.0)]),
        ):
            assert evaluate(made, X[:1]).Y.tolist() == [[0.08]]

    @pytest.mark.parametrize("size", [0, -3, "many", 2.5])
    def test_a_size_that_is_not_possible_is_told_before_anything_is_evaluated(
        self, size: Any
    ) -> None:
        class Sized(Called):
            pass

        sized = Sized()
        sized.size = size
        with pytest.raises(EvaluationError, match="the size of evaluator 'a' must be"):
            problem({"a": sized}).prepare()

    def test_what_neither_scores_nor_can_be_called_is_refused(self) -> None:
        class Sized:
            size = 3

        with pytest.raises(EvaluationError, match="'a' is a Sized, which cannot be called"):
            problem({"a": Sized()})


def test_what_the_caller_has_switched_does_not_matter() -> None:
    kept = {k: EVALUATORS[k] for k in ("items", "two", "ready")}
    plain = problem(kept)
    seen = evaluate(plain)
    sets = plain.example_sets
    switched = problem(kept)
    with torch.inference_mode(), torch.device("meta"):
        again = evaluate(switched.on_examples({k: torch.arange(9, device="cpu") for k in kept}))
        whole = evaluate(switched)
        strata = switched.example_sets["items"].strata
    assert torch.equal(whole.Y, seen.Y)
    assert strata is not None
    assert sets["items"].strata is not None
    assert torch.equal(strata, sets["items"].strata)
    for i, row in enumerate(again.examples):
        for key, one in row.items():
            assert torch.equal(one.values, seen.examples[i][key].values[:9])
            assert not one.values.is_inference()
            assert not one.items.is_inference()


class TestOthers:
    def test_an_evaluator_with_a_call_of_its_own_is_called(self) -> None:
        class Own(Two):
            def __call__(self, model: nn.Module) -> Mapping[str, Any]:
                return {"right": 0.25, "mode": 0.5}

        made = problem({"own": Own(), "several": SeveralMetrics(lambda _: {"a": 0.5}, ["a"])})
        assert not made.example_sets["own"].divisible
        seen = evaluate(made, X[:1])
        assert seen.Y.tolist() == [[0.25, 0.5, 0.5]]
        assert seen.examples == ({},)

    def test_with_gradients_evaluators_are_called_as_a_whole(self) -> None:
        made = problem(
            {"a": mean_loss(INPUTS, LABELS)}, gradients=True, metrics=[Metric("a", "min", "loss")]
        )
        assert [(one.size, one.divisible) for one in made.example_sets.values()] == [(1, False)]
        seen = evaluate(made.on_examples({"a": torch.tensor([0])}))
        assert torch.equal(seen.Y, evaluate(made).Y)
        assert seen.gradients is not None

    def test_digests_of_the_examples_are_told(self) -> None:
        assert digests_of_examples(problem()) == {
            "items": "fifty",
            "two": "two",
            "bare": "50 examples",
        }

    @pytest.mark.parametrize(
        ("digest", "size", "told"),
        [
            ("two", SIZE, "examples.a was 'one' and is 'two'"),
            (None, SIZE - 1, "examples.a was 'one' and is '49 examples'"),
        ],
    )
    def test_a_run_is_not_resumed_on_other_examples(
        self, tmp_path: Path, digest: str | None, size: int, told: str
    ) -> None:
        settings = {name: getattr(quick(), name) for name in ("sampler", "surrogate", "solver")}

        def run(budget: int, digest: str | None, size: int) -> map_bo.Result:
            made = problem({"a": Items(right, size, digest=digest), "b": largest})
            return map_bo.optimize(
                made, budget, run_dir=tmp_path / "run", progress=False, verify=0, **settings
            )

        run(4, "one", SIZE)
        with pytest.raises(MapBoError, match=told):
            run(5, digest, size)
        assert len(run(5, "one", SIZE).seen) == 5


class TestCache:
    def test_what_is_recalled_has_its_outcomes(self, tmp_path: Any) -> None:
        cache = EvaluationCache(tmp_path / "cache.sqlite")
        kept = {k: EVALUATORS[k] for k in ("items", "two", "ready")}
        first = evaluate(problem(kept, cache=cache))
        again = evaluate(problem(kept, cache=cache))
        assert not bool(first.recalled.any())
        assert bool(again.recalled.all())
        for key in kept:
            one, other = first.examples[1][key], again.examples[1][key]
            assert torch.equal(one.values, other.values)
            assert (one.means, one.metrics, one.size) == (other.means, other.metrics, other.size)

    def test_parts_are_measured_and_not_kept(self, tmp_path: Any) -> None:
        cache = EvaluationCache(tmp_path / "cache.sqlite")
        kept = {k: EVALUATORS[k] for k in ("items", "ready")}
        made = problem(kept, cache=cache)
        part = made.on_examples({"items": torch.arange(5), "ready": torch.arange(SIZE)})
        evaluate(part)
        seen = evaluate(part)
        assert seen.recalled.tolist() == [[False, True]] * 2
        whole = evaluate(problem(kept, cache=cache))
        assert whole.recalled.tolist() == [[False, True]] * 2
        assert len(whole.examples[0]["items"]) == SIZE


def test_a_run_of_items_is_the_run_of_the_same_function() -> None:
    """What a search sees does not depend on whether examples are told."""
    results = [
        map_bo.Run(problem({"a": one, "b": largest}), quick(budget=5), MemoryStore()).drive()
        for one in (accuracy(INPUTS, LABELS), lambda m: accuracy(INPUTS, LABELS)(m))
    ]
    assert torch.equal(results[0].seen.X, results[1].seen.X)
    assert torch.equal(results[0].seen.Y, results[1].seen.Y)
