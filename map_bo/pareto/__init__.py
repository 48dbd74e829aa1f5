"""Fronts: dominance, indicators, solvers and preferences."""
