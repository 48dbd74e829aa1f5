"""Where trained zoos are kept: one safetensors file per network, complete or not there at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from map_bo.cached import CACHE_VARIABLE, cache_root
from map_bo.cached import read_tensors as read_network
from map_bo.cached import write_tensors as write_network
from map_bo.errors import DataError

__all__ = [
    "CACHE_VARIABLE",
    "cache_root",
    "read_network",
    "trained_files",
    "training_shown",
    "write_network",
]

Report = Callable[[], None]


def trained_files(
    folder: Path, names: Sequence[str], train: Callable[[Mapping[str, Path]], None]
) -> dict[str, Path]:
    """Return name -> file in ``folder``; have missing or damaged ones trained, once.

    Two processes may ask at once: one trains, the other waits for it.

    Args:
        folder: Where the files are; its name should hold everything that they depend on.
        names: Names of the networks.
        train: Called under the folder's lock with the files of all ``names``; it writes those
            that :func:`read_network` does not read, with :func:`write_network`. It looks again
            which these are, as another process may have trained them meanwhile.

    Raises:
        DataError: When the folder cannot be written.
    """
    files = {name: folder / f"{name}.safetensors" for name in names}
    if any(read_network(path) is None for path in files.values()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):
                train(files)
        except OSError as error:
            raise DataError(
                f"trained experts cannot be kept in {folder}: {error.strerror or error}",
                hint=f"set {CACHE_VARIABLE} to a folder that can be written",
            ) from error
    return files


@contextmanager
def training_shown(
    steps: Mapping[str, int],
    *,
    progress: bool,
    doing: str = "training",
    done: str = "trained {count} networks, kept for later runs",
) -> Iterator[Callable[[str], Report]]:
    """Yield what to call when the training of a network starts; it returns what to call then.

    With ``progress``, that moves a bar on the error stream after every epoch.

    Args:
        steps: Name -> epochs, of the networks that will be trained.
        progress: Whether to show anything.
        doing: What is done to each network, in a word.
        done: What is shown at the end, with ``{count}`` for the number of networks.
    """
    if not progress or not steps:
        yield lambda name: lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(doing, total=sum(steps.values()))

        def start(name: str) -> Report:
            what = "the base" if name == "base" else f"expert {name}"
            bar.update(task, description=f"{doing} {what}", refresh=True)
            return lambda: bar.advance(task)

        yield start
        bar.update(task, description=done.format(count=len(steps)))
