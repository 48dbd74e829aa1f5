"""The image zoo: encoders fine-tuned on real image sets, with frozen heads, and their merging.

Encoders and heads are trained once and kept like the digits zoo
(:mod:`map_bo.problems.zoo.digits`), in a folder whose name holds a key of the settings and of the
training images.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from map_bo.cached import digest_of
from map_bo.errors import DataError
from map_bo.evaluators.data import Data
from map_bo.evaluators.evaluator import Measurement, accuracy
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.moved import under_old_name
from map_bo.problems.cache import (
    cache_root,
    read_network,
    trained_files,
    training_shown,
    write_network,
)
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.rebuilding import rebuilt
from map_bo.problems.zoo.image_sets import IMAGE_SETS, read_image_set
from map_bo.problems.zoo.image_training import (
    IMAGE_TRAINING_VERSION,
    ImageRecipe,
    Selection,
    choose,
    encoder,
    select,
)
from map_bo.rng import make_generator
from map_bo.values import whole_number

__all__ = ["ImageZoo", "ImagesProblem", "images_problem"]

SIZE = 500


@dataclass(frozen=True)
class ImageZoo:
    """One expert encoder a set, and the heads that they share with their base.

    Attributes:
        recipe: The settings of the training.
        root: Folder of the image sets; see :func:`map_bo.problems.zoo.image_sets.image_folder`.
        own: Sets of the user's own by name: data blocks for training and for testing.
    """

    recipe: ImageRecipe
    root: str | Path | None = None
    own: Mapping[str, tuple[Data, Data]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sets, and so of the experts."""
        return self.recipe.sets

    @cached_property
    def data(self) -> tuple[Selection, ...]:
        """The images of each set; they are read once per process, the user's own once per zoo."""
        return tuple(
            choose(read_image_set(name, *self.own[name]))
            if name in self.own
            else select(name, self.root)
            for name in self.names
        )

    def describe(self) -> dict[str, Any]:
        """Return plain data that tell this zoo from others, wherever its images lie."""
        return {
            **asdict(self.recipe),
            "sets": list(self.names),
            "version": IMAGE_TRAINING_VERSION,
            "images": [part.digest for part in self.data],
        }

    def folder(self, cache_dir: str | Path | None = None) -> Path:
        """Return the folder of the trained files."""
        text = json.dumps(self.describe(), sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:12]
        return cache_root(cache_dir) / "images" / f"v{IMAGE_TRAINING_VERSION}-{key}"

    def checkpoints(
        self, cache_dir: str | Path | None = None, *, progress: bool = False
    ) -> dict[str, Path]:
        """Return the files of ``"base"``, ``"heads"`` and each expert; train what is missing.

        Args:
            cache_dir: Folder to keep them under; see :func:`map_bo.problems.cache.cache_root`.
            progress: Show on the error stream which network is being trained.

        Raises:
            DataError: When the images cannot be read, or the folder cannot be written.
        """
        return trained_files(
            self.folder(cache_dir),
            ("base", "heads", *self.names),
            lambda files: self._train(files, progress=progress),
        )

    def _train(self, files: Mapping[str, Path], *, progress: bool) -> None:
        missing = [name for name, path in files.items() if read_network(path) is None]
        if "heads" in missing:  # base and heads come out of one training
            missing = ["base", *(name for name in missing if name not in ("base", "heads"))]
        steps = {name: self.recipe.steps(name) for name in missing}
        with training_shown(steps, progress=progress) as start:
            if "base" in missing:
                base, heads = self.recipe.base(self.data, on_epoch=start("base"))
                write_network(files["base"], base)
                write_network(files["heads"], heads)
            base, heads = _read(files["base"]), _read(files["heads"])
            for part in self.data:
                if part.name in missing:
                    weights = self.recipe.expert(
                        part, base, head(heads, part.name), on_epoch=start(part.name)
                    )
                    write_network(files[part.name], weights)

    def evaluators(self, heads: Mapping[str, Tensor], size: int) -> dict[str, HeadAccuracy]:
        """Return for each set the accuracy of an encoder under the set's own head.

        Args:
            heads: Weights of the heads, as ``SET.weight`` and ``SET.bias``.
            size: How many held-out images, the same at every evaluation.

        Raises:
            DataError: When a set does not have so many.
        """
        most = min(len(part.test) for part in self.data)
        size = whole_number(
            "size",
            size,
            least=1,
            most=most,
            error=DataError,
            hint=f"use from 1 to {most} held-out images per set",
        )
        return {
            part.name: HeadAccuracy(
                head(heads, part.name), part.test[:size], part.test_labels[:size]
            )
            for part in self.data
        }


class HeadAccuracy:
    """An evaluator: the share of images that an encoder and a frozen head classify right.

    Attributes:
        head: From features to logits.
        inputs: ``k x 784`` images.
        labels: ``k`` classes.
    """

    def __init__(self, head: nn.Linear, inputs: Tensor, labels: Tensor) -> None:
        self.head, self.inputs, self.labels = head, inputs, labels
        self._accuracy = accuracy(inputs, labels, batch_size=len(labels))

    @property
    def digest(self) -> str:
        """A digest of the head, the images and their classes."""
        return f"{digest_of(self.head.state_dict())} {self._accuracy.digest}"

    @property
    def size(self) -> int:
        """The number of images."""
        return self._accuracy.size

    @property
    def strata(self) -> Tensor:
        """The class of each image."""
        return self.labels

    @property
    def means(self) -> tuple[bool, ...]:
        """The accuracy is a mean."""
        return self._accuracy.means

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return 1 for each of ``n`` images that is classified right, else 0."""
        return self._accuracy.score(nn.Sequential(model, self.head), items)

    def summary(self, outcomes: Tensor, items: Tensor | None = None) -> Measurement:
        """Return the share of the images that are right."""
        return self._accuracy.summary(outcomes)

    def __call__(self, model: nn.Module) -> Measurement:
        """Return the accuracy in [0, 1] with the number of images."""
        return self._accuracy(nn.Sequential(model, self.head))


class ImagesProblem(MergedModelProblem):
    """The problem of merging an image zoo; made by :func:`images_problem`.

    Attributes:
        zoo: The experts.
        size: Number of held-out images behind each accuracy.
        files: The trained files: ``"base"``, ``"heads"`` and each expert.
    """

    def __init__(
        self, zoo: ImageZoo, size: int, *, files: Mapping[str, Path], **settings: Any
    ) -> None:
        self.zoo = zoo
        self.size = size
        self.files = dict(files)
        self._measures = zoo.evaluators(_read(files["heads"]), size)
        super().__init__(
            encoder(generator=make_generator(0)),
            base=files["base"],
            experts={name: files[name] for name in zoo.names},
            evaluators=self._measures,
            **settings,
        )

    def evaluator(self, name: str) -> HeadAccuracy:
        """Return what measures the set ``name``."""
        return self._measures[name]

    def describe(self) -> dict[str, Any]:
        """Return the merged model's description, and that of the zoo."""
        return {
            **super().describe(),
            "kind": "images",
            # examples: the word of 0.1, by which records are compared
            "zoo": {**self.zoo.describe(), "examples": self.size},
        }


@rebuilt
def images_problem(
    root: str | Path | None = None,
    *,
    sets: Sequence[str] = IMAGE_SETS,
    seed: int = 0,
    epochs: int = 8,
    size: int = SIZE,
    lower: float = 0.0,
    upper: float = 1.0,
    fixed: Mapping[str, float | str] | None = None,
    operator: MergeOperator | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
    dtype: torch.dtype = torch.float32,
    cache: bool = True,
    data: Mapping[str, Mapping[str, Data | Mapping[str, Any] | str]] | None = None,
    examples: int | None = None,
) -> ImagesProblem:
    """Return the problem of merging encoders fine-tuned on real image sets, under frozen heads.

    One metric a set: the accuracy on ``size`` held-out images under the set's own head (to
    maximise), named like the set. Missing encoders are trained first, which takes seconds.

    Args:
        root: Folder of the sets; None takes it from the environment variable ``MAP_BO_DATA``.
        sets: Which sets of ``IMAGE_SETS``; with those of ``data``, two or more.
        seed: Seed of the training (not of any search).
        epochs: Passes of an expert over its 4000 training images.
        size: How many held-out images an evaluation uses, the same every time.
        lower: Lower bound of every coefficient.
        upper: Upper bound of every coefficient.
        fixed: Coefficients that are not searched, by expert; see `MergedModelProblem`.
        operator: How to merge; task arithmetic when None.
        cache_dir: Where trained encoders are kept; see :func:`map_bo.problems.cache.cache_root`.
        progress: Show a progress bar while training.
        dtype: Storage of the task vectors: float32 or bfloat16.
        cache: Whether measurements are kept for later runs; see `MergedModelProblem`.
        data: Further sets of the user's own, of at most ten classes: name ->
            ``{"train": ..., "test": ...}``, each a data block
            (:class:`~map_bo.evaluators.data.Data`) with the roles ``image`` and ``label``.
        examples: The name of ``size`` in version 0.1; it goes in version 0.3.

    Raises:
        DataError: When the folder or a set is not there, a setting is not possible, or the cache
            cannot be written.
    """
    size = under_old_name("images_problem", "examples", "size", examples, size, decorated=True)
    own = {name: _blocks(name, given) for name, given in (data or {}).items()}
    names = (*sets, *(name for name in own if name not in sets))
    zoo = ImageZoo(ImageRecipe(names, seed, epochs), root, own)
    return ImagesProblem(
        zoo,
        size,
        files=zoo.checkpoints(cache_dir, progress=progress),
        operator=operator,
        cache=cache,
        lower=lower,
        upper=upper,
        fixed=fixed,
        dtype=dtype,
    )


def _blocks(name: str, given: object) -> tuple[Data, Data]:
    """Return the data blocks of a set of the user's own."""
    if not isinstance(given, Mapping) or set(given) != {"train", "test"}:
        raise DataError(
            f"data of the image set {name!r} must have train and test, got {given!r:.80}",
            hint="such as {train: {path: signs/train}, test: {path: signs/test}}",
        )
    if not name.isidentifier():
        raise DataError(
            f"the name of an image set must be letters, digits and underscores, got {name!r}",
            hint="files are called like it",
        )
    return Data.of(given["train"]), Data.of(given["test"])


def head(heads: Mapping[str, Tensor], name: str) -> nn.Linear:
    """Return the frozen head of the set ``name``."""
    weight, bias = heads[f"{name}.weight"], heads[f"{name}.bias"]
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = nn.Parameter(bias, requires_grad=False)
    return layer


def _read(path: Path) -> dict[str, Tensor]:
    weights = read_network(path)
    assert weights is not None
    return weights
