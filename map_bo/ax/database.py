"""Ax experiments in SQLite files, in Ax's own storage."""

from __future__ import annotations

import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from map_bo.errors import MissingDependencyError, StoreError
from map_bo.samplers.baselines.ax_library import import_ax, quiet

if TYPE_CHECKING:
    from ax.core.experiment import Experiment

__all__ = ["experiment_names", "read_experiment", "require_storage", "write_experiment"]


def require_storage() -> None:
    """Import what Ax's storage needs and does not declare.

    Raises:
        MissingDependencyError: When something is not installed.
    """
    try:
        import sqlalchemy  # noqa: F401
        import tabulate  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"Ax's storage needs SQLAlchemy and tabulate ({error})",
            hint='pip install "map-bo[ax-sql]"',
        ) from error
    import_ax("Ax's storage")


def write_experiment(experiment: Experiment, path: str | Path) -> Path:
    """Write ``experiment`` into a new SQLite file, which appears whole or not at all.

    Returns:
        The file.

    Raises:
        StoreError: When the file exists already, or cannot be written.
        MissingDependencyError: When the extra ``ax-sql`` is not installed.
    """
    require_storage()
    target = Path(path)
    if os.path.lexists(target):
        raise _exists(target)
    try:
        descriptor, name = tempfile.mkstemp(".tmp", f".{target.name}.", target.absolute().parent)
    except OSError as error:
        raise _unwritable(target, error.strerror or str(error)) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        _save(experiment, temporary, target)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)  # as any new file; a temporary one is the owner's alone
        _put(temporary, target)
    except OSError as error:
        raise _unwritable(target, error.strerror or str(error)) from error
    finally:
        for left in (name, f"{name}-journal"):
            with suppress(OSError):
                os.unlink(left)
    return target


def _save(experiment: Experiment, temporary: Path, target: Path) -> None:
    from sqlalchemy.exc import SQLAlchemyError

    with quiet():
        from ax.storage.sqa_store.db import create_all_tables, get_engine
        from ax.storage.sqa_store.save import save_experiment

        try:
            with _session(temporary, mode="rw"):
                create_all_tables(get_engine())
                save_experiment(experiment)
        except SQLAlchemyError as error:
            raise _unwritable(target, str(error).splitlines()[0]) from error


def _put(temporary: Path, target: Path) -> None:
    """Give the file its name, unless another file took that name meanwhile."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise _exists(target) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise _exists(target) from None
        temporary.rename(target)


def experiment_names(path: str | Path) -> list[str]:
    """Return the names of the experiments in a file, without Ax and without changing it.

    Raises:
        StoreError: When there is no such file, or it is not a database of Ax.
    """
    file = Path(path)
    if not file.is_file():
        raise StoreError(
            f"there is no file {file}", hint="name the SQLite file that Ax or map-bo wrote"
        )
    try:
        with closing(sqlite3.connect(_uri(file, "ro"), uri=True)) as connection:
            rows = connection.execute("SELECT name FROM experiment_v2 ORDER BY id").fetchall()
    except sqlite3.Error as error:
        raise StoreError(
            f"{file} is not a database of Ax: {error}",
            hint="name the SQLite file that Ax or map-bo wrote",
        ) from error
    return [str(row[0]) for row in rows]


def read_experiment(path: str | Path, name: str | None = None) -> Experiment:
    """Return an experiment from a SQLite file that Ax or :func:`write_experiment` wrote.

    Runners and the code of metrics are not loaded, nor is the generation strategy: what is left
    needs none of the user's own classes. The file is only read.

    Args:
        path: The file.
        name: Name of the experiment; may be left out when the file holds one.

    Raises:
        StoreError: When the file, or the experiment in it, cannot be read.
        MissingDependencyError: When the extra ``ax-sql`` is not installed.
    """
    names = experiment_names(path)
    if name is None and len(names) == 1:
        name = names[0]
    if name not in names:
        held = f"{len(names)} experiments" if name is None else f"no experiment {name!r}"
        raise StoreError(
            f"{path} holds {held}",
            hint=f"name one of them: {', '.join(names)}" if names else "name another file",
        )
    require_storage()
    with quiet():
        from ax.storage.sqa_store.load import load_experiment

        try:
            with _session(Path(path), mode="ro"):
                return load_experiment(name, reduced_state=True, skip_runners_and_metrics=True)
        except Exception as error:  # whatever Ax's decoder meets in a file of another version
            raise StoreError(
                f"experiment {name!r} in {path} cannot be read: {type(error).__name__}: {error}",
                hint="read it with the version of Ax, and the classes, that wrote it",
            ) from error


@contextmanager
def _session(path: Path, *, mode: str) -> Iterator[None]:
    """Let Ax, which knows one database for the whole process, work on this one for the block."""
    from ax.storage.sqa_store.db import get_engine, session_context
    from sqlalchemy.engine import URL

    url = URL.create("sqlite", database=_uri(path, mode), query={"uri": "true"})
    with session_context(url=url):  # type: ignore[arg-type]
        engine = get_engine()
        try:
            yield
        finally:
            engine.dispose()


def _uri(path: Path, mode: str) -> str:
    return f"file:{quote(str(path.absolute()))}?mode={mode}"


def _exists(target: Path) -> StoreError:
    return StoreError(
        f"{target} exists and is not overwritten", hint="name a new file, or remove that one"
    )


def _unwritable(target: Path, reason: str) -> StoreError:
    return StoreError(
        f"{target} cannot be written: {reason}",
        hint="name a file in a directory that exists and can be written",
    )
