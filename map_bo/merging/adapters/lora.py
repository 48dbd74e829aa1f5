"""PEFT's LoRA format: settings, names of tensors, and the tensors of the base that they belong to.

Adapters that are not sums of a base and low-rank products are refused here, by their settings or by
their tensors.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from map_bo.errors import CheckpointError, MergeError, first_line, listed
from map_bo.foreign import read_json, understood
from map_bo.merging.adapters.patterns import ending_pattern, require_quick
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.checkpoints.read_sharded import require_inside

__all__ = [
    "CONFIG",
    "LoraSettings",
    "Orientation",
    "OwnTensor",
    "is_counter",
    "own_tensors",
    "place",
    "read_settings",
    "require_quick_patterns",
    "with_parameters",
]

CONFIG = "adapter_config.json"

_WHOLE = "merge it into its base first (peft: merge_and_unload, then save_pretrained) and give that"
# Settings under which an adapter is not a sum of its base and low-rank products.
_REFUSED = {
    "use_dora": "is DoRA, whose change depends on the norms of the base's weights",
    "use_qalora": "is QALoRA, whose factors act on groups of inputs",
    "use_bdlora": "is BD-LoRA, whose factors are block-diagonal",
    "alora_invocation_tokens": "is an activated LoRA, which acts on some tokens only",
    "arrow_config": "routes between adapters (Arrow) and is not a change of weights",
    "kasa_config": "is KaSA, which changes the base's weights too",
    "monteclora_config": "is MonteCLoRA, whose factors are random",
    "layer_replication": "replicates layers, so its model is not of the base's architecture",
    "trainable_token_indices": "trains single rows of the embedding (trainable_token_indices)",
}
# Initialisations that leave the base's weights as they are; the others change the base.
_INITIALISED = (True, False, None, "gaussian", "eva", "orthogonal")

Role = Literal["A", "B", "embedding_A", "embedding_B", "bias", "value"]

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.([^.]+))?\.(weight|bias)")
_EMBEDDING = re.compile(r"(.+)\.lora_embedding_([AB])(?:\.([^.]+))?")
_COUNTER = re.compile(
    r"(.*\.)?(num_batches_tracked|position_ids|token_type_ids|relative_position_index)"
)
_SAVED = re.compile(r"\.modules_to_save(\.[^.]+)?(?=\.)")


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
        parameters: Parameters that have factors themselves, not as weights of linear modules
            (``target_parameters``): the whole names or their ends.
        tied: Whether an adapter of one of two tied modules is meant for both
            (``ensure_weight_tying``).
    """

    r: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    rslora: bool = False
    fan_in_fan_out: bool = False
    base: str | None = None
    task: str | None = None
    parameters: tuple[str, ...] = ()
    tied: bool = False

    def rank(self, module: str) -> int:
        """Return the rank of the factors of a module."""
        return int(_match_pattern(self.rank_pattern, module, self.r))

    def scale(self, module: str) -> float:
        """Return what the product of a module's factors is multiplied by."""
        rank = self.rank(module)
        alpha = float(_match_pattern(self.alpha_pattern, module, self.alpha))
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def require_quick_patterns(settings: LoraSettings, modules: Collection[str], origin: str) -> None:
    """Refuse settings whose expressions could take for ever to compare with the modules' names.

    Raises:
        CheckpointError: When they could.
    """
    for key, pattern in (
        ("rank_pattern", settings.rank_pattern),
        ("alpha_pattern", settings.alpha_pattern),
    ):
        try:
            require_quick(pattern, modules)
        except ValueError as error:
            raise CheckpointError(
                f"{key} of the adapter {origin} is not used: {error}",
                hint="write the modules' names there, or simple regular expressions of them",
            ) from None


def _match_pattern(pattern: Mapping[str, float], module: str, default: float) -> float:
    """Return the first entry whose expression matches the end of a module's name."""
    for key, value in pattern.items():
        if ending_pattern(key).match(module):
            return value
    return default


def read_settings(folder: Path) -> LoraSettings:
    """Read ``adapter_config.json`` of a LoRA adapter.

    Raises:
        CheckpointError: When it is missing or damaged, or the adapter is of a kind that is not a
            sum of the base and low-rank products.
    """
    path = folder / CONFIG
    require_inside(path)
    with understood(CheckpointError, str(path), hint=_WHOLE):
        return _settings_of(path, _read(path))


def _settings_of(path: Path, content: Mapping[str, Any]) -> LoraSettings:
    folder = path.parent
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
            f"r and lora_alpha in {path} must be positive numbers, got {r!r} and {alpha!r}",
            hint="take the adapter_config.json that was saved with the weights",
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
        parameters=_parameters(path, content),
        tied=bool(content.get("ensure_weight_tying")),
    )


def _parameters(path: Path, content: Mapping[str, Any]) -> tuple[str, ...]:
    found = content.get("target_parameters") or []
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(
            f"{path} has an unusable target_parameters", hint="it is a list of parameters' names"
        )
    return tuple(found)


def _read(path: Path) -> dict[str, Any]:
    hint = f"an adapter is a folder with {CONFIG} and adapter_model.safetensors"
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}", hint=hint) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds no settings", hint=hint)
    return content


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # which no infinity, NaN or huge integer is


def _pattern(path: Path, content: Mapping[str, Any], key: str) -> dict[str, Any]:
    pattern = content.get(key) or {}
    valid = isinstance(pattern, dict) and all(map(_is_number, pattern.values()))
    if valid:
        try:
            require_quick(pattern, ())  # before any is compiled, which takes its time too
        except ValueError as error:
            raise CheckpointError(
                f"{path} has an unusable {key}: {error}",
                hint="write the modules' names there, or simple regular expressions of them",
            ) from None
    if valid and key == "rank_pattern":
        valid = all(map(_is_rank, pattern.values()))
    try:
        for text in pattern if valid else ():
            ending_pattern(text)
    except (re.error, RecursionError, OverflowError):
        valid = False
    if not valid:
        raise CheckpointError(
            f"{path} has an unusable {key}",
            hint="it is a mapping from regular expressions of module names to numbers",
        )
    return dict(pattern)


@dataclass(frozen=True)
class OwnTensor:
    """One tensor of an adapter file.

    Attributes:
        module: Name of the module that it changes, as the trained model called it.
        part: Name of the changed parameter in that module.
        role: A factor, the bias of the second factor, or a full new value.
        depth: In how many layers of factors its own is wrapped: peft gives each bare parameter of
            a module a layer, the first one's innermost.
    """

    module: str
    part: str
    role: Role
    depth: int = 0

    @property
    def target(self) -> str:
        """The tensor that it changes, as the trained model called it."""
        return f"{self.module}.{self.part}" if self.module else self.part


def is_counter(name: str, dtype: torch.dtype) -> bool:
    """Return whether a tensor of an adapter is a counter of a module that was saved whole.

    A saved BatchNorm has one. It is the base's, as in every merge.
    """
    return not dtype.is_floating_point and bool(_COUNTER.fullmatch(name))


def own_tensors(names: Iterable[str], origin: str) -> dict[str, OwnTensor]:
    """Return what each tensor of an adapter file is.

    Raises:
        CheckpointError: For a tensor of another kind of adapter, or several adapters in one file.
    """
    found: dict[str, OwnTensor] = {}
    labels: set[str] = set()
    for name in names:
        short = name.removeprefix(_PREFIX)
        if "lora_magnitude_vector" in short:
            raise CheckpointError(
                f"{origin} is DoRA (it holds {name!r}), whose change is not of low rank",
                hint="merge it into its base first (peft: merge_and_unload) and give that",
            )
        factor, embedding = _FACTOR.fullmatch(short), _EMBEDDING.fullmatch(short)
        if factor:
            module, side, label, part = factor.groups()
            if part == "bias" and side == "A":
                raise _not_plain_error(name, origin)
            role: Role = "bias" if part == "bias" else "A" if side == "A" else "B"
            plain, depth = _unwrapped(module)
            found[name] = OwnTensor(plain, part, role, depth)
            labels |= {label} if label else set()
        elif embedding:
            module, side, label = embedding.groups()
            role = "embedding_A" if side == "A" else "embedding_B"
            found[name] = OwnTensor(module, "weight", role)
            labels |= {label} if label else set()
        elif ".lora_" in short or "token_adapter" in short:
            raise _not_plain_error(name, origin)
        elif ".original_module." not in short:  # the untrained twin of a module to save
            while ".base_layer." in short:
                short = short.replace(".base_layer.", ".")
            module, _, part = _SAVED.sub("", short).rpartition(".")
            found[name] = OwnTensor(module, part, "value")
    if len(labels) > 1:
        raise CheckpointError(
            f"{origin} holds several adapters: {listed(sorted(labels))}",
            hint="save each in a folder of its own",
        )
    return found


def _unwrapped(module: str) -> tuple[str, int]:
    depth = 0
    while module.endswith(".base_layer"):
        module, depth = module.removesuffix(".base_layer"), depth + 1
    return module, depth


def with_parameters(
    own: Mapping[str, OwnTensor], settings: LoraSettings, known: Sequence[str], origin: str
) -> dict[str, OwnTensor]:
    """Return the tensors of an adapter with the bare parameters that their factors are of.

    Args:
        own: As `own_tensors` returns them.
        settings: The adapter's settings; those without ``parameters`` change nothing.
        known: Names of the model's tensors, in the order in which its modules register them.
        origin: Where the adapter is, for errors.

    Raises:
        MergeError: When a factor's parameter cannot be told.
    """
    ends = tuple(f".{name}" for name in settings.parameters)
    by_module: dict[str, list[str]] = {}
    for name in known if ends else ():
        if name in settings.parameters or name.endswith(ends):
            module, _, part = name.rpartition(".")
            by_module.setdefault(module, []).append(part)
    found: dict[str, OwnTensor] = {}
    for name, tensor in own.items():
        parts = by_module.get(tensor.module, [])
        if tensor.role not in ("A", "B") or not (parts or tensor.depth):
            found[name] = tensor
        elif tensor.depth < len(parts):
            found[name] = replace(tensor, part=parts[len(parts) - 1 - tensor.depth])
        else:
            raise MergeError(
                f"the adapter {origin} adapts bare parameters of {tensor.module!r} "
                "(target_parameters), which are not known from the base",
                hint="give the base as a folder with config.json, or merge the adapter into its "
                "base first (peft: merge_and_unload, then save_pretrained)",
            )
    return found


def _not_plain_error(name: str, origin: str) -> CheckpointError:
    return CheckpointError(
        f"{origin} holds {name!r}, which is not a tensor of a plain LoRA adapter",
        hint="merge it into its base first (peft: merge_and_unload) and give that",
    )


def place(
    targets: Iterable[str], known: Collection[str], origin: str
) -> tuple[dict[str, str], tuple[str, str]]:
    """Find, for every target, the tensor of the model.

    The trained model may have called its modules with another prefix than the known names have
    (``model.layers`` against ``layers``). A target is the tensor of the same name, or the only one
    whose name ends with it, or the one that its name ends with. All targets must need the same
    change of prefix.

    Args:
        targets: What the adapter changes, as the trained model called it.
        known: Names of the base's tensors, or of its model's.
        origin: Where the adapter is, for errors.

    Returns:
        Target -> known name; and the prefixes of targets that the known names lack, and of the
        known names that targets lack.

    Raises:
        MergeError: When a target is missing from the base, fits several of its tensors, or needs
            another change of prefix than the others.
    """
    placed: dict[str, str] = {}
    shifts: dict[tuple[str, str], str] = {}
    names = frozenset(known)
    for target in targets:
        placed[target], shift = _place_one(target, names, origin)
        shifts.setdefault(shift, target)
    if len(shifts) > 1:
        raise MergeError(
            f"the adapter {origin} fits tensors of the base under different prefixes: "
            f"{listed(shifts.values())}",
            hint="give the base that the adapter was trained from",
        )
    return placed, next(iter(shifts), ("", ""))


def _place_one(target: str, known: frozenset[str], origin: str) -> tuple[str, tuple[str, str]]:
    """Return the known name, and the prefixes that were taken off and put on."""
    if target in known:
        return target, ("", "")
    ends = sorted(name for name in known if name.endswith(f".{target}"))
    if len(ends) > 1:
        raise MergeError(
            f"the adapter {origin} changes {target!r}, which could be {listed(ends)}",
            hint="give the base that the adapter was trained from, with the names of that model",
        )
    if ends:
        return ends[0], ("", ends[0].removesuffix(target))
    parts = target.split(".")
    for k in range(1, len(parts) - 1):  # module and parameter at least stay
        name = ".".join(parts[k:])
        if name in known:
            return name, (target.removesuffix(name), "")
    raise MergeError(
        f"the adapter {origin} changes {target!r}, which the base lacks",
        hint=f"give the base that the adapter was trained from, tied tensors and heads included; "
        f"it has, for example, {listed(sorted(known))}",
    )


@dataclass
class Orientation:
    """Whether the weights of linear modules are stored ``in x out``, where shapes do not tell.

    A square weight looks the same both ways. GPT-2's ``Conv1D`` stores ``in x out``, and peft
    records that in one flag for all modules, the last one's. So the modules around it count
    first: those whose weight is not square and tells, by its factors or by the length of its bias.

    Attributes:
        base: The base checkpoint.
        default: What the adapter's configuration says.
        seen: Base tensor -> whether it is stored ``in x out``, where its factors told.
    """

    base: Checkpoint
    default: bool
    seen: dict[str, bool] = field(default_factory=dict)

    def of_square(self, name: str) -> bool:
        """Return whether the square weight ``name`` is stored ``in x out``."""
        near: dict[int, set[bool]] = {}
        for other, flipped in {**self._by_bias(), **self.seen}.items():
            near.setdefault(_count_shared(name, other), set()).add(flipped)
        most = max(near, default=0)
        if most == 0 or len(near[most]) > 1:
            return self.default
        return near[most].pop()

    def _by_bias(self) -> Mapping[str, bool]:
        found: dict[str, bool] = {}
        known = set(self.base.names)
        for name in self.base.names:
            bias = name.removesuffix("weight") + "bias"
            if not name.endswith(".weight") or bias not in known:
                continue
            shape, length = self.base.shape(name), self.base.shape(bias)
            if len(shape) == 2 and shape[0] != shape[1] and len(length) == 1:
                found[name] = length[0] == shape[1]
        return found


def _count_shared(first: str, second: str) -> int:
    """Return how many leading parts two dotted names have in common."""
    count = 0
    for a, b in zip(first.split("."), second.split("."), strict=False):
        if a != b:
            break
        count += 1
    return count
