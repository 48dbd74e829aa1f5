"""The study: which cells are run, in which order, on how many cores, and what is left to do."""

from __future__ import annotations

import dataclasses
import importlib
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.cells import Cell, Record, cell_path, digest, load, save
from benchmarks.quality.methods import TIERS, Method, matching, method, unavailable
from benchmarks.quality.protocol import Case, checkpoints, direct, run
from benchmarks.quality.tidy import Row, merge, read, recorded, records
from benchmarks.record import RESULTS
from map_bo.errors import MapBoError

__all__ = ["CASES", "Outcome", "Study"]

CASES = "benchmarks.quality.cases"
CACHE = Path(".bench_cache") / "quality"
_LEAST = 1.0  # seconds left below which no further cell is begun


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: ``done``, ``unfinished`` (out of time) or ``failed``."""

    status: str
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Study:
    """A grid of cases, methods and seeds.

    Attributes:
        cases: Names of cases.
        methods: Names of methods.
        seeds: Number of seeds, from 0.
        budget: Evaluations of each run.
        direct: Evaluations of the direct search for ground truth.
        jobs: Worker processes, one thread each; 0 runs in this process.
        deadline: Seconds after which nothing new is begun and runs stop at their next checkpoint.
        source: Module with ``case(name)`` and ``available(name)``; what a case's ``digest`` says
            is its version.
        cache: Folder of the cells.
        results: Folder of the merged table.
        retry: Whether cells that failed are run again.
    """

    cases: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int = 10
    budget: int = 120
    direct: int = 10_000
    jobs: int = 2
    deadline: float | None = None
    source: str = CASES
    cache: Path = CACHE
    results: Path = RESULTS
    retry: bool = False

    @property
    def table(self) -> Path:
        """The merged table."""
        return self.results / "quality.csv"

    @property
    def known(self) -> Path:
        """The best known of each case."""
        return self.results / "quality_known.json"

    def plan(self) -> tuple[list[Cell], dict[str, str]]:
        """Return all cells in the order they are run, and why some names are left out.

        First the ground truth and the core methods, then ablations, then the rest; within each,
        all methods and cases of one seed before the next seed, so that pairs complete early.
        """
        source = importlib.import_module(self.source)
        why = getattr(source, "available", lambda name: None)
        left_out = {name: reason for name in self.cases if (reason := why(name))}
        entries: list[Method] = []
        for entry in matching(self.methods):
            reason = unavailable(entry)
            if reason:
                left_out[entry.name] = reason
            else:
                entries.append(entry)
        cases = [case for case in self.cases if case not in left_out]
        refused = set()
        for case in cases:
            for entry in entries:
                reason = unavailable(entry, **_sizes(self.source, case), built=True)
                if reason:
                    refused.add((case, entry.name))
                    left_out[f"{entry.name} on {case}"] = reason
        cells = [
            Cell(case, entry.name, seed, self._budget(entry))
            for tier in TIERS
            for seed in range(self.seeds)
            for case in cases
            for entry in entries
            if entry.tier == tier and (case, entry.name) not in refused
        ]
        return cells, left_out

    def _budget(self, entry: Method) -> int:
        if entry.answer == "direct":
            return self.direct
        most = self.budget if entry.most_budget is None else min(self.budget, entry.most_budget)
        return checkpoints(most)[-1]

    def key(self, cell: Cell) -> str:
        """Return the digest of a cell."""
        return _key(cell, self.source, self.direct)

    def left(self, cells: Sequence[Cell], rows: Sequence[Row]) -> Iterator[Cell]:
        """Yield the cells that neither the table nor the cache holds whole."""
        reached = recorded(row for row in rows if not (self.retry and row["failure"]))
        for cell in cells:
            key = self.key(cell)
            if reached.get((cell.case, cell.method, cell.seed, key), 0) >= cell.budget:
                continue
            if not _is_whole(load(cell_path(self.cache, cell, key)), cell, retry=self.retry):
                yield cell

    def run(self, say: Callable[[str], None] = print) -> list[Row]:
        """Run what is left, merge everything into the table and return its rows."""
        cells, left_out = self.plan()
        for name, reason in left_out.items():
            say(f"left out: {name}: {reason}")
        todo = list(self.left(cells, read(self.table)))
        say(f"{len(cells)} cells, {len(cells) - len(todo)} of them done before")
        start, done, spent = time.monotonic(), 0, 0.0
        until = None if self.deadline is None else time.time() + self.deadline
        try:
            for cell, outcome in _executed(todo, self, until):
                done, spent = done + 1, spent + outcome.seconds
                rest = (len(todo) - done) * spent / done / max(self.jobs, 1)
                reason = f": {outcome.reason}" if outcome.reason else ""
                say(
                    f"[{done}/{len(todo)}] {cell.case} | {cell.method} | seed {cell.seed} | "
                    f"{outcome.status} in {outcome.seconds:.1f} s{reason} | about "
                    f"{_clock(rest)} left"
                )
        finally:
            rows = self.gather()
            say(f"{len(rows)} rows in {self.table} after {_clock(time.monotonic() - start)}")
        return rows

    def gather(self) -> list[Row]:
        """Merge all cells of the cache that are of the present settings into the table."""
        found = []
        for record in records(self.cache):
            about = record.about
            cell = Cell(about["case"], about["method"], about["seed"], about["budget"])
            try:
                current = _key(cell, self.source, self.direct)
            except (MapBoError, ImportError, AttributeError):
                continue  # a method of another version
            if about["digest"] == current:
                found.append(record)
        return merge(self.table, self.known, found)


def work(cell: Cell, study: Study, until: float | None) -> Outcome:
    """Run one cell as far as time allows, saving at every checkpoint; never raise an error of it.

    Args:
        cell: The cell.
        study: Where cases come from and records go to.
        until: Time (of ``time.time``) after which it stops at its next checkpoint.
    """
    start = time.perf_counter()
    entry, key = method(cell.method), study.key(cell)
    path = cell_path(study.cache, cell, key)
    record = load(path)
    if record is not None:  # it may have failed before, and is tried again
        told = {name: value for name, value in record.about.items() if name != "failure"}
        record = dataclasses.replace(record, about=told)
    about = _about(cell, study)
    status, reason = "done", ""
    try:
        case = _case(study.source, cell.case)
        about |= {"family": case.family, "real_models": case.real_models}
        about |= {"d": case.problem.space.d, "m": len(case.problem.metrics)}
        if entry.answer == "direct":
            found = direct(case, cell.seed, study.direct)
            record = dataclasses.replace(found, about={**found.about, **about})
            save(path, record)
        else:
            for found in run(case, entry, cell.seed, cell.budget, record):
                record = dataclasses.replace(found, about={**found.about, **about})
                save(path, record)
                if until is not None and time.time() >= until:
                    break
            if not _is_whole(record, cell):
                status = "unfinished"
    except Exception as error:  # whatever it is, it is this cell's outcome and nobody else's
        status, reason = "failed", f"{type(error).__name__}: {error}"
        record = record or Record({})
        save(path, dataclasses.replace(record, about={**record.about, **about, **_failed(reason)}))
    return Outcome(status, time.perf_counter() - start, reason)


def _about(cell: Cell, study: Study) -> dict[str, Any]:
    return {
        "case": cell.case,
        "version": _version(study.source, cell.case),
        "method": cell.method,
        "seed": cell.seed,
        "digest": study.key(cell),
        "target": cell.budget,
    }


def _failed(reason: str) -> dict[str, Any]:
    return {"failure": reason, "budget": 0}


def _is_whole(record: Record | None, cell: Cell, *, retry: bool = False) -> bool:
    """Return whether a cell needs no more work: it got to its budget, or failed on the way."""
    if record is None:
        return False
    if record.about.get("failure"):
        return not retry and bool(record.about["target"] <= cell.budget)
    return bool(record.about["budget"] >= cell.budget)


def _executed(
    cells: Sequence[Cell], study: Study, until: float | None
) -> Iterator[tuple[Cell, Outcome]]:
    """Yield cells as they end, begun in order; a worker that dies takes no other cell with it."""

    def in_time() -> bool:
        return until is None or time.time() + _LEAST < until

    waiting = list(reversed(cells))
    if study.jobs == 0:
        while waiting and in_time():
            cell = waiting.pop()
            yield cell, work(cell, study, until)
        return
    suspects: list[Cell] = []
    while waiting and in_time():
        running: dict[Future[Outcome], Cell] = {}
        with _pool(study.jobs) as pool:
            try:
                while (waiting and in_time()) or running:
                    while waiting and in_time() and len(running) < study.jobs:
                        cell = waiting.pop()
                        running[pool.submit(work, cell, study, until)] = cell
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        outcome = future.result()
                        yield running.pop(future), outcome
            except BrokenProcessPool:
                suspects += running.values()
        # One of the cells that ran killed its worker. Alone, each shows whether it was the one.
        for cell in suspects:
            yield cell, _alone(cell, study, until)
        suspects = []


def _alone(cell: Cell, study: Study, until: float | None) -> Outcome:
    with _pool(1) as pool:
        try:
            return pool.submit(work, cell, study, until).result()
        except BrokenProcessPool:
            reason, key = "the worker process died", study.key(cell)
            path = cell_path(study.cache, cell, key)
            record = load(path) or Record({})
            about = {**record.about, **_about(cell, study), **_failed(reason)}
            save(path, dataclasses.replace(record, about=about))
            return Outcome("failed", 0.0, reason)


def _pool(jobs: int) -> ProcessPoolExecutor:
    # Libraries read the number of threads when they are imported, before any initialiser runs.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_single_thread)


def _single_thread() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # libraries warn about what the record shows


@lru_cache(maxsize=64)
def _case(source: str, name: str) -> Case:
    made: Case = importlib.import_module(source).case(name)
    return made


def _key(cell: Cell, source: str, evaluations: int) -> str:
    return _digest(cell.method, cell.case, _version(source, cell.case), evaluations)


@lru_cache(maxsize=256)
def _version(source: str, name: str) -> str:
    """Return what tells a case from its former versions; one that cannot be made has none."""
    try:
        return str(getattr(_case(source, name), "digest", ""))
    except Exception:  # its cells say why
        return ""


def _sizes(source: str, name: str) -> dict[str, int]:
    try:
        problem = _case(source, name).problem
    except Exception:  # its cells say why
        return {}
    return {"metrics": len(problem.metrics), "d": problem.space.d}


@lru_cache(maxsize=4096)
def _digest(name: str, case: str, version: object, evaluations: int) -> str:
    return digest(method(name), case, version, direct=evaluations)


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
