"""Task vectors in memory: storage, blocks, kernels, linear merging, and the live model."""
