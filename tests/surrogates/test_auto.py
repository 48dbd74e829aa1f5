from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from botorch.acquisition.objective import ScalarizedPosteriorTransform
from botorch.sampling.normal import SobolQMCNormalSampler
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SurrogateError
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import Auto, AutoModel, Selection, SideBySide
from map_bo.surrogates.features import quadratic_features
from map_bo.surrogates.links import links_for, observed_on_link
from map_bo.surrogates.prediction import predict
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.published import PublishedQuadratic
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.surrogate import Surrogate, SurrogateModel
from map_bo.surrogates.validation import LeavesOneOut, count_log_densities, log_densities
from tests.contracts.smallest_surrogate import Plain
from tests.contracts.surrogate_contract import LeaveOneOutContract, mixed_observations, moments


class TestAuto(LeaveOneOutContract):
    @pytest.fixture
    def surrogate(self) -> Surrogate:
        return Auto()


@dataclass(frozen=True)
class Failing:
    """A surrogate that never fits."""

    error: type[Exception] = RuntimeError
    leaves_one_out: ClassVar[bool] = True

    def fit(self, seen: Observations, space: CoefficientSpace) -> SurrogateModel:
        raise self.error("no convergence")


@dataclass(frozen=True)
class Split:
    """Fits the given metrics well (a GP) and the others with hopeless certainty."""

    good: tuple[int, ...]
    leaves_one_out: ClassVar[bool] = True

    def fit(self, seen: Observations, space: CoefficientSpace) -> SurrogateModel:
        model = GP().fit(seen, space)
        good, leave_one_out = self.good, model.leave_one_out

        def spoilt() -> tuple[Tensor, Tensor]:
            mean, variance = leave_one_out()
            bad = torch.ones(mean.shape[-1], dtype=torch.bool)
            bad[list(good)] = False
            return torch.where(bad, mean + 100.0, mean), variance

        model.leave_one_out = spoilt  # type: ignore[method-assign]
        return model


SPLIT = (("odd", Split((0, 2))), ("even", Split((1,))))


@pytest.fixture(scope="module")
def mixed() -> tuple[AutoModel, Observations, CoefficientSpace]:
    seen, space = mixed_observations(12)
    return Auto(candidates=SPLIT).fit(seen, space), seen, space


class TestMixedAuto(LeaveOneOutContract):
    """Two candidates share the metrics: 0 and 2 by one, 1 by the other."""

    @pytest.fixture
    def surrogate(self) -> Surrogate:
        return Auto(candidates=(("odd", Split((0, 2))), ("quadratic", Quadratic())))

    def test_every_metric_is_fitted_to_the_rows_that_have_it(
        self, surrogate: Surrogate, seen: Observations, space: CoefficientSpace, X: Tensor
    ) -> None:
        """Metrics cannot be fitted alone here, as the candidate is split by three of them."""
        lacking = torch.zeros_like(seen.measured)
        lacking[2, 1] = lacking[4, 2] = True
        model = surrogate.fit(seen.without(lacking, "it failed"), space)
        assert isinstance(model, AutoModel)
        assert [choice.chosen for choice in model.selection] == ["odd", "quadratic", "odd"]
        assert torch.equal(model.leave_one_out()[0].isnan(), lacking)


def counted(truths: list[Tensor], X: Tensor, count: int, seed: int) -> Observations:
    f = torch.stack(truths, -1)
    draws = torch.rand(*f.shape, count, generator=make_generator(seed), dtype=torch.float64)
    Y = (draws < torch.sigmoid(f).unsqueeze(-1)).double().mean(-1)
    metrics = tuple(Metric(f"m{j}") for j in range(len(truths)))
    return Observations(X=X, Y=Y, metrics=metrics, counts=torch.full_like(Y, float(count)))


def test_quadratic_truth_takes_the_quadratic_and_bumps_do_not() -> None:
    space = CoefficientSpace.box(("a", "b"))
    X = space.sample(25, generator=make_generator(0))
    weights = torch.tensor([0.5, 0.8, -0.6, -1.0, -0.7, 0.5], dtype=torch.float64)
    centres = torch.tensor([[0.2, 0.2], [0.8, 0.3], [0.5, 0.8]], dtype=torch.float64)
    bumps = torch.exp(-0.5 * (torch.cdist(X, centres) / 0.15).square())
    truths = [
        quadratic_features(2 * X - 1) @ weights,
        bumps @ torch.tensor([3.0, -3.0, 3.0], dtype=torch.float64),
    ]
    model = Auto().fit(counted(truths, X, 500, 3), space)
    first, second = model.selection
    assert first.chosen == "quadratic"
    assert second.chosen != "quadratic"
    scores = dict(second.scores)
    assert scores[second.chosen] > scores["quadratic"]


def test_scores_are_on_the_same_targets(
    mixed: tuple[AutoModel, Observations, CoefficientSpace],
) -> None:
    _, seen, space = mixed
    model = Auto().fit(seen, space)
    targets, _ = observed_on_link(seen, links_for(seen.metrics))
    for name, settings in (("quadratic", Quadratic()), ("gp", GP())):
        fitted = settings.fit(seen, space)
        expected = log_densities(fitted, targets).mean(0)
        # The accuracy is counted: the counts are scored, not their logits.
        part, n = fitted.for_metrics([0]), seen.counts[:, :1]
        assert isinstance(part, LeavesOneOut)
        misfit = fitted.misfit_variance()[:1]
        by_count = count_log_densities(part, seen.Y[:, :1] * n, n, misfit)
        expected[0] = by_count.mean()
        scores = [dict(selection.scores)[name] for selection in model.selection]
        torch.testing.assert_close(torch.tensor(scores).double(), expected)


def test_each_metric_has_the_candidate_that_is_best_for_it(
    mixed: tuple[AutoModel, Observations, CoefficientSpace],
) -> None:
    model, seen, space = mixed
    assert [selection.chosen for selection in model.selection] == ["odd", "even", "odd"]
    assert [selection.metric for selection in model.selection] == ["accuracy", "loss", "score"]
    X = space.sample(5, generator=make_generator(1))
    whole = GP().fit(seen, space)
    with torch.no_grad():
        torch.testing.assert_close(model.link_mean(X), whole.link_mean(X))
        torch.testing.assert_close(moments(model, X), moments(whole, X))
        torch.testing.assert_close(predict(model, X).std, predict(whole, X).std)
    torch.testing.assert_close(model.training_targets(), whole.training_targets())
    torch.testing.assert_close(model.leave_one_out(), whole.leave_one_out())


def test_parts_of_a_mixed_model(mixed: tuple[AutoModel, Observations, CoefficientSpace]) -> None:
    model, _, space = mixed
    X = space.sample(4, generator=make_generator(1))
    part = model.for_metrics([1, 0])
    assert [selection.chosen for selection in part.selection] == ["even", "odd"]
    assert [metric.name for metric in part.metrics] == ["loss", "accuracy"]
    mean = moments(model, X)[0]
    torch.testing.assert_close(moments(part, X)[0], mean[:, [1, 0]])
    torch.testing.assert_close(model.posterior(X, output_indices=[2]).mean, mean[:, 2:])  # type: ignore[attr-defined]
    noise = torch.full((4, 3), 7.0, dtype=torch.float64)
    noisy = model.posterior(X, observation_noise=noise)
    torch.testing.assert_close(noisy.variance, moments(model, X)[1] + 7.0)  # type: ignore[attr-defined]
    sums = ScalarizedPosteriorTransform(torch.ones(3, dtype=torch.float64))
    scalar = model.posterior(X, posterior_transform=sums)
    torch.testing.assert_close(scalar.mean, mean.sum(-1, keepdim=True))  # type: ignore[attr-defined]


def test_mixed_models_condition_and_fantasise(
    mixed: tuple[AutoModel, Observations, CoefficientSpace],
) -> None:
    model, seen, space = mixed
    X = space.sample(2, generator=make_generator(1))
    Y, noise = model.link_mean(X) + 1.0, torch.full((2, 3), 1e-4, dtype=torch.float64)
    more = model.condition_on_observations(X, Y, noise)
    reference = GP().fit(seen, space).condition_on_observations(X, Y, noise)
    with torch.no_grad():
        torch.testing.assert_close(more.link_mean(X), reference.link_mean(X))
        fantasies = model.fantasize(X, SobolQMCNormalSampler(torch.Size([4]), seed=0))
        assert moments(fantasies, X)[0].shape == (4, 2, 3)
    assert [choice.chosen for choice in more.selection] == ["odd", "even", "odd"]


def test_drawn_functions_are_in_closed_form_where_all_parts_have_one() -> None:
    seen, space = mixed_observations(12)
    X = space.sample(4, generator=make_generator(1))
    quadratic, gp = Quadratic().fit(seen, space), GP().fit(seen, space)
    exact = SideBySide([quadratic], [[0, 1, 2]]).sample_functions(2, generator=make_generator(0))
    assert exact.explicit
    assert torch.equal(exact(X), quadratic.sample_functions(2, generator=make_generator(0))(X))
    parts = [quadratic.for_metrics([1]), gp.for_metrics([0, 2])]
    both = SideBySide(parts, [[1], [0, 2]]).sample_functions(2, generator=make_generator(0))
    assert not both.explicit
    assert both(X).shape == (2, 4, 3)


def test_a_part_that_has_to_be_fitted_again_says_so() -> None:
    seen, space = mixed_observations(12)
    model = SideBySide([PublishedQuadratic().fit(seen, space)], [[0, 1, 2]])
    X = space.sample(1, generator=make_generator(1))
    with pytest.raises(SurrogateError, match="PublishedModel cannot take further observations"):
        model.condition_on_observations(X, model.link_mean(X))


def test_few_evaluations_take_the_first_candidate() -> None:
    seen, space = mixed_observations(7)
    candidates = (("bad", Split(())), ("good", Split((0, 1, 2))))
    chosen = Auto(candidates=candidates).fit(seen, space).selection[0]
    assert chosen.chosen == "bad"
    assert "fewer than 8" in chosen.reason
    seen, space = mixed_observations(12)
    assert Auto(candidates=candidates).fit(seen, space).selection[0].chosen == "good"
    patient = Auto(candidates=candidates, per_coefficient=7).fit(seen, space).selection[0]
    assert patient.chosen == "bad"
    assert "fewer than 14" in patient.reason


def test_the_simplest_of_equals_is_taken() -> None:
    seen, space = mixed_observations(12)
    model = GP().fit(seen, space)
    twins: tuple[tuple[str, Surrogate], ...] = (("first", GP()), ("second", GP()))
    choice = Auto(candidates=twins).fit(seen, space).selection[0]
    assert choice.chosen == "first"
    assert choice.reason == "highest leave-one-out log density"
    # Ahead by less than a standard error (.23 over 20 evaluations), by less than 2 nats in all
    # though surely, and by more than both.
    values = torch.tensor([[0.0], [1.0]], dtype=torch.float64).repeat(10, 1)

    def against(better: Tensor) -> Selection:
        return Auto._select("m", 0, {"a": (model, values), "b": (model, better)}, (), 8)

    noisy = against(values.flip(0) + 0.15)
    assert noisy.chosen == "a"
    assert noisy.reason == "simpler, and within 0.229 nats of the best, b"
    assert against(values + 0.09).reason == "simpler, and within 0.1 nats of the best, b"
    assert against(values + 0.11).chosen == "b"
    assert against(values + 0.11).reason == "highest leave-one-out log density"


@pytest.mark.parametrize("error", [RuntimeError, ValueError, ZeroDivisionError, SurrogateError])
def test_a_candidate_that_fails_is_skipped_with_its_reason(error: type[Exception]) -> None:
    seen, space = mixed_observations(9)
    model = Auto(candidates=(("broken", Failing(error)), ("gp", GP()))).fit(seen, space)
    choice = model.selection[0]
    assert choice.chosen == "gp"
    assert choice.reason == "the only candidate that could be fitted"
    assert choice.skipped == (("broken", f"{error.__name__}: no convergence"),)
    assert [name for name, _ in choice.scores] == ["gp"]


def test_programming_mistakes_are_not_swallowed() -> None:
    seen, space = mixed_observations(9)
    with pytest.raises(AttributeError):
        Auto(candidates=(("broken", Failing(AttributeError)), ("gp", GP()))).fit(seen, space)


def test_candidates_with_other_links_or_no_density_are_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, space = mixed_observations(9)
    model = Auto(candidates=(("raw", GP(link="identity")), ("gp", GP()))).fit(seen, space)
    assert "links differ" in model.selection[0].skipped[0][1]
    nowhere = torch.full((9, 3), torch.nan, dtype=torch.float64)
    monkeypatch.setattr("map_bo.surrogates.auto.log_densities", lambda *_: nowhere)
    with pytest.raises(SurrogateError, match="not finite"):
        Auto(candidates=(("gp", GP()),)).fit(seen, space)


def test_no_candidate_left_is_an_error() -> None:
    seen, space = mixed_observations(9)
    with pytest.raises(
        SurrogateError, match=r"no candidate could be fitted: broken \(Run"
    ) as caught:
        Auto(candidates=(("broken", Failing()),)).fit(seen, space)
    assert caught.value.hint is not None


def test_settings_are_checked() -> None:
    with pytest.raises(SurrogateError, match="candidates share a name: gp"):
        Auto(candidates=(("gp", GP()), ("gp", GP())))
    with pytest.raises(SurrogateError, match="no link kind 'probit'"):
        Auto(link="probit")  # type: ignore[arg-type]
    with pytest.raises(SurrogateError, match="by leaving evaluations out: mine") as caught:
        Auto(candidates=(("gp", GP()), ("mine", Plain())))
    assert "leaves_one_out = True" in str(caught.value.hint)


def test_link_reaches_the_default_candidates() -> None:
    seen, space = mixed_observations(9)
    model = Auto(link="identity").fit(seen, space)
    assert model.links == links_for(seen.metrics, kind="identity")
    assert model.selection[0].skipped == ()


def test_description_is_plain_data() -> None:
    seen, space = mixed_observations(9)
    described = json.loads(json.dumps(Auto().fit(seen, space).describe_selection()))
    assert [entry["metric"] for entry in described] == ["accuracy", "loss", "score"]
    assert set(described[0]["scores"]) == {"quadratic", "hybrid", "gp"}
    assert described[0]["chosen"] in described[0]["scores"]
    assert described[0]["skipped"] == {}


def many(d: int, *, blocks: int = 1) -> tuple[Observations, CoefficientSpace]:
    """Return 20 evaluations of a smooth truth in ``d`` coefficients."""
    parts = tuple(f"b{i}" for i in range(blocks)) if blocks > 1 else ()
    space = CoefficientSpace.box(tuple(f"e{i}" for i in range(d // blocks)), blocks=parts)
    X = space.sample(20, generator=make_generator(2))
    y = torch.sin(3 * X[:, 0]) + X[:, -1]
    return Observations(X, y.unsqueeze(-1), (Metric("y", kind="unbounded"),)), space


@pytest.mark.parametrize(
    ("d", "blocks", "chosen", "names"),
    [
        (8, 1, "hybrid", ["quadratic", "hybrid", "gp"]),
        (8, 4, "hybrid", ["quadratic", "hybrid", "gp"]),
        (10, 1, "gp", ["quadratic", "hybrid", "gp"]),
        (10, 5, "gp", ["quadratic", "hybrid", "gp", "sparse"]),
        (36, 6, "gp", ["hybrid", "gp", "sparse"]),
    ],
)
def test_many_coefficients_have_their_own_candidates(
    d: int, blocks: int, chosen: str, names: list[str]
) -> None:
    selection = Auto().fit(*many(d, blocks=blocks)).selection[0]
    assert selection.chosen == chosen
    assert [name for name, _ in selection.scores] == names
    fewest = 32 if d == 8 else 3 * d
    assert f"fewer than {fewest}" in selection.reason


def test_with_enough_evaluations_scores_decide_in_many_coefficients_too() -> None:
    seen, space = many(10)
    model = Auto(per_coefficient=1.0).fit(seen, space)
    assert "fewer than" not in model.selection[0].reason
    assert Auto(per_coefficient=1.0, candidates=(("only", GP()),)).fit(seen, space).selection[
        0
    ].chosen == ("only")
