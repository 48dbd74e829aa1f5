"""`map-bo check`, `repair`, `outcomes` and `cache`: what is on disk, is it whole, as a table."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from map_bo.errors import ConfigError, listed

if TYPE_CHECKING:
    from map_bo.tracking.side_file import Lost
    from map_bo.tracking.store import Event

__all__ = ["Verdict", "check", "repair", "show_cache", "verdict_of", "write_table"]


@dataclass(frozen=True)
class Verdict:
    """What can be read of a record.

    Attributes:
        lines: How many of its first lines are whole and fit each other.
        sealed: How many of these carry a checksum.
        holds: What they hold, in words.
        damage: What is wrong with the next line, or with the end of the record.
        unfinished: Bytes of a last line that was never finished.
        cut: Whether lines are missing at the end.
        lost: Outcomes of examples that these lines refer to and that are not there.
        loose: Bytes beside the record that no line refers to.
    """

    lines: int
    sealed: int
    holds: str
    damage: str | None
    unfinished: int
    cut: bool = False
    lost: tuple[Lost, ...] = ()
    loose: int = 0


def verdict_of(run: Path) -> Verdict:
    """Examine the record of a run: its lines, then what they say.

    Raises:
        StoreError: When there is no record, or it cannot be read at all.
    """
    from map_bo.errors import StoreError
    from map_bo.tracking.examine import examine
    from map_bo.tracking.jsonl import JsonlStore

    store = JsonlStore.open(run)
    try:
        found = examine(run / "events.jsonl")
    except OSError as error:
        raise StoreError(
            f"the record in {run} cannot be read: {error.strerror or error}",
            hint="make its files readable",
        ) from error
    events, lost, loose = store.examine_outcomes(found.events)
    count, holds, refusal = _replay(events)
    lost = [one for one in lost if one.line <= count]
    damage = None if found.damage is None else f"line {found.damage.number}: {found.damage.reason}"
    if refusal is not None:
        damage = f"line {count + 1}: {refusal}"
    # Of a run that was extended, an old summary may be left where it could not be removed.
    finished = any(event.kind in ("finished", "extended") for event in found.events)
    cut = damage is None and not finished and (run / "summary.json").exists()
    if cut:
        damage = "there is a summary.json, and the record does not end with the end of the run: "
        damage += "whole lines are missing at its end"
    if damage is None and lost:
        damage = _told(lost)
    sealed = max(0, found.link.sealed - (found.link.lines - count))
    return Verdict(count, sealed, holds, damage, found.unfinished, cut, tuple(lost), loose)


def _told(lost: Sequence[Lost]) -> str:
    """Return which outcomes are lost, in words."""
    first, more = lost[0], len(lost) - 1
    return (
        f"line {first.line}: the outcomes of the examples of {first.evaluator[:40]!r} are lost: "
        f"{first.reason}{f'; and {more} more' if more else ''}"
    )


def _replay(events: Sequence[Event]) -> tuple[int, str, str | None]:
    """Return how many events fit each other, what they hold, and what is wrong with the next."""
    from map_bo.loop.state import UNREADABLE, check_created, replay_whole
    from map_bo.space import CoefficientSpace
    from map_bo.tracking.codec import decode_metric

    if not events:
        return 0, "nothing", None
    try:
        if events[0].kind != "created":
            return 0, "nothing", f"a record begins with 'created', not {events[0].kind!r}"
        created = check_created(events[0].data)
        metrics = tuple(decode_metric(metric) for metric in created["metrics"])
        spaces = [created["space"], *(e.data["space"] for e in events if e.kind == "space")]
        space = CoefficientSpace.from_description(spaces[-1])
    except UNREADABLE as error:
        return 0, "nothing", f"it does not say what was run: {error!r}"
    state, count, refusal = replay_whole(events, metrics, space.d, partly=True)
    message = None if refusal is None else refusal.message
    if created.get("nested"):
        inner, wrong = _replay_nodes(events[:count])
        if wrong is not None:
            count, message = inner, wrong
        measured = sum(event.kind == "measured" for event in events[:count])
        return count, f"{measured} measurements of a nested run", message
    budget = state.created.get("settings", {}).get("budget", "?")  # the one in force
    done = len(state.outcomes) + len(state.verified)
    waiting = f", {len(state.pending)} more proposed" if state.pending else ""
    ended = "finished" if state.summary is not None else "not finished"
    return count, f"{done} of {budget} evaluations{waiting}, {ended}", message


def _replay_nodes(events: Sequence[Event]) -> tuple[int, str | None]:
    """Return how many events of a nested run fit each other, and what is wrong with the next."""
    from map_bo.loop.state import UNREADABLE, advance, replay
    from map_bo.nested.record import NODE, check_nested_event
    from map_bo.space import CoefficientSpace
    from map_bo.tracking.codec import decode_metric
    from map_bo.tracking.store import Event as Own

    states = {}
    for number, event in enumerate(events):
        try:
            check_nested_event(event)
            if event.kind != NODE:
                continue
            key, own = event.data["node"], Own(event.data["kind"], event.data["data"])
            if key not in states:
                about = own.data
                d = CoefficientSpace.from_description(about["space"]).d
                metrics = tuple(decode_metric(metric) for metric in about["metrics"])
                states[key] = replay([], metrics, d)
            states[key] = advance(states[key], own)
        except UNREADABLE as error:
            return number, f"an event of a node cannot be read: {error!r}"
    return len(events), None


def check(options: argparse.Namespace) -> None:
    """Print whether the record of a run is whole, and exit with 1 when it is not."""
    run = Path(options.run)
    verdict = verdict_of(run)
    sys.stdout.write(_described(run, verdict))
    if verdict.damage is not None:
        raise SystemExit(1)


def _described(run: Path, verdict: Verdict) -> str:
    said = [f"{run}: {'whole' if verdict.damage is None else 'damaged'}"]
    said.append(f"  whole lines: {verdict.lines} ({verdict.holds})")
    if verdict.sealed < verdict.lines:
        bare = verdict.lines - verdict.sealed
        covered = "; the checksum of the line after them covers them" if verdict.sealed else ""
        said.append(
            f"  of version 0.1, without a checksum of their own: {bare}{covered}"
            if verdict.sealed
            else f"  of version 0.1, without checksums: {bare}; a changed number cannot be seen"
        )
    if verdict.unfinished:
        said.append(
            f"  unfinished: {verdict.unfinished} bytes that a killed process left; the next "
            "`map-bo resume` cuts them off"
        )
    if verdict.loose:
        said.append(
            f"  {verdict.loose} bytes of outcomes beside the record belong to no line, as a killed "
            "process leaves them; they are passed over"
        )
    if verdict.damage is not None:
        said.append(f"  damage: {verdict.damage}")
        if verdict.lost:
            said.append(
                f"  `map-bo repair {run}` leaves out the outcomes of {_places(verdict.lost)} and "
                "keeps all values"
            )
        if not verdict.lines:
            said.append("  no line is whole, so nothing can be saved: restore it from a copy")
            return "\n".join(said) + "\n"
        if verdict.lost and verdict.damage == _told(verdict.lost):
            return "\n".join(said) + "\n"
        said.append(
            f"  `map-bo resume {run}` makes the missing evaluations again"
            if verdict.cut
            else f"  `map-bo repair {run}` keeps the whole lines and a copy of the file; then "
            f"`map-bo resume {run}` makes the other evaluations again"
        )
    return "\n".join(said) + "\n"


def _places(lost: Sequence[Lost]) -> str:
    """Return how many outcomes are lost, and whose, in words."""
    lines, names = len({one.line for one in lost}), dict.fromkeys(one.evaluator for one in lost)
    count = f"{lines} line{'s' if lines > 1 else ''}"
    return f"{count} ({listed([name[:40] for name in names], most=8)})"


def show_cache(options: argparse.Namespace) -> None:
    """Print what is in the cache of evaluations, or empty it."""
    from map_bo.problems.evaluation_cache import EvaluationCache

    cache = EvaluationCache(options.file)
    if options.file and not cache.path.is_file():
        raise ConfigError(
            f"there is no file {options.file}", hint="leave --file out for that of this user"
        )
    if options.clear:
        count = cache.clear()
        sys.stdout.write(f"removed {count} {'entry' if count == 1 else 'entries'}\n")
        return
    told = cache.describe()
    if options.json:
        sys.stdout.write(json.dumps(told, indent=1) + "\n")
        return
    total = sum(told["entries"].values())
    sys.stdout.write(f"{told['path']}: {total} entries, {told['bytes'] / 1e6:.1f} MB\n")
    if total:
        first, last = (
            time.strftime("%Y-%m-%d", time.localtime(told[end])) for end in ("oldest", "newest")
        )
        sys.stdout.write(
            f"measuring them took {told['seconds']:.0f} s in all, from {first} to {last}\n"
        )
    for name, count in told["entries"].items():
        sys.stdout.write(f"  {name}: {count}\n")


def repair(options: argparse.Namespace) -> None:
    """Keep the whole lines of a damaged record, and add lines that could not be written."""
    from map_bo.errors import StoreError
    from map_bo.tracking.jsonl import JsonlStore

    run = Path(options.run)
    verdict = verdict_of(run)
    store = JsonlStore.open(run)
    if verdict.damage is not None and (verdict.lost or not verdict.cut):
        if not verdict.lines:
            raise StoreError(
                f"no line of the record in {run} is whole ({verdict.damage})",
                hint="restore it from a copy",
            )
        copy = store.keep(verdict.lines, verdict.lost)
        sys.stdout.write(
            f"{verdict.lines} lines are kept ({verdict.holds}); the record as it was is in {copy}\n"
        )
        if verdict.lost:
            sys.stdout.write(
                f"the outcomes of examples in {_places(verdict.lost)} are lost and were left out; "
                "all values are kept\n"
            )
    elif options.append is None:
        sys.stdout.write(f"{run} needs no repair: {verdict.holds}\n")
    if options.append is not None:
        added = _append(store, Path(options.append))
        sys.stdout.write(f"{added} events were added to {run}\n")


def _append(store: object, file: Path) -> int:
    """Add events that were printed because they could not be written; all of them or none."""
    from map_bo.errors import StoreError
    from map_bo.tracking.codec import decode_event
    from map_bo.tracking.jsonl import JsonlStore

    assert isinstance(store, JsonlStore)
    try:
        lines = [line for line in file.read_bytes().splitlines() if line.strip()]
        events = [decode_event(line) for line in lines]
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, StoreError) as error:
        raise StoreError(
            f"{file} holds a line that is not an event: {error}",
            hint="give a file with the printed lines alone",
        ) from error
    with store.lock():
        before = list(store.read())
        events = store.restored(events)  # of a line that was written, and cut off since
        count, _, wrong = _replay([*before, *events])
        if wrong is not None or count < len(before) + len(events):
            raise StoreError(
                f"what {file} holds does not follow the record: {wrong}",
                hint="the run may have made these measurements again",
            )
        for event in events:
            store.append(event)
    return len(events)


def write_table(options: argparse.Namespace) -> None:
    """Write the outcome of every example in every evaluation of a run as a table."""
    from map_bo.errors import StoreError
    from map_bo.loop.reading import examples_of
    from map_bo.report.run.outcome_table import check_name, write_outcomes

    out = Path(options.out)
    check_name(out)  # first: before anything is read
    rows = examples_of(options.run)
    if not any(rows):
        raise StoreError(
            f"the record of {options.run} holds no outcomes of examples: its evaluators give one "
            "value per model, or it was made before they were kept",
            hint="see evaluations.csv in the run's directory for the values",
        )
    count = write_outcomes(rows, out)
    made = sum(map(bool, rows))
    sys.stdout.write(f"{count} outcomes of {made} evaluations written to {out}\n")
