"""One merge on disk as a LoRA adapter of bounded rank: some megabytes in place of a model.

The merged changes are brought to low rank, and written as peft expects them: tensors under its
names, and a configuration.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from map_bo.errors import MergeError, listed
from map_bo.merging.adapters.adapter import Adapter, Kind, adapter_over, open_adapter, wide
from map_bo.merging.adapters.lora import CONFIG
from map_bo.merging.adapters.low_rank import LowRank, approximate, stack, truncate
from map_bo.merging.align.experts import align_names
from map_bo.merging.align.layout import is_variance
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.safetensors_files import SafetensorsWriter
from map_bo.merging.checkpoints.tensors import Layout
from map_bo.merging.export.bounded import check_weights
from map_bo.merging.export.draft import publish, refuse_existing, remove_stale_drafts, writing_draft
from map_bo.merging.export.model import require_space
from map_bo.merging.export.recipe import RECIPE, plain, recipe_text
from map_bo.merging.export.write_shards import writing
from map_bo.merging.vectors.operator import Weights
from map_bo.rng import make_generator

__all__ = ["AdapterContent", "AdapterExport", "adapter_content", "export_adapter", "module_kinds"]

_PREFIX = "base_model.model."
# Tasks for which peft adds nothing of its own to the modules that it saves.
_PLAIN_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")

_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class AdapterExport:
    """A written adapter and what was lost in it.

    Attributes:
        path: Its folder.
        rank: Rank of its factors.
        error: Frobenius norm of what was cut off, over that of the whole change, of all tensors
            with factors together; rounding to float32 is not in it.
        errors: Tensor -> the same of that tensor.
    """

    path: Path
    rank: int
    error: float
    errors: Mapping[str, float]


def export_adapter(
    out: str | Path,
    *,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    weights: Weights | None,
    operator: Mapping[str, Any],
    coefficients: Mapping[str, float],
    rank: int | None = None,
    others: Literal["save", "refuse"] = "save",
    kinds: Mapping[str, Kind] | None = None,
    merged: Checkpoint | None = None,
    ties: Mapping[str, str] | None = None,
    record: Mapping[str, Any] | None = None,
) -> AdapterExport:
    """Write a merge as a folder that peft loads over the base.

    Of adapters over this base the merged change of a tensor has at most the sum of their ranks,
    and goes through the small core of its factors, never multiplied out. Of whole models it is
    approximated by its singular value decomposition. Both are the nearest of their rank in the
    Frobenius norm (the latter up to the randomised algorithm for large tensors).

    What changes and has no factors (norms, biases, what an adapter saved whole) is saved as full
    values. The folder appears whole or not at all, as with `write_model`; it holds
    ``adapter_config.json``, ``adapter_model.safetensors`` and ``recipe.yaml``, which records the
    errors.

    Args:
        out: Folder to create; it may exist only when it is empty.
        base: The base that the adapter will be loaded over.
        experts: Name -> checkpoint, adapters or whole models.
        weights: Tensor name -> weight of each expert's change; None where the merge is not linear
            and ``merged`` is given.
        operator: The merge operator as plain data.
        coefficients: Coefficient name -> value.
        rank: Largest rank. None keeps the merge of adapters exact; whole models need a rank.
        others: ``"save"``, or ``"refuse"`` to refuse a merge that needs full values.
        kinds: Tensor -> kind of its module, where whole models are merged; see `module_kinds`.
        merged: The merged model, where the merge is not linear.
        ties: Further ties of the model, alias -> canonical name; the base need not have both.
        record: Further plain data for the recipe.

    Raises:
        MergeError: When the merge changes nothing or tied tensors, needs a rank or kinds that are
            not given, or cannot be written; nothing is left behind.
    """
    target = refuse_existing(out)
    if rank is not None and rank < 1:
        raise MergeError(f"rank must be at least 1, got {rank}", hint="give a whole number from 1")
    further = plain(record or {})
    tied = {*base.ties.values(), *(ties or {}), *(ties or {}).values()}
    if merged is not None:
        merging = _Changes(base, {"merged": merged}, _whole, rank, others, kinds, tied)
    elif weights is not None:
        merging = _Changes(base, experts, weights, rank, others, kinds, tied)
    else:
        raise MergeError(
            "an adapter is written without weights and without a merged model",
            hint="give the weights of a linear merge, or merged=open_checkpoint(the merged model)",
        )
    changes = merging.find()
    adapters = [a for e in experts.values() if (a := adapter_over(base, e)) is not None]
    content = adapter_content(
        changes.factors,
        changes.values,
        changes.kinds,
        base,
        prefix=_prefix(adapters),
        base_name=_common([adapter.settings.base for adapter in adapters])
        or (str(base.directory) if base.directory else None),
        task=_common([adapter.settings.task for adapter in adapters]),
    )
    cut, whole = (math.hypot(*changes.norms[i].values()) for i in (0, 1))
    errors = {n: changes.norms[0][n] / changes.norms[1][n] for n in changes.factors}
    result = AdapterExport(target, int(content.settings["r"]), cut / whole, errors)

    layouts = {name: Layout(t.shape, t.dtype) for name, t in content.tensors.items()}
    with writing(target):
        remove_stale_drafts(target)
        require_space(target, layouts)
    with ExitStack() as stack:
        with writing(target):
            draft = stack.enter_context(writing_draft(target))
            writer = SafetensorsWriter(draft / _WEIGHTS, layouts, {"format": "pt"})
            for name, tensor in content.tensors.items():
                writer.write(name, tensor)
            settings = json.dumps(content.settings, indent=2, ensure_ascii=False) + "\n"
            (draft / CONFIG).write_text(settings, encoding="utf-8")
        recipe = recipe_text(
            base=base,
            experts=experts,
            operator=operator,
            coefficients=coefficients,
            merged={
                # Read back from the file, as for a whole model.
                "sha256": open_adapter(draft, base).digest(),
                "adapter": {
                    "rank": result.rank,
                    "relative_error": result.error,
                    "relative_errors": dict(errors),
                    "full_values": sorted(changes.values),
                },
            },
            record=further,
        )
        with writing(target):
            (draft / RECIPE).write_text(recipe, encoding="utf-8")
            publish(draft, target)
    return result


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
    modules = _sort_out(changes, values, base)
    rank = max(change.rank for change in changes.values())
    tensors: dict[str, Tensor] = {}
    for module, name in modules.factors.items():
        factors = _factors(changes[name], kinds[name], base.shape(name), rank)
        for part, tensor in factors.items():
            tensors[f"{_name_in_model(module, prefix)}.{part}"] = tensor
    for module in sorted(modules.saved):
        for name in base.names:
            if name.startswith(f"{module}."):
                value = values[name].to(base.dtype(name)) if name in values else base.load(name)
                tensors[_name_in_model(name, prefix)] = value
    for name in sorted(modules.biases):
        module = name.removesuffix(".bias")
        part = "base_layer.bias" if module in modules.factors else "bias"
        tensors[f"{_name_in_model(module, prefix)}.{part}"] = values[name].to(base.dtype(name))
    targets = sorted(_name_in_model(module, prefix) for module in modules.factors)
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
        "target_modules": _targets(targets, {_name_in_model(m, prefix) for m in _modules(base)}),
        "modules_to_save": sorted(_name_in_model(m, prefix) for m in modules.saved) or None,
    }
    stored = {_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    return AdapterContent(stored, settings)


def _name_in_model(name: str, prefix: tuple[str, str]) -> str:
    lacking, further = prefix
    return lacking + name.removeprefix(further)


def _modules(base: Checkpoint) -> set[str]:
    """Return the names of all modules that have a tensor of their own."""
    return {name.rpartition(".")[0] for name in base.names}


def _sort_out(
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
            f"{listed(wrong)} are not weights of a module, and an adapter changes modules",
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


def module_kinds(model: nn.Module) -> dict[str, Kind]:
    """Return tensor name -> kind of its module, for the modules that can have LoRA factors.

    Those are linear layers (transformers' ``Conv1D`` too, not those inside torch's own attention,
    which uses their weights itself), embeddings, and convolutions without groups.
    """
    kinds: dict[str, Kind] = {}
    inside = tuple(
        f"{name}." for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    )  # fmt: skip
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if inside and name.startswith(inside):
            continue
        if isinstance(module, nn.Linear):
            kinds[weight] = "linear"
        elif type(module).__name__ == "Conv1D":
            kinds[weight] = "transposed"
        elif isinstance(module, nn.Embedding):
            kinds[weight] = "embedding"
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and module.groups == 1:
            kinds[weight] = "conv"
    return kinds


def _whole(name: str) -> Mapping[str, float]:
    """Return the weight of the merged model: its change is the whole change."""
    return {"merged": 1.0}


def _common(values: list[str | None]) -> str | None:
    """Return the one value that all have, or None."""
    return values[0] if len(set(values)) == 1 else None


def _prefix(adapters: list[Adapter]) -> tuple[str, str]:
    prefixes = {adapter.prefix: adapter.source for adapter in adapters}
    if len(prefixes) > 1:
        raise MergeError(
            f"the adapters {listed(prefixes.values())} call their modules by other prefixes",
            hint="export the merged model instead",
        )
    return next(iter(prefixes), ("", ""))


@dataclass
class _Found:
    """The merged changes: factors or full values, and norms of what was cut off and of all."""

    factors: dict[str, LowRank] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    kinds: dict[str, Kind] = field(default_factory=dict)
    norms: tuple[dict[str, float], dict[str, float]] = field(default_factory=lambda: ({}, {}))


class _Changes:
    """Merges the changes of every tensor."""

    def __init__(
        self,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        weights: Weights,
        rank: int | None,
        others: str,
        kinds: Mapping[str, Kind] | None,
        tied: Set[str],
    ) -> None:
        self._tied = tied
        self._base, self._experts, self._weights = base, experts, weights
        self._rank, self._others, self._given = rank, others, kinds
        self._adapters = {name: adapter_over(base, expert) for name, expert in experts.items()}
        self._names = {
            name: align_names(base, expert, name)
            for name, expert in experts.items()
            if self._adapters[name] is None
        }
        self._kinds = dict(kinds or {})
        for adapter in self._adapters.values():
            self._kinds.update(adapter.kinds if adapter is not None else {})

    def find(self) -> _Found:
        result = _Found()
        for name in self._base.names:
            if name in self._base.ties or not self._base.dtype(name).is_floating_point:
                continue
            given = check_weights(self._weights(name), name, self._experts)
            used = {expert: weight for expert, weight in given.items() if weight}
            parts, rest, fixed = self._sum(name, used)
            if not parts and rest is None:
                continue
            if name in self._tied:
                raise MergeError(
                    f"the merge changes {name!r}, which is tied, and an adapter changes tensors "
                    "under one name only",
                    hint="export the merged model instead",
                )
            if rest is None or (not fixed and self._can_factor(name)):
                self._factor(name, parts, rest, result)
            else:
                result.values[name] = self._value(name, parts, rest)
        if result.values and self._others == "refuse":
            raise MergeError(
                f"the merge changes {listed(sorted(result.values))}, which have no factors",
                hint='pass others="save" to save them as full values',
            )
        if not result.factors and not result.values:
            raise MergeError(
                "the merge is the base: its adapter would change nothing",
                hint="choose coefficients that are not all zero",
            )
        return result

    def _sum(
        self, name: str, used: Mapping[str, float]
    ) -> tuple[list[LowRank], Tensor | None, bool]:
        """Return the parts of low rank, the sum of the others, and whether one saved it whole."""
        parts: list[LowRank] = []
        rest: Tensor | None = None
        fixed = False
        for expert, weight in used.items():
            adapter = self._adapters[expert]
            if adapter is not None:
                part, delta = adapter.low_rank(name), adapter.dense(name)
                if part is not None:
                    parts.append(replace(part, scale=weight * part.scale))
                fixed = fixed or delta is not None
            else:
                tuned = self._experts[expert].load(self._names[expert][name])
                pre = self._base.load(name)
                both = wide(torch.promote_types(tuned.dtype, wide(pre.dtype)))
                delta = tuned.to(both) - pre.to(both)
            if delta is not None and bool(delta.any()):
                rest = weight * delta if rest is None else rest + weight * delta
        return parts, rest, fixed

    def _can_factor(self, name: str) -> bool:
        if len(self._base.shape(name)) < 2:
            return False
        if self._given is None and name not in self._kinds:
            raise MergeError(
                f"whether {name!r} is the weight of a linear layer or of an embedding is unknown",
                hint="pass kinds=module_kinds(model), with the model of these weights",
            )
        return name in self._kinds

    def _factor(self, name: str, parts: list[LowRank], rest: Tensor | None, result: _Found) -> None:
        if rest is None:
            change, cut, whole = truncate(stack(parts), self._rank)
        elif self._rank is None:
            raise MergeError(
                f"whole models change {name!r}, and their exact change is not of low rank",
                hint="give a rank, such as 16; the error that it makes is reported",
            )
        else:
            matrix = rest.flatten(1)
            matrix = matrix + stack(parts).dense() if parts else matrix
            # The draws of the sketch are fixed: the same merge is written the same again.
            change, cut, whole = approximate(matrix, self._rank, generator=make_generator(0))
        if whole:
            result.factors[name], result.kinds[name] = change, self._kinds[name]
            result.norms[0][name], result.norms[1][name] = cut, whole

    def _value(self, name: str, parts: list[LowRank], rest: Tensor) -> Tensor:
        pre = self._base.load(name)
        total = rest + pre.to(rest.dtype)
        if parts:
            total = total + stack(parts).dense().view(pre.shape)
        if is_variance(name):  # as `merge_linearly` does it, experts of weight zero included
            least = pre.to(total.dtype)
            for expert, checkpoint in self._experts.items():
                own = self._names[expert][name] if expert in self._names else name
                least = torch.minimum(least, checkpoint.load(own).to(total.dtype))
            total = torch.maximum(total, least)
        return total.to(pre.dtype)
