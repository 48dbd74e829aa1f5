"""Merge operators beyond task arithmetic, each from its paper."""

from map_bo.operators.mergekit.recipes import MergekitRecipe, from_mergekit

__all__ = ["MergekitRecipe", "from_mergekit"]
