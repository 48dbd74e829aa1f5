"""Inner products of what a model's linear layers take in, for RegMean.

Jin et al., *Dataless Knowledge Fusion by Merging Weights of Language Models*, arXiv 2212.09849: the
statistic ``G = X^T X`` of each linear layer, whose input on the data are the rows of ``X``.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from map_bo.errors import MergeError, listed
from map_bo.merging.checkpoints.checkpoint import CheckpointSource
from map_bo.merging.vectors.live import model_ties
from map_bo.operators.statistics.batches import call, digest_of, each_batch, evaluating
from map_bo.operators.statistics.statistics import Statistics, finish_statistics

__all__ = ["Products", "collect_products", "grams", "is_transposed", "linear_layers"]

logger = logging.getLogger(__name__)


def grams(
    model: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    *,
    only: str | None = None,
    limit: int | None = None,
    data: str = "",
    of: CheckpointSource | None = None,
) -> Statistics:
    """Return, for each linear layer's weight, ``X^T X`` divided by the number of its rows.

    The mean instead of the sum keeps experts with more data from counting more (the authors' code
    does so too); for the sums of the paper, multiply coefficients by the numbers of rows.

    Layers: ``nn.Linear``, transformers' ``Conv1D`` (whose weight is transposed) and ``nn.Conv2d``
    without groups and with zero padding, whose input rows are the patches (``unfold``). Their
    positions count as rows; those that a batch's ``attention_mask`` (``n x T``) leaves out do not.
    Left out, and averaged by `RegMean`, are a weight that is shared (an output layer tied to the
    embedding) and a layer that no batch goes through. The model is in evaluation mode meanwhile,
    and is left as it was.

    Args:
        model: The expert, on the device to compute on.
        batches: ``(inputs..., targets)``, or mappings with the arguments of a Hugging Face model.
            Targets are not used.
        forward: ``(model, batch)`` that runs the model, where the default (call it on the inputs)
            does not fit.
        only: Regular expression that is searched for in the weight's name, to take fewer layers:
            a layer with ``d`` inputs takes ``4 d^2`` bytes.
        limit: Use so many examples at most.
        data: What to call the data in the record.
        of: The expert's checkpoint, where it differs from the model in dtype or names.

    Raises:
        MergeError: When there are no batches or no linear layers, a batch cannot be used, or the
            result holds NaN.
    """
    layers = {n: m for n, m in linear_layers(model).items() if only is None or re.search(only, n)}
    if not layers:
        raise MergeError(
            "the model has no linear layers" if only is None else f"no layer's weight has {only!r}",
            hint="RegMean is for models of nn.Linear, Conv1D and nn.Conv2d",
        )
    products, examples = collect_products(model, layers, batches, forward, limit)
    inside = _inside_attention(model)
    unseen = sorted(inside & layers.keys() - products.sums.keys())
    if unseen:
        logger.warning(
            "torch's MultiheadAttention uses the weights of its layers itself, so the inputs of %s "
            "are not seen: RegMean averages them",
            listed(unseen),
        )
    return finish_statistics(
        "grams",
        products.means(),
        model=digest_of(model, of),
        examples=examples,
        settings={
            "only": only,
            "rows": products.rows,
            "transposed": [name for name in products.sums if is_transposed(layers[name])],
        },
        data=data,
        ties=model_ties(model),
    )


def collect_products(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batches: Iterable[Any],
    forward: Callable[[nn.Module, Any], Any] | None = None,
    limit: int | None = None,
) -> tuple[Products, int]:
    """Run a model on batches and sum the outer products of what some of its layers take in.

    Args:
        model: The model, on the device to compute on.
        layers: Weight name -> layer of the model; see `linear_layers`.
        batches: See `grams`.
        forward: See `grams`.
        limit: See `grams`.

    Returns:
        The sums, in the order in which the layers were first called, and the number of examples.

    Raises:
        MergeError: When no batch went through any of them, or a batch cannot be used.
    """
    products = Products()
    examples = 0
    with ExitStack() as hooks, evaluating(model), torch.no_grad():
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(products.hook(name), with_kwargs=True)
            hooks.callback(handle.remove)
        where = next(model.parameters()).device
        for batch, n in each_batch(batches, where, limit):
            products.mask = batch.get("attention_mask") if isinstance(batch, dict) else None
            (forward or call)(model, batch)
            examples += n
    if examples and not products.sums:
        if set(layers) <= _inside_attention(model):
            raise MergeError(
                "torch's MultiheadAttention uses the weights of its layers itself, so the inputs "
                f"of {listed(sorted(layers))} are not seen",
                hint="RegMean has nothing to merge by in this model; use another operator, or an "
                "attention of linear layers that are called",
            )
        raise MergeError(
            "no batch went through a linear layer",
            hint="pass forward, a function (model, batch) that runs the model",
        )
    return products, examples


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return weight name -> layer, of those that `grams` takes."""
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    return {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if _is_linear(module) and uses[id(module.weight)] == 1
    }


def _inside_attention(model: nn.Module) -> set[str]:
    """Return the weights of linear layers that torch's own attention holds and never calls."""
    return {
        f"{name}.out_proj.weight" if name else "out_proj.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(module, nn.Linear) or is_transposed(module)


def is_transposed(module: nn.Module) -> bool:
    """Return whether this is transformers' ``Conv1D``, a linear layer of weight ``in x out``."""
    library = sys.modules.get("transformers.pytorch_utils")  # a model of it has loaded it
    return library is not None and isinstance(module, library.Conv1D)


class Products:
    """Sums of the outer products of input rows, by layer.

    Attributes:
        sums: Weight name -> ``d x d``.
        rows: Weight name -> number of rows.
        mask: The attention mask of the batch that goes through the model, if it has one.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.mask: Tensor | None = None

    def hook(self, name: str) -> Callable[..., None]:
        """Return a hook that adds what a layer is given."""

        def add(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            values = given[0] if given else next(iter(named.values()))
            rows = self._rows(module, values.detach())
            product = rows.T @ rows
            if name in self.sums:
                self.sums[name] += product
                self.rows[name] += len(rows)
            else:
                self.sums[name], self.rows[name] = product, len(rows)

        return add

    def means(self) -> dict[str, Tensor]:
        """Return weight name -> the sum divided by the number of rows."""
        return {name: total / self.rows[name] for name, total in self.sums.items()}

    def _rows(self, module: nn.Module, values: Tensor) -> Tensor:
        """Return the inputs as ``rows x d``, in float32."""
        if isinstance(module, nn.Conv2d):
            values = values[None] if values.dim() == 3 else values
            patches = nn.functional.unfold(
                _pad(module, values.float()),
                module.kernel_size,
                dilation=module.dilation,
                stride=module.stride,
            )
            return patches.transpose(1, 2).flatten(0, 1)
        if self.mask is not None and self.mask.shape == values.shape[:2] and values.dim() == 3:
            values = values[self.mask.bool()]
        return values.reshape(-1, values.shape[-1]).float()


def _pad(module: nn.Conv2d, values: Tensor) -> Tensor:
    # `padding` may be "same", which is not symmetric for even kernels; this is what torch keeps.
    return nn.functional.pad(values, module._reversed_padding_repeated_twice)
