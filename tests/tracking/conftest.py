from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a key; whatever wandb writes beside the run goes to a folder of the test."""
    place = tmp_path / "home"
    place.mkdir()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(place / name.lower()))
    monkeypatch.setenv("NETRC", str(place / "netrc"))
    return place
