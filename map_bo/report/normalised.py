"""Scores normalised by each expert's own: 1 is what the expert of the task has by itself.

It is how the field prints merges of many tasks: the mean of these shares over all tasks is the
"normalised accuracy". Of a metric to be minimised the share is inverted, the expert's value divided
by that of the merge, so that more is better for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import PreferenceError, did_you_mean
from map_bo.report.view import RunView, anchor_values, representative_rows
from map_bo.scale import anchor_rows
from map_bo.space import CoefficientSpace

__all__ = ["OwnScores", "normalised_rows", "normalised_words"]


@dataclass(frozen=True, eq=False)
class OwnScores:
    """What each metric is divided by: the score of an expert that a run has measured.

    Attributes:
        metrics: The ``m`` metrics.
        experts: ``m`` names of experts; None where no expert was measured in the metric.
        values: ``m`` scores of these experts, own units; NaN where there is none, or where it is
            not positive, so that no share of it means anything.
    """

    metrics: tuple[Metric, ...]
    experts: tuple[str | None, ...]
    values: Tensor

    @classmethod
    def of(cls, seen: Observations, space: CoefficientSpace) -> OwnScores:
        """Find the expert of each metric among the evaluations of a run.

        It is the expert that is called like the metric, or like its beginning where a task has
        several metrics (``sst2`` of ``sst2_accuracy``); else the one that is best in it.

        Args:
            seen: All evaluations.
            space: The coefficients.
        """
        anchors = space.anchors()
        measured = seen.measured
        here = anchor_rows(seen.X, space)
        found: dict[str, dict[int, float]] = {}
        for name, kind, rows in zip(anchors.names, anchors.kinds, here, strict=True):
            if kind != "expert":
                continue
            for j in range(len(seen.metrics)):
                at = (rows & measured[:, j]).nonzero().flatten().tolist()
                if at:
                    found.setdefault(name, {})[j] = float(seen.Y[at[0], j])
        experts: list[str | None] = []
        values: list[float] = []
        for j, metric in enumerate(seen.metrics):
            scores = {name: of[j] for name, of in found.items() if j in of}
            chosen = _expert_of(metric, scores)
            score = torch.nan if chosen is None else scores[chosen]
            experts.append(chosen)
            values.append(score if score > 0 else torch.nan)
        return cls(seen.metrics, tuple(experts), torch.tensor(values, dtype=torch.float64))

    def normalise(self, values: Tensor) -> Tensor:
        """Return ``values`` (``... x m``, own units) as shares of the experts' scores.

        More is better, whatever the direction of the metric. NaN where there is no score, and
        where a metric to be minimised is not positive.
        """
        values = values.double()
        less = torch.tensor([metric.direction == "min" for metric in self.metrics])
        inverted = self.values / torch.where(values > 0, values, torch.nan)
        return torch.where(less, inverted, values / self.values)

    def bound(self, metric: str, share: float) -> float:
        """Return the value of a metric, own units, that is a share of its expert's score.

        Raises:
            PreferenceError: When there is no such metric, or no score to take a share of, or the
                share is not positive.
        """
        names = [one.name for one in self.metrics]
        if metric not in names:
            raise PreferenceError(
                f"there is no metric {metric!r}", hint=did_you_mean(metric, names)
            )
        j = names.index(metric)
        value = float(self.values[j])
        if not value > 0:
            raise PreferenceError(
                f"{metric!r} cannot be normalised: no expert was measured in it, or its score is "
                "not positive",
                hint="give the bound in the metric's own unit, without --normalised",
            )
        if not share > 0:
            raise PreferenceError(
                f"a share of the expert's score must be positive, got {share:g}",
                hint="0.95 is 95 % of what the expert of the task has",
            )
        return value / share if self.metrics[j].direction == "min" else value * share

    def is_minimised(self, metric: str) -> bool:
        """Return whether less of a metric is better."""
        return any(one.name == metric and one.direction == "min" for one in self.metrics)


def _expert_of(metric: Metric, scores: dict[str, float]) -> str | None:
    if metric.name in scores:
        return metric.name
    beginning = [name for name in scores if metric.name.startswith(f"{name}_")]
    if beginning:
        return max(beginning, key=len)
    if not scores:
        return None
    best = max if metric.direction == "max" else min
    return best(scores, key=scores.__getitem__)


def normalised_rows(view: RunView) -> list[tuple[str, str, list[float]]]:
    """Return base, experts, uniform blend and a few points of the front, normalised.

    Returns:
        Label, whether the values are ``real`` or ``predicted``, and ``m + 1`` shares, of which the
        last is their mean (NaN where one of them is).
    """
    own = OwnScores.of(view.seen, view.space)
    rows = [(anchor.name, "real", anchor.y) for anchor in anchor_values(view)]
    for row in representative_rows(view):
        real = bool(view.front.verified[row])
        values = view.front.real[row] if real else view.front.mean[row]
        rows.append((f"point {row}", "real" if real else "predicted", values))
    found = []
    for label, kind, values in rows:
        shares = own.normalise(values)
        found.append((label, kind, [*shares.tolist(), float(shares.mean())]))
    return found


def normalised_words(metrics: Sequence[Metric], own: OwnScores) -> str:
    """Return what the shares are of, for the reader."""
    said = "Values are divided by those of each task's own expert, measured in this run"
    best = [
        f"{metric.name} by {expert}"
        for metric, expert in zip(metrics, own.experts, strict=True)
        if expert is not None and metric.name != expert
    ]
    said += f" ({', '.join(best)})." if best else "."
    if any(metric.direction == "min" for metric in metrics):
        less = ", ".join(metric.name for metric in metrics if metric.direction == "min")
        said += f" Where less is better ({less}), the expert's value is divided by the merge's."
    if not bool(own.values.isfinite().all()):
        lacking = [
            metric.name
            for metric, value in zip(metrics, own.values.tolist(), strict=True)
            if not value > 0
        ]
        said += f" There is no such value for {', '.join(lacking)}."
    return said
