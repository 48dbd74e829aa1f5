"""What evaluators of images share: images with their classes, and how a model is called on them."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import ConfigError, EvaluationError, MapBoError, did_you_mean, first_line
from map_bo.evaluators.data import Data, Examples
from map_bo.evaluators.evaluator import device_of, evaluating
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.images.pixels import Pixels, Processor, Resize, find_steps, read_pixels

__all__ = ["SCORES", "ImageEvaluator", "call_on_pixels", "outcomes_of_logits"]

SCORES: Mapping[str, Metric] = {
    "accuracy": Metric("accuracy"),
    "probability": Metric("probability"),
    "cross_entropy": Metric("cross_entropy", "min", "loss"),
}
"""What can be measured of logits and classes: whether the largest is right, the probability of the
right class, and minus its logarithm in nats."""


def outcomes_of_logits(score: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Return an outcome for each example.

    Args:
        score: One of `SCORES`.
        logits: ``b x classes``.
        labels: ``b`` class indices.
    """
    logits, labels = logits.float(), labels.to(logits.device)
    if score == "accuracy":
        # The largest of values that are no numbers would be the first of them.
        known = torch.isfinite(logits).all(-1)
        right = (logits.argmax(-1) == labels).double()
        return torch.where(known, right, torch.nan)
    if score == "probability":
        return logits.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return nn.functional.cross_entropy(logits, labels, reduction="none")


def call_on_pixels(model: nn.Module, pixels: Tensor) -> Any:
    """Call a model on images: those of transformers by keyword, any other with the tensor."""
    if "pixel_values" in inspect.signature(model.forward).parameters:
        return model(pixel_values=pixels)
    return model(pixels)


class ImageEvaluator(ExampleEvaluator):
    """An evaluator with images, and, unless only their inputs are used, their classes.

    Args:
        data: Where the images are; roles ``image`` and ``label``.
        processor: How images are prepared; see :func:`~map_bo.evaluators.images.pixels.find_steps`.
        score: One of `SCORES`.
        labelled: Whether classes are read too.
        batch_size: Images per forward pass.
        cache: Folder for many images; see :func:`~map_bo.evaluators.images.pixels.read_pixels`.

    Raises:
        ConfigError: When a setting is not possible.
    """

    def __init__(
        self,
        *,
        data: Data | Mapping[str, Any] | str,
        processor: Processor | Mapping[str, Any] | None,
        score: str,
        labelled: bool,
        batch_size: int,
        cache: str | None,
    ) -> None:
        super().__init__(batch_size=batch_size)
        self.data = Data.of(data)
        self.processor = Resize.of(processor) if isinstance(processor, Mapping) else processor
        if score not in SCORES:
            raise ConfigError(f"there is no score {score!r}", hint=did_you_mean(score, SCORES))
        self.score_name = score
        self.labelled = labelled
        self.cache = cache
        self._examples: Examples | None = None
        self._pixels: Pixels | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The score."""
        return (SCORES[self.score_name],)

    @property
    def size(self) -> int:
        """The number of images."""
        return self.examples.size

    @property
    def examples(self) -> Examples:
        """What was read.

        Raises:
            EvaluationError: Before `prepare`.
        """
        if self._examples is None:
            raise EvaluationError(
                "the images have not been read", hint="call prepare(model) on the base first"
            )
        return self._examples

    @property
    def image_digest(self) -> str:
        """A digest of the images as they were prepared, with their classes."""
        _ = self.examples
        assert self._pixels is not None
        return self._pixels.digest

    def read(self, default: Processor | None = None) -> None:
        """Read and prepare the images, once.

        Args:
            default: How they are prepared where no processor was given.

        Raises:
            EvaluationError: When they cannot be read.
        """
        if self._examples is not None:
            return
        roles = ("image", "label") if self.labelled else ("image",)
        examples = self.data.read(roles)
        steps = find_steps(self.processor)
        if steps is None and default is not None:
            steps = find_steps(default)
        folder = Path(self.data.path).expanduser()
        folder = folder if folder.is_dir() else folder.parent
        self._pixels = read_pixels(examples, steps, folder=folder, cache=self.cache)
        self._examples = examples

    def pixels(self, items: Tensor, model: nn.Module) -> Tensor:
        """Return images as a model takes them, on its device: ``b x ...``."""
        _ = self.examples
        assert self._pixels is not None
        return self._pixels.values[items].to(device_of(model))

    def labels(self, items: Tensor) -> Tensor:
        """Return the class of each image: ``b``."""
        return torch.tensor(self.examples.classes())[items]

    @abstractmethod
    def classifier(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return what gives the logits of images (``b`` indices -> ``b x classes``).

        What is to be done once for each candidate is done here.
        """

    def try_out(self, model: nn.Module) -> int:
        """Classify one image; return the number of classes.

        Raises:
            EvaluationError: When the model cannot be called on such images.
        """
        item = torch.zeros(1, dtype=torch.long)
        try:
            with evaluating(model), torch.inference_mode():
                logits = self.classifier(model)(item)
        except MapBoError:
            raise
        except Exception as error:  # whatever a model makes of images of another shape
            shape = " x ".join(map(str, self.pixels(item, model).shape[1:]))
            raise EvaluationError(
                f"the model cannot be called on images of {shape}: {first_line(error)}",
                hint="processor is that of another model; give the folder of this one",
            ) from error
        if logits.dim() != 2:
            raise EvaluationError(
                f"the logits of one image have shape {tuple(logits.shape)}",
                hint="evaluate a classifier, or give head for an encoder",
            )
        return logits.shape[-1]

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the score of each image: ``n``, float64."""
        with evaluating(model), torch.inference_mode():
            classify = self.classifier(model)

        def outcomes(batch: Tensor) -> Tensor:
            found = outcomes_of_logits(self.score_name, classify(batch), self.labels(batch))
            return self._checked(found, len(batch))

        return torch.cat(self.each_batch(model, items, outcomes)).clone()

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the score of each image of a batch."""
        logits = self.classifier(model)(items)
        return outcomes_of_logits(self.score_name, logits, self.labels(items))
