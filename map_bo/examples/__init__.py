"""Outcomes by example: what they say of whole sets, of two models, and of one another."""
