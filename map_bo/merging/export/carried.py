"""The other files of the base's folder that an export carries, and what is said of those it leaves.

A folder of weights is used by some library, and that one finds its files by what other files say:
``modules.json`` names folders, ``config.json`` names Python files. So what is carried follows from
what is referred to, and from what is not weights, code or traces of training.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from map_bo.errors import listed
from map_bo.merging.checkpoints.checkpoint import Checkpoint

__all__ = ["Carried", "find_carried", "weight_stem"]

logger = logging.getLogger(__name__)

_LIMIT = 1 << 28  # bytes of one file
_JSON_LIMIT = 1 << 24
_DEPTH, _FILES = 6, 10_000
_STEM = "model"
# Written anew, or of another folder.
_OWN = {"README.md", "recipe.yaml", "mergekit.yaml", "adapter_config.json"}
_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data",
    ".gguf", ".ggml", ".npz", ".npy", ".tflite", ".ot", ".pkl", ".pickle", ".mlmodel", ".engine",
    ".index.json",
)  # fmt: skip
_TRAINING = re.compile(
    r"(trainer_state\.json|training_args.*|optimizer.*|scheduler\.(pt|bin)|rng_state.*|events\.out.*|"
    r"all_results\.json|(train|eval|predict|test)_results\.json|global_step.*|zero_to_fp32\.py|latest|"
    r".*\.(log|lock|incomplete|metadata|part|tmp))"
)
# Pictures, papers and data of a model's page: nothing loads them.
_PAGE = (
    ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4", ".webm", ".wav", ".mp3", ".flac",
    ".pdf", ".ipynb", ".csv", ".tsv", ".parquet", ".arrow", ".zip", ".gz", ".tar", ".7z", ".whl",
)  # fmt: skip
_OF_TRANSFORMERS = re.compile(r"(model|pytorch_model)[-.].*(safetensors|bin|index\.json)$")
_INDEX = re.compile(r".*\.index\.[\w-]+\.json")  # of a variant
_MAIN = re.compile(r"(\w*model|consolidated)[-.].*")  # weights of whole models, of any library
_CODE = (".py", ".pyc", ".so", ".pyd", ".dll", ".dylib", ".sh", ".bat", ".exe", ".js")
# Where tokenizers look without being told.
_CONVENTIONS = ("additional_chat_templates",)
_PYTHON_NAME = re.compile(r"(?:.*--)?([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)\.[A-Za-z_]\w*")


@dataclass(frozen=True)
class Carried:
    """What an export takes over from the base's folder.

    Attributes:
        files: Path within the folder -> where it is, in order.
        notes: Sentences on what was left out or is the base's own, for the log and the card.
    """

    files: Mapping[str, Path]
    notes: tuple[str, ...] = ()


def find_carried(
    base: Checkpoint, experts: Mapping[str, Checkpoint] | None = None, *, code: bool = False
) -> Carried:
    """Find the files of the base's folder that an export carries.

    - Files at its root, but for weights, code, traces of training and pictures.
    - Files and folders that a JSON file among those names, weights in them included: they are the
      base's, not merged.
    - Python code where ``code`` says so.

    Nothing outside the folder is taken, and no link to a folder is followed.

    Args:
        base: The base; without a folder nothing is carried.
        experts: Name -> checkpoint: told is where theirs have other weights in a folder that is
            carried.
        code: Whether to carry code, which whoever loads the model may run.
    """
    folder = base.directory
    if folder is None:
        return Carried({})
    found: dict[str, Path] = {}
    large: list[str] = []
    codes: dict[str, Path] = {}
    left: list[str] = []

    def take(name: str, *, referred: bool) -> None:
        path = folder / name
        if name in found or name in codes or not path.is_file():
            return
        kind = _kind(name, root="/" not in name)
        if kind == "code":
            codes[name] = path
        elif kind == "weights" and not (referred and ("/" in name or not _MAIN.match(name))):
            return
        elif kind == "page" and not referred:
            left.append(name)
        elif kind in ("training", "own"):
            return
        elif path.stat().st_size > _LIMIT:
            large.append(name)
        else:
            found[name] = path

    for path in sorted(folder.iterdir()):
        if path.is_file():
            take(path.name, referred=False)
    for convention in _CONVENTIONS:
        for name in _inside(folder, convention):
            take(name, referred=True)
    pending = [name for name in found if name.endswith(".json")]
    seen: set[str] = set()
    while pending:
        file = pending.pop()
        if file in seen:
            continue
        seen.add(file)
        for name in _named_by(folder, file):
            before = set(found)
            for each in _inside(folder, name) if (folder / name).is_dir() else [name]:
                take(each, referred=True)
            pending += sorted(n for n in found.keys() - before if n.endswith(".json"))
    for name in _inside(folder, "") if code or _names_code(folder, found) else ():
        if _kind(name, root="/" not in name) == "code":
            codes.setdefault(name, folder / name)
    notes = list(_notes(codes, large, left, code=code))
    if code:
        small = {n: path for n, path in codes.items() if path.stat().st_size <= _LIMIT}
        found |= small
    notes += _on_weights(found, base, experts or {})
    for note in notes:
        logger.warning("%s", note)
    return Carried(dict(sorted(found.items())), tuple(notes))


def weight_stem(base: Checkpoint) -> str:
    """Return what the base's library calls the file of weights, without its ending.

    transformers calls it ``model``; where the base's folder has no file of such a name, it is that
    of its own file, as ``diffusion_pytorch_model``.
    """
    folder = base.directory
    if folder is None:
        return _STEM
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    if any(
        re.match(r"(model|pytorch_model)[-.].*(safetensors|bin|index\.json)$", n) for n in names
    ):
        return _STEM
    config = _read(folder / "config.json")
    if isinstance(config, dict) and "model_type" in config and "_class_name" not in config:
        return _STEM  # transformers would not find it under another name
    for ending in (".safetensors.index.json", ".safetensors", ".bin.index.json", ".bin"):
        stems = [n.removesuffix(ending) for n in names if n.endswith(ending)]
        stems = [s for s in stems if not s.startswith(("adapter_", "training_args", "optimizer"))]
        if stems:
            return re.sub(r"-\d+-of-\d+$", "", stems[0])
    return _STEM


def _kind(name: str, *, root: bool) -> str:
    short = PurePosixPath(name).name
    lower = short.lower()
    if short.startswith(".") or (root and short in _OWN):
        return "own"
    if _TRAINING.fullmatch(lower):
        return "training"
    if lower.endswith(_CODE):
        return "code"
    if lower.endswith(_WEIGHTS) or _INDEX.fullmatch(lower):
        return "weights"
    return "page" if lower.endswith(_PAGE) else "other"


def _inside(folder: Path, name: str) -> Iterator[str]:
    """Yield the files in a folder of the folder, by their paths in it; links are not entered."""
    count = 0
    pending = [(folder / name, 0)]
    while pending:
        place, depth = pending.pop()
        if not place.is_dir() or (place != folder and place.is_symlink()):
            continue
        for path in sorted(place.iterdir()):
            if path.is_dir():
                if depth < _DEPTH and not path.name.startswith(".") and path.name != "__pycache__":
                    pending.append((path, depth + 1))
            elif count < _FILES:
                count += 1
                yield path.relative_to(folder).as_posix()


def _named_by(folder: Path, file: str) -> Iterator[str]:
    """Yield the files and folders of the folder that a JSON file names, relative to itself too."""
    places = dict.fromkeys((PurePosixPath(""), PurePosixPath(file).parent))
    for text in dict.fromkeys(_strings(_read(folder / file))):
        for name in _as_paths(text):
            for place in places:
                own = (place / name).as_posix()
                if own != "." and (folder / own).exists():
                    yield own


def _as_paths(text: str) -> Iterator[str]:
    """Yield what a text may name: a path, or the file of a Python class."""
    if not text or len(text) > 255 or "\0" in text or "\n" in text:
        return
    path = PurePosixPath(text)
    if not path.is_absolute() and ".." not in path.parts and path.parts:
        yield path.as_posix()
    python = _PYTHON_NAME.fullmatch(text)
    if python is not None:
        yield python.group(1).replace(".", "/") + ".py"


def _names_code(folder: Path, found: Mapping[str, Path]) -> bool:
    return any(
        isinstance(content := _read(folder / name), dict) and "auto_map" in content
        for name in found
        if name.endswith(".json")
    )


def _read(file: Path) -> object:
    try:
        if file.stat().st_size > _JSON_LIMIT:
            return None
        content: object = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content


def _strings(content: object) -> Iterator[str]:
    pending = [content]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, Mapping):
            pending += part.values()
        elif isinstance(part, list):
            pending += part


def _notes(
    codes: Mapping[str, Path], large: list[str], left: list[str], *, code: bool
) -> Iterator[str]:
    if codes and not code:
        yield (
            f"Python code of the base's folder was not carried: {listed(sorted(codes), 20)}. Where "
            "its configuration refers to it (auto_map, custom modules), the model loads with it "
            "alone: copy it there once you have read it, or export with code=True."
        )
    elif codes:
        yield f"Python code of the base's folder was carried: {listed(sorted(codes), 20)}."
    if large:
        yield f"Files above {_LIMIT >> 20} MiB were not carried: {listed(sorted(large))}."
    if left:
        yield f"Pictures and data of the base's page were not carried: {listed(sorted(left))}."


def _on_weights(
    found: Mapping[str, Path], base: Checkpoint, experts: Mapping[str, Checkpoint]
) -> Iterator[str]:
    """Say which weights in folders are the base's, and which experts have others there."""
    weights = [n for n in found if "/" in n and _kind(n, root=False) == "weights"]
    for name in weights:
        own = _digest(found[name])
        others = [
            label
            for label, expert in experts.items()
            if expert.directory is not None
            and (theirs := expert.directory / name).is_file()
            and _digest(theirs) != own
        ]
        yield f"{name} is the base's own and not merged" + (
            f"; that of {listed(others)} differs." if others else "."
        )


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
