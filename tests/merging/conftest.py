"""What several tests of merging files start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.merging.hard_checkpoints import hard_family
from tests.merging.refusing import Family, Refused, refusing


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return hard_family(tmp_path / "in", shards=2)


@pytest.fixture
def refused(family: Family, tmp_path: Path) -> Refused:
    return refusing(tmp_path, family)
