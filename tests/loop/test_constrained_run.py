"""Constraints during a run: evaluations, front, choice, record, and what cannot be kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import map_bo
from map_bo.constraints import AtLeast, AtMost, Constraint
from map_bo.data import Metric, Observations
from map_bo.errors import ConfigError
from map_bo.loop.optimize import optimize
from map_bo.loop.recommend import recommend
from map_bo.loop.result import Result
from map_bo.pareto.gradient import GradientSolver
from map_bo.rng import make_generator
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.samplers.posterior.hypervolume import QLogNEHVI
from map_bo.samplers.posterior.scalarised import HypervolumeScalarised, QLogNParEGO, ScalarisedUCB
from map_bo.samplers.posterior.thompson import ThompsonFronts
from map_bo.scale import Scale
from map_bo.space import CoefficientSpace
from map_bo.surrogates.feasibility import Requirements, log_satisfied
from map_bo.surrogates.quadratic import Quadratic
from tests.loop.bowls import quick

SPACE = CoefficientSpace.box(["a", "b"])
METRICS = tuple(Metric(name, kind="unbounded") for name in ("u", "v", "safe"))
CENTRES = torch.tensor([[0.9, 0.5], [0.5, 0.9], [0.3, 0.3]], dtype=torch.float64)


class Safe:
    """Two objectives whose front is unsafe, and a metric that says how safe a point is."""

    space, metrics = SPACE, METRICS

    def evaluate(self, X: Tensor, *, generator: torch.Generator) -> Observations:
        return Observations(X, 1 - (X.unsqueeze(1) - CENTRES).square().sum(-1), METRICS)


def safety(X: Tensor) -> Tensor:
    return 1 - (X - CENTRES[2]).square().sum(-1)


def evaluated(n: int = 8) -> Observations:
    rows = torch.cat([SPACE.anchors().X, SPACE.sample(n, generator=make_generator(0))])
    return Safe().evaluate(rows, generator=make_generator(0))


SAMPLER = FrontUncertainty(surrogate=Quadratic(), restarts=1, raw_samples=16, steps=5)


def run(budget: int = 7, **settings: Any) -> Result:
    few = GradientSolver(points=24, steps=30)
    settings = {"surrogate": Quadratic(), "sampler": SAMPLER, "solver": few, **settings}
    return optimize(Safe(), budget, progress=False, tracking="none", verify=1, **settings)


def test_the_front_keeps_the_constraint_and_trades_the_others() -> None:
    settings = quick(20, surrogate=Quadratic(), constraints={"safe": ">= 0.9"})
    found = recommend(evaluated(), SPACE, settings, generator=make_generator(0))
    assert float(safety(found.front.X).min()) > 0.895
    assert float(found.front.feasible.min()) >= 0.5
    spread = found.front.mean[:, 0].amax() - found.front.mean[:, 0].amin()
    assert float(spread) > 0.1
    assert found.scale.ranged.tolist() == [True, True, False]
    assert found.scale.rangeless == (), "it is not told to be without a range"


def test_gains_of_a_constrained_metric_say_whether_it_holds() -> None:
    scale = Scale.of(evaluated(), SPACE, None, [AtLeast("safe", 0.9)])
    values = torch.tensor([[1.0, 1.0, 0.95], [1.0, 1.0, 0.85]], dtype=torch.float64)
    assert scale.gains(values)[:, 2].tolist() == [1.0, 0.0]
    weights = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    assert scale.weights(weights).tolist() == [0.5, 0.5, 0.0]
    assert float(scale.width[2]) < 10, "its misses are still measured in its own range"
    alone = scale.select([0, 1])
    assert alone.constraints == ()


def test_the_probability_is_right_and_has_gradients_far_from_the_bound() -> None:
    model = Quadratic().fit(evaluated(), SPACE)
    X = SPACE.sample(7, generator=make_generator(3)).requires_grad_()
    band: list[Constraint] = [AtLeast("safe", 0.7), AtMost("safe", 0.9)]
    posterior = model.gaussian(X)
    sd = (posterior.variance[:, 2] + model.misfit_variance()[2]).sqrt()
    low, high = ((bound - posterior.mean[:, 2]) / sd for bound in (0.7, 0.9))
    expected = torch.special.ndtr(high) - torch.special.ndtr(low)
    found = log_satisfied(model, X, band)
    assert torch.allclose(found.exp(), expected, atol=1e-6)
    hopeless = log_satisfied(model, X, [AtLeast("safe", 50.0)])
    (slope,) = torch.autograd.grad(hopeless.sum(), X)
    assert bool(hopeless.isfinite().all())
    assert bool(slope.isfinite().all())
    assert float(log_satisfied(model, X, [AtLeast("safe", -50.0)]).detach().abs().max()) < 1e-12


@pytest.mark.parametrize(
    "kind", [FrontUncertainty, QLogNEHVI, HypervolumeScalarised, QLogNParEGO, ScalarisedUCB]
)
def test_every_sampler_looks_where_the_constraint_may_hold(kind: Any) -> None:
    sampler = kind(surrogate=Quadratic(), restarts=1, raw_samples=24, steps=6, mc_samples=8)
    held = sampler.with_requirements(Requirements(constraints=(AtLeast("safe", 0.9),)))
    near = held.propose(evaluated(), SPACE, 1, generator=make_generator(1))
    assert float(safety(near).min()) > 0.85


def test_posterior_sampling_does_too() -> None:
    sampler = ThompsonFronts(surrogate=Quadratic(), requirements=Requirements(
        constraints=(AtLeast("safe", 0.9),)
    ))  # fmt: skip
    near = sampler.propose(evaluated(), SPACE, 1, generator=make_generator(1))
    assert float(safety(near).min()) > 0.85


def test_a_threshold_of_the_reference_point_attracts_evaluations_above_it() -> None:
    seen = evaluated()
    bare = SAMPLER.propose(seen, SPACE, 1, generator=make_generator(2))
    low = {"u": -9.0, "v": -9.0, "safe": -9.0}
    beneath = SAMPLER.with_reference(low).propose(seen, SPACE, 1, generator=make_generator(2))
    assert beneath.shape == bare.shape
    above = SAMPLER.with_reference({**low, "safe": 0.95})
    assert float(safety(above.propose(seen, SPACE, 1, generator=make_generator(2))).min()) > 0.9


def test_a_run_keeps_its_constraints_and_says_so(tmp_path: Path) -> None:
    given = [map_bo.AtLeast("safe", 0.9)]
    result = run(constraints=given, run_dir=tmp_path / "run")
    choice = result.choose()
    assert float(safety(choice.x.unsqueeze(0))) > 0.89
    assert choice.preference is not None
    assert choice.preference.at_least == {"safe": 0.9}
    [note] = [note for note in result.summary["notes"] if note.startswith("constraints: ")]
    assert "safe >= 0.9" in note
    again = map_bo.load_result(tmp_path / "run")
    assert again.requirements == result.requirements
    assert again.scale.constraints == tuple(given)
    assert torch.equal(again.front.feasible, result.front.feasible)
    assert torch.equal(run(constraints=given, run_dir=tmp_path / "run").front.X, result.front.X)
    with pytest.raises(map_bo.MapBoError, match="another run"):
        run(constraints=[map_bo.AtLeast("safe", 0.8)], run_dir=tmp_path / "run")


def test_constraints_on_all_metrics_are_kept() -> None:
    result = run(constraints=["u >= 0.6", "v >= 0.6", "safe >= 0.8"])
    assert len(result.front) == 1
    assert float(result.front.feasible[0]) > 0.9
    assert bool((result.choose().mean >= torch.tensor([0.6, 0.6, 0.8])).all())


def test_one_objective_is_left() -> None:
    result = run(constraints=["v >= 0.6", "safe >= 0.8"])
    assert len(result.front) == 1
    assert float(safety(result.front.X)) > 0.79


def test_what_cannot_be_kept_is_said() -> None:
    result = run(constraints=["u >= 0.99", "safe >= 0.99"])
    assert len(result.front) == 1
    assert any("comes nearest" in note for note in result.summary["notes"])
    assert any("comes nearest" in note for note in result.choose().notes)


def test_unknown_metrics_are_refused_before_anything_is_recorded(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown metric"):
        run(constraints={"saef": ">= 0.9"})


@pytest.mark.slow
def test_a_nested_run_refuses_them() -> None:
    with pytest.raises(ConfigError, match="nested run cannot keep constraints"):
        map_bo.optimize_nested(
            map_bo.digits_problem(experts=2), 24, progress=False, constraints=["1 >= 0.5"]
        )


@pytest.mark.slow
def test_the_stopping_rule_can_be_asked() -> None:
    result = run(16, constraints=["safe >= 0.9"], stop={"criterion": "regret", "least": 8})
    assert result.summary["stop"]["series"]
