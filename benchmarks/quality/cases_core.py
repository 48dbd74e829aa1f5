"""What a case of the quality benchmark is: a problem, its truth, its scale, its direct search."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor

from map_bo.data import to_maximisation
from map_bo.errors import DataError
from map_bo.pareto.evolution import direct_search
from map_bo.problems.problem import Problem
from map_bo.rng import child, make_generator
from map_bo.scale import widths

__all__ = ["CACHE", "Case", "Scale", "anchored", "identity"]

CACHE = Path(".bench_cache")
POPULATION = 100
_SAVE_EVERY = 20.0  # seconds

Measure = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Scale:
    """How a case's metrics become gains; everything is turned to maximisation.

    Attributes:
        low: ``m`` values that get gain 0: the reference point of hypervolumes.
        high: ``m`` values that get gain 1.
        front: ``k x m`` values of a front that is known, or None.
    """

    low: Tensor
    high: Tensor
    front: Tensor | None = None


def anchored(problem: Problem, measure: Measure) -> Scale:
    """Return the scale of a problem with experts: worst of base and experts, best expert."""
    anchors = problem.space.anchors()
    values = to_maximisation(measure(anchors.X), problem.metrics)
    models = torch.tensor([kind != "blend" for kind in anchors.kinds])
    experts = torch.tensor([kind == "expert" for kind in anchors.kinds])
    return Scale(values[models].amin(0), values[experts].amax(0))


@dataclass(frozen=True, eq=False)
class Case:
    """A problem of the benchmark, with everything that methods are scored by.

    ``problem`` is what methods see, noise included. ``truth``, ``gains`` and ``direct`` are for
    scoring alone.

    Attributes:
        name: Such as ``"digits-mlp-4"``.
        family: ``"synthetic"``, ``"botorch"``, ``"digits"``, ``"noisy"``, ``"blocks"``,
            ``"images"`` or ``"plateau"``.
        problem: What methods see; coefficients in the unit cube.
        measure: The true metrics ``n x m``, own units, at coefficients ``n x d``.
        scale: Where gains are 0 and 1.
        real_models: Whether it merges trained models.
        about: Plain data by which the same case is recognised on any machine.
        widened: Makes the same problem in the box [-3, 3], where that means something.
    """

    name: str
    family: str
    problem: Problem
    measure: Measure
    scale: Scale
    real_models: bool
    about: Mapping[str, Any]
    widened: Callable[[], Problem] | None = field(default=None, repr=False)

    @property
    def low(self) -> Tensor:
        """``m`` values of the reference point, turned to maximisation.

        For real models the worst of base and experts. Otherwise, where the front is known, a
        tenth of its range below its worst value; else what botorch proposes for the function.
        """
        return self.scale.low

    @property
    def high(self) -> Tensor:
        """``m`` values that count as gain 1, turned to maximisation.

        For real models the best expert; otherwise the best value of each metric on its own.
        """
        return self.scale.high

    @property
    def known_front(self) -> Tensor | None:
        """Gains ``k x m`` of points of the true front where it is known, else None."""
        front = self.scale.front
        return None if front is None else self._scaled(front)

    @property
    def m(self) -> int:
        """Number of metrics."""
        return len(self.problem.metrics)

    @property
    def digest(self) -> str:
        """Sixteen letters that change with the case: problem, models, data, scale."""
        whole = {
            "name": self.name,
            "about": self.about,
            "low": self.low.tolist(),
            "high": self.high.tolist(),
        }
        return _digest(whole)

    def truth(self, X: Tensor) -> Tensor:
        """Return the real metrics without noise, ``n x m`` in own units, at ``X`` (``n x d``).

        Raises:
            DataError: When ``X`` has another shape.
        """
        X = torch.as_tensor(X, dtype=torch.float64)
        if X.dim() != 2 or X.shape[-1] != self.problem.space.d:
            raise DataError(
                f"{self.name} has {self.problem.space.d} coefficients; X is {tuple(X.shape)}",
                hint=f"give an n x {self.problem.space.d} tensor",
            )
        if len(X) == 0:
            return torch.zeros(0, self.m, dtype=torch.float64)
        return self.measure(X).double()

    def gains(self, Y: Tensor) -> Tensor:
        """Return metrics ``... x m`` in own units as gains: 0 at the reference, 1 at the best."""
        return self._scaled(to_maximisation(Y, self.problem.metrics))

    def wide(self) -> Problem | None:
        """Return the same problem in the box [-3, 3], for the method as published; or None."""
        return None if self.widened is None else self.widened()

    def direct(self, evaluations: int, seed: int) -> Tensor:
        """Return the gains of all evaluations of a direct NSGA-II search on the truth, in order.

        The search is kept under ``.bench_cache``, row by row as it goes: after a kill it goes on
        where it was, a longer search goes on from a shorter one, and processes that ask for the
        same wait for each other.

        Args:
            evaluations: Evaluations of the search, whose population is 100.
            seed: Seed of the search.

        Returns:
            ``n x m``; ``n`` is ``evaluations``, or less when the search breeds nothing new.
        """
        population = min(POPULATION, evaluations)
        key = _digest({"about": self.about, "population": population, "seed": seed})
        record = _Record(CACHE / "direct" / f"{self.name}-{key}.pt", self._maximised)
        with record.lock():
            _, Y = direct_search(
                record,
                self.problem.space,
                evaluations=evaluations,
                population=population,
                generator=child(make_generator(seed), "direct"),
            )
            record.save()
        return self._scaled(Y)

    def _scaled(self, Y: Tensor) -> Tensor:
        return (Y - self.low) / widths(self.low, self.high)

    def _maximised(self, X: Tensor) -> Tensor:
        return to_maximisation(self.truth(X), self.problem.metrics)


class _Record:
    """A function whose calls are kept in a file, and are answered from it when made again."""

    def __init__(self, path: Path, evaluate: Measure) -> None:
        self._path, self._evaluate = path, evaluate
        self._X: list[Tensor] = []
        self._Y: list[Tensor] = []
        self._old: tuple[Tensor, Tensor] | None = None
        self._at = 0
        self._saved = time.monotonic()
        self._new = False

    def lock(self) -> FileLock:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(self._path.with_suffix(".lock"))

    def __call__(self, X: Tensor) -> Tensor:
        if self._old is None:
            self._old = self._read(X.shape[-1])
        known_X, known_Y = self._old
        there = known_X[self._at : self._at + len(X)]
        known = len(there) if torch.equal(there, X[: len(there)]) else 0
        if known < len(there):  # another search than the one recorded: it counts for nothing
            self._old = known_X[:0], known_Y[:0]
        parts = [known_Y[self._at : self._at + known]] if known else []
        if known < len(X):
            parts.append(self._evaluate(X[known:]))
            self._new = True
        Y = torch.cat(parts)
        self._at += len(X)
        self._X.append(X)
        self._Y.append(Y)
        if time.monotonic() - self._saved > _SAVE_EVERY:
            self.save()
        return Y

    def save(self) -> None:
        """Write everything, unless the file holds it already."""
        self._saved = time.monotonic()
        if not self._new:
            return
        scratch = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}")
        torch.save({"X": torch.cat(self._X), "Y": torch.cat(self._Y)}, scratch)
        scratch.replace(self._path)
        self._new = False

    def _read(self, d: int) -> tuple[Tensor, Tensor]:
        try:
            kept = torch.load(self._path, weights_only=True)
        except Exception:  # missing or damaged: searched again
            return torch.zeros(0, d, dtype=torch.float64), torch.zeros(0, 1, dtype=torch.float64)
        return kept["X"], kept["Y"]


def identity(described: Any) -> Any:
    """Return a problem's description without the places of its files.

    Metrics are described in the words of the first measurements, which stay valid.
    """
    if isinstance(described, Mapping):
        kept = {k: identity(v) for k, v in described.items() if k not in ("source", "root")}
        return {"examples" if k == "resampling" else k: v for k, v in kept.items()}
    if isinstance(described, list | tuple):
        return [identity(value) for value in described]
    return described


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]
