"""Ax: a run as an Ax experiment, an Ax experiment's trials as observations, samplers as nodes."""
