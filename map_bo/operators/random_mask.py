"""Random numbers that belong to elements: the same at any chunk size and on any device.

A generator that counts (one number after another) would make a mask depend on how a model is cut
into pieces. Here the number of an element is a hash of a key and of the element's index:
splitmix64 (Steele, Lea and Flood, *Fast Splittable Pseudorandom Number Generators*, OOPSLA 2014,
figure 16) at the index, in integer arithmetic that is exact everywhere. One 64-bit word serves
four elements, with 16 bits each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from map_bo.merging.vectors.parallel import Empty

__all__ = ["LEVELS", "element_key", "uniform_levels"]

LEVELS = 1 << 16
"""Random levels are whole numbers from 0 to ``LEVELS - 1``, all equally likely."""

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_LANES = 4  # 16-bit levels in a word


def element_key(seed: int, expert: str, tensor: str) -> int:
    """Return the 64-bit key of a tensor of an expert: a digest of seed and names."""
    text = f"{seed}\0{expert}\0{tensor}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniform_levels(
    keys: Sequence[int],
    start: int,
    stop: int,
    device: torch.device | str = "cpu",
    *,
    empty: Empty = torch.empty,
) -> Tensor:
    """Return the random levels of the elements ``start`` to ``stop``, shifted to int16.

    Args:
        keys: ``N`` keys, see `element_key`. All rows are made at once: threads that go through
            short pieces wait for each other's calls, so fewer calls count for more than locality.
        start: Index of the first element.
        stop: Index after the last.
        device: Where to make them.
        empty: Where temporary tensors come from.

    Returns:
        ``N x (stop - start)`` numbers of int16: the level less ``LEVELS / 2``.
    """
    first = start // _LANES
    last = -(-stop // _LANES)
    words = empty(len(keys), last - first, dtype=torch.int64, device=device)
    # splitmix64: the state at index i is key + (i + 1) gamma, in arithmetic modulo 2^64.
    begin = [[_to_signed((key + (first + 1) * _GAMMA) % (1 << 64))] for key in keys]
    torch.add(
        _multiples(last - first, device),
        torch.tensor(begin, dtype=torch.int64, device=device),
        out=words,
    )
    spare = empty(len(keys), last - first, dtype=torch.int64, device=device)
    _fold(words, spare, 30)
    _fold(words.mul_(_to_signed(_FIRST)), spare, 27)
    _fold(words.mul_(_to_signed(_SECOND)), spare, 31)
    return words.view(torch.int16)[:, start - first * _LANES : stop - first * _LANES]


_known: dict[torch.device, Tensor] = {}


def _multiples(count: int, device: torch.device | str) -> Tensor:
    """Return ``i * gamma`` for ``i < count``: the same for every piece, so it is kept."""
    device = torch.device(device)
    known = _known.get(device)
    if known is None or len(known) < count:
        with torch.inference_mode(False):
            known = torch.arange(max(count, 1 << 15), dtype=torch.int64, device=device)
            known.mul_(_to_signed(_GAMMA))
        _known[device] = known
    return known[:count]


def _fold(words: Tensor, spare: Tensor, shift: int) -> None:
    """``words ^= words >> shift`` as unsigned numbers, in place."""
    # torch shifts signed numbers arithmetically; what comes in from the left is masked away.
    torch.bitwise_right_shift(words, shift, out=spare)
    words.bitwise_xor_(spare.bitwise_and_((1 << (64 - shift)) - 1))


def _to_signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
