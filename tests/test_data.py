from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.data import Front, Metric, Observations, directions, to_maximisation
from map_bo.errors import DataError
from map_bo.scale import Scale, varied_metrics
from map_bo.space import CoefficientSpace

METRICS = (Metric("acc"), Metric("loss", direction="min", kind="loss"))
NAN = torch.nan


def observations(n: int = 3, **changes: object) -> Observations:
    values: dict[str, object] = {
        "X": torch.rand(n, 2, generator=torch.Generator().manual_seed(n)),
        "Y": torch.rand(n, 2, generator=torch.Generator().manual_seed(n + 1)),
        "metrics": METRICS,
    }
    return Observations(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "no name"),
        ({"name": "a", "direction": "up"}, "must be 'max' or 'min', got 'up'"),
        ({"name": "a", "kind": "score"}, "kind 'score'"),
        ({"name": "a", "lower": 1.0, "upper": 0.0}, "bounds"),
    ],
)
def test_a_bad_metric_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        Metric(**arguments)  # type: ignore[arg-type]


def test_metric_bounds_follow_the_kind() -> None:
    assert (Metric("a").lower, Metric("a").upper) == (0.0, 1.0)
    assert Metric("b", kind="loss").lower == 0.0
    assert Metric("b", kind="loss").upper is None
    assert Metric("c", kind="unbounded").lower is None


@given(st.lists(st.sampled_from(["max", "min"]), min_size=1, max_size=5))
def test_to_maximisation_is_its_own_inverse(ways: list[str]) -> None:
    metrics = [Metric(str(i), direction=way) for i, way in enumerate(ways)]  # type: ignore[arg-type]
    Y = torch.rand(4, len(ways), generator=torch.Generator().manual_seed(0)).double()
    once = to_maximisation(Y, metrics)
    assert torch.equal(to_maximisation(once, metrics), Y)
    assert torch.equal(once, Y * directions(metrics))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"X": torch.rand(2)}, "two dimensions"),
        ({"Y": torch.rand(3, 3)}, "3 evaluations of 2 metrics"),
        ({"Yvar": torch.rand(2, 2)}, "Yvar has shape"),
        ({"Yvar": -torch.rand(3, 2)}, "negative"),
        ({"counts": torch.zeros(3, 2)}, "counts must be positive"),
        ({"cost": torch.zeros(2)}, "one entry"),
        ({"failures": (None,)}, "one entry"),
        ({"X": torch.full((3, 2), torch.nan)}, "X holds NaN"),
        ({"Y": torch.full((3, 2), torch.inf)}, "row 0 of Y holds NaN or infinity"),
        ({"Y": torch.full((3, 2), torch.nan)}, "row 0 of Y holds NaN or infinity"),
        ({"Y": torch.tensor([[1.0, torch.inf]] * 3)}, "row 0 of Y holds NaN or infinity"),
        ({"metrics": ()}, "no metrics"),
        ({"metrics": (Metric("a"), Metric("a"))}, "appear twice"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        observations(**changes)  # type: ignore[arg-type]


def test_failed_rows_are_kept_and_left_out() -> None:
    failed = Observations.failed(torch.zeros(1, 2), METRICS, "evaluator 'acc' raised ValueError")
    seen = observations(3).append(failed).append(observations(2))
    assert len(seen) == 6
    assert seen.ok.tolist() == [True] * 3 + [False] + [True] * 2
    assert len(seen.succeeded()) == 5
    assert bool(torch.isnan(seen.Y[3]).all())
    assert seen.failures[3] == "evaluator 'acc' raised ValueError"


def test_what_was_not_measured_has_not_failed() -> None:
    Y = torch.tensor([[1.0, torch.nan], [1.0, 2.0], [torch.nan, 2.0]])
    seen = observations(3, Y=Y, failures=(None, None, "it broke"))
    assert seen.ok.tolist() == [False, True, False]
    assert seen.incomplete.tolist() == [True, False, False]
    assert seen.failed_rows.tolist() == [False, False, True]
    assert seen.partial.tolist() == [True, False, True]
    assert seen.measured.tolist() == [[True, False], [True, True], [False, True]]
    assert len(seen.of("acc")) == 2
    assert len(seen.succeeded()) == 1
    assert len(seen.with_any()) == 3
    whole = observations(1, X=seen.X[:1], Y=torch.tensor([[1.0, 3.0]]))
    done = seen.select([0]).completed_by(whole)
    assert done.Y.tolist() == [[1.0, 3.0]]
    assert done.ok.tolist() == [True]
    broke = observations(1, X=seen.X[:1], Y=torch.full((1, 2), torch.nan), failures=("it broke",))
    kept = seen.select([0]).completed_by(broke)
    assert kept.failures == ("it broke",)
    assert kept.measured.tolist() == [[True, False]]


def test_select_takes_masks_and_indices() -> None:
    seen = observations(4)
    mask = torch.tensor([True, False, True, False])
    assert torch.equal(seen.select(mask).X, seen.select([0, 2]).X)
    assert torch.equal(seen.select([3, 1]).Y, seen.Y[[3, 1]])


def test_empty_observations_can_grow() -> None:
    empty = Observations.empty(2, METRICS)
    assert len(empty) == 0
    assert torch.equal(empty.append(observations(3)).X, observations(3).X)


def test_observations_of_other_problems_do_not_join() -> None:
    with pytest.raises(DataError, match="cannot be joined"):
        observations().append(Observations.empty(3, METRICS))


def test_everything_is_float64_on_the_cpu() -> None:
    seen = observations(2, X=torch.rand(2, 2, dtype=torch.float32))
    assert {seen.X.dtype, seen.Y.dtype, seen.Yvar.dtype, seen.cost.dtype} == {torch.float64}


def front(k: int = 3) -> Front:
    mean = torch.arange(2.0 * k).reshape(k, 2)
    return Front(torch.rand(k, 2), mean, mean / 10, mean - 1, mean + 1, METRICS)


def test_a_front_keeps_predicted_and_real_apart() -> None:
    before = front()
    after = before.with_real([1], torch.tensor([[0.5, 0.25]]))
    assert not bool(before.verified.any())
    assert after.verified.tolist() == [False, True, False]
    assert torch.equal(after.mean, before.mean)
    assert after.real[1].tolist() == [0.5, 0.25]
    assert after.select([1]).verified.tolist() == [True]


def test_a_front_of_wrong_shape_is_refused() -> None:
    good = front()
    with pytest.raises(DataError, match="std of a front"):
        Front(good.X, good.mean, good.std[:2], good.lower, good.upper, METRICS)


def gradients(n: int = 3) -> torch.Tensor:
    return torch.rand(n, 2, 2, generator=torch.Generator().manual_seed(n + 2)).double()


def test_gradients_are_kept_with_their_rows() -> None:
    seen = observations(3, gradients=gradients(), gradient_variance=gradients() / 10)
    assert seen.gradients is not None
    part = seen.select([2, 0])
    assert torch.equal(part.filled_gradients()[0], seen.gradients[[2, 0]])
    assert torch.equal(part.filled_gradients()[1], seen.gradients[[2, 0]] / 10)
    failed = Observations.failed(torch.zeros(1, 2), METRICS, "lost")
    for both in (seen.append(failed), failed.append(seen)):
        slopes, noise = both.filled_gradients()
        assert bool(slopes[~both.ok].isnan().all())
        assert torch.equal(both.succeeded().filled_gradients()[0], seen.gradients)
        assert slopes.shape == noise.shape == (4, 2, 2)
    joined = Observations.joined([observations(2), seen], 2, METRICS)
    assert joined.filled_gradients()[0].isnan().all((-1, -2)).tolist() == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert len(Observations.joined([], 2, METRICS)) == 0


def test_without_gradients_there_are_none() -> None:
    nothing = torch.full((3, 2, 2), torch.nan)
    for seen in (
        observations(3),
        observations(3, gradients=nothing),
        Observations.empty(2, METRICS),
    ):
        assert seen.gradients is None
        assert seen.gradient_variance is None
        assert seen.append(observations(2)).gradients is None
        assert bool(seen.filled_gradients()[0].isnan().all())
        assert seen.filled_gradients()[0].shape == (len(seen), 2, 2)
    one = gradients()
    one[0] = torch.nan
    assert observations(3, gradients=one).select([0]).gradients is None


def test_a_failed_row_has_no_gradient() -> None:
    seen = observations(2, failures=("lost", None), gradients=gradients(2))
    assert bool(seen.filled_gradients()[0][0].isnan().all())
    unknown = observations(2, gradients=gradients(2)).filled_gradients()[1]
    with pytest.warns(DeprecationWarning, match="slopes is now filled_gradients"):
        assert torch.equal(observations(2, gradients=gradients(2)).slopes()[0], gradients(2))
    assert bool(unknown.isnan().all())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gradients": torch.zeros(3, 2)}, r"gradients must have shape \(3, 2, 2\), got \(3, 2\)"),
        ({"gradients": torch.full((3, 2, 2), torch.inf)}, "gradients hold infinity"),
        ({"gradient_variance": torch.zeros(3, 2, 2)}, "given without gradients"),
        (
            {"gradients": torch.zeros(3, 2, 2), "gradient_variance": torch.zeros(3, 2)},
            "gradient_variance must have shape",
        ),
        (
            {"gradients": torch.zeros(3, 2, 2), "gradient_variance": -torch.ones(3, 2, 2)},
            "negative or infinite",
        ),
    ],
)
def test_gradients_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        observations(3, **changes)


def test_a_front_may_say_how_sure_it_is() -> None:
    plain = front()
    assert bool(plain.corrected.isnan().all())
    assert bool(plain.probability.isnan().all())
    sure = dataclasses.replace(
        plain, corrected=plain.mean - 0.1, probability=torch.tensor([0.0, 0.5, 1.0])
    )
    assert torch.equal(sure.mean, plain.mean), "what was predicted stays"
    some = sure.select([2, 0])
    assert some.probability.tolist() == [1.0, 0.0]
    assert torch.equal(some.corrected, sure.corrected[[2, 0]])
    assert torch.equal(sure.with_real([1], sure.mean[1:2]).probability, sure.probability)
    for changes, message in (
        ({"probability": torch.zeros(2)}, "probability of a front must have shape"),
        ({"corrected": plain.mean[:2]}, "corrected of a front must have shape"),
        ({"probability": torch.tensor([0.0, 1.1, 0.2])}, "must be between 0 and 1"),
    ):
        with pytest.raises(DataError, match=message):
            dataclasses.replace(plain, **changes)  # type: ignore[arg-type]


class TestTheOldNameOfResampling:
    def test_the_keyword_works_and_warns(self) -> None:
        with pytest.warns(DeprecationWarning, match=r"Metric\(resampling=") as told:
            old = Metric("a", examples="same")
        assert told[0].filename == __file__
        assert old == Metric("a", resampling="same")
        with (
            pytest.warns(DeprecationWarning, match="resampling="),
            pytest.raises(DataError, match="resampling of metric 'a' must be 'same' or 'fresh'"),
        ):
            Metric("a", examples="few")  # type: ignore[arg-type]

    def test_the_attribute_works_and_warns(self) -> None:
        with pytest.warns(DeprecationWarning, match=r"is now Metric\.resampling"):
            assert Metric("a", resampling="fresh").examples == "fresh"

    def test_a_changed_copy_reads_neither(self) -> None:
        metric = Metric("a", resampling="same")
        assert dataclasses.replace(metric, resampling="fresh").resampling == "fresh"
        assert dataclasses.replace(metric, name="b") == Metric("b", resampling="same")
        assert [one.name for one in dataclasses.fields(metric)][-1] == "resampling"


def partly() -> Observations:
    """Five rows: whole, without the loss, without anything, taken back, whole."""
    return Observations(
        X=torch.arange(10.0).reshape(5, 2),
        Y=torch.tensor([[0.1, 1.0], [0.2, NAN], [NAN, NAN], [0.4, 4.0], [0.5, 5.0]]),
        metrics=METRICS,
        Yvar=torch.tensor([[0.1, 1.0], [0.2, NAN], [NAN, NAN], [0.4, 4.0], [0.5, 5.0]]),
        cost=torch.arange(5.0),
        failures=(None, "loss: no", "no", "not to be trusted", None),
        gradients=torch.ones(5, 2, 2),
    )


def test_a_failed_row_keeps_what_was_measured() -> None:
    seen = partly()
    assert seen.measured.tolist() == [
        [True, True],
        [True, False],
        [False] * 2,
        [False] * 2,
        [True] * 2,
    ]
    assert seen.partial.tolist() == [False, True, False, False, False]
    assert seen.succeeded().Y.tolist() == torch.tensor([[0.1, 1.0], [0.5, 5.0]]).double().tolist()
    assert seen.with_any().failures == (None, "loss: no", None)
    assert seen.gradients is not None
    assert torch.equal(~seen.gradients.isnan().any(-1), seen.measured)


def test_a_metric_has_the_rows_where_it_was_measured() -> None:
    seen = partly()
    accuracy, loss = seen.of("acc"), seen.of("loss")
    assert accuracy.X[:, 0].tolist() == [0, 2, 8]
    assert accuracy.cost.tolist() == [0, 1, 4]
    assert loss.Y.flatten().tolist() == [1, 5]
    assert bool(accuracy.ok.all())
    with pytest.raises(DataError, match="no metric 'speed'"):
        seen.of("speed")


def test_metrics_that_the_same_rows_have_go_together() -> None:
    assert [columns for columns, _ in partly().succeeded().patterns()] == [[0, 1]]
    patterns = partly().patterns()
    assert [columns for columns, _ in patterns] == [[0], [1]]
    assert torch.equal(torch.stack([rows for _, rows in patterns], -1), partly().measured)


def test_a_value_is_taken_back_with_its_reason() -> None:
    values = torch.zeros(5, 2, dtype=torch.bool)
    values[0, 1] = values[1, 0] = True
    seen = partly().without(values, "an outlier")
    assert seen.failures[:2] == ("an outlier", "loss: no")
    assert seen.measured.tolist() == [
        [True, False],
        [False] * 2,
        [False] * 2,
        [False] * 2,
        [True] * 2,
    ]
    assert bool(seen.Yvar[0, 1].isnan())


def test_attempts_complete_each_other_metric_by_metric() -> None:
    def attempt(a: float, b: float, cost: float, reason: str | None) -> Observations:
        return Observations(
            X=[[0.0, 1.0]],  # type: ignore[arg-type]
            Y=torch.tensor([[a, b]]),
            metrics=METRICS,
            Yvar=torch.tensor([[a, b]]),
            cost=torch.tensor([cost]),
            failures=(reason,),
        )

    first, second = attempt(0.5, NAN, 1, "loss: no"), attempt(NAN, 3, 2, "acc: no")
    both = first.completed_by(second)
    assert both.failures == (None,)
    assert both.Y.tolist() == both.Yvar.tolist() == [[0.5, 3.0]]
    assert both.cost.tolist() == [3.0]
    third = attempt(0.25, NAN, 4, "loss: again")
    newest = first.completed_by(third)
    assert newest.Y[0, 0] == 0.25
    assert newest.failures == ("loss: again",)
    whole = attempt(0.75, 1.0, 1, None)
    assert first.completed_by(whole) is whole


def test_an_anchor_counts_for_the_metrics_that_it_has() -> None:
    space = CoefficientSpace.box(("a", "b"))
    X = space.anchors().X
    kinds = space.anchors().kinds
    metrics = (Metric("p"), Metric("q", "min", "loss"))
    Y = torch.tensor([[0.1 + 0.1 * i, 5.0 - i] for i in range(len(X))], dtype=torch.float64)
    base = kinds.index("base")
    lacking = torch.zeros(len(X), 2, dtype=torch.bool)
    lacking[base, 0] = True
    seen = Observations(X, Y, metrics).without(lacking, "p failed")
    scale = Scale.of(seen, space)
    whole = Scale.of(Observations(X, Y, metrics), space)
    assert scale.is_anchored
    assert scale.point[1] == whole.point[1] == Y[base, 1]
    experts = [i for i, kind in enumerate(kinds) if kind == "expert"]
    assert scale.point[0] == Y[experts, 0].min()
    assert torch.equal(scale.best, whole.best)
    assert varied_metrics(seen).tolist() == [True, True]


def test_marks_of_what_was_recalled_stay_with_their_values() -> None:
    metrics = (Metric("a"), Metric("b"))
    marks = torch.tensor([[True, False], [False, False], [True, True]])
    seen = Observations(
        torch.rand(3, 2),
        torch.rand(3, 2),
        metrics,
        recalled=marks,
        saved=torch.tensor([1.0, 0.0, 4.0]),
    )
    assert torch.equal(seen.select([2, 0]).recalled, marks[[2, 0]])
    assert seen.select([2, 0]).saved.tolist() == [4.0, 1.0]
    assert seen.of("b").recalled.tolist() == [[False], [False], [True]]
    joined = seen.append(seen.select([1]))
    assert torch.equal(joined.recalled, torch.cat([marks, marks[1:2]]))
    assert joined.saved.tolist() == [1.0, 0.0, 4.0, 0.0]


def test_a_further_attempt_keeps_the_marks_of_what_it_lacks() -> None:
    metrics = (Metric("a"), Metric("b"))
    nan = torch.nan
    first = Observations(
        torch.zeros(1, 2),
        torch.tensor([[0.5, nan]]),
        metrics,
        cost=torch.tensor([1.0]),
        failures=("b failed",),
        recalled=torch.tensor([[True, False]]),
        saved=torch.tensor([3.0]),
    )
    again = dataclasses.replace(
        first,
        Y=torch.tensor([[nan, 0.25]]),
        failures=("a failed",),
        recalled=torch.tensor([[False, False]]),
        saved=torch.tensor([0.0]),
    )
    whole = first.completed_by(again)
    assert whole.failures == (None,)
    assert whole.recalled.tolist() == [[True, False]]
    assert whole.saved.tolist() == [3.0]
