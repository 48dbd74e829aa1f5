"""Merge operators beyond task arithmetic, and the statistics of experts that some of them need."""
