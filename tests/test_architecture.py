"""The floors: a module imports only from its own folder or from a floor below."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "map_bo"
FLOORS = [
    {
        "errors",
        "values",
        "rng",
        "data",
        "observed",
        "examples",
        "choice",
        "space",
        "scale",
        "ordering",
        "constraints",
        "plain",
        "moved",
        "extensions",
        "foreign",
        "cached",
    },
    {"pareto", "merging", "surrogates", "tracking"},
    {"operators", "samplers", "evaluators", "report"},
    {"problems"},
    {"workers"},
    {"loop"},
    {"nested", "ax"},
    {"app"},
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
INSIDE = {  # rooms within a room, the lowest first; "" is what stands in the room itself
    "merging": ("checkpoints", "adapters", "align", "vectors", "export"),
    "problems": ("", "merged", "zoo"),
    "report": ("", "run", "comparison", "wandb"),
}
ELSEWHERE = {  # modules without a test file of their own -> what tests them
    "app.ax_commands": "integration/test_ax_commands.py",
    "app.build": "integration/test_command_line.py",
    "app.callbacks": "integration/test_sweeps.py",
    "app.comparison": "integration/test_sweeps.py",
    "app.main": "integration/test_command_line.py",
    "app.merge": "integration/test_merging.py",
    "app.schema": "app/test_configuration.py",
    "app.task": "integration/test_command_line.py",
    "loop.optimize": "loop/test_run.py",
    "samplers.posterior.driven": "contracts/sampler_contract.py",
    "tracking.store": "contracts/store_contract.py",  # a protocol
}
MOST_MODULES = 15
MOST_LINES = 600
MODULES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path) for path in MODULES}


def imports(path: Path) -> set[str]:
    """Return the modules of map_bo that a file imports: anywhere in it, for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in NAMES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("map_bo.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_only(path: Path) -> None:
    here = room(path)
    if here == "__init__":
        return  # the lazy public face names everything
    for name in imports(path):
        there = name.split(".")[1]
        assert there in LEVEL, f"{there} has no floor"
        allowed = there == here or LEVEL[there] < LEVEL[here] or LEVEL[here] == LEVEL[there] == 0
        assert allowed, f"{path.relative_to(ROOT)} imports {name}, which is not below it"


@pytest.mark.parametrize("outer", INSIDE)
def test_imports_within_a_room_go_down_only(outer: str) -> None:
    order = INSIDE[outer]

    def level(name: str) -> int:
        inner = name.removeprefix(f"map_bo.{outer}").lstrip(".").partition(".")[0]
        return order.index(inner if inner in order else "")

    for path in sorted((PACKAGE / outer).rglob("*.py")):
        here = name_of(path)
        for name in imports(path):
            if here != f"map_bo.{outer}" and name.startswith(f"map_bo.{outer}."):
                assert level(name) <= level(here), f"{here} imports {name}, from a room above it"


def test_there_is_no_cycle() -> None:
    graph = {name_of(path): imports(path) for path in MODULES if room(path) != "__init__"}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"cycle: {' -> '.join([*way, name])}"
        if name in done:
            return
        for other in graph.get(name, set()) - {name}:
            visit(other, (*way, name))
        done.add(name)

    for name in graph:
        visit(name, ())


def test_rooms_are_small_enough_to_know() -> None:
    rooms = {path.parent for path in MODULES}
    sizes = {
        str(folder.relative_to(ROOT)): len([p for p in folder.glob("*.py") if p.stem != "__init__"])
        for folder in rooms
    }
    assert {name: size for name, size in sizes.items() if size > MOST_MODULES} == {}


def test_every_folder_has_a_floor_and_a_noun() -> None:
    rooms = {room(path) for path in MODULES} - {"__init__"}
    assert rooms <= set(LEVEL)
    empty = {"utils", "helpers", "common", "misc", "util"}
    assert not [path for path in MODULES if empty & set(path.with_suffix("").parts)]


def test_every_module_has_its_mirror_among_the_tests() -> None:
    tests = ROOT / "tests"
    lacking = {
        name_of(path).removeprefix("map_bo.")
        for path in MODULES
        if path.stem != "__init__"
        and not (tests / path.relative_to(PACKAGE)).with_name(f"test_{path.name}").exists()
    }
    assert lacking == set(ELSEWHERE)
    assert [where for where in ELSEWHERE.values() if not (tests / where).exists()] == []


def test_files_stay_readable() -> None:
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("map_bo", "tests", "benchmarks", "experiments")
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text().splitlines())) > MOST_LINES
    }
    assert not long


def test_the_wheel_finds_every_package_and_configuration_folder() -> None:
    found = set(find_packages(str(ROOT), include=["map_bo", "map_bo.*"]))
    assert found == {name_of(path) for path in PACKAGE.rglob("__init__.py")}
    assert {path.parent for path in PACKAGE.rglob("*.py")} == {
        path.parent for path in PACKAGE.rglob("__init__.py")
    }
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
