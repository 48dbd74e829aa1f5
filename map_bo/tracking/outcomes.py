"""Outcomes of examples as plain data of events: packed, and as they will be read back.

The outcomes of one evaluator on one row are a mapping:

``size``      how many examples the set has in all
``n``         how many of them were scored
``items``     which: ``"all"``; ``"range"``, from ``first`` on; ``"mask"``, one bit per example; or
              ``"list"``, the steps between their numbers; the smallest that says it
``values``    how each column is kept: ``"bits"`` where all outcomes are 0 or 1, ``"bits and nan"``
              where some examples failed besides, else ``"float16"``, ``"float32"`` or ``"float64"``
``means``     whether each metric is the mean of its outcomes
``metrics``   their names in the run; absent where they are not told
``packed``    base64 of the bytes of the items and of the columns, in order, compressed by zlib

**Precision.** Half precision is taken where the root mean square of the rounding errors is at most
``2 ** -10`` of the standard deviation of the outcomes over the examples: rounding then adds less
than a millionth to the variance of any mean. Losses that differ by less than that from each other,
and values beyond 65504, are kept in single precision; what even that would round too much (a
constant such as 0.1, a single outcome), in double. :func:`as_recorded` gives the rounded outcomes,
so that a run decides by what a resumed run will read.

**Bounds.** A record may come from somebody else: no more than :data:`MOST_OUTCOMES` outcomes are
expanded at a time, and what is longer than 2 kB is never compressed more than 16-fold.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from map_bo.data import Observations
from map_bo.errors import DataError
from map_bo.examples.sets import ExampleOutcomes
from map_bo.tracking.store import Event

__all__ = [
    "MOST_OUTCOMES",
    "as_recorded",
    "decode_examples",
    "encode_examples",
    "map_outcomes",
    "with_examples_as_recorded",
]

logger = logging.getLogger(__name__)

MOST_OUTCOMES = 2**24
"""Most outcomes of one evaluator on one row that are recorded: examples of the set by metrics."""

_ROUNDING = 2.0**-10  # largest rounding error, in standard deviations
_FREE = 2048  # bytes that may be compressed as far as they can be
_TIMES = 16  # how far longer ones may be
_FLOATS = {
    "float16": (torch.float16, "<f2"),
    "float32": (torch.float32, "<f4"),
    "float64": (torch.float64, "<f8"),
}
_BITS = ("bits", "bits and nan")
_EDITED = "restore the record from a copy: it was edited by hand"

Row = Mapping[str, ExampleOutcomes]


def as_recorded(outcomes: ExampleOutcomes) -> ExampleOutcomes:
    """Return outcomes as they are read back from a record, rounded to the precision kept there.

    Doing it twice changes nothing more.
    """
    columns = [_rounded(column, _kind(column)) for column in outcomes.values.unbind(-1)]
    values = torch.stack(columns, -1) if columns else outcomes.values
    return dataclasses.replace(outcomes, values=values)


def with_examples_as_recorded(seen: Observations) -> Observations:
    """Return observations whose outcomes of examples are those that a record of them holds."""
    if not any(seen.examples):
        return seen
    rows = tuple(
        {name: as_recorded(one) for name, one in _recordable(row).items()} for row in seen.examples
    )
    return dataclasses.replace(seen, examples=rows)


def _recordable(row: Row) -> Row:
    """Return the outcomes of a row without those that are too many to be recorded."""
    for name, one in row.items():
        if one.size * max(1, len(one.means)) > MOST_OUTCOMES:
            logger.warning(
                "outcomes of %d examples of %r are not kept one by one: at most %d are",
                one.size, name, MOST_OUTCOMES,
            )  # fmt: skip
    return {
        name: one for name, one in row.items() if one.size * max(1, len(one.means)) <= MOST_OUTCOMES
    }


def _kind(column: Tensor) -> str:
    """Return how a column of ``n`` outcomes is kept."""
    failed = column.isnan()
    if bool(((column == 0) | (column == 1) | failed).all()):
        return _BITS[1] if bool(failed.any()) else _BITS[0]
    single = column.float().double()
    if not _is_faithful(column, single):
        return "float64"
    # Judged by what single precision holds, so that rounded outcomes are judged alike.
    return "float16" if _is_faithful(single, single.half().double()) else "float32"


def _is_faithful(values: Tensor, rounded: Tensor) -> bool:
    finite = values.isfinite()
    if not bool((finite == rounded.isfinite()).all()):
        return False
    values, error = values[finite], (rounded - values)[finite]
    if not bool(error.any()):
        return True
    return float(error.square().mean().sqrt()) <= _ROUNDING * float(values.std(correction=0))


def _rounded(column: Tensor, kind: str) -> Tensor:
    return column.abs() if kind in _BITS else column.to(_FLOATS[kind][0]).double()


def encode_examples(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the outcomes of ``n`` rows as plain data, evaluator by evaluator; see the module."""
    return [{name: _encode(one) for name, one in _recordable(row).items()} for row in rows]


def _encode(outcomes: ExampleOutcomes) -> dict[str, Any]:
    form, content, more = _encode_items(outcomes)
    kinds = [_kind(column) for column in outcomes.values.unbind(-1)]
    for column, kind in zip(outcomes.values.unbind(-1), kinds, strict=True):
        content += _encode_column(column, kind)
    return {
        "size": outcomes.size,
        "n": len(outcomes),
        "items": form,
        **more,
        "values": kinds,
        "means": [bool(mean) for mean in outcomes.means],
        **({"metrics": list(outcomes.metrics)} if outcomes.metrics else {}),
        "packed": base64.b64encode(_compress(content)).decode("ascii"),
    }


def _encode_items(outcomes: ExampleOutcomes) -> tuple[str, bytes, dict[str, int]]:
    """Return the form in which examples are named, its bytes, and what else it says."""
    items, n = outcomes.items, len(outcomes)
    if outcomes.complete:
        return "all", b"", {}
    first = int(items[0])
    if int(items[-1]) == first + n - 1:
        return "range", b"", {"first": first}
    if -(-outcomes.size // 8) <= 4 * n:
        mask = np.zeros(outcomes.size, dtype=bool)
        mask[items.numpy()] = True
        return "mask", np.packbits(mask).tobytes(), {}
    steps = np.diff(items.numpy(), prepend=0).astype("<u4")
    return "list", _by_byte(steps.tobytes(), 4), {}


def _encode_column(column: Tensor, kind: str) -> bytes:
    if kind in _BITS:
        bits = np.packbits((column == 1).numpy()).tobytes()
        return bits + (np.packbits(column.isnan().numpy()).tobytes() if kind == _BITS[1] else b"")
    dtype, written = _FLOATS[kind]
    values = column.to(dtype).numpy().astype(written)
    return _by_byte(values.tobytes(), values.itemsize)


def _by_byte(content: bytes, width: int) -> bytes:
    """Return numbers with their first bytes together, then their second ones: they pack better."""
    return np.frombuffer(content, np.uint8).reshape(-1, width).T.tobytes()


def _by_number(content: bytes, width: int) -> bytes:
    return np.frombuffer(content, np.uint8).reshape(width, -1).T.tobytes()


def _compress(content: bytes) -> bytes:
    packed = zlib.compress(content)
    if len(content) > _FREE and len(content) > _TIMES * len(packed):
        return zlib.compress(content, 0)
    return packed


def decode_examples(data: Any, n: int) -> tuple[Row, ...]:
    """Return what :func:`encode_examples` made of ``n`` rows.

    Raises:
        DataError: When it is something else; nothing larger than :data:`MOST_OUTCOMES` is expanded.
    """
    if not isinstance(data, list | tuple) or len(data) != n:
        raise DataError(f"the outcomes of examples are not those of {n} rows", hint=_EDITED)
    rows = []
    for row in data:
        if not isinstance(row, Mapping):
            raise DataError("the outcomes of a row are not a mapping of evaluators", hint=_EDITED)
        rows.append({str(name): _decode(one, str(name)) for name, one in row.items()})
    return tuple(rows)


def _decode(data: Any, name: str) -> ExampleOutcomes:
    def wrong(what: str) -> DataError:
        return DataError(
            f"recorded outcomes of the examples of {name[:40]!r} cannot be read: {what}",
            hint=_EDITED,
        )

    if not isinstance(data, Mapping):
        raise wrong("they are not a mapping")
    size, n, form = data.get("size"), data.get("n"), data.get("items")
    kinds, means = data.get("values"), data.get("means")
    metrics, packed = data.get("metrics", ()), data.get("packed")
    if (
        not isinstance(kinds, list)
        or not isinstance(means, list)
        or not isinstance(metrics, list | tuple)
        or len(kinds) != len(means)
        or not all(isinstance(kind, str) and kind in (*_BITS, *_FLOATS) for kind in kinds)
        or not all(isinstance(mean, bool) for mean in means)
        or not all(isinstance(metric, str) for metric in metrics)
    ):
        raise wrong("the kinds of their columns are not told")
    if type(size) is not int or type(n) is not int or not 1 <= n <= size:
        raise wrong(f"they are {str(n)[:20]} of {str(size)[:20]} examples")
    if size * max(1, len(kinds)) > MOST_OUTCOMES:
        raise wrong(
            f"{str(size)[:20]} examples are more than {MOST_OUTCOMES // max(1, len(kinds))}"
        )
    if isinstance(packed, Mapping):
        raise wrong("they are in a file beside the record, which was not read")
    widths = {"all": 0, "range": 0, "mask": -(-size // 8), "list": 4 * n}
    if not isinstance(form, str) or form not in widths:
        raise wrong(f"examples are named by {str(form)[:20]!r}")
    lengths = [widths[form], *(_length(kind, n) for kind in kinds)]
    content = _unpack(packed, sum(lengths), wrong)
    items = _decode_items(form, content[: lengths[0]], n, size, data.get("first", 0))
    if items is None:
        raise wrong(f"which {n} of {size} examples they are is not told")
    columns, at = [], lengths[0]
    for kind, length in zip(kinds, lengths[1:], strict=True):
        columns.append(_decode_column(kind, content[at : at + length], n))
        at += length
    values = torch.stack(columns, -1) if columns else torch.zeros(n, 0, dtype=torch.float64)
    return ExampleOutcomes(items, values, size, tuple(means), tuple(metrics))


def _length(kind: str, n: int) -> int:
    """Return how many bytes a column of ``n`` outcomes has."""
    if kind in _BITS:
        return -(-n // 8) * (1 + (kind == _BITS[1]))
    return n * int(np.dtype(_FLOATS[kind][1]).itemsize)


def _unpack(packed: Any, length: int, wrong: Callable[[str], DataError]) -> bytes:
    if not isinstance(packed, str):
        raise wrong("they are not packed as text")
    try:
        compressed = base64.b64decode(packed.encode("ascii"), validate=True)
        if length > _FREE and length > _TIMES * len(compressed):
            raise wrong(f"{len(compressed)} bytes cannot hold {length}")
        expander = zlib.decompressobj()
        content = expander.decompress(compressed, length + 1)
    except (UnicodeEncodeError, binascii.Error, zlib.error) as error:
        raise wrong(f"{error}") from error
    if len(content) != length or not expander.eof or expander.unused_data:
        raise wrong(f"they do not have the {length} bytes that they should")
    return content


def _decode_items(form: str, content: bytes, n: int, size: int, first: Any) -> Tensor | None:
    """Return the numbers of the examples; None where they are not what is promised."""
    if form == "all":
        return torch.arange(n) if n == size else None
    if form == "range":
        fits = type(first) is int and 0 <= first <= size - n
        return torch.arange(first, first + n) if fits else None
    if form == "mask":
        mask = np.unpackbits(np.frombuffer(content, np.uint8), count=size)
        found = np.flatnonzero(mask)
    else:
        found = np.cumsum(np.frombuffer(_by_number(content, 4), "<u4").astype(np.int64))
    return torch.from_numpy(found.astype(np.int64)) if len(found) == n else None


def _decode_column(kind: str, content: bytes, n: int) -> Tensor:
    if kind not in _BITS:
        written = np.dtype(_FLOATS[kind][1])
        values = np.frombuffer(_by_number(content, written.itemsize), written)
        return torch.from_numpy(values.astype(np.float64))
    half = -(-n // 8)
    bits = np.unpackbits(np.frombuffer(content[:half], np.uint8), count=n).astype(np.float64)
    if kind == _BITS[1]:
        failed = np.unpackbits(np.frombuffer(content[half:], np.uint8), count=n)
        bits[failed.astype(bool)] = np.nan
    return torch.from_numpy(bits)


def map_outcomes(
    event: Event, change: Callable[[str, Mapping[str, Any]], Mapping[str, Any] | None]
) -> Event:
    """Return an event with other data in place of those of the outcomes of its examples.

    Args:
        event: Any event; also one of a node of a nested run, which it holds.
        change: Function of an evaluator's name and the mapping of its outcomes; what it returns
            takes their place, and None leaves them out.
    """
    data = _mapped_event(event.data, change)
    return event if data is event.data else Event(event.kind, data, event.time)


def _mapped_event(
    data: Mapping[str, Any], change: Callable[[str, Mapping[str, Any]], Mapping[str, Any] | None]
) -> Mapping[str, Any]:
    new: dict[str, Any] = {}
    for part in ("observation", "observations"):
        seen = data.get(part)
        rows = seen.get("examples") if isinstance(seen, Mapping) else None
        if isinstance(seen, Mapping) and isinstance(rows, list):
            found = [_mapped_row(row, change) for row in rows]
            if any(after is not before for after, before in zip(found, rows, strict=True)):
                kept = {**seen, "examples": found}
                if not any(found):
                    del kept["examples"]
                new[part] = kept
    inner = data.get("data") if isinstance(data.get("kind"), str) else None
    if isinstance(inner, Mapping):
        mapped = _mapped_event(inner, change)
        if mapped is not inner:
            new["data"] = mapped
    return {**data, **new} if new else data


def _mapped_row(
    row: Any, change: Callable[[str, Mapping[str, Any]], Mapping[str, Any] | None]
) -> Any:
    if not isinstance(row, Mapping):
        return row
    found, differs = {}, False
    for name, one in row.items():
        after = change(name, one) if isinstance(one, Mapping) else one
        differs |= after is not one
        if after is not None:
            found[name] = after
    return found if differs else row
