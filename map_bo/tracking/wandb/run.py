"""Where a run is on Weights & Biases, as its directory and its record tell; nothing is asked."""

from __future__ import annotations

import json
import netrc
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

__all__ = ["STATE", "WandbRun", "has_key", "mirrored", "wandb_run_of"]

STATE = "wandb.json"
"""The file in a run directory by which a run goes on with its wandb run."""

_HOST = "https://api.wandb.ai"
_TARGET = "map_bo.tracking.wandb.mirror.Wandb"


@dataclass(frozen=True)
class WandbRun:
    """A run on Weights & Biases.

    Attributes:
        id: Its id.
        project: Its project.
        entity: The user or team it belongs to; ``None`` for the default of the key.
        group: The group it belongs to.
        prefix: What stands before the names of all that it logged.
        offline: Whether it was recorded offline, in part at least: such a run is on the server
            only once ``wandb sync`` has uploaded it.
    """

    id: str
    project: str
    entity: str | None = None
    group: str | None = None
    prefix: str = ""
    offline: bool = False


def wandb_run_of(directory: Path, config: Mapping[str, Any] | None = None) -> WandbRun | None:
    """Return the wandb run that mirrors the run in ``directory``; ``None`` where none does.

    Args:
        directory: The run's directory. Its ``wandb.json`` says what was used.
        config: What the run recorded as its configuration, for what that file does not say.
    """
    try:
        state = json.loads((directory / STATE).read_text(encoding="utf-8"))
        told = {**_settings(config or {}), **state}
        if told.get("mode") == "disabled" or not told.get("events"):
            return None
        return WandbRun(
            id=str(told["id"]),
            project=str(told["project"]),
            entity=told.get("entity") or None,
            group=told.get("group") or None,
            prefix=str(told.get("prefix") or ""),
            offline=bool(told.get("offline")),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    tree = config.get("tree")
    group = tree.get("tracking") if isinstance(tree, Mapping) else None
    for node in (group if isinstance(group, Mapping) else {}).values():
        if isinstance(node, Mapping) and node.get("_target_") == _TARGET:
            return dict(node)
    return {}


def mirrored(directory: Path) -> bool:
    """Return whether the wandb run of the run in ``directory`` was told all of it."""
    try:
        return bool(json.loads((directory / STATE).read_text(encoding="utf-8"))["whole"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def has_key(environment: Mapping[str, str]) -> bool:
    """Return whether there is a key for the server.

    It stands in ``WANDB_API_KEY``, or in the netrc file (``NETRC``, else ``~/.netrc``) under the
    host of ``WANDB_BASE_URL``.
    """
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(environment.get("WANDB_BASE_URL") or _HOST).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        path = Path(environment.get("NETRC") or "~/.netrc").expanduser()
        return netrc.netrc(str(path)).authenticators(host) is not None
    return False
