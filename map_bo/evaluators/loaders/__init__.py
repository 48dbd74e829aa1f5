"""Examples from data loaders of torch, and metrics that are computed from all of them."""
