"""The sizes of models that merging is timed on: tensors of a Llama, and their configuration."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

__all__ = ["SIZES", "LlamaShape", "Size"]

_HEAD = 64  # width of an attention head


@dataclass(frozen=True)
class LlamaShape:
    """How large a Llama is; its two embeddings are not tied.

    Attributes:
        width: Of the hidden states, a multiple of 64.
        layers: How many.
        intermediate: Width of the gated layers between.
        vocabulary: Rows of each embedding.
    """

    width: int
    layers: int
    intermediate: int
    vocabulary: int

    def linear(self) -> dict[str, tuple[int, int]]:
        """Return name -> shape of the weights of the linear layers, the last one left out."""
        wide, narrow = self.intermediate, self.width
        layer = {
            **{f"self_attn.{kind}_proj": (narrow, narrow) for kind in "qkvo"},
            "mlp.gate_proj": (wide, narrow),
            "mlp.up_proj": (wide, narrow),
            "mlp.down_proj": (narrow, wide),
        }
        return {
            f"model.layers.{i}.{name}.weight": shape
            for i in range(self.layers)
            for name, shape in layer.items()
        }

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return name -> shape of all tensors, as transformers names them."""
        norms: dict[str, tuple[int, ...]] = {
            f"model.layers.{i}.{kind}_layernorm.weight": (self.width,)
            for i in range(self.layers)
            for kind in ("input", "post_attention")
        }
        return {
            "lm_head.weight": (self.vocabulary, self.width),
            "model.embed_tokens.weight": (self.vocabulary, self.width),
            **self.linear(),
            **norms,
            "model.norm.weight": (self.width,),
        }

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(map(prod, self.tensors().values()))

    def config(self, dtype: str) -> dict[str, Any]:
        """Return the content of its ``config.json``."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.width // _HEAD,
            "num_key_value_heads": self.width // _HEAD,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": dtype,
        }


@dataclass(frozen=True)
class Size:
    """What is measured, and how often.

    Attributes:
        resident: The model whose task vectors are kept in memory.
        streamed: The model that is merged from disk to disk.
        repeats: Turns of merges in memory.
        disk_repeats: Turns of merges to disk.
        disk_storages: Storages whose merges to disk are measured beside those in memory.
    """

    resident: LlamaShape
    streamed: LlamaShape
    repeats: int
    disk_repeats: int
    disk_storages: tuple[str, ...] = ("float32", "bfloat16", "float16")


_TINY = LlamaShape(width=64, layers=2, intermediate=160, vocabulary=1000)
_SMALL = LlamaShape(width=384, layers=6, intermediate=1024, vocabulary=16000)  # 23 M
_LARGE = LlamaShape(width=768, layers=12, intermediate=2048, vocabulary=32000)  # 134 M
_HUGE = LlamaShape(width=2048, layers=27, intermediate=5632, vocabulary=32000)  # 1.5 G

SIZES = {
    "smoke": Size(_TINY, _TINY, repeats=2, disk_repeats=1, disk_storages=("float32",)),
    "middle": Size(_SMALL, _LARGE, repeats=5, disk_repeats=2),
    "full": Size(_LARGE, _HUGE, repeats=9, disk_repeats=3),
}
"""``full`` is what is recorded; the others show that it runs."""
