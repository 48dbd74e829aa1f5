"""Classifying images with a head: the model's own, or a frozen one on features of an encoder."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from map_bo.errors import ConfigError, EvaluationError, MapBoError, listed
from map_bo.evaluators.data import Data, Examples
from map_bo.evaluators.evaluator import evaluating, logits_of
from map_bo.evaluators.images.inputs import (
    ImageEvaluator,
    ImagesAndText,
    as_model_takes,
    call_on_pixels,
    image_features,
)
from map_bo.evaluators.images.pixels import Pixels, Processor
from map_bo.evaluators.text.evaluator import HeadSettings
from map_bo.evaluators.text.heads import FitMethod, Head, fit_to_features, read_head
from map_bo.evaluators.text.labels import Classes, classes_of_model, rows_of
from map_bo.evaluators.text.pooling import Pooling, encoder_of

__all__ = ["ImageClassification"]


@runtime_checkable
class _HasPooled(Protocol):
    pooler_output: Tensor | None


@runtime_checkable
class _HasHidden(Protocol):
    last_hidden_state: Tensor


class ImageClassification(ImageEvaluator):
    """Classification of images; in a configuration ``kind: images``.

    Models are those of transformers, called with ``pixel_values``, or any module that takes a batch
    of images. The head is the model's own (that of a task's expert, or the model's), a linear layer
    from a file, or one that is fitted once on the base's features of a training split and then
    kept.

    Args:
        data: Where the images are; roles ``image`` and ``label``. A folder with one folder of
            images per class will do, and files of arrays of what the model takes.
        processor: How images are prepared: a folder of a model with its
            ``preprocessor_config.json``, a hub id, or
            :class:`~map_bo.evaluators.images.pixels.Resize`. Arrays need none.
        metrics: ``accuracy``, ``loss`` (cross-entropy, nats), ``probability`` (of the right class),
            ``entropy`` (of the prediction, nats). With entropy alone no classes are read.
        head: None for the model's own head, a safetensors file with ``weight`` (classes x width)
            and ``bias``, or ``"fit"``.
        train: The examples that a head is fitted on; only with ``head="fit"``.
        pooling: Of the hidden states below a frozen head: ``cls``, ``mean`` or ``last``; by default
            what the model pools itself, else ``cls``. Maps of convolutions are averaged over their
            places.
        fit: ``logistic`` or ``ridge`` regression, on standardised features.
        penalty: How strongly the weights of a fitted head are drawn to 0.
        batch_size: Images per forward pass.
        cache_dir: Folder above those of fitted heads and of many images, which are kept on disk; by
            default the user's cache.

    Raises:
        ConfigError: For settings that are not possible.
    """

    def __init__(
        self,
        *,
        data: Data | Mapping[str, Any] | str,
        processor: Processor | Mapping[str, Any] | None = None,
        metrics: str | Sequence[str] = "accuracy",
        head: str | Path | None = None,
        train: Data | Mapping[str, Any] | str | None = None,
        pooling: Pooling | None = None,
        fit: FitMethod = "logistic",
        penalty: float = 1.0,
        batch_size: int = 32,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            data=data,
            processor=processor,
            metrics=metrics,
            batch_size=batch_size,
            cache_dir=cache_dir,
        )
        self.head = HeadSettings.of(head, train, pooling, fit, penalty)
        if head == "fit" and fit == "ridge" and set(self._chosen) - {"accuracy"}:
            raise ConfigError(
                f"the metric {(set(self._chosen) - {'accuracy'}).pop()!r} needs probabilities, and "
                "a head that is fitted by ridge regression gives none",
                hint="give fit='logistic'",
            )
        self._frozen: Head | None = None
        self._rows: Tensor | None = None  # the output of each class of the data

    @property
    def reads_head(self) -> bool:
        """Whether the model's own head is scored, and not a frozen one."""
        return self.head.head is None

    @property
    def digest(self) -> str:
        """A digest of the images, their classes and the head."""
        frozen = None if self._frozen is None else [self._frozen.digest, self.head.pooling]
        rows = None if self._rows is None else self._rows.tolist()
        content = [self.image_digest, frozen, rows, self._chosen]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def prepare(self, model: nn.Module) -> None:
        """Read the images, fit the head, and refuse what does not fit.

        Raises:
            EvaluationError: When images, head and model do not fit each other.
            MissingDependencyError: Without a package that is needed.
        """
        self.read()
        if self.head.head is not None:
            width = self._width(model)
            head = self._fitted(model) if self.head.train is not None else read_head(self.head.head)
            if head.weight.shape[1] != width:
                raise EvaluationError(
                    f"the head {self.head.head} is for {head.weight.shape[1]} features, and "
                    f"{type(model).__name__} has {width}",
                    hint="give a head of this model",
                )
            self._frozen = head
        outputs = self.try_out(model)
        if self.labelled:
            self._rows = self._rows_for(model, outputs)

    def check_data(self) -> None:
        """Read which images there are, and those that a head is fitted on."""
        super().check_data()
        if self.head.train is not None:
            self.head.train.read(("image", "label"))

    def classifier(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return what gives the logits of images."""
        head = self._frozen
        if head is None:
            return lambda items: logits_of(call_on_pixels(model, self.pixels(items, model)))
        return lambda items: head(_features(model, self.pixels(items, model), self.head.pooling))

    def labels(self, items: Tensor) -> Tensor:
        """Return the output of the head that is right for each image: ``b``."""
        classes = super().labels(items)
        assert self._rows is not None
        return self._rows[classes]

    def _rows_for(self, model: nn.Module, outputs: int) -> Tensor:
        if outputs < 2:
            raise EvaluationError(
                f"the head of {type(model).__name__} has {outputs} output, which tells no classes "
                "apart",
                hint="give a classifier, or head for an encoder",
            )
        frozen = self._frozen
        classes = (
            _classes_of(model, outputs)
            if frozen is None
            else Classes(outputs, frozen.labels, f"the head {self.head.head}")
        )
        rows = rows_of(self.examples, classes, explicit=self.data.labels is not None)
        return torch.tensor(rows)

    def _width(self, model: nn.Module) -> int:
        item = torch.zeros(1, dtype=torch.long)
        pixels = self.pixels(item, model)
        try:
            with evaluating(model), torch.inference_mode():
                return _features(model, pixels, self.head.pooling).shape[-1]
        except MapBoError:
            raise
        except Exception as error:  # whatever a model makes of images of another shape
            raise self.not_called(pixels, error) from error

    def _fitted(self, model: nn.Module) -> Head:
        assert self.head.train is not None
        examples = self.head.train.read(("image", "label"))
        targets, names = classes_to_fit(examples)
        pixels = self.prepared(self.head.train, examples)
        head = fit_to_features(
            lambda: self._all_features(model, pixels),
            model=model,
            inputs=pixels.digest,
            targets=targets,
            classes=1 + max(targets),
            method=self.head.fit,
            penalty=self.head.penalty,
            settings=["images", self.head.pooling, self.batch_size],
            cache_dir=self.cache_dir,
        )
        return replace(head, labels=names)

    def _all_features(self, model: nn.Module, pixels: Pixels) -> Tensor:
        with evaluating(model), torch.inference_mode():
            parts = [
                _features(model, as_model_takes(batch, model), self.head.pooling).cpu()
                for batch in torch.split(pixels.values, self.batch_size)
            ]
        return torch.cat(parts).clone()


def _classes_of(model: nn.Module, outputs: int) -> Classes:
    if "transformers" in sys.modules:  # else the model is not one of it
        return classes_of_model(model, outputs)
    return Classes(outputs, None, f"the head of {type(model).__name__}")


def classes_to_fit(examples: Examples) -> tuple[list[int], tuple[str, ...] | None]:
    """Return the class of each training example and the names of the classes.

    Raises:
        EvaluationError: When there is one class alone, or a class without an example.
    """
    found, names = examples.classes(), examples.label_names
    absent = sorted(set(range(len(names or ()) or max(found) + 1)) - set(found))
    if absent or len(set(found)) < 2:
        told = listed(repr(names[i]) if names else str(i) for i in absent)
        raise EvaluationError(
            f"{examples.where} has no example of the classes {told}, and no head can be fitted for "
            "them"
            if absent
            else f"{examples.where} has one class alone, and no head can be fitted",
            hint="give train with examples of every class",
        )
    return found, names


def _features(model: nn.Module, pixels: Tensor, pooling: Pooling | None) -> Tensor:
    """Return the features of images: ``b x width``, float32."""
    if isinstance(model, ImagesAndText):
        return image_features(model, pixels).float()
    # Only where transformers is in use can the model be one of it.
    encoder = encoder_of(model) if "transformers" in sys.modules else model
    output = call_on_pixels(encoder, pixels)
    if pooling is None and isinstance(output, _HasPooled) and output.pooler_output is not None:
        return output.pooler_output.float().flatten(1)
    hidden = output.last_hidden_state if isinstance(output, _HasHidden) else output
    if not isinstance(hidden, Tensor):
        raise EvaluationError(
            f"{type(encoder).__name__} returned a {type(output).__name__}, which holds no features",
            hint="give an encoder of images",
        )
    hidden = hidden.float()
    if hidden.dim() == 4:  # maps of convolutions
        return hidden.mean((-2, -1))
    if hidden.dim() == 3:
        if pooling == "mean":
            return hidden.mean(1)
        return hidden[:, -1 if pooling == "last" else 0]
    return hidden
