"""Which merges a node promotes to its parent: one per preference, or a few for its whole front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from map_bo.loop.result import Choice, Result
from map_bo.scale import Scale, farthest_rows
from map_bo.space import CoefficientSpace

__all__ = ["choose_merge", "representatives", "weights_of"]

_NOTHING = 1e-3  # a merge this near the base leaves nothing for the parent to scale
_ALIKE = 0.02  # merges nearer than this count as one


def weights_of(
    preference: Mapping[str, float], children: Mapping[str, Sequence[str]] | Sequence[str]
) -> dict[str, float]:
    """Return the weights of a node's metrics under a preference for all metrics.

    Args:
        preference: Weight by metric name; when empty, all weigh alike.
        children: The node's metrics; or, when it measures one number per child, label of the child
            -> names of its metrics, whose weights add up.

    Returns:
        The weights; all alike where the preference gives no weight to any metric of the node.
    """
    given = preference or {}
    if isinstance(children, Mapping):
        found = {
            label: sum(given.get(name, 0.0) if given else 1.0 for name in names)
            for label, names in children.items()
        }
    else:
        found = {name: given.get(name, 0.0) if given else 1.0 for name in children}
    return found if any(found.values()) else dict.fromkeys(found, 1.0)


def choose_merge(result: Result, weights: Mapping[str, float]) -> Choice:
    """Return the merge of a node's front that suits the weights and differs from the base."""
    choice = result.choose(dict(weights), keep_blend=False)  # what children give is searched on
    moving = torch.tensor(result.space.owner) >= 0
    if float(choice.x[moving].abs().max()) > _NOTHING:
        return choice
    sizes = result.front.X[:, moving].abs().amax(-1)
    rows = (sizes > _NOTHING).nonzero().flatten()
    if not len(rows):
        return choice
    values = result.scale.gains(result.front.mean[rows])
    weight = torch.tensor([weights[m.name] for m in result.metrics], dtype=torch.float64)
    return result.point(int(rows[int((values @ weight).argmax())]))


def representatives(result: Result, count: int, scale: Scale) -> Tensor:
    """Return up to ``count`` merges that represent a node's front, ``r x k``.

    The most balanced point comes first; then, again and again, the point whose metrics are farthest
    from those taken, on ``scale``. Points that hardly differ from the base, or
    from one taken, are passed over. At least one is returned, and at most one more than the node
    has coefficients: a balanced point and the ends of the front.
    """
    count = min(count, result.space.d + 1)
    front = result.front
    moving = torch.tensor(result.space.owner) >= 0
    order = farthest_rows(scale.gains(front.mean), 4 * count)
    taken: list[Tensor] = []
    for row in order:
        x = front.X[row]
        apart = all(float((x - other).abs().max()) > _ALIKE for other in taken)
        if float(x[moving].abs().max()) > _NOTHING and apart:
            taken.append(x)
        if len(taken) == count:
            break
    return torch.stack(taken) if taken else _something(result.space)


def _something(space: CoefficientSpace) -> Tensor:
    """Return a point (``1 x d``) that differs from the base, near the uniform blend if possible.

    Bounds or constraints may keep the blend itself out of the space.
    """
    blend = torch.full((1, space.d), 1.0 / len(space.experts), dtype=torch.float64)
    moving = torch.tensor(space.owner) >= 0
    blend[:, ~moving] = torch.tensor(space.defaults, dtype=torch.float64)
    X = space.project(torch.cat([blend, space.bounds.mean(0, keepdim=True), space.bounds]))
    return X[(X[:, moving].abs().amax(-1) > _NOTHING).int().argmax()].unsqueeze(0)
