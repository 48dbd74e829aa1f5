"""Surrogates: models of the metrics over the coefficient space."""
