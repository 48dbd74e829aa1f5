"""Bayesian optimization for multi-objective model merging.

``map_bo`` finds scaling coefficients for merging fine-tuned experts, and returns the whole
Pareto front of trade-offs for a handful of evaluations. It implements MAP (Li et al., arXiv
2406.07529) and goes on from there.

Names are loaded when they are first used, so that importing the package (and the command
line's ``--help``) costs nothing.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from map_bo.moved import OldNames

if TYPE_CHECKING:
    from map_bo.ax.known import AxDatabase
    from map_bo.constraints import AtLeast, AtMost
    from map_bo.data import Front, Metric, Observations
    from map_bo.errors import MapBoError
    from map_bo.evaluators.evaluator import Measurement
    from map_bo.evaluators.items import Items
    from map_bo.evaluators.metrics import SeveralMetrics
    from map_bo.loop.optimize import open_run, optimize
    from map_bo.loop.reading import load_result, outcomes_table
    from map_bo.loop.result import Choice, Result
    from map_bo.loop.run import Run
    from map_bo.loop.settings import Settings
    from map_bo.loop.transfer.study import StartFrom
    from map_bo.merging.checkpoints.checkpoint import open_checkpoint
    from map_bo.merging.export.model import ExportSettings, merge_checkpoints
    from map_bo.merging.vectors.linear_merge import TaskArithmetic
    from map_bo.nested.optimize import optimize_nested
    from map_bo.nested.reading import load_nested
    from map_bo.nested.result import NestedResult
    from map_bo.nested.settings import Nested
    from map_bo.operators.averages import Slerp, WeightedAverage
    from map_bo.operators.consensus import Consensus
    from map_bo.operators.depth import DepthProfile
    from map_bo.operators.nearswap import NearSwap
    from map_bo.operators.pcb import Pcb
    from map_bo.operators.sce import Sce
    from map_bo.operators.searchable import OperatorChoice
    from map_bo.operators.shared_regions import Ram
    from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Magnitude, Ties
    from map_bo.operators.spectral.isotropic import IsoC, IsoCTS
    from map_bo.operators.spectral.knots import KnOTS
    from map_bo.operators.spectral.tsv import TSVM
    from map_bo.operators.spherical import MultiSlerp, NuSlerp
    from map_bo.operators.statistics.data_free import DataFreeRegMean
    from map_bo.operators.statistics.fisher import Fisher
    from map_bo.operators.statistics.regmean import RegMean, RegMeanPlusPlus
    from map_bo.operators.stock import ModelStock
    from map_bo.pareto.preferences import Preference
    from map_bo.problems.evaluation_cache import EvaluationCache
    from map_bo.problems.merged.problem import MergedModelProblem
    from map_bo.problems.table import TableProblem
    from map_bo.problems.told import ToldProblem
    from map_bo.problems.zoo.digits import digits_problem
    from map_bo.space import CoefficientSpace, LinearConstraint
    from map_bo.workers.dask import Dask
    from map_bo.workers.pool import Pool
    from map_bo.workers.processes import Processes
    from map_bo.workers.ray import Ray

__version__ = "0.2.0"

__all__ = [
    "TSVM",
    "AtLeast",
    "AtMost",
    "AxDatabase",
    "Breadcrumbs",
    "Choice",
    "CoefficientSpace",
    "Consensus",
    "Dare",
    "Dask",
    "DataFreeRegMean",
    "Della",
    "DepthProfile",
    "EvaluationCache",
    "ExportSettings",
    "Fisher",
    "Front",
    "IsoC",
    "IsoCTS",
    "Items",
    "KnOTS",
    "LinearConstraint",
    "Magnitude",
    "MapBoError",
    "Measurement",
    "MergedModelProblem",
    "Metric",
    "ModelStock",
    "MultiSlerp",
    "NearSwap",
    "Nested",
    "NestedResult",
    "NuSlerp",
    "Observations",
    "OperatorChoice",
    "Pcb",
    "Pool",
    "Preference",
    "Processes",
    "Ram",
    "Ray",
    "RegMean",
    "RegMeanPlusPlus",
    "Result",
    "Run",
    "Sce",
    "Settings",
    "SeveralMetrics",
    "Slerp",
    "StartFrom",
    "TableProblem",
    "TaskArithmetic",
    "Ties",
    "ToldProblem",
    "WeightedAverage",
    "__version__",
    "digits_problem",
    "load_nested",
    "load_result",
    "merge_checkpoints",
    "open_checkpoint",
    "open_run",
    "optimize",
    "optimize_nested",
    "outcomes_table",
]

_HOME = {
    "AtLeast": "map_bo.constraints",
    "AtMost": "map_bo.constraints",
    "AxDatabase": "map_bo.ax.known",
    "Breadcrumbs": "map_bo.operators.sparse",
    "Choice": "map_bo.loop.result",
    "CoefficientSpace": "map_bo.space",
    "Consensus": "map_bo.operators.consensus",
    "Dare": "map_bo.operators.sparse",
    "Dask": "map_bo.workers.dask",
    "DataFreeRegMean": "map_bo.operators.statistics.data_free",
    "Della": "map_bo.operators.sparse",
    "DepthProfile": "map_bo.operators.depth",
    "EvaluationCache": "map_bo.problems.evaluation_cache",
    "ExportSettings": "map_bo.merging.export.model",
    "Fisher": "map_bo.operators.statistics.fisher",
    "Front": "map_bo.data",
    "IsoC": "map_bo.operators.spectral.isotropic",
    "IsoCTS": "map_bo.operators.spectral.isotropic",
    "Items": "map_bo.evaluators.items",
    "KnOTS": "map_bo.operators.spectral.knots",
    "LinearConstraint": "map_bo.space",
    "Magnitude": "map_bo.operators.sparse",
    "MapBoError": "map_bo.errors",
    "Measurement": "map_bo.evaluators.evaluator",
    "MergedModelProblem": "map_bo.problems.merged.problem",
    "Metric": "map_bo.data",
    "ModelStock": "map_bo.operators.stock",
    "MultiSlerp": "map_bo.operators.spherical",
    "NearSwap": "map_bo.operators.nearswap",
    "Nested": "map_bo.nested.settings",
    "NestedResult": "map_bo.nested.result",
    "NuSlerp": "map_bo.operators.spherical",
    "Observations": "map_bo.data",
    "OperatorChoice": "map_bo.operators.searchable",
    "Pcb": "map_bo.operators.pcb",
    "Pool": "map_bo.workers.pool",
    "Preference": "map_bo.pareto.preferences",
    "Processes": "map_bo.workers.processes",
    "Ram": "map_bo.operators.shared_regions",
    "Ray": "map_bo.workers.ray",
    "RegMean": "map_bo.operators.statistics.regmean",
    "RegMeanPlusPlus": "map_bo.operators.statistics.regmean",
    "Result": "map_bo.loop.result",
    "Run": "map_bo.loop.run",
    "Sce": "map_bo.operators.sce",
    "Settings": "map_bo.loop.settings",
    "SeveralMetrics": "map_bo.evaluators.metrics",
    "Slerp": "map_bo.operators.averages",
    "StartFrom": "map_bo.loop.transfer.study",
    "TSVM": "map_bo.operators.spectral.tsv",
    "TableProblem": "map_bo.problems.table",
    "TaskArithmetic": "map_bo.merging.vectors.linear_merge",
    "Ties": "map_bo.operators.sparse",
    "ToldProblem": "map_bo.problems.told",
    "WeightedAverage": "map_bo.operators.averages",
    "digits_problem": "map_bo.problems.zoo.digits",
    "load_nested": "map_bo.nested.reading",
    "load_result": "map_bo.loop.reading",
    "merge_checkpoints": "map_bo.merging.export.model",
    "open_checkpoint": "map_bo.merging.checkpoints.checkpoint",
    "open_run": "map_bo.loop.optimize",
    "optimize": "map_bo.loop.optimize",
    "optimize_nested": "map_bo.nested.optimize",
    "outcomes_table": "map_bo.loop.reading",
}


sys.meta_path.append(OldNames())  # asked last: only for names that nothing else finds


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'map_bo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
