from __future__ import annotations

from pathlib import Path

import pytest

from map_bo.errors import CheckpointError
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.export.model import digest_all
from tests.merging.hard_checkpoints import hard_family, opened, threads


@pytest.mark.parametrize("count", [1, 3])
def test_each_is_computed_once_and_kept(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = opened(*hard_family(tmp_path))
    expected = [open_checkpoint(c.source).digest() for c in (base, *experts.values())]
    with threads(count):
        digest_all([base, *experts.values()])
    monkeypatch.setattr(Checkpoint, "read", lambda *arguments: pytest.fail("read again"))
    assert [c.digest() for c in (base, *experts.values())] == expected


def test_a_file_that_has_gone_is_told(tmp_path: Path) -> None:
    base, experts = opened(*hard_family(tmp_path))
    (tmp_path / "code" / "model.safetensors").unlink()
    with threads(3), pytest.raises(CheckpointError, match="cannot be read"):
        digest_all([base, *experts.values()])
