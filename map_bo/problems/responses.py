"""Examples whose outcomes follow an item-response model of known truth."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Metric
from map_bo.errors import DataError
from map_bo.examples.sets import ExampleSet
from map_bo.problems.outcome_table import OutcomeProblem
from map_bo.problems.synthetic import ConcaveQuadratics
from map_bo.rng import child, make_generator
from map_bo.space import CoefficientSpace
from map_bo.values import real_number, whole_number

__all__ = ["LogisticItems"]

_WAVES = 32  # random features of what is an example's own response to the coefficients


@dataclass(frozen=True)
class LogisticItems(OutcomeProblem):
    r"""Examples that are right or wrong by a logistic item-response model (Rasch, 1960).

    Example ``j`` of task ``t`` is right at ``c`` with probability ``sigmoid(ability_t(c) - b_j)``:
    ``b_j`` is its difficulty, and ``ability_t(c) = level - effect (c - c_t)' A_t (c - c_t)`` that
    of the merge, highest at a point ``c_t`` of the task's own.

    Whether it is right is not drawn at each evaluation, as it is not for a real model: it is right
    where ``logit(Phi(z_j(c)))`` is below ``ability_t(c) - b_j``. Here ``z_j = sqrt(common) e_j +
    sqrt(1 - common) g_j(c)``, with the example's own ``e_j ~ N(0, 1)`` and a random function
    ``g_j`` of the coefficients of variance 1 (random Fourier features; Rahimi and Recht, 2007). So
    the probability is exact over examples, the same point has the same outcomes every time, and
    near points have nearly the same ones.

    Attributes:
        d: Number of coefficients.
        m: Number of tasks.
        size: Number of examples of each.
        seed: Seed of tasks and examples.
        level: Highest ability of each task, in logits.
        effect: How much ability is lost per squared distance; with 0 no merge is better than
            another but by the examples at hand.
        spread: Standard deviation of the difficulties, in logits.
        common: Share of an example's variance that all merges have in common; with 1 outcomes
            differ by ability alone.
        smoothness: Distance in coefficients over which the rest of it changes.

    Raises:
        DataError: When one of the settings is not possible.
    """

    d: int = 3
    m: int = 2
    size: int = 400
    seed: int = 0
    level: float = 1.5
    effect: float = 3.0
    spread: float = 1.5
    common: float = 0.5
    smoothness: float = 0.5

    def __post_init__(self) -> None:
        ConcaveQuadratics(self.d, self.m, self.seed)  # which checks these
        whole_number("size", self.size, least=1, most=1_000_000, error=DataError)
        real_number("level", self.level, error=DataError)
        real_number("effect", self.effect, least=0, error=DataError)
        real_number("spread", self.spread, least=0, error=DataError)
        real_number("common", self.common, least=0, most=1, error=DataError)
        real_number("smoothness", self.smoothness, above=0, error=DataError)

    @cached_property
    def curvatures(self) -> Tensor:
        """The matrices ``A_t``, ``m x d x d``: those of :class:`ConcaveQuadratics`."""
        return ConcaveQuadratics(self.d, self.m, self.seed).curvatures

    @cached_property
    def centres(self) -> Tensor:
        """The best point of each task, ``m x d``, in ``[.2, .8]^d``."""
        source = child(make_generator(self.seed), "logistic items", "centres")
        return 0.2 + 0.6 * torch.rand(self.m, self.d, generator=source, dtype=torch.float64)

    @property
    def space(self) -> CoefficientSpace:
        """The unit cube."""
        return CoefficientSpace.box(tuple(f"c{i + 1}" for i in range(self.d)))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """``f1 .. fm``, the shares of examples that are right."""
        return tuple(Metric(f"f{i + 1}", resampling="same") for i in range(self.m))

    @cached_property
    def example_sets(self) -> Mapping[str, ExampleSet]:
        """The examples of each task."""
        digest = f"{self.describe()}"
        return {
            metric.name: ExampleSet((metric.name,), self.size, f"{metric.name} of {digest}")
            for metric in self.metrics
        }

    @cached_property
    def difficulties(self) -> Tensor:
        """The difficulty of each example, ``m x size``, in logits."""
        return self.spread * self._normal("difficulties", self.m, self.size)

    def abilities(self, X: Tensor) -> Tensor:
        """Return the ability of merges at ``X`` (``n x d``) in each task, ``n x m``, in logits."""
        gap = torch.as_tensor(X, dtype=torch.float64).unsqueeze(-2) - self.centres
        return self.level - self.effect * torch.einsum("nmi,mij,nmj->nm", gap, self.curvatures, gap)

    def expected(self, X: Tensor) -> Tensor:
        """Return the expected share of right answers to these examples, ``n x m``.

        It is what the metrics are for other examples of the same difficulties; :meth:`true_values`
        is what they are for these.
        """
        right: Tensor = torch.sigmoid(self.abilities(X).unsqueeze(-1) - self.difficulties)
        return right.mean(-1)

    def outcomes_at(self, X: Tensor, task: str) -> Tensor:
        """Return 1 for each example of a task that is right, else 0, ``n x size``."""
        t = [metric.name for metric in self.metrics].index(task)
        X = torch.as_tensor(X, dtype=torch.float64)
        z = math.sqrt(self.common) * self._normal(f"common {t}", self.size)
        if self.common < 1:
            z = z + math.sqrt(1 - self.common) * self._own(X, t)
        threshold: Tensor = torch.special.log_ndtr(z) - torch.special.log_ndtr(-z)
        advantage = self.abilities(X)[:, t].unsqueeze(-1) - self.difficulties[t]
        return (threshold < advantage).double()

    def describe(self) -> dict[str, Any]:
        """Return plain data by which the same problem is recognised."""
        return {"kind": "logistic_items", **asdict(self)}

    def _own(self, X: Tensor, t: int) -> Tensor:
        """Return each example's own response to the coefficients, ``n x size``, variance 1."""
        frequencies = self._normal(f"frequencies {t}", self.d, _WAVES) / self.smoothness
        phases = (
            2
            * math.pi
            * torch.rand(
                _WAVES,
                generator=child(make_generator(self.seed), f"phases {t}"),
                dtype=torch.float64,
            )
        )
        waves = torch.cos(X @ frequencies + phases)
        waves = waves / waves.norm(dim=-1, keepdim=True)  # exactly 1, however few there are
        own: Tensor = waves @ self._normal(f"weights {t}", _WAVES, self.size)
        return own

    def _normal(self, name: str, *shape: int) -> Tensor:
        source = child(make_generator(self.seed), "logistic items", name)
        return torch.randn(*shape, generator=source, dtype=torch.float64)
