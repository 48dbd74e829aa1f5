"""What need not be measured again: only what is the same in all that decides it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from map_bo.data import Metric, Observations
from map_bo.evaluators.evaluator import Measurement, accuracy, mean_loss
from map_bo.evaluators.metrics import SeveralMetrics
from map_bo.loop.optimize import optimize
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.operators.sparse import Ties
from map_bo.problems.evaluation_cache import EVALUATIONS_VARIABLE, EvaluationCache
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from map_bo.surrogates.quadratic import Quadratic
from tests.merging.small_models import Cnn, Mlp, build, family, inputs

X = torch.tensor([[0.4, 0.1, 0.3], [0.0, 0.0, 0.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2])


class Score:
    """An evaluator with a digest, which counts its calls."""

    def __init__(self, digest: object = "version 1", value: float | None = None) -> None:
        self.digest, self.value, self.calls = digest, value, 0

    def __call__(self, model: nn.Module) -> float:
        self.calls += 1
        if self.value is not None:
            return self.value
        return float(model(inputs("mlp")).detach().sigmoid().mean())


@pytest.fixture
def store(tmp_path: Path) -> EvaluationCache:
    return EvaluationCache(tmp_path / "kept.sqlite")


def problem(
    store: EvaluationCache | bool, evaluators: Mapping[str, Any], **settings: Any
) -> MergedModelProblem:
    base, experts = family("mlp")
    parts: dict[str, Any] = {"model": build("mlp"), "base": base, "experts": experts, **settings}
    model = parts.pop("model")
    return MergedModelProblem(model, evaluators=evaluators, cache=store, **parts)


def evaluate(made: MergedModelProblem, x: Tensor = X, seed: int = 0) -> Observations:
    return made.evaluate(x, generator=make_generator(seed))


def numbers(seen: Observations) -> list[Tensor]:
    return [seen.X, seen.Y, seen.Yvar.nan_to_num(-1), seen.counts.nan_to_num(-1)]


def test_a_second_problem_measures_nothing_and_gets_the_same_numbers(
    store: EvaluationCache,
) -> None:
    def evaluators() -> dict[str, Any]:
        return {"own": Score(), "right": accuracy(inputs("mlp"), LABELS)}

    metrics = [Metric("own"), Metric("right")]
    first = evaluate(problem(store, evaluators(), metrics=metrics))
    assert not bool(first.recalled.any())
    again = evaluators()
    second = evaluate(problem(store, again, metrics=metrics), seed=7)
    assert again["own"].calls == 0
    assert bool(second.recalled.all())
    assert bool((second.saved > 0).all())
    assert bool((second.cost > 0).all())
    assert all(map(torch.equal, numbers(first), numbers(second)))
    plain = evaluate(problem(False, evaluators(), metrics=metrics))
    assert all(map(torch.equal, numbers(plain), numbers(second)))


def test_a_further_task_alone_is_measured(store: EvaluationCache) -> None:
    evaluate(problem(store, {"a": Score("a"), "b": Score("b")}))
    new, old = Score("c"), Score("b")
    # Names and order do not matter, as long as no head belongs to a name.
    seen = evaluate(problem(store, {"c": new, "renamed": old}))
    assert (new.calls, old.calls) == (2, 0)
    assert seen.recalled.tolist() == [[False, True], [False, True]]
    row = evaluate(problem(store, {"c": Score("c")}), torch.rand(1, 3).double())
    assert not bool(row.recalled.any())


def other_base() -> dict[str, Any]:
    base = family("mlp")[0].state_dict()
    return {"base": {**base, "last.bias": base["last.bias"] + 1e-7}}


def other_expert() -> dict[str, Any]:
    _, experts = family("mlp")
    name = next(iter(experts))
    changed = {**experts[name].state_dict()}
    changed["last.bias"] = changed["last.bias"] + 1e-6
    return {"experts": {**experts, name: changed}}


def other_order() -> dict[str, Any]:
    return {"experts": dict(reversed(family("mlp")[1].items()))}


class Doubled(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def other_class() -> dict[str, Any]:
    model = Doubled()
    model.load_state_dict(family("mlp")[0].state_dict())
    return {"model": model}


def other_attribute() -> dict[str, Any]:
    model = build("mlp")
    model.temperature = 2.0  # type: ignore[assignment]
    return {"model": model}


OTHERS: list[Callable[[], dict[str, Any]]] = [
    *(other_base, other_expert, other_order, other_class, other_attribute),
    lambda: {"operator": Ties(density=0.5)},
    lambda: {"dtype": torch.bfloat16},
    lambda: {"model": build("mlp").double()},
]


@pytest.mark.parametrize("other", OTHERS)
def test_anything_else_is_measured(
    store: EvaluationCache, other: Callable[[], dict[str, Any]]
) -> None:
    evaluate(problem(store, {"a": Score()}))
    seen = evaluate(problem(store, {"a": Score()}, **other()))
    assert not bool(seen.recalled.any())


def test_settings_of_operators_count(store: EvaluationCache) -> None:
    evaluate(problem(store, {"a": Score()}, operator=Ties(density=0.5)))
    same = evaluate(problem(store, {"a": Score()}, operator=Ties(density=0.5)))
    assert bool(same.recalled.all())
    other = evaluate(problem(store, {"a": Score()}, operator=Ties(density=0.6)))
    assert not bool(other.recalled.any())
    default = evaluate(problem(store, {"a": Score()}, operator=TaskArithmetic()))
    assert not bool(default.recalled.any())
    assert bool(evaluate(problem(store, {"a": Score()})).recalled.all())


def test_examples_and_batch_sizes_count(store: EvaluationCache) -> None:
    data = inputs("mlp")
    evaluate(problem(store, {"a": accuracy(data, LABELS)}))
    assert bool(evaluate(problem(store, {"a": accuracy(data, LABELS)})).recalled.all())
    for one in (
        accuracy(data + 1e-6, LABELS),
        accuracy(data, LABELS.flip(0)),
        accuracy(data, LABELS, batch_size=1),
    ):
        assert not bool(evaluate(problem(store, {"a": one})).recalled.any())
    loss = problem(store, {"a": mean_loss(data, LABELS)}, metrics=[Metric("a", "min", "loss")])
    assert not bool(evaluate(loss).recalled.any())


def test_labels_that_are_changed_in_place_count(store: EvaluationCache) -> None:
    labels = LABELS.clone()
    made = problem(store, {"a": accuracy(inputs("mlp"), labels)})
    evaluate(made)
    labels[0] = 1
    assert not bool(evaluate(made).recalled.any())


def test_a_file_that_is_changed_in_place_counts(store: EvaluationCache, tmp_path: Path) -> None:
    _, experts = family("mlp")
    name = next(iter(experts))
    path = tmp_path / "expert.safetensors"

    def seen() -> Observations:
        return evaluate(problem(store, {"a": Score()}, experts={name: path}), X[:1, :1])

    save_file(experts[name].state_dict(), path)
    seen()
    assert bool(seen().recalled.all())
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("r+b") as file:
        file.write(content)
    assert not bool(seen().recalled.any())


def test_the_default_dtype_and_autocast_of_the_caller_count(store: EvaluationCache) -> None:
    evaluate(problem(store, {"a": Score()}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not bool(evaluate(problem(store, {"a": Score()})).recalled.any())
    assert bool(evaluate(problem(store, {"a": Score()})).recalled.all())


def a_function(model: nn.Module) -> float:
    return 0.5


class Timed(Score):
    repeats = False


class Broken(Score):
    @property
    def digest(self) -> str:
        raise RuntimeError("no")

    @digest.setter
    def digest(self, value: object) -> None: ...


@pytest.mark.parametrize(
    "evaluator",
    [
        a_function,
        Timed(),
        Score(digest=""),
        Score(digest=None),
        Score(digest=3),
        Broken(),
        SeveralMetrics(lambda model: {"x": 0.5}, ["x"]),
    ],
)
def test_what_has_no_digest_or_does_not_repeat_is_not_kept(
    store: EvaluationCache, evaluator: Any
) -> None:
    for _ in range(2):
        seen = evaluate(problem(store, {"a": evaluator}))
        assert seen.failures == (None, None)
        assert not bool(seen.recalled.any())
    assert not store.path.exists()


def test_a_function_may_be_given_a_digest(store: EvaluationCache) -> None:
    def score(model: nn.Module) -> float:
        return 0.25

    score.digest = "one"  # type: ignore[attr-defined]
    evaluate(problem(store, {"a": score}))
    assert bool(evaluate(problem(store, {"a": score})).recalled.all())
    score.digest = lambda: "two"  # type: ignore[attr-defined]
    assert not bool(evaluate(problem(store, {"a": score})).recalled.any())
    assert bool(evaluate(problem(store, {"a": score})).recalled.all())


def test_fresh_examples_are_not_kept(store: EvaluationCache) -> None:
    for _ in range(2):
        made = problem(
            store,
            {"a": Score(), "b": Score("b")},
            metrics=[Metric("a", resampling="fresh"), Metric("b")],
        )
        seen = evaluate(made)
    assert seen.recalled.tolist() == [[False, True], [False, True]]


def test_gradients_are_measured(store: EvaluationCache) -> None:
    for _ in range(2):
        made = problem(
            store,
            {"a": mean_loss(inputs("mlp"), LABELS)},
            metrics=[Metric("a", "min", "loss")],
            gradients=True,
        )
        seen = evaluate(made)
        assert seen.gradients is not None
        assert not bool(seen.recalled.any())


def test_recalibrated_models_need_batches_with_a_digest(store: EvaluationCache) -> None:
    base, experts = family("cnn")

    class Batches:
        digest = "batches 1"

        def __iter__(self) -> Iterator[Tensor]:
            yield inputs("cnn")

    def seen(batches: Any) -> Observations:
        made = MergedModelProblem(
            Cnn(),
            base=base,
            experts=experts,
            evaluators={"a": accuracy(inputs("cnn"), LABELS)},
            recalibration=batches,
            cache=store,
        )
        return evaluate(made)

    for batches, hits in (([inputs("cnn")], False), (Batches(), True), (None, True)):
        seen(batches)
        assert bool(seen(batches).recalled.all()) == hits


def test_failures_are_measured_again_and_what_worked_beside_them_is_not(
    store: EvaluationCache,
) -> None:
    class Fails(Score):
        def __call__(self, model: nn.Module) -> float:
            self.calls += 1
            raise ValueError("no")

    fails, works = Fails("f"), Score()
    for _ in range(2):
        seen = evaluate(problem(store, {"fails": fails, "works": works}))
        assert bool(seen.partial.all())
    assert (fails.calls, works.calls) == (4, 2)
    assert seen.recalled.tolist() == [[False, True], [False, True]]


def test_a_value_outside_other_bounds_fails_although_it_was_kept(store: EvaluationCache) -> None:
    wide = [Metric("a", kind="unbounded")]
    evaluate(problem(store, {"a": Score(value=3.0)}, metrics=wide))
    assert evaluate(problem(store, {"a": Score(value=3.0)}, metrics=wide)).Y.tolist() == [[3], [3]]
    seen = evaluate(problem(store, {"a": Score(value=3.0)}))
    assert "outside the metric's bounds" in str(seen.failures[0])
    assert not bool(seen.recalled.any())


def test_several_metrics_are_one_entry(store: EvaluationCache) -> None:
    def both(model: nn.Module) -> dict[str, Measurement]:
        return {"x": Measurement(0.5, count=4), "y": Measurement(0.25, variance=0.01)}

    both.digest = "1"  # type: ignore[attr-defined]
    evaluate(problem(store, {"a": SeveralMetrics(both, ["x", "y"])}))
    assert store.describe()["entries"] == {"a": 2}
    seen = evaluate(problem(store, {"other": SeveralMetrics(both, ["x", "y"])}))
    assert bool(seen.recalled.all())
    assert seen.counts[0, 0] == 4
    part = problem(store, {"other": SeveralMetrics(both, ["x", "y"])}).restricted(["other_y"])
    assert evaluate(part).recalled.tolist() == [[True], [True]]


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without_what_is_kept(store: EvaluationCache) -> None:
    def run(kept: EvaluationCache | bool) -> Any:
        made = problem(kept, {"a": Score("a"), "b": Score("b")})
        return optimize(made, budget=7, seed=3, verify=1, surrogate=Quadratic())

    without, cold, warm = run(False), run(store), run(store)
    for other in (cold, warm):
        assert torch.equal(without.seen.X, other.seen.X)
        assert torch.equal(without.seen.Y, other.seen.Y)
        assert torch.equal(without.front.X, other.front.X)
    assert bool(warm.seen.recalled.all())
    assert bool(warm.verification.recalled.all())
    assert warm.summary["evaluations"] == without.summary["evaluations"]
    told = warm.summary["cache"]
    assert told["evaluations"] == warm.summary["evaluations"]
    assert told["metrics"] == 2 * told["evaluations"]
    assert told["seconds_saved"] > 0
    assert "cache" not in without.summary


def test_functions_that_a_ready_evaluator_calls_count(store: EvaluationCache) -> None:
    from torch.utils.data import DataLoader, TensorDataset

    from map_bo.evaluators.loaders.torch_loader import TorchLoader

    data = DataLoader(TensorDataset(inputs("mlp"), LABELS), batch_size=2)

    def one(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.argmax(-1) == targets).double()

    def other(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits.argmin(-1) == targets).double()

    def scaled(by: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda logits, targets: by * one(logits, targets)

    def seen(outcome: Any) -> Observations:
        return evaluate(problem(store, {"a": TorchLoader(loader=data, outcome=outcome)}))

    for outcome in (one, other, "accuracy", scaled(0.5), scaled(0.25)):
        assert not bool(seen(outcome).recalled.any())
        assert bool(seen(outcome).recalled.all())


def test_settings_of_metrics_over_sets_count(store: EvaluationCache) -> None:
    torchmetrics = pytest.importorskip("torchmetrics.classification")
    from torch.utils.data import DataLoader, TensorDataset

    from map_bo.evaluators.loaders.torch_loader import TorchLoader

    data = DataLoader(TensorDataset(inputs("mlp"), LABELS), batch_size=2)
    for average in ("macro", "micro"):
        for again in (False, True):
            metric = torchmetrics.MulticlassF1Score(num_classes=3, average=average)
            made = problem(store, {"a": TorchLoader(loader=data, outcome=metric)})
            assert bool(evaluate(made).recalled.all()) is again


HUGGING_FACE = """
    import sys
    import torch
    from pathlib import Path
    from map_bo.problems.merged.hf import hf_problem
    from map_bo.rng import make_generator

    folder = Path(sys.argv[1])
    decoders = hf_problem(
        base=str(folder / "base"),
        experts={name: str(folder / name) for name in ("cats", "dogs")},
        tasks={
            name: {"kind": "perplexity", "data": str(folder / f"{name}.txt")}
            for name in ("cats", "dogs")
        },
    )
    classifiers = hf_problem(
        base=str(folder / "bert"),
        experts={name: str(folder / name) for name in ("film", "topic")},
        tasks={
            name: {"kind": "text_classification", "data": str(folder / f"{name}.jsonl")}
            for name in ("film", "topic")
        },
    )
    for problem in (decoders, classifiers):
        seen = problem.evaluate(
            torch.tensor([[0.3, 0.4]], dtype=torch.float64), generator=make_generator(0)
        )
        assert seen.failures == (None,), seen.failures
        print(seen.recalled.tolist(), seen.Y.tolist())
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_another_process_recalls_models_of_transformers_wherever_they_lie(
    tmp_path: Path,
) -> None:
    pytest.importorskip("transformers")
    from tests.integration.hf_models import write_classifiers, write_decoders

    write_decoders(tmp_path / "here")
    write_classifiers(tmp_path / "here")

    def seen(folder: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(HUGGING_FACE), str(tmp_path / folder)],
            env={**os.environ, EVALUATIONS_VARIABLE: str(tmp_path / "kept.sqlite")},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    first = seen("here")
    assert [line.startswith("[[False, False]]") for line in first] == [True, True]
    (tmp_path / "here").rename(tmp_path / "there")
    second = seen("there")
    assert second == [line.replace("False, False", "True, True") for line in first]
