"""The live problem: coefficients in, a merged model, measured metrics out."""

from __future__ import annotations

from typing import Any

from map_bo.moved import old_attribute


def __getattr__(name: str) -> Any:
    return old_attribute(__name__, name)
