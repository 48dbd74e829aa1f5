from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from map_bo.data import Metric
from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.kinds import code_in, evaluator_from
from map_bo.evaluators.loaders.torch_loader import TorchLoader
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from tests.contracts.example_evaluator_contract import ExampleEvaluatorContract


def examples(n: int = 11, width: int = 4) -> TensorDataset:
    generator = make_generator(0)
    return TensorDataset(torch.randn(n, width, generator=generator), torch.arange(n) % 3)


def loader(**settings: Any) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(examples(), batch_size=4, **settings)


def linear(width: int = 4, classes: int = 3) -> nn.Linear:
    layer = nn.Linear(width, classes)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(classes, width, generator=make_generator(1)))
        layer.bias.zero_()
    return layer


class Keyed(nn.Module):
    """A model that is called by keyword and returns its logits by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, *, pixels: Tensor, scale: Tensor) -> Any:
        class Output:
            logits = self.layer(pixels) * scale[:, None]

        return Output()


def margins(outputs: Tensor, targets: Tensor) -> Tensor:
    """Two outcomes per example."""
    return torch.stack([outputs.amax(-1), targets.double()], -1)


class TestAccuracy(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self) -> ExampleEvaluator:
        return TorchLoader(loader=loader(shuffle=True))

    @pytest.fixture
    def model(self) -> nn.Module:
        return linear()


class TestTwoOutcomesOfDictionaries(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self) -> ExampleEvaluator:
        x, y = examples().tensors
        batches = [
            {"pixels": x[i : i + 4], "scale": torch.ones(len(x[i : i + 4])), "labels": y[i : i + 4]}
            for i in range(0, 11, 4)
        ]
        return TorchLoader(
            loader=batches,
            outcome=lambda output, targets: margins(output.logits, targets),
            metrics=["level", {"name": "label", "kind": "unbounded"}],
        )

    @pytest.fixture
    def model(self) -> nn.Module:
        return Keyed()


class TestTorchmetrics(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self) -> ExampleEvaluator:
        torchmetrics = pytest.importorskip("torchmetrics", exc_type=ImportError)
        return TorchLoader(
            loader=loader(),
            outcome=torchmetrics.MetricCollection(
                {
                    "accuracy": torchmetrics.Accuracy(task="multiclass", num_classes=3),
                    "hamming": torchmetrics.HammingDistance(
                        task="multiclass", num_classes=3, average="micro"
                    ),
                }
            ),
        )

    @pytest.fixture
    def model(self) -> nn.Module:
        return linear()


def ready(model: nn.Module, **settings: Any) -> TorchLoader:
    made = TorchLoader(**{"loader": loader()} | settings)
    made.prepare(model)
    return made


def test_it_is_the_accuracy() -> None:
    model = linear()
    x, y = examples().tensors
    right = (model(x).argmax(-1) == y).double()
    found = ready(model)
    assert found.score(model, torch.arange(11)).tolist() == right.tolist()
    assert found(model) == {"accuracy": Measurement(float(right.mean()), count=11)}
    assert found.batch_size == 4


@pytest.mark.parametrize(
    "name", ["probability", "cross_entropy", "squared_error", "absolute_error"]
)
def test_outcomes_by_name(name: str) -> None:
    model = linear(classes=1 if "error" in name else 3)
    x, y = examples().tensors
    logits = model(x).detach()
    wanted = {
        "probability": lambda: logits.softmax(-1)[torch.arange(11), y],
        "cross_entropy": lambda: -logits.log_softmax(-1)[torch.arange(11), y],
        "squared_error": lambda: (logits[:, 0] - y) ** 2,
        "absolute_error": lambda: (logits[:, 0] - y).abs(),
    }[name]()
    found = ready(model, outcome=name).score(model, torch.arange(11))
    torch.testing.assert_close(found, wanted.double())


def test_entropy_needs_no_targets() -> None:
    model = linear()
    x, _ = examples().tensors
    chances = model(x).detach().double().softmax(-1)
    found = ready(model, loader=[x[:6], x[6:]], outcome="entropy").score(model, torch.arange(11))
    torch.testing.assert_close(found, -(chances * chances.log()).sum(-1), rtol=1e-5, atol=1e-6)


def test_a_broken_model_is_not_simply_wrong() -> None:
    model = linear()
    made = ready(model)
    with torch.no_grad():
        model.weight[0, 0] = torch.nan
    with pytest.raises(EvaluationError, match="outcomes of 4 of 4 examples are NaN"):
        made(model)


def test_a_metric_that_is_no_mean_keeps_its_value() -> None:
    torchmetrics = pytest.importorskip("torchmetrics", exc_type=ImportError)
    model = linear()
    x, y = examples().tensors
    found = ready(
        model,
        outcome=torchmetrics.classification.MulticlassF1Score,
        arguments={"num_classes": 3, "average": "macro"},
    )
    wanted = torchmetrics.F1Score(task="multiclass", num_classes=3, average="macro")(model(x), y)
    seen = found(model)["MulticlassF1Score"]
    assert seen.value == pytest.approx(float(wanted), abs=1e-6)
    assert seen.variance is not None
    assert seen.variance > 0


def test_predictions_are_made_as_told() -> None:
    torchmetrics = pytest.importorskip("torchmetrics", exc_type=ImportError)
    model = linear(classes=2)
    x, _ = examples().tensors
    batches = [(x, torch.arange(11) % 2)]
    found = ready(
        model,
        loader=batches,
        outcome=torchmetrics.AUROC(task="binary"),
        predictions=lambda output: output[:, 1] - output[:, 0],
    )
    logits = model(x).detach()
    wanted = torchmetrics.AUROC(task="binary")(logits[:, 1] - logits[:, 0], batches[0][1])
    assert found(model)["BinaryAUROC"].value == pytest.approx(float(wanted), abs=1e-6)


def test_a_prepared_one_can_be_sent_to_other_processes() -> None:
    model = linear()
    found = ready(model, loader=(batch for batch in loader()), limit=11)
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again.score(model, torch.arange(11)), found.score(model, torch.arange(11)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loader": 3}, "loader must be"),
        ({"loader": "tasks:loader"}, "loader must be"),
        ({"outcome": "acuracy"}, "no outcome 'acuracy'"),
        ({"outcome": 3}, "outcome must be"),
        ({"arguments": {"a": 1}}, "the outcome is no class"),
        ({"outcome": Metric, "arguments": {"title": 1}}, "Metric cannot be made"),
        ({"limit": 0}, "limit must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_settings_that_are_not_possible(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TorchLoader(**{"loader": loader()} | dict(settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loader": [torch.zeros(2, 4)]}, "no targets"),
        ({"loader": [(torch.zeros(2, 4), torch.tensor([0, 3]))]}, "go from 0 to 3.* 3 classes"),
        ({"outcome": lambda output, targets: output.mean()}, r"returned \(\) for 4 examples"),
        ({"outcome": lambda output, targets: None}, "returned NoneType"),
        ({"outcome": margins}, r"shape \(4, 2\)"),
        ({"outcome": "squared_error"}, "one target|the targets are"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        ready(linear(), **settings)


def test_it_measures_a_merged_model() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        layer = nn.Linear(4, 3)
        noise = make_generator(seed)
        return {k: torch.randn(v.shape, generator=noise) for k, v in layer.state_dict().items()}

    base = weights(0)
    experts = {
        name: {k: v + weights(i)[k] for k, v in base.items()} for i, name in enumerate("ab", 1)
    }
    problem = MergedModelProblem(
        nn.Linear(4, 3),
        base=base,
        experts=experts,
        evaluators={"task": TorchLoader(loader=loader(shuffle=True))},
        check_base=False,
    )
    seen = problem.evaluate(torch.tensor([[0.5, 0.25]]).double(), generator=make_generator(0))
    with problem.load(torch.tensor([0.5, 0.25]).double()) as model:
        x, y = examples().tensors
        wanted = float((model(x).argmax(-1) == y).double().mean())
    assert float(seen.Y) == pytest.approx(wanted)


def test_a_configuration_names_loader_and_outcome(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (
        "import torch",
        "def loader():",
        "    x = torch.arange(12.0).reshape(6, 2)",
        "    return torch.utils.data.DataLoader(list(zip(x, x.sum(-1))), batch_size=4)",
        "def gap(outputs, targets):",
        "    return (outputs.sum(-1) - targets).abs()",
    )
    (tmp_path / "task_of_a_loader.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {
        "kind": "torch",
        "loader": "task_of_a_loader:loader",
        "outcome": "task_of_a_loader:gap",
        "metrics": [{"name": "gap", "direction": "min", "kind": "loss"}],
        "limit": 5,
    }
    made = evaluator_from("problem.tasks.mine", settings)
    assert isinstance(made, TorchLoader)
    made.prepare(nn.Identity())
    assert made.size == 5
    assert made(nn.Identity())["gap"].value == 0
    assert made.metrics == (Metric("gap", "min", "loss"),)
    named = {path for path, _ in code_in("problem.tasks.mine", settings)}
    assert named == {"problem.tasks.mine.loader", "problem.tasks.mine.outcome"}


def test_a_configuration_names_a_metric_of_torchmetrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchmetrics", exc_type=ImportError)
    (tmp_path / "loader_for_torchmetrics.py").write_text(
        "import torch\ndef loader():\n    return [(torch.eye(3), torch.tensor([0, 1, 1]))]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {
        "kind": "torch",
        "loader": "loader_for_torchmetrics:loader",
        "outcome": "torchmetrics.classification:MulticlassAccuracy",
        "arguments": {"num_classes": 3, "average": "micro"},
    }
    made = evaluator_from("problem.tasks.mine", settings)
    assert isinstance(made, TorchLoader)
    made.prepare(nn.Identity())
    assert made(nn.Identity()) == {"MulticlassAccuracy": Measurement(2 / 3, count=3)}
