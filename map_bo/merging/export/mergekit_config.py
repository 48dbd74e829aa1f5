"""A merge in the terms of mergekit, as ``mergekit.yaml`` beside a merged model says it.

The method and the settings that give the same weights; or why there are none.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import yaml

from map_bo.errors import MergeError
from map_bo.merging.align.layout import is_variance
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.export.mergekit_terms import METHODS, NotExpressible, Said, terms_of
from map_bo.merging.vectors.blocks import Blocks
from map_bo.merging.vectors.operator import Weights
from map_bo.moved import CLASSES
from map_bo.plain import from_name, name_of

__all__ = [
    "FAMILIES",
    "VERSION",
    "MergekitConfig",
    "NotExpressible",
    "express",
    "filters_for",
    "mergekit_text",
]

VERSION = "0.1.5"
FAMILIES: Mapping[str, bool] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "DistilBertForSequenceClassification",
                "BertForSequenceClassification",
                "GPT2LMHeadModel",
                "Gemma2ForCausalLM",
                "Gemma3ForCausalLM",
                "GemmaForCausalLM",
                "GraniteForCausalLM",
                "LlamaForCausalLM",
                "MambaForCausalLM",
                "MistralForCausalLM",
                "Olmo2ForCausalLM",
                "Phi3ForCausalLM",
                "PhiForCausalLM",
                "Qwen2ForCausalLM",
                "Qwen3ForCausalLM",
                "RobertaForSequenceClassification",
                "StableLmForCausalLM",
                "Starcoder2ForCausalLM",
            ),
            True,
        ),
        # It refuses these, or leaves tensors out.
        **dict.fromkeys(
            (
                "BertForMaskedLM",
                "BertModel",
                "CLIPModel",
                "CohereForCausalLM",
                "FalconForCausalLM",
                "GPTNeoXForCausalLM",
                "MixtralForCausalLM",
                "Qwen3MoeForCausalLM",
                "T5ForConditionalGeneration",
                "ViTForImageClassification",
                "WhisperForConditionalGeneration",
            ),
            False,
        ),
    }
)
"""Class of a model -> whether this version of mergekit, with the pinned transformers, repeats a
merge of it; each was seen by ``tests/operators/mergekit/test_families.py``."""

_Value = TypeVar("_Value")
_CLASSES: Mapping[str, str] = {
    **CLASSES,
    "model_stock": "map_bo.operators.stock:ModelStock",
    "multislerp": "map_bo.operators.spherical:MultiSlerp",
    "nearswap": "map_bo.operators.nearswap:NearSwap",
    "nuslerp": "map_bo.operators.spherical:NuSlerp",
    "ram": "map_bo.operators.shared_regions:Ram",
    "sce": "map_bo.operators.sce:Sce",
}
_ONE = 1e-6  # how far coefficients may be from the sum 1 to count as such
_ROUNDING = 1 + 1e-12

_EXACT_SHARE = "mergekit keeps exactly its share; map_bo all numbers that equal the threshold."
_SKETCHED = "The share was searched: map_bo kept it to within the error of a sketch."
_ROUNDED = "mergekit rounds the two shares down apart: of some tensors it keeps one number fewer."
_CHORD = (
    "Of tensors with a cosine above 0.9995 mergekit takes the chord and map_bo the arc; they "
    "differ by at most 1.3e-4 of the weights."
)
_RIGHT_ANGLE = "Where one of two tensors is zero mergekit turns by a right angle; map_bo averages."


@dataclass(frozen=True)
class MergekitConfig:
    """What a mergekit configuration says, but for paths and dtypes.

    Attributes:
        method: mergekit's ``merge_method``.
        base: Its ``base_model``.
        models: The models and their own parameters.
        parameters: Parameters of all models.
        notes: Where mergekit's definition may give another number; sentences.
    """

    method: str
    base: Checkpoint | None
    models: tuple[tuple[Checkpoint, Mapping[str, Any]], ...]
    parameters: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def mergekit_text(
    *,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: Mapping[str, Any],
    coefficients: Mapping[str, float],
    weights: Weights | None,
    recalibrated: bool = False,
) -> str:
    """Return the text of ``mergekit.yaml``: the same merge as a mergekit configuration.

    mergekit works in ``dtype``, so that is float32 (float64 for float64 weights) and the base's
    dtype goes to ``out_dtype``. Where its definition can give another number the text has a
    comment.

    Weights that differ between tensors are written with mergekit's filters. A filter there is a
    substring of a tensor's name and the first match counts, so a filter per tensor, longest name
    first, expresses any assignment; shorter filters are used where they give the same. What
    mergekit leaves out, keeping variances and recalibration (``recalibrated``), is a comment.

    Where mergekit cannot express the merge, the text is a comment that says why. Another comment
    says where it is not known to repeat merges of such a model, see `FAMILIES`.
    """
    try:
        content, notes = _mergekit(base, experts, operator, coefficients, weights)
    except NotExpressible as reason:
        return f"# No mergekit configuration gives this merge: {reason}.\n"
    head = _promise(base)
    if recalibrated:
        head += "# mergekit does not measure the statistics of batch normalisation anew.\n"
    elif any(is_variance(name) for name in base.names):
        head += "# mergekit does not keep running variances above the least of the models.\n"
    head += "".join(f"# {note}\n" for note in notes)
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    return head + text


def _promise(base: Checkpoint) -> str:
    """Return what is known of mergekit and models of this class."""
    kind = _class_of(base)
    seen = None if kind is None else FAMILIES.get(kind)
    if seen:
        return "# The same merge for mergekit: mergekit-yaml mergekit.yaml OUT\n"
    what = kind or "a class that its config.json does not name"
    told = (
        f"# It is not known whether mergekit {VERSION} repeats merges of {what}: no test has seen\n"
        "# it. It may refuse them, or leave tensors out: compare what it writes.\n"
        if seen is None
        else f"# mergekit {VERSION} does not repeat merges of {what}: it was seen to refuse them,\n"
        "# or to leave tensors out.\n"
    )
    return told + "# In its terms this is the merge: mergekit-yaml mergekit.yaml OUT\n"


def _class_of(base: Checkpoint) -> str | None:
    """Return the class of the model that the configuration names."""
    if base.directory is None:
        return None
    try:
        config = json.loads((base.directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    named = config.get("architectures") if isinstance(config, dict) else None
    kind = named[0] if isinstance(named, list) and named else None
    # What stands in a comment must stay in its line.
    return kind if isinstance(kind, str) and re.fullmatch(r"\w{1,100}", kind) else None


def _mergekit(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: Mapping[str, Any],
    coefficients: Mapping[str, float],
    weights: Weights | None,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    task = (base.vocabulary_changes or {}).get("task")
    if task is not None:  # first: such a model has names that the blocks of the merge do not know
        raise NotExpressible(f"the model has the task head of {task!r}")
    config = express(base, experts, operator, coefficients, weights)
    checkpoints = {"the base": base, **{f"expert {name!r}": e for name, e in experts.items()}}
    for label, checkpoint in checkpoints.items():
        if checkpoint.directory is None:
            raise NotExpressible(f"{label} is not a Hugging Face directory")
        if checkpoint.vocabulary_changes:
            raise NotExpressible(f"{label} was fitted to the base's names and shapes")
    folders = [checkpoint.directory for checkpoint in checkpoints.values()]
    if len(set(folders)) < len(folders):
        raise NotExpressible(
            "two of the models are the same directory, and mergekit takes one once"
        )
    floats = Counter(base.dtype(name) for name in base.names if base.dtype(name).is_floating_point)
    if len(floats) > 1:
        kinds = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in floats))
        raise NotExpressible(f"the base mixes dtypes ({kinds}), and mergekit writes one")
    dtype = next(iter(floats), torch.float32)
    content = {
        "merge_method": config.method,
        **({} if config.base is None else {"base_model": _reference(config.base)}),
        "models": [
            {"model": _reference(model), **({"parameters": dict(own)} if own else {})}
            for model, own in config.models
        ],
        "parameters": dict(config.parameters),
        "dtype": "float64" if dtype == torch.float64 else "float32",
        "out_dtype": str(dtype).removeprefix("torch."),
    }
    return content, config.notes


def _reference(checkpoint: Checkpoint) -> Any:
    path = str(checkpoint.directory)
    # mergekit reads "a+b" as model and adapter, and "a@b" as model and revision.
    return {"model": {"path": path}} if re.search(r"[+@]", path) else path


@dataclass(frozen=True)
class _Merge:
    """A merge to be expressed; ``table`` is tensor name -> coefficients of the experts."""

    base: Checkpoint
    experts: Mapping[str, Checkpoint]
    settings: Mapping[str, Any]
    searched: frozenset[str]
    table: Mapping[str, tuple[float, ...]]

    def config(
        self,
        method: str,
        columns: Mapping[str, Mapping[str, float]],
        parameters: Mapping[str, Any],
        *notes: str,
    ) -> MergekitConfig:
        """Return the configuration with a weight of each expert by tensor (``columns``)."""
        weights = _settings(columns)
        models = tuple((e, {"weight": weights[name]}) for name, e in self.experts.items())
        return MergekitConfig(method, self.base, models, parameters, notes)

    def columns(self) -> dict[str, dict[str, float]]:
        """Return, for each expert, tensor name -> coefficient."""
        return {
            expert: {name: c[i] for name, c in self.table.items()}
            for i, expert in enumerate(self.experts)
        }

    def sizes(self) -> dict[str, int]:
        """Return how many numbers each tensor has that is merged, tied ones once."""
        return {n: self.base.shape(n).numel() for n in self.table if n not in self.base.ties}


def express(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: Mapping[str, Any],
    coefficients: Mapping[str, float],
    weights: Weights | None,
) -> MergekitConfig:
    """Say a merge in the terms of mergekit 0.1.5.

    Args:
        base: The base.
        experts: Name -> checkpoint of the ``N`` experts.
        operator: The operator as plain data, see `recipe_of`.
        coefficients: Coefficient name -> value, settings that were searched included.
        weights: Tensor name -> weight of each expert, where the merge is linear.

    Raises:
        NotExpressible: When no method and settings of mergekit give this merge.
    """
    operator = from_name(operator)
    name = next((n for n, kind in _CLASSES.items() if kind == operator.get("class")), "")
    told = operator.get("fields", {})
    if weights is not None and name != "weighted_average":
        name = "task_arithmetic"
    if name in ("dare", "della"):
        raise NotExpressible(f"mergekit draws random masks of its own, so its {name} is another")
    if name not in _METHODS and name not in METHODS:
        said = name or name_of(operator) or operator.get("name") or "without a name"
        raise NotExpressible(f"mergekit has no method for the operator {said}")
    searched = frozenset(told.get("search") or ())
    if missing := searched - set(coefficients):
        raise NotExpressible(f"the coefficients lack the settings {', '.join(sorted(missing))}")
    settings = {**told, "name": name, **{key: float(coefficients[key]) for key in searched}}
    own = {key: float(value) for key, value in coefficients.items() if key not in searched}
    table = _table(base, tuple(experts), told.get("blocks"), own, weights)
    merge = _Merge(base, experts, settings, searched, table)
    return _as_they_are(merge) if name in METHODS else _METHODS[name](merge)


def _table(
    base: Checkpoint,
    experts: tuple[str, ...],
    patterns: Any,
    coefficients: Mapping[str, float],
    weights: Weights | None,
) -> dict[str, tuple[float, ...]]:
    names = [name for name in base.names if base.dtype(name).is_floating_point]
    if weights is not None:
        by_tensor = {name: weights(base.ties.get(name, name)) for name in names}
        return {n: tuple(float(by_tensor[n].get(e, 0.0)) for e in experts) for n in names}
    blocks = None
    if isinstance(patterns, Mapping):
        try:
            blocks = Blocks(patterns)
            block_of = {name: blocks.names[blocks.of(base.ties.get(name, name))] for name in names}
        except MergeError as error:
            raise NotExpressible(error.message) from None
    known = [f"{e}/{b}" for e in experts for b in blocks.names] if blocks else list(experts)
    if set(coefficients) != set(known) or (patterns and blocks is None):
        raise NotExpressible(
            f"the coefficients are not one for each expert{' and block' if patterns else ''}"
        )
    if blocks is None:
        return dict.fromkeys(names, tuple(coefficients[e] for e in experts))
    return {n: tuple(coefficients[f"{e}/{block_of[n]}"] for e in experts) for n in names}


def _task_arithmetic(merge: _Merge) -> MergekitConfig:
    return merge.config("task_arithmetic", merge.columns(), {"normalize": False, "lambda": 1.0})


def _linear(merge: _Merge) -> MergekitConfig:
    # With the base among the models its configuration and other files are those that are copied;
    # its weight is zero but where all others are.
    pre = {name: float(not any(c)) for name, c in merge.table.items()}
    columns = merge.columns()
    weights = _settings({**columns, "": pre})
    models = [(merge.base, {"weight": weights[""]})]
    models += [(e, {"weight": weights[name]}) for name, e in merge.experts.items()]
    return MergekitConfig("linear", merge.base, tuple(models), {"normalize": True})


def _spherical(merge: _Merge) -> MergekitConfig:
    sums = {sum(c) for c in merge.table.values()}
    far = [total for total in sums if abs(total - 1) > _ONE]
    if far:
        raise NotExpressible(
            f"the coefficients sum to {far[0]:g}, and mergekit's spherical merges do not go a part "
            "of the way from the base"
        )
    of, norms = merge.settings.get("of"), merge.settings.get("norms")
    experts, count = list(merge.experts.values()), len(merge.experts)
    bare: tuple[tuple[Checkpoint, dict[str, Any]], ...] = tuple((e, {}) for e in experts)
    equal = all(max(c) - min(c) <= _ONE for c in merge.table.values())
    if norms == "own" and count == 2:
        if of == "deltas":
            turned = {"nuslerp_flatten": True, "nuslerp_row_wise": False}
            return merge.config("nuslerp", merge.columns(), turned, _RIGHT_ANGLE)
        t = _settings({"t": {name: c[1] / sum(c) for name, c in merge.table.items()}})
        return MergekitConfig("slerp", experts[0], bare, t, (_CHORD, _RIGHT_ANGLE))
    if norms == "mean" and equal and of == "weights" and count > 1:
        return MergekitConfig("karcher", None, bare, {"max_iter": 50, "tol": 1e-6})
    if norms == "mean" and equal and of == "deltas" and count == 2:
        parameters = {"normalize_weights": True}
        return merge.config("multislerp", merge.columns(), parameters, _RIGHT_ANGLE)
    raise NotExpressible(
        "mergekit interpolates on the sphere between two models that keep their norms "
        "(norms=own), or in equal parts"
    )


def _sparse(merge: _Merge) -> MergekitConfig:
    settings, sizes = merge.settings, merge.sizes()
    density, gamma = float(settings["density"]), float(settings.get("gamma", 0.0))
    if density < 1 and settings["trim"] != "tensor" and len(sizes) > 1:
        raise NotExpressible(
            "mergekit ranks the numbers of each tensor apart (trim=tensor), not those of a whole "
            "task vector"
        )
    notes = (_EXACT_SHARE,) if density < 1 else ()
    if merge.searched & {"density", "gamma"}:
        notes = (*notes, _SKETCHED)
    elect = settings["joining"] == "elect"
    columns, parameters = _elect(merge) if elect else _sum(merge)
    parameters = {"density": _share(density, sizes), "rescale": False, **parameters}
    if elect and settings["name"] != "breadcrumbs":
        return merge.config("ties", columns, parameters, *notes)
    # Without outliers this is what the largest numbers alone are called there.
    none = [name for name, n in sizes.items() if n and 0 < density < 1 and int(density * n) == 0]
    if none:
        raise NotExpressible(
            f"mergekit keeps nothing of small tensors such as {none[0]!r} at this density"
        )
    gone = min(gamma, 1 - density)
    whole = all(
        _count_kept(density + gone, n) - _count_kept(gone, n) == _count_kept(density, n)
        for n in sizes.values()
    )
    notes = notes if whole else (*notes, _ROUNDED)
    method = "breadcrumbs_ties" if elect else "breadcrumbs"
    return merge.config(method, columns, {**parameters, "gamma": _share(gamma, sizes)}, *notes)


def _as_they_are(merge: _Merge) -> MergekitConfig:
    """Return the configuration of a method of `METHODS`."""
    shapes = {n: merge.base.shape(n) for n in merge.table if n not in merge.base.ties}
    said = Said(merge.settings, merge.searched, tuple(merge.experts), merge.table, shapes)
    terms = terms_of(merge.settings["name"], said)
    weights = _settings(merge.columns()) if terms.weighted else {}
    models = tuple(
        (expert, {"weight": weights[name]} if terms.weighted else {})
        for name, expert in merge.experts.items()
        if terms.experts is None or name in terms.experts
    )
    base = merge.base if terms.base else None
    return MergekitConfig(terms.method, base, models, terms.parameters, terms.notes)


def _sum(merge: _Merge) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    scale = float(merge.settings["scale"])
    return merge.columns(), {"normalize": False, "lambda": scale}


def _elect(merge: _Merge) -> tuple[dict[str, dict[str, float]], dict[str, Any]]:
    """Return weights and parameters for an election.

    mergekit elects by the mass of the weighted task vectors and divides by the weights that agree,
    or by nothing. With equal coefficients ``c`` both are the paper's, with weights 1 and the
    factor ``c``.
    """
    settings = merge.settings
    election, normalisation = settings["election"], settings["normalisation"]
    scale = float(settings["scale"])
    if election == "weighted_mass" and normalisation != "agreeing":
        return merge.columns(), {"normalize": normalisation == "weights", "lambda": scale}
    if election == "count":
        raise NotExpressible("mergekit elects signs by mass, not by count")
    if any(len(set(c)) > 1 or (election == "weighted_mass" and c[0] < 0) for c in _rows(merge)):
        what = (
            "divides by the sum of the weights that agree"
            if normalisation == "agreeing"
            else "elects signs by the weighted task vectors"
        )
        raise NotExpressible(f"mergekit {what}, which is the same for equal coefficients only")
    factor = {
        name: scale * (float(c[0] != 0) if normalisation == "weights" else c[0])
        for name, c in merge.table.items()
    }
    ones = dict.fromkeys(merge.table, 1.0)
    columns = dict.fromkeys(merge.experts, ones)
    return columns, {"normalize": normalisation != "none", **_settings({"lambda": factor})}


def _rows(merge: _Merge) -> list[tuple[float, ...]]:
    return [c for c in merge.table.values() if c]


def _count_kept(share: float, total: int) -> int:
    return min(int(share * total * _ROUNDING), total)


def _share(share: float, sizes: Mapping[str, int]) -> float:
    """Return a share whose products with the sizes, rounded down, are those of exact numbers.

    In floating point .29 * 100 is a little less than 29, and mergekit rounds it down to 28.
    """
    exact = all(int(share * n) == _count_kept(share, n) for n in sizes.values())
    return share if exact else share * _ROUNDING


_METHODS: dict[str, Callable[[_Merge], MergekitConfig]] = {
    "task_arithmetic": _task_arithmetic,
    "weighted_average": _linear,
    "slerp": _spherical,
    "magnitude": _sparse,
    "ties": _sparse,
    "breadcrumbs": _sparse,
}


def _settings(columns: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return each column (tensor name -> value) as a setting: a number, or a list with filters.

    Columns that are not one number have the same filters, so that they can be read as blocks.
    """
    uneven = {key: column for key, column in columns.items() if len(set(column.values())) > 1}
    names = next(iter(columns.values()), {})
    filters = filters_for({n: tuple(column[n] for column in uneven.values()) for n in names})
    result: dict[str, Any] = {}
    for key, column in columns.items():
        if key in uneven:
            at = list(uneven).index(key)
            result[key] = [{"filter": text, "value": values[at]} for text, values in filters]
        else:
            result[key] = next(iter(column.values()), 0.0)
    return result


def filters_for(wanted: Mapping[str, _Value]) -> list[tuple[str, _Value]]:
    """Return filters, the first match counting, that give every tensor its wanted value.

    A filter of mergekit is a part of a tensor's name. A dotted prefix such as ``transformer.h.1.``
    stands for all its tensors where they agree; the full name stands where they do not.
    """
    uniform: dict[str, bool] = {}
    chosen: dict[str, _Value] = {}
    for name, value in wanted.items():
        parts = name.split(".")
        for text in (".".join(parts[:k]) + "." for k in range(1, len(parts))):
            if text not in uniform:
                uniform[text] = len({v for other, v in wanted.items() if text in other}) == 1
            if uniform[text]:
                chosen[text] = value
                break
        else:
            chosen[name] = value
    short = _longest_first(chosen)
    if all(_first_match(short, name) == value for name, value in wanted.items()):
        return short
    return _longest_first(wanted)


def _longest_first(filters: Mapping[str, _Value]) -> list[tuple[str, _Value]]:
    # A text that contains another is longer, hence earlier: the shorter cannot shadow it.
    return sorted(filters.items(), key=lambda item: (-len(item[0]), item[0]))


def _first_match(filters: Sequence[tuple[str, _Value]], name: str) -> _Value:
    return next(value for text, value in filters if text in name)
