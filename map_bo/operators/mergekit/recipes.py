"""Recipes of mergekit as operators, to merge with or to search around."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from map_bo.errors import ConfigError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.blocks import Blocks
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.averages import Slerp, WeightedAverage
from map_bo.operators.mergekit.form import Entries, Recipe, blocks_of, content_of
from map_bo.operators.nearswap import NearSwap
from map_bo.operators.sce import Sce
from map_bo.operators.shared_regions import Ram
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Ties
from map_bo.operators.spherical import MultiSlerp, NuSlerp
from map_bo.operators.stock import ModelStock

__all__ = ["MergekitRecipe", "from_mergekit"]

_LEAST = 1e-6


class MergekitRecipe(NamedTuple):
    """What a recipe says.

    Attributes:
        operator: The merge operator, with blocks where the recipe has filters.
        base: Path or hub id of the base. None where the recipe names none that the merge depends
            on: then any model of the family serves, such as the one the experts were tuned from.
        experts: Name -> path or hub id, in the order of the recipe.
        coefficients: Coefficient name -> value, in the order of the operator's space.
    """

    operator: MergeOperator
    base: str | None
    experts: dict[str, str]
    coefficients: dict[str, float]


def from_mergekit(config: str | Path | Mapping[str, Any]) -> MergekitRecipe:
    """Read a configuration of mergekit 0.1.5 as operator, base, experts and coefficients.

    The merge is the same, to rounding, for ``linear``, ``task_arithmetic``, ``ties``,
    ``breadcrumbs``, ``breadcrumbs_ties``, ``slerp``, ``nuslerp``, ``karcher``, ``multislerp``,
    ``nearswap``, ``model_stock``, ``sce``, ``ram`` and ``ramplus_tl``; for what remains see
    ``docs/operators.md``. Of ``dare_linear``,
    ``dare_ties``, ``della_linear`` and ``della`` drop rates and joining are the same; masks are
    map_bo's own, and what stays is rescaled as the papers say.

    Filters become blocks; those that take no tensor are left out where a model of the recipe is on
    this machine to look at. Dtypes are passed over: map_bo merges in float32.

    Args:
        config: Path of the YAML file, or its content.

    Raises:
        ConfigError: When the file cannot be read, or map_bo has nothing that gives this merge:
            another method, slices, modules, gradients over layers, LoRA models, densities that
            differ between models, another tokenizer.
        CheckpointError: When there are filters and a model on this machine cannot be read.
        MergeError: When a setting is out of its range, or filters leave a tensor without a value.
    """
    recipe = Recipe(content_of(config))
    read = _METHODS.get(recipe.method)
    if read is None:
        raise ConfigError(
            f"the recipe's merge_method is {recipe.method!r}",
            hint=f"map_bo reads {', '.join(sorted(_METHODS))}",
        )
    return read(recipe)


def _name_models(sources: Sequence[str]) -> dict[str, str]:
    """Return names for models: the last part of each path or id, told apart by numbers."""
    names: dict[str, str] = {}
    for source in sources:
        stem = re.split(r"[/\\]", source.rstrip("/\\"))[-1].partition("@")[0] or "model"
        name, number = stem, 2
        while name in names:
            name, number = f"{stem}-{number}", number + 1
        names[name] = source
    return names


Rule = Callable[[list[float]], list[float]]


def _finish(
    make: Callable[[Mapping[str, str] | None], MergeOperator],
    base: str | None,
    sources: Sequence[str],
    columns: Sequence[Entries],
    rule: Rule = lambda row: row,
) -> MergekitRecipe:
    """Return a recipe whose coefficients follow from parameters by block.

    Args:
        make: Blocks -> operator.
        base: The base.
        sources: The ``N`` experts.
        columns: The parameters that count.
        rule: Their values in a block -> the ``N`` coefficients there.
    """
    patterns, rows = _fill(*blocks_of(columns), [*([base] if base else []), *sources])
    operator = make(patterns)
    experts = _name_models(sources)
    table = [rule(row) for row in rows]
    values = [c for expert in zip(*table, strict=True) for c in expert]
    names = operator.space(tuple(experts), lower=0.0, upper=1.0).names
    return MergekitRecipe(operator, base, experts, dict(zip(names, values, strict=True)))


def _fill(
    patterns: dict[str, str] | None, rows: list[list[float]], sources: Sequence[str]
) -> tuple[dict[str, str] | None, list[list[float]]]:
    """Leave out blocks without tensors, where one of the models is here to look at."""
    here = next((Path(source) for source in sources if os.path.exists(source)), None)
    if patterns is None or here is None:
        return patterns, rows
    checkpoint, blocks = open_checkpoint(here), Blocks(patterns)
    names = [name for name in checkpoint.names if checkpoint.dtype(name).is_floating_point]
    used = sorted({blocks.of(name) for name in names})
    if len(used) == 1:
        return None, [rows[used[0]]]
    return {blocks.names[i]: patterns[blocks.names[i]] for i in used}, [rows[i] for i in used]


def _normalise(row: list[float]) -> list[float]:
    total = sum(row)
    return [w / (total if abs(total) >= 1e-8 else 1.0) for w in row]


def _linear(recipe: Recipe) -> MergekitRecipe:
    normalise = recipe.flag("normalize", True)
    base = recipe.base  # one model among others here, of no weight where it has none
    sources = [source for source in recipe.models if source != base]
    columns = recipe.own("weight", sources)
    pre = recipe.own("weight", [base], 0.0) if base else []
    without_base = not any(value for column in pre for _, value in column)

    def shares(row: list[float]) -> list[float]:
        total = sum(row)
        if not normalise and abs(total - 1) > _LEAST:
            raise ConfigError(
                f"the weights sum to {total:g} without normalize, which scales the whole model",
                hint="let them sum to 1",
            )
        if abs(total) < _LEAST:
            raise ConfigError("the weights sum to 0", hint="let them sum to 1")
        return [w / total for w in row[: len(sources)]]

    negative = any(value < 0 for column in columns for _, value in column)
    if without_base and not negative:
        return _finish(
            lambda blocks: WeightedAverage(blocks=blocks), base, sources, columns, shares
        )
    if base is None:
        raise ConfigError(
            "linear has negative weights and no base model", hint="list the base among the models"
        )
    # The base's share is what the others leave.
    return _finish(
        lambda blocks: TaskArithmetic(blocks=blocks), base, sources, [*columns, *pre], shares
    )


def _task_arithmetic(recipe: Recipe) -> MergekitRecipe:
    sources = recipe.others()
    weights = recipe.own("weight", sources)
    normalise = recipe.flag("normalize", False)

    def scaled(row: list[float]) -> list[float]:
        own = _normalise(row[:-1]) if normalise else row[:-1]
        return [w * row[-1] for w in own]

    columns = [*weights, recipe.shared("lambda", 1.0)]
    base = recipe.required_base()
    return _finish(lambda blocks: TaskArithmetic(blocks=blocks), base, sources, columns, scaled)


def _spherical(recipe: Recipe) -> MergekitRecipe:
    """Read ``slerp``, ``nuslerp``, ``multislerp`` and ``karcher``."""
    if recipe.method == "slerp":
        base = recipe.required_base()
        sources = [base, *recipe.others()]
        _require_two(recipe, sources)
        return _finish(
            lambda blocks: Slerp(of="weights", norms="own", blocks=blocks),
            None,
            sources,
            [recipe.shared("t")],
            lambda row: _check([1 - row[0], row[0]]),
        )
    if recipe.method == "karcher":
        extra = [recipe.base] if recipe.base and recipe.base not in recipe.models else []
        sources = [*recipe.models, *extra]
        even = [1 / len(sources)] * len(sources)
        operator = Slerp(of="weights", norms="mean")
        experts = _name_models(sources)
        return MergekitRecipe(operator, None, experts, dict(zip(experts, even, strict=True)))
    sources = recipe.others()
    of = "weights" if recipe.base is None else "deltas"
    make: Callable[[Mapping[str, str] | None], MergeOperator]
    if recipe.method == "multislerp":
        summing = not recipe.flag("normalize_weights", True)

        def make(blocks: Mapping[str, str] | None) -> MergeOperator:
            return MultiSlerp(of=of, blocks=blocks)
    else:
        _require_two(recipe, sources)
        summing = False
        flat = recipe.flag("nuslerp_flatten", True)
        along = "column" if recipe.flag("nuslerp_row_wise", False) else "row"

        def make(blocks: Mapping[str, str] | None) -> MergeOperator:
            if flat:
                return Slerp(of=of, norms="own", blocks=blocks)
            return NuSlerp(of=of, along=along, blocks=blocks)

    def shares(row: list[float]) -> list[float]:
        total = sum(row)
        if not summing:
            even = [1 / len(row)] * len(row)
            return _check([w / total for w in row] if abs(total) >= _LEAST else even)
        if of == "weights" and abs(total - 1) > _LEAST:
            raise ConfigError(
                f"the weights sum to {total:g} without normalize_weights, which scales the whole "
                "model",
                hint="let them sum to 1",
            )
        return _check(row)

    return _finish(make, recipe.base, sources, recipe.own("weight", sources), shares)


def _as_they_are(recipe: Recipe) -> MergekitRecipe:
    """Read methods without weights, which take the experts as they are."""
    sources, method = recipe.others(), recipe.method
    operator: MergeOperator
    value = 1.0
    if method == "nearswap":
        if len(sources) != 1:
            raise ConfigError(
                f"nearswap is of one model and the base, and there are {len(sources)}",
                hint="list the base and one other model",
            )
        recipe.shared("t")  # which must be given
        operator = NearSwap(strength=recipe.number("t", 0.0), unit="absolute")
    elif method == "model_stock":
        operator = ModelStock(each="row" if recipe.flag("filter_wise", False) else "tensor")
        value = 1 / len(sources)
    elif method == "sce":
        operator = Sce(density=min(recipe.number("select_topk", 1.0), 1.0))
    else:
        plus = method == "ramplus_tl"
        operator = Ram(
            threshold=recipe.number("epsilon", 1e-5),
            rescale=recipe.number("r", 0.1) if plus else 0.0,
            most=recipe.number("alpha", 0.2),
            over="tensor",
        )
    experts = _name_models(sources)
    base = recipe.required_base()
    return MergekitRecipe(operator, base, experts, dict.fromkeys(experts, value))


def _require_two(recipe: Recipe, sources: Sequence[str]) -> None:
    if len(sources) != 2:
        raise ConfigError(
            f"{recipe.method} is read of two models, and there are {len(sources)}",
            hint="use karcher for equal parts of more",
        )


def _check(row: list[float]) -> list[float]:
    if min(row) < 0:
        raise ConfigError(
            "a spherical merge goes beyond one of its models", hint="give weights from 0 on"
        )
    return row


def _sparse(recipe: Recipe) -> MergekitRecipe:
    """Read the methods that leave out numbers."""
    kind = recipe.method.partition("_")[0]
    elect = recipe.method in ("ties", "dare_ties", "breadcrumbs_ties", "della")
    sources = recipe.others()
    normalise = recipe.flag("normalize", recipe.method in ("ties", "della"))
    density = min(recipe.number("density", 1.0, sources), 1.0)
    rate = round(1 - density, 12)
    rescale = recipe.flag("rescale", kind in ("dare", "della"))
    if rescale != (kind in ("dare", "della")) and kind != "dare":
        raise ConfigError(
            f"{recipe.method} has rescale: {str(rescale).lower()}",
            hint=f"map_bo {'always rescales' if kind == 'della' else 'does not rescale'} here",
        )
    # Without rescaling a number that stays is itself: the paper's factor is taken back.
    factor = 1.0 if rescale or kind != "dare" else density

    columns = recipe.own("weight", sources)
    steps = recipe.shared("lambda", 1.0)
    joining: dict[str, Any] = {"joining": "elect" if elect else "sum", "scale": factor}
    if elect:
        normalisation = "weights" if normalise else "none"
        joining |= {"election": "weighted_mass", "normalisation": normalisation}
    uniform = len({value for _, value in steps}) == 1
    rule: Rule
    if uniform:
        joining["scale"] = factor * steps[0][1]
        rule = _normalise if normalise and not elect else _same
    else:
        columns = [*columns, steps]
        if elect and normalise:
            joining |= {"election": "mass", "normalisation": "agreeing"}
            rule = _equal
        else:
            rule = _positive if elect else (_scale_shares if normalise else _scale)

    def make(blocks: Mapping[str, str] | None) -> MergeOperator:
        if kind == "ties":
            return Ties(density=density, trim="tensor", blocks=blocks, **joining)
        if kind == "breadcrumbs":
            gamma = recipe.number("gamma", 0.01, sources)
            return Breadcrumbs(
                density=density, gamma=gamma, trim="tensor", blocks=blocks, **joining
            )
        if kind == "dare":
            return Dare(drop_rate=rate, blocks=blocks, **joining)
        epsilon = 2 * recipe.number("epsilon", 0.15, sources) if rate else 0.0
        return Della(drop_rate=rate, epsilon=epsilon, blocks=blocks, **joining)

    return _finish(make, recipe.required_base(), sources, columns, rule)


def _same(row: list[float]) -> list[float]:
    return row


def _scale(row: list[float]) -> list[float]:
    return [w * row[-1] for w in row[:-1]]


def _scale_shares(row: list[float]) -> list[float]:
    return [w * row[-1] for w in _normalise(row[:-1])]


def _positive(row: list[float]) -> list[float]:
    if row[-1] < 0:
        raise ConfigError("lambda is negative for some tensors", hint="give a lambda from 0 on")
    return _scale(row)


def _equal(row: list[float]) -> list[float]:
    """Return lambda for each: of equal weights, divided by their sum, nothing else remains."""
    if len(set(row[:-1])) > 1 or row[0] <= 0:
        raise ConfigError(
            "lambda differs between tensors and the weights between models, with normalize",
            hint="give one lambda, or equal weights",
        )
    return [row[-1]] * (len(row) - 1)


_METHODS: dict[str, Callable[[Recipe], MergekitRecipe]] = {
    "linear": _linear,
    "task_arithmetic": _task_arithmetic,
    **dict.fromkeys(("slerp", "nuslerp", "multislerp", "karcher"), _spherical),
    **dict.fromkeys(("nearswap", "model_stock", "sce", "ram", "ramplus_tl"), _as_they_are),
    **dict.fromkeys(
        (
            "ties",
            "dare_linear",
            "dare_ties",
            "della_linear",
            "della",
            "breadcrumbs",
            "breadcrumbs_ties",
        ),
        _sparse,
    ),
}
