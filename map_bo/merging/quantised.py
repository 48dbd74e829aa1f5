"""Weights that are quantised: numbers that mean something only together with their scales.

Merging such numbers as they are would give a wrong model without a word, so they are refused.
Tensors of 8-bit floats (``float8_e4m3fn``, ``float8_e5m2``) without scales are plain values and
are merged like any others, in float32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch

from map_bo.errors import CheckpointError
from map_bo.merging.formats import Layout

__all__ = ["refuse_quantised"]

_FP8 = {
    dtype
    for dtype in (getattr(torch, name) for name in dir(torch) if name.startswith("float8"))
    if isinstance(dtype, torch.dtype)
}
_PACKED = {torch.int8, torch.uint8, torch.int16, torch.int32}
# The last part of a scale's name, as in weight_scale, weight_scale_inv, input_scale,
# scale_weight, weight_scales, scale. The temperature of CLIP is none.
_SCALE = re.compile(r"(?!logit_scale$)(?:.*_)?scales?(?:_(?:inv|weight|input|output|2))*")


def _packed(layout: Layout) -> bool:
    return layout.dtype in _PACKED


def _any(layout: Layout) -> bool:
    return True


# Names that only a scheme of quantisation gives, and what their tensors must be.
_MARKS: tuple[tuple[str, re.Pattern[str], Callable[[Layout], bool]], ...] = (
    ("bitsandbytes", re.compile(r".*\.(?:nested_)?absmax|.*\.quant_state\..*"), _any),
    ("bitsandbytes", re.compile(r"(?:.*\.)?(?:SCB|quant_map)"), _any),
    ("GPTQ or AWQ", re.compile(r"(?:.*\.)?(?:qweight|qzeros)"), _packed),
    ("compressed-tensors", re.compile(r"(?:.*\.)?weight_packed"), _packed),
    ("HQQ", re.compile(r"(?:.*\.)?W_q"), _packed),
    ("MXFP4", re.compile(r".*_blocks"), lambda layout: layout.dtype == torch.uint8),
    ("fp8 with scales", re.compile(r"scaled_fp8"), _any),
)


def refuse_quantised(layouts: Mapping[str, Layout], source: str) -> None:
    """Refuse a checkpoint whose weights are quantised.

    Known by their names are the packed weights of bitsandbytes, GPTQ, AWQ, compressed-tensors,
    HQQ and MXFP4; in general, 8-bit floats or packed integers with a tensor of scales beside
    them, in the same module or under the weight's own name.

    Raises:
        CheckpointError: With the scheme and the tensor that tells it.
    """
    for name, layout in layouts.items():
        for scheme, pattern, fits in _MARKS:
            if pattern.fullmatch(name) and fits(layout):
                raise _refusal(source, scheme, name)
    coded = [n for n, layout in layouts.items() if layout.dtype in _FP8 or _packed(layout)]
    if not coded:
        return
    modules = {name.rpartition(".")[0]: name for name in coded}
    own = set(coded)
    for name in layouts:
        module, _, last = name.rpartition(".")
        if not _SCALE.fullmatch(last) or name in own:
            continue
        # A scale beside its weight, or named after it (experts.down_proj_scale, weight._scale).
        stem = re.sub(r"[._]+scales?(?:_inv)?$", "", name)
        weight = stem if stem in own else modules.get(module)
        if weight is not None:
            kind = "fp8" if layouts[weight].dtype in _FP8 else "integer"
            raise _refusal(source, f"{kind} values with scales for {weight!r}", name)


def _refusal(source: str, scheme: str, name: str) -> CheckpointError:
    return CheckpointError(
        f"{source} holds quantised weights ({scheme}; see {name!r})",
        hint="expand quantised weights first: take the checkpoint from before quantisation, or "
        "dequantise it (transformers: model.dequantize(), then save_pretrained)",
    )
