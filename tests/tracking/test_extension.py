from __future__ import annotations

from typing import Any

import pytest

from map_bo.errors import StoreError
from map_bo.tracking.extension import check_extension, with_extension


def change(before: Any, now: Any) -> dict[str, Any]:
    return {"from": before, "to": now}


def test_settings_in_force_and_the_configuration_agree() -> None:
    tree = {"loop": {"budget": 10, "batch": 2}, "tracking": {"local": {}}, "seed": 0}
    created = {"settings": {"budget": 10, "seed": 0}, "config": {"tree": tree, "cwd": "/"}}
    data = {
        "settings": {"budget": change(10, 16)},
        "config": {
            "tracking": change({"local": {}}, {}),
            "loop.asynchronous": change(None, True),
        },
        "reopens": True,
    }
    found = with_extension(created, data)
    assert found["settings"] == {"budget": 16, "seed": 0}
    assert found["config"]["tree"] == {
        "loop": {"budget": 16, "batch": 2, "asynchronous": True},
        "tracking": {},
        "seed": 0,
    }
    assert found["config"]["cwd"] == "/"
    assert tree["loop"] == {"budget": 10, "batch": 2}, "what was recorded is not touched"


@pytest.mark.parametrize("config", [None, {}, {"tree": None}, {"tree": {}}])
def test_a_run_without_a_configuration_has_settings_alone(config: Any) -> None:
    data = {"settings": {"retries": change(1, 3)}, "config": {}, "reopens": False}
    found = with_extension({"settings": {}, "config": config}, data)
    assert found == {"settings": {"retries": 3}, "config": config}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"settings": [], "config": {}, "reopens": False},
        {"settings": {"budget": 12}, "config": {}, "reopens": False},
        {"settings": {"budget": {"to": 12}}, "config": {}, "reopens": False},
        {"settings": {}, "config": None, "reopens": False},
        {"settings": {}, "config": {}, "reopens": 1},
    ],
)
def test_data_of_another_form_are_refused(data: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="an extension of the run holds"):
        check_extension(data)
