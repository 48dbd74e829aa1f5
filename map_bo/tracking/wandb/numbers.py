"""The events of a run as named numbers, for trackers that plot numbers over time."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Front, Metric
from map_bo.tracking.codec import decode_front, decode_metric, decode_observations, decode_tensor
from map_bo.tracking.extension import with_extension
from map_bo.tracking.store import Event

__all__ = ["Numbers", "flat", "front_table"]


class Numbers:
    """Reads the record of a run event by event.

    After the last event, ``front`` has real and corrected values.

    Attributes:
        created: The data of the ``created`` event, with the settings in force; empty before it.
        front: The front, once it has been solved.
        summary: The summary, once the run has finished; empty before.
        names: Names of the ``d`` coefficients.
        metrics: The ``m`` metrics.
    """

    def __init__(self) -> None:
        self.created: Mapping[str, Any] = {}
        self.front: Front | None = None
        self.summary: Mapping[str, Any] = {}
        self.names: tuple[str, ...] = ()
        self.metrics: tuple[Metric, ...] = ()
        self._rounds = self._evaluations = self._verifications = self._retries = 0
        self._data_sets = self._topped_up = 0
        self._nodes: dict[str, Numbers] = {}

    def of(self, event: Event) -> dict[str, float]:
        """Return the numbers of ``event`` by name; empty for an event without numbers.

        ``proposed``: ``round``, ``proposal/points``, ``proposal/seconds`` and, where the
        sampler fits a surrogate, its scores below ``surrogate/round/``. ``observed``:
        ``evaluation`` (counted from 1), ``coefficient/NAME``, ``metric/NAME`` (own unit),
        ``noise/NAME`` (its standard error where known), ``seconds``, ``failed`` (0 or 1),
        ``hypervolume/observed points`` (real, scaled; once base and experts were measured).
        ``verified``: ``verification`` (counted from 1), ``real/NAME``, ``predicted/NAME``,
        ``verification/seconds`` and ``verification/failed``. ``attempt``: ``retries`` so far.
        ``scored``: ``examples/topped up``, how many examples rows were topped up by so far, and
        ``metric/NAME`` of the row as measured by then; nothing where that failed.
        ``imported``: ``evaluation`` after them, and ``imported``, their number.
        ``extended``: the settings that were changed, below ``settings/``, and ``evaluation``, which
        counts the points of a front that was set back.
        ``node``: the numbers of an event of a node of a nested run, below ``nested/NODE/``;
        ``measured``: ``nested/data_sets`` so far.
        ``checked`` and ``front``: all recorded numbers, below ``stop/``, ``surrogate/``,
        ``uncertainty/`` and ``front/``.

        Raises:
            KeyError, TypeError, ValueError, MapBoError: When it is not an event of a run.
        """
        data = event.data
        match event.kind:
            case "created":
                self.created = data
                self.names = tuple(data["space"]["names"])
                self.metrics = tuple(decode_metric(metric) for metric in data["metrics"])
            case "proposed":
                self._rounds += 1
                return {
                    "round": self._rounds,
                    "proposal/points": len(data["X"]),
                    "proposal/seconds": data["seconds"],
                    **flat(data.get("surrogate") or {}, "surrogate/round"),
                }
            case "attempt":
                self._retries += 1
                return {"retries": self._retries}
            case "observed":
                self._evaluations += 1
                numbers = {"evaluation": self._evaluations, **self._outcome(data)}
                if "hypervolume" in data:
                    numbers["hypervolume/observed points"] = data["hypervolume"]
                return numbers
            case "scored" if "observation" in data:
                self._topped_up += sum(int(stop) - int(start) for _, start, stop in data["parts"])
                names = [metric.name for metric in self.metrics]
                seen = decode_observations(data["observation"], self.metrics)
                return {"examples/topped up": self._topped_up, **_named("metric", names, seen.Y[0])}
            case "imported":
                count = len(data["indices"])
                self._evaluations += count
                return {"evaluation": self._evaluations, "imported": count}
            case "extended":
                self.created = with_extension(self.created, data)
                changed = {name: change["to"] for name, change in data["settings"].items()}
                numbers = flat(changed, "settings")
                if data["reopens"]:
                    self._evaluations += self._verifications
                    self._verifications, self.front, self.summary = 0, None, {}
                    numbers["evaluation"] = self._evaluations
                return numbers
            case "node":
                node = self._nodes.setdefault(data["node"], Numbers())
                found = node.of(Event(data["kind"], data["data"], event.time))
                return {f"nested/{data['node']}/{name}": value for name, value in found.items()}
            case "measured":
                self._data_sets += len(data["names"])
                return {"nested/data_sets": self._data_sets}
            case "checked":
                return flat(data, "stop")
            case "front":
                self.front = decode_front(data["front"], self.metrics)
                return {
                    "front/points": len(self.front),
                    **flat(data.get("surrogate") or {}, "surrogate"),
                    **flat(data.get("uncertainty") or {}, "uncertainty"),
                    **flat(data.get("seconds") or {}, "front/seconds"),
                }
            case "verified":
                return self._verified(data)
            case "corrected" if self.front is not None:
                values = decode_tensor(data["corrected"])
                self.front = dataclasses.replace(self.front, corrected=values)
            case "finished":
                self.summary = data["summary"]
        return {}

    def _outcome(self, data: Mapping[str, Any]) -> dict[str, float]:
        outcome = decode_observations(data["observation"], self.metrics)
        names = [metric.name for metric in self.metrics]
        return {
            **_named("coefficient", self.names, outcome.X[0]),
            **_named("metric", names, outcome.Y[0]),
            **_named("noise", names, outcome.Yvar[0].sqrt()),
            "seconds": float(outcome.cost[0]),
            "failed": float(outcome.failures[0] is not None),
            **({"recalled": float(outcome.recalled.sum())} if bool(outcome.recalled.any()) else {}),
        }

    def _verified(self, data: Mapping[str, Any]) -> dict[str, float]:
        self._verifications += 1
        outcome = decode_observations(data["observation"], self.metrics)
        names, row = [metric.name for metric in self.metrics], int(data["row"])
        numbers = {
            "verification": self._verifications,
            **_named("real", names, outcome.Y[0]),
            "verification/seconds": float(outcome.cost[0]),
            "verification/failed": float(outcome.failures[0] is not None),
        }
        if self.front is None:
            return numbers
        near = torch.allclose(outcome.X[0], self.front.X[row], rtol=0.0, atol=1e-6)
        if outcome.failures[0] is None and near:
            self.front = self.front.with_real([row], outcome.Y)
        return {**numbers, **_named("predicted", names, self.front.mean[row])}


def _named(kind: str, names: tuple[str, ...] | list[str], values: Tensor) -> dict[str, float]:
    pairs = zip(names, values.tolist(), strict=True)
    return {f"{kind}/{name}": value for name, value in pairs if math.isfinite(value)}


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers in nested plain data; keys are joined by slashes."""
    numbers: dict[str, float] = {}
    for key, value in data.items():
        name = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            numbers.update(flat(value, name))
        elif (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        ):
            numbers[name] = value
    return numbers


def front_table(front: Front, names: tuple[str, ...]) -> tuple[list[str], list[list[float | None]]]:
    """Return the columns and rows of a front as a table.

    Columns: ``point``, ``c:NAME`` for each coefficient; for each metric ``predicted:NAME``,
    ``std:NAME``, ``lower:NAME``, ``upper:NAME``, ``corrected:NAME`` and ``real:NAME``, in own
    units; ``probability``; and ``feasible`` where it is known. Unknown values are None. These are
    the columns of ``front.csv``.
    """
    parts = ("predicted", "std", "lower", "upper", "corrected", "real")
    values = (front.mean, front.std, front.lower, front.upper, front.corrected, front.real)
    columns = ["point", *(f"c:{name}" for name in names)]
    columns += [f"{part}:{metric.name}" for metric in front.metrics for part in parts]
    ends = {"probability": front.probability}
    if bool(front.feasible.isfinite().any()):
        ends["feasible"] = front.feasible
    rows: list[list[float | None]] = []
    for k in range(len(front)):
        row = [float(k), *front.X[k].tolist()]
        row += [float(part[k, j]) for j in range(len(front.metrics)) for part in values]
        row += [float(end[k]) for end in ends.values()]
        rows.append([value if math.isfinite(value) else None for value in row])
    return [*columns, *ends], rows
