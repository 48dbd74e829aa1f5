"""Benchmarks of this kind; each module is a command that prints a table and writes JSON."""
