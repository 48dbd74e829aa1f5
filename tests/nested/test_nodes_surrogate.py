from __future__ import annotations

import pytest
import torch

from map_bo.loop.settings import Settings
from map_bo.nested.nodes import Seeded
from map_bo.nested.optimize import optimize_nested
from map_bo.nested.run import NestedRun
from map_bo.nested.settings import Nested
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


def through(settings: Settings, **how: object) -> dict[str, tuple[set[str], str]]:
    """Return for each node what its proposals were made through, and its front was solved on."""
    nested = Nested(stages=2, inform=True, **how)  # type: ignore[arg-type]
    store = MemoryStore()
    NestedRun(Hills(), settings, nested, store).drive()
    proposals: dict[str, set[str]] = {}
    fronts: dict[str, str] = {}
    for event in store.read():
        if event.kind != "node":
            continue
        node, kind, data = event.data["node"], event.data["kind"], event.data["data"]
        if kind == "proposed" and "surrogate" in data:
            proposals.setdefault(node, set()).add(data["surrogate"]["settings"])
        elif kind == "front":
            fronts[node] = data["surrogate"]["settings"]
    return {node: (proposals.get(node, set()), front) for node, front in fronts.items()}


@pytest.mark.slow
def test_every_node_looks_through_the_surrogate_of_the_run_and_what_was_measured_below() -> None:
    found = through(quick(sampler=SMALL), refine=2)
    assert set(found) == {"0", "1", "root", "refine"}
    informed = f"Informed({Quadratic()!r})"
    assert found == {node: ({informed}, informed) for node in found}


@pytest.mark.slow
def test_a_surrogate_of_the_samplers_own_is_informed_too() -> None:
    found = through(quick(18, sampler=Adaptive(SMALL, surrogate=GP())))
    own, of_run = f"Informed({GP()!r})", f"Informed({Quadratic()!r})"
    assert {front for _, front in found.values()} == {of_run}
    assert set.union(*(proposals for proposals, _ in found.values())) == {own}


@pytest.mark.slow
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
