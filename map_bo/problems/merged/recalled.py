"""What a merged-model problem need not measure, because it was measured before.

The key of an entry is a digest of everything that the measurement depends on: base, experts and
how they are fitted to each other, operator, coefficients, storage, architecture, device, versions,
the evaluator with its settings and its examples. What has no digest has no key, and is measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Metric
from map_bo.errors import EvaluationError, MapBoError
from map_bo.evaluators.evaluator import Evaluator, HasDigest, Measurement, Repeats
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.isolation.world import callers_settings
from map_bo.evaluators.items import Items
from map_bo.evaluators.lm_eval import LMEval
from map_bo.evaluators.metrics import SeveralMetrics, metric_names, own_names
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.merging.vectors.live import LiveModel
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.merging.vectors.recalibration import Batches, Recalibration
from map_bo.problems.evaluation_cache import CachedMeasurements, EvaluationCache
from map_bo.problems.fingerprint import fingerprint
from map_bo.problems.merged.heads import TaskHeads
from map_bo.problems.merged.measured import MeasuredRows
from map_bo.tracking.codec import encode_metric

__all__ = ["Recall", "digest_of_batches", "why_not_kept"]

logger = logging.getLogger(__name__)

_DEAR = 1.0  # seconds; what took longer is written at once, whatever happens to the row
_OF_TASKS = (".py", ".yaml", ".yml", ".json", ".jsonl", ".txt")
_LIBRARIES = (  # that models and evaluators compute with
    *("torch", "numpy", "transformers", "tokenizers", "lm_eval", "datasets", "torchmetrics"),
    *("open_clip_torch", "timm", "torchvision", "pillow", "scikit-learn", "scipy"),
)


def why_not_kept(evaluator: Evaluator, key: str, metrics: Sequence[Metric]) -> str | None:
    """Return why an evaluator's measurements cannot be kept; None where nothing speaks against it.

    Args:
        evaluator: The evaluator, ready.
        key: What it is called.
        metrics: The metrics of the problem.
    """
    names = set(metric_names(key, evaluator).values())
    if any(metric.resampling == "fresh" for metric in metrics if metric.name in names):
        return "it draws fresh examples"
    inner = evaluator.function if isinstance(evaluator, SeveralMetrics) else evaluator
    try:
        if isinstance(inner, Repeats) and not inner.repeats:
            return "the same weights do not always give the same measurement"
        if not isinstance(inner, HasDigest) or (isinstance(inner, Items) and not inner.digest):
            return "it has no digest"
    except Exception as error:  # whatever a property of somebody else's raises
        return f"its digest cannot be told: {type(error).__name__}: {error}".rstrip(": ")
    return None


def digest_of_batches(batches: Batches) -> str | None:
    """Return what batches for recalibration say of their content; None where they say nothing."""
    said: object = batches.digest if isinstance(batches, HasDigest) else None
    text = said() if callable(said) else said
    return text if isinstance(text, str) and text else None


class Recall:
    """Looks measurements up, and keeps new ones.

    Args:
        cache: The store; None for one that knows and keeps nothing.
        context: A digest of all that measurements depend on beside the row and the evaluator.
        metrics: The metrics of the problem.
        heads: The task heads.
        own: Name -> fingerprint of what the model itself has where task heads are put.
    """

    def __init__(
        self,
        cache: EvaluationCache | None,
        context: str,
        metrics: Sequence[Metric],
        heads: TaskHeads,
        own: Mapping[str, str] | None = None,
    ) -> None:
        self._own = dict(own or {})
        self._cache, self._context, self._metrics, self._heads = cache, context, metrics, heads
        self._told: set[str] = set()
        self._fixed: dict[str, tuple[Evaluator, str]] = {}
        self._keys: dict[str, str] = {}  # evaluator -> key, of the row that was asked for last
        self._new: dict[str, CachedMeasurements] = {}

    @classmethod
    def of(
        cls,
        cache: EvaluationCache | None,
        live: LiveModel,
        evaluators: Mapping[str, Evaluator],
        metrics: Sequence[Metric],
        heads: TaskHeads,
        recalibration: Recalibration | None,
        *,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        operator: MergeOperator,
        **settings: object,
    ) -> Recall:
        """Return that of a problem; nothing is read where no evaluator's measurements can be kept.

        Args:
            cache: The store, or None.
            live: The model, entered, with nothing done to it.
            evaluators: Name -> evaluator, all of them ready.
            metrics: The metrics of the problem.
            heads: The task heads.
            recalibration: How statistics of BatchNorm layers are measured anew, if they are.
            base: The base.
            experts: The experts.
            operator: The operator.
            settings: What else decides the weights.
        """
        nothing = cls(None, "", metrics, heads)
        given = None if recalibration is None else digest_of_batches(recalibration.batches)
        if cache is None or (recalibration is not None and given is None):
            return nothing
        if all(why_not_kept(one, key, metrics) for key, one in evaluators.items()):
            return nothing
        # What the model has in the place of a task head is drawn anew whenever it is built.
        named = (*live.model.named_parameters(), *live.model.named_buffers())
        own = {name: tensor for name, tensor in named if name in heads.names}
        try:
            content = [
                base.digest(),
                [[k, one.digest(), dict(one.vocabulary_changes)] for k, one in experts.items()],
                fingerprint((operator, settings, given, live.cast_inputs)),
                fingerprint(live.model, written=[*live.written_tensors(), *own.values()]),
                *_machine(live.device),
                _versions(),
            ]
        except MapBoError as error:
            logger.info("evaluations are not kept: %s", error.message)
            return nothing
        found = {name: fingerprint(tensor) for name, tensor in own.items()}
        return cls(cache, _digest(content), metrics, heads, found)

    def fill(
        self, measured: MeasuredRows, i: int, x: Tensor, evaluators: Mapping[str, Evaluator]
    ) -> tuple[set[str], list[str]]:
        """Put what is known of a row where it is collected.

        Args:
            measured: The rows.
            i: Which of them.
            x: Its ``d`` coefficients.
            evaluators: Name -> evaluator, all of them ready.

        Returns:
            The evaluators that need not measure; the reasons of what failed all the same, because
            a metric has other bounds now.
        """
        self._keys, self._new = {}, {}
        if self._cache is None:
            return set(), []
        place = [self._context, callers_settings(), [(v + 0.0).hex() for v in x.tolist()]]
        for key, evaluator in evaluators.items():
            digest = self._of_evaluator(key, evaluator)
            if digest is not None:
                self._keys[key] = _digest([*place, digest, self._head_of(key)])
        entries = self._cache.get(self._keys.values())
        known: set[str] = set()
        reasons: list[str] = []
        for key, place_of in self._keys.items():
            names, entry = own_names(key, evaluators[key]), entries.get(place_of)
            if entry is not None and set(entry.metrics) == set(names.values()):
                known.add(key)
                found = {name: entry.metrics[own] for name, own in names.items()}
                reasons += measured.recall(i, key, found, entry.seconds, entry.outcomes)
        return known, reasons

    def keep(
        self,
        key: str,
        evaluator: Evaluator,
        found: Mapping[str, Measurement | EvaluationError],
        seconds: float,
        outcomes: Tensor | None = None,
    ) -> None:
        """Note what an evaluator measured on the row that was asked for last, for `save`.

        Args:
            key: What it is called.
            evaluator: The evaluator.
            found: Its measurements by the names that the metrics have in the run.
            seconds: How long it took.
            outcomes: ``n x k`` outcomes of all its examples in order, where it has such.
        """
        if key not in self._keys:
            return
        own = own_names(key, evaluator)
        metrics = {own[n]: one for n, one in found.items() if isinstance(one, Measurement)}
        if len(metrics) == len(own):
            self._new[self._keys[key]] = CachedMeasurements(key, metrics, seconds, outcomes)
            if seconds > _DEAR:
                self.save()

    def save(self) -> None:
        """Write what was noted."""
        new, self._new = self._new, {}
        if self._cache is not None and new:
            self._cache.put(new)

    def _head_of(self, key: str) -> object:
        head = self._heads.of_task(key)
        if head is None:
            return self._own
        left = {name: found for name, found in self._own.items() if name not in head.tensors}
        return [head.expert, sorted(head.tensors), left]

    def _of_evaluator(self, key: str, evaluator: Evaluator) -> str | None:
        """Return a digest of an evaluator and of what it measures with, or None."""
        known = self._fixed.get(key)
        if known is not None and known[0] is evaluator:
            return known[1]
        reason = why_not_kept(evaluator, key, self._metrics)
        if reason is None:
            try:
                digest = _digest(_identity(evaluator))
            except Exception as error:
                reason = f"its digest cannot be told: {error}"
            else:
                if isinstance(evaluator, ExampleEvaluator):  # which was read once, and stays
                    self._fixed[key] = evaluator, digest
                return digest
        if key not in self._told:
            self._told.add(key)
            logger.info("measurements of evaluator %r are not kept: %s", key, reason)
        return None


def _identity(evaluator: Evaluator) -> list[Any]:
    inner = evaluator.function if isinstance(evaluator, SeveralMetrics) else evaluator
    assert isinstance(inner, HasDigest)
    said: object = inner.digest
    text = said() if callable(said) else said
    if not isinstance(text, str) or not text:
        raise ValueError(f"it must be text, got {text!r:.60}")
    found: list[Any] = [text]
    if isinstance(evaluator, SeveralMetrics):
        found.append([encode_metric(metric) for metric in evaluator.metrics])
    if isinstance(inner, ExampleEvaluator):
        found += [
            [encode_metric(metric) for metric in inner.metrics],
            inner.batch_size,
            _code_of_items(inner) if isinstance(inner, Items) else fingerprint(_code_of(inner)),
            [_identity(one) for one in vars(inner).values() if isinstance(one, ExampleEvaluator)],
        ]
    if isinstance(inner, LMEval):
        found.append([_files_of(Path(folder)) for folder in inner.include_path])
    kind = inner if isinstance(inner, FunctionType) else type(inner)
    try:
        found.append(fingerprint(kind))
    except MapBoError:  # what it depends on, it says itself
        found.append(f"{kind.__module__}:{kind.__qualname__}")
    return found


def _code_of_items(evaluator: Items) -> str:
    """Return a fingerprint of what scores, if it has one; its digest answers for the rest."""
    try:
        return fingerprint(evaluator.scorer)
    except MapBoError:
        return ""


def _code_of(evaluator: ExampleEvaluator) -> dict[str, object]:
    """Return the functions and metrics of others that an evaluator calls: graders, outcomes."""
    parts: dict[str, object] = {}
    for name, value in vars(evaluator).items():
        parts[name] = value
        inner = value if isinstance(value, Mapping) else {}
        if is_dataclass(value) and not isinstance(value, type):
            inner = vars(value)
        parts |= {f"{name}.{key}": one for key, one in inner.items()}
    return {
        name: value
        for name, value in parts.items()
        if callable(value)
        and not isinstance(value, ExampleEvaluator)
        # Tokens and pixels are in the evaluator's own digest.
        and not name.endswith(("tokenizer", "processor"))
    }


def _files_of(folder: Path) -> list[list[str]]:
    """Return name and digest of the files of tasks, which may hold code."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix in _OF_TASKS)
    return [
        [f.relative_to(folder).as_posix(), hashlib.sha256(f.read_bytes()).hexdigest()]
        for f in files
    ]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _machine(device: torch.device) -> list[str]:
    """Return what computes: the device and its kind."""
    if device.type == "cuda":
        return ["cuda", torch.cuda.get_device_name(device), str(torch.version.cuda)]
    if device.type == "cpu":
        return ["cpu", platform.machine(), torch.backends.cpu.get_cpu_capability()]
    return [device.type]


@cache
def _versions() -> dict[str, str]:
    found = {"python": ".".join(platform.python_version_tuple()[:2])}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
