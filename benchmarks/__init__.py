"""Benchmarks: speed against named peers and the machine's limit, quality against ground truth."""
