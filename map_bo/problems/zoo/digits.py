"""The digits zoo: small real experts, trained once, and the problem of merging them.

Every expert is the same base network fine-tuned on scikit-learn's digits as one transform shows
them. Trained weights are kept as safetensors in the user's cache directory, one file per network,
in a folder whose name holds a key of everything that the weights depend on; an expert is
trained once, whatever the size of the zoo that first asked for it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from map_bo.data import Metric
from map_bo.errors import DataError
from map_bo.evaluators.evaluator import Evaluator, accuracy, mean_loss, mean_probability
from map_bo.merging.vectors.blocks import HasBlocks
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.merging.vectors.storage import StorageDtype
from map_bo.moved import under_old_name
from map_bo.operators.searchable import OperatorChoice
from map_bo.operators.statistics.known_statistics import NeedsStatistics
from map_bo.problems.cache import (
    cache_root,
    read_network,
    trained_files,
    training_shown,
    write_network,
)
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.rebuilding import rebuilt
from map_bo.problems.zoo.data import (
    TEST_EXAMPLES,
    TRANSFORM_NAMES,
    digits_split,
    transform,
    transform_names,
)
from map_bo.problems.zoo.statistics import digits_statistics
from map_bo.problems.zoo.training import TRAINING_VERSION, Recipe, as_inputs, network
from map_bo.rng import make_generator
from map_bo.values import whole_number

__all__ = ["TRANSFORM_NAMES", "DigitsProblem", "DigitsZoo", "cache_root", "digits_problem"]


_MEASURES: dict[str, Callable[[Tensor, Tensor, int], Evaluator]] = {
    "accuracy": accuracy,
    "probability": mean_probability,
    "loss": mean_loss,
}
_BATCHES = 16


@dataclass(frozen=True)
class Checkpoints:
    """Files of a trained zoo.

    Attributes:
        base: The base network.
        experts: Task name -> expert, in the order of the tasks.
    """

    base: Path
    experts: dict[str, Path]


@dataclass(frozen=True)
class DigitsZoo:
    """``N`` real experts on transformed digits: the settings, and the way to trained files.

    Attributes:
        experts: Number of experts ``N``, from 2 to 32: the first tasks of ``TRANSFORM_NAMES``.
        arch: ``"mlp"`` (64-64-10) or ``"cnn"`` (two convolutions with BatchNorm).
        seed: Seed of the training.
        epochs: Passes of an expert over its images; by default 20 (MLP) or 10 (CNN).

    Raises:
        DataError: When one of the settings is not possible.
    """

    experts: int = 4
    arch: str = "mlp"
    seed: int = 0
    epochs: int | None = None

    def __post_init__(self) -> None:
        transform_names(self.experts)
        Recipe(self.arch, self.seed, self.epochs)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks, and so of the experts."""
        return transform_names(self.experts)

    @property
    def recipe(self) -> Recipe:
        """The settings of the training."""
        return Recipe(self.arch, self.seed, self.epochs)

    def describe(self) -> dict[str, Any]:
        """Return plain data that tell this zoo from others."""
        return {"experts": self.experts, **asdict(self.recipe), "version": TRAINING_VERSION}

    def folder(self, cache_dir: str | Path | None = None) -> Path:
        """Return the folder of the trained files.

        Zoos that differ in the number of experts alone share it.
        """
        settings = {**asdict(self.recipe), "version": TRAINING_VERSION}
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        return cache_root(cache_dir) / "digits" / f"{self.arch}-v{TRAINING_VERSION}-{key}"

    def checkpoints(
        self, cache_dir: str | Path | None = None, *, progress: bool = False
    ) -> Checkpoints:
        """Return the trained files; train, once, what is missing or damaged.

        Two processes may ask at once: one trains, the other waits for it. A file appears under
        its name only when it is complete.

        Args:
            cache_dir: Folder to keep them under; see :func:`cache_root`.
            progress: Show on the error stream which network is being trained.

        Raises:
            DataError: When the folder cannot be written.
        """
        files = trained_files(
            self.folder(cache_dir),
            ("base", *self.names),
            lambda files: self._train(files, progress=progress),
        )
        return Checkpoints(files["base"], {name: files[name] for name in self.names})

    def _train(self, files: Mapping[str, Path], *, progress: bool) -> None:
        # Looked at again under the lock: another process may have trained them meanwhile.
        missing = [name for name, path in files.items() if read_network(path) is None]
        recipe = self.recipe
        steps = {name: recipe.steps(name) for name in missing}
        with training_shown(steps, progress=progress) as start:
            if "base" in missing:
                write_network(files["base"], recipe.base(on_epoch=start("base")))
            base = read_network(files["base"])
            assert base is not None
            for name in missing:
                if name != "base":
                    write_network(files[name], recipe.expert(name, base, on_epoch=start(name)))

    def evaluators(
        self, size: int | None = None, measure: str = "accuracy"
    ) -> dict[str, Evaluator]:
        """Return for each task what is measured on its held-out test images.

        Args:
            size: How many of the 797 test images to use, the same for every task and
                evaluation; all of them when None.
            measure: ``"accuracy"``, or what has gradients: ``"probability"`` (the mean one of the
                right digit) or ``"loss"`` (mean cross-entropy).

        Raises:
            DataError: When there are not so many, or ``measure`` is something else.
        """
        if measure not in _MEASURES:
            raise DataError(
                f"measure must be one of {', '.join(_MEASURES)}, got {measure!r}",
                hint="set problem.measure to one of them",
            )
        count = whole_number(
            "size",
            TEST_EXAMPLES if size is None else size,
            least=1,
            most=TEST_EXAMPLES,
            error=DataError,
            hint=f"use from 1 to {TEST_EXAMPLES} test images, or null for all of them",
        )
        _, _, images, targets = digits_split()
        labels = torch.from_numpy(targets[:count])
        # In batches, the noise of a gradient can be told.
        batch = count if measure == "accuracy" else -(-count // _BATCHES)
        return {
            name: _MEASURES[measure](as_inputs(transform(name, images[:count])), labels, batch)
            for name in self.names
        }


class DigitsProblem(MergedModelProblem):
    """The problem of merging a digits zoo; made by :func:`digits_problem`.

    Attributes:
        zoo: The experts.
        size: Number of test images behind each metric.
        measure: What is measured on them.
    """

    def __init__(
        self,
        zoo: DigitsZoo,
        size: int,
        *,
        files: Checkpoints,
        measure: str = "accuracy",
        **settings: Any,
    ):
        self.zoo = zoo
        self.size = size
        self.measure = measure
        if measure == "loss":
            metrics = [Metric(name, direction="min", kind="loss") for name in zoo.names]
            settings.setdefault("metrics", metrics)
        super().__init__(
            network(zoo.arch, generator=make_generator(0)),
            base=files.base,
            experts=dict(files.experts),
            evaluators=zoo.evaluators(size, measure),
            **settings,
        )

    def describe(self) -> dict[str, Any]:
        """Return the merged model's description, and that of the zoo."""
        return {
            **super().describe(),
            "kind": "digits",
            "zoo": {
                **self.zoo.describe(),
                "examples": self.size,  # the word of 0.1, by which records are compared
                **({} if self.measure == "accuracy" else {"measure": self.measure}),
            },
        }


@rebuilt
def digits_problem(
    experts: int = 4,
    *,
    arch: str = "mlp",
    seed: int = 0,
    epochs: int | None = None,
    size: int | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
    fixed: Mapping[str, float | str] | None = None,
    blocks: Mapping[str, str] | None = None,
    sum_at_most: float | None = None,
    operator: MergeOperator | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
    dtype: StorageDtype = torch.float32,
    measure: str = "accuracy",
    gradients: bool = False,
    max_memory: int | str | None = None,
    cache: bool = True,
    examples: int | None = None,
) -> MergedModelProblem:
    """Return the problem of merging real experts on transformed digits.

    One metric a task: by default the accuracy on 797 held-out images (to maximise), named like the
    expert that learned the task. Missing experts are trained first, which takes seconds.

    Args:
        experts: Number of experts, from 2 to 32.
        arch: ``"mlp"`` or ``"cnn"``.
        seed: Seed of the training (not of any search).
        epochs: Training epochs of an expert; by default 20 (MLP) or 10 (CNN).
        size: How many test images each evaluation uses; all when None.
        lower: Lower bound of every coefficient.
        upper: Upper bound of every coefficient.
        fixed: Coefficients that are not searched, by expert; see `MergedModelProblem`.
        blocks: Block name -> pattern of tensor names, for one coefficient per expert and block;
            short for ``operator=TaskArithmetic(blocks)``.
        sum_at_most: Bound on the sum of the experts' coefficients (within each block).
        operator: How to merge; task arithmetic when None. One that needs statistics of the experts
            and has none gets those of their training images; see `digits_statistics`.
        cache_dir: Where trained experts, and mapped task vectors, are kept; see
            :func:`cache_root`.
        progress: Show a progress bar while training.
        dtype: Storage of the task vectors; see `MergedModelProblem`.
        measure: ``"accuracy"``, ``"probability"`` or ``"loss"``; see `DigitsZoo.evaluators`.
        gradients: Measure derivatives by the coefficients too; an accuracy has none.
        max_memory: Cap of the memory for task vectors; see `MergedModelProblem`.
        cache: Whether measurements are kept for later runs; see `MergedModelProblem`.
        examples: The name of ``size`` in version 0.1; it goes in version 0.3.

    Raises:
        DataError: When a setting is not possible, or the cache cannot be written.
        EvaluationError: When gradients are asked of accuracies.
        MergeError: When the blocks do not fit the network.
    """
    size = under_old_name("digits_problem", "examples", "size", examples, size, decorated=True)
    zoo = DigitsZoo(experts, arch, seed, epochs)
    if blocks is not None:
        if operator is not None:
            raise DataError(
                "blocks and an operator were both given",
                hint="give the operator its blocks: operator=TaskArithmetic(blocks=...)",
            )
        operator = TaskArithmetic(blocks=dict(blocks))
    files = zoo.checkpoints(cache_dir, progress=progress)
    folder = zoo.folder(cache_dir) / "statistics"

    def with_statistics(one: MergeOperator) -> MergeOperator:
        if not isinstance(one, NeedsStatistics) or one.statistics:
            return one
        kind = one.statistics_kind
        found: MergeOperator = one.with_statistics(
            digits_statistics(arch, files.experts, kind, folder, base=files.base)
        )
        return found

    if isinstance(operator, OperatorChoice):
        operator = operator.with_each(with_statistics)
    elif operator is not None:
        operator = with_statistics(operator)
    space = None
    if sum_at_most is not None:
        merging = TaskArithmetic() if operator is None else operator
        if isinstance(merging, HasBlocks) and isinstance(merging.blocks, str):
            raise DataError(
                "sum_at_most and blocks in a word were both given",
                hint="give the blocks as {block: regular expression on tensor names}, or bound "
                "the coefficients with lower and upper instead",
            )
        natural = merging.space(zoo.names, lower=lower, upper=upper)
        space = natural.with_sum(sum_at_most)
    return DigitsProblem(
        zoo,
        TEST_EXAMPLES if size is None else size,
        files=files,
        operator=operator,
        lower=lower,
        upper=upper,
        fixed=fixed,
        space=space,
        dtype=dtype,
        measure=measure,
        gradients=gradients,
        max_memory=max_memory,
        cache=cache,
        # Without a cap this folder is for trained experts alone.
        cache_dir=None if max_memory is None else cache_dir,
    )
