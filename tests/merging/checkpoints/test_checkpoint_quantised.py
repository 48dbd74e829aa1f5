from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.bounded import merge_linearly
from map_bo.merging.vectors.task_vectors import TaskVectors
from tests.merging.damaged import refused

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
INT4, WEIGHT = torch.ones(4, 2, dtype=torch.int32), torch.ones(4, 4)
FP8 = WEIGHT.to(E4M3)
BYTES = torch.ones(8, dtype=torch.uint8)

QUANTISED: list[tuple[dict[str, Tensor], str, str]] = [
    ({"l.weight": FP8, "l.weight_scale": WEIGHT[0]}, "fp8 values with scales", "l.weight_scale"),
    ({"l.weight": FP8, "l.weight_scale_inv": WEIGHT}, "fp8 values", "l.weight_scale_inv"),
    ({"l.weight": FP8, "l.scale_weight": WEIGHT[0]}, "fp8 values", "l.scale_weight"),
    ({"l.weight": FP8, "l.input_scale": WEIGHT[0]}, "fp8 values", "l.input_scale"),
    ({"l.weight": FP8, "l.scale": WEIGHT[0]}, "fp8 values", "l.scale"),
    ({"e.down": WEIGHT.to(E5M2), "e.down_scale": WEIGHT}, "fp8 values", "e.down_scale"),
    ({"e.w1": FP8, "e.w1.scale": WEIGHT}, "fp8 values with scales for 'e.w1'", "e.w1.scale"),
    ({"l.weight": FP8, "scaled_fp8": FP8[:0]}, "fp8 with scales", "scaled_fp8"),
    ({"l.weight": INT4.to(torch.int8), "l.weight_scale": WEIGHT}, "integer", "l.weight_scale"),
    ({"l.weight._data": INT4.to(torch.int8), "l.weight._scale": WEIGHT}, "integer", "._scale"),
    ({"l.weight": BYTES, "l.weight.absmax": WEIGHT[0]}, "bitsandbytes", "l.weight.absmax"),
    ({"l.weight": BYTES, "l.weight.nested_absmax": WEIGHT[0]}, "bitsandbytes", "nested_absmax"),
    (
        {"l.weight": BYTES, "l.weight.quant_state.bitsandbytes__nf4": BYTES},
        "bitsandbytes",
        "quant_state",
    ),
    ({"l.weight": BYTES.to(torch.int8), "l.SCB": WEIGHT[0]}, "bitsandbytes", "l.SCB"),
    ({"l.qweight": INT4, "l.scales": WEIGHT.half()}, "GPTQ or AWQ", "l.qweight"),
    ({"l.weight_packed": INT4, "l.weight_shape": INT4[0]}, "compressed-tensors", "weight_packed"),
    ({"l.W_q": BYTES, "l.meta": WEIGHT}, "HQQ", "l.W_q"),
    ({"e.down_proj_blocks": BYTES, "e.down_proj_scales": BYTES}, "MXFP4", "down_proj_blocks"),
]


@pytest.mark.parametrize(("tensors", "scheme", "name"), QUANTISED)
def test_quantised_weights_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], scheme: str, name: str
) -> None:
    tensors = {"norm.weight": torch.ones(4), **tensors}
    save_file({name: t.clone() for name, t in tensors.items()}, tmp_path / "x.safetensors")
    for source in (tensors, tmp_path / "x.safetensors"):
        error = refused(source, "holds quantised weights", scheme, name)
        assert "expand quantised weights first" in str(error.hint)


@pytest.mark.parametrize(
    "tensors",
    [
        {"l.weight": WEIGHT, "l.weight_scale": WEIGHT[0]},
        {"logit_scale": torch.ones(()), "projection": FP8},
        {"block.layer_scale.gamma": WEIGHT[0], "block.fc.weight": FP8},
        {"block.fc.weight": FP8, "scale": WEIGHT[0]},
        {"counter": torch.tensor(3, dtype=torch.int32), "l.scales": WEIGHT},
        {"l.qweight": WEIGHT},
        {"some_blocks": WEIGHT},
    ],
)
def test_plain_weights_are_not(tensors: dict[str, Tensor]) -> None:
    assert open_checkpoint(tensors).names == tuple(sorted(tensors))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_plain_8_bit_floats_are_values(tmp_path: Path, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    pre = torch.randn(8, 4, generator=generator).to(dtype)
    tuned = torch.randn(8, 4, generator=generator).to(dtype)
    save_file({"w": pre}, tmp_path / "base.safetensors")
    torch.save({"w": tuned}, tmp_path / "expert.pt")
    base = open_checkpoint(tmp_path / "base.safetensors")
    expert = open_checkpoint(tmp_path / "expert.pt")
    assert base.dtype("w") == expert.dtype("w") == dtype
    assert torch.equal(base.load("w").float(), pre.float())
    assert torch.equal(expert.read("w", 3, 9).float(), tuned.float().flatten()[3:9])
    assert base.digest() == open_checkpoint({"w": pre}).digest()
    expected = (pre.float() + 0.5 * (tuned.float() - pre.float())).to(dtype)
    ((_, merged),) = merge_linearly(base, {"e": expert}, lambda name: {"e": 0.5})
    assert merged.dtype == dtype
    assert torch.equal(merged.float(), expected.float())
    vectors = TaskVectors.load(base, {"e": expert})
    torch.testing.assert_close(vectors.deltas.flatten(), (tuned.float() - pre.float()).flatten())
