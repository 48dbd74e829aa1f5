"""Evaluators: scoring one model, with the uncertainty of the score."""
