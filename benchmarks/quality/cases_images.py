"""Cases that merge encoders of real image sets from a local data folder."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.quality.cases_core import Case, anchored, identity
from benchmarks.quality.cases_models import FEW, FewExamples
from benchmarks.quality.truth import Examples, MergedNetworks
from map_bo.errors import DataError
from map_bo.problems.problem import Problem
from map_bo.problems.zoo.image_sets import IMAGE_SETS, image_folder
from map_bo.problems.zoo.image_training import encoder
from map_bo.problems.zoo.images import ImagesProblem, images_problem
from map_bo.rng import make_generator

__all__ = ["IMAGES", "image_networks", "missing_images"]


def missing_images(root: str | Path | None = None) -> str | None:
    """Return why the image sets cannot be used, or None when they are there."""
    try:
        folder = image_folder(root)
    except DataError as error:
        return error.message
    absent = [name for name in IMAGE_SETS if not (folder / name).is_dir()]
    return f"{folder} has no {', '.join(absent)}" if absent else None


def image_networks(problem: ImagesProblem) -> MergedNetworks:
    """Return the encoders of a problem with the same held-out images and heads."""
    metrics = []
    for name in problem.zoo.names:
        measured = problem.evaluator(name)
        metrics.append(Examples(measured.inputs, measured.labels, measured.head))
    return MergedNetworks(
        encoder(generator=make_generator(0)),
        problem.files["base"],
        {name: problem.files[name] for name in problem.zoo.names},
        metrics,
    )


def _images(
    name: str, *, few: int | None = None, root: str | Path | None = None, epochs: int = 8
) -> Case:
    full = images_problem(root, epochs=epochs)
    networks = image_networks(full)

    def build(lower: float = 0.0, upper: float = 1.0) -> Problem:
        inner = images_problem(root, epochs=epochs, lower=lower, upper=upper)
        return inner if few is None else FewExamples(inner, networks, few)

    problem = build()
    scale = anchored(problem, networks.accuracy)
    about = identity(problem.describe())  # type: ignore[attr-defined]
    wide = partial(build, -3.0, 3.0)
    return Case(name, "images", problem, networks.accuracy, scale, True, about, wide)


IMAGES: dict[str, Callable[..., Case]] = {
    "images-4": _images,
    "images-4-noisy": partial(_images, few=FEW),
}
"""Name -> what makes the case, given its name; options ``root`` and ``epochs``."""
