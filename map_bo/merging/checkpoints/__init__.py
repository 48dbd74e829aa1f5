"""Lazy reading of one model: safetensors, shards, pickles, the hub; and writing tensors."""
