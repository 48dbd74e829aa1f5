from __future__ import annotations

import torch

from map_bo.rng import make_generator
from map_bo.surrogates.evidence import Hyperprior
from map_bo.surrogates.features import feature_groups, quadratic_features
from map_bo.surrogates.quadratic import binomial_working_responses


def test_working_responses_sit_at_the_mode() -> None:
    generator = make_generator(1)
    Z = 2 * torch.rand(12, 2, generator=generator, dtype=torch.float64) - 1
    Phi, groups = quadratic_features(Z), feature_groups(2)
    n = torch.full((2, 12), 30.0, dtype=torch.float64)
    k = torch.randint(0, 31, (2, 12), generator=generator).double()
    k[1] = torch.where(Z[:, 0] > 0, n[1], k[1])  # many rows at the bound
    zero, one = torch.zeros(2).double(), torch.ones(2).double()
    hyper = Hyperprior(torch.full((2, 5), -1.0).double(), torch.ones(2, 5).double())
    z, v, theta = binomial_working_responses(Phi, k, n, zero, one, groups, hyper)
    # The mode f of the exact posterior: K^-1 f = gradient of the binomial log likelihood.
    K = (Phi * theta[:, 1:].exp()[:, groups].unsqueeze(-2)) @ Phi.T
    K = K + torch.diag_embed(theta[:, :1].exp().expand(-1, 12))
    f = (K @ torch.linalg.solve(K + torch.diag_embed(v), z.unsqueeze(-1))).squeeze(-1)
    slope = k - n * torch.sigmoid(f)
    torch.testing.assert_close((K @ slope.unsqueeze(-1)).squeeze(-1), f, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(1 / v, n * torch.sigmoid(f) * torch.sigmoid(-f))
