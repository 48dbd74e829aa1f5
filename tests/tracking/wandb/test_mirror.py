"""The mirror on wandb, offline for real: what it writes is read back from the file."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb as library
from torch import Tensor

from map_bo.errors import ConfigError
from map_bo.loop.optimize import optimize
from map_bo.loop.reading import load_result, load_state
from map_bo.loop.result import Result
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.wandb.mirror import Wandb, WandbMirror, default_mode
from tests.loop.bowls import Bowls, quick
from tests.tracking.wandb_reader import Recorded, ended, recorded, sessions

KEY = "0" * 40


def run(directory: Path, problem: Bowls | None = None, **changes: Any) -> Result:
    settings = quick(7)
    given: dict[str, Any] = {
        "sampler": settings.sampler,
        "surrogate": settings.surrogate,
        "solver": settings.solver,
        "verify": 2,
        "retries": 0,
        "progress": False,
        "tracking": ["local", "wandb"],
        "config": {"tree": {"seed": 0, "loop": {"budget": 7}}},
        **changes,
    }
    return optimize(problem or Bowls(noise=0.01), 7, run_dir=directory, **given)


def only(directory: Path) -> Recorded:
    (found,) = sessions(directory)
    return found


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name.startswith("map_bo")]
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]


def test_a_whole_run_is_mirrored(
    tmp_path: Path, no_account: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "map_bo")
    settings = Wandb("a project", group="sweep 3", job_type="study", tags=("x", "y"))
    result = run(tmp_path / "seed 0", tracking=[settings, "local"])
    told = only(tmp_path)
    assert told.identity == {
        "run_id": json.loads((tmp_path / "seed 0" / "wandb.json").read_text())["id"],
        "project": "a project",
        "run_group": "sweep 3",
        "job_type": "study",
        "display_name": "sweep 3-seed 0",
        "tags": ["x", "y"],
    }
    assert told.config["loop"] == {"budget": 7}
    assert told.config["run"]["settings"]["surrogate"]["class"].endswith(":Quadratic")
    assert told.config["run"]["space"]["names"] == ["a", "b"]
    # Every evaluation
    assert told.column("evaluation")[:5] == [1, 2, 3, 4, 5]
    for j, name in enumerate(result.space.names):
        assert told.column(f"coefficient/{name}") == result.seen.X[:, j].tolist()
    for j, metric in enumerate(result.metrics):
        assert told.column(f"metric/{metric.name}") == result.seen.Y[:, j].tolist()
        assert told.column(f"real/{metric.name}") == result.verification.Y[:, j].tolist()
    assert told.column("failed") == [0] * 5
    volumes = told.column("hypervolume/observed points")
    assert len(volumes) == 3  # base and both experts come first
    assert volumes[-1] == result.summary["hypervolume"]["observed points"]
    assert told.column("round") == [1, 2, 3, 4, 5]
    steps = told.column("_step")
    assert steps == sorted(set(steps))
    # What was recorded of the surrogate, and the end
    assert told.column("surrogate/validation/n") == [5]
    volume = result.summary["hypervolume"]["predicted front"]
    assert told.summary["hypervolume/predicted front"] == volume
    columns, rows = told.table("front")
    with (tmp_path / "seed 0" / "front.csv").open() as file:
        written = list(csv.DictReader(file))
    assert columns == list(written[0])
    for row, line in zip(rows, written, strict=True):
        assert row == [float(text) if text else None for text in line.values()]
    assert {"plots/front/path", "plots/progress/path"} <= {k for r in told.history for k in r}
    (files,) = [held for name, held in told.artifacts.items() if not name.endswith("-front")]
    assert {"events.jsonl", "front.csv", "summary.json", "report.html", "plots/front.png"} <= set(
        files
    )
    assert told.exit_code == 0
    assert warnings_of(caplog) == []
    assert "recorded offline; `wandb sync" in caplog.text


def test_the_run_is_the_same_with_and_without(tmp_path: Path, no_account: Path) -> None:
    plain, mirrored = run(tmp_path / "a", tracking="none"), run(tmp_path / "b", tracking="wandb")
    assert torch.equal(plain.seen.Y, mirrored.seen.Y)
    assert torch.equal(plain.front.X, mirrored.front.X)
    kinds = [[e.kind for e in JsonlStore.open(tmp_path / name).read()] for name in "ab"]
    assert kinds[0] == kinds[1]
    assert not (tmp_path / "b" / "report.html").exists()


class Interrupted(Bowls):
    """Someone presses Ctrl-C in the fourth evaluation."""

    def evaluate(self, X: Tensor, **given: Any) -> Any:
        if len(self.calls) == 3:
            raise KeyboardInterrupt
        return super().evaluate(X, **given)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "type": "Bowls"}


def test_going_on_continues_the_same_wandb_run(tmp_path: Path, no_account: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", Interrupted(noise=0.01))
    broken = only(tmp_path)
    assert broken.exit_code == 1
    assert broken.column("evaluation") == [1, 2, 3]
    result = run(tmp_path / "run")
    first, second = sorted(sessions(tmp_path), key=lambda told: told.column("_step")[0])
    assert first.identity["run_id"] == second.identity["run_id"]
    assert second.column("metric/near a") == result.seen.Y[3:, 0].tolist()
    assert second.exit_code == 0
    whole = first.column("_step") + second.column("_step")
    assert whole == sorted(set(whole))
    # A run that has ended is not begun again.
    run(tmp_path / "run")
    assert len(sessions(tmp_path)) == 2


def test_failures_and_a_prefix(tmp_path: Path, no_account: Path) -> None:
    problem = Bowls(fails=lambda number, x: "out of memory" if number == 2 else None)
    run(tmp_path, problem, tracking=Wandb(prefix="stage 1/"))
    told = only(tmp_path)
    assert told.column("stage 1/failed") == [0, 1, 0, 0, 0]
    assert len(told.column("stage 1/metric/near a")) == 4
    assert told.summary["stage 1/failures"] == 1
    assert not told.column("evaluation")


def test_a_run_in_memory_is_mirrored_too(
    tmp_path: Path, no_account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    settings = quick(7)
    optimize(
        Bowls(),
        7,
        progress=False,
        tracking="wandb",
        sampler=settings.sampler,
        surrogate=settings.surrogate,
        solver=settings.solver,
    )
    assert only(tmp_path).exit_code == 0


# What may go wrong


def test_a_refused_key_is_told_once_and_the_record_goes_offline(
    tmp_path: Path,
    no_account: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    run(tmp_path, tracking="wandb")
    (warning,) = warnings_of(caplog)
    assert "records offline; the run goes on" in warning
    assert "40" in warning
    assert "wandb login --relogin" in warning
    assert only(tmp_path).column("evaluation")[:5] == [1, 2, 3, 4, 5]


def test_without_a_network_the_record_goes_offline(
    tmp_path: Path,
    no_account: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run(tmp_path, tracking=Wandb(patience=1.0))
    (warning,) = warnings_of(caplog)
    assert "cannot go online and records offline" in warning
    assert only(tmp_path).exit_code == 0


def test_a_crash_of_wandb_costs_nothing(
    tmp_path: Path,
    no_account: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def crash(**given: Any) -> None:
        raise RuntimeError("its process has died")

    monkeypatch.setattr(library, "init", crash)
    result = run(tmp_path)
    assert len(result.front) > 0
    assert (tmp_path / "report.html").exists()
    assert warnings_of(caplog) == [
        "wandb is given up for this session; the run and its record go on: "
        "RuntimeError: its process has died"
    ]


def test_a_full_disk_costs_nothing(
    tmp_path: Path,
    no_account: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(self: WandbMirror, **changes: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(WandbMirror, "_keep", full)
    run(tmp_path)
    (warning,) = warnings_of(caplog)
    assert "No space left on device" in warning
    state, _ = load_state(tmp_path)
    assert state.summary is not None


def test_a_directory_that_cannot_be_written_costs_nothing(
    tmp_path: Path,
    no_account: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "file" / "below"))
    assert len(run(tmp_path / "run").front) > 0
    assert len(warnings_of(caplog)) <= 1


@pytest.mark.parametrize("content", ["{", "null", "[3]"])
def test_a_damaged_state_begins_a_new_wandb_run(
    tmp_path: Path, no_account: Path, content: str
) -> None:
    run(tmp_path, tracking="none")
    (tmp_path / "wandb.json").write_text(content)
    run(tmp_path, tracking="wandb")
    told = only(tmp_path)  # all that the record holds, though it was made without wandb
    assert told.column("metric/near a") == load_result(tmp_path).seen.Y[:, 0].tolist()
    assert told.exit_code == 0


# Settings


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_API_KEY": KEY}, "online"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "offline"),
        ({"WANDB_MODE": "online"}, "online"),
        ({"WANDB_MODE": "dryrun"}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_BASE_URL": "https://own.example:8080/"}, "online"),
        ({"WANDB_BASE_URL": "https://other.example"}, "offline"),
        ({"NETRC": "broken"}, "offline"),
    ],
)
def test_the_mode_goes_by_the_key(tmp_path: Path, environment: dict[str, str], mode: str) -> None:
    (tmp_path / "netrc").write_text("machine own.example login user password secret\n")
    (tmp_path / "broken").write_text("nonsense and more\n")
    path = tmp_path / environment.get("NETRC", "netrc")
    assert default_mode({**environment, "NETRC": str(path)}) == mode


def test_a_key_for_the_public_server(tmp_path: Path) -> None:
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert default_mode({"NETRC": str(tmp_path / "netrc")}) == "online"


def test_wrong_settings_are_told() -> None:
    with pytest.raises(ConfigError, match="disabled or null, got 'of'") as caught:
        Wandb(mode="of")  # type: ignore[arg-type]
    assert "online when there is a key" in str(caught.value.hint)
    with pytest.raises(ConfigError, match="patience must be positive, got 0"):
        Wandb(patience=0)


def test_the_reader_passes_over_a_torn_end(tmp_path: Path, no_account: Path) -> None:
    run(tmp_path, tracking="wandb")
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    whole = ended(path)
    path.write_bytes(path.read_bytes()[:-100])
    assert recorded(path).history[:5] == whole.history[:5]
