"""The surrogate that chooses: the simplest candidate that predicts unseen evaluations best."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.models.model import FantasizeMixin
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.posteriors.posterior import Posterior
from gpytorch.distributions import MultitaskMultivariateNormal
from linear_operator.utils.errors import NotPSDError
from torch import Generator, Tensor

from map_bo.choice import handles_choice
from map_bo.data import Observations
from map_bo.errors import MapBoError, SurrogateError
from map_bo.rng import child
from map_bo.space import CoefficientSpace
from map_bo.surrogates.features import n_features, space_groups
from map_bo.surrogates.links import (
    LogitLink,
    as_fitted,
    check_enough,
    links_for,
    observed_on_link,
)
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.processes.hybrid import Hybrid
from map_bo.surrogates.processes.sparse import Sparse
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.quadratic_model import transformed
from map_bo.surrogates.surrogate import (
    PointCovariances,
    SampledFunctions,
    Surrogate,
    SurrogateModel,
    gaussian,
    stating_variances,
)
from map_bo.surrogates.validation import (
    LeavesOneOut,
    count_log_densities,
    log_densities,
    noise_covariance,
    promises_leave_one_out,
)

__all__ = ["Auto", "AutoModel", "Selection", "SideBySide", "leaving_out", "noise_matrices"]

_FEWEST = 8  # evaluations from which on scores decide, however few coefficients there are
_MANY = 8  # coefficients up to which few evaluations are enough for a hybrid
_QUADRATIC = 32  # coefficients up to which a quadratic's 561 weights are a matter of a second
_ALLOWANCE = 2.0  # nats over all evaluations that do not count as better
# What a numerical failure of a candidate's fit or validation may raise.
_FAILURES = (MapBoError, ArithmeticError, RuntimeError, ValueError, NotPSDError)


@dataclass(frozen=True)
class Selection:
    """Which candidate models a metric, and why.

    Attributes:
        metric: Name of the metric.
        chosen: Name of the candidate.
        reason: Why it was chosen.
        scores: Name and mean leave-one-out log predictive density (nats) of every candidate
            that could be fitted, in the order of the candidates.
        skipped: Name and reason of every candidate that could not.
    """

    metric: str
    chosen: str
    reason: str
    scores: tuple[tuple[str, float], ...]
    skipped: tuple[tuple[str, str], ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return the selection as plain data."""
        return {
            "metric": self.metric,
            "chosen": self.chosen,
            "reason": self.reason,
            "scores": dict(self.scores),
            "skipped": dict(self.skipped),
        }


class SideBySide(SurrogateModel, FantasizeMixin):
    """Independent metrics, each of them an output of one of several models.

    Args:
        parts: The models.
        columns: For each model the metrics that its outputs are, as positions; together a
            permutation of ``0 .. m-1``.
    """

    def __init__(self, parts: Sequence[SurrogateModel], columns: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.models = tuple(parts)
        self.parts = torch.nn.ModuleList(parts)  # so that torch knows them
        self.columns = tuple(tuple(held) for held in columns)
        place = {j: (p, i) for p, held in enumerate(self.columns) for i, j in enumerate(held)}
        self._places = [place[j] for j in range(len(place))]
        self.metrics = tuple(parts[p].metrics[i] for p, i in self._places)
        self.links = tuple(parts[p].links[i] for p, i in self._places)
        self._order = torch.tensor([j for held in self.columns for j in held]).argsort()

    @property
    def batch_shape(self) -> torch.Size:
        """Leading dimensions of the posterior; empty unless conditioned on batches."""
        return self.models[0].batch_shape

    @property
    def likelihood(self) -> None:
        """There is no common gpytorch likelihood; botorch only asks whether there is one."""
        return None

    def arranged(self, values: Sequence[Tensor], axis: int = -1) -> Tensor:
        """Return one tensor per part as one of all metrics, in their order along ``axis``."""
        return torch.cat(list(values), axis).index_select(axis, self._order)

    def link_mean(self, X: Tensor) -> Tensor:
        """Return the posterior mean on the link scale, ``n x m`` for ``n x d``."""
        return self.arranged([model.link_mean(X) for model in self.models])

    def posterior(  # type: ignore[override]
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> Posterior:
        """Return the joint Gaussian posterior at ``X`` (``... x q x d``) on the link scale.

        Args:
            X: Coefficients.
            output_indices: Which metrics; all by default.
            observation_noise: Add the typical noise of the training data, or the given
                variances (``... x q x m``, link scale).
            posterior_transform: Applied to the result.
        """
        if output_indices is not None:
            part = self.for_metrics(output_indices)
            return part.posterior(X, None, observation_noise, posterior_transform)
        if len(self.models) == 1:
            return self.models[0].posterior(
                X,
                observation_noise=observation_noise,
                posterior_transform=posterior_transform,
            )
        mvns = []
        for j, (p, i) in enumerate(self._places):
            noise = observation_noise
            if isinstance(noise, Tensor):
                noise = noise[..., j : j + 1]
            alone = self.models[p].one_metric(i).posterior(X, observation_noise=noise)
            mvns.append(gaussian(alone).distribution)
        shape = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
            *[mvn.batch_shape for mvn in mvns]
        )
        together = MultitaskMultivariateNormal.from_independent_mvns(
            [mvn.expand(shape) for mvn in mvns]
        )
        result = stating_variances(GPyTorchPosterior(together))
        return transformed(result, X, posterior_transform)

    def for_metrics(self, columns: Sequence[int]) -> SideBySide:
        """Return the model of some metrics alone."""
        return SideBySide(*self._held_for(columns))

    def _held_for(self, columns: Sequence[int]) -> tuple[list[SurrogateModel], list[list[int]]]:
        """Return the parts that are left for some metrics, and what their outputs are."""
        parts: list[SurrogateModel] = []
        places: list[list[int]] = []
        wanted = [self._places[j] for j in columns]
        for p, model in enumerate(self.models):
            held = [(j, i) for j, (part, i) in enumerate(wanted) if part == p]
            if held:
                parts.append(model.for_metrics([i for _, i in held]))
                places.append([j for j, _ in held])
        return parts, places

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> SideBySide:
        """Return the model that has also seen ``Y`` at ``X``, hyperparameters held.

        Args:
            X: ``... x n' x d`` coefficients.
            Y: ``... x n' x m`` values on the link scale.
            noise: ``... x n' x m`` variances of ``Y``; by default the typical one of the fit.
            **kwargs: Passed on to the parts.

        Raises:
            SurrogateError: When a part has to be fitted again to see more.
        """
        return SideBySide(self._conditioned(X, Y, noise, **kwargs), self.columns)

    def _conditioned(
        self, X: Tensor, Y: Tensor, noise: Tensor | None, **kwargs: Any
    ) -> list[SurrogateModel]:
        parts: list[SurrogateModel] = []
        for model, held in zip(self.models, self.columns, strict=True):
            own = None if noise is None else noise[..., list(held)]
            if not isinstance(model, FantasizeMixin):
                raise SurrogateError(
                    f"{type(model).__name__} cannot take further observations as it is",
                    hint="fit it again, or use quadratic, gp, hybrid, sparse or auto",
                )
            more = model.condition_on_observations(X, Y[..., list(held)], noise=own, **kwargs)
            assert isinstance(more, SurrogateModel)
            parts.append(more)
        return parts

    def joint(self, X: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (``q x m``) and covariance (``m x q x q``) of each metric at ``X``."""
        pairs = [model.joint(X) for model in self.models]
        mean = self.arranged([mean for mean, _ in pairs])
        return mean, self.arranged([covariance for _, covariance in pairs], 0)

    def covariances_with(self, points: Tensor) -> PointCovariances:
        """Return the posterior covariances of other points with ``points``, part by part."""
        return _ArrangedCovariances(self, points)

    def sample_functions(self, k: int, *, generator: Generator) -> SampledFunctions:
        """Draw ``k`` functions; those of metrics with explicit ones stay explicit."""
        if len(self.models) == 1:
            sources = [generator]
        else:
            sources = [child(generator, "functions", p) for p in range(len(self.models))]
        drawn = [
            model.sample_functions(k, generator=source)
            for model, source in zip(self.models, sources, strict=True)
        ]
        return _ArrangedFunctions(self, drawn)

    def misfit_variance(self) -> Tensor:
        """Return that of the parts (``m``, link scale)."""
        return self.arranged([model.misfit_variance() for model in self.models])


class _ArrangedCovariances(PointCovariances):
    def __init__(self, model: SideBySide, points: Tensor) -> None:
        self._model = model
        self._parts = [part.covariances_with(points) for part in model.models]

    def among(self) -> Tensor:
        return self._model.arranged([part.among() for part in self._parts], 0)

    def to(self, X: Tensor) -> tuple[Tensor, Tensor]:
        pairs = [part.to(X) for part in self._parts]
        cross, variance = (self._model.arranged([pair[i] for pair in pairs], 0) for i in (0, 1))
        return cross, variance


class _ArrangedFunctions(SampledFunctions):
    def __init__(self, model: SideBySide, parts: Sequence[SampledFunctions]) -> None:
        self._model, self._parts = model, parts
        self.explicit = all(part.explicit for part in parts)

    def __call__(self, X: Tensor) -> Tensor:
        return self._model.arranged([part(X) for part in self._parts])

    def each(self, X: Tensor, which: Tensor) -> Tensor:
        return self._model.arranged([part.each(X, which) for part in self._parts])


class AutoModel(SideBySide):
    """Independent metrics, each modelled by the candidate that was chosen for it.

    Args:
        parts: One model for each candidate that was chosen at all; they leave evaluations out.
        columns: For each part the metrics that its outputs are, as positions; together a
            permutation of ``0 .. m-1``, ascending within a part.
        selection: One selection per metric.
    """

    def __init__(
        self,
        parts: Sequence[SurrogateModel],
        columns: Sequence[Sequence[int]],
        selection: Sequence[Selection],
    ) -> None:
        super().__init__(parts, columns)
        self.selection = tuple(selection)

    def describe_selection(self) -> list[dict[str, Any]]:
        """Return the selection of every metric as plain data."""
        return [selection.describe() for selection in self.selection]

    def for_metrics(self, columns: Sequence[int]) -> AutoModel:
        """Return the model of some metrics alone."""
        return AutoModel(*self._held_for(columns), [self.selection[j] for j in columns])

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> AutoModel:
        """Return the model that has also seen ``Y`` at ``X``, hyperparameters and choice held.

        See :meth:`SideBySide.condition_on_observations`.
        """
        return AutoModel(self._conditioned(X, Y, noise, **kwargs), self.columns, self.selection)

    def leave_one_out(self) -> tuple[Tensor, Tensor]:
        """Return those of the chosen models, ``n x m`` each, link scale."""
        pairs = [model.leave_one_out() for model in leaving_out(self.models)]
        return self.arranged([mean for mean, _ in pairs]), self.arranged([v for _, v in pairs])

    def training_targets(self) -> tuple[Tensor, Tensor]:
        """Return those of the chosen models, ``n x m`` each, link scale."""
        pairs = [model.training_targets() for model in leaving_out(self.models)]
        return self.arranged([z for z, _ in pairs]), self.arranged([v for _, v in pairs])

    def noise_covariance(self) -> Tensor | None:
        """Return that of the chosen models, ``m x n x n``; None where all have none."""
        found = noise_matrices(self.models)
        return None if found is None else self.arranged(found, 0)


def noise_matrices(models: Sequence[SurrogateModel]) -> list[Tensor] | None:
    """Return the covariance of the noise of each model's rows; None where all are independent."""
    found = [noise_covariance(model) for model in models]
    if all(one is None for one in found):
        return None
    independent = [model.training_targets()[1].mT for model in leaving_out(models)]
    return [
        torch.diag_embed(variance) if one is None else one
        for one, variance in zip(found, independent, strict=True)
    ]


def leaving_out(models: Sequence[SurrogateModel]) -> list[LeavesOneOut]:
    """Return models that leave evaluations out as such.

    Raises:
        SurrogateError: When one of them does not.
    """
    found = [model for model in models if isinstance(model, LeavesOneOut)]
    if len(found) < len(models):
        names = sorted({type(m).__name__ for m in models if not isinstance(m, LeavesOneOut)})
        raise SurrogateError(
            f"{', '.join(names)} cannot leave evaluations out",
            hint="give it leave_one_out() and training_targets()",
        )
    return list(found)


def _scores(model: SurrogateModel, seen: Observations, targets: Tensor) -> Tensor:
    """Return leave-one-out log densities, ``n x m``: of the counts where all rows are counted.

    NaN where a metric was not measured.
    """
    measured = seen.measured
    densities = log_densities(model, targets)
    counted = [
        j
        for j, (metric, link) in enumerate(zip(seen.metrics, model.links, strict=True))
        if isinstance(link, LogitLink)
        and metric.kind == "proportion"
        and bool(torch.isfinite(seen.counts[measured[:, j], j]).all())
    ]
    if counted:
        ends = [(seen.metrics[j].lower, seen.metrics[j].upper) for j in counted]
        low, high = torch.tensor(ends, dtype=torch.float64).T
        n = seen.counts[:, counted]
        successes = (n * (seen.Y[:, counted] - low) / (high - low)).clamp_min(0.0)
        assert isinstance(model, LeavesOneOut)
        misfit = model.misfit_variance()
        densities = densities.clone()
        densities[:, counted] = count_log_densities(model, successes, n, misfit[counted], counted)
    return densities


@dataclass(frozen=True)
class Auto:
    """Settings of the surrogate that chooses among others, metric by metric.

    Every candidate is fitted to all data and scored by its mean leave-one-out log predictive
    density, all on the same targets. The first candidate (in their order, simplest first)
    that falls short of the best by no more than one standard error of the difference is taken
    (the one-standard-error rule: Hastie, Tibshirani & Friedman, *The Elements of Statistical
    Learning*, 2009, section 7.10), or by no more than 2 nats over all evaluations together, about
    what two more fitted hyperparameters gain by chance. Leave-one-out holds hyperparameters that
    every row had a say in, which flatters the candidates with many of them when rows are few:
    below 8 evaluations, and below ``per_coefficient`` for each coefficient, one candidate is
    taken whatever the scores: of given candidates the first that could be fitted.

    Of the default ones it is the hybrid up to eight coefficients: as good as the quadratic where
    that fits, and less far off where it does not. In more, a quadratic has hundreds of weights
    and its prior decides; there the process is taken (real merges of 12 and 16 experts, and of 2
    to 6 experts in 4 and 6 blocks: about a sixth less regret than the quadratic at 30
    evaluations).

    A covariance of the evaluations' noise goes to the candidates, whose densities are those of
    each evaluation given all others then, with what their noise tells of its own.

    Attributes:
        candidates: Name and settings, simplest first; by default quadratic (up to 32
            coefficients), hybrid and gp, and in spaces of more than eight coefficients with
            several per expert also sparse, with ``link``. All must use the links that ``link``
            stands for, and leave evaluations out.
        link: ``"auto"`` (logit, log, identity by the metric's kind) or ``"identity"``.
        per_coefficient: Evaluations for each coefficient from which on scores decide; ``None``
            for 4 up to eight coefficients and 3 beyond.
    """

    candidates: tuple[tuple[str, Surrogate], ...] = ()
    link: Literal["auto", "identity"] = "auto"
    per_coefficient: float | None = None
    leaves_one_out: ClassVar[bool] = True
    takes_partial_rows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        links_for((), kind=self.link)
        names = [name for name, _ in self.candidates]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise SurrogateError(
                f"candidates share a name: {', '.join(twice)}", hint="name each differently"
            )
        mute = [name for name, one in self.candidates if not promises_leave_one_out(one)]
        if mute:
            raise SurrogateError(
                f"candidates cannot be compared by leaving evaluations out: {', '.join(mute)}",
                hint="use quadratic, gp, hybrid or sparse as candidates, or a surrogate with "
                "leaves_one_out = True whose models have leave_one_out() and training_targets()",
            )

    @property
    def takes_choice(self) -> bool:
        """Whether all candidates handle a space with a choice; the default ones do."""
        return all(handles_choice(one) for _, one in self.candidates)

    def _candidates(self, space: CoefficientSpace) -> tuple[tuple[str, Surrogate], ...]:
        if self.candidates:
            return self.candidates
        blocks = space.d > _MANY and space.blocks > 1 and space.choice is None
        small = len(space_groups(space)) <= n_features(_QUADRATIC)
        return (
            *([("quadratic", Quadratic(link=self.link))] if small else []),
            ("hybrid", Hybrid(link=self.link)),
            ("gp", GP(link=self.link)),
            *([("sparse", Sparse(link=self.link))] if blocks else []),
        )

    def _fewest(self, d: int) -> int:
        """Return from how many evaluations on scores decide."""
        each = self.per_coefficient
        if each is None:
            each = 4.0 if d <= _MANY else 3.0
        return max(_FEWEST, math.ceil(each * d))

    def fit(self, seen: Observations, space: CoefficientSpace) -> AutoModel:
        """Fit all candidates to the evaluations that have each metric, and choose.

        Raises:
            SurrogateError: When fewer than two have one, or no candidate could be fitted.
        """
        check_enough(seen, "a surrogate")
        good = as_fitted(seen)
        links = links_for(seen.metrics, kind=self.link)
        targets, _ = observed_on_link(good, links)
        fitted: dict[str, tuple[SurrogateModel, Tensor]] = {}
        skipped: list[tuple[str, str]] = []
        for name, settings in self._candidates(space):
            try:
                model = settings.fit(seen, space)
                if model.links != links:
                    raise SurrogateError("its links differ, so its densities do not compare")
                densities = _scores(model, good, targets)
                if not bool(torch.isfinite(densities[good.measured]).all()):
                    raise SurrogateError("its leave-one-out densities are not finite")
            except _FAILURES as error:
                reason = error.message if isinstance(error, MapBoError) else str(error)
                skipped.append((name, f"{type(error).__name__}: {reason}"))
            else:
                fitted[name] = model, densities
        if not fitted:
            raise SurrogateError(
                "no candidate could be fitted: "
                + "; ".join(f"{name} ({reason})" for name, reason in skipped),
                hint="choose one surrogate by name to see its error in full",
            )
        fewest = self._fewest(space.d)
        safest = "" if self.candidates else "gp" if space.d > _MANY else "hybrid"
        selection = [
            self._select(metric.name, j, fitted, tuple(skipped), fewest, safest)
            for j, metric in enumerate(seen.metrics)
        ]
        parts, columns = [], []
        for name, (model, _) in fitted.items():
            held = [j for j, choice in enumerate(selection) if choice.chosen == name]
            if held:
                parts.append(model.for_metrics(held))
                columns.append(held)
        return AutoModel(parts, columns, selection)

    @staticmethod
    def _select(
        metric: str,
        j: int,
        fitted: dict[str, tuple[SurrogateModel, Tensor]],
        skipped: tuple[tuple[str, str], ...],
        fewest: int,
        safest: str = "",
    ) -> Selection:
        densities = {name: values[:, j] for name, (_, values) in fitted.items()}
        if any(bool(values.isnan().any()) for values in densities.values()):
            densities = {name: values[~values.isnan()] for name, values in densities.items()}
        scores = {name: float(values.mean()) for name, values in densities.items()}
        n = len(next(iter(densities.values())))
        best = max(scores, key=lambda name: scores[name])
        chosen = next(iter(scores))
        if n < fewest:
            chosen = safest if safest in scores else chosen
            reason = f"{n} evaluations are fewer than {fewest}: scores do not decide yet"
        elif len(scores) == 1:
            reason = "the only candidate that could be fitted"
        else:
            for chosen, values in densities.items():
                gap = densities[best] - values
                tolerance = max(float(gap.std()) / math.sqrt(n), _ALLOWANCE / n)
                if chosen == best or float(gap.mean()) <= tolerance:
                    break
            if chosen == best:
                reason = "highest leave-one-out log density"
            else:
                reason = f"simpler, and within {tolerance:.3g} nats of the best, {best}"
        return Selection(metric, chosen, reason, tuple(scores.items()), skipped)
