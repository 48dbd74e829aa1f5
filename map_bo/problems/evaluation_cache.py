"""Evaluations kept across runs: what was measured once, by a key of all that it depends on.

The store is one SQLite file that any number of processes read and write. It has the rollback
journal, not a write-ahead log, which needs memory that is shared and so does not work on network
file systems. A connection lasts for one operation: none is inherited by another process, or open
while an evaluator runs.

A cache is a help and never a condition. A file that is damaged is set aside with a warning and
begun anew; one that cannot be opened, written or locked in time is left alone, with one warning.
An entry that is not what was written is as good as none.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import os
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import Tensor

from map_bo.cached import CACHE_VARIABLE, cache_root
from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.evaluator import Measurement

__all__ = ["EVALUATIONS_VARIABLE", "CachedMeasurements", "EvaluationCache", "read_cache"]

logger = logging.getLogger(__name__)

EVALUATIONS_VARIABLE = "MAP_BO_EVALUATIONS"
"""Environment variable: the file of the cache, or ``off``."""

_NAME = "evaluations-1.sqlite"  # the number is that of the format
_TIMEOUT = 10.0  # seconds to wait for another process
_AT_ONCE = 500  # keys of one query
_TABLE = (
    "CREATE TABLE IF NOT EXISTS evaluations (key TEXT PRIMARY KEY, evaluator TEXT NOT NULL, "
    "content TEXT NOT NULL, seal TEXT NOT NULL, time REAL NOT NULL) WITHOUT ROWID"
)

T = TypeVar("T")


@dataclass(frozen=True)
class CachedMeasurements:
    """What an evaluator measured on one merged model.

    Attributes:
        evaluator: What it was called, for people.
        metrics: The evaluator's own name of each metric -> its measurement.
        seconds: How long it took.
        outcomes: ``n x k`` outcomes of its examples in order, where it scores by example.
    """

    evaluator: str
    metrics: Mapping[str, Measurement]
    seconds: float
    outcomes: Tensor | None = None

    def _content(self) -> str:
        # Python writes the shortest digits that read back to the same float.
        rows = [[name, m.value, m.variance, m.count] for name, m in self.metrics.items()]
        outcomes = [] if self.outcomes is None else [_packed(self.outcomes)]
        return json.dumps([rows, self.seconds, *outcomes], allow_nan=False)

    @classmethod
    def _of(cls, evaluator: str, content: str) -> CachedMeasurements:
        rows, seconds, *outcomes = json.loads(content)
        metrics = {str(name): Measurement(*numbers) for name, *numbers in rows}
        if not metrics or not math.isfinite(seconds):
            raise ValueError("it holds nothing")
        return cls(evaluator, metrics, float(seconds), *map(_unpacked, outcomes[:1]))


class EvaluationCache:
    """A file of measurements by key.

    Args:
        path: The file; by default the environment variable ``MAP_BO_EVALUATIONS``, and otherwise
            one in :func:`~map_bo.cached.cache_root`. It is made when there is something to keep.
        timeout: Seconds to wait for another process that writes.
    """

    def __init__(self, path: str | Path | None = None, *, timeout: float = _TIMEOUT) -> None:
        chosen = path or os.environ.get(EVALUATIONS_VARIABLE)
        self.path = Path(chosen).expanduser() if chosen else cache_root() / _NAME
        self.timeout = timeout
        self._is_usable = True

    def __repr__(self) -> str:
        return f"EvaluationCache({str(self.path)!r})"

    def get(self, keys: Iterable[str]) -> dict[str, CachedMeasurements]:
        """Return what there is under some keys; nothing where the file cannot be read."""
        wanted = list(dict.fromkeys(keys))
        if not wanted or not self.path.exists():
            return {}

        def read(connection: sqlite3.Connection) -> list[tuple[str, str, str, str]]:
            found: list[tuple[str, str, str, str]] = []
            for start in range(0, len(wanted), _AT_ONCE):
                part = wanted[start : start + _AT_ONCE]
                marks = ", ".join("?" * len(part))
                found += connection.execute(
                    f"SELECT key, evaluator, content, seal FROM evaluations WHERE key IN ({marks})",
                    part,
                ).fetchall()
            return found

        entries: dict[str, CachedMeasurements] = {}
        nothing: list[tuple[str, str, str, str]] = []
        for key, evaluator, content, seal in self._try(read, nothing):
            with suppress(ValueError, TypeError, EvaluationError):
                if seal == _seal(key, content):
                    entries[key] = CachedMeasurements._of(evaluator, content)
        return entries

    def put(self, entries: Mapping[str, CachedMeasurements]) -> None:
        """Keep some entries, all of them or none; where that cannot be done, a warning says so."""
        now = time.time()
        rows = [
            (key, entry.evaluator, content, _seal(key, content), now)
            for key, entry in entries.items()
            for content in [entry._content()]
        ]

        def write(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(_TABLE)
            connection.executemany(
                "INSERT OR REPLACE INTO evaluations VALUES (?, ?, ?, ?, ?)", rows
            )
            connection.execute("COMMIT")

        if rows:
            self._try(write, None, writes=True)

    def describe(self) -> dict[str, Any]:
        """Return what is in the file.

        Returns:
            ``path``; ``bytes`` of the file; ``entries`` by evaluator; ``seconds`` that measuring
            them took; ``oldest`` and ``newest``, in seconds since the epoch, None without entries.
        """

        def read(connection: sqlite3.Connection) -> list[tuple[str, str, float]]:
            return connection.execute("SELECT evaluator, content, time FROM evaluations").fetchall()

        rows: list[tuple[str, str, float]] = []
        rows = self._try(read, rows) if self.path.exists() else rows
        entries: dict[str, int] = {}
        seconds = 0.0
        for evaluator, content, _ in rows:
            entries[evaluator] = entries.get(evaluator, 0) + 1
            with suppress(ValueError, TypeError, EvaluationError):
                seconds += CachedMeasurements._of(evaluator, content).seconds
        times = [when for _, _, when in rows]
        return {
            "path": str(self.path),
            "bytes": self.path.stat().st_size if self.path.exists() else 0,
            "entries": dict(sorted(entries.items())),
            "seconds": seconds,
            "oldest": min(times, default=None),
            "newest": max(times, default=None),
        }

    def clear(self) -> int:
        """Remove all entries; return how many there were."""

        def empty(connection: sqlite3.Connection) -> int:
            count = int(connection.execute("SELECT count(*) FROM evaluations").fetchone()[0])
            connection.execute("DELETE FROM evaluations")
            connection.execute("VACUUM")
            return count

        return self._try(empty, 0, writes=True) if self.path.exists() else 0

    def _connect(self, *, writes: bool) -> sqlite3.Connection:
        if writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        readable_only = not writes and not os.access(self.path, os.W_OK)
        mode = "rwc" if writes else "ro" if readable_only else "rw"
        connection = sqlite3.connect(
            f"{self.path.absolute().as_uri()}?mode={mode}",
            timeout=self.timeout,
            isolation_level=None,
            uri=True,
        )
        # Durable against the death of a process; what the loss of power may cost is measured anew.
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection

    def _try(
        self, work: Callable[[sqlite3.Connection], T], otherwise: T, *, writes: bool = False
    ) -> T:
        """Return what ``work`` does with a connection, or ``otherwise`` where it cannot be done."""
        if not self._is_usable:
            return otherwise
        for attempt in range(2):
            if attempt and not writes and not self.path.exists():  # it was set aside
                return otherwise
            try:
                with closing(self._connect(writes=writes)) as connection:
                    return work(connection)
            except sqlite3.OperationalError as error:
                if "no such table" in str(error):  # it is empty so far
                    return otherwise
                if "no such column" not in str(error) and "values were supplied" not in str(error):
                    return self._give_up(error, otherwise)
                if attempt or not self._set_aside(error):
                    return self._give_up(error, otherwise)
            except sqlite3.DatabaseError as error:
                if attempt or not self._set_aside(error):
                    return self._give_up(error, otherwise)
            except OSError as error:
                return self._give_up(error, otherwise)
        return otherwise

    def _give_up(self, error: Exception, otherwise: T) -> T:
        self._is_usable = False
        reason = error.strerror if isinstance(error, OSError) else str(error)
        logger.warning(
            "the cache of evaluations %s cannot be used (%s), and everything is measured; set %s "
            "to a file that can be written, or %s to such a folder",
            self.path,
            reason,
            EVALUATIONS_VARIABLE,
            CACHE_VARIABLE,
        )
        return otherwise

    def _set_aside(self, error: Exception) -> bool:
        """Move a damaged file away, once for all processes that find it; return whether it is."""
        try:
            with FileLock(f"{self.path}.lock", timeout=self.timeout):
                if self._is_sound():  # another process has been here
                    return True
                aside = self.path.with_name(
                    f"{self.path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
                )
                # The journal first: it must not be applied to the file that comes next.
                journal = self.path.with_name(f"{self.path.name}-journal")
                if journal.exists():
                    journal.replace(aside.with_name(f"{aside.name}-journal"))
                self.path.replace(aside)
        except (OSError, Timeout):
            return False
        logger.warning(
            "the cache of evaluations %s is damaged (%s); it is set aside as %s, and a new one is "
            "begun",
            self.path,
            error,
            aside.name,
        )
        return True

    def _is_sound(self) -> bool:
        if not self.path.exists():
            return True
        try:
            with closing(self._connect(writes=False)) as connection:
                said = connection.execute("PRAGMA quick_check(1)").fetchone()
                columns = connection.execute("PRAGMA table_info(evaluations)").fetchall()
        except sqlite3.Error:
            return False
        return said == ("ok",) and len(columns) in (0, 5)


def read_cache(given: object) -> EvaluationCache | None:
    """Return the cache that a user asks for; None where evaluations are not to be kept.

    Args:
        given: True (or None) for that of the user, False for none, the path of a file, or a cache.
            Where the environment variable ``MAP_BO_EVALUATIONS`` is ``off``, that of the user is
            none.

    Raises:
        ConfigError: When it is none of these.
    """
    if isinstance(given, EvaluationCache):
        return given
    if given is False:
        return None
    if given is None or given is True:
        said = os.environ.get(EVALUATIONS_VARIABLE, "").strip().lower()
        return None if said in ("off", "0", "false", "no") else EvaluationCache()
    if isinstance(given, str | Path) and str(given).strip():
        return EvaluationCache(given)
    raise ConfigError(
        f"cache must be true, false or the path of a file, got {given!r:.80}",
        hint="cache=false measures everything anew",
    )


def _seal(key: str, content: str) -> str:
    """Return a checksum of an entry."""
    return hashlib.sha256(f"{key} {content}".encode()).hexdigest()[:16]


def _packed(outcomes: Tensor) -> list[Any]:
    """Return outcomes as plain data: bits where all are 0 or 1, else float64, without loss."""
    values = outcomes.detach().double().cpu().contiguous().numpy()
    bits = bool(((values == 0) | (values == 1)).all())
    content = np.packbits(values.astype(bool)).tobytes() if bits else values.tobytes()
    return ["bits" if bits else "float64", *values.shape, base64.b64encode(content).decode()]


def _unpacked(packed: Sequence[Any]) -> Tensor:
    """Return outcomes, ``n x k``, float64.

    Raises:
        ValueError: When it is something else.
    """
    form, n, k, text = packed
    content = np.frombuffer(base64.b64decode(text), dtype=np.uint8)
    if form == "bits":
        values = np.unpackbits(content, count=n * k).astype(np.float64)
    elif form == "float64":
        values = content.copy().view(np.float64)
    else:
        raise ValueError(f"outcomes are written as {form!r}")
    return torch.from_numpy(values.reshape(n, k))
