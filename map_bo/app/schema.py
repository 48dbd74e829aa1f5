"""The typed part of the configuration, which the YAML files under ``conf/`` must fit.

Importing this is cheap: no tensor library is loaded for ``--help``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Config", "LoopConfig", "StopConfig", "register"]


@dataclass
class StopConfig:
    """Mirror of :class:`map_bo.loop.stopping.Stop`; without a criterion there is no rule."""

    criterion: str | None = None
    tolerance: float = 0.005
    patience: int = 2
    least: int | None = None


@dataclass
class LoopConfig:
    """Mirror of :class:`map_bo.loop.settings.Settings`, the parts that are plain values."""

    budget: int = 24
    batch: int = 1
    verify: int | None = None
    verify_extra: bool = False
    guard: bool = True
    reference: dict[str, float] | None = None
    retries: int = 1
    timeout: float | None = None
    max_failure_share: float = 0.5
    stop: StopConfig | None = field(default_factory=StopConfig)


@dataclass
class Config:
    """The whole configuration; groups with a ``_target_`` stay free-form."""

    seed: int = 0
    progress: bool = True
    start_from: str | None = None
    loop: LoopConfig = field(default_factory=LoopConfig)
    problem: dict[str, Any] = field(default_factory=dict)
    operator: dict[str, Any] = field(default_factory=dict)
    surrogate: dict[str, Any] = field(default_factory=dict)
    sampler: dict[str, Any] = field(default_factory=dict)
    solver: dict[str, Any] = field(default_factory=dict)
    nested: dict[str, Any] = field(default_factory=dict)
    tracking: dict[str, Any] = field(default_factory=dict)


def register() -> None:
    """Make the schema known to Hydra under the name ``base_config``."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="base_config", node=Config)
