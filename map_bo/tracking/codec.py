"""Events, tensors, observations and fronts as strict JSON that any other tool can read.

JSON has no NaN and no infinity, so they are written in two ways:

* Inside a tensor (:func:`encode_tensor`) ``null`` is NaN, and ``"Infinity"`` and ``"-Infinity"``
  are the infinities.
* Anywhere else in the data of an event a float that is not finite is the object
  ``{"$float": "NaN"}``, ``{"$float": "Infinity"}`` or ``{"$float": "-Infinity"}``. A user's mapping
  with this single key is refused, so the two cannot be confused.

All other floats are written with the fewest digits that read back to the same number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from map_bo.constraints import plain_constraints, read_constraints
from map_bo.data import Front, Metric, Observations, to_maximisation
from map_bo.errors import DataError, StoreError
from map_bo.examples.sets import Part, check_parts
from map_bo.scale import Scale
from map_bo.tracking.chain import Link, seal
from map_bo.tracking.outcomes import decode_examples, encode_examples
from map_bo.tracking.store import Event

__all__ = [
    "DEEPEST",
    "SCHEMA",
    "decode_event",
    "decode_front",
    "decode_metric",
    "decode_observations",
    "decode_parts",
    "decode_scale",
    "decode_tensor",
    "encode_event",
    "encode_front",
    "encode_line",
    "encode_metric",
    "encode_observations",
    "encode_parts",
    "encode_scale",
    "encode_tensor",
]

SCHEMA = 2
"""Version of the lines' format; a reader refuses lines of a newer one. 1 had no checksums."""

DEEPEST = 200
"""How many lists and mappings of an event may stand in each other."""

Nested: TypeAlias = "float | str | list[Nested] | None"

_FLOAT_KEY = "$float"
_LATEST = 1e12  # seconds since the epoch
_NAMED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _name(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def encode_tensor(tensor: Tensor) -> Nested:
    """Return the values of ``tensor`` (any shape) as nested lists; NaN is None."""

    def plain(value: Any) -> Nested:
        if isinstance(value, list):
            return [plain(part) for part in value]
        if math.isfinite(value):
            return float(value)
        return None if math.isnan(value) else _name(value)

    return plain(tensor.detach().cpu().double().tolist())


def decode_tensor(data: Any) -> Tensor:
    """Return the float64 tensor that :func:`encode_tensor` wrote.

    A tensor without rows has lost its further dimensions, which the caller restores.

    Raises:
        DataError: When the lists are ragged, or hold something that is not a number.
    """

    def number(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [number(part) for part in value]
        if value is None:
            return math.nan
        if isinstance(value, str) and value in _NAMED:
            return _NAMED[value]
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or (isinstance(value, float) and not math.isfinite(value))  # such as 1e999
        ):
            raise DataError(
                f"a recorded tensor holds {_short(value)}, which is not a number",
                hint="restore the record from a copy: it was edited by hand",
            )
        return value

    try:
        return torch.tensor(number(data), dtype=torch.float64)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise DataError(
            f"recorded numbers do not form a tensor: {error}",
            hint="restore the record from a copy: it was edited by hand",
        ) from error


def _short(value: Any) -> str:
    """Return what a value looks like, for an error; a digit or a million of them take one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # too many digits, or too deep
        return f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}..."


def encode_scale(scale: Scale) -> dict[str, Any]:
    """Return ``scale`` as plain data, without its metrics."""
    data: dict[str, Any] = {
        "point": encode_tensor(scale.point),
        "best": encode_tensor(scale.best),
        "rule": scale.rule,
    }
    # Only where there are some, so that all other records stay as they were.
    if scale.unit is not None:
        data["unit"] = encode_tensor(scale.unit)
    if scale.rangeless or bool(_as_without_range(scale.point, scale.best, scale.metrics).any()):
        data["rangeless"] = list(scale.rangeless)
    if scale.constraints:
        data["constraints"] = plain_constraints(scale.constraints)
    return data


def decode_scale(data: Mapping[str, Any], metrics: Sequence[Metric]) -> Scale:
    """Return the scale that :func:`encode_scale` wrote.

    Raises:
        KeyError: When a part is missing.
        DataError: When the parts do not make a scale of these metrics.
    """
    point, best = decode_tensor(data["point"]), decode_tensor(data["best"])
    if "rangeless" not in data:
        best = torch.where(_as_without_range(point, best, metrics), point, best)
    unit = decode_tensor(data["unit"]) if "unit" in data else None
    scale = Scale(tuple(metrics), point, best, str(data["rule"]), unit)
    names = data.get("rangeless", ())
    told = torch.tensor([metric.name in names for metric in metrics], dtype=torch.bool)
    constraints = read_constraints(data.get("constraints"))
    return replace(scale, ranged=scale.ranged & ~told, constraints=constraints)


def _as_without_range(point: Tensor, best: Tensor, metrics: Sequence[Metric]) -> Tensor:
    """Return where a record of version 0.1 would mean a metric without a range (``m``).

    It ended the scale of such a metric a billionth beyond the point.
    """
    low, high = to_maximisation(point, metrics), to_maximisation(best, metrics)
    return high == low + 1e-9


def encode_metric(metric: Metric) -> dict[str, Any]:
    """Return ``metric`` as plain data."""
    return {
        "name": metric.name,
        "direction": metric.direction,
        "kind": metric.kind,
        "lower": _bound(metric.lower),
        "upper": _bound(metric.upper),
        "resampling": metric.resampling,
    }


def _bound(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else _name(value)


def decode_metric(data: Mapping[str, Any]) -> Metric:
    """Return the metric that :func:`encode_metric` wrote.

    Raises:
        KeyError: When a part is missing.
        DataError: When the parts contradict each other.
    """

    def bound(value: Any) -> float | None:
        return _NAMED[value] if isinstance(value, str) else value

    return Metric(
        name=data["name"],
        direction=data["direction"],
        kind=data["kind"],
        lower=bound(data["lower"]),
        upper=bound(data["upper"]),
        resampling=data.get("resampling", data.get("examples")),  # examples: version 0.1
    )


def encode_observations(observations: Observations) -> dict[str, Any]:
    """Return ``observations`` as plain data, without the metrics (the run records them once).

    Gradients and their variances are included only where there are any, and so are the marks of
    what came from a cache of evaluations, and the outcomes of examples, rounded as
    :func:`map_bo.tracking.outcomes.as_recorded` does. A covariance among rows is not: it is an
    estimate, made anew from what is recorded.
    """
    fields = ["X", "Y", "Yvar", "counts", "cost"]
    if observations.gradients is not None:
        fields += ["gradients", "gradient_variance"]
    return {
        "d": observations.X.shape[-1],
        **{name: encode_tensor(getattr(observations, name)) for name in fields},
        "failures": list(observations.failures),
        **_encode_recalled(observations),
        **_encode_examples(observations),
    }


def _encode_examples(observations: Observations) -> dict[str, Any]:
    # Only where there are some, so that all other records stay as they were.
    rows = encode_examples(observations.examples) if any(observations.examples) else []
    return {"examples": rows} if any(rows) else {}


def _encode_recalled(observations: Observations) -> dict[str, Any]:
    # Only where there are some, so that all other records stay as they were.
    if not bool(observations.recalled.any()):
        return {}
    return {
        "source": "cache",
        "recalled": observations.recalled.tolist(),
        "saved": encode_tensor(observations.saved),
    }


def _decode_recalled(data: Any, m: int) -> Tensor | None:
    if not data:
        return None
    if not all(
        isinstance(row, list) and len(row) == m and all(isinstance(one, bool) for one in row)
        for row in data
    ):
        raise DataError(
            f"the marks of what was recalled are {_short(data)}, not {m} booleans per row",
            hint="restore the record from a copy: it was edited by hand",
        )
    return torch.tensor(data, dtype=torch.bool).reshape(-1, m)


def decode_observations(data: Mapping[str, Any], metrics: Sequence[Metric]) -> Observations:
    """Return the observations that :func:`encode_observations` wrote.

    Raises:
        KeyError: When a part is missing.
        DataError: When the parts contradict each other or the metrics.
    """
    d, m = int(data["d"]), len(metrics)
    X = _matrix(data["X"], d)
    examples = data.get("examples")
    return Observations(
        X=X,
        Y=_matrix(data["Y"], m),
        metrics=tuple(metrics),
        Yvar=_matrix(data["Yvar"], m),
        counts=_matrix(data["counts"], m),
        cost=decode_tensor(data["cost"]),
        failures=tuple(data["failures"]),
        gradients=_gradients(data, "gradients"),
        gradient_variance=_gradients(data, "gradient_variance"),
        recalled=_decode_recalled(data.get("recalled"), m),  # type: ignore[arg-type]
        saved=decode_tensor(data["saved"]) if data.get("saved") else None,  # type: ignore[arg-type]
        examples=None if examples is None else decode_examples(examples, len(X)),  # type: ignore[arg-type]
    )


def _gradients(data: Mapping[str, Any], name: str) -> Tensor | None:
    return decode_tensor(data[name]) if data.get(name) else None


def encode_parts(parts: Sequence[Part]) -> list[list[Any]]:
    """Return parts of examples as plain data."""
    return [[part.evaluator, part.start, part.stop] for part in parts]


def decode_parts(data: Mapping[str, Any]) -> tuple[Part, ...]:
    """Return the parts that the data of an event name; none where they name none.

    Raises:
        DataError: When they are not parts of different evaluators.
    """
    given = data.get("parts", ())
    if not isinstance(given, list | tuple) or not all(
        isinstance(one, list | tuple) and [type(value) for value in one] == [str, int, int]
        for one in given
    ):
        raise DataError(
            f"parts of examples are {_short(given)}",
            hint="restore the record from a copy: it was edited by hand",
        )
    return check_parts([Part(*one) for one in given])


def encode_front(front: Front) -> dict[str, Any]:
    """Return ``front`` as plain data without the metrics, predicted and real values apart."""
    fields = ["X", "mean", "std", "lower", "upper", "real", "corrected", "probability"]
    # Only where something is known, so that all other records stay as they were.
    fields += ["feasible"] if bool(front.feasible.isfinite().any()) else []
    return {
        "d": front.X.shape[-1],
        **{name: encode_tensor(getattr(front, name)) for name in fields},
    }


def decode_front(data: Mapping[str, Any], metrics: Sequence[Metric]) -> Front:
    """Return the front that :func:`encode_front` wrote.

    A front recorded by a version without corrected values or probabilities has none.

    Raises:
        KeyError: When a part is missing.
        DataError: When the parts contradict each other or the metrics.
    """
    fields = ["mean", "std", "lower", "upper", "real"]
    fields += ["corrected"] if "corrected" in data else []
    later = [name for name in ("probability", "feasible") if name in data]
    return Front(
        X=_matrix(data["X"], int(data["d"])),
        metrics=tuple(metrics),
        **{name: _matrix(data[name], len(metrics)) for name in fields},
        **{name: decode_tensor(data[name]) for name in later},
    )


def _matrix(data: Any, columns: int) -> Tensor:
    return decode_tensor(data) if data else torch.zeros(0, columns, dtype=torch.float64)


def encode_event(event: Event) -> bytes:
    """Return ``event`` as one line of strict ASCII JSON, its newline included, as the first line.

    Raises:
        StoreError: When the data hold something that JSON cannot express.
    """
    return encode_line(event, Link())[0]


def encode_line(event: Event, link: Link) -> tuple[bytes, Link]:
    """Return ``event`` as the line that follows ``link``, and where the chain stands after it.

    Raises:
        StoreError: When the data hold something that JSON cannot express.
    """
    line = {
        "v": SCHEMA,
        "seq": link.lines + 1,
        "kind": event.kind,
        "time": _plain(event.time, "time"),
        "data": _plain(event.data, "data"),
    }
    return seal(json.dumps(line, allow_nan=False, separators=(",", ":")).encode("ascii"), link)


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    if depth > DEEPEST:
        raise StoreError(
            f"data of an event are nested more than {DEEPEST} deep, which cannot be recorded",
            hint="record flatter data",
        )
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT_KEY: _name(value)}
    if isinstance(value, Mapping):
        wrong = next((key for key in value if not isinstance(key, str)), None)
        if wrong is None and set(value) != {_FLOAT_KEY}:
            return {key: _plain(part, f"{where}.{key}", depth + 1) for key, part in value.items()}
        what = f"the key {(_FLOAT_KEY if wrong is None else wrong)!r}"
    elif isinstance(value, list | tuple):
        return [_plain(part, f"{where}[{i}]", depth + 1) for i, part in enumerate(value)]
    else:
        what = f"a {type(value).__name__}"
    raise StoreError(
        f"{where} of an event holds {what}, which cannot be recorded",
        hint="record numbers, strings, booleans, None, lists, and mappings with strings as keys",
    )


def decode_event(line: bytes) -> Event:
    """Return the event that :func:`encode_event` wrote; its checksum is not looked at.

    Raises:
        ValueError: When the line is not JSON.
        StoreError: When it is JSON but not an event, or was written by a newer version.
    """
    try:
        content = json.loads(line.decode("utf-8"), object_hook=_special, parse_constant=_refuse)
    except RecursionError:
        raise StoreError(f"it is nested more than {DEEPEST} deep") from None
    if not isinstance(content, dict) or type(content.get("v")) is not int or content["v"] < 1:
        raise StoreError("it is not an event of a run")
    if content["v"] > SCHEMA:
        raise StoreError(
            f"its format is {_short(content['v'])}, and this version of map-bo reads up to "
            f"{SCHEMA}",
            hint="update map-bo",
        )
    kind, data, time = content.get("kind"), content.get("data"), content.get("time")
    if (
        not isinstance(kind, str)
        or not isinstance(data, dict)
        or isinstance(time, bool)
        or not isinstance(time, int | float)
        or not 0 <= time <= _LATEST
    ):
        raise StoreError("it is not an event of a run")
    if _depth(data) > DEEPEST:
        raise StoreError(f"it is nested more than {DEEPEST} deep")
    return Event(kind, data, float(time))


def _depth(data: Any) -> int:
    """Return how many lists and mappings stand in each other, without recursion."""
    depth, level = 0, [data]
    while level:
        depth += 1
        inner = (part.values() if isinstance(part, dict) else part for part in level)
        level = [part for parts in inner for part in parts if isinstance(part, dict | list)]
    return depth


def _special(mapping: dict[str, Any]) -> Any:
    if mapping.keys() == {_FLOAT_KEY}:
        name = mapping[_FLOAT_KEY]
        if not isinstance(name, str) or name not in _NAMED:
            raise StoreError(f"it holds {_FLOAT_KEY} with {_short(name)}")
        return _NAMED[name]
    return mapping


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
