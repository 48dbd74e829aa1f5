"""Evaluators that leave something behind: the row, later rows, the model and the process."""

from __future__ import annotations

import asyncio
import gc
import io
import locale
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import MapBoError
from map_bo.evaluators.evaluator import Measurement, mean_loss
from map_bo.loop.optimize import optimize
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from tests.evaluators.surroundings import surroundings

G = make_generator(0)
ROWS = torch.tensor([[0.5], [0.2]], dtype=torch.float64)
INPUTS = torch.linspace(-1, 1, 6).reshape(2, 3)

Evaluator = Callable[[Any], Any]


class Settings:
    """A plain object that a model holds, such as a configuration."""

    def __init__(self) -> None:
        self.scale = 1.0
        self.sizes = [3, 4]
        self.inner = types.SimpleNamespace(shift=0.0)


class Model(nn.Sequential):
    """Every kind of thing that a model may hold, all of it used in `forward`."""

    tied: Any
    offset: Tensor

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(3, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.LayerNorm(4), nn.Linear(4, 2)
        )
        self.tied = nn.Linear(3, 4)
        self.tied.weight = self.get_submodule("0").weight
        self.settings = Settings()
        self.table = {"bias": 0.0}
        self.chain: list[Any] = [torch.tanh]
        self.loose = torch.zeros(2)  # not registered
        self.array = np.zeros(2)
        self.source = torch.Generator().manual_seed(3)
        self.register_buffer("offset", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(list(self.children())[:5]):
            x = layer(x) if i else layer(x) + 0.1 * self.tied(x)
        for each in self.chain:
            x = each(x)
        x = self.settings.scale * x + self.settings.inner.shift + self.table["bias"]
        noise = torch.rand(2, generator=self.source)
        return x + self.loose + torch.from_numpy(self.array).float() + self.offset + 0.01 * noise


def build() -> Model:
    torch.manual_seed(0)  # noqa: TID251
    model = Model()
    model.get_buffer("2.running_var").fill_(0.7)
    return model.train()


BASE = build().state_dict()
EXPERTS = {
    "a": {name: v + 0.1 if v.is_floating_point() else v for name, v in BASE.items()},
}


def right(model: nn.Module) -> float:
    """Measure with what an evaluator may rely on: gradients, defaults, attributes, chance."""
    drawn = float(torch.rand(())) + random.random() + float(np.random.rand())  # noqa: NPY002
    output = model(INPUTS * torch.ones(1, 3)) + 0 * torch.zeros(2)
    loss = output.sigmoid().mean()
    (slope,) = torch.autograd.grad(loss, [next(iter(model.parameters()))], retain_graph=True)
    mode = sum(module.training for module in model.modules())
    return float(loss.detach()) + float(slope.sum()) + 0.01 * drawn + mode


def describe(model: nn.Module) -> dict[str, Any]:
    """Return all that must be as before."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert isinstance(model, Model)
    return {
        "class": [type(module) for module in model.modules()],
        "modules": [(name, id(m), m.training) for name, m in model.named_modules()],
        "plain": [
            {k: v for k, v in vars(m).items() if isinstance(v, int | float | str | tuple)}
            for m in model.modules()
        ],
        "keys": [list(vars(module)) for module in model.modules()],
        "sizes": [
            len(v) for m in model.modules() for k, v in vars(m).items() if "hooks" in k and v
        ],
        "tensors": [
            (name, id(t), t.data_ptr(), t.dtype, t.requires_grad, t.detach().numpy().tobytes())
            for name, t in tensors
        ],
        "extras": [(dict(vars(t)), t._backward_hooks or None, t.grad) for _, t in tensors],
        "settings": (model.settings.scale, model.settings.sizes, vars(model.settings.inner)),
        "held": (dict(model.table), list(model.chain), model.loose.tolist(), model.array.tolist()),
        "class attributes": [nn.Linear.forward, Model.forward, nn.functional.linear],
    }


KEPT: list[Any] = []  # what evaluators hold on to, so that nothing is undone by going away


FOLDERS: list[str] = []


def enter(context: Any) -> None:
    KEPT.append(context)
    context.__enter__()


def swap(model: Any) -> None:
    model._modules = dict(model._modules)
    model._modules["0"] = nn.Linear(3, 4)


def cast(model: Any) -> None:
    model.half()


def half_swapped(model: Any) -> None:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def parametrize(model: Any) -> None:
    nn.utils.parametrizations.weight_norm(model[4])


def prune(model: Any) -> None:
    from torch.nn.utils import prune

    prune.l1_unstructured(model[0], "weight", amount=0.5)  # type: ignore[no-untyped-call]


def backward(model: Any) -> None:
    model.train()
    torch.optim.SGD(model.parameters(), lr=1.0)
    model(INPUTS).sum().backward()
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    optimiser.step()


def other_class(model: Any) -> None:
    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 0

    model[4].__class__ = Other


def freed(model: Any) -> None:
    next(iter(model.parameters())).untyped_storage().resize_(0)


def attached(model: Any) -> None:
    model[2].running_mean.add_(model[4].weight.sum())


def untied(model: Any) -> None:
    model.tied.weight = nn.Parameter(torch.zeros(4, 3))


def tensor_hook(model: Any) -> None:
    weight = model[0].weight
    weight.register_hook(lambda gradient: gradient * 0)
    weight.register_post_accumulate_grad_hook(lambda tensor: None)
    weight.note = "mine"


def swapped_tensors(model: Any) -> None:
    other = nn.Parameter(torch.zeros(4, 3, device="meta"))
    torch.utils.swap_tensors(model[0].weight, other)  # type: ignore[no-untyped-call]


def patched_class(model: Any) -> None:
    nn.Linear.forward = lambda self, input: input * 0  # type: ignore[method-assign]


def patched_function(model: Any) -> None:
    nn.functional.linear = lambda input, weight, bias=None: input @ weight.T * 0


def assign(target: Callable[[Any], Any], name: str, value: Any) -> Evaluator:
    return lambda model: setattr(target(model), name, value)


MODEL: dict[str, Evaluator] = {
    "eps": assign(lambda m: m[2], "eps", 10.0),
    "momentum": assign(lambda m: m[2], "momentum", 1.0),
    "dropout": assign(lambda m: m[1], "p", 0.9),
    "eps of a layer norm": assign(lambda m: m[3], "eps", 5.0),
    "shape of a layer norm": assign(lambda m: m[3], "normalized_shape", (2, 2)),
    "deleted module": lambda m: m.__delitem__(2),
    "deleted by name": lambda m: delattr(m, "4"),
    "appended module": lambda m: m.append(nn.Linear(2, 2)),
    "identity": lambda m: m.__setitem__(2, nn.Identity()),
    "modules replaced": swap,
    "order of modules": lambda m: (
        m._modules.move_to_end("0")
        if hasattr(m._modules, "move_to_end")
        else m._modules.update({"0": m._modules.pop("0")})
    ),
    "attribute added": assign(lambda m: m, "extra", 1),
    "attribute deleted": lambda m: delattr(m, "settings"),
    "forward replaced": assign(lambda m: m, "forward", lambda x: x * 0),
    "forward hook": lambda m: m[0].register_forward_hook(lambda *a: a[-1] * 0),
    "pre-hook": lambda m: m.register_forward_pre_hook(lambda _, a: (a[0] * 0,)),
    "backward hook": lambda m: m[4].register_full_backward_hook(lambda m, i, o: None),
    "state dict hook": lambda m: m._register_state_dict_hook(lambda *a: None),
    "tensor hooks": tensor_hook,
    "frozen": lambda m: m.requires_grad_(False),
    "training": lambda m: m.train(),
    "training of one": lambda m: m[1].train(),
    "trained": backward,
    "half": cast,
    "double with swapped tensors": half_swapped,
    "to meta": lambda m: m.to("meta"),
    "to empty": lambda m: m.to_empty(device="cpu"),
    "tensors swapped": swapped_tensors,
    "weights zeroed": lambda m: [p.data.zero_() for p in m.parameters()],
    "weights loaded": lambda m: m.load_state_dict(
        {k: v * 0 for k, v in m.state_dict().items()}, assign=True
    ),
    "memory freed": freed,
    "buffer with a graph": attached,
    "buffer replaced": assign(lambda m: m, "offset", torch.ones(2)),
    "buffer removed": lambda m: delattr(m, "offset"),
    "buffer registered": lambda m: m.register_buffer("more", torch.ones(1)),
    "statistics removed": lambda m: m[2].__setattr__("running_mean", None),
    "parameter registered": lambda m: m.register_parameter("more", nn.Parameter(torch.ones(1))),
    "parameter replaced": assign(lambda m: m[4], "bias", nn.Parameter(torch.ones(2))),
    "parameter removed": assign(lambda m: m[4], "bias", None),
    "untied": untied,
    "parametrized": parametrize,
    "spectral norm": lambda m: nn.utils.spectral_norm(m[4]),
    "pruned": prune,
    "class changed": other_class,
    "class patched": patched_class,
    "function patched": patched_function,
    "setting": assign(lambda m: m.settings, "scale", 3.0),
    "list in a setting": lambda m: m.settings.sizes.append(5),
    "setting within": assign(lambda m: m.settings.inner, "shift", 3.0),
    "mapping": lambda m: m.table.update(bias=2.0),
    "list": lambda m: m.chain.append(torch.exp),
    "loose tensor": lambda m: m.loose.add_(1),
    "loose tensor's memory": lambda m: m.loose.data.mul_(0).add_(5),
    "array": lambda m: m.array.__iadd__(1),
    "generator of the model": lambda m: m.source.manual_seed(99),
}


def alarm(model: Any) -> None:
    signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.2)


def new_directory(model: Any) -> None:
    FOLDERS.append(tempfile.mkdtemp())
    os.chdir(FOLDERS[-1])


def gone_directory(model: Any) -> None:
    folder = tempfile.mkdtemp()
    os.chdir(folder)
    shutil.rmtree(folder)


def all_seeds(model: Any) -> None:
    torch.manual_seed(0)  # noqa: TID251
    np.random.seed(0)  # noqa: NPY002, TID251
    random.seed(0)


PROCESS: dict[str, Evaluator] = {
    "gradients off": lambda m: torch.set_grad_enabled(False),
    "no_grad entered": lambda m: enter(torch.no_grad()),
    "inference mode entered": lambda m: enter(torch.inference_mode()),
    "autocast entered": lambda m: enter(torch.autocast("cpu", torch.bfloat16)),
    "default dtype": lambda m: torch.set_default_dtype(torch.float64),  # noqa: TID251
    "default dtype bfloat16": lambda m: torch.set_default_dtype(torch.bfloat16),  # noqa: TID251
    "default device": lambda m: torch.set_default_device("meta"),
    "device entered": lambda m: enter(torch.device("meta")),
    "deterministic": lambda m: torch.use_deterministic_algorithms(True),
    "threads": lambda m: torch.set_num_threads(torch.get_num_threads() + 1),
    "matmul precision": lambda m: torch.set_float32_matmul_precision("medium"),
    "cudnn": lambda m: setattr(torch.backends.cudnn, "benchmark", True),
    "mkldnn": lambda m: setattr(torch.backends.mkldnn, "enabled", False),
    "anomaly": lambda m: torch.autograd.set_detect_anomaly(True),
    "denormal": lambda m: torch.set_flush_denormal(True),
    "hook of all modules": lambda m: nn.modules.module.register_module_forward_hook(
        lambda *a: a[-1] * 0
    ),
    "seeds": all_seeds,
    "numbers drawn": lambda m: (torch.rand(3), random.random(), np.random.rand()),  # noqa: NPY002
    "SIGALRM": alarm,
    "SIGINT": lambda m: signal.signal(signal.SIGINT, signal.SIG_IGN),
    "blocked signals": lambda m: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1}),
    "directory": new_directory,
    "directory that is gone": gone_directory,
    "environment": lambda m: os.environ.update(MAP_BO_ODD="1"),
    "environment emptied": lambda m: os.environ.clear(),
    "argv": lambda m: sys.argv.append("--odd"),
    "path": lambda m: sys.path.clear(),
    "path replaced": lambda m: setattr(sys, "path", []),
    "recursion": lambda m: sys.setrecursionlimit(sys.getrecursionlimit() + 500),
    "excepthook": lambda m: setattr(sys, "excepthook", print),
    "stdout": lambda m: setattr(sys, "stdout", io.StringIO()),
    "stderr": lambda m: setattr(sys, "stderr", None),
    "warnings": lambda m: warnings.simplefilter("error"),
    "warnings entered": lambda m: enter(warnings.catch_warnings()),
    "showwarning": lambda m: setattr(warnings, "showwarning", print),
    "logging disabled": lambda m: logging.disable(logging.CRITICAL),
    "root logger": lambda m: logging.basicConfig(level=logging.DEBUG, force=True),
    "logger": lambda m: logging.getLogger("map_bo").setLevel(logging.CRITICAL),
    "locale": lambda m: locale.setlocale(locale.LC_ALL, "C.UTF-8"),
    "numpy's errors": lambda m: np.seterr(all="raise"),
    "collection": lambda m: gc.disable(),
}


def stop(error: BaseException) -> Evaluator:
    def evaluate(model: Any) -> None:
        raise error

    return evaluate


STOPS: dict[str, tuple[Evaluator, str]] = {
    "sys.exit": (lambda m: sys.exit(), "SystemExit"),
    "sys.exit with 0": (lambda m: sys.exit(0), "SystemExit: 0"),
    "sys.exit with text": (lambda m: sys.exit("usage: eval"), "SystemExit: usage: eval"),
    "exit": (lambda m: exit(3), "SystemExit: 3"),
    "GeneratorExit": (stop(GeneratorExit()), "GeneratorExit"),
    "CancelledError": (stop(asyncio.CancelledError()), "CancelledError"),
    "BaseException": (stop(BaseException("odd")), "BaseException: odd"),
    "RecursionError": (lambda m: (f := lambda g: g(g))(f), "RecursionError"),
}


def acting(action: Evaluator) -> Evaluator:
    def evaluate(model: Any) -> float:
        action(model)
        return 0.5

    return evaluate


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    yield
    KEPT.clear()
    for folder in FOLDERS:
        shutil.rmtree(folder)
    FOLDERS.clear()


def evaluators(middle: Evaluator) -> dict[str, Evaluator]:
    return {"first": right, "odd": middle, "last": right}


def problem(model: nn.Module, middle: Evaluator) -> MergedModelProblem:
    return MergedModelProblem(
        model,
        base=BASE,
        experts=EXPERTS,
        evaluators=evaluators(middle),
        metrics=[Metric(name, kind="unbounded") for name in ("first", "odd", "last")],
    )


@pytest.fixture(scope="module")
def expected() -> Tensor:
    return problem(build(), lambda m: 0.5).evaluate(ROWS, generator=G).Y


ODD = {**MODEL, **PROCESS}


@pytest.mark.parametrize("name", ODD)
def test_what_an_evaluator_leaves_behind_reaches_nothing(name: str, expected: Tensor) -> None:
    model = build()
    tested = problem(model, acting(ODD[name]))
    tested.prepare()
    before, around = describe(model), surroundings()
    seen = tested.evaluate(ROWS, generator=G)
    assert surroundings() == around
    assert describe(model) == before
    assert seen.failures == (None, None)
    assert torch.equal(seen.Y, expected)
    assert torch.equal(tested.evaluate(ROWS[:1], generator=G).Y, expected[:1])  # once more


class Ready:
    """An evaluator that gets ready, and acts while it does."""

    def __init__(self, action: Evaluator) -> None:
        self.action = action
        self.drawn: list[float] = []

    def prepare(self, model: nn.Module) -> None:
        self.drawn.append(float(torch.rand(())) + random.random())
        self.action(model)

    def __call__(self, model: nn.Module) -> float:
        return 0.5


@pytest.mark.parametrize("name", ODD)
def test_what_preparing_leaves_behind_reaches_nothing(name: str, expected: Tensor) -> None:
    model, seen = build(), list[float]()
    odd, last = Ready(ODD[name]), Ready(lambda m: seen.append(right(m)))
    tested = problem(model, odd)
    plain = MergedModelProblem(model, base=BASE, experts=EXPERTS, evaluators={"last": last})
    plain.prepare()  # what `last` sees alone
    before, around = describe(model), surroundings()
    tested.prepare()
    assert surroundings() == around
    assert describe(model) == before
    both = {"odd": odd, "last": last}
    MergedModelProblem(model, base=BASE, experts=EXPERTS, evaluators=both).prepare()
    assert surroundings() == around
    assert describe(model) == before
    assert seen == [seen[0]] * 2
    assert odd.drawn == odd.drawn[:1] * 2  # what is drawn is the same in every run
    assert torch.equal(tested.evaluate(ROWS, generator=G).Y, expected)


def test_preparing_that_cannot_be_undone_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    home = os.getcwd()
    os.chdir(folder)
    try:
        with pytest.raises(MapBoError, match=r"'odd' cannot be used: .*the working directory"):
            problem(build(), Ready(lambda m: shutil.rmtree(folder))).prepare()
    finally:
        os.chdir(home)


@pytest.mark.parametrize("name", STOPS)
def test_what_an_evaluator_stops_with_is_a_failure(name: str) -> None:
    action, reason = STOPS[name]
    model = build()
    tested = problem(model, lambda m: (m.train(), action(m)))
    before, around = describe(model), surroundings()
    seen = tested.evaluate(ROWS, generator=G)
    assert surroundings() == around
    assert describe(model) == before
    for failure in seen.failures:
        assert failure is not None
        assert f"evaluator 'odd' raised {reason}" in failure


@pytest.mark.parametrize("name", ["gradients off", "default device", "eps", "directory"])
def test_what_a_failing_evaluator_leaves_behind_reaches_nothing(name: str) -> None:
    model = build()

    def failing(m: Any) -> float:
        ODD[name](m)
        raise ValueError("odd")

    tested = problem(model, failing)
    before, around = describe(model), surroundings()
    seen = tested.evaluate(ROWS, generator=G)
    assert all("ValueError: odd" in str(failure) for failure in seen.failures)
    assert surroundings() == around
    assert describe(model) == before


class OddLoss:
    """A loss with gradients that leaves something behind."""

    def __init__(self, action: Evaluator) -> None:
        self.action = action
        self.loss = mean_loss(INPUTS, torch.tensor([0, 1]), batch_size=1)

    def __call__(self, model: nn.Module) -> Measurement:
        return self.loss(model)

    def examples(self, model: nn.Module) -> Iterator[Tensor]:
        yield from self.loss.examples(model)
        self.action(model)

    def summary(self, values: Tensor) -> Measurement:
        return self.loss.summary(values)


@pytest.mark.parametrize(
    "name", ["gradients off", "default device", "seeds", "eps", "frozen", "forward hook", "loose"]
)
def test_what_a_gradient_evaluation_leaves_behind_reaches_nothing(name: str) -> None:
    def measure(action: Evaluator) -> tuple[Tensor, Tensor | None]:
        model = build()
        before, around = describe(model), surroundings()
        tested = MergedModelProblem(
            model,
            base=BASE,
            experts=EXPERTS,
            evaluators={"odd": OddLoss(action), "loss": mean_loss(INPUTS, torch.tensor([0, 1]))},
            metrics=[Metric(each, kind="loss", direction="min") for each in ("odd", "loss")],
            gradients=True,
        )
        seen = tested.evaluate(ROWS, generator=G)
        assert surroundings() == around
        assert describe(model) == before
        assert seen.gradients is not None
        return seen.Y[:, 1], seen.gradients[:, 1]

    action = ODD.get(name, assign(lambda m: m, "loose", torch.ones(2)))
    expected = measure(lambda m: None)
    found = measure(action)
    assert torch.equal(found[0], expected[0])
    assert found[1] is not None
    assert expected[1] is not None
    assert torch.equal(found[1], expected[1])


def test_changes_of_the_model_are_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="map_bo")
    problem(build(), acting(MODEL["eps"])).evaluate(ROWS[:1], generator=G)
    assert "evaluator 'odd' changed the model" in caplog.text
    assert "module 2: eps was 1e-05, is 10.0" in caplog.text


def test_what_cannot_be_put_back_is_a_failure(tmp_path: Path) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    home = os.getcwd()
    os.chdir(folder)
    try:
        tested = problem(build(), acting(lambda m: shutil.rmtree(folder)))
        (reason,) = tested.evaluate(ROWS[:1], generator=G).failures
    finally:
        os.chdir(home)
    assert reason is not None
    assert "evaluator 'odd' left behind what cannot be undone: the working directory" in reason


def test_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def odd(model: Any) -> float:
        for name in ("eps", "modules replaced", "gradients off", "default device", "directory"):
            ODD[name](model)
        return 0.5

    result = optimize(
        problem(build(), odd), 8, run_dir="relative", progress=False, tracking="none", verify=1
    )
    assert result.seen.failures == (None,) * 7
    assert (tmp_path / "relative" / "events.jsonl").exists()


def test_a_run_of_nothing_but_exits_says_so() -> None:
    with pytest.raises(MapBoError, match="SystemExit"):
        optimize(problem(build(), STOPS["sys.exit"][0]), 8, progress=False, tracking="none")
