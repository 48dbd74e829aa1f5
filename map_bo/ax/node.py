"""Our samplers as nodes of Ax's generation strategies. Importing this imports Ax."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch

from map_bo.ax.experiment import KEY
from map_bo.ax.names import Names
from map_bo.ax.observations import LeftOut, names_in, observations_of, weights_in
from map_bo.data import Metric, Observations
from map_bo.errors import SamplerError
from map_bo.plain import from_plain, to_plain
from map_bo.rng import child, make_generator
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.baselines.ax_library import import_ax, quiet
from map_bo.samplers.posterior.driven import with_reference
from map_bo.samplers.sampler import Sampler, looking_through, proposed
from map_bo.scale import same_points
from map_bo.space import CoefficientSpace, LinearConstraint
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.surrogate import Surrogate
from map_bo.tracking.codec import decode_metric, encode_metric

import_ax("map_bo.ax.node")

from ax.core.data import Data  # noqa: E402
from ax.core.experiment import Experiment  # noqa: E402
from ax.core.generator_run import GeneratorRun  # noqa: E402
from ax.core.parameter import (  # noqa: E402
    FixedParameter,
    Parameter,
    ParameterType,
    RangeParameter,
)
from ax.core.types import TParameterization  # noqa: E402
from ax.generation_strategy.external_generation_node import (  # noqa: E402
    ExternalGenerationNode,
)
from ax.generation_strategy.generation_strategy import GenerationStrategy  # noqa: E402
from ax.generation_strategy.transition_criterion import TransitionCriterion  # noqa: E402

__all__ = ["MapBoNode", "register", "strategy"]

_log = logging.getLogger(__name__)


class MapBoNode(ExternalGenerationNode):
    """A node that asks one of our samplers for the next point.

    In an experiment that was exported from a run it knows the run's space, metrics and seed, and
    with the run's sampler and surrogate it proposes what the run itself would. In any other it
    takes the space from the search space and the metrics, as unbounded ones, from the objective;
    objective thresholds become the sampler's reference point.

    Args:
        sampler: The sampler; the default one if left out.
        surrogate: The surrogate of the run, that the sampler looks through unless it has its own;
            the default one if left out.
        seed: Seed of its generator; by default the run's, or 0.
        space: The space, where it says more than the search space (experts, importance).
        metrics: The metrics, where they say more than the objective (kinds and bounds).
        name: Name of the node.
        transition_criteria: When the strategy goes on to another node; see Ax.
    """

    trusted: ClassVar[Collection[str]] = ()
    """Packages whose samplers a database may name; Ax has no other place for it."""

    def __init__(
        self,
        sampler: Sampler | None = None,
        *,
        surrogate: Surrogate | None = None,
        seed: int | None = None,
        space: CoefficientSpace | None = None,
        metrics: Sequence[Metric] | None = None,
        name: str = "MapBoNode",
        transition_criteria: Sequence[TransitionCriterion] | None = None,
    ) -> None:
        # Samplers never repeat a point, and ask for the same one when they are asked again.
        super().__init__(
            name=name, should_deduplicate=False, transition_criteria=transition_criteria
        )
        self.sampler: Sampler = Adaptive() if sampler is None else sampler
        self.surrogate = surrogate
        self.seed = seed
        self.space = space
        self.metrics = None if metrics is None else tuple(metrics)
        self._told: set[LeftOut] = set()

    def update_generator_state(self, experiment: Experiment, data: Data) -> None:
        """Read what was seen from the experiment; see :class:`ExternalGenerationNode`.

        Raises:
            SamplerError: When the search space or the objective is of a kind we do not search.
        """
        kept = experiment._properties.get(KEY) or {}
        with quiet():
            self._space = self.space or _space_of(experiment, kept)
            self._metrics = self.metrics or _metrics_of(experiment, kept)
            self._names = names_in(experiment, self._space, self._metrics)
            through = looking_through(self.sampler, self.surrogate or Auto())
            self._sampler = _with_reference(through, experiment, self._metrics, self._names)
        found = observations_of(experiment, self._space, self._metrics, data=data)
        self._seen: Observations = found.observations
        seed = kept.get("seed") if self.seed is None else self.seed
        self._generator = child(make_generator(int(seed or 0)), "propose")
        waits = {
            trial.index for trial in experiment.trials.values() if not trial.status.is_terminal
        }
        for left in found.left_out:
            if left.trial not in waits and left not in self._told:
                self._told.add(left)
                _log.warning("trial %d is left out: %s", left.trial, left.reason)

    def get_next_candidate(self, pending_parameters: list[TParameterization]) -> TParameterization:
        """Return the next point; see :class:`ExternalGenerationNode`."""
        names, d = self._names.parameters, self._space.d
        rows = [[float(point[name]) for name in names] for point in pending_parameters]  # type: ignore[arg-type]
        waiting = torch.tensor(rows, dtype=torch.float64).reshape(-1, d)
        if len(self._seen):
            # Ax counts abandoned trials among those that wait; here they are failures.
            waiting = waiting[~same_points(waiting, self._seen.X, self._space).any(-1)]
        points, _ = proposed(  # as the run itself would
            self._sampler,
            self._seen,
            self._space,
            1,
            pending=waiting if len(waiting) else None,
            generator=self._generator,
        )
        return dict(zip(names, points[0].tolist(), strict=True))

    def _gen(self, *args: Any, **kwargs: Any) -> GeneratorRun:
        generated = super()._gen(*args, **kwargs)
        # Ax puts an integer here, and then cannot match what it saved with what it holds.
        self.fit_time_since_gen = 0.0
        return generated

    @classmethod
    def serialize_init_args(cls, obj: Any) -> dict[str, Any]:
        """Return the settings of a node as plain data.

        Raises:
            SettingsError: When plain data cannot say its sampler.
        """
        return {
            "sampler": to_plain(obj.sampler),
            "surrogate": to_plain(obj.surrogate),
            "seed": obj.seed,
            "space": None if obj.space is None else obj.space.describe(),
            "metrics": None if obj.metrics is None else [encode_metric(m) for m in obj.metrics],
            "name": obj.name,
            "transition_criteria": list(obj.transition_criteria),
        }

    @classmethod
    def deserialize_init_args(
        cls,
        args: dict[str, Any],
        decoder_registry: Any = None,
        class_decoder_registry: Any = None,
    ) -> dict[str, Any]:
        """Return the arguments of the constructor from :meth:`serialize_init_args`.

        Raises:
            SettingsError: When the sampler is not known and its package not trusted, see
                :func:`register`.
        """
        from ax.storage.json_store.decoder import object_from_json

        registries = {}
        if decoder_registry is not None and class_decoder_registry is not None:
            registries = {
                "decoder_registry": decoder_registry,
                "class_decoder_registry": class_decoder_registry,
            }
        space, metrics = args["space"], args["metrics"]
        return {
            "sampler": from_plain(args["sampler"], trust=cls.trusted),
            # version 0.1 stored none
            "surrogate": from_plain(args.get("surrogate"), trust=cls.trusted),
            "seed": args["seed"],
            "space": None if space is None else CoefficientSpace.from_description(space),
            "metrics": None if metrics is None else [decode_metric(metric) for metric in metrics],
            "name": args["name"],
            "transition_criteria": object_from_json(args["transition_criteria"], **registries),
        }


def register(*, trust: Collection[str] = ()) -> None:
    """Tell Ax's JSON and SQL storage how to write and read :class:`MapBoNode`.

    Call it before a strategy that holds such a node is saved or loaded.

    Args:
        trust: Packages whose samplers a database may name; see :func:`map_bo.plain.from_plain`.
    """
    MapBoNode.trusted = frozenset(trust)
    from ax.storage.json_store.registry import CORE_DECODER_REGISTRY, CORE_ENCODER_REGISTRY

    CORE_ENCODER_REGISTRY[MapBoNode] = lambda node: {
        "__type": "MapBoNode",
        **MapBoNode.serialize_init_args(node),
    }
    CORE_DECODER_REGISTRY["MapBoNode"] = MapBoNode


def strategy(sampler: Sampler | None = None, **settings: Any) -> GenerationStrategy:
    """Return a generation strategy of one :class:`MapBoNode`, which Ax can store.

    Args:
        sampler: The sampler; the default one if left out.
        **settings: Further arguments of the node.
    """
    register()
    return GenerationStrategy(name="map_bo", nodes=[MapBoNode(sampler, **settings)])


def _bound(parameter: Parameter, end: Literal["lower", "upper"]) -> float:
    if isinstance(parameter, FixedParameter):
        return float(parameter.value)  # type: ignore[arg-type]
    assert isinstance(parameter, RangeParameter)
    return float(parameter.lower if end == "lower" else parameter.upper)


def _space_of(experiment: Experiment, kept: Mapping[str, Any]) -> CoefficientSpace:
    """Return the search space, with the names, experts and importances of the run it was."""
    parameters = list(experiment.parameters.values())
    for parameter in parameters:
        if isinstance(parameter, FixedParameter) and isinstance(parameter.value, int | float):
            continue
        if (
            not isinstance(parameter, RangeParameter)
            or parameter.parameter_type != ParameterType.FLOAT
            or parameter.log_scale
            or parameter.logit_scale
        ):
            raise SamplerError(
                f"parameter {parameter.name!r} is not a range of real numbers on a linear scale",
                hint="give it a lower and an upper bound, as for every coefficient",
            )
    names = tuple(parameter.name for parameter in parameters)
    space = CoefficientSpace(
        names,
        tuple(_bound(parameter, "lower") for parameter in parameters),
        tuple(_bound(parameter, "upper") for parameter in parameters),
        tuple(
            LinearConstraint(
                tuple(constraint.constraint_dict.get(name, 0.0) for name in names),
                constraint.bound,
                constraint.is_equality,
            )
            for constraint in experiment.search_space.parameter_constraints
        ),
    )
    if list(names) != kept.get("parameter_names"):
        return space
    run = CoefficientSpace.from_description(kept["space"])
    return replace(run, lower=space.lower, upper=space.upper, constraints=space.constraints)


def _metrics_of(experiment: Experiment, kept: Mapping[str, Any]) -> tuple[Metric, ...]:
    """Return the metrics of the objective, as the run knew them where it did."""
    config = experiment.optimization_config
    if config is None:
        raise SamplerError(
            "the experiment has no objective", hint="call client.configure_optimization first"
        )
    if config.objective.is_scalarized_objective or config.outcome_constraints:
        raise SamplerError(
            "the experiment has a weighted objective or outcome constraints, which the samplers of "
            "map_bo do not support",
            hint="name the metrics one by one: client.configure_optimization('a, -b')",
        )
    run = dict(zip(kept.get("metric_names", ()), kept.get("metrics", ()), strict=True))
    weights = weights_in(experiment)
    ordered = [name for name in run if name in weights]
    ordered += [name for name in weights if name not in run]
    return tuple(
        decode_metric(run[name])
        if name in run
        else Metric(name, "min" if weights[name] < 0 else "max", "unbounded")
        for name in ordered
    )


def _with_reference(
    sampler: Sampler, experiment: Experiment, metrics: tuple[Metric, ...], names: Names
) -> Sampler:
    """Return the sampler with the objective thresholds as its reference point, if all are given."""
    config = experiment.optimization_config
    bounds = {
        threshold.metric_names[0]: float(threshold.bound)
        for threshold in getattr(config, "objective_thresholds", ())
        if not threshold.relative
    }
    if set(bounds) != set(names.metrics):
        return sampler
    own = {metric.name: bounds[name] for metric, name in zip(metrics, names.metrics, strict=True)}
    return with_reference(sampler, own)
