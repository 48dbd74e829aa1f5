"""Recipes in mergekit's words: read, written, and turned into operators."""
