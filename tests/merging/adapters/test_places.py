from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from map_bo.errors import MergeError
from map_bo.merging.adapters.adapter import open_adapter
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.rng import make_generator

PREFIX = "base_model.model."


class Experts(nn.Module):
    """Two stacks of matrices, as a mixture of experts has them."""

    def __init__(self, *, in_by_out: bool) -> None:
        super().__init__()
        self.is_transposed = in_by_out
        self.up = nn.Parameter(torch.zeros(3, 4, 4))
        self.down = nn.Parameter(torch.zeros(3, 5, 4))


class Model(nn.Module):
    def __init__(self, *, in_by_out: bool = False) -> None:
        super().__init__()
        self.experts = Experts(in_by_out=in_by_out)


def write(folder: Path, tensors: dict[str, Tensor], *targets: str) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({PREFIX + n: t for n, t in tensors.items()}, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("in_by_out", [False, True])
def test_stacks_have_the_change_that_peft_gives_them(tmp_path: Path, in_by_out: bool) -> None:
    generator = make_generator(0)
    model, base = Model(in_by_out=in_by_out), open_checkpoint(Model())
    sizes = {"base_layer.": (4, 4), "": (5, 4) if in_by_out else (4, 5)}  # in, out
    tensors: dict[str, Tensor] = {}
    for wrapped, (width, height) in sizes.items():
        tensors[f"experts.{wrapped}lora_A.weight"] = torch.randn(6, width, generator=generator)
        tensors[f"experts.{wrapped}lora_B.weight"] = torch.randn(height, 6, generator=generator)
    found = open_adapter(write(tmp_path, tensors, "experts.up", "down"), base, model=model)
    for name, wrapped in (("up", "base_layer."), ("down", "")):
        A = tensors[f"experts.{wrapped}lora_A.weight"].view(3, 2, -1)
        B = tensors[f"experts.{wrapped}lora_B.weight"].view(-1, 2, 3)
        # The formula of peft's ParamWrapper.get_delta_weight.
        order = "o r e, e r i -> e i o" if in_by_out else "o r e, e r i -> e o i"
        wanted = 2 * torch.einsum(order, B, A)
        delta = found.delta(f"experts.{name}")
        assert delta is not None
        torch.testing.assert_close(delta, wanted)
        piece = found.piece(f"experts.{name}", 3, 17)
        assert piece is not None
        torch.testing.assert_close(piece, wanted.flatten()[3:17])


def test_bare_parameters_of_an_unknown_model_are_refused(tmp_path: Path) -> None:
    tensors = {
        "experts.base_layer.lora_A.weight": torch.ones(6, 4),
        "experts.base_layer.lora_B.weight": torch.ones(4, 6),
    }
    base = open_checkpoint({"other.weight": torch.zeros(3, 4, 4)})
    with pytest.raises(MergeError, match=r"bare parameters of 'experts' \(target_parameters\)"):
        open_adapter(write(tmp_path, tensors, "experts.up"), base)
