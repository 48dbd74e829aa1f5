"""Memory that a thread uses again for every piece, instead of asking the system each time.

Pieces are some megabytes. An allocator gives such memory back to the system when it is freed, and
every new one is then paged in anew, which costs more than the arithmetic on it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Empty", "arena"]

_ALIGNMENT = 64


class Arena(threading.local):
    """Temporary tensors, valid until the next `reset` of the same thread."""

    def __init__(self) -> None:
        self._memory: dict[torch.device, Tensor] = {}
        self._used = 0
        self._wanted = 0

    def reset(self) -> None:
        """Take all tensors back; what they held is lost."""
        self._wanted = max(self._wanted, self._used)
        self._used = 0

    def empty(
        self,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Return an uninitialised tensor, as ``torch.empty`` does."""
        device = torch.device(device)
        needed = math.prod(shape) * dtype.itemsize
        start = self._used
        self._used = start + -(-needed // _ALIGNMENT) * _ALIGNMENT
        if device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=device)  # its allocator keeps memory
        memory = self._memory.get(device)
        # A tensor made in inference mode could not be used outside it.
        if memory is None or (start == 0 and len(memory) < max(self._wanted, needed)):
            with torch.inference_mode(False):
                size = max(self._wanted, needed, 1)
                memory = self._memory[device] = torch.empty(size, dtype=torch.uint8)
        if self._used > len(memory):
            return torch.empty(shape, dtype=dtype)
        return memory[start : start + needed].view(dtype).view(shape)


Empty = Callable[..., Tensor]
"""Makes temporary tensors: ``torch.empty``, or an arena's ``empty``."""

arena = Arena()
