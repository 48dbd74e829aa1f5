"""Any number of changed files, and what escaped of their readers."""

from __future__ import annotations

import logging
import shutil
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from time import process_time
from unittest.mock import patch

from map_bo.errors import MapBoError
from tests.fuzz.readers import READERS, changed, seeds

__all__ = ["escape", "quiet", "run"]

SLOW = 5.0
"""Seconds after which a reader counts as hanging."""


def escape(name: str, seed: Path, random: Random, keep: Path | None = None) -> str | None:
    """Let a reader read a changed file; return what it raised outside of the family, if it did."""
    reader = READERS[name]
    with tempfile.TemporaryDirectory(dir=_memory()) as place:
        folder = Path(place)
        changed(reader, seed, folder, random)
        kept = (folder / reader.file).read_bytes()
        begun = process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader.read(folder)
        except MapBoError as error:
            said = None if error.message else "an error without a message"
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {error}"
        else:
            said = None
        if said is None and process_time() - begun > SLOW:
            said = f"took more than {SLOW} s"
        if said is not None and keep is not None:
            keep.mkdir(parents=True, exist_ok=True)
            shutil.copytree(folder, keep / f"{name}-{abs(hash(kept))}", dirs_exist_ok=True)
        return said


@contextmanager
def quiet() -> Iterator[None]:
    """Let nothing be logged for the block."""
    before = logging.root.manager.disable
    logging.disable()
    try:
        yield
    finally:
        logging.disable(before)


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def run(
    inputs: int, *, seed: int = 0, names: Collection[str] = (), keep: Path | None = None
) -> Iterator[tuple[str, Counter[str]]]:
    """Yield each reader and what escaped of it, after its share of the inputs."""
    chosen = list(names or READERS)
    for name in chosen:
        folders, found = seeds(name), Counter[str]()
        with patch("os.fsync", lambda descriptor: None), quiet():
            for number in range(-(-inputs // len(chosen))):
                random = Random(f"{seed} {name} {number}")
                said = escape(name, random.choice(folders), random, keep)
                if said is not None:
                    found[said[:300]] += 1
        yield name, found
