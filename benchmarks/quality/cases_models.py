"""Cases that merge the digits zoo: all its sizes, few examples per evaluation, block by block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks.quality.cases_core import Case, anchored, identity
from benchmarks.quality.truth import Examples, MergedNetworks
from map_bo.data import Metric, Observations
from map_bo.errors import DataError
from map_bo.evaluators.evaluator import binomial_variance
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.problems.problem import Problem
from map_bo.problems.zoo.data import digits_split, transform
from map_bo.problems.zoo.digits import DigitsZoo, digits_problem
from map_bo.problems.zoo.training import as_inputs, network
from map_bo.rng import child, make_generator
from map_bo.space import CoefficientSpace

__all__ = ["BLOCKS", "DIGITS", "NOISY", "FewExamples", "digits_networks"]

FEW = 100

MLP_LAYERS = {"first": r"^0\.", "last": r"^2\."}
CNN_PARTS = {
    "conv1": r"^1\.",
    "norm1": r"^2\.",
    "conv2": r"^4\.",
    "norm2": r"^5\.",
    "weight": r"^8\.weight$",
    "bias": r"^8\.bias$",
}


class FewExamples:
    """The accuracy of merged models, each evaluation on a random few of the held-out examples.

    Every evaluation draws its own examples, for each metric apart and with replacement, from the
    generator that it is given. So the number that come out right is binomial around the accuracy
    on all of them, and that accuracy is the truth.

    Args:
        problem: The same problem measured on all examples.
        networks: Its models.
        count: Examples an evaluation and metric.

    Raises:
        DataError: When ``count`` is not positive.
    """

    def __init__(self, problem: Problem, networks: MergedNetworks, count: int = FEW) -> None:
        if count < 1:
            raise DataError(f"count must be positive, got {count}", hint="use at least one example")
        self.full, self.networks, self.count = problem, networks, count

    @property
    def space(self) -> CoefficientSpace:
        """The coefficients."""
        return self.full.space

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics, each measured on examples of its own every time."""
        return tuple(replace(metric, resampling="fresh") for metric in self.full.metrics)

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure every row of ``X`` (``n x d``) on examples of its own.

        Raises:
            SpaceError: When a row lies outside the space.
        """
        X = self.space.check(X)
        right = self.networks.right(X)
        drawn = torch.randint(
            self.networks.examples,
            (*right.shape[:2], self.count),
            generator=child(generator, "examples"),
        )
        Y = right.gather(-1, drawn).double().mean(-1)
        variances = [[binomial_variance(value, self.count) for value in row] for row in Y.tolist()]
        return Observations(
            X,
            Y,
            self.metrics,
            Yvar=torch.tensor(variances, dtype=torch.float64).reshape(Y.shape),
            counts=torch.full_like(Y, self.count),
        )

    def describe(self) -> dict[str, Any]:
        """Return plain data by which the same problem is recognised."""
        described: dict[str, Any] = self.full.describe()  # type: ignore[attr-defined]
        return {"kind": "few examples", "count": self.count, "full": described}


def digits_networks(zoo: DigitsZoo, operator: TaskArithmetic | None = None) -> MergedNetworks:
    """Return the models of a digits zoo with all 797 held-out images of each task."""
    files = zoo.checkpoints()
    _, _, images, targets = digits_split()
    labels = torch.from_numpy(targets)
    net = network(zoo.arch, generator=make_generator(0))
    metrics = [Examples(as_inputs(transform(name, images)), labels) for name in zoo.names]
    return MergedNetworks(net, files.base, dict(files.experts), metrics, operator)


def _digits(
    name: str,
    family: str,
    experts: int,
    arch: str,
    *,
    few: int | None = None,
    blocks: Mapping[str, str] | None = None,
    seed: int = 0,
    epochs: int | None = None,
) -> Case:
    operator = TaskArithmetic(blocks)
    networks = digits_networks(DigitsZoo(experts, arch, seed, epochs), operator)

    def build(lower: float = 0.0, upper: float = 1.0) -> Problem:
        problem = digits_problem(
            experts,
            arch=arch,
            seed=seed,
            epochs=epochs,
            operator=operator,
            lower=lower,
            upper=upper,
        )
        return problem if few is None else FewExamples(problem, networks, few)

    problem = build()
    scale = anchored(problem, networks.accuracy)
    about = identity(problem.describe())  # type: ignore[attr-defined]
    wide = partial(build, -3.0, 3.0)
    return Case(name, family, problem, networks.accuracy, scale, True, about, wide)


def _named(
    family: str, rows: Sequence[tuple[str, dict[str, Any]]]
) -> dict[str, Callable[..., Case]]:
    return {name: partial(_digits, family=family, **settings) for name, settings in rows}


DIGITS = _named(
    "digits",
    [
        (f"digits-{arch}-{n}", {"experts": n, "arch": arch})
        for arch in ("mlp", "cnn")
        for n in (2, 4, 8, 16)
    ],
)
"""Name -> what makes the case, given its name; options ``seed`` and ``epochs`` of training."""

NOISY = _named(
    "noisy",
    [
        (f"digits-{arch}-{n}-noisy", {"experts": n, "arch": arch, "few": FEW})
        for arch, n in (("mlp", 2), ("mlp", 4), ("mlp", 8), ("cnn", 4))
    ],
)
"""The same with 100 examples per evaluation; further option ``few``, their number."""

BLOCKS = _named(
    "blocks",
    [
        ("blocks-12", {"experts": 6, "arch": "mlp", "blocks": MLP_LAYERS}),
        ("blocks-24", {"experts": 4, "arch": "cnn", "blocks": CNN_PARTS}),
    ],
)
"""One coefficient per expert and part of the network: 6 x 2 and 4 x 6."""
