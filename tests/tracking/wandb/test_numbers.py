from __future__ import annotations

import torch

from map_bo.data import Metric, Observations
from map_bo.loop.run import Run
from map_bo.space import CoefficientSpace
from map_bo.tracking.codec import encode_metric, encode_observations
from map_bo.tracking.jsonl import MemoryStore
from map_bo.tracking.store import Event
from map_bo.tracking.wandb.numbers import Numbers
from tests.loop.bowls import Bowls, quick


def test_imported_observations_are_counted_among_the_evaluations() -> None:
    metric, numbers = Metric("m"), Numbers()
    space = CoefficientSpace.box(("a", "b")).describe()
    numbers.of(Event("created", {"space": space, "metrics": [encode_metric(metric)]}))
    found = Observations(torch.rand(3, 2), torch.rand(3, 1), (metric,))
    data = {"indices": [0, 1, 2], "observations": encode_observations(found), "source": {}}
    assert numbers.of(Event("imported", data)) == {"evaluation": 3, "imported": 3}
    one = {"index": 3, "observation": encode_observations(found.select([0]))}
    assert numbers.of(Event("observed", one))["evaluation"] == 4


def test_nodes_of_a_nested_run_have_names_of_their_own() -> None:
    metric, numbers = Metric("m"), Numbers()
    space = CoefficientSpace.box(("a", "b")).describe()
    created = {"space": space, "metrics": [encode_metric(metric)]}
    numbers.of(Event("created", created))
    assert numbers.of(Event("measured", {"names": ["m"]})) == {"nested/data_sets": 1}
    assert numbers.of(Event("measured", {"names": ["m"]})) == {"nested/data_sets": 2}

    def node(kind: str, data: object) -> dict[str, float]:
        return numbers.of(Event("node", {"node": "0.1", "kind": kind, "data": data}))

    assert node("created", created) == {}
    one = Observations(torch.rand(1, 2), torch.rand(1, 1), (metric,))
    found = node("observed", {"index": 0, "observation": encode_observations(one)})
    assert found["nested/0.1/evaluation"] == 1
    assert found["nested/0.1/metric/m"] == float(one.Y[0, 0])
    assert "evaluation" not in found


def test_a_proposal_shows_the_scores_of_the_fit_it_was_chosen_by() -> None:
    scores = {"n": 5, "metrics": {"m": {"log_density": -1.5, "coverage": 0.8, "pit": [1, 2]}}}
    found = Numbers().of(Event("proposed", {"X": [[0.5]], "seconds": 0.1, "surrogate": scores}))
    assert found["surrogate/round/metrics/m/log_density"] == -1.5
    assert found["surrogate/round/n"] == 5
    assert not [name for name in found if "pit" in name]


def test_an_extension_counts_the_points_of_its_front_among_the_evaluations() -> None:
    store, numbers = MemoryStore(), Numbers()
    Run(Bowls(), quick(8), store).drive()
    Run(Bowls(), quick(11), store).drive()
    told = [(event.kind, numbers.of(event)) for event in store.read()]
    [extended] = [found for kind, found in told if kind == "extended"]
    assert extended == {"settings/budget": 11, "evaluation": 8}
    assert [found["evaluation"] for kind, found in told if kind == "observed"][-1] == 9
    assert [found["verification"] for kind, found in told if kind == "verified"] == [1, 2, 1, 2]
    assert numbers.created["settings"]["budget"] == numbers.summary["budget"] == 11


def test_rows_that_are_topped_up_show_their_new_values() -> None:
    metric, numbers = Metric("m"), Numbers()
    space = CoefficientSpace.box(("a", "b")).describe()
    numbers.of(Event("created", {"space": space, "metrics": [encode_metric(metric)]}))
    one = Observations(torch.rand(1, 2), torch.rand(1, 1), (metric,))
    data = {"index": 0, "observation": encode_observations(one), "parts": [["m", 10, 30]]}
    assert numbers.of(Event("scored", data))["examples/topped up"] == 20
    found = numbers.of(Event("scored", {**data, "parts": [["m", 30, 35], ["n", 0, 5]]}))
    assert found == {"examples/topped up": 30, "metric/m": float(one.Y[0, 0])}
    assert numbers.of(Event("scored", {"index": 0, "parts": [["m", 35, 40]], "reason": "x"})) == {}
