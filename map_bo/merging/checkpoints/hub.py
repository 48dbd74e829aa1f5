"""Models of the Hugging Face hub, by their names: fetched to its cache, or found there."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from map_bo.errors import CheckpointError, MissingDependencyError, first_line, listed

__all__ = ["HubModel", "Snapshot", "fetch", "hub_model"]

_SCHEME = "hf://"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
_MODEL = re.compile(rf"(?P<name>{_NAME}/{_NAME})(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?")
_EXPLICIT = re.compile(rf"(?P<name>(?:{_NAME}/)?{_NAME})(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?")
_FILES = (".safetensors", ".pt", ".pth", ".bin", ".json", ".gguf", ".ckpt", ".yaml", ".zip")
# What makes weights a usable model: configuration, tokenizer, chat template, licence.
_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_TIMEOUT = 10.0
_INSTALL = 'pip install "map-bo[huggingface]"'


@dataclass(frozen=True)
class HubModel:
    """A model of the hub.

    Attributes:
        name: ``organisation/name``.
        revision: Branch, tag or commit; None for the main branch.
        asked: What the user wrote.
        explicit: Whether it can be nothing but a model of the hub (``hf://``).
    """

    name: str
    revision: str | None
    asked: str
    explicit: bool

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"


@dataclass(frozen=True)
class Snapshot:
    """The files of a model at one commit, in the hub's cache.

    Attributes:
        folder: The folder with the files.
        source: ``organisation/name@commit``.
        complete: Whether the hub was reached, so that nothing that was wanted is missing.
    """

    folder: Path
    source: str
    complete: bool


def hub_model(text: str) -> HubModel | None:
    """Return the model of the hub that a text names, or None where it can only be a path.

    ``hf://organisation/name@revision`` is always one. ``organisation/name`` and
    ``organisation/name@revision`` are one when nothing on this machine has that name or is a
    folder of the organisation's name, which tells ``checkpoints/typo`` from a model.

    Raises:
        CheckpointError: For ``hf://`` with something else behind it.
    """
    if text.startswith(_SCHEME):
        found = _EXPLICIT.fullmatch(text.removeprefix(_SCHEME))
        if found is None or not _valid(found["name"]):
            raise CheckpointError(
                f"{text} names no model of the Hugging Face hub",
                hint="write hf://organisation/name or hf://organisation/name@revision",
            )
        return HubModel(found["name"], found["revision"], text, explicit=True)
    found = _MODEL.fullmatch(text)
    if found is None or not _valid(found["name"]) or text.lower().endswith(_FILES):
        return None
    if Path(text).exists() or Path(found["name"].partition("/")[0]).exists():
        return None
    return HubModel(found["name"], found["revision"], text, explicit=False)


def _valid(name: str) -> bool:
    return len(name) <= 96 and "--" not in name and ".." not in name and not name.endswith(".git")


def fetch(model: HubModel) -> Snapshot:
    """Download the weights of a model and the small files beside them, as far as not cached.

    Fetched are the safetensors weights, or ``.bin`` files only where there are no safetensors;
    configuration, tokenizer, chat templates and licences. Without a connection, with
    ``HF_HUB_OFFLINE=1``, and where access is refused, a copy in the cache is taken.

    Raises:
        MissingDependencyError: When huggingface_hub is not installed.
        CheckpointError: When the model or revision does not exist, may not be read, holds no
            weights that can be read, or can neither be fetched nor found in the cache.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise MissingDependencyError(
            f"{_prefix(model)}and to look for it on the Hugging Face hub, huggingface_hub is needed"
            if not model.explicit
            else f"{model.asked} needs huggingface_hub",
            hint=_INSTALL,
        ) from error
    try:
        info = huggingface_hub.HfApi().model_info(
            model.name, revision=model.revision, timeout=_TIMEOUT
        )
    except errors.RevisionNotFoundError as error:
        raise _refusal(model, error, errors) from error
    # Whatever a network can do; a copy in the cache serves as well.
    except Exception as error:
        return _find_cached(model, huggingface_hub, errors, error)
    wanted = _choose_files(model, [file.rfilename for file in info.siblings or ()])
    try:
        folder = huggingface_hub.snapshot_download(
            model.name, revision=model.revision, allow_patterns=[_literal(name) for name in wanted]
        )
    except Exception as error:
        raise _refusal(model, error, errors) from error
    return Snapshot(Path(folder), f"{model.name}@{Path(folder).name}", complete=True)


def _find_cached(
    model: HubModel, huggingface_hub: Any, errors: Any, problem: Exception
) -> Snapshot:
    try:
        # The weights are not asked for by name here: the readers tell what is missing.
        folder = huggingface_hub.snapshot_download(
            model.name,
            revision=model.revision,
            allow_patterns=["config.json"],
            local_files_only=True,
        )
    except errors.LocalEntryNotFoundError:
        raise _refusal(model, problem, errors) from problem
    except Exception as error:
        raise _refusal(model, error, errors) from error
    return Snapshot(Path(folder), f"{model.name}@{Path(folder).name}", complete=False)


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


def _choose_files(model: HubModel, files: Iterable[str]) -> list[str]:
    """Return which files of a repository to fetch: the weights of one model, no second copy."""
    here = sorted(file for file in files if "/" not in file)
    beside = [
        file for file in here if any(fnmatch.fnmatchcase(file, pattern) for pattern in _BESIDE)
    ]
    beside += [f for f in files if re.fullmatch(r"additional_chat_templates/[^/]+\.jinja", f)]
    return beside + _weights(model, here)


def _weights(model: HubModel, here: list[str]) -> list[str]:
    for whole in ("model.safetensors", "pytorch_model.bin"):
        stem, suffix = whole.rsplit(".", 1)
        if whole in here:
            return [whole]
        if f"{whole}.index.json" in here:
            files = [file for file in here if file.endswith(f".{suffix}")]
            # Beside the shards there may be variants and the same weights in another form.
            shards = [f for f in files if re.fullmatch(rf"{stem}-\d+-of-\d+\.{suffix}", f)]
            return [*(shards or files), f"{whole}.index.json"]
        if suffix == "safetensors":
            found = [file for file in here if file.endswith(".safetensors")]
            indexed = [file for file in here if file.endswith(".safetensors.index.json")]
            if len(found) == 1 or len(indexed) == 1:
                return found
            if found:
                raise CheckpointError(
                    f"{model} holds {len(found)} weight files and no model.safetensors: "
                    f"{listed(found)}",
                    hint=f"fetch the one to read with `hf download {model.name} FILE` and give "
                    "its path",
                )
    others = [file for file in here if file.endswith((".gguf", ".h5", ".msgpack", ".ckpt", ".pth"))]
    raise CheckpointError(
        f"{model} of the Hugging Face hub holds no weights that can be read"
        + (f", but {listed(others)}" if others else ""),
        hint="expected are safetensors, or pytorch_model.bin, at the top of the repository",
    )


def _prefix(model: HubModel) -> str:
    return "" if model.explicit else f"{model.asked} does not exist on this machine, "


def _refusal(model: HubModel, error: Exception, errors: Any) -> CheckpointError:
    """Return what went wrong at the hub, and what to do about it."""
    prefix, and_ = _prefix(model), "" if model.explicit else "and "
    page = f"https://huggingface.co/{model.name}"
    path = "" if model.explicit else "check the path; for a model of the hub, "
    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(
            f"{prefix}{and_}the model {model.name} of the Hugging Face hub is gated",
            hint=f"ask for access at {page}, then log in with `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(
            f"{prefix}{and_}the model {model.name} of the Hugging Face hub has no revision "
            f"{model.revision!r}",
            hint="give a branch, a tag or a full commit hash that exists",
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return CheckpointError(
            f"{prefix}{and_}the Hugging Face hub shows no model {model.name}",
            hint=f"{path}check the name; if it is private, log in with `hf auth login`",
        )
    if isinstance(error, errors.HfHubHTTPError) and status is not None:
        return CheckpointError(
            f"{prefix}{and_}the Hugging Face hub answered with the error {status} for {model}",
            hint=f"{path}try again later",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return CheckpointError(
            f"{model} could not be fetched from the Hugging Face hub: {error.strerror}",
            hint="free some space, or set HF_HOME to a folder on another disk",
        )
    return CheckpointError(
        f"{prefix}{and_}{model} is not in the cache of the Hugging Face hub, which cannot be "
        f"reached ({_cause(error)})",
        hint=f"{path}connect, or fetch it where there is a connection with "
        f"`hf download {model.name}` and copy the cache",
    )


def _cause(error: Exception) -> str:
    if type(error).__name__ == "OfflineModeIsEnabled":
        return "HF_HUB_OFFLINE is set"
    return f"{type(error).__name__}: {first_line(error)}"
