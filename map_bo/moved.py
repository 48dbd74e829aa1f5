"""Where modules stood in version 0.1: old imports and old records lead to today's modules.

Imports of the old names work for one minor version, with a ``DeprecationWarning``. Records of
runs and recipes keep the names of their time, so :func:`current` is how they are read.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Container, Mapping, Sequence
from fnmatch import fnmatchcase
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

__all__ = [
    "CLASSES",
    "FIELDS",
    "MODULES",
    "NAMES",
    "OldNames",
    "current",
    "current_class",
    "field_today",
    "old_attribute",
    "renamed",
    "under_old_name",
    "with_current_targets",
]

_ROOT = "map_bo."
_LONGEST = 100  # characters of a part of a name; file systems allow few hundred

T = TypeVar("T")

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "app.comparing": "app.comparison",
        "app.exchange": "app.ax_commands",
        "ax.plain": "plain",
        "loop.identity": "loop.state",
        "loop.observed": "loop.run",
        "loop.publish": "loop.mirrors",
        "loop.sweeps": "loop.reading",
        "merging.adapted": "merging.adapters.low_rank",
        "merging.adapter_checkpoint": "merging.adapters.adapter",
        "merging.adapter_export": "merging.export.adapter",
        "merging.adapter_files": "merging.export.adapter",
        "merging.adapter_names": "merging.adapters.lora",
        "merging.adapters": "merging.adapters.adapter",
        "merging.appearance": "merging.checkpoints.positioned_reads",
        "merging.archives": "merging.checkpoints.pickles",
        "merging.arena": "merging.vectors.parallel",
        "merging.beside_file": "merging.vectors.rows_cache",
        "merging.block_specs": "merging.vectors.blocks",
        "merging.blocks": "merging.vectors.blocks",
        "merging.checkpoint": "merging.checkpoints.checkpoint",
        "merging.chunked": "merging.vectors.kernel",
        "merging.comparing": "merging.align.experts",
        "merging.deltas": "merging.vectors.operator",
        "merging.digests": "merging.export.model",
        "merging.draft": "merging.export.draft",
        "merging.expert_reader": "merging.align.experts",
        "merging.export": "merging.export.model",
        "merging.finite": "merging.checkpoints.tensors",
        "merging.formats": "merging.checkpoints.tensors",
        "merging.hub": "merging.checkpoints.hub",
        "merging.importance": "merging.vectors.blocks",
        "merging.layout": "merging.align.layout",
        "merging.likeness": "merging.align.experts",
        "merging.linear_merge": "merging.vectors.linear_merge",
        "merging.live": "merging.vectors.live",
        "merging.lora_config": "merging.adapters.lora",
        "merging.low_rank": "merging.adapters.low_rank",
        "merging.merge_checkpoints": "merging.export.model",
        "merging.mergekit_config": "merging.export.mergekit_config",
        "merging.messages": "errors",
        "merging.model_card": "merging.export.model_card",
        "merging.names": "merging.align.experts",
        "merging.operator": "merging.vectors.operator",
        "merging.pickles": "merging.checkpoints.pickles",
        "merging.piecewise": "merging.export.bounded",
        "merging.progress": "merging.export.write_shards",
        "merging.quantised": "merging.checkpoints.checkpoint",
        "merging.recalibration": "merging.vectors.recalibration",
        "merging.recipe": "merging.export.recipe",
        "merging.row_filling": "merging.vectors.row_filling",
        "merging.rows_cache": "merging.vectors.rows_cache",
        "merging.safetensors_file": "merging.checkpoints.safetensors_files",
        "merging.safetensors_header": "merging.checkpoints.safetensors_files",
        "merging.saved_names": "merging.checkpoints.saved_names",
        "merging.sharded": "merging.checkpoints.read_sharded",
        "merging.shards": "merging.export.write_shards",
        "merging.similarity": "merging.vectors.task_vectors",
        "merging.sizes": "merging.vectors.storage",
        "merging.storage": "merging.vectors.storage",
        "merging.streamed": "merging.vectors.on_disk",
        "merging.streaming": "merging.export.bounded",
        "merging.strict_json": "merging.checkpoints.safetensors_files",
        "merging.task_arithmetic": "merging.vectors.linear_merge",
        "merging.task_vectors": "merging.vectors.task_vectors",
        "merging.tensor_names": "merging.checkpoints.tensors",
        "merging.tokenizer": "merging.align.vocabulary",
        "merging.vocabulary": "merging.align.vocabulary",
        "merging.weight_file": "merging.checkpoints.positioned_reads",
        "merging.weight_formats": "merging.checkpoints.read_sharded",
        "merging.workers": "merging.vectors.parallel",
        "merging.writer": "merging.checkpoints.safetensors_files",
        "nested.handing": "nested.promotion",
        "nested.node_problem": "nested.nodes",
        "nested.planner": "nested.planning",
        "nested.progress": "nested.run",
        "nested.seeding": "nested.nodes",
        "nested.store": "nested.record",
        "nested.tasks": "nested.tree",
        "operators.batches": "operators.statistics.batches",
        "operators.election": "operators.sparse",
        "operators.fisher": "operators.statistics.fisher",
        "operators.fisher_information": "operators.statistics.fisher_information",
        "operators.input_products": "operators.statistics.input_products",
        "operators.known_statistics": "operators.statistics.known_statistics",
        "operators.mergekit_form": "operators.mergekit.form",
        "operators.mergekit_recipes": "operators.mergekit.recipes",
        "operators.mergekit_settings": "operators.mergekit.form",
        "operators.quantiles": "operators.thresholds",
        "operators.regmean": "operators.statistics.regmean",
        "operators.sparsifiers": "operators.sparsify",
        "operators.statistics": "operators.statistics.statistics",
        "problems.adapter_exporting": "problems.merged.problem",
        "problems.differentiable": "evaluators.differentiable",
        "problems.evaluators": "evaluators.evaluator",
        "problems.image_sets": "problems.zoo.image_sets",
        "problems.image_training": "problems.zoo.image_training",
        "problems.image_zoo": "problems.zoo.images",
        "problems.imported": "problems.merged.imported",
        "problems.measured_metrics": "evaluators.metrics",
        "problems.merged": "problems.merged.problem",
        "problems.merged_checks": "problems.merged.parts",
        "problems.merged_description": "problems.merged.parts",
        "problems.merged_export": "problems.merged.problem",
        "problems.merged_space": "problems.merged.parts",
        "problems.merged_storage": "problems.merged.parts",
        "problems.zoo": "problems.zoo.digits",
        "problems.zoo_cache": "problems.cache",
        "problems.zoo_data": "problems.zoo.data",
        "problems.zoo_statistics": "problems.zoo.statistics",
        "problems.zoo_training": "problems.zoo.training",
        "report.artifacts": "report.run.artifacts",
        "report.bootstrap": "report.comparison.bootstrap",
        "report.calibration": "report.run.certainty",
        "report.cards": "report.run.cards",
        "report.certainty": "report.run.certainty",
        "report.comparison": "report.comparison.comparison",
        "report.comparison_files": "report.comparison.files",
        "report.comparison_page": "report.comparison.page",
        "report.comparison_plots": "report.comparison.plots",
        "report.comparison_tables": "report.comparison.tables",
        "report.content": "report.run.content",
        "report.front_plots": "report.run.front_plots",
        "report.html": "report.run.page",
        "report.labels": "report.run.front_plots",
        "report.measured": "report.comparison.runs",
        "report.plots": "report.run.plots",
        "report.progress_plot": "report.run.plots",
        "report.tables": "report.run.tables",
        "report.tree_plot": "report.run.tree_plot",
        "report.variants": "report.comparison.comparison",
        "report.wandb_panels": "report.wandb.spec",
        "report.wandb_publish": "report.wandb.publish",
        "report.wandb_spec": "report.wandb.spec",
        "samplers.acquisition": "samplers.posterior.acquisition",
        "samplers.angles": "samplers.published.angles",
        "samplers.ax": "samplers.baselines.ax",
        "samplers.ax_library": "samplers.baselines.ax_library",
        "samplers.bins": "samplers.published.bins",
        "samplers.bins_reference": "samplers.published.public_code",
        "samplers.block_design": "samplers.designs.blocks",
        "samplers.cma": "samplers.baselines.cma",
        "samplers.covariance": "samplers.posterior.covariance",
        "samplers.evolutionary": "samplers.baselines.evolutionary",
        "samplers.exchange": "samplers.designs.optimal",
        "samplers.front_uncertainty": "samplers.posterior.front_uncertainty",
        "samplers.hypervolume": "samplers.posterior.hypervolume",
        "samplers.improvement": "samplers.posterior.hypervolume",
        "samplers.joint_draws": "samplers.posterior.covariance",
        "samplers.latin_hypercube": "samplers.designs.latin_hypercube",
        "samplers.optimal_design": "samplers.designs.optimal",
        "samplers.posterior": "samplers.posterior.driven",
        "samplers.reference_design": "samplers.published.public_code",
        "samplers.scalarised": "samplers.posterior.scalarised",
        "samplers.space_filling": "samplers.designs.space_filling",
        "samplers.thompson": "samplers.posterior.thompson",
        "samplers.variance": "samplers.posterior.variance",
        "surrogates.closed_form": "surrogates.processes.marginal",
        "surrogates.gp": "surrogates.processes.gp",
        "surrogates.gp_gradients": "surrogates.processes.gp_gradients",
        "surrogates.hybrid": "surrogates.processes.hybrid",
        "surrogates.kernels": "surrogates.processes.kernels",
        "surrogates.laplace": "surrogates.quadratic",
        "surrogates.marginal": "surrogates.processes.marginal",
        "surrogates.noise": "surrogates.links",
        "surrogates.reference": "surrogates.published",
        "surrogates.row_kinds": "surrogates.gradients",
        "surrogates.sparse": "surrogates.processes.sparse",
        "tracking.background": "tracking.wandb.mirror",
        "tracking.numbers": "tracking.wandb.numbers",
        "tracking.wandb": "tracking.wandb.mirror",
        "tracking.wandb_run": "tracking.wandb.run",
        "tracking.wandb_service": "tracking.wandb.service",
    }
)
"""Old module -> today's module, both without the leading ``map_bo.``."""

CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "botorch": "map_bo.problems.botorch_functions:BotorchProblem",
        "breadcrumbs": "map_bo.operators.sparse:Breadcrumbs",
        "concave_quadratics": "map_bo.problems.synthetic:ConcaveQuadratics",
        "consensus": "map_bo.operators.consensus:Consensus",
        "dare": "map_bo.operators.sparse:Dare",
        "della": "map_bo.operators.sparse:Della",
        "fisher": "map_bo.operators.statistics.fisher:Fisher",
        "magnitude": "map_bo.operators.sparse:Magnitude",
        "multi_bump": "map_bo.problems.synthetic:MultiBump",
        "regmean": "map_bo.operators.statistics.regmean:RegMean",
        "sigmoid_quadratics": "map_bo.problems.synthetic:SigmoidQuadratics",
        "slerp": "map_bo.operators.averages:Slerp",
        "task_arithmetic": "map_bo.merging.vectors.linear_merge:TaskArithmetic",
        "ties": "map_bo.operators.sparse:Ties",
        "weighted_average": "map_bo.operators.averages:WeightedAverage",
    }
)
"""Name or kind by which records and recipes told an operator or a problem -> today's class."""


FIELDS: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "CoefficientSpace": {"resting": "defaults"},
        "Metric": {"examples": "resampling"},
        "Nested": {"hand_up": "promote"},
        "digits_problem": {"examples": "size"},
        "images_problem": {"examples": "size"},
        "imported_problem.metrics.*": {"examples": "resampling"},
    }
)
"""Fields and options that have another name today: whose they are -> the old name -> today's.

Whose is the name of a class or function, or a pattern of the place below it.
"""

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "merging.export.bounded.merge_streamed": "merge_linearly",
        "samplers.published.public_code.BinsReference": "PublishedBins",
        "samplers.published.public_code.ReferenceDesign": "PublishedDesign",
        "surrogates.published.ReferenceModel": "PublishedModel",
        "surrogates.published.ReferenceQuadratic": "PublishedQuadratic",
    }
)
"""Old name of a class or function in a module of today -> its name today."""


def current(name: str) -> str:
    """Return today's name for a dotted name such as ``map_bo.problems.zoo.digits_problem``.

    The longest old module that the name begins with is replaced, and so is the old name of a class.
    A name that leads to a module of today, and any name of another package, is returned as it is.
    Packages of today whose name was a module's lead to what that module became, but for their own
    modules.
    """
    if not name.startswith(_ROOT):
        return name
    name = _moved(name)
    home, _, last = name.rpartition(".")
    return f"{home}.{NAMES.get(name.removeprefix(_ROOT), last)}"


def current_class(module: str, name: str) -> tuple[str, str]:
    """Return today's module and name of a class."""
    home = current(module)
    return home, NAMES.get(f"{home.removeprefix(_ROOT)}.{name}", name)


def _moved(name: str) -> str:
    parts = name.removeprefix(_ROOT).split(".")
    if not all(part.isidentifier() and len(part) <= _LONGEST for part in parts):
        return name  # which a file made up
    for end in range(len(parts), 0, -1):
        old = ".".join(parts[:end])
        file = Path(__file__).parent.joinpath(*parts[:end]).with_suffix(".py")
        if old in _TODAY or file.is_file():
            return name
        if old in MODULES:
            return _ROOT + ".".join([MODULES[old], *parts[end:]])
    return name


def with_current_targets(tree: Any) -> Any:
    """Return a recorded configuration with today's names of classes and of their options.

    An option that is set by its old name beside the default of today's counts, as it does where it
    is built; one that is not set stays as it is.
    """
    return _with_current_targets(tree, "")


def _with_current_targets(tree: Any, place: str) -> Any:
    """Do so below ``place``: a target of map_bo, and the options that led here from it."""
    if isinstance(tree, list):
        return [_with_current_targets(value, "") for value in tree]
    if not isinstance(tree, Mapping):
        return tree
    target = tree.get("_target_")
    if isinstance(target, str):
        target = current(target)
        place = target.rpartition(".")[2] if target.startswith(_ROOT) else ""
    found: dict[Any, Any] = {}
    for key, value in tree.items():
        below = f"{place}.{key}" if place else ""
        found[key] = target if key == "_target_" else _with_current_targets(value, below)
    for old, new in _renamed_fields(place).items():
        if old in found and (new not in found or found[old] is not None):
            former = found.pop(old)
            found[new] = former
    return found


def _renamed_fields(place: str) -> Mapping[str, str]:
    """Return the fields at ``place`` that have another name today: the old one -> today's."""
    return next((names for of, names in FIELDS.items() if fnmatchcase(place, of)), {})


def field_today(name: str, today: Container[str]) -> str:
    """Return today's name of a field of version 0.1.

    Args:
        name: The field.
        today: The fields that there are today; they tell which of several new names is meant.
    """
    if name in today:
        return name
    known = (names[name] for names in FIELDS.values() if name in names)
    return next((new for new in known if new in today), name)


def under_old_name(
    owner: str, old: str, new: str, former: T | None, value: T, *, decorated: bool = False
) -> T:
    """Return an argument that may have been given by its old name, which warns and then counts.

    Args:
        owner: What was called; its caller's caller is warned.
        old: The name in version 0.1.
        new: The name today.
        former: What was given by the old name; None is nothing.
        value: What was given by today's.
        decorated: Whether the callable is called by a decorator's, one level further away.
    """
    if former is None:
        return value
    warnings.warn(
        f"{owner}({old}=...) is now {owner}({new}=...); the old name goes in version 0.3",
        DeprecationWarning,
        stacklevel=4 if decorated else 3,
    )
    return former


def old_attribute(package: str, name: str) -> Any:
    """Return what the old module of this name held: for the ``__getattr__`` of a package.

    Args:
        package: A package of today that has the name of an old module.
        name: The attribute that was asked of it.

    Raises:
        AttributeError: When the old module had no such attribute either.
    """
    home = _ROOT + MODULES[package.removeprefix(_ROOT)]
    if not name.startswith("__") and f"{package}.{name}" != home:
        try:
            found = vars(import_module(home))[name]
        except KeyError:
            pass
        else:
            _warn(f"{package}.{name}", f"{home}.{name}")
            return found
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


def renamed(module: str, name: str) -> Any:
    """Return what has another name today: for the ``__getattr__`` of its module.

    Args:
        module: The module.
        name: The attribute that was asked of it.

    Raises:
        AttributeError: When the module never had such an attribute.
    """
    old = f"{module}.{name}"
    if old.removeprefix(_ROOT) not in NAMES:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    new = NAMES[old.removeprefix(_ROOT)]
    _warn(old, f"{module}.{new}")
    return vars(import_module(module))[new]


class OldNames(MetaPathFinder):
    """Finds the modules of version 0.1 where they are today."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec that leads to today's module, or None for any other name."""
        del path, target
        new = MODULES.get(fullname.removeprefix(_ROOT)) if fullname.startswith(_ROOT) else None
        if new is None:
            return None
        _warn(fullname, _ROOT + new)
        return ModuleSpec(fullname, _Alias(_ROOT + new))


class _Alias(Loader):
    def __init__(self, name: str) -> None:
        self.name = name

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        del spec
        return None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = import_module(self.name)


_TODAY = frozenset(MODULES.values())


def _warn(old: str, new: str) -> None:
    warnings.warn(
        f"{old} is now {new}; the old name goes in version 0.3", DeprecationWarning, stacklevel=3
    )
