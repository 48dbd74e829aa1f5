from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from map_bo.rng import make_generator
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.sampler import Sampler, SeesThroughSurrogate, looking_through
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.quadratic import Quadratic
from tests.contracts.sampler_contract import SPACES, Mistaken, some_seen
from tests.contracts.smallest_surrogate import Plain

CONFIGURATIONS = Path(__file__).parents[2] / "conf" / "sampler"
SIZES = {"restarts": 1, "raw_samples": 16, "steps": 5, "mc_samples": 8, "targets": 32, "pool": 64}


def smaller(sampler: Any) -> Any:
    """Return a sampler in a size that takes a tenth of a second."""
    names = {field.name for field in dataclasses.fields(sampler)}
    sizes = {name: value for name, value in SIZES.items() if name in names}
    if "acquisition" in names:
        sizes["acquisition"] = smaller(sampler.acquisition)
    return dataclasses.replace(sampler, **sizes)


def configured() -> dict[str, Sampler]:
    found = {}
    for path in sorted(CONFIGURATIONS.glob("*.yaml")):
        config = OmegaConf.load(path)
        if "_target_" in config:
            found[path.stem] = instantiate(config, _convert_="all")
    return found


SEEING = {
    name: smaller(one)
    for name, one in configured().items()
    if isinstance(one, SeesThroughSurrogate)
}


def test_every_sampler_that_looks_through_a_posterior_is_known() -> None:
    assert set(SEEING) == {
        "adaptive",
        "bins",
        "bins_published",
        "front_uncertainty",
        "hvs_nei",
        "integrated_variance",
        "qlogehvi",
        "qlognehvi",
        "qlognparego",
        "thompson",
        "ucb",
    }


@pytest.mark.parametrize("name", sorted(set(SEEING) - {"bins_published"}))
def test_it_looks_through_the_surrogate_of_the_run(name: str) -> None:
    sampler = SEEING[name]
    assert sampler.surrogate is None
    assert looking_through(sampler, Quadratic()).surrogate == Quadratic()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", SEEING)
def test_runs_with_surrogates_that_disagree_propose_differently(name: str) -> None:
    box, generator = SPACES["box"], make_generator(3)
    seen, sampler = some_seen(box, 14), SEEING[name]
    n = 8 if name.startswith("bins") else 1  # of the same chances, in other bins
    if name == "bins_published":  # it brings the published fit: see the contract
        sampler = dataclasses.replace(sampler, surrogate=None)
    right, wrong, own = (
        looking_through(one, surrogate).propose(seen, box, n, generator=generator)
        for one, surrogate in (
            (sampler, Quadratic()),
            (sampler, Mistaken()),
            (sampler.with_surrogate(Quadratic()), Mistaken()),
        )
    )
    assert not torch.allclose(right, wrong, atol=1e-3)
    assert torch.equal(own, right)


@pytest.mark.parametrize("name", sorted(set(SEEING) - {"bins"}))
def test_the_smallest_surrogate_is_enough(name: str) -> None:
    box = SPACES["box"]
    sampler = SEEING[name].with_surrogate(Plain())
    X = sampler.propose(some_seen(box, 11), box, 2, generator=make_generator(3))
    assert box.check(X).shape == (2, 3)


def test_outside_of_a_run_it_is_the_default_surrogate_of_a_run() -> None:
    box, seen, generator = SPACES["box"], some_seen(SPACES["box"], 9), make_generator(3)
    alone = SEEING["adaptive"].propose(seen, box, 1, generator=generator)
    within = looking_through(SEEING["adaptive"], Auto()).propose(seen, box, 1, generator=generator)
    assert torch.equal(alone, within)


def test_the_default_sampler_is_the_same_in_python_and_configuration() -> None:
    assert configured()["adaptive"] == Adaptive()
