from __future__ import annotations

import pytest

from tests.loop.bowls import Bowls


@pytest.fixture
def bowls() -> Bowls:
    return Bowls()
