"""The model card of a merged model: what people, and the Hugging Face hub, read first."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from map_bo.errors import listed
from map_bo.foreign import read_json
from map_bo.merging.align.conform import changes_told
from map_bo.merging.checkpoints.checkpoint import Checkpoint
from map_bo.plain import is_settings, name_of

__all__ = ["MODEL_CARD", "AdapterFacts", "model_card_text"]

MODEL_CARD = "README.md"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class AdapterFacts:
    """What a card says of a merge that was written as an adapter.

    Attributes:
        rank: Rank of its factors.
        error: Its relative error, measured on what was read back from its file.
        full_values: Tensors that are in it as full values.
        parameters: Bare parameters with factors (peft's ``target_parameters``).
        loaded: Whether peft has loaded it over the model.
    """

    rank: int
    error: float
    full_values: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    loaded: bool = False


def model_card_text(
    *,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    operator: Mapping[str, Any],
    coefficients: Mapping[str, float],
    record: Mapping[str, Any],
    recalibrated: bool = False,
    adapter: AdapterFacts | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Return the text of ``README.md``: a Hugging Face model card with YAML front matter.

    ``base_model`` lists base and experts: names on the hub where they can be told, else paths,
    which are to be replaced before publishing. What is only in memory is left out of it. A
    ``choice`` in the record, as `map_bo.loop.result.Choice` writes it, becomes the table of
    trade-offs, in which predicted and measured values are columns of their own.

    Args:
        base: The base.
        experts: Name -> checkpoint.
        operator: The operator as plain data.
        coefficients: Coefficient name -> value.
        record: Further plain data of the recipe.
        recalibrated: Whether statistics of batch normalisation were measured anew.
        adapter: What it is as an adapter, if it is one.
        notes: Further sentences, each a line of its own.
    """
    parts = [
        "# Merged model" if adapter is None else "# Merged adapter",
        f"{_count(len(experts), 'expert')} fine-tuned from one base, merged with map_bo; "
        "`recipe.yaml` has every input and all digits.",
        *_trade_offs(record.get("choice")),
        *_verdict(record.get("choice")),
        "## How it was merged",
        f"Operator: {_inline(operator)}",
        _table(("coefficient", "value"), ((name, c) for name, c in coefficients.items())),
    ]
    if adapter is not None:
        parts.append(_about(adapter))
    parts += notes
    if "nested" in record:
        parts.append("The experts were merged in stages; `recipe.yaml` has the tree.")
    if recalibrated:
        parts.append("The running statistics of batch normalisation were measured anew on data.")
    parts += [
        "## What was merged",
        _table(
            ("role", "name", "source", "sha256 of the weights"),
            [
                ("base", "", base.source, base.digest()),
                *(("expert", name, e.source, e.digest()) for name, e in experts.items()),
            ],
        ),
    ]
    told = [
        f"- {_cell(name)}: {_cell(line)}"
        for name, expert in experts.items()
        for line in changes_told(expert.vocabulary_changes)
    ]
    if told:
        parts += ["What was done to fit experts to the base (`recipe.yaml` has it all):"]
        parts.append("\n".join(told))
    task = base.vocabulary_changes.get("task")
    if task is not None:
        parts.append(f"This is the model of one task: the head is that of {_cell(task)}.")
    return _front_matter(base, experts, adapter) + "\n" + "\n\n".join(parts) + "\n"


def _about(adapter: AdapterFacts) -> str:
    """Return what the card says of an adapter."""
    text = (
        f"This is a LoRA adapter of rank {adapter.rank} over the base. Read back from its file, it "
        f"has the merged change with a relative error of {adapter.error:.2g} (Frobenius norm)"
    )
    text += ", and peft has loaded it over the model." if adapter.loaded else "."
    if adapter.full_values:
        text += f" Full values: {_cell(listed(adapter.full_values))}."
    if adapter.parameters:
        text += (
            f" Factors of bare parameters (peft's `target_parameters`, which not every server "
            f"reads): {_cell(listed(adapter.parameters))}."
        )
    return text


def _front_matter(
    base: Checkpoint, experts: Mapping[str, Checkpoint], adapter: AdapterFacts | None = None
) -> str:
    # What an adapter is loaded over is its base alone; the experts are in the table.
    inputs = (base,) if adapter is not None else (base, *experts.values())
    models = [name for each in inputs if (name := _model_name(each))]
    data: dict[str, Any] = {}
    if models:
        data["base_model"] = list(dict.fromkeys(models))
        data["base_model_relation"] = "merge" if adapter is None else "adapter"
    data["library_name"] = (
        "peft" if adapter is not None else "transformers" if _is_transformers(base) else "pytorch"
    )
    data["tags"] = ["merge", "map-bo"]
    text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=1000)
    return f"---\n{text}---\n"


def _model_name(checkpoint: Checkpoint) -> str | None:
    """Return the name on the hub where it can be told, else the path, else nothing."""
    name = checkpoint.source.partition("@")[0].removeprefix("hf://")
    if not Path(checkpoint.source).is_absolute():
        return name if _HUB_ID.fullmatch(name) else None
    # The hub's own cache: models--organisation--name/snapshots/commit.
    for part in Path(checkpoint.source).parts:
        if part.startswith("models--") and part.count("--") == 2:
            return "/".join(part.split("--")[1:])
    return checkpoint.source


def _is_transformers(base: Checkpoint) -> bool:
    if base.directory is None:
        return False
    try:
        config = read_json(base.directory / "config.json")
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool({"model_type", "architectures"} & config.keys())


def _verdict(choice: object) -> Iterator[str]:
    """Yield the section on what the merge was compared with, where the record has any."""
    if not isinstance(choice, Mapping):
        return
    found = choice.get("verdict")
    confirmed = choice.get("confirmed")
    if isinstance(confirmed, Mapping):
        found = confirmed.get("verdict")
    lines = found.get("lines") if isinstance(found, Mapping) else None
    if not isinstance(lines, list | tuple) or not lines:
        return
    yield "## Verdict"
    yield "\n".join(f"- {_cell(line)}" for line in lines)
    if isinstance(confirmed, Mapping) and isinstance(table := confirmed.get("table"), list | tuple):
        head, *rows = table
        yield f"Measured on {_cell(confirmed.get('where'))}, beside what the search says:"
        yield _table([_cell(title) for title in head], rows)


def _trade_offs(choice: object) -> Iterator[str]:
    """Yield the section on metrics, where the record has any."""
    if not isinstance(choice, Mapping):
        return
    columns = {
        name: found
        for name in ("predicted", "predicted_lower", "predicted_upper", "corrected", "real")
        if isinstance(found := choice.get(name), Mapping)
    }
    metrics = list(dict.fromkeys(metric for column in columns.values() for metric in column))
    if not metrics:
        return

    def known(name: str) -> bool:
        return any(_is_number(value) for value in columns.get(name, {}).values())

    def row(metric: str) -> Iterator[object]:
        yield metric
        get = {name: column.get(metric) for name, column in columns.items()}
        yield get.get("predicted")
        if known("predicted_lower"):
            low, high = get.get("predicted_lower"), get.get("predicted_upper")
            yield f"{_number(low)} to {_number(high)}"
        if known("corrected"):
            yield get.get("corrected")
        yield get.get("real") if _is_number(get.get("real")) else "not measured"

    head = ["metric", "predicted"]
    head += ["95 % interval of the prediction"] if known("predicted_lower") else []
    head += ["predicted, corrected"] if known("corrected") else []
    head += ["measured"]
    yield "## Trade-offs"
    yield _table(head, (list(row(metric)) for metric in metrics))
    notes = "Predicted: by a surrogate fitted to the merges that the search measured."
    if known("corrected"):
        notes += " Corrected: by the surrogate refitted with the merges measured at the end."
    notes += " Measured: on this very merge."
    yield notes
    preference = choice.get("preference")
    if isinstance(preference, Mapping):
        given = {name: value for name, value in preference.items() if value}
        yield f"Chosen by the preference {_inline(given)}"
    said = choice.get("notes")
    for note in said if isinstance(said, list | tuple) else ():
        yield f"Note: {_cell(note)}"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None or _is_number(value):
        return _number(value)
    # Names are the user's: nothing in them may end a cell, a line or begin markup.
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|])", r"\\\1", text)


def _inline(data: Mapping[str, Any]) -> str:
    """Return settings as they are written in Python, other data as JSON."""
    text = json.dumps(data, ensure_ascii=False, default=str)
    if is_settings(data):
        given = (
            f"{name}={json.dumps(value, ensure_ascii=False, default=str)}"
            for name, value in data["fields"].items()
        )
        text = f"{name_of(data)}({', '.join(given)})"
    fence = "``" if "`" in text else "`"
    return f"{fence}{text}{fence}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) and _is_number(value) else "unknown"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
