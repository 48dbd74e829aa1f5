"""The digits zoo: small real experts, trained once, and the problem of merging them.

Every expert is the same base network fine-tuned on scikit-learn's digits as one transform shows
them. Trained weights are kept as safetensors in the user's cache directory, one file a network,
in a folder whose name holds a key of everything that the weights depend on; an expert is
trained once, whatever the size of the zoo that first asked for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from map_bo.errors import DataError
from map_bo.merging.operator import MergeOperator
from map_bo.merging.task_arithmetic import TaskArithmetic
from map_bo.problems.evaluators import Evaluator, accuracy
from map_bo.problems.merged import MergedModelProblem
from map_bo.problems.zoo_data import (
    TEST_EXAMPLES,
    TRANSFORM_NAMES,
    digits_split,
    transform,
    transform_names,
)
from map_bo.problems.zoo_training import TRAINING_VERSION, Recipe, as_inputs, network
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace

__all__ = ["TRANSFORM_NAMES", "DigitsProblem", "DigitsZoo", "cache_root", "digits_problem"]

CACHE_VARIABLE = "MAP_BO_CACHE"

Report = Callable[[], None]


def cache_root(given: str | Path | None = None) -> Path:
    """Return the folder that trained networks are kept under.

    Args:
        given: The folder itself; otherwise the environment variable ``MAP_BO_CACHE``, and
            otherwise the user's cache directory of this system.
    """
    chosen = given or os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("map_bo"))


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
        experts: Number of experts ``N``, from 2 to 16: the first tasks of ``TRANSFORM_NAMES``.
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
        folder = self.folder(cache_dir)
        files = {name: folder / f"{name}.safetensors" for name in ("base", *self.names)}
        if any(_read(path) is None for path in files.values()):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with FileLock(folder / ".lock"):
                    self._train(files, progress=progress)
            except OSError as error:
                raise DataError(
                    f"trained experts cannot be kept in {folder}: {error.strerror or error}",
                    hint=f"set {CACHE_VARIABLE} to a folder that can be written",
                ) from error
        return Checkpoints(files["base"], {name: files[name] for name in self.names})

    def _train(self, files: Mapping[str, Path], *, progress: bool) -> None:
        # Looked at again under the lock: another process may have trained them meanwhile.
        missing = [name for name, path in files.items() if _read(path) is None]
        recipe = self.recipe
        with _shown(recipe, missing, progress=progress) as start:
            if "base" in missing:
                _write(files["base"], recipe.base(on_epoch=start("base")))
            base = _read(files["base"])
            assert base is not None
            for name in missing:
                if name != "base":
                    _write(files[name], recipe.expert(name, base, on_epoch=start(name)))

    def evaluators(self, examples: int | None = None) -> dict[str, Evaluator]:
        """Return for each task the accuracy on its held-out test images.

        Args:
            examples: How many of the 797 test images to use, the same for every task and
                evaluation; all of them when None.

        Raises:
            DataError: When there are not so many.
        """
        count = TEST_EXAMPLES if examples is None else examples
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= TEST_EXAMPLES:
            raise DataError(
                f"examples is {examples!r}",
                hint=f"use from 1 to {TEST_EXAMPLES} test images, or null for all of them",
            )
        _, _, images, targets = digits_split()
        labels = torch.from_numpy(targets[:count])
        return {
            name: accuracy(as_inputs(transform(name, images[:count])), labels, batch_size=count)
            for name in self.names
        }


class DigitsProblem(MergedModelProblem):
    """The problem of merging a digits zoo; made by :func:`digits_problem`.

    Attributes:
        zoo: The experts.
        examples: Number of test images behind each accuracy.
    """

    def __init__(self, zoo: DigitsZoo, examples: int, *, files: Checkpoints, **settings: Any):
        self.zoo = zoo
        self.examples = examples
        super().__init__(
            network(zoo.arch, generator=make_generator(0)),
            base=files.base,
            experts=dict(files.experts),
            evaluators=zoo.evaluators(examples),
            **settings,
        )

    def describe(self) -> dict[str, Any]:
        """Return the merged model's description, and that of the zoo."""
        return {
            **super().describe(),
            "kind": "digits",
            "zoo": {**self.zoo.describe(), "examples": self.examples},
        }


def digits_problem(
    experts: int = 4,
    *,
    arch: str = "mlp",
    seed: int = 0,
    epochs: int | None = None,
    examples: int | None = None,
    lower: float = 0.0,
    upper: float = 1.0,
    blocks: Mapping[str, str] | None = None,
    sum_at_most: float | None = None,
    operator: MergeOperator | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
    dtype: torch.dtype = torch.float32,
) -> MergedModelProblem:
    """Return the problem of merging real experts on transformed digits.

    One metric a task: the accuracy on 797 held-out images (to maximise), named like the expert
    that learned the task. Missing experts are trained first, which takes seconds.

    Args:
        experts: Number of experts, from 2 to 16.
        arch: ``"mlp"`` or ``"cnn"``.
        seed: Seed of the training (not of any search).
        epochs: Training epochs of an expert; by default 20 (MLP) or 10 (CNN).
        examples: How many test images each evaluation uses; all when None.
        lower: Lower bound of every coefficient.
        upper: Upper bound of every coefficient.
        blocks: Block name -> pattern of tensor names, for one coefficient an expert and block;
            short for ``operator=TaskArithmetic(blocks)``.
        sum_at_most: Bound on the sum of the experts' coefficients (within each block).
        operator: How to merge; task arithmetic when None.
        cache_dir: Where trained experts are kept; see :func:`cache_root`.
        progress: Show a progress bar while training.
        dtype: Storage of the task vectors: float32 or bfloat16.

    Raises:
        DataError: When a setting is not possible, or the cache cannot be written.
        MergeError: When the blocks do not fit the network.
    """
    zoo = DigitsZoo(experts, arch, seed, epochs)
    if blocks is not None:
        if operator is not None:
            raise DataError(
                "blocks and an operator were both given",
                hint="give the operator its blocks: operator=TaskArithmetic(blocks=...)",
            )
        operator = TaskArithmetic(blocks=dict(blocks))
    space = None
    if sum_at_most is not None:
        natural = (operator or TaskArithmetic()).space(zoo.names, lower=lower, upper=upper)
        parts = tuple(str(part) for part in range(natural.d // len(zoo.names)))
        bounded = CoefficientSpace.box(
            zoo.names, blocks=parts, lower=lower, upper=upper, sum_at_most=sum_at_most
        )
        space = replace(natural, constraints=bounded.constraints)
    return DigitsProblem(
        zoo,
        TEST_EXAMPLES if examples is None else examples,
        files=zoo.checkpoints(cache_dir, progress=progress),
        operator=operator,
        lower=lower,
        upper=upper,
        space=space,
        dtype=dtype,
    )


@contextmanager
def _shown(
    recipe: Recipe, names: list[str], *, progress: bool
) -> Iterator[Callable[[str], Report]]:
    """Yield what to call when the training of a network starts; it returns what to call then.

    With ``progress``, that moves a bar on the error stream after every epoch.
    """
    if not progress or not names:
        yield lambda name: lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("training", total=sum(recipe.steps(name) for name in names))

        def start(name: str) -> Report:
            what = "the base" if name == "base" else f"expert {name}"
            bar.update(task, description=f"training {what}", refresh=True)
            return lambda: bar.advance(task)

        yield start
        bar.update(task, description=f"trained {len(names)} networks, kept for later runs")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        total.update(value.numpy().tobytes())
    return total.hexdigest()


def _read(path: Path) -> dict[str, Tensor] | None:
    """Return the tensors of a file, or None when it is missing, truncated or altered."""
    try:
        with safe_open(str(path), framework="pt") as file:
            digest = (file.metadata() or {}).get("digest")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    return tensors if digest == _digest(tensors) else None


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a file in one step: it is there complete, or not at all."""
    content = save(dict(tensors), metadata={"digest": _digest(tensors)})
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with scratch.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
