"""Where modules stood in version 0.1: old imports and old records lead to today's modules.

Imports of the old names work for one minor version, with a ``DeprecationWarning``. Records of
runs and recipes keep the names of their time, so :func:`current` is how they are read.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import MappingProxyType, ModuleType
from typing import Any

__all__ = ["MODULES", "OldNames", "current", "old_attribute"]

_ROOT = "map_bo."

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "app.comparing": "app.comparison",
        "app.exchange": "app.ax_commands",
        "loop.identity": "loop.state",
        "loop.observed": "loop.run",
        "loop.publish": "loop.mirrors",
        "loop.sweeps": "loop.reading",
        "merging.adapted": "merging.adapters.low_rank",
        "merging.adapter_checkpoint": "merging.adapters.checkpoint",
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
        "merging.comparing": "merging.align.same_base",
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
        "merging.likeness": "merging.align.same_base",
        "merging.linear_merge": "merging.vectors.linear_merge",
        "merging.live": "merging.vectors.live",
        "merging.lora_config": "merging.adapters.lora",
        "merging.low_rank": "merging.adapters.low_rank",
        "merging.merge_checkpoints": "merging.export.merge_checkpoints",
        "merging.mergekit_config": "merging.export.mergekit_config",
        "merging.messages": "errors",
        "merging.model_card": "merging.export.model_card",
        "merging.names": "merging.align.experts",
        "merging.operator": "merging.vectors.operator",
        "merging.pickles": "merging.checkpoints.pickles",
        "merging.piecewise": "merging.export.bounded",
        "merging.progress": "merging.export.shards",
        "merging.quantised": "merging.checkpoints.checkpoint",
        "merging.recalibration": "merging.vectors.recalibration",
        "merging.recipe": "merging.export.recipe",
        "merging.row_filling": "merging.vectors.row_filling",
        "merging.rows_cache": "merging.vectors.rows_cache",
        "merging.safetensors_file": "merging.checkpoints.safetensors_files",
        "merging.safetensors_header": "merging.checkpoints.safetensors_files",
        "merging.saved_names": "merging.align.saved_names",
        "merging.sharded": "merging.checkpoints.weight_files",
        "merging.shards": "merging.export.shards",
        "merging.similarity": "merging.vectors.task_vectors",
        "merging.sizes": "merging.vectors.memory",
        "merging.storage": "merging.vectors.storage",
        "merging.streamed": "merging.export.bounded",
        "merging.streaming": "merging.export.bounded",
        "merging.strict_json": "merging.checkpoints.safetensors_files",
        "merging.task_arithmetic": "merging.vectors.linear_merge",
        "merging.task_vectors": "merging.vectors.task_vectors",
        "merging.tensor_names": "merging.checkpoints.tensors",
        "merging.tokenizer": "merging.align.vocabulary",
        "merging.vocabulary": "merging.align.vocabulary",
        "merging.weight_file": "merging.checkpoints.positioned_reads",
        "merging.weight_formats": "merging.checkpoints.weight_files",
        "merging.workers": "merging.vectors.parallel",
        "merging.writer": "merging.checkpoints.safetensors_files",
        "nested.handing": "nested.promotion",
        "nested.node_problem": "nested.nodes",
        "nested.planner": "nested.planning",
        "nested.progress": "nested.run",
        "nested.seeding": "nested.nodes",
        "nested.store": "nested.record",
        "nested.tasks": "nested.tree",
        "operators.election": "operators.sparse",
        "operators.mergekit_form": "operators.mergekit.form",
        "operators.mergekit_recipes": "operators.mergekit.recipes",
        "operators.mergekit_settings": "operators.mergekit.form",
        "operators.quantiles": "operators.thresholds",
        "operators.sparsifiers": "operators.sparsify",
        "problems.adapter_exporting": "problems.merged.export",
        "problems.differentiable": "evaluators.differentiable",
        "problems.evaluators": "evaluators.evaluator",
        "problems.image_sets": "problems.zoo.image_sets",
        "problems.image_training": "problems.zoo.image_training",
        "problems.image_zoo": "problems.zoo.images",
        "problems.imported": "problems.merged.imported",
        "problems.measured_metrics": "evaluators.evaluator",
        "problems.merged": "problems.merged.problem",
        "problems.merged_checks": "problems.merged.parts",
        "problems.merged_description": "problems.merged.parts",
        "problems.merged_export": "problems.merged.export",
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


def current(name: str) -> str:
    """Return today's name for a dotted name such as ``map_bo.problems.zoo.digits_problem``.

    The longest old module that the name begins with is replaced. A name that leads to a module of
    today, and any name of another package, is returned as it is.
    """
    if not name.startswith(_ROOT):
        return name
    parts = name.removeprefix(_ROOT).split(".")
    for end in range(len(parts), 0, -1):
        old = ".".join(parts[:end])
        if old in _TODAY:
            return name
        if old in MODULES:
            return _ROOT + ".".join([MODULES[old], *parts[end:]])
    return name


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
