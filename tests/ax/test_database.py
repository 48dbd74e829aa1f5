from __future__ import annotations

import os
import sqlite3
import sys
from pathlib import Path

import pytest

from map_bo.ax import database
from map_bo.ax.database import experiment_names, read_experiment, write_experiment
from map_bo.ax.experiment import experiment_of
from map_bo.errors import MissingDependencyError, StoreError
from tests.ax.exported import exported, storage, unfinished


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "run"
    unfinished(directory)
    return directory


def test_a_file_holds_the_experiment_and_is_an_ordinary_one(run: Path, tmp_path: Path) -> None:
    file = exported(run, tmp_path / "what? #1.db")
    assert os.listdir(tmp_path) == ["what? #1.db"]
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert experiment_names(file) == ["run"]
    before = file.read_bytes()
    experiment = read_experiment(file)
    assert len(experiment.trials) == 8
    assert file.read_bytes() == before


def test_an_existing_file_is_never_touched(run: Path, tmp_path: Path) -> None:
    experiment = experiment_of(run)
    (tmp_path / "there.db").write_bytes(b"precious")
    (tmp_path / "link.db").symlink_to(tmp_path / "nowhere")
    for name in ("there.db", "link.db"):
        with pytest.raises(StoreError, match="exists and is not overwritten"):
            write_experiment(experiment, tmp_path / name)
    assert (tmp_path / "there.db").read_bytes() == b"precious"
    assert sorted(os.listdir(tmp_path)) == ["link.db", "there.db"]


def test_a_file_that_appears_meanwhile_is_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = database._save

    def slowly(experiment: object, temporary: Path, target: Path) -> None:
        save(experiment, temporary, target)  # type: ignore[arg-type]
        target.write_bytes(b"faster")

    monkeypatch.setattr(database, "_save", slowly)
    with pytest.raises(StoreError, match="exists"):
        exported(run, tmp_path / "ax.db")
    assert (tmp_path / "ax.db").read_bytes() == b"faster"
    assert os.listdir(tmp_path) == ["ax.db"]


def test_without_hard_links_it_is_renamed(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    exported(run, tmp_path / "ax.db")
    assert os.listdir(tmp_path) == ["ax.db"]
    assert len(read_experiment(tmp_path / "ax.db").trials) == 8


def test_what_fails_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ax.storage.sqa_store import save
    from sqlalchemy.exc import OperationalError

    def fail(experiment: object) -> None:
        raise OperationalError("INSERT", {}, sqlite3.OperationalError("disk is full"))

    monkeypatch.setattr(save, "save_experiment", fail)
    with pytest.raises(StoreError, match="disk is full"):
        exported(run, tmp_path / "ax.db")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("place", ["/proc/ax.db", "{here}/missing/ax.db", "{here}/file/ax.db"])
def test_a_place_that_cannot_be_written_is_told(run: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written") as caught:
        exported(run, Path(place.format(here=tmp_path)))
    assert caught.value.hint is not None


def test_what_is_no_database_of_ax_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("no database at all, but long enough to be one " * 20)
    (tmp_path / "empty.db").touch()
    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE other (name)")
    connection.close()
    for name in ("text.db", "empty.db", "other.db"):
        with pytest.raises(StoreError, match="is not a database of Ax"):
            read_experiment(tmp_path / name)
    for name in ("nowhere.db", "."):
        with pytest.raises(StoreError, match="there is no file"):
            read_experiment(tmp_path / name)
    assert not (tmp_path / "nowhere.db").exists()


def test_an_experiment_is_named_when_there_are_several(run: Path, tmp_path: Path) -> None:
    file = exported(run, tmp_path / "ax.db")
    with pytest.raises(StoreError, match="holds no experiment 'other'") as caught:
        read_experiment(file, "other")
    assert "run" in str(caught.value.hint)
    with storage(file) as url:
        from ax.api.configs import StorageConfig

        from tests.ax.exported import own_client

        own_client(storage_config=StorageConfig(url=url))
    assert experiment_names(file) == ["run", "native"]
    with pytest.raises(StoreError, match="holds 2 experiments") as caught:
        read_experiment(file)
    assert caught.value.hint == "name one of them: run, native"
    assert read_experiment(file, "native").name == "native"
    with sqlite3.connect(file) as connection:
        connection.execute("DELETE FROM experiment_v2")
    connection.close()
    with pytest.raises(StoreError, match="holds 0 experiments"):
        read_experiment(file)


def test_what_ax_cannot_decode_is_told(run: Path, tmp_path: Path) -> None:
    file = exported(run, tmp_path / "ax.db")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE parameter_v2 SET domain_type = 77")
    connection.close()
    with pytest.raises(StoreError, match="cannot be read"):
        read_experiment(file)


def test_the_database_of_the_process_stays_what_it_was(run: Path, tmp_path: Path) -> None:
    from ax.storage.sqa_store import db

    first = exported(run, tmp_path / "first.db")
    with storage(first):
        db.init_engine_and_session_factory(url=f"sqlite:///{first}")
        before = db.SESSION_FACTORY
        read_experiment(exported(run, tmp_path / "second.db"))
        assert db.SESSION_FACTORY is before


@pytest.mark.parametrize("missing", ["sqlalchemy", "tabulate"])
def test_a_missing_extra_is_told(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    experiment, file = experiment_of(run), exported(run, tmp_path / "ax.db")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingDependencyError, match="needs SQLAlchemy and tabulate") as caught:
        write_experiment(experiment, tmp_path / "new.db")
    assert caught.value.hint == 'pip install "map-bo[ax-sql]"'
    with pytest.raises(MissingDependencyError):
        read_experiment(file)
    assert os.listdir(tmp_path) == ["ax.db"]
