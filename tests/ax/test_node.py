from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

from map_bo.ax.database import read_experiment
from map_bo.ax.experiment import experiment_of
from map_bo.ax.observations import observations_of
from map_bo.data import Metric, Observations
from map_bo.errors import SamplerError, SettingsError
from map_bo.loop.reading import load_state
from map_bo.ordering import Ordering
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.baselines.ax_library import quiet
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.space import CoefficientSpace
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic
from tests.ax.exported import Bounded, exported, load, own_client, same, storage, unfinished
from tests.loop.bowls import Bowls


@dataclass(frozen=True)
class Spy:
    """A sampler that keeps what it was asked."""

    asked: list[tuple[Observations, CoefficientSpace, Tensor | None]]
    reference: dict[str, float] | None = None

    def above(self, reference: dict[str, float]) -> Spy:
        return Spy(self.asked, reference)

    def propose(
        self,
        seen: Observations,
        space: CoefficientSpace,
        n: int,
        *,
        pending: Tensor | None = None,
        generator: Generator,
    ) -> Tensor:
        self.asked.append((seen, space, pending))
        point = 0.1 * len(self.asked)
        return torch.full((n, space.d), point, dtype=torch.float64)


class Complaints(logging.Handler):
    """Keeps what a logger says."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def strategy(*arguments: Any, **settings: Any) -> Any:
    from map_bo.ax import node

    return node.strategy(*arguments, **settings)


@pytest.fixture(autouse=True)
def _no_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    from ax.storage.json_store import registry

    from map_bo.ax import node  # noqa: F401

    for name in ("CORE_ENCODER_REGISTRY", "CORE_DECODER_REGISTRY"):
        table = getattr(registry, name)
        before = dict(table)
        for key in before:
            monkeypatch.setitem(table, key, before[key])


@pytest.mark.slow
@pytest.mark.parametrize("box", [{}, {"sum_at_most": 1.2}, {"simplex": True}])
def test_a_run_goes_round_and_on(tmp_path: Path, box: dict[str, Any]) -> None:
    """Run -> database -> Ax's client, our node, saved, loaded -> observations."""
    problem = Bounded(box=box)
    run = unfinished(tmp_path / "run", problem=problem, sampler=Adaptive())
    file = exported(tmp_path / "run", tmp_path / "ax.db")
    with storage(file) as url:
        client = load(url, "run")
        assert len(client._experiment.trials) == 8
        client.set_generation_strategy(strategy(surrogate=Quadratic()))
        ((index, first),) = client.get_next_trials(1).items()
        (row,) = run.ask(1)
        assert list(first.values()) == run.state.X[row].tolist()  # as the run itself would
        client.complete_trial(index, {"near_a": (0.5, 0.1), "far_from_b": (1.0, 0.2)})
        several = client.get_next_trials(2)
        client = load(url, "run")  # from the file, with its strategy
        (node,) = client._generation_strategy._nodes
        assert node.sampler == Adaptive()  # type: ignore[attr-defined]
        several |= client.get_next_trials(1)
        points = torch.tensor([list(point.values()) for point in [first, *several.values()]])
        known = torch.cat([run.state.X[:8], points.double()])
        assert len(torch.unique(known.round(decimals=6), dim=0)) == len(known)
        problem.space.check(points)
    found = observations_of(read_experiment(file), problem.space, problem.metrics)
    assert same(found.observations.select(range(7)), run.state.seen)
    assert found.observations.X[7].tolist() == list(first.values())
    assert found.observations.Yvar[7].tolist() == pytest.approx([0.01, 0.04])
    assert [left.trial for left in found.left_out] == [7, *several]


@pytest.mark.slow
def test_ax_recognises_what_it_saved(tmp_path: Path) -> None:
    unfinished(tmp_path / "run")
    file = exported(tmp_path / "run", tmp_path / "ax.db")
    handler = Complaints(logging.WARNING)
    logger = logging.getLogger("ax.storage.sqa_store.save")
    with storage(file) as url:
        client = load(url, "run")
        client.set_generation_strategy(strategy())
        logger.addHandler(handler)
        try:
            client.get_next_trials(3)
        finally:
            logger.removeHandler(handler)
    assert handler.told == []


def test_it_is_told_what_was_seen_and_what_waits(tmp_path: Path) -> None:
    asked: list[Any] = []
    run = unfinished(tmp_path / "run", sampler=Sobol())
    file = exported(tmp_path / "run", tmp_path / "ax.db")
    from ax.generation_strategy.generation_strategy import GenerationStrategy

    from map_bo.ax.node import MapBoNode

    with storage(file) as url, quiet():
        client = load(url, "run")
        client._storage_config, client._db_settings = None, None  # a spy cannot be stored
        node = MapBoNode(Spy(asked))
        client.set_generation_strategy(GenerationStrategy(name="spied", nodes=[node]))
        client.mark_trial_abandoned(client.attach_trial({"c_a": 0.7, "c_b": 0.7}))
        client.get_next_trials(2)
    (seen, space, first), (_, _, second) = asked
    state, expected = load_state(tmp_path / "run")
    assert space == expected
    by_name = Ordering.of(expected, run.state.seen.metrics)  # samplers see the order of the names
    assert same(seen.select(range(7)), by_name.observations(run.state.seen))
    assert seen.X[7].tolist() == [0.7, 0.7]  # abandoned: a failure, not a point that waits
    assert seen.failures[7] == "abandoned in Ax"
    assert first is not None
    assert second is not None
    assert torch.equal(first, state.X[[7]])
    assert second.tolist() == [state.X[7].tolist(), [0.1, 0.1]]


def test_an_experiment_of_axs_own_is_searched(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[Any] = []
    with quiet():
        client = own_client(parameter_constraints=["a + 2 * b <= 2"])
        client.configure_optimization("near_a, -far_from_b", ["near_a >= 0.25", "far_from_b <= 3"])
        from map_bo.ax.node import MapBoNode

        node = MapBoNode(Spy(asked), seed=3, name="ours")
        from ax.generation_strategy.generation_strategy import GenerationStrategy

        client.set_generation_strategy(GenerationStrategy(name="s", nodes=[node]))
        client.complete_trial(client.attach_trial({"a": 0.5, "b": 0.5}), {"near_a": 0.5})
        for _ in range(2):
            client.get_next_trials(1)
    assert node._sampler.reference == {"near_a": 0.25, "far_from_b": 3.0}  # type: ignore[attr-defined]
    (seen, space, _), _ = asked
    assert seen.metrics == (
        Metric("far_from_b", "min", "unbounded"),
        Metric("near_a", kind="unbounded"),
    )
    assert space.names == ("a", "b")
    ((weights, bound, equality),) = [(c.weights, c.bound, c.equality) for c in space.constraints]
    assert (weights, bound, equality) == ((1.0, 2.0), 2.0, False)
    told = [record.getMessage() for record in caplog.records if record.name.startswith("map_bo")]
    assert told == ["trial 0 is left out: it has no value for far_from_b"]  # once


def test_what_was_changed_in_ax_after_the_export_counts(tmp_path: Path) -> None:
    from ax.api.utils.instantiation.from_string import optimization_config_from_string
    from ax.core.parameter import RangeParameter
    from ax.core.parameter_constraint import ParameterConstraint

    from map_bo.ax.node import MapBoNode

    unfinished(tmp_path)
    experiment, node = experiment_of(tmp_path), MapBoNode(Sobol())
    with quiet():
        parameter = experiment.parameters["c_a"]
        assert isinstance(parameter, RangeParameter)
        parameter.update_range(lower=0.0, upper=0.5)
        order = ParameterConstraint(inequality="c_a <= c_b")
        experiment.search_space.add_parameter_constraints([order])
        config = optimization_config_from_string("-far_from_b")
        experiment.optimization_config = config
        node.update_generator_state(experiment, experiment.lookup_data())
        point = node.get_next_candidate([])
    assert node._space.names == ("a", "b")
    assert node._space.upper == (0.5, 1.0)
    assert float(point["c_a"]) <= min(0.5, float(point["c_b"]))  # type: ignore[arg-type]
    assert node._metrics == (Metric("far from b", "min", "loss"),)
    assert bool(node._space.contains(node._seen.X).all())
    assert len(node._seen) < 7


def test_space_and_metrics_can_be_told() -> None:
    asked: list[Any] = []
    problem = Bowls()
    from ax.generation_strategy.generation_strategy import GenerationStrategy

    from map_bo.ax.node import MapBoNode

    space = CoefficientSpace(("a", "b"), (0.0, 0.0), (1.0, 1.0), importance=(1.0, 2.0))
    with quiet():
        client = own_client()
        node = MapBoNode(Spy(asked), space=space, metrics=problem.metrics)
        client.set_generation_strategy(GenerationStrategy(name="s", nodes=[node]))
        client.get_next_trials(1)
    assert asked[0][1] == space
    assert asked[0][0].metrics == tuple(sorted(problem.metrics, key=lambda metric: metric.name))


def test_it_follows_a_node_of_ax() -> None:
    from ax.adapter.registry import Generators
    from ax.generation_strategy.generation_node import GenerationNode
    from ax.generation_strategy.generation_strategy import GenerationStrategy
    from ax.generation_strategy.generator_spec import GeneratorSpec
    from ax.generation_strategy.transition_criterion import MinTrials

    from map_bo.ax.node import MapBoNode

    with quiet():
        client = own_client()
        sobol = GenerationNode(
            name="Sobol",
            generator_specs=[GeneratorSpec(Generators.SOBOL, generator_kwargs={"seed": 0})],
            transition_criteria=[MinTrials(threshold=2, transition_to="MapBoNode")],
        )
        nodes = [sobol, MapBoNode(Sobol())]
        client.set_generation_strategy(GenerationStrategy(name="both", nodes=nodes))
        for _ in range(3):
            for index in client.get_next_trials(1):
                client.complete_trial(index, {"near_a": 0.5, "far_from_b": 1.0})
    trials = client._experiment.trials.values()
    used = [trial.generator_runs[0]._generation_node_name for trial in trials]
    assert used == ["Sobol", "Sobol", "MapBoNode"]


def test_a_strategy_survives_json(tmp_path: Path) -> None:
    from ax.api.client import Client
    from ax.generation_strategy.generation_strategy import GenerationStrategy
    from ax.generation_strategy.transition_criterion import MinTrials

    from map_bo.ax.node import MapBoNode, register

    space, metrics = Bowls().space, Bowls().metrics
    sampler = Adaptive(acquisition=FrontUncertainty(reference={"near a": 0.0, "far from b": 3.0}))
    with quiet():
        client = own_client()
        criteria = [MinTrials(threshold=50, transition_to="later")]
        nodes = [
            MapBoNode(sampler, seed=7, space=space, metrics=metrics, transition_criteria=criteria),
            MapBoNode(name="later"),
        ]
        register()
        client.set_generation_strategy(GenerationStrategy(name="two", nodes=nodes))
        client.save_to_json_file(str(tmp_path / "ax.json"))
        again = Client.load_from_json_file(str(tmp_path / "ax.json"))
        node, later = again._generation_strategy._nodes
        assert later.name == "later"
        assert node.sampler == sampler  # type: ignore[attr-defined]
        assert node.seed == 7  # type: ignore[attr-defined]
        assert node.space == space  # type: ignore[attr-defined]
        assert node.metrics == metrics  # type: ignore[attr-defined]
        assert [criterion.threshold for criterion in node.transition_criteria] == [50]  # type: ignore[attr-defined]
        before, after = client.get_next_trials(1), again.get_next_trials(1)
    assert list(before.values()) == list(after.values())


@dataclass(frozen=True)
class Mine(Sobol):
    """A sampler that is not of map_bo."""


class Nameless:
    """A sampler that plain data cannot say."""

    propose = Sobol.propose


def test_a_sampler_of_ones_own_is_read_by_those_who_trust_its_package(tmp_path: Path) -> None:
    from ax.api.client import Client

    from map_bo.ax.node import MapBoNode, register

    file = str(tmp_path / "ax.json")
    with quiet():
        client = own_client()
        client.set_generation_strategy(strategy(Mine(anchors=False)))
        client.save_to_json_file(file)
        try:
            with pytest.raises(SettingsError, match="tests is not a package"):
                Client.load_from_json_file(file)
            register(trust=["tests"])
            again = Client.load_from_json_file(file)
        finally:
            register()
    [node] = again._generation_strategy._nodes
    assert isinstance(node, MapBoNode)
    assert node.sampler == Mine(anchors=False)


def test_a_sampler_that_plain_data_cannot_say_is_not_stored() -> None:
    with quiet():
        client = own_client()
        client.set_generation_strategy(strategy(Nameless()))
        with pytest.raises(SettingsError, match="cannot be written as plain data"):
            client._to_json_snapshot()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("integer", "is not a range of real numbers"),
        ("log", "is not a range of real numbers"),
        ("choice", "is not a range of real numbers"),
        ("weighted", "weighted objective or outcome constraints"),
        ("constrained", "weighted objective or outcome constraints"),
    ],
)
def test_what_we_do_not_search_is_refused(change: str, message: str) -> None:
    from ax.api.client import Client
    from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig

    parameter: Any = RangeParameterConfig(name="a", bounds=(0.1, 1.0), parameter_type="float")
    if change == "integer":
        parameter = RangeParameterConfig(name="a", bounds=(0, 9), parameter_type="int")
    elif change == "log":
        parameter = RangeParameterConfig(
            name="a", bounds=(0.1, 1.0), parameter_type="float", scaling="log"
        )
    elif change == "choice":
        parameter = ChoiceParameterConfig(name="a", values=[1.0, 2.0, 3.0], parameter_type="float")
    with quiet():
        client = Client()
        client.configure_experiment([parameter])
        client.configure_optimization(
            "2 * x + y" if change == "weighted" else "x, y",
            ["z >= 1"] if change == "constrained" else None,
        )
        client.set_generation_strategy(strategy())
        with pytest.raises(SamplerError, match=message):
            client.get_next_trials(1)


def test_an_experiment_without_objective_is_refused() -> None:
    from ax.core.data import Data
    from ax.core.experiment import Experiment

    from map_bo.ax.node import MapBoNode

    with quiet():
        experiment = Experiment(own_client()._experiment.search_space, "none")
        with pytest.raises(SamplerError, match="has no objective"):
            MapBoNode().update_generator_state(experiment, Data())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_axs_own_strategy_goes_on_with_a_run(tmp_path: Path) -> None:
    unfinished(tmp_path / "run", rows=10)
    file = exported(tmp_path / "run", tmp_path / "ax.db")
    with storage(file) as url:
        client = load(url, "run")
        used = []
        for _ in range(4):  # it may begin with Sobol points of its own
            ((index, point),) = client.get_next_trials(1).items()
            client.complete_trial(index, {"near_a": (0.5, 0.1), "far_from_b": 1.0})
            node = client._experiment.trials[index].generator_runs[0]._generation_node_name
            used.append(node)
            if node == "MBM":
                break
        assert used[-1] == "MBM", used
        client = load(url, "run")
        assert client._experiment.trials[index].arms[0].parameters == point
        summary = client.summarize()
        assert {"near_a", "far_from_b", "c_a", "c_b"} <= set(summary.columns)
    found = observations_of(read_experiment(file), Bowls().space, Bowls().metrics)
    assert list(point.values()) == found.observations.X[-1].tolist()


@pytest.mark.slow
def test_importing_it_is_silent_and_registers_nothing() -> None:
    code = """
import logging
import map_bo.ax.node
from ax.storage.json_store.registry import CORE_DECODER_REGISTRY
print("MapBoNode" in CORE_DECODER_REGISTRY, logging.root.manager.disable)
map_bo.ax.node.register()
print(CORE_DECODER_REGISTRY["MapBoNode"].__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "0", "MapBoNode"], done.stderr
    assert done.stderr == ""


def test_logging_and_warnings_of_the_user_stay(tmp_path: Path) -> None:
    unfinished(tmp_path / "run")
    logger, filters = logging.getLogger("ax"), list(warnings.filters)
    before = (logger.handlers, logger.propagate, logger.level)
    read_experiment(exported(tmp_path / "run", tmp_path / "ax.db"))
    assert (logger.handlers, logger.propagate, logger.level) == before
    assert list(warnings.filters) == filters


def test_the_sampler_looks_through_the_surrogate_that_it_is_given() -> None:
    from map_bo.ax.node import MapBoNode

    def through(*arguments: Any, **settings: Any) -> Any:
        node = MapBoNode(*arguments, **settings)
        stored = MapBoNode.deserialize_init_args(MapBoNode.serialize_init_args(node))
        assert stored["surrogate"] == node.surrogate
        experiment = own_client()._experiment
        node.update_generator_state(experiment, experiment.lookup_data())
        return node._sampler

    with quiet():
        assert through() == Adaptive(surrogate=Auto())
        assert through(surrogate=GP()) == Adaptive(surrogate=GP())
        own = Adaptive(surrogate=Quadratic())
        assert through(own, surrogate=GP()) == own
        assert through(Sobol(), surrogate=GP()) == Sobol()
