from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import DataError, EvaluationError, MapBoError, MergeError, SpaceError
from map_bo.evaluators.evaluator import Measurement, binomial_variance
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.problem import Problem
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from tests.merging.small_models import MODELS, Tied, build, family, inputs

G = make_generator(0)
X = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.2, 0.5, 0.9]], dtype=torch.float64)
KINDS = sorted(MODELS)


def mean_output(kind: str) -> Callable[[nn.Module], float]:
    return lambda model: float(model(inputs(kind)).detach().sigmoid().mean())


def spread(kind: str) -> Callable[[nn.Module], float]:
    return lambda model: float(model(inputs(kind)).detach().sigmoid().std())


def problem(kind: str = "mlp", **changes: Any) -> MergedModelProblem:
    base, experts = family(kind)
    settings: dict[str, Any] = {
        "base": base,
        "experts": experts,
        "evaluators": {"mean": mean_output(kind), "spread": spread(kind)},
        **changes,
    }
    return MergedModelProblem(settings.pop("model", build(kind, 5)), **settings)


def by_hand(kind: str, c: Tensor) -> nn.Module:
    base, experts = family(kind)
    state = base.state_dict()
    total = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    for weight, expert in zip(c.tolist(), experts.values(), strict=True):
        for name, tensor in expert.state_dict().items():
            if tensor.is_floating_point():
                total[name] = total[name] + weight * (tensor.double() - state[name].double())
    base.load_state_dict(total)
    return base


def plain(model: nn.Module) -> dict[str, Any]:
    return {
        "bytes": {k: (v.data_ptr(), v.numpy().tobytes()) for k, v in model.state_dict().items()},
        "modes": [module.training for module in model.modules()],
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("as_function", [False, True])
def test_evaluates_merged_models(kind: str, as_function: bool) -> None:
    model = build(kind, 5).train()
    made: list[nn.Module] = []

    def make() -> nn.Module:
        made.append(model)
        return model

    before = plain(model)
    tested = problem(kind, model=make if as_function else model)
    assert isinstance(tested, Problem)
    assert tested.space == CoefficientSpace.box(("e0", "e1", "e2"))
    assert tested.metrics == (
        Metric("mean", resampling="same"),
        Metric("spread", resampling="same"),
    )
    assert not made
    seen = tested.evaluate(X, generator=G)
    tested.evaluate(X[:1], generator=G)
    assert len(made) == as_function
    for x, y in zip(X, seen.Y, strict=True):
        reference = by_hand(kind, x)
        assert float(y[0]) == pytest.approx(mean_output(kind)(reference), abs=1e-5)
        assert float(y[1]) == pytest.approx(spread(kind)(reference), abs=1e-5)
    assert seen.failures == (None,) * 3
    assert bool((seen.cost > 0).all())
    assert bool(seen.Yvar.isnan().all())
    assert plain(model) == before


def test_measurements_carry_their_noise() -> None:
    tested = problem(
        evaluators={
            "share": lambda model: Measurement(0.75, count=20),
            "known": lambda model: Measurement(0.5, variance=0.01, count=9),
            "percent": lambda model: Measurement(75.0, count=20),
            "loss": lambda model: Measurement(3.0, variance=0.5, count=20),
            "bare": lambda model: 0.5,
        },
        metrics=[
            Metric("share"),
            Metric("known"),
            Metric("percent", upper=100.0),
            Metric("loss", direction="min", kind="loss"),
            Metric("bare", kind="unbounded"),
        ],
    )
    seen = tested.evaluate(X[:1], generator=G)
    share = binomial_variance(0.75, 20)
    nan = float("nan")
    assert seen.Y[0].tolist() == [0.75, 0.5, 75.0, 3.0, 0.5]
    assert seen.Yvar[0].tolist() == pytest.approx([share, 0.01, 1e4 * share, 0.5, nan], nan_ok=True)
    assert seen.counts[0].tolist() == pytest.approx([20, 9, 20, nan, nan], nan_ok=True)


def test_metrics_stand_in_their_own_order() -> None:
    tested = problem(
        evaluators={"a": lambda model: 0.1, "b": lambda model: 0.2},
        metrics=[Metric("b"), Metric("a")],
    )
    assert tested.evaluate(X[:1], generator=G).Y.tolist() == [[0.2, 0.1]]


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (ValueError("no tests"), "evaluator 'code' raised ValueError: no tests"),
        (float("nan"), "evaluator 'code' returned nan"),
        (None, "evaluator 'code' returned None, not a number"),
        (85.0, r"evaluator 'code' returned 85.0, outside the metric's bounds [0.0, 1.0]"),
        (-0.1, r"evaluator 'code' returned -0.1, outside the metric's bounds [0.0, 1.0]"),
    ],
)
def test_failed_rows_have_their_reason_and_others_their_values(result: Any, reason: str) -> None:
    calls: list[str] = []

    def code(model: nn.Module) -> Any:
        calls.append("code")
        if calls.count("code") != 2:
            return 0.25
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        if isinstance(result, Exception):
            raise result
        return result

    def last(model: nn.Module) -> float:
        calls.append("last")
        return mean_output("mlp")(model)

    model = build("mlp", 5)
    before = plain(model)
    tested = problem(
        model=model,
        evaluators={"mean": mean_output("mlp"), "code": code, "last": last},
    )
    seen = tested.evaluate(X, generator=G)
    before_it, failure, after_it = seen.failures
    assert before_it is after_it is None
    assert failure is not None
    assert failure.startswith(f"{reason} (hint: ")
    assert bool(seen.Yvar[1].isnan().all())
    assert seen.measured.tolist() == [[True] * 3, [True, False, True], [True] * 3]
    assert calls == ["code", "last"] * 3
    clean = problem().evaluate(X, generator=G)
    assert torch.equal(seen.Y[:, 0], clean.Y[:, 0])
    assert torch.equal(seen.Y[:, 2], clean.Y[:, 0])
    assert plain(model) == before


def test_every_evaluator_that_failed_is_named_with_its_reason() -> None:
    def no(model: nn.Module) -> float:
        raise RuntimeError("no")

    tested = problem(evaluators={"a": no, "b": lambda model: 0.5, "c": lambda model: torch.nan})
    seen = tested.evaluate(X[:1], generator=G)
    assert seen.Y[0, 1] == 0.5
    assert seen.failures[0] is not None
    assert "evaluator 'a' raised RuntimeError: no" in seen.failures[0]
    assert "evaluator 'c' returned nan" in seen.failures[0]


def test_values_a_rounding_error_outside_are_kept_inside() -> None:
    tested = problem(
        evaluators={"a": lambda m: 1 + 1e-9, "b": lambda m: Measurement(-1e-9, None, 5)}
    )
    seen = tested.evaluate(X[:1], generator=G)
    assert seen.Y.tolist() == [[1.0, 0.0]]
    assert float(seen.Yvar[0, 1]) > 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interruptions_pass_and_leave_the_model_as_found(error: type[BaseException]) -> None:
    def interrupted(model: nn.Module) -> float:
        model.train()
        raise error

    model = build("cnn", 5)
    before = plain(model)
    tested = problem("cnn", model=model, evaluators={"a": interrupted})
    with pytest.raises(error):
        tested.evaluate(X, generator=G)
    assert plain(model) == before
    assert tested.evaluate(X[:0], generator=G).Y.shape == (0, 1)  # and it can go on


def test_what_one_evaluator_does_does_not_reach_another() -> None:
    def vandal(model: nn.Module) -> float:
        model.train()(inputs("cnn"))
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data.zero_()
        return 0.5

    alone = problem("cnn").evaluate(X, generator=G)
    tested = problem(
        "cnn", evaluators={"vandal": vandal, "mean": mean_output("cnn"), "spread": spread("cnn")}
    )
    assert torch.equal(tested.evaluate(X, generator=G).Y[:, 1:], alone.Y)


def test_evaluators_may_take_gradients() -> None:
    def sensitivity(model: nn.Module) -> float:
        model(inputs("mlp")).sum().backward()
        return max(float(p.grad.abs().max()) for p in model.parameters() if p.grad is not None)

    model = build("mlp", 5)
    tested = problem(model=model, evaluators={"s": sensitivity}, metrics=[Metric("s", kind="loss")])
    seen = tested.evaluate(X[[0, 0]], generator=G)
    assert seen.failures == (None, None)
    assert torch.equal(seen.Y[0], seen.Y[1])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_load_merged_and_export_are_the_same_model(kind: str, tmp_path: Path) -> None:
    model = build(kind, 5)
    before = plain(model)
    tested = problem(kind, model=model)
    x = X[2]
    with tested.load(x) as live:
        output = live(inputs(kind)).detach().clone()
        assert not live.training
    assert plain(model) == before
    other = build(kind, 6)
    other.load_state_dict(tested.merged(x))
    assert torch.equal(other(inputs(kind)), output)
    folder = tested.export(x, tmp_path / "out", record={"why": "test"})
    assert folder == tmp_path / "out"
    written = open_checkpoint(folder)
    state = {name: written.load(name) for name in written.names}
    other.load_state_dict(state)
    assert torch.allclose(other(inputs(kind)), output, atol=1e-5)
    recipe = (folder / "recipe.yaml").read_text()
    assert "why: test" in recipe
    assert "class: map_bo.merging.vectors.linear_merge:TaskArithmetic" in recipe


def test_export_needs_no_task_vectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **settings: object) -> None:
        raise AssertionError("the task vectors were loaded")

    monkeypatch.setattr(TaskVectors, "load", refuse)
    folder = problem().export(X[1], tmp_path / "out")
    expert = family("mlp")[1]["e0"].state_dict()
    written = open_checkpoint(folder)
    assert all(torch.allclose(written.load(k), v, atol=1e-6) for k, v in expert.items())


def test_block_coefficients_of_weights_that_only_the_model_ties(tmp_path: Path) -> None:
    base, experts = family("tied")
    loose = {
        name: {k: v.clone() for k, v in model.state_dict().items()}
        for name, model in {"base": base, **experts}.items()
    }
    tested = problem(
        "tied",
        base=loose.pop("base"),
        experts=loose,
        operator=TaskArithmetic({"embed": "^embed", "others": "*"}),
    )
    x = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7], dtype=torch.float64)
    written = open_checkpoint(tested.export(x, tmp_path / "out"))
    merged = tested.merged(x)
    assert torch.equal(written.load("embed.weight"), written.load("output.weight"))
    for name, tensor in merged.items():
        assert torch.allclose(written.load(name), tensor, atol=1e-6)


class Halving:
    """An operator that is not linear: it halves the first delta and then truncates."""

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        return CoefficientSpace.box(experts, lower=lower, upper=upper)

    def prepare(self, deltas: TaskVectors) -> Halving:
        self.rows = deltas.rows
        return self

    def write(self, c: Tensor, out: Tensor) -> None:
        out.copy_((self.rows[0] + c[0] * self.rows[1] / 2).trunc())

    def describe(self) -> dict[str, Any]:
        return {"name": "halving"}


def test_operators_that_are_not_linear_are_exported_as_merged(tmp_path: Path) -> None:
    tested = problem(operator=Halving())
    written = open_checkpoint(tested.export(X[1], tmp_path / "out"))
    merged = tested.merged(X[1])
    assert any(bool(tensor.any()) for tensor in merged.values())
    assert all(torch.equal(written.load(name), tensor) for name, tensor in merged.items())


def test_merged_has_the_dtypes_of_the_base_and_new_tensors() -> None:
    base, experts = family("mlp")
    tested = problem(base=base.bfloat16(), experts=experts, dtype=torch.bfloat16)
    merged = tested.merged(X[0])
    for name, tensor in base.state_dict().items():
        assert torch.equal(merged[name], tensor)
        assert merged[name].data_ptr() != tensor.data_ptr()


def test_description_recognises_the_problem() -> None:
    described = problem().describe()
    assert json.loads(json.dumps(described)) == described
    assert described == problem().describe()
    assert described["metrics"][0]["name"] == "mean"
    base, experts = family("mlp")
    assert set(described["experts"]) == set(experts)
    assert described["base"]["digest"] == open_checkpoint(base).digest()
    others = [
        problem(upper=2.0),
        problem(operator=TaskArithmetic({"all": "*"})),
        problem(experts={**experts, "e0": experts["e1"]}),
        problem(metrics=[Metric("mean", direction="min"), Metric("spread")]),
        problem(metrics=[Metric("mean", resampling="fresh"), Metric("spread")]),
        problem(dtype=torch.bfloat16),
    ]
    assert all(other.describe() != described for other in others)


def test_space_may_be_narrowed() -> None:
    names = ("e0", "e1", "e2")
    tested = problem(space=CoefficientSpace.box(names, sum_at_most=1.0))
    with pytest.raises(SpaceError, match="rows leave the space"):
        tested.evaluate(torch.ones(1, 3), generator=G)
    with pytest.raises(SpaceError, match="rows leave the space"):
        tested.merged(torch.ones(3))
    with pytest.raises(SpaceError, match="the space has 3 of them: e0, e1, e2"):
        tested.export(torch.ones(2), "unused")
    with pytest.raises(MergeError, match="coefficients e1, e0, e2; the operator takes e0, e1, e2"):
        problem(space=CoefficientSpace.box(("e1", "e0", "e2")))
    assert problem(lower=-1.0, upper=2.0).space.upper == (2.0,) * 3


def text(value: float) -> Callable[[nn.Module], float]:
    return lambda model: value


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"experts": {}}, MergeError, "there are no experts"),
        ({"experts": ["a"]}, MergeError, "experts must be a mapping, got a list"),
        ({"experts": {"": "a"}}, MergeError, "the name of an expert must be text, got ''"),
        ({"evaluators": {}}, EvaluationError, "there are no evaluators"),
        ({"evaluators": [text(1)]}, EvaluationError, "evaluators must be a mapping, got a list"),
        (
            {"evaluators": {3: text(1)}},
            EvaluationError,
            "the name of an evaluator must be text, got 3",
        ),
        ({"evaluators": {"a": 0.5}}, EvaluationError, "evaluator 'a' is a float, which cannot"),
        ({"model": "gpt2"}, MergeError, "must be a module or a function, got a str"),
        ({"metrics": [Metric("mean")]}, DataError, "metrics are mean; evaluators are mean, spread"),
        ({"metrics": [Metric("mean")] * 2}, DataError, "metric names appear twice"),
    ],
)
def test_problems_that_cannot_be_are_refused(
    changes: Mapping[str, Any], kind: type[MapBoError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        problem(**changes)


def test_what_only_the_first_evaluation_can_see_is_refused_then() -> None:
    with pytest.raises(MergeError, match="model function must return a module, got a dict"):
        problem(model=lambda: {}).evaluate(X, generator=G)
    with pytest.raises(MergeError, match="lacks 3 tensors of the model Tied: embed"):
        problem(model=lambda: Tied()).evaluate(X, generator=G)
    with pytest.raises(MergeError, match="the model is on meta and the task vectors on cpu"):
        problem(model=build("mlp").to("meta")).evaluate(X, generator=G)


def test_expert_of_another_base_is_refused_unless_told() -> None:
    generator = make_generator(1)

    def draw() -> nn.Module:
        model = nn.Linear(40, 40, bias=False)
        model.weight.data = torch.randn(40, 40, generator=generator)
        return model

    base, expert, model = draw(), draw(), draw()

    def make(**settings: Any) -> MergedModelProblem:
        return MergedModelProblem(
            model, base=base, experts={"x": expert}, evaluators={"a": text(0.5)}, **settings
        )

    row = torch.ones(1, 1)
    with pytest.raises(MergeError, match="expert 'x' does not look fine-tuned from this base"):
        make().evaluate(row, generator=G)
    assert make(check_base=False).evaluate(row, generator=G).failures == (None,)


def test_paths_are_taken(tmp_path: Path) -> None:
    base, experts = family("mlp")
    paths: dict[str, str] = {}
    for name, model in {"base": base, **experts}.items():
        paths[name] = str(tmp_path / f"{name}.pt")
        torch.save(model.state_dict(), paths[name])
    tested = problem(base=paths.pop("base"), experts=paths)
    expected = problem().evaluate(X, generator=G)
    assert torch.equal(tested.evaluate(X, generator=G).Y, expected.Y)
    assert tested.describe()["experts"]["e0"]["source"] == paths["e0"]


def test_examples_of_a_given_metric_are_filled_in_and_never_overruled() -> None:
    given = (Metric("mean"), Metric("spread", resampling="fresh"))
    tested = problem("mlp", metrics=given)
    assert [metric.resampling for metric in tested.metrics] == ["same", "fresh"]


def test_fixed_coefficients_are_part_of_every_merge() -> None:
    names = problem().space.names
    fixed = problem(fixed={names[1]: 0.7})
    assert fixed.space.fixed == {names[1]: 0.7}
    free = problem().evaluate(X[:1] + torch.tensor([0.2, 0.7, 0.0]), generator=G)
    held = fixed.evaluate(X[:1] + torch.tensor([0.2, 0.7, 0.0]), generator=G)
    torch.testing.assert_close(held.Y, free.Y)
    assert fixed.space.anchors().X[:, 1].tolist() == [0.7] * 4
    with pytest.raises(SpaceError, match="leave the space"):
        fixed.evaluate(X[:1], generator=G)
    with pytest.raises(SpaceError, match="no coefficient 'nobody' to fix"):
        problem(fixed={"nobody": 1.0})
