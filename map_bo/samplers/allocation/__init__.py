"""Allocation: which examples of which row to score next, new rows included."""
