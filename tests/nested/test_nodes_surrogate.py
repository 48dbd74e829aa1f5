from __future__ import annotations

from typing import Any

import pytest
import torch

from map_bo.loop.settings import Settings
from map_bo.nested.nodes import Seeded
from map_bo.nested.optimize import optimize_nested
from map_bo.nested.run import NestedRun
from map_bo.nested.settings import Nested
from map_bo.plain import identity_of, name_of
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.samplers.sampler import Sampler, looking_through
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic
from map_bo.tracking.jsonl import MemoryStore
from tests.contracts.smallest_surrogate import Plain
from tests.nested.hills import Hills, options, quick

SMALL = FrontUncertainty(restarts=1, raw_samples=16, mc_samples=8, steps=5, preferences=6, draws=2)
POINTS = torch.tensor([[0.1, 0.2, 0.3]], dtype=torch.float64)


def through(settings: Settings, **how: object) -> dict[str, tuple[Any, Any, set[str]]]:
    """Return for each node the sampler and the surrogate that it recorded, and what chose."""
    nested = Nested(stages=2, inform=True, **how)  # type: ignore[arg-type]
    store = MemoryStore()
    NestedRun(Hills(), settings, nested, store).drive()
    events = [event.data for event in store.read() if event.kind == "node"]
    fits: dict[str, set[str]] = {}
    for event in events:
        if event["kind"] == "proposed" and "surrogate" in event["data"]:
            fits.setdefault(event["node"], set()).add(event["data"]["surrogate"]["settings"])
    return {
        event["node"]: (
            event["data"]["settings"]["sampler"],
            event["data"]["settings"]["surrogate"],
            fits.get(event["node"], set()),
        )
        for event in events
        if event["kind"] == "created"
    }


def test_every_node_looks_through_the_surrogate_of_the_run_and_what_was_measured_below() -> None:
    found = through(quick(sampler=SMALL), refine=2)
    assert set(found) == {"0", "1", "root", "refine"}
    for _, surrogate, fits in found.values():
        assert name_of(surrogate) == "Informed"
        assert surrogate["fields"]["surrogate"] == identity_of(Quadratic())
        assert fits <= {f"Informed({Quadratic()!r})"}
    assert any(fits for *_, fits in found.values())


def test_a_surrogate_of_the_samplers_own_is_informed_too() -> None:
    found = through(quick(18, sampler=Adaptive(SMALL, surrogate=GP())))
    for sampler, surrogate, fits in found.values():
        assert surrogate["fields"]["surrogate"] == identity_of(Quadratic())
        own = sampler["fields"].get("sampler", sampler)["fields"]["surrogate"]
        assert name_of(own) == "Informed"
        assert own["fields"]["surrogate"] == identity_of(GP())
        assert fits <= {f"Informed({GP()!r})"}
    assert any(fits for *_, fits in found.values())


def test_the_smallest_surrogate_carries_a_nested_run() -> None:
    result = optimize_nested(
        Hills(),
        20,
        nested=Nested(stages=2, promote="surrogate"),
        progress=False,
        tracking="none",
        **options(surrogate=Plain()),
    )
    assert len(result.front) > 0
    assert result.choose({"a": 1.0}).x.shape == (4,)


@pytest.mark.parametrize("sampler", [SMALL, Sobol()], ids=["posterior", "design"])
def test_seeds_hand_the_surrogate_on(sampler: Sampler) -> None:
    seeded = looking_through(Seeded(POINTS, sampler), GP())
    assert isinstance(seeded, Seeded)
    assert seeded.sampler == looking_through(sampler, GP())
    assert torch.equal(seeded.points, POINTS)
