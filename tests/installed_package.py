"""A package that somebody else wrote, installed without pip: a folder with its metadata."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["forget", "write_package"]

PACKAGE = """
import torch
from dataclasses import dataclass, field

from map_bo.pareto.gradient import GradientSolver
from map_bo.problems.synthetic import ConcaveQuadratics
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.surrogates.quadratic import Quadratic
from map_bo.operators.sparse import Ties


@dataclass(frozen=True)
class Halton:
    strength: int = 3
    names: tuple[str, ...] = ()
    weights: dict[str, float] = field(default_factory=dict)
    inner: Sobol = field(default_factory=Sobol)

    def propose(self, seen, space, n, *, pending=None, generator):
        return self.inner.propose(seen, space, n, pending=pending, generator=generator)


class Flat(Quadratic):
    pass


@dataclass(frozen=True)
class Register:
    size: int

    def open(self, directory):
        raise AssertionError


def problem(d=2, *, operator=None):
    made = ConcaveQuadratics(d=d, m=2)
    object.__setattr__(made, "seed", 0)
    return made


def score(model):
    return 0.25


class Scores:
    def __call__(self, model):
        return 0.75


number = 3
"""
POINTS = """
[map_bo.samplers]
halton = their_package.parts:Halton
sobol = their_package.parts:Halton
broken = their_package.gone:Halton
twice = their_package.parts:Halton
number = their_package.parts:number
[map_bo.surrogates]
flat = their_package:Flat
[map_bo.trackers]
theirs = their_package.parts:Register
[map_bo.problems]
theirs = their_package.parts:problem
[map_bo.evaluators]
quarter = their_package.parts:score
scores = their_package.parts:Scores
[map_bo.operators]
trimming = their_package.parts:Ties
[map_bo.solvers]
ascent = their_package.parts:GradientSolver
[other.group]
halton = their_package.parts:Other
"""


def write_package(folder: Path) -> Path:
    """Write the package, and metadata of another that shares a name with it; return the folder."""
    package = folder / "their_package"
    package.mkdir(parents=True)
    (package / "parts.py").write_text(PACKAGE)
    (package / "__init__.py").write_text("from their_package.parts import Flat\n")
    for name, points in (
        ("their-package", POINTS),
        ("another", "[map_bo.samplers]\ntwice = another:Sampler\n"),
    ):
        info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(points)
    return folder


def forget() -> None:
    """Let the package be imported anew."""
    for name in [name for name in sys.modules if name.split(".")[0] == "their_package"]:
        del sys.modules[name]
