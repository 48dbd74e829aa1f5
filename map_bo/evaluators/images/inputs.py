"""What evaluators of images share: images with their classes, and how a model is called on them."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import EvaluationError, MapBoError, first_line
from map_bo.evaluators.data import Data, Examples
from map_bo.evaluators.evaluator import device_of, evaluating
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.images.pixels import (
    Pixels,
    Processor,
    Resize,
    Steps,
    find_steps,
    folder_of,
    read_pixels,
)
from map_bo.evaluators.logits import LOGIT_METRICS, need_labels, outcomes_of_logits
from map_bo.evaluators.text.evaluator import chosen_metrics

__all__ = [
    "ImageEvaluator",
    "ImagesAndText",
    "OpenClip",
    "TransformersClip",
    "as_model_takes",
    "call_on_pixels",
    "image_features",
    "pooled",
]


@runtime_checkable
class TransformersClip(Protocol):
    """A model of images and text as transformers has it."""

    config: Any

    def get_image_features(self, pixel_values: Tensor) -> Any:
        """Embed images."""
        ...

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None) -> Any:
        """Embed texts."""
        ...


@runtime_checkable
class OpenClip(Protocol):
    """A model of images and text as open_clip has it."""

    def encode_image(self, image: Tensor) -> Tensor:
        """Embed images."""
        ...

    def encode_text(self, text: Tensor) -> Tensor:
        """Embed texts."""
        ...


@runtime_checkable
class _HasPooled(Protocol):
    pooler_output: Tensor


ImagesAndText = TransformersClip | OpenClip
"""A model that embeds images and texts."""


def pooled(output: object) -> Tensor:
    """Return the features of images or texts that a model of transformers returned."""
    if isinstance(output, Tensor):
        return output
    assert isinstance(output, _HasPooled)
    return output.pooler_output


def image_features(model: ImagesAndText, pixels: Tensor) -> Tensor:
    """Return the embeddings of images: ``b x width``, not normalised."""
    if isinstance(model, TransformersClip):
        return pooled(model.get_image_features(pixel_values=pixels))
    return model.encode_image(pixels)


def as_model_takes(pixels: Tensor, model: nn.Module) -> Tensor:
    """Return images on a model's device and of its floating dtype; float32 where it has none."""
    known = (tensor.dtype for tensor in model.parameters() if tensor.is_floating_point())
    return pixels.to(device=device_of(model), dtype=next(known, torch.float32))


def call_on_pixels(model: nn.Module, pixels: Tensor) -> Any:
    """Call a model on images: those of transformers by keyword, any other with the tensor."""
    if "pixel_values" in inspect.signature(model.forward).parameters:
        return model(pixel_values=pixels)
    return model(pixels)


class ImageEvaluator(ExampleEvaluator):
    """An evaluator of images, with their classes where a metric needs them.

    Args:
        data: Where the images are; roles ``image`` and ``label``.
        processor: How images are prepared; see :func:`~map_bo.evaluators.images.pixels.find_steps`.
        metrics: One or more of `LOGIT_METRICS`; classes are read where one needs them.
        batch_size: Images per forward pass.
        cache_dir: Folder above that of many images; see
            :func:`~map_bo.evaluators.images.pixels.read_pixels`.

    Raises:
        ConfigError: When a setting is not possible.
    """

    def __init__(
        self,
        *,
        data: Data | Mapping[str, Any] | str,
        processor: Processor | Mapping[str, Any] | None,
        metrics: str | Sequence[str],
        batch_size: int,
        cache_dir: str | Path | None,
    ) -> None:
        super().__init__(batch_size=batch_size)
        self.data = Data.of(data)
        self.processor = Resize.of(processor) if isinstance(processor, Mapping) else processor
        self._chosen = chosen_metrics(metrics, tuple(LOGIT_METRICS))
        self.labelled = need_labels(self._chosen)
        self.cache_dir = cache_dir
        self._examples: Examples | None = None
        self._pixels: Pixels | None = None
        self._steps: Steps | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that were asked for."""
        return tuple(LOGIT_METRICS[name] for name in self._chosen)

    @property
    def size(self) -> int:
        """The number of images."""
        return self.examples.size

    @property
    def strata(self) -> Tensor | None:
        """The class of each image; None where only the entropy is measured."""
        return torch.tensor(self.examples.classes()) if self.labelled else None

    @property
    def examples(self) -> Examples:
        """What was read.

        Raises:
            EvaluationError: Before `prepare`.
        """
        return self.require_ready(self._examples, "the images have not been read")

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
        examples = self._read()
        steps = find_steps(self.processor)
        if steps is None and default is not None:
            steps = find_steps(default)
        self._steps = steps
        self._pixels = self.prepared(self.data, examples)
        self._examples = examples

    def check_data(self) -> None:
        """Read which images there are; see `ExampleEvaluator`."""
        self._read()

    def _read(self) -> Examples:
        return self.data.read(("image", "label") if self.labelled else ("image",))

    def prepared(self, data: Data, examples: Examples) -> Pixels:
        """Return the images of examples as a model takes them; after `read` has found how."""
        return read_pixels(examples, self._steps, folder=folder_of(data), cache_dir=self.cache_dir)

    def pixels(self, items: Tensor, model: nn.Module) -> Tensor:
        """Return images as a model takes them, on its device and of its dtype: ``b x ...``."""
        _ = self.examples
        assert self._pixels is not None
        return as_model_takes(self._pixels.values[items], model)

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
            raise self.not_called(self.pixels(item, model), error) from error
        if logits.dim() != 2:
            raise EvaluationError(
                f"the logits of one image have shape {tuple(logits.shape)}",
                hint="evaluate a classifier, or give head for an encoder",
            )
        return logits.shape[-1]

    def not_called(self, pixels: Tensor, error: Exception) -> EvaluationError:
        """Return what to raise where a model cannot be called on images."""
        shape = " x ".join(map(str, pixels.shape[1:]))
        return EvaluationError(
            f"the model cannot be called on images of {shape}: {first_line(error)}",
            hint="processor is that of another model; give the folder of this one",
        )

    def score(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcomes of images: ``n``, or ``n x m`` with several metrics, float64."""
        with evaluating(model), torch.inference_mode():
            classify = self.classifier(model)

        def outcomes(batch: Tensor) -> Tensor:
            return self._checked(self._outcomes(classify(batch), batch), len(batch))

        return torch.cat(self.each_batch(model, items, outcomes)).clone()

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the outcomes of a batch: ``b``, or ``b x m``."""
        return self._outcomes(self.classifier(model)(items), items)

    def _outcomes(self, logits: Tensor, items: Tensor) -> Tensor:
        labels = self.labels(items) if self.labelled else None
        return outcomes_of_logits(self._chosen, logits, labels)
