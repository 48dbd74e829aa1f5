"""Whether the classes of the data are those of a head, and which row each of them is."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from map_bo.errors import EvaluationError, listed
from map_bo.evaluators.data import Examples

__all__ = ["Classes", "classes_of_model", "rows_of"]

logger = logging.getLogger(__name__)

_NO_NAME = re.compile(r"(LABEL_)?\d+")
_SHOWN = 20


@dataclass(frozen=True)
class Classes:
    """The classes that a head tells apart.

    Attributes:
        size: How many.
        names: What they are called, where that is known.
        whose: What has them, for errors.
    """

    size: int
    names: tuple[str, ...] | None
    whose: str


def classes_of_model(model: nn.Module, size: int) -> Classes:
    """Return the classes of a model's own head.

    Args:
        model: The model; the ``id2label`` of its configuration names the classes, unless the names
            are numbers alone (``LABEL_0``).
        size: The number of its outputs.
    """
    from transformers import PreTrainedModel

    whose = f"the head of {type(model).__name__}"
    given = model.config.id2label if isinstance(model, PreTrainedModel) else None
    if not isinstance(given, dict) or len(given) != size:
        return Classes(size, None, whose)
    names = {int(i): str(name) for i, name in given.items()}
    if sorted(names) != list(range(size)) or any(_NO_NAME.fullmatch(n) for n in names.values()):
        return Classes(size, None, whose)
    return Classes(size, tuple(names[i] for i in range(size)), whose)


def rows_of(examples: Examples, classes: Classes, *, explicit: bool) -> list[int]:
    """Return which output of a head each class of the data is.

    Where both have names they are matched by name, small and capital letters alike, so that their
    order may differ. Otherwise the indices must be the same.

    Args:
        examples: The examples, with labels.
        classes: The classes of the head.
        explicit: Whether the user gave a label map; its indices are those of the head where it has
            none of the head's names.

    Returns:
        The row of each class of the data, by its index.

    Raises:
        EvaluationError: When they do not fit.
    """
    own, there = examples.label_names, classes.names
    found = examples.classes()
    highest = max(found)
    if own is not None and there is not None:
        rows = _by_name(own, there)
        lacking = [name for name, row in zip(own, rows, strict=True) if row is None]
        matched = [row for row in rows if row is not None]
        if not lacking:
            if matched != list(range(len(own))):
                told = (f"{name!r} is {row}" for name, row in zip(own, matched, strict=True))
                logger.info(
                    "classes of %s are matched with those of %s by name: %s",
                    examples.where,
                    classes.whose,
                    listed(told, _SHOWN),
                )
            return matched
        if not explicit or matched:
            raise EvaluationError(
                f"{examples.where} has the classes {listed(map(repr, lacking), _SHOWN)}, which "
                f"{classes.whose} lacks; it has {listed(map(repr, there), _SHOWN)}",
                hint="say which class each label is: labels={'value in the data': index, ...}",
            )
    if own is not None and examples.numbered and not explicit:
        raise EvaluationError(
            f"{examples.where} has the classes {listed(map(repr, own), _SHOWN)}, and "
            f"{classes.whose} has {classes.size} classes without names",
            hint="say which class each label is: labels={'value in the data': index, ...}, or "
            "their names in the order of the head's outputs: labels=[...]",
        )
    if highest >= classes.size or (own is not None and len(own) != classes.size):
        count = f"{len(own)} classes" if own is not None else f"classes up to {highest}"
        raise EvaluationError(
            f"{examples.where} has {count}, and {classes.whose} has {classes.size}",
            hint="give the head of this task, or a label map: labels={'value in the data': index}",
        )
    if own is None and highest + 1 < classes.size:
        logger.warning(
            "%s has classes up to %d, and %s has %d",
            examples.where,
            highest,
            classes.whose,
            classes.size,
        )
    return list(range(classes.size))


def _by_name(own: Sequence[str], there: Sequence[str]) -> list[int | None]:
    exact = {name: i for i, name in enumerate(there)}
    folded = {name.strip().casefold(): i for i, name in enumerate(there)}
    if len(folded) < len(there) or len({name.strip().casefold() for name in own}) < len(own):
        return [exact.get(name) for name in own]
    return [folded.get(name.strip().casefold()) for name in own]
