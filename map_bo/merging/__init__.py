"""Checkpoints, task vectors, merge operators, and writing the merged model."""
