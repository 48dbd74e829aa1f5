"""The floors: a module imports only from its own folder or from a floor below."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "map_bo"
FLOORS = [
    {"errors", "rng", "data", "space"},
    {"pareto", "merging", "surrogates", "tracking"},
    {"operators"},
    {"problems"},
    {"samplers", "report"},
    {"loop"},
    {"nested", "ax"},
    {"app"},
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """Return the map_bo modules a file imports, and whether at the top (not inside a function)."""
    tree = ast.parse(path.read_text())
    deferred = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found += [(name, node not in deferred) for name in names if name.startswith("map_bo.")]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return  # the lazy public face names everything
    for name, _ in imports(path):
        there = name.split(".")[1]
        assert there in LEVEL, f"{there} has no floor"
        allowed = there == here or LEVEL[there] < LEVEL[here] or LEVEL[here] == LEVEL[there] == 0
        assert allowed, f"{path.relative_to(ROOT)} imports {name}, which is not below it"


def test_there_is_no_cycle() -> None:
    graph: dict[str, set[str]] = {}
    for path in MODULES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__":
            continue
        graph[".".join(parts)] = {name for name, top in imports(path) if top}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"cycle: {' -> '.join([*way, name])}"
        if name in done:
            return
        for other in graph.get(name, ()):
            visit(other, (*way, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_every_folder_has_a_floor_and_a_noun() -> None:
    rooms = {room(path) for path in MODULES} - {"__init__"}
    assert rooms <= set(LEVEL)
    empty = {"utils", "helpers", "common", "misc", "util"}
    assert not [path for path in MODULES if empty & set(path.with_suffix("").parts)]


def test_files_stay_readable() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("map_bo", "tests", "benchmarks", "experiments")
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > 420
    }
    assert not long


def test_the_wheel_lists_every_package_and_configuration_folder() -> None:
    listed = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    )
    code = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("__init__.py")}
    conf = {
        ".".join(("map_bo", *path.parent.relative_to(ROOT).parts))
        for path in (ROOT / "conf").rglob("*.yaml")
    }
    assert listed == code | conf
    assert not [
        p for p in (ROOT / "conf").rglob("*.yaml") if not (p.parent / "__init__.py").exists()
    ]


@pytest.mark.parametrize("module", ["map_bo", "map_bo.app.main", "map_bo.app.schema"])
def test_the_way_to_help_loads_nothing_heavy(module: str) -> None:
    heavy = {
        "ax",
        "cma",
        "torch",
        "botorch",
        "gpytorch",
        "hydra",
        "matplotlib",
        "pymoo",
        "sklearn",
        "rich",
        "wandb",
    }
    code = f"import sys, {module}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_public_face_is_complete() -> None:
    import map_bo

    for name in map_bo.__all__:
        assert getattr(map_bo, name) is not None
    assert dir(map_bo) == sorted(map_bo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        map_bo.nothing  # noqa: B018
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert map_bo.__version__ == version
