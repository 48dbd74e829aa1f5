"""Running one node of a tree: an ordinary run in the node's own small space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from map_bo.errors import EvaluationError, MapBoError
from map_bo.loop.progress import Progress
from map_bo.loop.result import Result
from map_bo.loop.run import Run
from map_bo.loop.settings import Settings
from map_bo.loop.stopping import Stop
from map_bo.nested.composition import Part, node_space, subspace
from map_bo.nested.ledger import Ledger
from map_bo.nested.node_problem import ChildMean, NodeProblem
from map_bo.nested.settings import Nested
from map_bo.nested.store import NodeStore
from map_bo.problems.problem import Problem
from map_bo.rng import child_seed, make_generator
from map_bo.samplers.posterior import FitsSurrogate
from map_bo.samplers.sampler import Sampler
from map_bo.space import CoefficientSpace
from map_bo.surrogates.informed import Informed
from map_bo.surrogates.surrogate import Surrogate

__all__ = ["Node", "handed_part", "informed", "node_settings", "run_node"]


@dataclass(frozen=True, eq=False)
class Node:
    """A node whose children have handed up.

    Attributes:
        key: Name of its run in the record.
        parts: What its children handed up.
        names: Metrics that it measures.
        space: Its space.
        directions: ``k x d``: what its coefficients are in the full space.
        is_root: Whether it is the root.
        whole: The problem of all experts, whose space is the full one.
        ledger: All that was measured of it.
        means: What the node looks at in place of its metrics.
    """

    key: str
    parts: tuple[Part, ...]
    names: tuple[str, ...]
    space: CoefficientSpace
    directions: Tensor
    is_root: bool
    whole: Problem
    ledger: Ledger
    means: ChildMean | None = None

    @classmethod
    def of(
        cls,
        key: str,
        parts: Sequence[Part],
        names: Sequence[str],
        whole: Problem,
        ledger: Ledger,
        *,
        is_root: bool,
        means: ChildMean | None = None,
    ) -> Node:
        """Return the node that merges ``parts``; one that merges all experts has the full space."""
        full = whole.space
        directions = torch.cat([part.rows for part in parts])
        columns = [i for part in parts if part.columns is not None for i in part.columns]
        entire = columns == list(range(full.d)) and len(directions) == full.d
        space = full if entire else node_space(parts, full)
        return cls(
            key, tuple(parts), tuple(names), space, directions, is_root, whole, ledger, means
        )

    @property
    def columns(self) -> Tensor:
        """``d`` booleans: which coefficients of the full space the node can make other than 0."""
        return self.directions.abs().sum(0) > 0

    def problem(self) -> NodeProblem:
        """Return what the node optimises."""
        return NodeProblem(
            self.whole, self.names, self.space, self.directions, self.ledger, self.means
        )

    def full(self, U: Tensor) -> Tensor:
        """Return what points (``n x k``) are in the full space (``n x d``)."""
        return self.whole.space.project(U @ self.directions)

    def same_as(self, other: Node) -> bool:
        """Return whether two nodes would do the same run."""
        parts = [part.names for part in self.parts], [part.names for part in other.parts]
        if parts[0] != parts[1] or self.names != other.names:
            return False
        alike = torch.allclose(self.directions, other.directions, rtol=0.0, atol=1e-9)
        if self.means is None or other.means is None:
            return alike and self.means is other.means
        return alike and torch.allclose(self.means.weights, other.means.weights)


def informed(surrogate: Surrogate, node: Node, before: int) -> Informed:
    """Return the surrogate that also knows what was measured below a node.

    Args:
        surrogate: What is fitted.
        node: The node.
        before: How many points had been measured when the node began. Its own are in its record.
    """
    columns = node.columns
    return Informed(
        surrogate,
        subspace(node.whole.space, columns),
        node.directions[:, columns],
        node.ledger.about(node.names, columns, before=before),
    )


def node_settings(
    settings: Settings, nested: Nested, node: Node, evaluations: int, *, verify: int | None
) -> Settings:
    """Return the settings of a node's own run.

    Args:
        settings: Those of the whole.
        nested: How experts are merged in stages.
        node: The node.
        evaluations: Points that it may look at.
        verify: Points of its front that are measured at the end, out of these.
    """
    seed = settings.seed
    if not node.is_root:
        seed = child_seed(make_generator(settings.seed), "node", node.key)
    stop = settings.stop
    least = node.space.d + 3
    if nested.budget_split == "adaptive" and not node.is_root:
        stop = Stop("regret", nested.tolerance, patience=1, least=least)
    search = evaluations - (min(8, evaluations // 10) if verify is None else verify)
    if stop is not None and max(stop.least or 0, least) >= search:
        stop = None
    reference = settings.reference
    if reference is not None:
        names = [] if node.means is not None else node.names
        reference = {name: reference[name] for name in names} or None
    return replace(
        settings,
        budget=evaluations,
        seed=seed,
        verify=verify,
        verify_extra=settings.verify_extra and node.is_root,
        reference=reference,
        stop=stop,
    )


def run_node(
    node: Node,
    settings: Settings,
    store: NodeStore,
    progress: Progress,
    *,
    surrogate: Surrogate | None = None,
    sampler: Sampler | None = None,
) -> Result:
    """Run a node to its end, or go on with it.

    Args:
        node: The node.
        settings: Those of :func:`node_settings`.
        store: Its record.
        progress: Shows it.
        surrogate: In place of that of the settings, in the sampler too.
        sampler: In place of that of the settings.

    Raises:
        EvaluationError: When too many evaluations failed.
        StoreError: When the record belongs to other settings, or cannot be written.
    """
    if sampler is None:
        sampler = settings.sampler
        if surrogate is not None and isinstance(sampler, FitsSurrogate):
            sampler = sampler.fitting(surrogate)
    chosen = replace(settings, sampler=sampler, surrogate=surrogate or settings.surrogate)
    try:
        return Run(node.problem(), chosen, store).drive(progress)
    except MapBoError as error:
        if node.key == "root" or not isinstance(error, EvaluationError):
            raise
        raise EvaluationError(f"node {node.key}: {error.message}", hint=error.hint) from error


def handed_part(label: str, rows: Tensor) -> Part:
    """Return merges of a node (``r x d``, full space) as the part that it hands up."""
    count = len(rows)
    names = (label,) if count == 1 else tuple(f"{label} #{i + 1}" for i in range(count))
    return Part(label, names, rows)
