"""Cases whose merges are scored example by example: real merges, on the same held-out examples.

What is measured on some examples is what these merges get right on just these, so outcomes of
different merges on one example are as alike as they really are. The truth, by which answers are
scored, is the accuracy on all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from benchmarks.quality.cases import case as case_of
from benchmarks.quality.cases_core import Case
from benchmarks.quality.cases_images import image_networks, missing_images
from benchmarks.quality.cases_models import digits_networks
from benchmarks.quality.cases_text import SETS as TEXT_SETS
from benchmarks.quality.cases_text import missing_text, text_case
from benchmarks.quality.truth import MergedNetworks
from map_bo.data import Metric, Observations
from map_bo.errors import ConfigError, DataError
from map_bo.evaluators.evaluator import binomial_variance
from map_bo.examples.sets import ExampleOutcomes, ExampleSet
from map_bo.problems.problem import Problem, description_of
from map_bo.problems.zoo.data import digits_split
from map_bo.problems.zoo.digits import DigitsZoo
from map_bo.problems.zoo.images import ImagesProblem
from map_bo.space import CoefficientSpace

__all__ = ["ByExample", "ItemCase", "item_case", "missing"]


class ByExample:
    """The accuracies of merged models, measured on any of their held-out examples.

    It has what :class:`map_bo.problems.problem.HasExamples` asks for.

    Args:
        full: The same problem, measured on all examples.
        networks: Its models, in the order of the metrics.
        labels: Evaluator -> ``E`` classes, by which its examples are stratified.
        wanted: Evaluator -> indices of the examples to score; None for all of every one.
    """

    def __init__(
        self,
        full: Problem,
        networks: MergedNetworks,
        labels: Mapping[str, Tensor],
        wanted: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.full, self.networks, self.labels = full, networks, dict(labels)
        everything = {name: torch.arange(len(own)) for name, own in self.labels.items()}
        self.wanted = everything if wanted is None else dict(wanted)

    @property
    def space(self) -> CoefficientSpace:
        """The coefficients."""
        return self.full.space

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics whose examples are scored."""
        return tuple(
            replace(metric, resampling="same")
            for metric in self.full.metrics
            if metric.name in self.wanted
        )

    @property
    def example_sets(self) -> Mapping[str, ExampleSet]:
        """The examples of each metric, under its name."""
        return {
            name: ExampleSet((name,), len(own), _digest(name, own), own)
            for name, own in self.labels.items()
        }

    def on_examples(self, wanted: Mapping[str, Tensor]) -> ByExample:
        """Return the problem that measures some metrics on some examples.

        Raises:
            DataError: When there is no such evaluator or example.
        """
        for name, items in wanted.items():
            size = len(self.labels.get(name, ()))
            if not size or bool(((items < 0) | (items >= size)).any()):
                raise DataError(
                    f"there are no such examples of {name!r}",
                    hint=f"the sizes are { {key: len(own) for key, own in self.labels.items()} }",
                )
        return ByExample(self.full, self.networks, self.labels, wanted)

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        """Measure every row of ``X`` (``n x d``); nothing is random.

        Raises:
            SpaceError: When a row lies outside the space.
        """
        X = self.space.check(X)
        names = [metric.name for metric in self.full.metrics]
        held = [name for name in names if name in self.wanted]
        right = self.networks.right(X)
        outcomes = {name: right[:, names.index(name)][:, self.wanted[name]] for name in held}
        return observed(X, self.metrics, outcomes, self.wanted, self.networks.examples)

    def describe(self) -> Mapping[str, Any]:
        """Return plain data by which the same problem is recognised."""
        return {"kind": "by example", "full": description_of(self.full)}


def observed(
    X: Tensor,
    metrics: Sequence[Metric],
    right: Mapping[str, Tensor],
    items: Mapping[str, Tensor],
    size: int,
) -> Observations:
    """Return the observations that outcomes make.

    Args:
        X: ``n x d`` coefficients.
        metrics: The ``m`` metrics.
        right: Metric -> ``n x k`` booleans.
        items: Metric -> the ``k`` examples that they belong to.
        size: How many examples each metric has in all.
    """
    Y = torch.stack([right[metric.name].double().mean(-1) for metric in metrics], -1)
    counts = torch.tensor([right[metric.name].shape[-1] for metric in metrics]).expand_as(Y)
    rows = zip(Y.tolist(), counts.tolist(), strict=True)
    variances = [[binomial_variance(*one) for one in zip(*row, strict=True)] for row in rows]
    return Observations(
        X,
        Y,
        tuple(metrics),
        Yvar=torch.tensor(variances, dtype=torch.float64).reshape(Y.shape),
        counts=counts.double(),
        examples=tuple(
            {
                metric.name: ExampleOutcomes(
                    items[metric.name], right[metric.name][i].double(), size, (True,)
                )
                for metric in metrics
            }
            for i in range(len(X))
        ),
    )


def _digest(name: str, labels: Tensor) -> str:
    return hashlib.sha256(name.encode() + labels.long().numpy().tobytes()).hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class ItemCase:
    """A case by example.

    Attributes:
        case: The case; its problem is measured by example.
        networks: Its models.
        problem: Its problem.
    """

    case: Case
    networks: MergedNetworks
    problem: ByExample

    @property
    def size(self) -> int:
        """Examples of each metric."""
        return self.networks.examples


def missing(name: str, *, root: str | Path | None = None) -> str | None:
    """Return why a case cannot be run here, or None when it can."""
    if name.startswith("images"):
        return missing_images(root)
    return missing_text(root) if name.startswith("text") else None


@cache
def item_case(name: str, *, epochs: int | None = None) -> ItemCase:
    """Return a case by example: ``digits-ARCH-N``, ``images-4``, ``text-4`` or another text case.

    Args:
        name: The case.
        epochs: Of the training of the digits experts; None for as many as in the study.

    Raises:
        ConfigError: When there is no such case.
    """
    family, *rest = name.split("-")
    if family == "digits" and len(rest) == 2:
        arch, experts = rest
        networks = digits_networks(DigitsZoo(int(experts), arch, epochs=epochs))
        _, _, _, targets = digits_split()
        labels = [torch.from_numpy(targets).long()] * int(experts)
        whole = case_of(name) if epochs is None else case_of(name, epochs=epochs)
    elif name == "images-4":
        whole = case_of(name)
        full = whole.problem
        assert isinstance(full, ImagesProblem)
        networks = image_networks(full)
        labels = [full.evaluator(one).labels for one in full.zoo.names]
    elif name in TEXT_SETS:
        whole, networks, examples = text_case(name)
        labels = [held.labels for held in examples]
    else:
        raise ConfigError(
            f"there is no case {name!r} by example",
            hint=f"cases are digits-ARCH-N, images-4, {', '.join(TEXT_SETS)}",
        )
    names = [metric.name for metric in whole.problem.metrics]
    problem = ByExample(whole.problem, networks, dict(zip(names, labels, strict=True)))
    return ItemCase(replace(whole, problem=problem, widened=None), networks, problem)
