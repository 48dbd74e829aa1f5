"""The wandb run of a run, by its directory and its record alone; no server is contacted."""

from __future__ import annotations

import netrc
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from map_bo.foreign import read_json
from map_bo.moved import current

__all__ = ["STATE", "WandbRun", "has_key", "is_mirrored", "wandb_run_of"]

STATE = "wandb.json"
"""The file in a run directory by which a run resumes its wandb run."""

_HOST = "https://api.wandb.ai"
_TARGET = "map_bo.tracking.wandb.mirror.Wandb"


@dataclass(frozen=True)
class WandbRun:
    """A run on Weights & Biases.

    Attributes:
        id: Its id.
        project: Its project.
        entity: The user or team that owns it; ``None`` for the default of the key.
        group: The group that it belongs to.
        prefix: The prefix of all names that it logged.
        offline: Whether it was recorded offline, at least in part; such a run is on the server only
            once ``wandb sync`` has uploaded it.
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
        directory: The run's directory, with its ``wandb.json``.
        config: The recorded configuration of the run, for what that file does not say.
    """
    try:
        state = read_json(directory / STATE)
        found = {**_settings(config or {}), **state}
        if found.get("mode") == "disabled" or not found.get("events"):
            return None
        return WandbRun(
            id=str(found["id"]),
            project=str(found["project"]),
            entity=found.get("entity") or None,
            group=found.get("group") or None,
            prefix=str(found.get("prefix") or ""),
            offline=bool(found.get("offline")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    tree = config.get("tree") if isinstance(config, Mapping) else None
    group = tree.get("tracking") if isinstance(tree, Mapping) else None
    for node in (group if isinstance(group, Mapping) else {}).values():
        if isinstance(node, Mapping) and current(str(node.get("_target_"))) == _TARGET:
            return dict(node)
    return {}


def is_mirrored(directory: Path) -> bool:
    """Return whether the run in ``directory`` is on Weights & Biases from start to end."""
    try:
        return bool(read_json(directory / STATE)["whole"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def has_key(environment: Mapping[str, str]) -> bool:
    """Return whether there is a key for the server.

    It is in ``WANDB_API_KEY``, or in the netrc file (``NETRC``, else ``~/.netrc``) under the host
    of ``WANDB_BASE_URL``.
    """
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlparse(environment.get("WANDB_BASE_URL") or _HOST).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        path = Path(environment.get("NETRC") or "~/.netrc").expanduser()
        return netrc.netrc(str(path)).authenticators(host) is not None
    return False
