"""One merge on disk as a LoRA adapter of bounded rank: some megabytes in place of a model.

The merged changes are brought to low rank, and written as peft expects them: tensors under its
names, and a configuration.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from map_bo.errors import MergeError, listed
from map_bo.merging.adapters.adapter import Adapter, Kind, adapter_over, open_adapter
from map_bo.merging.adapters.lora import CONFIG
from map_bo.merging.adapters.low_rank import LowRank
from map_bo.merging.adapters.peft_check import load_with_peft
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.safetensors_files import SafetensorsWriter
from map_bo.merging.checkpoints.saved_names import ModuleTensors
from map_bo.merging.checkpoints.skeleton import skeleton
from map_bo.merging.checkpoints.tensors import Layout
from map_bo.merging.export.adapter_changes import ChangeMerger, whole_of
from map_bo.merging.export.draft import publish, refuse_existing, remove_stale_drafts, writing_draft
from map_bo.merging.export.model import require_space
from map_bo.merging.export.model_card import MODEL_CARD, AdapterFacts, model_card_text
from map_bo.merging.export.recipe import RECIPE, plain, recipe_text
from map_bo.merging.export.write_shards import writing
from map_bo.merging.vectors.operator import Weights

__all__ = ["AdapterContent", "AdapterExport", "adapter_content", "export_adapter", "module_kinds"]

_PREFIX = "base_model.model."
# Tasks for which peft adds nothing of its own to the modules that it saves.
_PLAIN_TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM")

_WEIGHTS = "adapter_model.safetensors"
# Kind of model -> modules that peft does not adapt, since a fused kernel reads their weights.
_FUSED = dict.fromkeys(
    ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h"), ("out_proj", "conv1d")
)


@dataclass(frozen=True)
class AdapterExport:
    """A written adapter and what was lost in it.

    Attributes:
        path: Its folder.
        rank: Rank of its factors.
        error: Frobenius norm of what the adapter, read back from its file, lacks of the change,
            over that of the whole change, of all tensors with factors together.
        errors: Tensor of the model's modules -> the same of that tensor, by what was cut off;
            rounding to float32 is not in it.
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
    model: nn.Module | None = None,
    merged: Checkpoint | None = None,
    ties: Mapping[str, str] | None = None,
    record: Mapping[str, Any] | None = None,
) -> AdapterExport:
    """Write a merge as a folder that peft loads over the base.

    Of adapters over this base the merged change of a tensor has at most the sum of their ranks,
    and goes through the small core of its factors, never multiplied out. Of whole models it is
    approximated by its singular value decomposition. Both are the nearest of their rank in the
    Frobenius norm (the latter up to the randomised algorithm for large tensors). A stack of
    matrices (the experts of a mixture) gets factors for each of them, as peft's
    ``target_parameters``.

    Names are those of the model's modules, which adapters go by; the base's files may have others,
    and may have one tensor of a module in several pieces.

    What changes and has no factors (norms, biases, what an adapter saved whole) is saved as full
    values. The folder appears whole or not at all, as with `write_model`; it holds
    ``adapter_config.json``, ``adapter_model.safetensors``, ``recipe.yaml``, which records the
    errors, and ``README.md``. Before it appears it is read back, and what it changes in every
    tensor of the base is compared with what the merge changes; where peft is installed, it has
    loaded the adapter over the model without weights.

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
        kinds: Tensor -> kind of its module, where neither ``model`` nor the base's configuration
            tells; see `module_kinds`.
        model: The model of the base; its weights do not matter. By default the one that the base's
            ``config.json`` describes, and where there is none, names are those of the base.
        merged: The merged model, where the merge is not linear.
        ties: Further ties of the model, alias -> canonical name; the base need not have both.
        record: Further plain data for the recipe.

    Raises:
        MergeError: When the merge changes nothing, needs a rank, kinds or modules that are
            not given, or cannot be written; when what was written is not what was meant. Nothing
            is left behind.
    """
    target = refuse_existing(out)
    if rank is not None and rank < 1:
        raise MergeError(f"rank must be at least 1, got {rank}", hint="give a whole number from 1")
    further = plain(record or {})
    if merged is None and weights is None:
        raise MergeError(
            "an adapter is written without weights and without a merged model",
            hint="give the weights of a linear merge, or merged=open_checkpoint(the merged model)",
        )
    known = skeleton(base) if model is None else model
    modules = None if known is None else ModuleTensors.of(known, base.names)
    if modules is None:
        if model is not None:
            raise MergeError(
                f"the model {type(model).__name__} has none of the base's tensors",
                hint="give the model that the base was saved from",
            )
        known = None
        modules = ModuleTensors.plain({name: base.shape(name) for name in base.names})
    if known is not None and kinds is None:
        kinds = module_kinds(known)
    source: Mapping[str, Checkpoint] = experts if merged is None else {"merged": merged}
    merging = ChangeMerger(
        base,
        source,
        weights if merged is None and weights is not None else _whole,
        rank,
        others,
        kinds,
        {**base.ties, **(ties or {})},
        modules,
    )
    changes = merging.find()
    adapters = [a for e in experts.values() if (a := adapter_over(base, e)) is not None]
    content = adapter_content(
        changes.factors,
        changes.values,
        changes.kinds,
        base,
        modules=modules,
        layers=kinds,
        tied=changes.tied,
        prefix=_prefix(adapters),
        base_name=_common([adapter.settings.base for adapter in adapters])
        or (str(base.directory) if base.directory else None),
        task=_common([adapter.settings.task for adapter in adapters]),
    )

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
        written = open_adapter(draft, base, model=known)
        error = merging.compare(written, changes)
        by_peft = known is not None and load_with_peft(known, draft, content.tensors)
        errors = {n: cut / whole for n, (cut, whole) in changes.norms.items()}
        result = AdapterExport(target, int(content.settings["r"]), error, errors)
        told = {
            "rank": result.rank,
            "relative_error": result.error,
            "relative_errors": dict(errors),
            "full_values": sorted(changes.values),
        }
        recipe = recipe_text(
            base=base,
            experts=experts,
            operator=operator,
            coefficients=coefficients,
            # Read back from the file, as for a whole model.
            merged={"sha256": written.digest(), "adapter": told},
            record=further,
        )
        card = model_card_text(
            base=base,
            experts=experts,
            operator=plain(operator),
            coefficients=coefficients,
            record=further,
            adapter=AdapterFacts(
                rank=result.rank,
                error=error,
                full_values=tuple(sorted(changes.values)),
                parameters=tuple(content.settings.get("target_parameters") or ()),
                loaded=by_peft,
            ),
        )
        with writing(target):
            (draft / RECIPE).write_text(recipe, encoding="utf-8")
            (draft / MODEL_CARD).write_text(card, encoding="utf-8")
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
    """How each change of a module is written.

    Attributes:
        factors: Tensor -> name of its factors' module in the file.
        targets: Modules with factors.
        parameters: Tensors with factors of their own.
        saved: Modules that are saved whole.
        single: Tensors whose value is set one by one -> their name in the file.
    """

    factors: dict[str, str] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    saved: set[str] = field(default_factory=set)
    single: dict[str, str] = field(default_factory=dict)


def adapter_content(
    changes: Mapping[str, Sequence[LowRank]],
    values: Mapping[str, Tensor],
    kinds: Mapping[str, Kind],
    base: Checkpoint,
    *,
    modules: ModuleTensors,
    layers: Mapping[str, Kind] | None = None,
    tied: Set[str] = frozenset(),
    prefix: tuple[str, str] = ("", ""),
    base_name: str | None = None,
    task: str | None = None,
) -> AdapterContent:
    """Write changes of a base as a LoRA adapter.

    All factors are padded with zeros to the largest rank, with scale 1, so that no reader needs
    ranks or scales by module. Tensors with a full value are set by saving their whole module
    (peft's ``modules_to_save``) where it has no modules inside and no factors, and one by one
    otherwise, as peft does with trained biases.

    Args:
        changes: Tensor of a module -> its change of low rank; at least one tensor. A stack has one
            for each of its matrices.
        values: Tensor of a module -> its full new value.
        kinds: Tensor -> kind of its module, for all of ``changes``.
        base: The base.
        modules: The tensors of the model's modules.
        layers: The kinds that the model's own modules have, where it is known: what has factors and
            is no such weight gets them as a bare parameter.
        tied: Those of ``values`` that are one tensor with another: they are set one by one, so
            that they stay one.
        prefix: What module names of the trained model begin with and the base's do not, and the
            other way round.
        base_name: What to call the base in the configuration.
        task: peft's name of the model's task.

    Raises:
        MergeError: When there are no factors, or peft cannot express them.
    """
    if not changes:
        raise MergeError(
            "no tensor changes by a product of low rank, and a LoRA adapter needs one",
            hint="export the merged model instead",
        )
    found = _sort_out(changes, values, kinds, modules, tied, layers)
    flipped = [name for name in changes if kinds[name] == "transposed"]
    if flipped and found.parameters:
        raise MergeError(
            f"{listed(flipped)} are stored in x out and {listed(found.parameters)} are bare "
            "parameters, and peft takes both in no one adapter",
            hint="export the merged model instead",
        )
    rank = max(part.rank for parts in changes.values() for part in parts)
    tensors: dict[str, Tensor] = {}
    for name, module in found.factors.items():
        in_by_out = name.rpartition(".")[0] in modules.in_by_out
        factors = _factors(changes[name], kinds[name], modules.shapes[name], rank, in_by_out)
        for part, tensor in factors.items():
            tensors[f"{_name_in_model(module, prefix)}.{part}"] = tensor
    for module in sorted(found.saved):
        for name in modules.shapes:
            if name.startswith(f"{module}."):
                tensors[_name_in_model(name, prefix)] = (
                    values[name] if name in values else whole_of(base, modules, name)
                )
    for name, own in sorted(found.single.items()):
        tensors[_name_in_model(own, prefix)] = values[name]
    targets = sorted(_name_in_model(module, prefix) for module in found.targets)
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
        # Makes peft warn that these stay when the adapter is switched off.
        "bias": "all" if found.single else "none",
        "fan_in_fan_out": bool(flipped),
        "target_modules": _targets(targets, {_name_in_model(m, prefix) for m in modules.modules}),
        "modules_to_save": sorted(_name_in_model(m, prefix) for m in found.saved) or None,
    }
    if found.parameters:
        settings["target_parameters"] = sorted(_name_in_model(n, prefix) for n in found.parameters)
    stored = {_PREFIX + name: tensor.contiguous() for name, tensor in tensors.items()}
    return AdapterContent(stored, settings)


def _name_in_model(name: str, prefix: tuple[str, str]) -> str:
    lacking, further = prefix
    return lacking + name.removeprefix(further)


def _sort_out(
    changes: Mapping[str, Sequence[LowRank]],
    values: Mapping[str, Tensor],
    kinds: Mapping[str, Kind],
    modules: ModuleTensors,
    tied: Set[str],
    known: Mapping[str, Kind] | None,
) -> _Modules:
    found = _Modules()
    # peft takes a linear layer that is called like an expert of an older layout for that.
    pieces = {
        own.split(".")[-2]
        for parts in modules.parts.values() if len(parts) > 1 for own, _ in parts if "." in own
    }  # fmt: skip
    depth: dict[str, int] = {}
    for name in changes:
        module = name.rpartition(".")[0]
        if not module:
            raise MergeError(
                f"{name!r} belongs to the model itself, and peft gives factors to modules in it",
                hint="export the merged model instead",
            )
        linear = kinds[name] == "linear"
        bare = kinds[name] == "stack" or (
            linear
            and (module.rpartition(".")[2] in pieces or (known is not None and name not in known))
        )
        (found.parameters if bare else found.targets).append(name if bare else module)
        depth[module] = 1
    bare_names = set(found.parameters)
    for name in changes:
        module = name.rpartition(".")[0]
        layers = [other for other in modules.on_one_module(name) if other in bare_names]
        # Each bare parameter wraps its module once more; the first one is innermost.
        inside = len(layers) - 1 - layers.index(name) if name in bare_names else 0
        found.factors[name] = module + ".base_layer" * inside
        depth[module] = max(1, len(layers))
    alone = {name for name in values if name in tied or name.endswith(".bias")}
    whole = {name.rpartition(".")[0] for name in values if name not in alone}
    for module in whole:
        # peft saves every module whose name ends like that of one to save.
        alike = {other for other in modules.modules if other.endswith(module)} if module else set()
        held = {n for n in modules.shapes for m in alike if n.startswith(f"{m}.")}
        plain = not alike & (modules.parents | depth.keys()) and not held & tied
        if alike and plain and held <= set(modules.parts):
            found.saved |= alike
    for name in values:
        module, _, part = name.rpartition(".")
        if module not in found.saved:
            wrapped = module + ".base_layer" * depth.get(module, 0)
            found.single[name] = f"{wrapped}.{part}" if module else part
    return found


def _factors(
    changes: Sequence[LowRank], kind: Kind, shape: torch.Size, rank: int, in_by_out: bool
) -> dict[str, Tensor]:
    """Return the two tensors of a module as peft stores them, padded to ``rank``."""
    padded = [_padded(change, rank) for change in changes]
    if kind == "stack":
        pairs = [(A.T, B.T) if in_by_out else (B, A) for B, A in padded]
        # The ranks of one expert lie side by side in A, and the experts of one rank in B.
        return {
            "lora_A.weight": torch.cat([A for _, A in pairs]),
            "lora_B.weight": torch.stack([B for B, _ in pairs], dim=2).flatten(1),
        }
    B, A = padded[0]
    if kind == "embedding":
        return {"lora_embedding_A": B.T, "lora_embedding_B": A.T}
    if kind == "transposed":
        A, B = B.T, A.T
    if kind == "conv":
        A = A.reshape(rank, *shape[1:])
        B = B.reshape(shape[0], rank, *(1 for _ in shape[2:]))
    return {"lora_A.weight": A, "lora_B.weight": B}


def _padded(change: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    B = torch.zeros(change.B.shape[0], rank)
    A = torch.zeros(rank, change.A.shape[1])
    B[:, : change.rank], A[: change.rank] = change.scale * change.B, change.A
    return B, A


def _targets(targets: list[str], modules: set[str]) -> list[str] | str:
    """Return the target modules for peft, which takes a name for the end of a longer one."""
    others = modules - set(targets)
    if any(other.endswith(f".{target}") for other in others for target in targets):
        return "|".join(re.escape(target) for target in targets)
    return targets


def module_kinds(model: nn.Module) -> dict[str, Kind]:
    """Return tensor name -> kind of its module, for the modules that can have LoRA factors.

    Those are linear layers (transformers' ``Conv1D`` too, not those inside torch's own attention,
    which uses their weights itself), embeddings, convolutions without groups, and stacks of
    matrices: parameters of three dimensions of modules that have nothing inside. Mamba's output
    layers, whose weights a fused kernel reads, are not among them: peft refuses them.
    """
    kinds: dict[str, Kind] = {}
    config = vars(model).get("config")
    kind = vars(type(config)).get("model_type")  # transformers has it on the class
    fused = _FUSED.get(kind, ()) if isinstance(kind, str) else ()
    inside = tuple(
        f"{name}." for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    )  # fmt: skip
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if (inside and name.startswith(inside)) or name.rpartition(".")[2] in fused:
            continue
        if isinstance(module, nn.Linear):
            kinds[weight] = "linear"
        elif type(module).__name__ == "Conv1D":
            kinds[weight] = "transposed"
        elif isinstance(module, nn.Embedding):
            kinds[weight] = "embedding"
        elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            if module.groups == 1:
                kinds[weight] = "conv"
        elif all(not list(child.parameters()) for child in module.children()):
            for part, parameter in module.named_parameters(recurse=False):
                if parameter.dim() == 3 and parameter.shape[0] > 1:
                    kinds[f"{name}.{part}" if name else part] = "stack"
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
