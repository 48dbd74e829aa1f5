"""One point of a front, chosen: what is predicted and known of it, and the way to its model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Metric
from map_bo.errors import MergeError
from map_bo.loop.verdict.gain import PosteriorGain
from map_bo.merging.export.adapter import AdapterExport
from map_bo.merging.export.model import ExportSettings
from map_bo.pareto.preferences import Preference
from map_bo.problems.problem import Exportable, ExportsAdapters, Problem
from map_bo.space import CoefficientSpace

__all__ = ["Choice", "with_probability"]


@dataclass(frozen=True, eq=False)
class Choice:
    """One point of a front, chosen by preference or by number.

    Attributes:
        point: Row of the front; the nearest one when ``refined``.
        x: ``d`` coefficients.
        mean: ``m`` predicted metrics, own units.
        lower: ``m`` lower ends of their 95 % intervals.
        upper: ``m`` upper ends.
        real: ``m`` measured metrics, NaN where the point was not verified.
        corrected: ``m`` metrics predicted with the verified points among the data; NaN where
            nothing was verified. Where they are known, the choice was made by them.
        metrics: The metrics.
        space: The coefficients.
        feasible: Probability that it can be had, as in :attr:`map_bo.data.Front.feasible`.
        preference: The preference that it was chosen by, or None when chosen by number.
        refined: Whether the surrogate was optimised for exactly this preference, starting from
            ``point``, because that gave a noticeably better prediction than the point itself.
        notes: What a reader of the choice must know, such as metrics without a range.
        probability: Probability that all bounds of the preference hold when the merge is
            measured; None without bounds.
        gain: What the best merge for the preference is predicted to gain over the uniform blend;
            None where the blend was not compared with.
        blend: Whether the choice is the uniform blend, because nothing is clearly better.
        confirmed: What was found when it was measured for real, as plain data; None where it
            was not (:meth:`map_bo.loop.verdict.confirm.Confirmation.summary`).
        verdict: The verdict on it, as plain data; None where it was not asked for.
        problem: The problem, needed to export.
        exports: What writes the model, where it is not the problem itself.
    """

    point: int
    x: Tensor
    mean: Tensor
    lower: Tensor
    upper: Tensor
    real: Tensor
    corrected: Tensor
    metrics: tuple[Metric, ...]
    space: CoefficientSpace
    feasible: float = nan
    preference: Preference | None = None
    refined: bool = False
    notes: tuple[str, ...] = ()
    probability: float | None = None
    gain: PosteriorGain | None = None
    blend: bool = False
    confirmed: Mapping[str, Any] | None = None
    verdict: Mapping[str, Any] | None = None
    problem: Problem | None = None
    exports: Exportable | None = None

    @property
    def expected(self) -> Tensor:
        """``m`` values that the choice was made by: corrected where known, else predicted."""
        known = bool(torch.isfinite(self.corrected).all())
        return self.corrected if known else self.mean

    @property
    def coefficients(self) -> dict[str, float | str]:
        """The coefficients by name, and a choice's option; see :meth:`.CoefficientSpace.named`."""
        return self.space.named(self.x.tolist())

    def describe(self) -> dict[str, Any]:
        """Return the choice as plain data, with predicted and real values apart."""

        def named(values: Tensor) -> dict[str, float | None]:
            return {
                metric.name: value if value == value else None
                for metric, value in zip(self.metrics, values.tolist(), strict=True)
            }

        notes: dict[str, Any] = {"notes": list(self.notes)} if self.notes else {}
        if self.probability is not None:
            notes["probability"] = self.probability
        if self.gain is not None:
            notes["gain_over_blend"] = self.gain.describe()
        if self.blend:
            notes["blend"] = True
        for name, told in (("confirmed", self.confirmed), ("verdict", self.verdict)):
            if told is not None:
                notes[name] = dict(told)
        return {
            "point": self.point,
            "refined": self.refined,
            **notes,
            "coefficients": self.coefficients,
            **({"feasible": self.feasible} if self.feasible == self.feasible else {}),
            "predicted": named(self.mean),
            "predicted_lower": named(self.lower),
            "predicted_upper": named(self.upper),
            "corrected": named(self.corrected),
            "real": named(self.real),
            "preference": None if self.preference is None else asdict(self.preference),
        }

    def export(self, out: str | Path, *, settings: ExportSettings | None = None) -> Path:
        """Merge with these coefficients and write the model, its recipe and a mergekit file.

        Args:
            out: Folder to create.
            settings: Limits on memory and file sizes.

        Raises:
            MergeError: When the problem has no models (a table, a formula), or ``out`` exists.
        """
        writer = self.problem if self.exports is None else self.exports
        if not isinstance(writer, Exportable):
            raise MergeError(
                f"{type(self.problem).__name__} has no models to merge",
                hint="export a run of a problem that merges checkpoints",
            )
        record = {"choice": self.describe()}
        return writer.export(self.x, out, record=record, settings=settings)

    def export_adapter(self, out: str | Path, *, rank: int | None = None) -> AdapterExport:
        """Write the merge with these coefficients as a LoRA adapter over the base.

        Args:
            out: Folder to create.
            rank: Largest rank; None keeps a linear merge of adapters exact.

        Returns:
            The folder, its rank, and the error that the rank causes.

        Raises:
            MergeError: When the problem has no models, or the adapter cannot be written.
        """
        if not isinstance(self.problem, ExportsAdapters) or self.exports is not None:
            raise MergeError(
                f"a merge of {type(self.problem).__name__} cannot be written as an adapter",
                hint="export an adapter from a run that merges checkpoints, all at once",
            )
        return self.problem.export_adapter(
            self.x, out, rank=rank, record={"choice": self.describe()}
        )


def with_probability(choice: Choice, probability: float) -> Choice:
    """Return the choice with what is known of its bounds."""
    preference = choice.preference
    assert preference is not None
    values = dict(zip((metric.name for metric in choice.metrics), choice.expected, strict=True))
    margins = [
        f"{name} {sign} {bound:g} by {abs(float(values[name]) - bound):.2g}"
        for bounds, sign in ((preference.at_least, ">="), (preference.at_most, "<="))
        for name, bound in bounds.items()
    ]
    note = (
        f"the bounds hold with probability {_probability(probability)} when measured; the "
        f"expected values keep {', '.join(margins)}"
    )
    wanted = preference.confidence
    if wanted is not None and probability < wanted:
        note += (
            f"; no merge was found that keeps them with the probability {wanted:g} that was asked "
            "for: relax a bound, measure more, or lower the confidence"
        )
    return replace(choice, probability=probability, notes=(*choice.notes, note))


def _probability(value: float) -> str:
    return "above 0.999" if value > 0.999 else f"{value:.3f}"
