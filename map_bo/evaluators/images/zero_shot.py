"""Classifying images without a head: by the text that is nearest, in models such as CLIP."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from map_bo.cached import digest_of
from map_bo.errors import ConfigError, EvaluationError, did_you_mean, first_line, require
from map_bo.evaluators.data import Data
from map_bo.evaluators.evaluator import device_of, evaluating
from map_bo.evaluators.images.inputs import (
    ImageEvaluator,
    ImagesAndText,
    TransformersClip,
    image_features,
    pooled,
)
from map_bo.evaluators.images.pixels import CLIP_MEAN, CLIP_STD, Processor, Resize
from map_bo.evaluators.isolation.quiet import quiet

__all__ = ["ZeroShot"]

TEMPLATES = ("a photo of a {}.",)

Source = Literal["auto", "base", "candidate"]


@runtime_checkable
class _Sized(Protocol):
    image_size: int | tuple[int, int]


@runtime_checkable
class _Preprocessed(Protocol):
    preprocess_cfg: Mapping[str, Any]


@runtime_checkable
class _Vocabulary(Protocol):
    vocab_size: int
    context_length: int


@dataclass(frozen=True, eq=False)
class _Tower:
    """The weights of a text tower; evaluators of one base share one copy."""

    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module) -> _Tower:
        weights = _text_tower(model)
        key = f"{device_of(model)} {digest_of(weights)}"
        with _lock:
            found = _towers.get(key)
            if found is None:
                found = cls({name: tensor.clone() for name, tensor in weights.items()})
                _towers[key] = found
        return found

    def is_that_of(self, model: nn.Module) -> bool:
        """Return whether a model has exactly these weights."""
        other = _text_tower(model)
        return other.keys() == self.weights.keys() and all(
            torch.equal(tensor, self.weights[name]) for name, tensor in other.items()
        )


_towers: WeakValueDictionary[str, _Tower] = WeakValueDictionary()
_lock = threading.Lock()


class ZeroShot(ImageEvaluator):
    """The kind ``zero_shot``: images classified by the class whose texts they are nearest to.

    The prototype of a class is the mean of the normalised embeddings of its name in each template,
    normalised again (Radford et al., 2021, arXiv 2103.00020, section 3.1.4). The logits of an image
    are its cosines with the prototypes, times the model's own scale.

    Models are those of transformers with image and text features (CLIP, SigLIP and others), and
    those of open_clip.

    Args:
        data: Where the images are; roles ``image`` and ``label``. A folder of images in one folder
            per class will do.
        classes: Name of each class as it stands in the templates, in the order of their indices, or
            by the names in the data; by default those in the data, with spaces for underscores.
        templates: Texts with ``{}`` for the name.
        processor: How images are prepared; see :func:`~map_bo.evaluators.images.pixels.find_steps`.
            A model of open_clip says its size itself.
        tokenizer: The folder or the hub id of the model's tokenizer. Models of open_clip have
            open_clip's own unless one is given.
        prototypes: ``base``: computed once, with the text tower of the base; ``candidate``: with
            that of each candidate; ``auto``: with that of the base as long as the candidate's is
            the same, so that merges of vision towers alone pay for the texts once, and merges of
            whole models are measured as they will be used.
        metrics: ``accuracy``, ``loss`` (cross-entropy, nats), ``probability`` (of the right class),
            ``entropy`` (of the prediction, nats). With entropy alone labels are
            read for the names of classes that are not given, and for nothing else.
        batch_size: Images per forward pass, and texts.
        cache_dir: Folder above that of many images, which are kept on disk; by default the user's
            cache.

    Raises:
        ConfigError: When a setting is not possible.
    """

    def __init__(
        self,
        *,
        data: Data | Mapping[str, Any] | str,
        classes: Sequence[str] | Mapping[str, str] | None = None,
        templates: Sequence[str] | str = TEMPLATES,
        processor: Processor | Mapping[str, Any] | None = None,
        tokenizer: str | None = None,
        prototypes: Source = "auto",
        metrics: str | Sequence[str] = "accuracy",
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
        self.templates = (templates,) if isinstance(templates, str) else tuple(templates)
        wrong = [one for one in self.templates if not isinstance(one, str) or "{}" not in one]
        if wrong or not self.templates:
            said = f"the template {wrong[0]!r} has no {{}}" if wrong else "there are no templates"
            raise ConfigError(said, hint="such as 'a photo of a {}.'")
        if prototypes not in get_args(Source):
            raise ConfigError(
                f"prototypes must be one of {', '.join(get_args(Source))}, got {prototypes!r}",
                hint=did_you_mean(prototypes, get_args(Source)),
            )
        if isinstance(classes, str):
            raise ConfigError(
                f"classes must be names, got {classes!r}", hint="give a list of names"
            )
        self.classes = classes
        self.tokenizer = tokenizer
        self.prototypes = prototypes
        self._names: tuple[str, ...] = ()
        self._tokens: dict[str, Tensor] = {}
        self._of_base: Tensor | None = None  # prototypes, classes x width
        self._base = ""  # digest of the base's text tower
        self._text: _Tower | None = None  # that tower

    @property
    def digest(self) -> str:
        """A digest of the images and of the texts."""
        names = "\n".join([self.prototypes, *self.templates, "", *self._names, "", *self._chosen])
        return hashlib.sha256(f"{self.image_digest}\n{names}".encode()).hexdigest()

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes as they stand in the texts; after `prepare`."""
        _ = self.examples
        return self._names

    def prepare(self, model: nn.Module) -> None:
        """Read the images, and embed the texts with the text tower of the base.

        Raises:
            EvaluationError: When the model has no text tower, the tokenizer is of another
                vocabulary, or the names do not fit the data.
        """
        _require(model)
        _scale(model)
        self.read(_resize_of(model))
        base = digest_of(_text_tower(model))
        if self._of_base is not None and base == self._base:
            return
        names = self._class_names()
        texts = [one.replace("{}", name) for name in names for one in self.templates]
        self._tokens = _tokenise(model, texts, self.tokenizer)
        prototypes = self._embed(model, len(names))
        _require_different(prototypes, names)
        if self.prototypes == "auto":
            self._text = _Tower.of(model)
        self._names, self._of_base, self._base = names, prototypes, base
        try:
            self.try_out(model)
        except EvaluationError:
            self._of_base = None  # it is not ready
            raise

    def classifier(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return what gives the logits of images, with the prototypes for this model."""
        prototypes = self._prototypes_of(model).to(device_of(model))
        known, scale = _require(model), _scale(model)

        def classify(items: Tensor) -> Tensor:
            features = image_features(known, self.pixels(items, model)).float()
            return scale * nn.functional.normalize(features, dim=-1) @ prototypes.T

        return classify

    def _prototypes_of(self, model: nn.Module) -> Tensor:
        _ = self.examples
        assert self._of_base is not None
        if self.prototypes == "base" or (self._text is not None and self._text.is_that_of(model)):
            return self._of_base
        return self._embed(model, len(self._names))

    def _embed(self, model: nn.Module, n: int) -> Tensor:
        """Return the prototypes of ``n`` classes: ``n x width``, float32, on the CPU."""
        total = len(self.templates) * n
        parts = []
        with evaluating(model), torch.inference_mode():
            for start in range(0, total, self.batch_size):
                rows = slice(start, start + self.batch_size)
                batch = {k: v[rows].to(device_of(model)) for k, v in self._tokens.items()}
                found = _text_features(model, batch).float()
                parts.append(nn.functional.normalize(found, dim=-1).cpu())
        embedded = torch.cat(parts).reshape(n, len(self.templates), -1)
        return nn.functional.normalize(embedded.mean(1), dim=-1).clone()

    def _class_names(self) -> tuple[str, ...]:
        """Return the name of each class, or refuse names that do not fit the data."""
        known, given = self._names_in_data(), self.classes
        if given is None:
            if known is None:
                raise EvaluationError(
                    "the classes have no names in the data",
                    hint="give classes, their names in the order of their indices",
                )
            return tuple(name.replace("_", " ") for name in known)
        if isinstance(given, Mapping):
            if known is None:
                raise EvaluationError(
                    "classes are given by their names in the data, which has none",
                    hint="give a list, in the order of the class indices",
                )
            lacking = [name for name in known if name not in given]
            if lacking:
                raise EvaluationError(
                    f"classes do not name {lacking[0]!r}, which the data have",
                    hint=did_you_mean(lacking[0], given),
                )
            return tuple(str(given[name]) for name in known)
        names = tuple(map(str, given))
        if known is not None and len(known) != len(names):
            raise EvaluationError(
                f"classes have {len(names)} names, and the data {len(known)} classes",
                hint=f"classes of the data are {', '.join(known[:10])}",
            )
        most = max(self.examples.classes(), default=-1) if self.labelled else -1
        if most >= len(names) or len(names) < 2:
            raise EvaluationError(
                f"classes have {len(names)} names, and the data the class {max(most, 1)}",
                hint="give one name for each class, in the order of their indices",
            )
        return names

    def _names_in_data(self) -> tuple[str, ...] | None:
        """Return the names of the classes in the data, if there are any and they are needed.

        Without labels too they may be needed: of a folder they are those of its folders.
        """
        if self.labelled:
            return self.examples.label_names
        if self.classes is not None and not isinstance(self.classes, Mapping):
            return None
        try:
            return self.data.read(("image", "label")).label_names
        except EvaluationError:  # the images have no labels
            return None


def _require(model: nn.Module) -> ImagesAndText:
    """Return a model of images and text, or refuse another."""
    if isinstance(model, ImagesAndText):
        return model
    raise EvaluationError(
        f"the model is a {type(model).__name__}, which has no image and text features",
        hint="zero_shot is for models such as CLIP, of transformers or open_clip; kind images is "
        "for classifiers",
    )


def _scale(model: nn.Module) -> Tensor:
    """Return what a model multiplies its cosines with."""
    found = dict(model.named_parameters()).get("logit_scale")
    if found is None:
        raise EvaluationError(
            f"the {type(model).__name__} has no logit_scale",
            hint="zero_shot is for models such as CLIP, of transformers or open_clip",
        )
    return found.detach().float().exp()


def _text_features(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    known = _require(model)
    if isinstance(known, TransformersClip):
        return pooled(known.get_text_features(**batch))
    return known.encode_text(batch["input_ids"])


def _text_tower(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are not of the vision tower and not the scale, by name."""
    return {
        name: tensor.detach()
        for name, tensor in model.named_parameters()
        if not name.startswith(("vision_model.", "visual_projection.", "visual.", "visual_"))
        and name not in ("logit_scale", "logit_bias")
    }


def _resize_of(model: nn.Module) -> Resize | None:
    """Return how a model of open_clip says that images are prepared; None for others."""
    known = _require(model)
    if isinstance(known, TransformersClip):
        return None
    visual = dict(model.named_children()).get("visual")
    if not isinstance(visual, _Sized):
        return None
    told = visual.preprocess_cfg if isinstance(visual, _Preprocessed) else {}
    return Resize(
        size=visual.image_size,
        mean=told.get("mean", CLIP_MEAN),
        std=told.get("std", CLIP_STD),
        fit="squash" if told.get("resize_mode") == "squash" else "crop",
        halves="even",
    )


def _tokenise(model: nn.Module, texts: Sequence[str], tokenizer: str | None) -> dict[str, Tensor]:
    """Return what the text tower takes: ``n x length`` tokens, and their mask where it has one."""
    known = _require(model)
    if isinstance(known, TransformersClip):
        return _tokenise_for_transformers(known, texts, tokenizer)
    if not isinstance(known, _Vocabulary):
        raise EvaluationError(
            f"the model is a {type(model).__name__}, which does not say its vocabulary",
            hint="use a model of open_clip.create_model",
        )
    if tokenizer is None or not _has_tokenizer(tokenizer):
        require("open_clip", by="the tokenizer of open_clip", extra="open-clip")
        import open_clip

        make: Callable[..., Tensor] = open_clip.SimpleTokenizer(context_length=known.context_length)
        ids = make(list(texts))
    else:
        ids = _encode(tokenizer, texts, known.context_length, padding="max_length")["input_ids"]
    _require_vocabulary(ids, known.vocab_size)
    return {"input_ids": ids}


def _has_tokenizer(folder: str) -> bool:
    where = Path(folder).expanduser()
    return not where.is_dir() or any((where / name).is_file() for name in _TOKENIZERS)


_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model")


def _tokenise_for_transformers(
    known: TransformersClip, texts: Sequence[str], tokenizer: str | None
) -> dict[str, Tensor]:
    settings = known.config.get_text_config().to_dict()
    longest = settings.get("max_position_embeddings")
    if tokenizer is None:
        tokenizer = str(known.config.name_or_path)
    if not tokenizer:
        raise EvaluationError(
            "no tokenizer was given, and the model was not loaded from a folder",
            hint="give tokenizer, the folder or hub id of the model",
        )
    # SigLIP was trained with texts that are padded to the full length.
    full = "siglip" in str(settings.get("model_type", ""))
    found = _encode(tokenizer, texts, longest, padding="max_length" if full else "longest")
    _require_vocabulary(found["input_ids"], int(settings["vocab_size"]))
    return found


def _encode(
    tokenizer: str, texts: Sequence[str], longest: int | None, *, padding: str
) -> dict[str, Tensor]:
    require("transformers", by="a tokenizer of transformers", extra="huggingface")
    from transformers import AutoTokenizer

    try:
        with quiet("transformers"):
            made: Any = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
            found = made(
                list(texts),
                padding=padding,
                truncation=True,
                max_length=longest,
                return_tensors="pt",
            )
    # It raises whatever a missing, foreign or damaged file makes of the code that reads it.
    except Exception as error:
        raise EvaluationError(
            f"the tokenizer of {tokenizer!r} cannot be used: {first_line(error)}",
            hint="give tokenizer, the folder or hub id of the model",
        ) from error
    return {name: found[name] for name in ("input_ids", "attention_mask") if name in found}


def _require_vocabulary(ids: Tensor, rows: int) -> None:
    if int(ids.max()) >= rows:
        raise EvaluationError(
            f"the tokenizer gives the token {int(ids.max())}, and the model embeds {rows}",
            hint="it is of another vocabulary; give tokenizer, the folder or hub id of this model",
        )


def _require_different(prototypes: Tensor, names: Sequence[str]) -> None:
    """Refuse classes that cannot be told apart, as when a tokenizer knows none of the names."""
    if not bool(torch.isfinite(prototypes).all()):
        raise EvaluationError(
            "the texts of the classes are embedded as NaN or infinity",
            hint="the base's text tower is broken",
        )
    near = prototypes @ prototypes.T - 2 * torch.eye(len(prototypes))
    if float(near.max()) > 1 - 1e-6:
        i, j = divmod(int(near.argmax()), len(prototypes))
        raise EvaluationError(
            f"the classes {names[i]!r} and {names[j]!r} have the same embedding",
            hint="give them different names; or the tokenizer is not that of the model",
        )
