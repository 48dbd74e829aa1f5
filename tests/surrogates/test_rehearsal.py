from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from botorch.models.gp_regression import SingleTaskGP
from botorch.posteriors.ensemble import EnsemblePosterior
from torch import Tensor

from map_bo.data import Observations
from map_bo.errors import SurrogateError
from map_bo.space import CoefficientSpace
from map_bo.surrogates.links import links_for
from map_bo.surrogates.quadratic import Quadratic
from map_bo.surrogates.rehearsal import is_foreign, rehearse
from map_bo.surrogates.surrogate import SurrogateModel
from tests.contracts.smallest_surrogate import Plain
from tests.contracts.surrogate_contract import METRICS

SPACE = CoefficientSpace.box(("a", "b"))


class Ensemble(SurrogateModel):
    metrics, links = METRICS, links_for(METRICS)

    def posterior(self, X: Tensor, *args: Any, **kwargs: Any) -> EnsemblePosterior:
        return EnsemblePosterior(X.new_zeros(4, len(X), 3))


class Detached(SurrogateModel):
    def __init__(self, inner: SurrogateModel) -> None:
        super().__init__()
        self.inner, self.metrics, self.links = inner, inner.metrics, inner.links

    def posterior(self, X: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner.posterior(X.detach())


class WrongShape(Detached):
    def posterior(self, X: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner.posterior(X)

    def misfit_variance(self) -> Tensor:
        return torch.zeros(1)


@dataclass(frozen=True)
class Faulty:
    kind: str

    def fit(self, seen: Observations, space: CoefficientSpace) -> Any:
        if self.kind == "too few":
            raise SurrogateError(f"{len(seen)} evaluations are not enough")
        if self.kind == "bug":
            raise NotImplementedError("later")
        if self.kind == "plain model":
            return SingleTaskGP(seen.X, seen.Y[:, :1])
        if self.kind == "ensemble":
            return Ensemble()
        model = Quadratic().fit(seen, space)
        if self.kind == "metrics":
            return model.for_metrics([0, 1])
        return Detached(model) if self.kind == "numpy" else WrongShape(model)


@pytest.mark.parametrize("surrogate", [Plain(), Quadratic(), Faulty("too few")], ids=repr)
def test_what_keeps_the_contract_or_wants_more_data_passes(surrogate: Any) -> None:
    rehearse(surrogate, SPACE, METRICS)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bug", "Faulty cannot be fitted to 12 made-up evaluations: NotImplementedError: later"),
        ("plain model", "returns a SingleTaskGP, which is not a SurrogateModel"),
        ("ensemble", "cannot be used: SurrogateError: the surrogate's posterior is a Ensemble"),
        ("metrics", r"its metrics are \['accuracy', 'loss'\] with 2 links"),
        ("numpy", "its posterior cannot be differentiated in the coefficients"),
        ("shape", r"misfit_variance has shape \(1,\), not \(3,\)"),
    ],
)
def test_what_would_fail_after_the_search_fails_before(kind: str, message: str) -> None:
    with pytest.raises(SurrogateError, match=message) as caught:
        rehearse(Faulty(kind), SPACE, METRICS)
    assert caught.value.hint


def test_only_surrogates_of_others_are_foreign() -> None:
    assert is_foreign(Plain())
    assert not is_foreign(Quadratic())


@dataclass(frozen=True)
class Boastful(Plain):
    """It says that it takes partial rows, and hands their NaN to a process."""

    takes_partial_rows: bool = True

    def fit(self, seen: Observations, space: CoefficientSpace) -> Any:
        Z = seen.with_any().Y
        if bool(Z.isnan().any()):
            raise ValueError("NaN")
        return super().fit(seen, space)


def test_a_surrogate_that_says_that_it_takes_partial_rows_is_tried_on_one() -> None:
    with pytest.raises(SurrogateError, match="ValueError: NaN"):
        rehearse(Boastful(), SPACE, METRICS)
    rehearse(Boastful(), SPACE, METRICS[:1])
    rehearse(Quadratic(), SPACE, METRICS)
