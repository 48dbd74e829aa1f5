"""The operators as they are configured in ``conf/operator``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.searchable import SearchableOperator
from map_bo.plain import to_plain

FOLDER = Path(__file__).parents[2] / "conf" / "operator"
SEARCHABLE = {
    path.stem: config
    for path in sorted(FOLDER.glob("*.yaml"))
    if "search" in (config := OmegaConf.load(path))
}


def built(config: Any, **changes: Any) -> SearchableOperator:
    OmegaConf.set_struct(config, True)  # as on the command line
    merged = OmegaConf.merge(config, changes)
    operator: SearchableOperator = instantiate(merged, _convert_="all")
    return operator


def test_there_are_some() -> None:
    assert {"ties", "dare", "della", "breadcrumbs", "magnitude", "consensus"} <= set(SEARCHABLE)


@pytest.mark.parametrize("name", SEARCHABLE)
def test_settings_are_searched_by_name_or_within_bounds(name: str) -> None:
    config = SEARCHABLE[name]
    plain = built(config)
    assert plain == type(plain)(**plain_settings(plain))
    for setting, bounds in plain.searchable.items():
        assert built(config, search=[setting]).search == {setting: bounds}
        assert built(config, search=setting).search == {setting: bounds}
        assert built(config, search={setting: [0.1, 0.2]}).search == {setting: (0.1, 0.2)}


# A choice has no defaults: its file is composed of the others.
ALONE = [path for path in sorted(FOLDER.glob("*.yaml")) if "defaults" not in OmegaConf.load(path)]


def test_only_the_choice_is_composed_of_others() -> None:
    assert {path.stem for path in FOLDER.glob("*.yaml")} - {path.stem for path in ALONE} == {
        "choice"
    }


@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
def test_every_file_says_the_defaults_of_its_class(path: Path) -> None:
    config = OmegaConf.load(path)
    operator = instantiate(config, _convert_="all")
    assert isinstance(operator, MergeOperator)
    given = {"dare_ties": {"joining": "elect"}, "karcher": {"of": "weights"}}
    assert operator == type(operator)(**given.get(path.stem, {}))


def plain_settings(operator: SearchableOperator) -> dict[str, Any]:
    return dict(to_plain(operator)["fields"])
