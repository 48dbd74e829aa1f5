"""Images as a model takes them: read, resized, cropped and normalised, once.

How that is done is what the model was trained with: the ``preprocessor_config.json`` of its folder
(by the image processor of transformers) or its ``open_clip_config.json``; or `Resize`, by numbers.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from map_bo.cached import CACHE_VARIABLE, cache_root
from map_bo.errors import ConfigError, EvaluationError, did_you_mean, first_line, require
from map_bo.evaluators.data import Data, Examples
from map_bo.evaluators.isolation.quiet import quiet
from map_bo.evaluators.sources.table import EncodedImage
from map_bo.foreign import read_json
from map_bo.values import real_number, switch, whole_number

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "Pixels",
    "Processor",
    "Resize",
    "Steps",
    "find_steps",
    "folder_of",
    "read_pixels",
]

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
"""Mean of the images that CLIP was trained on (Radford et al., 2021), red, green and blue."""
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""Their standard deviation."""

IN_MEMORY = 2**26
"""Largest number of values that are kept in memory; more are mapped from a file of the cache."""

_CHUNK = 64
_FILES = ("preprocessor_config.json", "open_clip_config.json")
_known: WeakValueDictionary[str, Pixels] = WeakValueDictionary()
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Resize:
    """Steps from an image to the numbers that a model takes.

    Attributes:
        size: Height and width in pixels; one number is a square.
        fit: ``crop`` scales the shorter edge to the size and cuts out the centre; ``squash`` scales
            both edges, whatever that does to the proportions; ``none`` leaves images as they are,
            which must then be of one size.
        mean: Mean by channel, of values in [0, 1], that is subtracted.
        std: Standard deviation by channel that is divided by.
        grey: Whether images have one channel in place of red, green and blue.
        flat: Whether an image is a row of numbers, as for a multi-layer perceptron.
        resample: How pixels in between are found.
        halves: Where the centre begins when the margin is odd: rounded ``down``, as transformers
            does, or to an ``even`` number, as torchvision and so open_clip do.

    Raises:
        ConfigError: When a setting is not possible.
    """

    size: int | Sequence[int] = 224
    fit: Literal["crop", "squash", "none"] = "crop"
    mean: float | Sequence[float] = 0.0
    std: float | Sequence[float] = 1.0
    grey: bool = False
    flat: bool = False
    resample: Literal["bilinear", "bicubic"] = "bicubic"
    halves: Literal["down", "even"] = "down"

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "grey", switch("grey", self.grey))
        put(self, "flat", switch("flat", self.flat))
        sizes = [self.size, self.size] if isinstance(self.size, int) else list(self.size)
        if len(sizes) != 2:
            raise ConfigError(
                f"size must be one number or height and width, got {self.size!r}",
                hint="such as size=224",
            )
        put(self, "size", tuple(whole_number("size", one, least=1) for one in sizes))
        for name, words in (
            ("fit", ("crop", "squash", "none")),
            ("resample", tuple(_RESAMPLE)),
            ("halves", ("down", "even")),
        ):
            value = vars(self)[name]
            if value not in words:
                raise ConfigError(
                    f"{name} must be one of {', '.join(words)}, got {value!r}",
                    hint=did_you_mean(value, words),
                )
        channels = 1 if self.grey else 3
        for name in ("mean", "std"):
            given = vars(self)[name]
            values = [given] * channels if isinstance(given, int | float) else list(given)
            if len(values) != channels:
                raise ConfigError(
                    f"{name} has {len(values)} numbers, and an image {channels} channels",
                    hint="give one number, or one for each channel",
                )
            least = 0.0 if name == "std" else -float("inf")
            put(self, name, tuple(real_number(name, one, above=least) for one in values))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Resize:
        """Return the steps with these fields.

        Raises:
            ConfigError: When there is no such field, or a value is not possible.
        """
        known = [one.name for one in fields(cls)]
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"processor has no setting {name!r}", hint=did_you_mean(name, known)
                )
        return cls(**given)

    def __call__(self, images: Sequence[Image]) -> Tensor:
        """Return ``n x c x h x w``, or ``n x (c h w)``, float32."""
        values = np.stack([self._pixels(image) for image in images])
        found = torch.from_numpy(values).permute(0, 3, 1, 2).contiguous()
        return found.flatten(1) if self.flat else found

    @property
    def identity(self) -> str:
        """What tells these steps from others."""
        return json.dumps(asdict(self), sort_keys=True)

    def _pixels(self, image: Image) -> NDArray[np.float32]:
        """Return ``h x w x c``."""
        image = image.convert("L") if self.grey else image
        assert not isinstance(self.size, int)
        height, width = self.size
        wide, high = image.size
        resample = _RESAMPLE[self.resample]
        if self.fit == "squash":
            image = image.resize((width, height), resample=resample)
        elif self.fit == "crop":
            # The edge that would be too short decides; rounded down, as transformers does.
            if wide * height <= high * width:
                wide, high = width, max(height, int(width * high / wide))
            else:
                wide, high = max(width, int(height * wide / high)), height
            image = image.resize((wide, high), resample=resample)
            margins = (wide - width, high - height)
            left, top = (m // 2 if self.halves == "down" else round(m / 2) for m in margins)
            image = image.crop((left, top, left + width, top + height))
        values = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1)
        values = values / np.float32(255)
        mean, std = (np.asarray(one, dtype=np.float32) for one in (self.mean, self.std))
        found: NDArray[np.float32] = (values - mean) / std
        return found


_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # as Pillow numbers them

Processor = str | Resize
"""How images are prepared: a folder or a name of the hub that says it, or by numbers."""


@dataclass(frozen=True)
class Steps:
    """What makes numbers of images, and what tells it from other such steps."""

    make: Callable[[Sequence[Image]], Tensor]
    identity: str


def find_steps(processor: Processor | None) -> Steps | None:
    """Return the steps that a processor stands for; None where there is none.

    Args:
        processor: `Resize`; a folder with ``preprocessor_config.json`` or
            ``open_clip_config.json``; a model of the Hugging Face hub.

    Raises:
        EvaluationError: When a folder does not say how images are prepared.
        MissingDependencyError: When Pillow or transformers is needed and not installed.
    """
    if processor is None:
        return None
    require("PIL", by="preparing images", extra="images")
    if isinstance(processor, Resize):
        return Steps(processor, processor.identity)
    folder = Path(processor).expanduser()
    if folder.is_file():
        folder = folder.parent
    if folder.is_dir():
        if (folder / "open_clip_config.json").is_file() and not (folder / _FILES[0]).is_file():
            resize = _of_open_clip(folder / "open_clip_config.json")
            return Steps(resize, resize.identity)
        if not (folder / _FILES[0]).is_file():
            return None
    elif folder.is_absolute() or str(processor).startswith("."):
        raise EvaluationError(
            f"there is no folder {folder} that says how images are prepared",
            hint="processor is the folder of the model, with its preprocessor_config.json",
        )
    return _of_transformers(str(folder) if folder.is_dir() else str(processor))


def _of_open_clip(path: Path) -> Resize:
    try:
        known = read_json(path)
        about, model = known["preprocess_cfg"], known["model_cfg"]
        squash = about.get("resize_mode", "shortest") == "squash"
        return Resize(
            size=model["vision_cfg"]["image_size"],
            fit="squash" if squash else "crop",
            mean=about.get("mean", CLIP_MEAN),
            std=about.get("std", CLIP_STD),
            resample=about.get("interpolation", "bicubic"),
            halves="even",
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{path} does not say how images are prepared: {first_line(error)}",
            hint="give processor={size: ..., mean: [...], std: [...]}",
        ) from error


def _of_transformers(source: str) -> Steps:
    require("transformers", by="preparing images as the model's folder says", extra="huggingface")
    import transformers

    known: Any = transformers.AutoImageProcessor  # without types
    try:
        with quiet("transformers"):
            made: Any = known.from_pretrained(source, trust_remote_code=False)
    # It raises whatever a missing, foreign or damaged file makes of the code that reads it.
    except Exception as error:
        raise EvaluationError(
            f"the image processor of {source} cannot be loaded: {first_line(error)}",
            hint="give the folder of the model, or processor={size: ..., mean: ..., std: ...}",
        ) from error

    return Steps(_ByTransformers(made), f"{type(made).__name__} {made.to_json_string()}")


@dataclass(frozen=True, eq=False)
class _ByTransformers:
    """The steps of an image processor of transformers."""

    processor: Any

    def __call__(self, images: Sequence[Image]) -> Tensor:
        with quiet("transformers"):
            found = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        assert isinstance(found, Tensor)
        return found.float()


def folder_of(data: Data) -> Path:
    """Return the folder that paths of images in a table are relative to: that of the table."""
    path = Path(data.path).expanduser()
    return path if path.is_dir() else path.parent


@dataclass(frozen=True, eq=False)
class Pixels:
    """Images ready for a model.

    Attributes:
        values: ``n x ...`` float32; in memory, or mapped from a file.
        digest: Of the images and of how they were prepared.
        file: That file; other processes map it too, and are not sent the values.
    """

    values: Tensor
    digest: str
    file: Path | None = None

    def __reduce__(self) -> tuple[object, ...]:
        if self.file is None:
            return Pixels, (self.values, self.digest)
        return _mapped, (self.file, self.digest)


def read_pixels(
    examples: Examples, steps: Steps | None, *, folder: Path, cache_dir: str | Path | None = None
) -> Pixels:
    """Read and prepare the images of examples; at once where that was done and is in use.

    Files and arrays of whole numbers from 0 to 255 are images, and are turned upright and to red,
    green and blue first, whatever their modes. Arrays of other numbers are taken as they are.

    Args:
        examples: Examples with the role ``image``.
        steps: How images are prepared. Without, only arrays can be used: whole numbers are divided
            by 255 and get a channel where they have none.
        folder: What paths that are text are relative to.
        cache_dir: Folder above that of the files which many images are mapped from; see
            `map_bo.cached.cache_root`.

    Raises:
        EvaluationError: When an image cannot be read, or images come out in several shapes.
    """
    text = f"{examples.digest} {None if steps is None else steps.identity}"
    text += _digests_of_files(examples, folder)
    digest = hashlib.sha256(text.encode()).hexdigest()
    with _lock:
        found = _known.get(digest)
    if found is None:
        file = cache_root(cache_dir) / "pixels" / f"{digest[:32]}.npy"
        found = _prepared(examples, steps, folder, file, digest)
        with _lock:
            found = _known.setdefault(digest, found)
    return found


def _digests_of_files(examples: Examples, folder: Path) -> str:
    """Return the digests of the files that a table names; its own digest has their names alone."""
    found: list[str] = []
    for value in examples.columns["image"]:
        if isinstance(value, str):
            with suppress(OSError, ValueError):  # said where it is read as an image
                found.append(hashlib.sha256((folder / value).read_bytes()).hexdigest())
    return " ".join(found)


def _prepared(
    examples: Examples, steps: Steps | None, folder: Path, file: Path, digest: str
) -> Pixels:
    if file.is_file():
        return _mapped(file, digest)
    given = examples.columns["image"]
    first = _chunk(examples, range(min(_CHUNK, len(given))), steps, folder)
    shape = (len(given), *first.shape[1:])
    if math.prod(shape) <= IN_MEMORY:
        values = torch.empty(shape)
        _fill(values.numpy(), first, examples, steps, folder)
        return Pixels(values, digest)
    scratch = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        mapped = np.lib.format.open_memmap(scratch, mode="w+", dtype=np.float32, shape=shape)
        _fill(mapped, first, examples, steps, folder)
        mapped.flush()
        scratch.replace(file)
    except OSError as error:
        raise EvaluationError(
            f"the images cannot be kept in {file.parent}: {error.strerror or error}",
            hint=f"set cache_dir, or the environment variable {CACHE_VARIABLE}, to a folder with "
            f"room for {4 * math.prod(shape) / 1e9:.1f} GB",
        ) from error
    finally:
        with suppress(OSError):
            scratch.unlink()
    return _mapped(file, digest)


def _mapped(file: Path, digest: str) -> Pixels:
    # Copied on write, as torch has no tensors that cannot be written to.
    values = torch.from_numpy(np.load(file, mmap_mode="c", allow_pickle=False))
    return Pixels(values, digest, file)


def _fill(
    values: NDArray[np.float32],
    first: Tensor,
    examples: Examples,
    steps: Steps | None,
    folder: Path,
) -> None:
    n = len(values)
    for start in range(0, n, _CHUNK):
        rows = range(start, min(start + _CHUNK, n))
        part = first if not start else _chunk(examples, rows, steps, folder)
        if part.shape[1:] != values.shape[1:]:
            raise _shapes(tuple(values.shape[1:]), tuple(part.shape[1:]))
        values[rows.start : rows.stop] = part.numpy()


def _shapes(one: tuple[int, ...], other: tuple[int, ...]) -> EvaluationError:
    return EvaluationError(
        f"images have the shapes {' x '.join(map(str, one))} and {' x '.join(map(str, other))}",
        hint="give processor, the folder of the model or {size: ...}, which makes them alike",
    )


def _chunk(examples: Examples, rows: range, steps: Steps | None, folder: Path) -> Tensor:
    """Return some images as a model takes them."""
    values = [_decoded(examples, row, folder) for row in rows]
    ready = [value for value in values if isinstance(value, np.ndarray)]
    if len(ready) == len(values):  # numbers, which are what they should be
        return _stacked([np.asarray(value, dtype=np.float32) for value in ready])
    if ready:
        raise EvaluationError(
            f"{examples.where} holds images and arrays of numbers",
            hint="give either images or what the model takes",
        )
    from PIL.Image import Image

    images = [value for value in values if isinstance(value, Image)]
    if steps is not None:
        try:
            return steps.make([image.convert("RGB") for image in images])
        except ValueError as error:  # of numpy, for shapes that differ
            sizes = sorted({image.size for image in images})
            raise EvaluationError(
                f"images {rows.start + 1} to {rows.stop} of {examples.where} cannot be prepared: "
                f"{first_line(error)}",
                hint=f"their sizes go from {sizes[0]} to {sizes[-1]}; fit='crop' makes them alike",
            ) from error
    if not isinstance(examples.columns["image"][rows.start], np.ndarray):
        raise EvaluationError(
            "nothing says how the images are prepared",
            hint="give processor: the folder of the model with its preprocessor_config.json, or "
            "{size: ..., mean: ..., std: ...}",
        )
    planes = [np.asarray(image, dtype=np.float32) / np.float32(255) for image in images]
    return _stacked([one[None] if one.ndim == 2 else one.transpose(2, 0, 1) for one in planes])


def _stacked(values: Sequence[NDArray[np.float32]]) -> Tensor:
    shapes = list(dict.fromkeys(value.shape for value in values))
    if len(shapes) > 1:
        raise _shapes(shapes[0], shapes[1])
    return torch.from_numpy(np.stack(values))


def _decoded(examples: Examples, row: int, folder: Path) -> Image | NDArray[np.generic]:
    """Return an image, upright, in grey or red, green and blue; or an array of numbers."""
    value = examples.columns["image"][row]
    where = f"image {examples.rows[row] + 1} of {examples.where}"
    if isinstance(value, list | tuple):
        try:
            value = np.asarray(value, dtype=np.float32)
        except (ValueError, TypeError) as error:
            raise EvaluationError(
                f"{where} is no array: {first_line(error)}", hint="give rows of one length"
            ) from error
    if isinstance(value, np.ndarray) and value.dtype != np.uint8:
        return value
    require("PIL", by="reading images", extra="images")
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        if isinstance(value, np.ndarray):
            if value.ndim == 3 and value.shape[0] in (1, 3) and value.shape[2] not in (1, 3, 4):
                value = value.transpose(1, 2, 0)
            return Image.fromarray(value[..., 0] if value.shape[2:] == (1,) else value)
        if isinstance(value, EncodedImage):
            content = value.content
        elif isinstance(value, str | Path):
            # A folder of images gives paths that lead there; what a table holds is relative to it.
            path = value if isinstance(value, Path) else folder / value
            where = str(path)
            content = path.read_bytes()
        else:
            raise EvaluationError(
                f"{where} is a {type(value).__name__}, not an image",
                hint="choose the column of images: columns={'image': ...}",
            )
        return _plain(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    except FileNotFoundError as error:
        raise EvaluationError(
            f"there is no image {where}", hint=f"paths are relative to {folder}"
        ) from error
    except (
        OSError,
        ValueError,
        TypeError,
        SyntaxError,  # of Pillow, for some damaged files
        UnidentifiedImageError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise EvaluationError(
            f"{where} cannot be read as an image: {first_line(error)}",
            hint="it is damaged, or not an image; take it out or fetch it again",
        ) from error


def _plain(image: Image) -> Image:
    """Return an image in red, green and blue, 8 bits each, whatever it was in."""
    from PIL import Image as images

    if image.mode.startswith("I") or image.mode == "F":  # 16 bits: Pillow would cut them off
        values = np.asarray(image, dtype=np.float64)
        if values.max(initial=0) > 255:
            values = values / 257
        image = images.fromarray(values.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("P", "PA", "LA", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "RGBa"):  # what is transparent is white, as pages show it
        image = image.convert("RGBA")
        below = images.new("RGBA", image.size, (255, 255, 255, 255))
        image = images.alpha_composite(below, image)
    return image.convert("RGB")
