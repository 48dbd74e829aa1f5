"""Operators that need statistics of experts' data (Fisher, RegMean), and those statistics."""

from __future__ import annotations

from typing import Any

from map_bo.moved import old_attribute


def __getattr__(name: str) -> Any:
    return old_attribute(__name__, name)
