from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from map_bo.app.jobs import RENAMED
from map_bo.ax.plain import from_plain, to_plain
from map_bo.errors import SamplerError
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.samplers.posterior.hypervolume import QLogNEHVI
from map_bo.surrogates.quadratic import Quadratic

SAMPLERS = [
    path
    for path in sorted((Path(__file__).parents[2] / "conf" / "sampler").glob("*.yaml"))
    if ("sampler", path.stem) not in RENAMED
]


@pytest.mark.parametrize(
    "value",
    [
        Adaptive(),
        Adaptive(acquisition=FrontUncertainty(reference={"a b": -0.5, "c": 1e-17})),
        QLogNEHVI(surrogate=Quadratic(), initial=3),
        Sobol(anchors=False),
        [1, (2.5, None), {"x": "y"}],
    ],
)
def test_settings_survive(value: Any) -> None:
    assert from_plain(json.loads(json.dumps(to_plain(value)))) == value


@pytest.mark.parametrize("file", SAMPLERS, ids=lambda path: path.stem)
def test_every_sampler_of_the_configuration_can_be_stored(file: Path) -> None:
    made = instantiate(OmegaConf.load(file), _convert_="all")
    assert repr(from_plain(json.loads(json.dumps(to_plain(made))))) == repr(made)


@dataclass(frozen=True)
class Mine:
    size: int = 1


@pytest.mark.parametrize("value", [Mine(), Adaptive(blocks=Mine()), object(), Sobol])  # type: ignore[arg-type]
def test_what_is_not_ours_is_refused(value: object) -> None:
    with pytest.raises(SamplerError, match="cannot be stored in an Ax database"):
        to_plain(value)


@pytest.mark.parametrize(
    "data",
    [
        {"class": "os:system", "fields": {}},
        {"class": "map_bo.nowhere:Nothing", "fields": {}},
        {"class": "map_bo.rng:make_generator", "fields": {"seed": 1}},
        {"class": "map_bo.samplers.designs.space_filling:Sobol", "fields": {"anchor": True}},
        {"fields": {}},
    ],
)
def test_a_file_cannot_name_anything_else(data: dict[str, object]) -> None:
    with pytest.raises(SamplerError, match="cannot be built"):
        from_plain(data)
