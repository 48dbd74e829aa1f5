"""Outcomes by example of real merged models, measured once and kept.

python -m benchmarks.quality.outcome_tables                      all tables that can be made here
python -m benchmarks.quality.outcome_tables --only digits-4      some of them

A table has the anchors (the base, each expert, and their mean with coefficients ``1/N``), then
random merges of the box [0, 1]^N, a scrambled Sobol sequence. It is a file
``~/.cache/map_bo/outcomes/NAME.npz`` (below `map_bo.problems.cache.cache_root`) with

- ``X``: ``n x d`` float64, the coefficients; the first ``anchors`` rows are the anchors;
- ``outcomes``: ``n x m x E`` float32, the outcome of every example; 1 and 0 for right and wrong;
- ``metrics``: ``m`` names; ``kinds``: ``m`` of ``proportion`` and ``loss``; ``directions``;
- ``anchors``: how many rows are anchors; ``digest``: of the problem that was measured.

A table that was interrupted goes on where it was. One with more rows than asked for is cut.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import DataError
from map_bo.evaluators.evaluator import Accuracy, ItemEvaluator, MeanLoss
from map_bo.problems.cache import cache_root
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.zoo.digits import digits_problem
from map_bo.problems.zoo.images import HeadAccuracy, images_problem
from map_bo.problems.zoo.text import text_problem

__all__ = ["TABLES", "OutcomeTable", "outcome_table"]

_SAVE_EVERY = 20.0  # seconds


@dataclass(frozen=True, eq=False)
class OutcomeTable:
    """The outcome of every example of some merges.

    Attributes:
        X: ``n x d`` coefficients, the anchors first.
        outcomes: ``n x m x E`` outcomes, float64.
        metrics: The ``m`` metrics; each is the mean of its outcomes.
        anchors: How many of the rows are anchors.
    """

    X: Tensor
    outcomes: Tensor
    metrics: tuple[Metric, ...]
    anchors: int

    @property
    def truth(self) -> Tensor:
        """``n x m`` metrics on all examples."""
        return self.outcomes.mean(-1)


def outcome_table(name: str, rows: int | None = None, *, progress: bool = False) -> OutcomeTable:
    """Return the table of a name, measuring what is missing.

    Args:
        name: One of `TABLES`.
        rows: How many merges beside the anchors; the table's own number when None.
        progress: Print how far it has come.

    Raises:
        DataError: When the data of the problem are not there, or the file is of another problem.
    """
    build, usual = TABLES[name]
    wanted = usual if rows is None else rows
    problem = build()
    problem.prepare()
    evaluators, d = problem.evaluators, problem.space.d
    anchors = torch.cat([torch.zeros(1, d), torch.eye(d), torch.full((1, d), 1 / d)]).double()
    engine = torch.quasirandom.SobolEngine(d, scramble=True, seed=20261201)  # type: ignore[no-untyped-call]
    drawn = engine.draw(max(wanted, 1))[:wanted]
    X = torch.cat([anchors, drawn.double()])
    about = problem.describe()
    kept = {key: about[key] for key in ("kind", "zoo", "operator") if key in about}
    described = json.dumps([kept, "outcomes 1"], sort_keys=True, default=str)
    digest = hashlib.sha256(described.encode()).hexdigest()
    path = cache_root(None) / "outcomes" / f"{name}.npz"
    outcomes = np.zeros((0, len(evaluators), 0), dtype=np.float32)
    if path.exists():
        with np.load(path) as file:
            if str(file["digest"]) != digest:
                raise DataError(
                    f"{path} was measured on another problem", hint="delete it, or give it a name"
                )
            outcomes = file["outcomes"][: len(X)]
            X = torch.cat([torch.from_numpy(file["X"])[: len(outcomes)], X[len(outcomes) :]])
    metrics = tuple(problem.metrics)

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_suffix(".tmp.npz")
        np.savez_compressed(
            partial_file,
            X=X[: len(found)].numpy(),
            outcomes=np.stack(found),
            metrics=np.array([metric.name for metric in metrics]),
            kinds=np.array([metric.kind for metric in metrics]),
            directions=np.array([metric.direction for metric in metrics]),
            anchors=len(anchors),
            digest=digest,
        )
        partial_file.replace(path)

    found, saved = list(outcomes), time.monotonic()
    for x in X[len(found) :]:
        row = []
        for key, evaluator in evaluators.items():
            with problem.load(x, metric=key) as model, torch.inference_mode():
                row.append(_score(evaluator, model).flatten().float().numpy())
        found.append(np.stack(row))
        if time.monotonic() - saved > _SAVE_EVERY or len(found) == len(X):
            save()
            saved = time.monotonic()
            if progress:
                print(f"{name}: {len(found)} of {len(X)} rows", flush=True)
    return OutcomeTable(X, torch.from_numpy(np.stack(found)).double(), metrics, len(anchors))


def _score(evaluator: object, model: nn.Module) -> Tensor:
    """Return the outcome of each example of an evaluator."""
    if isinstance(evaluator, ItemEvaluator):
        return evaluator.score(model, torch.arange(evaluator.size))
    if isinstance(evaluator, HeadAccuracy):
        found: Tensor = evaluator.head(model(evaluator.inputs)).argmax(-1) == evaluator.labels
        return found.double()
    assert isinstance(evaluator, Accuracy | MeanLoss)
    assert isinstance(evaluator.inputs, Tensor)
    logits: Tensor = model(evaluator.inputs)
    labels = evaluator.labels
    if isinstance(evaluator, Accuracy):
        return (logits.argmax(-1) == labels).double()
    return F.cross_entropy(logits, labels, reduction="none").double()


TABLES: Mapping[str, tuple[Callable[[], MergedModelProblem], int]] = {
    "digits-4": (partial(digits_problem, 4), 200),
    "digits-8": (partial(digits_problem, 8), 200),
    "digits-4-loss": (partial(digits_problem, 4, measure="loss"), 200),
    "images-4": (images_problem, 100),
    "text-4": (text_problem, 60),
}
"""Name -> what makes the problem, and how many merges beside the anchors are measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--rows", type=int, help="merges beside the anchors")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        table = outcome_table(name, options.rows, progress=True)
        print(f"{name}: {tuple(table.outcomes.shape)} outcomes, means {table.truth.mean(0)}")


if __name__ == "__main__":
    main()
