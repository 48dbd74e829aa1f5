"""Merge operators beyond task arithmetic, each from its paper."""
