"""Fingerprints change with all that decides results, and with nothing else."""

from __future__ import annotations

import functools
import importlib
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from map_bo.errors import DataError
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.problems.fingerprint import fingerprint, library_version


@dataclass
class Settings:
    scale: float = 1.0
    names: list[str] = field(default_factory=list)


class Net(nn.Module):
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.settings = Settings()
        self.table = {"bias": 0.0}
        self.act: Callable[[Tensor], Tensor] = torch.tanh
        self.loose = torch.zeros(2)
        self.register_buffer("offset", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x)) * self.settings.scale + self.offset


def change_attribute(net: Net) -> None:
    net.settings.scale = 2.0


def change_list(net: Net) -> None:
    net.settings.names.append("a")


def change_table(net: Net) -> None:
    net.table["bias"] = -0.0


def change_function(net: Net) -> None:
    net.act = torch.sin


def change_loose(net: Net) -> None:
    net.loose[1] = 1e-30


def change_buffer(net: Net) -> None:
    net.offset[0] = 1


def change_module(net: Net) -> None:
    net.linear = nn.Linear(2, 2, bias=False)


def change_kind(net: Net) -> None:
    net.linear = nn.Bilinear(2, 2, 2)  # type: ignore[assignment]


def change_dtype(net: Net) -> None:
    net.half()


def add_hook(net: Net) -> None:
    net.register_forward_hook(lambda module, given, output: output * 2)


def change_option(net: Net) -> None:
    net.add_module("drop", nn.Dropout(0.5))


CHANGES = [
    *(change_attribute, change_list, change_table, change_function, change_loose, change_buffer),
    *(change_module, change_kind, change_dtype, add_hook, change_option),
]


@pytest.mark.parametrize("change", CHANGES)
def test_everything_on_a_module_counts(change: Callable[[Net], None]) -> None:
    net = Net()
    before = fingerprint(net, written=net.parameters())
    assert fingerprint(Net(), written=()) != before
    change(net)
    assert fingerprint(net, written=net.parameters()) != before


def test_weights_that_a_merge_writes_do_not_count_nor_modes() -> None:
    one, other = Net(), Net()
    other.linear.weight.data.add_(1)
    other.train(False)
    assert fingerprint(one, written=one.parameters()) == fingerprint(
        other, written=other.parameters()
    )
    assert fingerprint(one) != fingerprint(other)


def function_of(text: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {"__name__": "a_script"}
    exec(text, scope)
    found: Callable[..., Any] = scope["f"]
    return found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("def f(x): return x + 1", "def f(x): return x + 2"),
        ("def f(x): return x.sin()", "def f(x): return x.cos()"),
        ("def f(x, k=1): return k", "def f(x, k=2): return k"),
        ("def g(): return 1\ndef f(x): return g()", "def g(): return 2\ndef f(x): return g()"),
        ("K = 1\ndef f(x): return K", "K = 2\ndef f(x): return K"),
        (
            "def f(x):\n def g(): return 1\n return g",
            "def f(x):\n def g(): return 2\n return g",
        ),
        (
            "class A:\n def m(self): return 1\ndef f(x): return A().m()",
            "class A:\n def m(self): return 2\ndef f(x): return A().m()",
        ),
    ],
)
def test_code_of_ones_own_counts_with_what_it_calls(one: str, other: str) -> None:
    assert fingerprint(function_of(one)) == fingerprint(function_of(one))
    assert fingerprint(function_of(one)) != fingerprint(function_of(other))


def test_closures_and_partials_count() -> None:
    def scaled(by: float) -> Callable[[float], float]:
        return lambda x: x * by

    assert fingerprint(scaled(2)) == fingerprint(scaled(2))
    assert fingerprint(scaled(2)) != fingerprint(scaled(3))
    assert fingerprint(functools.partial(max, 1)) != fingerprint(functools.partial(max, 2))


def test_settings_count() -> None:
    assert fingerprint(TaskArithmetic()) == fingerprint(TaskArithmetic())
    assert fingerprint(TaskArithmetic()) != fingerprint(TaskArithmetic(blocks={"a": "x"}))
    assert fingerprint({1, 2, 3}) == fingerprint({3, 2, 1})
    assert fingerprint([1]) != fingerprint((1,))
    assert fingerprint(1) != fingerprint(1.0) != fingerprint(True)
    assert fingerprint(np.zeros(3)) != fingerprint(np.zeros(3, dtype=np.float32))
    assert fingerprint(["ab", "c"]) != fingerprint(["a", "bc"])


def test_what_holds_itself_has_one() -> None:
    node = types.SimpleNamespace(number=1)
    node.of = [node]
    assert fingerprint(node) == fingerprint(node)
    loop: list[Any] = [1]
    loop.append(loop)
    with pytest.raises(DataError, match="nested too deeply"):
        fingerprint(loop)
    net = nn.Sequential(nn.Linear(2, 2))
    net.parent = [net]  # type: ignore[assignment]
    assert fingerprint(net, written=net.parameters()) == fingerprint(net, written=net.parameters())


@pytest.mark.parametrize("value", [open, object(), iter([1])])
def test_what_cannot_be_told_has_none(value: Any, tmp_path: Path) -> None:
    net = Net()
    if value is open:
        with (tmp_path / "file").open("w") as file:
            net.file = file  # type: ignore[assignment]
            with pytest.raises(DataError, match=r"it.file is a _io.TextIOWrapper"):
                fingerprint(net)
        return
    with pytest.raises(DataError, match="whose content cannot be told"):
        fingerprint(value)


def test_libraries_count_by_version() -> None:
    assert library_version("torch.nn") == f"torch {torch.__version__}"
    assert library_version("json") is not None
    assert (library_version("map_bo.data") or "").startswith("map_bo ")
    assert library_version("tests.problems.test_fingerprint") is None
    assert library_version("__main__") is None
    assert library_version("there_is_no_such_module") is None


@pytest.mark.slow
def test_another_process_finds_the_same() -> None:
    code = (
        "from tests.problems.test_fingerprint import Net, Settings; import torch; "
        "from map_bo.problems.fingerprint import fingerprint; n = Net(); "
        "print(fingerprint(n, written=n.parameters()), fingerprint({'a', 'b', 'c'}))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    }
    net = Net()
    here = f"{fingerprint(net, written=net.parameters())} {fingerprint({'a', 'b', 'c'})}\n"
    assert found == {here}


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose modules can be imported, and are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("written_"):
            del sys.modules[name]
    library_version.cache_clear()


def write(folder: Path, name: str, text: str) -> None:
    """Write a module anew, as another process would find it."""
    (folder / f"{name}.py").write_text(text)
    for known in [one for one in sys.modules if one.startswith("written_")]:
        del sys.modules[known]
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    importlib.invalidate_caches()
    library_version.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        "import written_outer\ndef f(x): return written_outer.grade(x)",
        "def f(x):\n from written_outer import grade\n return grade(x)",
        "import written_inner as w\ndef f(x): return w.norm(x)",
    ],
)
def test_modules_behind_modules_count(written: Path, text: str) -> None:
    def found(inner: str) -> str:
        write(written, "written_inner", inner)
        write(written, "written_outer", "from written_inner import norm\ngrade = norm\n")
        importlib.import_module("written_outer")
        return fingerprint(function_of(text))

    assert found("def norm(x): return x") == found("def norm(x): return x")
    assert found("def norm(x): return x") != found("def norm(x): return -x")


def test_a_file_that_is_edited_after_its_import_is_not_what_runs(written: Path) -> None:
    write(written, "written_inner", "def norm(x): return x")
    function = function_of("import written_inner\ndef f(x): return written_inner.norm(x)")
    before = fingerprint(function)
    (written / "written_inner.py").write_text("def norm(x): return -x")
    assert fingerprint(function) == before
    importlib.invalidate_caches()
    importlib.reload(sys.modules["written_inner"])
    assert fingerprint(function) != before


def test_imports_of_a_function_that_cannot_be_told_have_none(written: Path) -> None:
    write(written, "written_inner", "def norm(x): return x")
    function = function_of("def f(x):\n import written_inner\n return written_inner.norm(x)")
    with pytest.raises(DataError, match="imports written_inner, which nothing else has imported"):
        fingerprint(function)
    absent = function_of("def f(x):\n try:\n  import written_nowhere\n except ImportError: pass")
    assert fingerprint(absent)


def test_attributes_of_functions_count() -> None:
    one, other = (function_of("def f(x): return f.least") for _ in range(2))
    vars(one)["least"], vars(other)["least"] = 0.5, 0.6
    assert fingerprint(one) != fingerprint(other)
