"""Gaussian processes: covariances, marginal likelihood, gradients, sparsity."""
