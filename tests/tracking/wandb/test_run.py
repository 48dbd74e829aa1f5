from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from map_bo.tracking.wandb.run import WandbRun, has_key, wandb_run_of

CONFIG = {
    "tree": {
        "tracking": {
            "local": {"_target_": "map_bo.loop.mirrors.Local"},
            "wandb": {
                "_target_": "map_bo.tracking.wandb.mirror.Wandb",
                "project": "merging",
                "entity": None,
                "group": "study",
                "prefix": "",
            },
        }
    }
}


def state(directory: Path, **content: Any) -> Path:
    (directory / "wandb.json").write_text(json.dumps({"id": "abc", "events": 3, **content}))
    return directory


def test_the_configuration_says_where_and_the_file_says_which(tmp_path: Path) -> None:
    assert wandb_run_of(state(tmp_path), CONFIG) == WandbRun("abc", "merging", None, "study")


def test_a_configuration_of_version_0_1_is_understood(tmp_path: Path) -> None:
    text = json.dumps(CONFIG).replace("map_bo.tracking.wandb.mirror", "map_bo.tracking.wandb")
    assert wandb_run_of(state(tmp_path), json.loads(text)) == wandb_run_of(tmp_path, CONFIG)


def test_what_was_used_counts_more_than_what_was_asked_for(tmp_path: Path) -> None:
    told = {"project": "p", "entity": "team", "group": None, "prefix": "a/", "offline": True}
    found = wandb_run_of(state(tmp_path, **told), CONFIG)
    assert found == WandbRun("abc", "p", "team", None, "a/", True)
    assert wandb_run_of(state(tmp_path, **told)) == found  # a run made in Python


@pytest.mark.parametrize(
    "content", ["", "{", "null", "[1]", "{}", '{"id": "abc"}', '{"id": "abc", "events": 0}']
)
def test_no_wandb_run(tmp_path: Path, content: str) -> None:
    assert wandb_run_of(tmp_path, CONFIG) is None
    (tmp_path / "wandb.json").write_text(content)
    assert wandb_run_of(tmp_path, CONFIG) is None


def test_a_disabled_run_is_nowhere(tmp_path: Path) -> None:
    assert wandb_run_of(state(tmp_path, mode="disabled"), CONFIG) is None
    assert wandb_run_of(state(tmp_path), {"tree": {"tracking": None}}) is None


def test_a_key_may_stand_in_several_places(tmp_path: Path) -> None:
    nothing = {"NETRC": str(tmp_path / "netrc")}
    assert not has_key(nothing)
    (tmp_path / "netrc").write_text("machine own.example login user password secret\n")
    assert not has_key(nothing)
    assert has_key({**nothing, "WANDB_BASE_URL": "https://own.example"})
    assert has_key({**nothing, "WANDB_API_KEY": "x"})
    assert has_key({**nothing, "WANDB_IDENTITY_TOKEN_FILE": "x"})
