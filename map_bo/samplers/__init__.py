"""Samplers: which coefficient vectors to evaluate next."""
