"""Baselines behind the same protocol: Ax, CMA-ES, NSGA-II and NSGA-III."""
