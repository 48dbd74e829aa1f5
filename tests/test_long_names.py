"""Names that no file can have are refused as files that are not there."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from map_bo.errors import MapBoError
from map_bo.loop.reading import load_result, read_runs
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.operators.mergekit.recipes import from_mergekit
from map_bo.operators.recipes import merge_again
from map_bo.operators.statistics.statistics import load_statistics
from map_bo.tracking.jsonl import JsonlStore
from tests.fuzz.readers import CORPUS


@pytest.mark.parametrize("name", ["a" * 300, "~nobody-is-called-so", "x/" + "a" * 300])
@pytest.mark.parametrize(
    "read",
    [
        load_result,
        open_checkpoint,
        load_statistics,
        from_mergekit,
        lambda name: merge_again(name, "out"),
        lambda name: JsonlStore.open(Path(name)),
        lambda name: read_runs([Path(name)], beside=Path()),
    ],
)
def test_a_name_that_no_file_can_have_is_refused(
    name: str, read: Callable[[str], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MapBoError):
        read(name)


def test_a_recipe_that_names_such_a_model_is_read() -> None:
    recipe = yaml.safe_load((CORPUS / "mergekit" / "long_name" / "mergekit.yaml").read_text())
    assert len(recipe["base_model"]) > 255
    with suppress(MapBoError):
        from_mergekit(recipe)
