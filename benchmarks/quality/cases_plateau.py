"""A case where experts hardly conflict, so that the uniform blend is nearly the best there is.

Four fine-tunings of one base on one task, which differ in the order of their batches alone (the
ingredients of a "model soup": Wortsman et al., arXiv 2203.05482); each is measured on a quarter
of the task's held-out images of its own. What is left to gain over the blend is a few images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.cases_core import Case, anchored, identity
from benchmarks.quality.truth import Examples, MergedNetworks
from map_bo.evaluators.evaluator import accuracy
from map_bo.problems.cache import cache_root, read_network, trained_files, write_network
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.zoo.data import digits_split, transform
from map_bo.problems.zoo.digits import DigitsZoo
from map_bo.problems.zoo.training import TRAINING_VERSION, as_inputs, network, train
from map_bo.rng import child, make_generator

__all__ = ["PLATEAUS"]

EXPERTS = ("first", "second", "third", "fourth")

_VERSION = 1
_RATE = 1e-3
_TASK = "rot90"


def _held_out() -> dict[str, Examples]:
    """Return four disjoint quarters of the held-out images."""
    _, _, images, labels = digits_split()
    shown = as_inputs(transform(_TASK, images))
    size = len(shown) // len(EXPERTS)
    parts = [slice(i * size, (i + 1) * size) for i in range(len(EXPERTS))]
    return {
        name: Examples(shown[part], torch.from_numpy(labels[part]))
        for name, part in zip(EXPERTS, parts, strict=True)
    }


def _trained(base: Path, epochs: int, settings: Mapping[str, Any]) -> dict[str, Path]:
    """Return the experts' files; train, once, what is missing."""
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]

    def fit(files: Mapping[str, Path]) -> None:
        weights = read_network(base)
        assert weights is not None
        for name, path in files.items():
            if read_network(path) is None:
                write_network(path, _expert(name, weights, epochs))

    return trained_files(cache_root() / "plateau" / key, EXPERTS, fit)


def _expert(name: str, base: Mapping[str, Tensor], epochs: int) -> dict[str, Tensor]:
    images, labels, _, _ = digits_split()
    model = network("mlp", generator=make_generator(0))
    model.load_state_dict(dict(base))
    train(
        model,
        as_inputs(transform(_TASK, images)),
        torch.from_numpy(labels),
        epochs,
        _RATE,
        generator=child(make_generator(0), "plateau", name),
    )
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


def _plateau(name: str, *, epochs: int = 20) -> Case:
    settings = {
        "task": _TASK,
        "epochs": epochs,
        "rate": _RATE,
        "version": [_VERSION, TRAINING_VERSION],
    }
    base = DigitsZoo(2).checkpoints().base
    experts = _trained(base, epochs, settings)
    metrics = _held_out()
    net = network("mlp", generator=make_generator(0))
    networks = MergedNetworks(net, base, experts, list(metrics.values()))

    def build(lower: float = 0.0, upper: float = 1.0) -> MergedModelProblem:
        return MergedModelProblem(
            network("mlp", generator=make_generator(0)),
            base=base,
            experts=experts,
            evaluators={
                part: accuracy(held.inputs, held.labels, batch_size=len(held.labels))
                for part, held in metrics.items()
            },
            lower=lower,
            upper=upper,
        )

    problem = build()
    about = {**settings, "problem": identity(problem.describe())}
    scale = anchored(problem, networks.accuracy)
    wide = partial(build, -3.0, 3.0)
    return Case(name, "plateau", problem, networks.accuracy, scale, True, about, wide)


PLATEAUS: dict[str, Callable[..., Case]] = {"plateau-4": _plateau}
"""Name -> what makes the case, given its name; option ``epochs`` of training."""
