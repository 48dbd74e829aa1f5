"""What a PEFT LoRA adapter consists of: its tensors under peft's names, and its configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapters import Kind
from map_bo.merging.checkpoint import Checkpoint
from map_bo.merging.low_rank import LowRank
from map_bo.merging.messages import listed

__all__ = ["AdapterContent", "adapter_content"]

_PREFIX = "base_model.model."
# Tasks for which peft adds nothing of its own to the modules that it saves.
_PLAIN_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


@dataclass(frozen=True)
class AdapterContent:
    """The content of an adapter's two files.

    Attributes:
        tensors: Name in the file -> tensor.
        settings: The content of ``adapter_config.json``.
    """

    tensors: Mapping[str, Tensor]
    settings: Mapping[str, Any]


@dataclass
class _Modules:
    """Which modules get factors, which are saved whole, and which biases are set."""

    factors: dict[str, str] = field(default_factory=dict)  # module -> tensor
    saved: set[str] = field(default_factory=set)
    biases: set[str] = field(default_factory=set)


def adapter_content(
    changes: Mapping[str, LowRank],
    values: Mapping[str, Tensor],
    kinds: Mapping[str, Kind],
    base: Checkpoint,
    *,
    prefix: tuple[str, str] = ("", ""),
    base_name: str | None = None,
    task: str | None = None,
) -> AdapterContent:
    """Write changes of a base as a LoRA adapter.

    All factors are padded with zeros to the largest rank, with scale 1, so that no reader needs
    ranks or scales by module. Tensors with a full value are set by saving their whole module
    (peft's ``modules_to_save``), and biases of other modules one by one (``bias="all"``).

    Args:
        changes: Tensor of the base -> its change of low rank; at least one.
        values: Tensor of the base -> its full new value.
        kinds: Tensor -> kind of its module, for all of ``changes``.
        base: The base.
        prefix: What module names of the model begin with and the base's do not, and the other
            way round.
        base_name: What to call the base in the configuration.
        task: peft's name of the model's task.

    Raises:
        MergeError: When there are no factors, a full value belongs to no module, or a module to
            save has factors.
    """
    if not changes:
        raise MergeError(
            "no tensor changes by a product of low rank, and a LoRA adapter needs one",
            hint="export the merged model instead",
        )
    modules = _sorted_out(changes, values, base)
    rank = max(change.rank for change in changes.values())
    tensors: dict[str, Tensor] = {}
    for module, name in modules.factors.items():
        factors = _factors(changes[name], kinds[name], base.shape(name), rank)
        for part, tensor in factors.items():
            tensors[f"{_own(module, prefix)}.{part}"] = tensor
    for module in sorted(modules.saved):
        for name in base.names:
            if name.startswith(f"{module}."):
                value = values[name].to(base.dtype(name)) if name in values else base.load(name)
                tensors[_own(name, prefix)] = value
    for name in sorted(modules.biases):
        module = name.removesuffix(".bias")
        part = "base_layer.bias" if module in modules.factors else "bias"
        tensors[f"{_own(module, prefix)}.{part}"] = values[name].to(base.dtype(name))
    targets = sorted(_own(module, prefix) for module in modules.factors)
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": task if task in _PLAIN_TASKS else None,
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "all" if modules.biases else "none",
        "fan_in_fan_out": any(kinds[name] == "transposed" for name in changes),
        "target_modules": _targets(targets, {_own(m, prefix) for m in _modules(base)}),
        "modules_to_save": sorted(_own(m, prefix) for m in modules.saved) or None,
    }
    stored = {_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    return AdapterContent(stored, settings)


def _own(name: str, prefix: tuple[str, str]) -> str:
    lacking, further = prefix
    return lacking + name.removeprefix(further)


def _modules(base: Checkpoint) -> set[str]:
    """Return the names of all modules that have a tensor of their own."""
    return {name.rpartition(".")[0] for name in base.names}


def _sorted_out(
    changes: Mapping[str, LowRank], values: Mapping[str, Tensor], base: Checkpoint
) -> _Modules:
    modules = _Modules({name.removesuffix(".weight"): name for name in changes})
    wrong = [name for name in changes if not name.endswith(".weight")]
    for name in values:
        module, _, part = name.rpartition(".")
        if not module:
            wrong.append(name)
        elif part != "bias":
            modules.saved.add(module)
    if wrong:
        raise MergeError(
            f"{listed(wrong)} are no weights of a module, and an adapter changes modules",
            hint="export the merged model instead",
        )
    # peft saves every module whose name ends like that of one to save.
    ends = tuple(modules.saved)
    if ends:
        modules.saved |= {module for module in _modules(base) if module.endswith(ends)}
    for module in modules.saved:
        inside = [m for m in modules.factors if m == module or m.startswith(f"{module}.")]
        if inside:
            raise MergeError(
                f"module {module!r} would be saved whole and have factors in {listed(inside)}",
                hint="export the merged model instead",
            )
    for name in values:
        if name.endswith(".bias") and not any(name.startswith(f"{m}.") for m in modules.saved):
            modules.biases.add(name)
    return modules


def _factors(change: LowRank, kind: Kind, shape: torch.Size, rank: int) -> dict[str, Tensor]:
    """Return the two tensors of a module as peft stores them, padded to ``rank``."""
    B = torch.zeros(change.B.shape[0], rank)
    A = torch.zeros(rank, change.A.shape[1])
    B[:, : change.rank], A[: change.rank] = change.scale * change.B, change.A
    if kind == "embedding":
        return {"lora_embedding_A": B.T, "lora_embedding_B": A.T}
    if kind == "transposed":
        A, B = B.T, A.T
    if kind == "conv":
        A = A.reshape(rank, *shape[1:])
        B = B.reshape(shape[0], rank, *(1 for _ in shape[2:]))
    return {"lora_A.weight": A, "lora_B.weight": B}


def _targets(targets: list[str], modules: set[str]) -> list[str] | str:
    """Return the target modules for peft, which takes a name for the end of a longer one."""
    others = modules - set(targets)
    if any(other.endswith(f".{target}") for other in others for target in targets):
        return "|".join(re.escape(target) for target in targets)
    return targets
