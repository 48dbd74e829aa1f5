"""The smallest surrogate that is legal: a botorch model with metrics, links and a posterior."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from botorch.models.gp_regression import SingleTaskGP
from botorch.models.transforms.input import Normalize
from torch import Tensor

from map_bo.data import Observations
from map_bo.errors import SurrogateError
from map_bo.space import CoefficientSpace
from map_bo.surrogates.links import links_for, observed_on_link
from map_bo.surrogates.surrogate import SurrogateModel


class PlainModel(SingleTaskGP, SurrogateModel):  # type: ignore[misc]  # botorch's bases
    """BoTorch's process with the hyperparameters that it begins with."""

    def __init__(self, seen: Observations, Z: Tensor, space: CoefficientSpace) -> None:
        low = space.bounds[0]  # the widths are positive, also where a coefficient is fixed
        cube = Normalize(space.d, bounds=torch.stack([low, low + space.width]))
        super().__init__(seen.X, Z, input_transform=cube)
        self.metrics, self.links = seen.metrics, links_for(seen.metrics)
        self.eval()


@dataclass(frozen=True)
class Plain:
    """Settings of the smallest surrogate; ``turned`` makes it believe the opposite of the data."""

    turned: bool = False

    def fit(self, seen: Observations, space: CoefficientSpace) -> PlainModel:
        good = seen.succeeded()
        if len(good) < 2:
            raise SurrogateError(f"{len(good)} evaluations succeeded, and it takes 2")
        Z, _ = observed_on_link(good, links_for(good.metrics))
        return PlainModel(good, 2 * Z.mean(0) - Z if self.turned else Z, space)
