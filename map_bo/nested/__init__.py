"""Merging in stages: trees of experts, each node of which is a small run of its own."""
