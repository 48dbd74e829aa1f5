"""Methods of mergekit that take the experts as they are, and those on the sphere, in its terms.

Most of them have no weights there, so that a merge can be said only where the coefficients are
those that mergekit implies.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["METHODS", "NotExpressible", "Terms", "terms_of"]

_ONE = 1e-6  # how far coefficients may be from what they must be
_SMALL = 1e-6  # a distance below which mergekit's nearswap takes this one

_RIGHT_ANGLE = "Where one of two lines is zero mergekit turns by a right angle; map_bo averages."
_OBTUSE = (
    "Where the mean angle between experts is above a right one mergekit goes away from them; "
    "map_bo keeps the base."
)
_SHORT = (
    "Where the norms of two task vectors have a product below 1e-6 mergekit takes them for nearer "
    "to a right angle than they are."
)
_EQUAL = (
    "Of tensors whose mean squares of task vectors sum to less than 1e-6 mergekit gives the "
    "experts equal shares, which is so for many fine-tuned models; compare what it writes."
)
_EXACT = "mergekit keeps exactly its share; map_bo all numbers that equal the threshold."
_SKETCHED = "The share was searched: map_bo kept it to within the error of a sketch."


class NotExpressible(Exception):
    """Why a merge cannot be written as a mergekit configuration."""


class Terms(NamedTuple):
    """What a merge is called there.

    Attributes:
        method: mergekit's ``merge_method``.
        parameters: Parameters of all models.
        notes: Where its definition may give another number; sentences.
        weighted: Whether the coefficients are the models' weights; else they have none.
        base: Whether it has a base model.
        experts: The experts that take part; all where it is None.
    """

    method: str
    parameters: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    weighted: bool = False
    base: bool = True
    experts: tuple[str, ...] | None = None


class Said(NamedTuple):
    """A merge to be said.

    Attributes:
        settings: The operator's settings.
        searched: Those that were searched.
        experts: Names of the ``N`` experts.
        table: Tensor name -> coefficients of the experts.
        shapes: Tensor name -> shape.
    """

    settings: Mapping[str, Any]
    searched: Collection[str]
    experts: tuple[str, ...]
    table: Mapping[str, tuple[float, ...]]
    shapes: Mapping[str, Sequence[int]]


def terms_of(name: str, said: Said) -> Terms:
    """Return a merge in the terms of mergekit 0.1.5.

    Args:
        name: The operator's, one of `METHODS`.
        said: The merge.

    Raises:
        NotExpressible: When mergekit's method cannot give it.
    """
    return METHODS[name](said)


def _require_shares(said: Said) -> None:
    far = [sum(c) for c in said.table.values() if abs(sum(c) - 1) > _ONE]
    if far:
        raise NotExpressible(
            f"the coefficients sum to {far[0]:g}, and mergekit's spherical merges do not go a part "
            "of the way from the base"
        )


def _require_all(said: Said, value: float, method: str) -> None:
    wrong = [x for c in said.table.values() for x in c if abs(x - value) > _ONE]
    if wrong:
        raise NotExpressible(
            f"mergekit's {method} has no weights: it is the merge with all coefficients {value:g}, "
            f"and there is {wrong[0]:g}"
        )


def _require_matrices(said: Said) -> None:
    wide = [name for name, shape in said.shapes.items() if len(shape) > 3]
    if wide:
        raise NotExpressible(
            f"mergekit's rows are along the last dimension, also of tensors such as {wide[0]!r}, "
            "whose rows make one output in map_bo"
        )


def _multislerp(said: Said) -> Terms:
    _require_shares(said)
    base = said.settings["of"] == "deltas"
    return Terms("multislerp", {"normalize_weights": True}, weighted=True, base=base)


def _nuslerp(said: Said) -> Terms:
    _require_shares(said)
    along = said.settings["along"]
    if len(said.experts) != 2:
        raise NotExpressible(f"mergekit's nuslerp is of two models, not {len(said.experts)}")
    if along == "row":
        _require_matrices(said)
    parameters = {"nuslerp_flatten": along == "tensor", "nuslerp_row_wise": along == "column"}
    base = said.settings["of"] == "deltas"
    return Terms("nuslerp", parameters, (_RIGHT_ANGLE,), weighted=True, base=base)


def _nearswap(said: Said) -> Terms:
    moving = [
        expert
        for i, expert in enumerate(said.experts)
        if any(abs(c[i]) > _ONE for c in said.table.values())
    ]
    if len(moving) != 1:
        raise NotExpressible(f"mergekit's nearswap is of one expert, and {len(moving)} move here")
    at = said.experts.index(moving[0])
    one = said._replace(table={name: (c[at],) for name, c in said.table.items()})
    _require_all(one, 1.0, "nearswap")
    strength = float(said.settings["strength"])
    if said.settings["unit"] != "absolute":
        raise NotExpressible(
            "the strength is in units of each tensor's task vector, and mergekit's in those of the "
            "weights (unit=absolute)"
        )
    if strength < _SMALL:
        raise NotExpressible(f"mergekit's nearswap takes strengths from {_SMALL:g} exactly")
    return Terms("nearswap", {"t": strength}, experts=(moving[0],))


def _model_stock(said: Said) -> Terms:
    if len(said.experts) < 2:
        raise NotExpressible("mergekit's model_stock is of two experts or more")
    _require_all(said, 1 / len(said.experts), "model_stock")
    by_row = said.settings["each"] == "row"
    if by_row:
        _require_matrices(said)
    return Terms("model_stock", {"filter_wise": by_row}, (_OBTUSE, _SHORT))


def _sce(said: Said) -> Terms:
    _require_all(said, 1.0, "sce")
    density = float(said.settings["density"])
    sizes = {name: _count(shape) for name, shape in said.shapes.items()}
    if density < 1:
        none = [name for name, n in sizes.items() if n and int(density * n) == 0]
        if none and density > 0:
            raise NotExpressible(
                f"mergekit keeps nothing of small tensors such as {none[0]!r} at this density"
            )
    notes = (_EQUAL, *((_EXACT,) if density < 1 else ()))
    notes = (*notes, _SKETCHED) if "density" in said.searched else notes
    return Terms("sce", {"select_topk": density}, notes)


def _ram(said: Said) -> Terms:
    rescale, settings = float(said.settings["rescale"]), said.settings
    _require_all(said, 1.0, "ram")
    epsilon = {"epsilon": float(settings["threshold"])}
    if rescale == 0 or float(settings["most"]) == 0:
        return Terms("ram", epsilon)
    if settings["over"] != "tensor" and len(said.table) > 1:
        raise NotExpressible(
            "mergekit counts shared and unique numbers in each tensor (over=tensor), not in the "
            "whole task vector"
        )
    return Terms("ramplus_tl", {"r": rescale, "alpha": float(settings["most"]), **epsilon})


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


METHODS: Mapping[str, Callable[[Said], Terms]] = {
    "multislerp": _multislerp,
    "nuslerp": _nuslerp,
    "nearswap": _nearswap,
    "model_stock": _model_stock,
    "sce": _sce,
    "ram": _ram,
}
