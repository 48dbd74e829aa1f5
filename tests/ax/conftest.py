from __future__ import annotations

import pytest

from map_bo.samplers.baselines.ax_library import import_ax


@pytest.fixture(autouse=True, scope="session")
def _ax() -> None:
    """Importing Ax warns; here it is done once and in silence."""
    import_ax("a test")
