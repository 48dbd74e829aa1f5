"""A fit to made-up evaluations, before anything real is measured.

What a surrogate of somebody else's cannot do would otherwise be found out when the front is to be
solved, with every evaluation paid for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import MapBoError, SurrogateError
from map_bo.rng import child, make_generator
from map_bo.space import CoefficientSpace
from map_bo.surrogates.links import from_link, links_for
from map_bo.surrogates.prediction import predict
from map_bo.surrogates.surrogate import Surrogate, SurrogateModel, fits_partial_rows

__all__ = ["is_foreign", "rehearse"]

_ROWS = 12
_HINT = (
    "derive the model from map_bo.surrogates.surrogate.SurrogateModel, with `metrics`, `links` and "
    "a Gaussian `posterior`; the rest has defaults"
)


def is_foreign(surrogate: Surrogate) -> bool:
    """Return whether a surrogate is none of this package, whose own tests hold to the contract."""
    return not type(surrogate).__module__.startswith("map_bo.")


def rehearse(surrogate: Surrogate, space: CoefficientSpace, metrics: tuple[Metric, ...]) -> None:
    """Fit a surrogate to a dozen made-up evaluations, and use the fit as a run does.

    A surrogate that refuses so few evaluations, with an error of this package, is let pass.

    Raises:
        SurrogateError: When what it fits is no surrogate's model.
    """
    name, source = type(surrogate).__name__, make_generator(0)
    X = space.sample(_ROWS, generator=child(source, "X"))
    normal = torch.randn(_ROWS, len(metrics), generator=child(source, "Y"), dtype=torch.float64)
    made_up = Observations(X, from_link(0.5 * normal, links_for(metrics)), metrics)
    if fits_partial_rows(surrogate) and len(metrics) > 1:  # as it says, so it is tried
        lacking = torch.zeros_like(made_up.measured)
        lacking[-1, 0] = True
        made_up = made_up.without(lacking, "made up")
    try:
        model: object = surrogate.fit(made_up, space)
    except MapBoError:
        return
    except Exception as error:
        raise SurrogateError(
            f"{name} cannot be fitted to {_ROWS} made-up evaluations: "
            f"{type(error).__name__}: {error}",
            hint="correct its `fit`; nothing has been evaluated yet",
        ) from error
    if not isinstance(model, SurrogateModel):
        raise SurrogateError(
            f"{name}.fit returns a {type(model).__name__}, which is not a SurrogateModel",
            hint=_HINT,
        )
    try:
        _use(model, X[:3], metrics)
    except Exception as error:
        reason = error.message if isinstance(error, MapBoError) else f"{error}"
        raise SurrogateError(
            f"the model that {name} fits cannot be used: {type(error).__name__}: {reason}",
            hint=_HINT,
        ) from error


def _use(model: SurrogateModel, X: Tensor, metrics: tuple[Metric, ...]) -> None:
    """Do once what samplers, stopping rule and front do with a model.

    Raises:
        SurrogateError: When something has the wrong shape, or the metrics are others.
    """
    if model.metrics != metrics or len(model.links) != len(metrics):
        raise SurrogateError(
            f"its metrics are {[metric.name for metric in model.metrics]} with "
            f"{len(model.links)} links, the run's are {[metric.name for metric in metrics]}"
        )
    q, m = len(X), len(metrics)
    points = X.clone().requires_grad_(True)
    if not all(value.requires_grad for value in (model.link_mean(points), *model.joint(points))):
        raise SurrogateError("its posterior cannot be differentiated in the coefficients")
    with torch.no_grad():
        mean, covariance = model.joint(X)
        cross, _ = model.covariances_with(X[:1]).to(X)
        shapes = {
            "link_mean": (model.link_mean(X), (q, m)),
            "posterior": (model.gaussian(X).mean, (q, m)),
            "joint": (mean, (q, m)),
            "joint covariance": (covariance, (m, q, q)),
            "covariances_with": (cross, (m, q, 1)),
            "sample_functions": (
                model.sample_functions(2, generator=make_generator(0))(X),
                (2, q, m),
            ),
            "misfit_variance": (model.misfit_variance(), (m,)),
            "prediction": (predict(model, X).std, (q, m)),
        }
    for name, (value, shape) in shapes.items():
        if value.shape != shape:
            raise SurrogateError(f"{name} has shape {tuple(value.shape)}, not {shape}")
