"""Random generators: one seed, and named children that never disturb each other.

A child depends on its parent's seed and its own name alone, never on how many numbers the
parent has drawn. So the points proposed in round 7 are the same whether the run went there
without a break or was killed and resumed six times.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Generator

__all__ = ["child", "child_seed", "make_generator", "numpy_generator"]


def make_generator(seed: int) -> Generator:
    """Return a CPU generator for ``seed``; only the edge of an application calls this."""
    import torch

    return torch.Generator().manual_seed(seed % 2**63)


def child_seed(generator: Generator, *name: str | int) -> int:
    """Return the seed (31 bits) that ``child`` would use, for libraries that want an integer."""
    text = "/".join([str(generator.initial_seed()), *map(str, name)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 2**31


def child(generator: Generator, *name: str | int) -> Generator:
    """Return the child of ``generator`` called ``name``.

    Args:
        generator: The parent; it is only read (its initial seed), never advanced.
        name: Words or numbers that tell this child from its siblings, e.g. ``"propose", 7``.
    """
    return make_generator(child_seed(generator, *name))


def numpy_generator(generator: Generator, *name: str | int) -> np.random.Generator:
    """Return a numpy generator seeded like ``child(generator, *name)``."""
    import numpy as np

    return np.random.default_rng(child_seed(generator, *name))
