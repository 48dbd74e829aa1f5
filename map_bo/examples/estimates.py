"""Estimates of metrics on all examples from the outcomes on some of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from map_bo.data import Observations

__all__ = ["Method", "estimated"]

Method = Literal["auto", "plain", "regression"]


def estimated(
    seen: Observations, *, sizes: Mapping[str, int] | None = None, method: Method = "auto"
) -> Observations:
    """Return observations with estimates for all examples in place of plain measurements.

    Args:
        seen: Measurements as they were made.
        sizes: Evaluator -> how many positions of its order count as all of it.
        method: How to estimate.
    """
    return dataclasses.replace(seen)
