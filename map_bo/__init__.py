"""Bayesian optimization for multi-objective model merging."""

from __future__ import annotations

__version__ = "0.1.0"
