"""Everything that reads a file of somebody else, with the form of that file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Literal
from unittest.mock import patch

import torch
import yaml
from safetensors.torch import save

from map_bo.app.build import build_nested, build_problem, build_settings, build_tracking
from map_bo.app.trust import foreign_code, recorded_configuration
from map_bo.errors import MapBoError
from map_bo.evaluators.data import Data
from map_bo.evaluators.sources.files import read_idx
from map_bo.evaluators.text.heads import read_head
from map_bo.foreign import parse_yaml
from map_bo.loop.mirrors import view_of
from map_bo.loop.reading import created_of, load_result, outcomes_table, read_runs
from map_bo.merging.adapters.adapter import open_adapter
from map_bo.merging.align.vocabulary import token_ids
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.moved import current, with_current_targets
from map_bo.nested.reading import is_nested, load_nested
from map_bo.operators.mergekit.recipes import from_mergekit
from map_bo.operators.recipes import merge_again
from map_bo.operators.statistics.statistics import load_statistics
from map_bo.plain import from_plain, read_repr
from map_bo.report.run.artifacts import write_report
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event
from tests.fuzz.mutation import mutate_bytes, mutate_value

__all__ = ["CORPUS", "READERS", "Reader", "changed", "seeds"]

CORPUS = Path(__file__).parent / "corpus"
Form = Literal["json", "yaml", "record", "bytes"]


@dataclass(frozen=True)
class Reader:
    """A reader of files.

    Attributes:
        file: Name of the file that it reads in a folder.
        read: Reads the file in a folder; other files of the corpus are beside it.
        form: What the file holds, for changes of its values.
    """

    file: str
    read: Callable[[Path], object]
    form: Form = "bytes"


def record(folder: Path) -> None:
    """Do with a run what `report` and `choose` do, but for drawing."""
    with patch("map_bo.report.run.artifacts.write_plots", lambda view, directory: []):
        result: Any = load_result(folder)
        write_report(view_of(result), folder)
        if is_nested(created_of(folder)):
            result = load_nested(folder)
        result.choose({}).describe()
        result.point(0).describe()
        outcomes_table(folder)


def sweep(folder: Path) -> None:
    read_runs([folder], beside=folder)


def configuration(folder: Path) -> None:
    """Build what `resume` would build from a recorded configuration."""
    told = loads(folder / "config.json")
    with recorded_configuration("run", told) as config:
        build_settings(config)
        build_nested(config)
        build_tracking(config)
        build_problem(config)


def targets(folder: Path) -> None:
    foreign_code(with_current_targets(loads(folder / "config.json")))


def recipe(folder: Path) -> None:
    merge_again(folder / "recipe.yaml", folder / "out", progress=False)


def checkpoint(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        opened = open_checkpoint(folder / name if name else folder)
        for tensor in opened.names:
            opened.load(tensor)

    return read


def adapter(folder: Path) -> None:
    base = open_checkpoint({"fc.weight": torch.zeros(3, 2)})
    opened = open_adapter(folder, base)
    for name in opened.names:
        opened.delta(name)


def examples(name: str) -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        found = Data(path=str(folder / name)).read(("text", "label"))
        found.texts("text")
        found.classes()
        found.numbers("label")

    return read


READERS: Mapping[str, Reader] = {
    "record": Reader("events.jsonl", record, "record"),
    "outcomes": Reader("outcomes.bin", record),
    "sweep": Reader("failure.json", sweep, "json"),
    "mirror": Reader("wandb.json", sweep, "json"),
    "configuration": Reader("config.json", configuration, "json"),
    "settings": Reader("settings.json", lambda f: from_plain(loads(f / "settings.json")), "json"),
    "repr": Reader("repr.txt", lambda f: read_repr(decoded(f / "repr.txt"))),
    "names": Reader("names.txt", lambda f: current(decoded(f / "names.txt"))),
    "targets": Reader("config.json", targets, "json"),
    "recipe": Reader("recipe.yaml", recipe, "yaml"),
    "mergekit": Reader("mergekit.yaml", lambda f: from_mergekit(f / "mergekit.yaml"), "yaml"),
    "adapter": Reader("adapter_config.json", adapter, "json"),
    "adapter weights": Reader("adapter_model.safetensors", adapter),
    "tokenizer": Reader("tokenizer.json", token_ids, "json"),
    "vocabulary": Reader("vocab.json", token_ids, "json"),
    "words": Reader("vocab.txt", token_ids),
    "added tokens": Reader("added_tokens.json", token_ids, "json"),
    "tokenizer configuration": Reader("tokenizer_config.json", token_ids, "json"),
    "safetensors": Reader("model.safetensors", checkpoint("model.safetensors")),
    "index": Reader("model.safetensors.index.json", checkpoint(""), "json"),
    "pickle": Reader("model.pt", checkpoint("model.pt")),
    "statistics": Reader("model.safetensors", lambda f: load_statistics(f / "model.safetensors")),
    "table": Reader("data.csv", examples("data.csv")),
    "packed table": Reader("data.csv.gz", examples("data.csv.gz")),
    "rows": Reader("data.json", examples("data.json"), "json"),
    "row lines": Reader("data.jsonl", examples("data.jsonl")),
    "text lines": Reader("data.txt", examples("data.txt")),
    "arrays": Reader("data.npz", examples("data.npz")),
    "idx": Reader("images", lambda f: read_idx(f / "images")),
    "head": Reader("head.safetensors", lambda f: read_head(f / "head.safetensors")),
}


def loads(path: Path) -> Any:
    """Return JSON for readers of values; bytes that are no JSON are the next reader's."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None


def decoded(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def seeds(name: str) -> list[Path]:
    """Return the folders of the corpus of a reader: each holds its file, and what is beside it."""
    return sorted(path for path in (CORPUS / name.replace(" ", "_")).iterdir() if path.is_dir())


def changed(reader: Reader, seed: Path, folder: Path, random: Random) -> None:
    """Copy a folder of the corpus, with changes of the file that is read."""
    for file in seed.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    path = folder / reader.file
    content = path.read_bytes() if path.exists() else b""
    if reader.form != "bytes" and random.random() < 0.7:
        try:
            _change_values(reader.form, path, content, random)
            return
        except (ValueError, RecursionError, yaml.YAMLError, MapBoError):
            pass  # what is no data, or no record can hold: its bytes are changed
    path.write_bytes(mutate_bytes(content, random))


def _change_values(form: Form, path: Path, content: bytes, random: Random) -> None:
    if form == "json":
        path.write_text(json.dumps(mutate_value(json.loads(content), random)))
    elif form == "yaml":
        data = mutate_value(parse_yaml(content.decode()), random)
        path.write_bytes(yaml.safe_dump(data, allow_unicode=False).encode())
    else:
        events = list(JsonlStore.open(path.parent).read())
        number = random.choice([0, random.randrange(len(events)), len(events) - 1])
        data = mutate_value(dict(events[number].data), random)
        if isinstance(data, dict):
            events[number] = Event(events[number].kind, data, events[number].time)
        for old in path.parent.iterdir():
            if old.suffix != ".json":
                old.unlink()
        store = JsonlStore.create(path.parent)
        with store.lock():
            for event in events:
                store.append(event)


def tensors(**shapes: tuple[int, ...]) -> bytes:
    """Return a safetensors file of zeros, for the corpus."""
    return save({name: torch.zeros(shape) for name, shape in shapes.items()}, {"format": "pt"})


def pickled(content: object) -> bytes:
    """Return a file of torch.save, for the corpus."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
