"""From cells to one tidy table: one row per case, method, seed and number of evaluations.

``quality.csv`` holds the rows, ``quality_known.json`` the best that is known on each case. Both are
enough for every table, plot and claim; the cells, which hold the answers themselves, are not
committed. Shares and regrets follow from both files, so they stay right when somebody finds more;
IGD+ and win rates need the answers and are worked out again whenever these are at hand.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.cells import Checkpoint, Record, load
from benchmarks.quality.scoring import Known, best_attained, front_of, weights_of
from map_bo.errors import DataError
from map_bo.pareto.indicators import win_rate_dominance, win_rate_per_objective

__all__ = ["COLUMNS", "Row", "merge", "read", "recorded", "records", "write"]

Row = dict[str, Any]
_TEXT = ("case", "family", "method", "version", "digest", "failure")
_WHOLE = ("real_models", "d", "m", "seed", "evaluations", "points", "exact")
_NUMBERS = (
    "hypervolume",
    "share",
    "igd_plus",
    "utility",
    "regret",
    "utility_solved",
    "regret_solved",
    "optimism",
    "coverage",
    "wins_default",
    "dominates_default",
    "wins_random",
    "dominates_random",
    "propose_s",
    "fit_s",
    "solve_s",
)
COLUMNS: tuple[str, ...] = (
    *("case", "family", "real_models", "d", "m", "method", "seed", "evaluations", "points"),
    *("hypervolume", "exact"),
    *_NUMBERS[1:],
    *("version", "digest", "failure"),
)
_OPPONENTS = ("default", "random")


def read(path: Path) -> list[Row]:
    """Return the rows of a table; none when there is no file. Empty numbers are ``None``.

    Raises:
        DataError: When the columns are not those of this version.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise DataError(
                f"{path} has other columns than this version writes",
                hint="move it away and run the study again",
            )
        return [{name: _parsed(name, text) for name, text in row.items()} for row in reader]


def _parsed(name: str, text: str) -> Any:
    if name in _TEXT:
        return text
    if not text:
        return None
    return int(text) if name in _WHOLE else float(text)


def _written(name: str, value: Any) -> str:
    if value is None or value != value:
        return ""
    if name in _TEXT:
        return " ".join(str(value).split())
    return str(int(value)) if name in _WHOLE else f"{float(value):.5g}"


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write a table, sorted; the file is whole at every moment."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in sorted(rows, key=_place):
        writer.writerow([_written(name, row.get(name)) for name in COLUMNS])
    _replace(path, text.getvalue())


def _place(row: Row) -> tuple[Any, ...]:
    return row["case"], row["method"], row["seed"], row["evaluations"]


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    scratch.write_text(text)
    os.replace(scratch, path)


def records(root: Path) -> list[Record]:
    """Return the records of all cells under a folder."""
    return [record for path in sorted(root.glob("*/*.npz")) if (record := load(path)) is not None]


def recorded(rows: Iterable[Row]) -> dict[tuple[str, str, int, str], int]:
    """Return how far each case, method, seed and digest is recorded, in evaluations."""
    reached: dict[tuple[str, str, int, str], int] = {}
    for row in rows:
        key = row["case"], row["method"], row["seed"], row["digest"]
        reached[key] = max(reached.get(key, 0), row["evaluations"])
    return reached


def merge(table: Path, known: Path, found: Iterable[Record]) -> list[Row]:
    """Bring records into the table and the best known up to date; return all rows.

    Rows of a case, method and seed that were measured with other settings give way to the new
    ones, and so does all of a case in another version.

    Args:
        table: The CSV file.
        known: The JSON file with the best known of each case.
        found: Records of cells; of two digests of the same cell the later one in this order wins.
    """
    by_cell = {(r.about["case"], r.about["method"], r.about["seed"]): r for r in found}
    versions = {record.about["case"]: record.about["version"] for record in by_cell.values()}
    kept = [row for row in read(table) if _stays(row, by_cell, versions)]
    fresh = [row for record in by_cell.values() for row in _rows(record)]
    present = {_place(row) for row in fresh}
    rows = [*(row for row in kept if _place(row) not in present), *fresh]
    before = json.loads(known.read_text()) if known.exists() else {}
    cases: dict[str, list[Record]] = defaultdict(list)
    for record in by_cell.values():
        cases[record.about["case"]].append(record)
    after: dict[str, Any] = {}
    for case in sorted({row["case"] for row in rows}):
        own = [row for row in rows if row["case"] == case]
        version = own[0]["version"]
        past = before.get(case, {})
        best = _best_known(own, cases.get(case, []), past if past.get("version") == version else {})
        for row in own:
            _complete(row, best)
        _compare(own, cases.get(case, []), best)
        after[case] = {
            "version": version,
            "hypervolume": best.hypervolume,
            # Rounded down, so that what is known never exceeds what was found.
            "best": {
                str(seed): [math.floor(value * 1e6) / 1e6 for value in values.tolist()]
                for seed, values in sorted(best.best.items())
            },
        }
    write(table, rows)
    _replace(known, json.dumps(after, indent=0) + "\n")
    return sorted(rows, key=_place)


def _stays(
    row: Row, by_cell: Mapping[tuple[str, str, int], Record], versions: Mapping[str, str]
) -> bool:
    if versions.get(row["case"], row["version"]) != row["version"]:
        return False
    record = by_cell.get((row["case"], row["method"], row["seed"]))
    return record is None or record.about["digest"] == row["digest"]


def _rows(record: Record) -> list[Row]:
    about = {
        name: record.about.get(name)
        for name in ("case", "family", "real_models", "d", "m", "method", "seed")
    }
    about |= {name: record.about[name] for name in ("version", "digest")}
    rows: list[Row] = [
        {**about, "evaluations": n, **answer.numbers, "failure": answer.failure or ""}
        for n, answer in record.checkpoints.items()
    ]
    if record.about.get("failure"):
        rows.append(
            {
                **about,
                "evaluations": record.about["target"],
                "failure": record.about["failure"],
            }
        )
    return rows


def _parts(record: Record) -> Iterable[Tensor]:
    for answer in record.checkpoints.values():
        yield answer.real
        yield answer.chosen
        if answer.solved is not None:
            yield answer.solved


def _best_known(rows: list[Row], found: list[Record], before: Mapping[str, Any]) -> Known:
    volumes = [row["hypervolume"] for row in rows if row.get("hypervolume") is not None]
    volume = max([*volumes, before.get("hypervolume", 0.0)])
    best = {int(s): torch.tensor(b, dtype=torch.float64) for s, b in before.get("best", {}).items()}
    if not any(len(part) for record in found for part in _parts(record)):
        return Known(volume, best)
    everything = torch.cat([part for record in found for part in _parts(record) if len(part)])
    for seed in {row["seed"] for row in rows} | set(best):
        now = best_attained(everything, weights_of(seed, everything.shape[-1]))
        best[seed] = torch.maximum(best[seed], now) if seed in best else now
    analytic = [record.front for record in found if record.front is not None]
    front = analytic[0] if analytic else front_of([everything])
    return Known(volume, best, front)


def _complete(row: Row, best: Known) -> None:
    if row.get("hypervolume") is None:
        return
    row["share"] = best.share(row["hypervolume"])
    if row["seed"] in best.best:
        row["regret"] = best.regret(row["seed"], row["utility"])
        if row.get("utility_solved") is not None:
            row["regret_solved"] = best.regret(row["seed"], row["utility_solved"])


def _compare(rows: list[Row], found: list[Record], best: Known) -> None:
    """Fill in what needs the answers themselves: IGD+ and both win rates."""
    answers: dict[tuple[str, int, int], Checkpoint] = {
        (record.about["method"], record.about["seed"], n): answer
        for record in found
        for n, answer in record.checkpoints.items()
        if answer.failure is None
    }
    for row in rows:
        seed, n = row["seed"], row["evaluations"]
        own = answers.get((row["method"], seed, n))
        if own is None:
            continue
        row["igd_plus"] = best.distance(own.real)
        for name in _OPPONENTS:
            other = answers.get((name, seed, n))
            if other is not None and name != row["method"]:
                row[f"wins_{name}"] = win_rate_per_objective(own.real, other.real)
                row[f"dominates_{name}"] = win_rate_dominance(own.real, other.real)
