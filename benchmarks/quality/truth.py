"""The true accuracies of many merged models at once, faster than merging them one by one.

A problem that merges real models measures one candidate after the other, as a user would. To
score a whole front, or to search with ten thousand evaluations, that is slow. Here the small
sequential networks of the zoos are run for a chunk of candidates together, on the very same
held-out examples. The numbers are those of ``problem.evaluate``, but for rounding in float32,
which may turn an example whose two best logits agree to seven digits.

Two things make it fast. The first layer is linear in its weights and sees the same inputs for
every candidate, so its response is the same combination of responses to base and task vectors,
and those are computed once. And all further linear layers are batched products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from map_bo.errors import MergeError
from map_bo.merging.align.layout import Slot
from map_bo.merging.checkpoints.checkpoint import CheckpointSource, open_checkpoint
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.task_vectors import TaskVectors

__all__ = ["Examples", "MergedNetworks"]

_CHUNK_BYTES = 4 << 20  # of the first layer's response: it stays in the processor's cache
_KINDS = nn.Linear | nn.Conv2d | nn.BatchNorm2d | nn.ReLU | nn.Flatten | nn.Unflatten


@dataclass(frozen=True, eq=False)
class Examples:
    """The held-out examples of one metric.

    Attributes:
        inputs: ``E x p`` inputs, float32.
        labels: ``E`` classes.
        head: A frozen last layer of this metric's own; None where the network has its logits.
    """

    inputs: Tensor
    labels: Tensor
    head: nn.Linear | None = None


class MergedNetworks:
    """Sequential networks merged by task arithmetic, run for many coefficients at once.

    Args:
        network: The architecture: a sequence of linear layers, convolutions, batch
            normalisations, ReLU, flattening and its reverse.
        base: Checkpoint of the base.
        experts: Name -> checkpoint, in the order of the coefficients.
        metrics: The examples of each of the ``m`` metrics; all have equally many, ``E``.
        operator: Task arithmetic, with or without blocks.

    Raises:
        MergeError: For a layer of another kind, or one with settings that are not covered.
    """

    def __init__(
        self,
        network: nn.Module,
        base: CheckpointSource,
        experts: Mapping[str, CheckpointSource],
        metrics: Sequence[Examples],
        operator: TaskArithmetic | None = None,
    ) -> None:
        self._operator = operator or TaskArithmetic()
        if not isinstance(network, nn.Sequential):
            raise MergeError(
                f"a {type(network).__name__} is not run in batches",
                hint="measure such a network with problem.evaluate",
            )
        self._layers = list(network.named_children())
        for name, layer in self._layers:
            _require_known(name, layer)
        self._vectors = TaskVectors.load(
            open_checkpoint(base),
            {name: open_checkpoint(source) for name, source in experts.items()},
        )
        self._slots = {slot.name: slot for slot in self._vectors.layout.slots}
        self._floors = {where.start: floor for where, floor in self._vectors.floors}
        self._blocks = len(self._operator.blocks or (0,))
        self._metrics = tuple(metrics)
        self._first = next(
            i
            for i, (_, layer) in enumerate(self._layers)
            if isinstance(layer, nn.Linear | nn.Conv2d)
        )
        self._responses = [self._respond(examples.inputs) for examples in self._metrics]

    @property
    def examples(self) -> int:
        """Number of examples behind each metric, ``E``."""
        return len(self._metrics[0].labels)

    @property
    def d(self) -> int:
        """Number of coefficients."""
        return len(self._vectors.experts) * self._blocks

    def accuracy(self, X: Tensor) -> Tensor:
        """Return the share of examples classified right (``n x m``, float64) at ``X`` (``n x d``).

        Coefficients may lie anywhere; an example whose logits are not finite counts as wrong.
        """
        return self._map(X, lambda right: right.sum(-1).double() / right.shape[-1])

    def right(self, X: Tensor) -> Tensor:
        """Return which examples are classified right: ``n x m x E`` booleans."""
        return self._map(X, lambda right: right)

    def _map(self, X: Tensor, summary: Callable[[Tensor], Tensor]) -> Tensor:
        X = torch.as_tensor(X, dtype=torch.float64)
        if X.dim() != 2 or X.shape[-1] != self.d:
            raise MergeError(
                f"coefficients have shape {tuple(X.shape)}", hint=f"give an n x {self.d} tensor"
            )
        if len(X) == 0:
            nothing = torch.zeros(0, len(self._metrics), self.examples, dtype=torch.bool)
            return summary(nothing)
        size = max(1, _CHUNK_BYTES // (4 * self._responses[0][0].numel()))
        with torch.inference_mode():
            parts = [
                torch.stack([summary(right) for right in self._chunk(rows)], 1)
                for rows in torch.split(X, size)
            ]
        # A copy made outside inference mode can go wherever other tensors go.
        return torch.cat(parts).clone()

    def _chunk(self, X: Tensor) -> list[Tensor]:
        """Return for each metric which examples are right, ``k x E``."""
        merged = {name: self._merged(slot, X) for name, slot in self._slots.items()}
        found = []
        for responses, examples in zip(self._responses, self._metrics, strict=True):
            z = self._network(X, merged, responses)
            if examples.head is not None:
                z = torch.matmul(examples.head.weight, z) + examples.head.bias.unsqueeze(-1)
            top = z.amax(1)
            own = z.gather(1, examples.labels.expand(len(X), 1, -1)).squeeze(1)
            found.append((own == top) & torch.isfinite(top))
        return found

    def _network(self, X: Tensor, merged: Mapping[str, Tensor], responses: Tensor) -> Tensor:
        """Return ``k x classes x E``: flat features keep the examples last, images first."""
        name, layer = self._layers[self._first]
        z = self._mixture(self._slots[f"{name}.weight"], X) @ responses.flatten(1)
        z = z.view(len(X), *responses.shape[1:])
        if layer.bias is not None:
            z += _channels(merged[f"{name}.bias"], z)
        for name, layer in self._layers[self._first + 1 :]:
            if isinstance(layer, nn.ReLU):
                z = z.relu_()
            elif isinstance(layer, nn.Flatten):
                z = z.flatten(2).transpose(1, 2)
            elif isinstance(layer, nn.Linear):
                z = torch.bmm(merged[f"{name}.weight"], z)
                z += merged[f"{name}.bias"].unsqueeze(-1)
            elif isinstance(layer, nn.Conv2d):
                z = torch.stack(
                    [
                        F.conv2d(image, weight, None, layer.stride, layer.padding)
                        for image, weight in zip(z, merged[f"{name}.weight"], strict=True)
                    ]
                )
                if layer.bias is not None:
                    z += _channels(merged[f"{name}.bias"], z)
            else:
                assert isinstance(layer, nn.BatchNorm2d)
                spread = (merged[f"{name}.running_var"] + layer.eps).sqrt()
                scale = merged[f"{name}.weight"] / spread
                shift = merged[f"{name}.bias"] - merged[f"{name}.running_mean"] * scale
                z = z.mul_(_channels(scale, z)).add_(_channels(shift, z))
        return z

    def _respond(self, inputs: Tensor) -> Tensor:
        """Return the first layer's response to base and task vectors.

        ``1 + N x E x channels x height x width`` for a convolution, else ``1 + N x width x E``.
        """
        for _, layer in self._layers[: self._first]:
            inputs = layer(inputs)
        name, first = self._layers[self._first]
        slot = self._slots[f"{name}.weight"]
        with torch.inference_mode():
            rows = [slot.of(row) for row in self._vectors.rows]
            if isinstance(first, nn.Conv2d):
                parts = [F.conv2d(inputs, w, None, first.stride, first.padding) for w in rows]
            else:
                parts = [w @ inputs.T for w in rows]
            return torch.stack(parts)

    def _mixture(self, slot: Slot, X: Tensor) -> Tensor:
        """Return the weights of base and task vectors in a tensor, ``k x (1 + N)``."""
        block = self._operator.block(slot.name)
        own = X.view(len(X), -1, self._blocks)[..., block]
        return torch.cat([own.new_ones(len(X), 1), own], 1).float()

    def _merged(self, slot: Slot, X: Tensor) -> Tensor:
        flat = self._mixture(slot, X) @ self._vectors.rows[:, slot.offset : slot.stop]
        if slot.offset in self._floors:
            flat = torch.maximum(flat, self._floors[slot.offset])
        return flat.view(len(X), *slot.shape)


def _channels(values: Tensor, z: Tensor) -> Tensor:
    """Return ``k x channels`` so that it broadcasts against images, or against flat features."""
    if z.dim() == 3:
        return values.unsqueeze(-1)
    return values.view(len(values), 1, -1, 1, 1)


def _require_known(name: str, layer: nn.Module) -> None:
    plain = not isinstance(layer, nn.Conv2d) or (
        layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    )
    if not isinstance(layer, _KINDS) or not plain:
        raise MergeError(
            f"layer {name} is {layer}, which is not run in batches",
            hint="measure such a network with problem.evaluate",
        )
