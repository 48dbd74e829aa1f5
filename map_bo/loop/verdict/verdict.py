"""An honest verdict: is the merge better than the uniform blend, the base and each expert?

Every comparison is a difference with an interval and a p-value, and rests on one of three grounds,
the first that there is:

``examples``   both models were scored example by example on examples in common: the paired tests
               of :mod:`map_bo.examples.paired`. Where the merge was chosen by the same examples,
               the p-value and the interval are those of the largest of all that could have been
               chosen.
``posterior``  the surrogate's joint posterior of both points: the merge was never measured, or
               not by example. It holds as far as the surrogate does, so what it promises counts for
               no more than what was measured (:func:`map_bo.loop.verdict.gain.most_counted`).
``values``     the measured values and the variances of their noise, without any pairing: that is
               cautious, as the noise of the same examples would cancel. Where the merge was chosen
               by these values, it is corrected for all that could have been chosen (Bonferroni).

Differences are gains: positive is better, whichever way the metric is. All p-values of a verdict
are corrected together (Holm), so it makes a false statement in at most 5 of 100 runs, as far as the
ground holds. An interval is that of its comparison alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist
from typing import Any, Literal

import torch
from torch import Generator, Tensor

from map_bo.data import Observations, directions, to_maximisation
from map_bo.errors import StoreError
from map_bo.examples.paired import (
    NORMAL_975,
    PairedDifference,
    compare,
    compare_sums,
    holm,
    largest_of,
    p_of_largest,
)
from map_bo.loop.verdict.gain import joint_draws, measured_blend, most_counted, value_draws
from map_bo.pareto.preferences import Preference
from map_bo.rng import child
from map_bo.scale import Scale, anchor_rows, same_points
from map_bo.space import CoefficientSpace
from map_bo.surrogates.links import as_fitted
from map_bo.surrogates.surrogate import SurrogateModel

__all__ = ["BLEND", "LEVEL", "OVERALL", "Comparison", "Merge", "Verdict", "judge"]

LEVEL = 0.05
"""Largest corrected p-value of a difference that is called one."""
BLEND = "uniform blend"
OVERALL = "overall"
"""Stands for the weighted sum of the metrics, in units of the scale."""

_DRAWS = 1000
_CLEAR = 1e-4
_KEEP = "keep the uniform blend"

Ground = Literal["examples", "posterior", "values"]
Judged = Literal["better", "worse", "same"]


@dataclass(frozen=True)
class Comparison:
    """A merge compared with another model on one metric.

    Attributes:
        merge: What the merge is called, such as ``"the chosen merge"``.
        competitor: ``"base"``, an expert, or ``"uniform blend"``.
        metric: A metric, or :data:`OVERALL`.
        gain: How much better the merge is: own unit, or units of the scale.
        lower: Lower end of its 95 % interval.
        upper: Upper end.
        p: Corrected p-value.
        ground: What it rests on; see the module.
        test: What the p-value comes from, in words.
        n: Examples in common; None without.
    """

    merge: str
    competitor: str
    metric: str
    gain: float
    lower: float
    upper: float
    p: float
    ground: Ground
    test: str
    n: int | None = None

    @property
    def judged(self) -> Judged:
        """``better``, ``worse``, or ``same`` where the two are not distinguishable."""
        if not self.p <= LEVEL:
            return "same"
        return "better" if self.gain > 0 else "worse"

    def __str__(self) -> str:
        """Return metric, gain and interval in words."""
        return f"{self.metric} ({_signed(self.gain)} [{_plain(self.lower)}, {_plain(self.upper)}])"


@dataclass(frozen=True)
class Merge:
    """A merge to judge.

    Attributes:
        name: What it is called, such as ``"the chosen merge"``.
        x: ``d`` coefficients.
        competitors: Names of the anchors to compare it with; None for all but itself.
    """

    name: str
    x: Tensor
    competitors: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Verdict:
    """What can be said of a merge; see the module.

    Attributes:
        comparisons: All comparisons, corrected together.
        candidates: How many measured merges the merge could have been among; 1 where it was not
            chosen by what it is tested on.
        where: What it is tested on, such as ``"the examples of the search"``.
        kept: Whether the choice is the uniform blend.
        expected: Whether the choice is another merge because that is expected to be better.
    """

    comparisons: tuple[Comparison, ...]
    candidates: int = 1
    where: str = "the search"
    kept: bool = False
    expected: bool = False

    def against(self, competitor: str, merge: str | None = None) -> tuple[Comparison, ...]:
        """Return the comparisons with one model, those of the metrics first."""
        return tuple(
            one
            for one in self.comparisons
            if one.competitor == competitor and merge in (None, one.merge)
        )

    @property
    def advice(self) -> str:
        """One sentence: whether the merge is worth its place beside the uniform blend."""
        found = self.against(BLEND)
        if not found:
            return "the uniform blend was not measured, so nothing was compared with it"
        overall = next((one for one in found if one.metric == OVERALL), found[0])
        if overall.judged == "better":
            return f"take {overall.merge}: {_compared(found)}"
        if overall.judged == "worse":
            return f"{_KEEP}: {overall.merge} is {_compared(found)}"
        if all(one.judged == "same" for one in found):
            if self.expected and overall.gain > 0:
                return (
                    f"{overall.merge} is expected to be better than the uniform blend "
                    f"({_signed(overall.gain)} {overall.metric}), but nothing here is "
                    "distinguishable from it: measure it, or keep the blend"
                )
            return f"{_KEEP}: nothing here is distinguishable from it"
        if all(one.judged != "worse" for one in found):
            return f"take {overall.merge}: {_compared(found)}"
        return (
            f"{_KEEP}, unless these tasks matter more than others: {overall.merge} is "
            f"{_compared(found)}"
        )

    def lines(self) -> list[str]:
        """Return the verdict in words: the advice, then one sentence per model."""
        said = [self.advice]
        pairs = dict.fromkeys((one.merge, one.competitor) for one in self.comparisons)
        for merge, competitor in pairs:
            found = self.against(competitor, merge)
            grounds = {one.ground for one in found}
            sure = " by the surrogate's posterior" if "posterior" in grounds else ""
            sure = " by values alone" if grounds == {"values"} else sure
            if not sure and competitor == BLEND and _compared(found) in said[0]:
                continue
            said.append(f"{merge} is {_compared(found)}{sure}")
        return said

    def __str__(self) -> str:
        """Return :meth:`lines`, one per line."""
        return "\n".join(self.lines())

    def describe(self) -> dict[str, Any]:
        """Return the verdict as plain data; :meth:`read` reads it back."""
        return {
            "advice": self.advice,
            "lines": self.lines(),
            "where": self.where,
            "candidates": self.candidates,
            "kept": self.kept,
            "expected": self.expected,
            "comparisons": [
                {key: _finite(value) for key, value in vars(one).items()} | {"judged": one.judged}
                for one in self.comparisons
            ],
        }

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Verdict:
        """Return a verdict from plain data.

        Raises:
            StoreError: When it is something else.
        """
        try:
            comparisons = []
            for one in data["comparisons"]:
                lower = -math.inf if one["lower"] is None else float(one["lower"])
                upper = math.inf if one["upper"] is None else float(one["upper"])
                comparisons.append(
                    Comparison(
                        str(one["merge"]),
                        str(one["competitor"]),
                        str(one["metric"]),
                        float(one["gain"]),
                        lower,
                        upper,
                        float(one["p"]),
                        one["ground"],
                        str(one["test"]),
                        None if one["n"] is None else int(one["n"]),
                    )
                )
            return cls(
                tuple(comparisons),
                int(data["candidates"]),
                str(data["where"]),
                bool(data["kept"]),
                bool(data["expected"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                f"a recorded verdict cannot be read: {error!r}",
                hint="see `map-bo check RUN`; if it was edited by hand, restore it from a copy",
            ) from error


def judge(
    merges: Sequence[Merge],
    seen: Observations,
    space: CoefficientSpace,
    scale: Scale,
    preference: Preference,
    *,
    generator: Generator,
    model: SurrogateModel | None = None,
    fitted: Observations | None = None,
    chosen_here: bool = True,
    where: str = "the search",
    kept: bool = False,
    expected: bool = False,
) -> Verdict:
    """Compare merges with the anchors that were measured: base, experts and uniform blend.

    Args:
        merges: What to judge.
        seen: Everything that was measured on the examples of the comparison.
        space: The coefficients.
        scale: The scale of the metrics.
        preference: The weights of :data:`OVERALL`.
        generator: Source of all randomness.
        model: The surrogate, where there is one.
        fitted: What it was fitted to.
        chosen_here: Whether the merges were chosen by these measurements.
        where: What they are called.
        kept: Whether the choice is the uniform blend.
        expected: Whether the choice is another merge because that is expected to be better.
    """
    desk = _Desk(seen, space, scale, preference, model, fitted, chosen_here, generator)
    found = [one for merge in merges for one in desk.comparisons(merge)]
    corrected = holm([one.p for one in found])
    return Verdict(
        tuple(replace(one, p=p) for one, p in zip(found, corrected, strict=True)),
        desk.candidates,
        where,
        kept,
        expected,
    )


@dataclass(frozen=True, eq=False)
class _Desk:
    """What the comparisons of a verdict have in common."""

    seen: Observations
    space: CoefficientSpace
    scale: Scale
    preference: Preference
    model: SurrogateModel | None
    fitted: Observations | None
    chosen_here: bool
    generator: Generator

    @property
    def candidates(self) -> int:
        """How many different points were measured that are no anchors; 1 where it matters not."""
        if not self.chosen_here:
            return 1
        anchor = anchor_rows(self.seen.X, self.space).any(0)
        rows = self.seen.X[~anchor & self.seen.measured.any(-1)]
        return max(1, len(torch.unique(rows, dim=0))) if len(rows) else 1

    @property
    def weights(self) -> Tensor:
        """``m`` weights per unit of each metric, larger is better: those of :data:`OVERALL`."""
        given = self.preference.weights
        names = [metric.name for metric in self.scale.metrics]
        weights = [given.get(name, 0.0) if given else 1.0 for name in names]
        shares = torch.tensor(weights, dtype=torch.float64)
        shares = self.scale.weights(shares / shares.sum())
        return shares / self.scale.width * self.scale.ranged

    def competitors(self) -> dict[str, int]:
        """Return the anchors that were measured: name -> row, the blend first."""
        anchors, rows = self.space.anchors(), anchor_rows(self.seen.X, self.space)
        rows = rows & self.seen.measured.any(-1)
        found: dict[str, int] = {}
        order = sorted(range(len(anchors)), key=lambda i: (anchors.kinds[i] != "blend", i))
        for i in order:
            if bool(rows[i].any()):
                found[anchors.names[i]] = int(rows[i].nonzero()[-1])
        return found

    def comparisons(self, merge: Merge) -> list[Comparison]:
        own = same_points(merge.x[None], self.seen.X, self.space)[0] & self.seen.measured.any(-1)
        row = int(own.nonzero()[-1]) if bool(own.any()) else None
        against = {
            name: at
            for name, at in self.competitors().items()
            if not bool(same_points(merge.x[None], self.seen.X[at : at + 1], self.space))
            and (merge.competitors is None or name in merge.competitors)
        }
        if not against:
            return []
        draws = self._promised(merge)
        found = []
        for name, at in against.items():
            pair = None
            if draws is not None:
                source = child(self.generator, "measured", merge.name, name)
                pair = draws - self._remeasured(at, source)
            found += self._with(merge.name, name, row, at, pair)
        return found

    def _promised(self, merge: Merge) -> Tensor | None:
        """Return draws of what the surrogate promises of a merge, ``count x m``, own units.

        A promise counts for no more than the best that was measured.
        """
        if self.model is None or self.fitted is None:
            return None
        source, X = child(self.generator, "posterior", merge.name), merge.x[None]
        draws = joint_draws(self.model, X, self.fitted, self.space, generator=source)[:, 0]
        blend, metrics = measured_blend(self.seen, self.space), self.scale.metrics
        if blend is None:
            return draws
        counted = torch.minimum(to_maximisation(draws, metrics), most_counted(self.seen, blend))
        return to_maximisation(counted, metrics)

    def _remeasured(self, at: int, source: Generator) -> Tensor:
        """Return draws of a measured row but for its noise, ``count x m``, own units."""
        rows = self.seen.measured.any(-1)
        noise = as_fitted(self.seen).Yvar[int(rows[:at].sum())].nan_to_num(0.0)
        return value_draws(self.seen.Y[at], noise.sqrt(), generator=source)

    def _with(
        self, merge: str, competitor: str, row: int | None, at: int, draws: Tensor | None
    ) -> list[Comparison]:
        signs = directions(self.scale.metrics)
        source = child(self.generator, "signs", merge, competitor)
        found: list[Comparison] = []
        for j, metric in enumerate(self.scale.metrics):
            own = None if row is None else self._by_example(metric.name, row, at)
            about = (merge, competitor, metric.name)
            if own is not None:
                found.append(self._examples(about, [own], float(signs[j]), source))
            elif draws is not None:
                found.append(_posterior(about, draws[:, j] * signs[j]))
            elif row is not None and bool((self.seen.measured[[row, at], j]).all()):
                found.append(self._values(about, row, at, signs * _one(j, signs)))
        weights = self.weights
        if len(found) == len(signs) > 1 and bool((weights != 0).any()):
            about, turned = (merge, competitor, OVERALL), weights * signs
            parts = None if row is None else self._weighted(row, at, turned)
            if parts is not None:
                found.append(self._examples(about, parts, None, source))
            elif draws is not None:
                found.append(_posterior(about, draws @ turned))
            elif row is not None:
                found.append(self._values(about, row, at, turned))
        return found

    def _column(self, metric: str, row: int) -> tuple[str, int] | None:
        """Return evaluator and column of a metric's outcomes in a row, where it is their mean."""
        for evaluator, outcomes in self.seen.examples[row].items():
            column = outcomes.columns(evaluator).get(metric)
            if column is not None and outcomes.means[column]:
                return evaluator, column
        return None

    def _by_example(self, metric: str, row: int, at: int) -> _Outcomes | None:
        """Return the outcomes of two rows on examples in common, ``n`` each."""
        mine, other = self._column(metric, row), self._column(metric, at)
        if mine is None or mine != other:
            return None
        evaluator, column = mine
        a, b = (self.seen.examples[i][evaluator].row()[:, column] for i in (row, at))
        both = torch.isfinite(a) & torch.isfinite(b)
        return _Outcomes(evaluator, column, a[both], b[both], both) if bool(both.any()) else None

    def _weighted(self, row: int, at: int, weights: Tensor) -> list[_Outcomes] | None:
        """Return the weighted outcomes of all metrics that count, by evaluator."""
        found: dict[str, _Outcomes] = {}
        for j, metric in enumerate(self.scale.metrics):
            if float(weights[j]) == 0:
                continue
            own = self._by_example(metric.name, row, at)
            if own is None:
                return None
            own = own.times(float(weights[j]))
            held = found.get(own.evaluator)
            if held is not None and not torch.equal(held.both, own.both):
                return None
            found[own.evaluator] = own if held is None else held.plus(own)
        return list(found.values())

    def _examples(
        self,
        about: tuple[str, str, str],
        parts: Sequence[_Outcomes],
        sign: float | None,
        source: Generator,
    ) -> Comparison:
        """Compare on examples: one metric of direction ``sign``, or a weighted sum (None)."""
        differences, count = [part.differences for part in parts], self.candidates

        def at(z: float) -> PairedDifference:
            if sign is None:
                return compare_sums(differences, z=z)
            return compare(parts[0].first, parts[0].second, z=z)

        found, turned = at(NORMAL_975), 1.0 if sign is None else sign
        p, test = found.p, found.test
        if count > 1 and about[1] != BLEND and count * p < _CLEAR:
            # Anything is clear of a model that is far off, and a bound tells it as well.
            found, p = at(NormalDist().inv_cdf(1 - 0.025 / count)), count * p
            test = f"{test}, one of {count}"
        elif count > 1:
            every = [self._candidates(part) for part in parts]
            largest = largest_of(every, draws=_DRAWS, generator=child(source, about[2]))
            found = at(max(NORMAL_975, float(largest.quantile(0.95))))
            p = max(p, p_of_largest([d / len(d) for d in differences], largest))
            test = f"{test}, largest of several"
        low, high = sorted((turned * found.lower, turned * found.upper))
        gain = turned * found.difference
        return Comparison(*about, gain, low, high, p, "examples", test, found.n)

    @cached_property
    def _dense(self) -> dict[str, Tensor]:
        """Outcomes by evaluator: ``K x size x k`` of the ``K`` rows that have some, else NaN."""
        found: dict[str, list[Tensor]] = {}
        for row in self.seen.examples:
            for name, outcomes in row.items():
                found.setdefault(name, []).append(outcomes.row().float())
        return {name: torch.stack(rows) for name, rows in found.items()}

    def _candidates(self, part: _Outcomes) -> Tensor:
        """Return the differences of all that could have been chosen, ``n x K``, 0 where unknown."""
        every = self._dense[part.evaluator][:, part.both]
        own = sum((weight * every[..., column] for column, weight in part.columns), torch.zeros(()))
        differences = (own - part.second.float()) / len(part.second)
        return differences.nan_to_num(0.0).mT

    def _values(
        self, about: tuple[str, str, str], row: int, at: int, weights: Tensor
    ) -> Comparison:
        """Compare two measured rows by the weighted sum of their values (``m`` weights)."""
        used = weights != 0
        gap = ((self.seen.Y[row] - self.seen.Y[at])[used] * weights[used]).sum()
        noise = (self.seen.Yvar[row] + self.seen.Yvar[at])[used] * weights[used].square()
        gain, error = float(gap), float(noise.sum().sqrt())
        count = self.candidates
        if math.isnan(error):  # the noise is not known, so anything is possible
            return Comparison(*about, gain, -math.inf, math.inf, 1.0, "values", "noise unknown")
        half = NormalDist().inv_cdf(1 - 0.025 / count) * error
        p = float(gain == 0)
        if error > 0:
            p = min(1.0, count * 2 * NormalDist().cdf(-abs(gain) / error))
        test = "normal" if count == 1 else f"normal, one of {count}"
        return Comparison(*about, gain, gain - half, gain + half, p, "values", test)


@dataclass(frozen=True, eq=False)
class _Outcomes:
    """Outcomes of two models on ``n`` examples of an evaluator."""

    evaluator: str
    column: int
    first: Tensor
    second: Tensor
    both: Tensor
    columns: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not self.columns:
            object.__setattr__(self, "columns", ((self.column, 1.0),))

    @property
    def differences(self) -> Tensor:
        return self.first - self.second

    def times(self, weight: float) -> _Outcomes:
        columns = tuple((column, share * weight) for column, share in self.columns)
        return replace(
            self, first=weight * self.first, second=weight * self.second, columns=columns
        )

    def plus(self, other: _Outcomes) -> _Outcomes:
        return replace(
            self,
            first=self.first + other.first,
            second=self.second + other.second,
            columns=(*self.columns, *other.columns),
        )


def _posterior(about: tuple[str, str, str], draws: Tensor) -> Comparison:
    """Compare by draws of the gain (``count``)."""
    low, high = draws.quantile(draws.new_tensor([0.025, 0.975])).tolist()
    more, less = int((draws > 0).sum()), int((draws < 0).sum())
    even = (len(draws) - more - less) / 2
    p = min(1.0, 2 * (1 + min(more, less) + even) / (1 + len(draws)))
    gain = float(draws.mean())
    return Comparison(*about, gain, low, high, p, "posterior", "posterior draws")


def _one(j: int, like: Tensor) -> Tensor:
    found = torch.zeros_like(like)
    found[j] = 1.0
    return found


def _compared(found: Iterable[Comparison]) -> str:
    """Return in words how a merge compares with one model."""
    found = list(found)
    name = f"the {found[0].competitor}" if found[0].competitor in ("base", BLEND) else None
    competitor = name or f"expert {found[0].competitor}"
    parts = []
    for judged, word in (("better", "better than"), ("worse", "worse than")):
        some = [str(one) for one in found if one.judged == judged]
        if some:
            parts.append(f"{word} {competitor} on {', '.join(some)}")
    same = [one.metric for one in found if one.judged == "same"]
    if not parts:
        return f"not distinguishable from {competitor} on any task"
    if same:
        parts.append(f"not distinguishable on {', '.join(same)}")
    return ", ".join(parts)


def _signed(value: float) -> str:
    return f"{'+' if value >= 0 else ''}{_plain(value)}"


def _plain(value: float) -> str:
    said = f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:.3f}"
    return re.sub(r"(?<!\d)0\.", ".", said)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
