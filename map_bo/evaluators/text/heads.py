"""One frozen linear head per task, on the pooled features of an encoder.

A head is read from a file, or fitted once on the features that the base has of a training split; it
then stays as it is while the encoder below it is merged. Fitting is deterministic, and what was
fitted is kept on disk by a digest of the base's weights, the data and the settings.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from map_bo.cached import cache_root, digest_of, kept
from map_bo.errors import EvaluationError, first_line, listed
from map_bo.evaluators.isolation.quiet import quiet
from map_bo.evaluators.text.pooling import Pooling, all_features, encoder_of
from map_bo.evaluators.text.tokens import Tokens

__all__ = ["FitMethod", "Head", "fit_head", "fit_to_features", "read_head"]

FitMethod = Literal["logistic", "ridge"]
"""How a head is fitted: logistic regression, or least squares with a penalty."""

logger = logging.getLogger(__name__)

_STEPS = 2000
_VERSION = 1  # of the fits: a change gives other heads


@dataclass(frozen=True, eq=False)
class Head:
    """A linear layer.

    Attributes:
        weight: ``k x width``, float32; ``k`` classes, or 1 for a number.
        bias: ``k``, float32.
        labels: Names of the classes, where they are known.
    """

    weight: Tensor
    bias: Tensor
    labels: tuple[str, ...] | None = None

    def __call__(self, features: Tensor) -> Tensor:
        """Return ``b x k`` outputs for ``b x width`` features."""
        return F.linear(features, self.weight.to(features), self.bias.to(features))

    @property
    def digest(self) -> str:
        """A digest of its numbers."""
        return digest_of({"weight": self.weight, "bias": self.bias})


def read_head(path: str | Path) -> Head:
    """Read a head from a safetensors file.

    It holds one matrix, called ``weight`` or ``something.weight``, and no or one vector, its
    ``bias``. Names of the classes may stand in the metadata, as a list in JSON under ``labels``.

    Raises:
        EvaluationError: When there is no such file, or it holds anything else.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path).expanduser()
    hint = "give a safetensors file with 'weight' (classes x width) and 'bias' (classes)"
    if not file.is_file():
        raise EvaluationError(f"there is no file {file} of a head", hint=hint)
    try:
        with safe_open(str(file), framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            said = (opened.metadata() or {}).get("labels")
        labels = None if said is None else tuple(str(one) for one in json.loads(said))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise EvaluationError(f"{file} cannot be read: {first_line(error)}", hint=hint) from error
    weights = [name for name, tensor in tensors.items() if tensor.dim() == 2]
    rest = {name: tensor for name, tensor in tensors.items() if name not in weights}
    weight = tensors[weights[0]] if len(weights) == 1 else torch.empty(0, 0)
    bias = next(iter(rest.values()), weight.new_zeros(len(weight)))
    fits = len(weights) == 1 and len(rest) <= 1 and bias.shape == weight.shape[:1]
    if not fits or not weight.is_floating_point() or not bias.is_floating_point():
        told = listed(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
        raise EvaluationError(f"{file} holds {told or 'nothing'}, not a linear head", hint=hint)
    if labels is not None and len(labels) != len(weight):
        raise EvaluationError(
            f"the metadata of {file} name {len(labels)} classes, and the head has {len(weight)}",
            hint="name each class once, in the order of the rows",
        )
    return Head(weight.float(), bias.float(), labels)


def fit_head(
    model: nn.Module,
    tokens: Tokens,
    targets: Sequence[float],
    *,
    classes: int | None,
    method: FitMethod,
    penalty: float,
    pooling: Pooling,
    batch_size: int,
    cache_dir: str | Path | None = None,
) -> Head:
    """Fit a head on the frozen base, or find it where it was fitted before.

    Features are standardised, and the scales are folded into the head. The penalty is that on the
    squared weights of standardised features: ``1 / C`` of scikit-learn's logistic regression, and
    ``alpha`` of its ridge regression.

    Args:
        model: The model with the weights of the base.
        tokens: ``n`` texts.
        targets: ``n`` class indices, or numbers.
        classes: The number of classes; None for numbers.
        method: How; numbers are always fitted by ridge regression.
        penalty: How strongly weights are drawn to 0.
        pooling: How hidden states are pooled.
        batch_size: Texts per forward pass.
        cache_dir: Folder above that of the heads; see `map_bo.cached.cache_root`.

    Raises:
        EvaluationError: When features are not finite.
    """
    return fit_to_features(
        lambda: all_features(model, tokens, pooling, batch_size),
        model=encoder_of(model),
        inputs=tokens.digest,
        targets=targets,
        classes=classes,
        method=method,
        penalty=penalty,
        settings=[type(model).__name__, pooling, batch_size],
        cache_dir=cache_dir,
    )


def fit_to_features(
    features: Callable[[], Tensor],
    *,
    model: nn.Module,
    inputs: str,
    targets: Sequence[float],
    classes: int | None,
    method: FitMethod,
    penalty: float,
    settings: Sequence[object],
    cache_dir: str | Path | None = None,
) -> Head:
    """Fit a head to features, or find it where it was fitted before; see `fit_head`.

    Args:
        features: Returns them, ``n x width``; only called where the head is not known.
        model: What they are of, with the weights of the base.
        inputs: A digest of what the model was given.
        targets: ``n`` class indices, or numbers.
        classes: The number of classes; None for numbers.
        method: How; numbers are always fitted by ridge regression.
        penalty: How strongly weights are drawn to 0.
        settings: Whatever else the features depend on, as plain data.
        cache_dir: Folder above that of the heads.

    Raises:
        EvaluationError: When features are not finite.
    """
    content = [_VERSION, classes, method, penalty, *settings, digest_of(_weights(model)), inputs]
    key = hashlib.sha256(json.dumps([content, list(targets)]).encode()).hexdigest()

    def make() -> dict[str, Tensor]:
        X = features().double().numpy()
        if not np.isfinite(X).all():
            raise EvaluationError(
                "the features of the base hold NaN or infinity, and no head can be fitted on them",
                hint="check the base; bfloat16 in place of float16 often helps",
            )
        scale = X.std(0)
        scale[scale <= 1e-6 * max(float(scale.max()), 1e-30)] = 1.0  # features that never change
        centre = X.mean(0)
        with quiet("sklearn"):
            weight, bias = _fit((X - centre) / scale, np.asarray(targets), classes, method, penalty)
        weight = weight / scale
        bias = bias - weight @ centre
        return {
            "weight": torch.from_numpy(weight).float().contiguous(),
            "bias": torch.from_numpy(bias).float(),
        }

    found = kept(cache_root(cache_dir) / "heads" / f"{key}.safetensors", make)
    return Head(found["weight"], found["bias"])


def _fit(
    X: NDArray[np.float64],
    y: NDArray[np.generic],
    classes: int | None,
    method: FitMethod,
    penalty: float,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return weights ``k x width`` and biases ``k``."""
    from sklearn.linear_model import LogisticRegression, Ridge

    if classes is None or method == "ridge":
        wanted = y.astype(np.float64).reshape(-1, 1)
        if classes is not None:
            wanted = 2.0 * (y.reshape(-1, 1) == np.arange(classes)) - 1.0
        least = Ridge(alpha=penalty, solver="cholesky").fit(X, wanted)
        rows = 1 if classes is None else classes
        return least.coef_.reshape(rows, -1), np.asarray(least.intercept_).reshape(rows)
    fitted = LogisticRegression(C=1 / penalty, max_iter=_STEPS, tol=1e-5).fit(X, y)
    if int(fitted.n_iter_.max()) >= _STEPS:
        logger.warning("the head is not fully fitted after %d steps; raise penalty", _STEPS)
    weight, bias = fitted.coef_, fitted.intercept_
    if classes == 2:  # one row that tells class 1 from class 0
        return np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias


def _weights(model: nn.Module) -> Mapping[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if tensor.device.type != "meta"}
