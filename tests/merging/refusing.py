"""Merging files into a folder where that is refused: with a way out, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from map_bo.errors import CheckpointError, MapBoError, MergeError
from map_bo.merging.export.model import merge_checkpoints
from tests.merging.hard_checkpoints import everything

Family = tuple[Path, dict[str, Path]]
Refused = Callable[..., MapBoError]

C = {"math": 0.5, "code": 0.25, "chat": 0.5}


def merge(family: tuple[Any, Mapping[str, Any]], out: Path, **settings: Any) -> Path:
    """Merge a base and its experts, with coefficients for those of `hard_family`."""
    settings = {"coefficients": C, "progress": False, **settings}
    return merge_checkpoints(*family, out=out, **settings)


def refusing(folder: Path, family: Family) -> Refused:
    """Return what merges into a folder below new ones and expects an error."""

    def check(message: str, **settings: Any) -> MapBoError:
        inputs = settings.pop("family", family)
        out = settings.pop("out", folder / "new" / "folder" / "m")
        before = everything(folder)
        with pytest.raises((MergeError, CheckpointError), match=message) as caught:
            merge(inputs, out, **settings)
        assert everything(folder) == before
        assert caught.value.hint
        return caught.value

    return check
