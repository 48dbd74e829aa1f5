"""Settings of a PEFT LoRA adapter: its ``adapter_config.json``, and which kinds are refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from map_bo.errors import CheckpointError
from map_bo.merging.messages import first_line

__all__ = ["CONFIG", "LoraSettings", "read_settings"]

CONFIG = "adapter_config.json"

_WHOLE = "merge it into its base first (peft: merge_and_unload, then save_pretrained) and give that"
# Settings under which an adapter is no sum of its base and low-rank products.
_REFUSED = {
    "use_dora": "is DoRA, whose change depends on the norms of the base's weights",
    "use_qalora": "is QALoRA, whose factors act on groups of inputs",
    "use_bdlora": "is BD-LoRA, whose factors are block-diagonal",
    "alora_invocation_tokens": "is an activated LoRA, which acts on some tokens only",
    "arrow_config": "routes between adapters (Arrow) and is no change of weights",
    "kasa_config": "is KaSA, which changes the base's weights too",
    "monteclora_config": "is MonteCLoRA, whose factors are random",
    "layer_replication": "replicates layers, so its model is not of the base's architecture",
    "target_parameters": "adapts bare parameters (target_parameters), not modules",
    "trainable_token_indices": "trains single rows of the embedding (trainable_token_indices)",
}
# Initialisations that leave the base's weights as they are; the others change the base.
_INITIALISED = (True, False, None, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class LoraSettings:
    """What the configuration of a LoRA adapter says about its tensors.

    Attributes:
        r: Rank of every pair of factors that ``rank_pattern`` does not name.
        alpha: Numerator of the scale, where ``alpha_pattern`` does not name the module.
        rank_pattern: Regular expression of module names -> rank.
        alpha_pattern: Regular expression of module names -> numerator.
        rslora: Whether the scale is ``alpha / sqrt(r)`` (Kalajdzievski, arXiv 2312.03732) and
            not ``alpha / r``.
        fan_in_fan_out: Whether weights are stored ``in x out``, as in GPT-2's ``Conv1D``. Only
            square weights need it; the shape tells of others.
        base: What the adapter was trained from, as the configuration calls it, or None.
        task: peft's name of the model's task, or None.
    """

    r: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    fan_in_fan_out: bool = False
    base: str | None = None
    task: str | None = None

    def rank(self, module: str) -> int:
        """Return the rank of the factors of a module."""
        return int(_found(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """Return what the product of a module's factors is multiplied by."""
        rank = self.rank(module)
        alpha = float(_found(self.alpha_pattern, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _found(pattern: Mapping[str, float], module: str, default: float) -> float:
    """Return the first entry whose expression matches the end of a module's name."""
    for key, value in pattern.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def read_settings(folder: Path) -> LoraSettings:
    """Read ``adapter_config.json`` of a LoRA adapter.

    Raises:
        CheckpointError: When it is missing or damaged, or the adapter is of a kind that is no sum
            of the base and low-rank products.
    """
    path = folder / CONFIG
    content = _read(path)
    kind = str(content.get("peft_type", "")).upper()
    if kind != "LORA":
        raise CheckpointError(
            f"{folder} is an adapter of the kind {kind or 'unknown'}; only LoRA adapters are read",
            hint=_WHOLE,
        )
    for key, reason in _REFUSED.items():
        if content.get(key):
            raise CheckpointError(f"the adapter {folder} {reason}", hint=_WHOLE)
    start = content.get("init_lora_weights")
    if start not in _INITIALISED:
        raise CheckpointError(
            f"the adapter {folder} was initialised by {start!r}, which changes the base's weights",
            hint="save it relative to its base (peft: save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)), or merge it into its base first",
        )
    r, alpha = content.get("r"), content.get("lora_alpha")
    if not _is_rank(r) or not _is_number(alpha):
        raise CheckpointError(
            f"{path} has r = {r!r} and lora_alpha = {alpha!r}",
            hint="both are positive numbers in the configuration of a LoRA adapter",
        )
    assert isinstance(r, int)
    assert isinstance(alpha, (int, float))
    task = content.get("task_type")
    named = content.get("base_model_name_or_path")
    return LoraSettings(
        r=r,
        alpha=float(alpha),
        rank_pattern=_pattern(path, content, "rank_pattern"),
        alpha_pattern=_pattern(path, content, "alpha_pattern"),
        rslora=bool(content.get("use_rslora")),
        fan_in_fan_out=bool(content.get("fan_in_fan_out")),
        base=named if isinstance(named, str) and named else None,
        task=task if isinstance(task, str) else None,
    )


def _read(path: Path) -> dict[str, Any]:
    hint = f"an adapter is a folder with {CONFIG} and adapter_model.safetensors"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}", hint=hint) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no settings", hint=hint)
    return content


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _pattern(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    pattern = content.get(key) or {}
    valid = isinstance(pattern, dict) and all(map(_is_number, pattern.values()))
    if valid and key == "rank_pattern":
        valid = all(map(_is_rank, pattern.values()))
    try:
        for text in pattern if valid else ():
            re.compile(text)
    except re.error:
        valid = False
    if not valid:
        raise CheckpointError(
            f"{path} has an unusable {key}",
            hint="it is a mapping from regular expressions of module names to numbers",
        )
    return dict(pattern)
