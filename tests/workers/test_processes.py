from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import map_bo
from map_bo.errors import ConfigError, WorkersError
from map_bo.loop.reading import load_state
from map_bo.problems.problem import Problem
from map_bo.tracking.jsonl import MemoryStore
from map_bo.workers import processes
from map_bo.workers.child import Place
from map_bo.workers.processes import Processes, ProcessWorkers
from map_bo.workers.recipe import Recipe
from map_bo.workers.slot import Slot
from tests.contracts.workers_contract import IsolationContract, result, task
from tests.loop.bowls import quick
from tests.workers.troubled import Troubled, Unbuildable, make_troubled

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def opened() -> Iterator[ProcessWorkers]:
    workers = Processes(2, threads=1).open(Troubled())
    yield workers
    workers.close()


class TestProcesses(IsolationContract):
    @pytest.fixture
    def workers(self, opened: ProcessWorkers) -> ProcessWorkers:
        return opened

    def test_the_name_of_a_worker_leads_to_its_process(self, opened: ProcessWorkers) -> None:
        assert 1 <= len(opened.processes()) <= 2
        host, pid = result(opened, task()).worker.split("/")
        assert int(pid) in opened.processes()
        assert host

    def test_what_is_evaluated_is_shown(self, opened: ProcessWorkers) -> None:
        until = time.monotonic() + 60
        ready: set[str] = set()  # another test may have killed one of them
        while len(ready) < 2 and time.monotonic() < until:
            ready |= {f.result().worker for f in [opened.submit(task()) for _ in range(2)]}
        futures = [opened.submit(task(row, "sleep", timeout=0.5)) for row in range(3)]
        shown = opened.running()
        while len(shown) < 2 and time.monotonic() < until:
            time.sleep(0.1)
            shown = opened.running()
        assert len({name for name, _, _ in shown}) == 2
        assert len({one.row for _, one, _ in shown}) == 2
        assert all(0 <= seconds < 2 for _, _, seconds in shown)
        assert all("longer" in (f.result().observations.failures[0] or "") for f in futures)

    def test_an_interrupt_of_the_evaluator_s_own_costs_its_row_alone(
        self, opened: ProcessWorkers
    ) -> None:
        assert result(opened, task(1, "interrupt")).observations.failures == ("KeyboardInterrupt",)

    def test_an_interrupt_from_the_terminal_leaves_workers_alone(
        self, opened: ProcessWorkers
    ) -> None:
        for pid in opened.processes():
            os.kill(pid, signal.SIGINT)
        assert result(opened, task()).observations.failures == (None,)

    def test_a_run_is_the_same_as_in_the_drivers_own_process(self, opened: ProcessWorkers) -> None:
        def run(asynchronous: bool | None, workers: ProcessWorkers | None) -> map_bo.Result:
            settings = quick(budget=5, batch=2, asynchronous=asynchronous)
            return map_bo.Run(Troubled(), settings, MemoryStore()).drive(workers=workers)

        mine, theirs = run(False, None), run(False, opened)
        assert torch.equal(mine.seen.X, theirs.seen.X)
        assert torch.equal(mine.seen.Y.nan_to_num(), theirs.seen.Y.nan_to_num())
        assert torch.equal(mine.front.X, theirs.front.X)


@pytest.mark.parametrize("count", [0, -1, 2.5, 5000, "many"])
def test_an_impossible_count_is_refused(count: object) -> None:
    with pytest.raises(ConfigError, match="count must be"):
        Processes(count)  # type: ignore[arg-type]


def test_more_processes_than_there_is_memory_for_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("map_bo.workers.processes.available_bytes", lambda: 10**9)
    with pytest.raises(ConfigError, match=r"1000 processes take 134 GB .* 1 GB left") as caught:
        Processes(1000).open(Troubled())
    assert "at most 7 workers" in str(caught.value.hint)


def test_settings_that_are_not_possible_are_refused() -> None:
    with pytest.raises(ConfigError, match="'gpu' is not a device"):
        Processes(2, devices=["gpu"])
    with pytest.raises(ConfigError, match="devices is empty"):
        Processes(2, devices=[])
    with pytest.raises(ConfigError, match="threads must be"):
        Processes(2, threads=0)
    with pytest.raises(map_bo.MapBoError, match="memory"):
        Processes(2, memory="much")


def test_a_device_that_is_not_there_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="no device cuda:7 on this machine: it has 1 of CUDA"):
        Processes(2, devices=["cuda:0", "cuda:7"]).open(Troubled())


def test_workers_take_devices_in_turn_and_see_theirs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    places = []

    class Caught(Exception):
        pass

    def caught(given: list[Place], *_: object, **__: object) -> None:
        places.extend(given)
        raise Caught

    monkeypatch.setattr(processes, "ProcessWorkers", caught)
    with pytest.raises(Caught):
        Processes(3, devices=["cuda:0", "cuda:1"], threads=2).open(Troubled())
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in places] == ["4", "6", "4"]
    assert [place.sharing for place in places] == [2, 1, 2]
    assert [place.label for place in places] == ["cuda:0", "cuda:1", "cuda:0"]
    assert {place.device for place in places} == {"cuda:0"}
    assert {place.threads for place in places} == {2}


def test_a_problem_that_cannot_travel_is_refused_before_anything_starts() -> None:
    problem = Troubled()
    problem.held = lambda: 1  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="a lambda"):
        Processes(2).open(problem)
    with pytest.raises(ConfigError, match=r"'tests\.nowhere:make' cannot be imported"):
        Processes(2, factory="tests.nowhere:make").open(problem)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("raise", "cannot be built in a worker: RuntimeError: no such layer"),
        ("set-up", "cannot be prepared in a worker: the checkpoint does not fit"),
        ("segfault", r"died: signal 11 \(SIGSEGV\) before it was ready"),
        ("leave with 0", "exit code 0: it left with os._exit before it was ready"),
    ],
)
def test_a_problem_that_cannot_be_built_there_ends_the_start(trouble: str, words: str) -> None:
    with pytest.raises(WorkersError, match=words):
        Processes(1).open(Unbuildable(trouble))


@pytest.mark.slow
def test_a_factory_another_problem_and_closing(tmp_path: Path) -> None:
    held = Troubled()
    held.held = lambda: 1  # type: ignore[attr-defined]
    logs = tmp_path / "logs"
    workers = Processes(1, factory=make_troubled, logs=logs, memory="4GB").open(held)
    pids = workers.processes()
    failed = result(workers, task(1, "memory")).observations.failures[0]
    assert failed == "MemoryError"
    assert result(workers, task()).observations.failures == (None,)
    slow = workers.submit(task(2, "sleep"))
    workers.close(abandon=True)
    assert slow.cancelled()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert (logs / "worker-1.log").exists()
    with pytest.raises(WorkersError, match="closed"):
        workers.submit(task())

    class Other(Troubled):
        space = map_bo.CoefficientSpace(("a", "b"), (0.0, 0.0), (1.0, 0.9))

    with pytest.raises(WorkersError, match=r"another problem than the driver: .*space"):
        Processes(1, recipe=Recipe.calling(make_troubled)).open(Other())


@pytest.mark.slow
def test_a_worker_that_dies_while_idle_is_replaced() -> None:
    workers = Processes(1).open(Troubled())
    try:
        for number in (signal.SIGKILL, signal.SIGTERM):
            [pid] = workers.processes()
            os.kill(pid, number)
            time.sleep(0.5)
            assert result(workers, task()).observations.failures == (None,)
            assert workers.processes() != [pid]
    finally:
        workers.close()


SCRIPT = """
    import sys, time
    import map_bo
    from tests.workers.troubled import Troubled

    class Slow(Troubled):
        def evaluate(self, X, *, generator):
            time.sleep(1.0)
            return super().evaluate(X, generator=generator)

    if __name__ == "__main__":
        map_bo.optimize(Slow(), budget=8, seed=1, run_dir=sys.argv[1], workers=2, verify=0)
"""


def processes_of(folder: Path) -> list[int]:
    """Return the processes that were started with a folder as their working directory."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and (entry / "cwd").readlink() == folder:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_workers_end_with_a_killed_driver_and_the_run_is_resumed(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    run = tmp_path / "run"
    command = [sys.executable, "script.py", str(run)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until and len(seen(run)) < 2:
            time.sleep(0.1)
        assert len(processes_of(tmp_path)) >= 3  # of script: the driver and two workers
    finally:
        driver.kill()
        driver.wait()
    until = time.monotonic() + 5
    while time.monotonic() < until and processes_of(tmp_path):
        time.sleep(0.1)
    assert processes_of(tmp_path) == []
    state, _ = load_state(run)
    pending, before = state.pending, dict(state.outcomes)
    assert pending
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=100)
    state, _ = load_state(run)
    assert state.summary is not None
    assert len(state.outcomes) == 8
    assert list(state.outcomes)[len(before)] in pending  # first what was in flight
    for index, outcome in before.items():
        assert torch.equal(state.outcomes[index].Y, outcome.Y)


def seen(run: Path) -> dict[int, object]:
    try:
        return dict(load_state(run)[0].outcomes)
    except (map_bo.MapBoError, OSError):
        return {}


@pytest.mark.slow
def test_a_script_without_a_guard_needs_none_where_its_functions_are_not_needed(
    tmp_path: Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import map_bo\nfrom tests.workers.troubled import Troubled\n"
        "map_bo.optimize(Troubled(), budget=6, verify=0, workers=1)\nprint('done')\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "done\n", done.stderr


def test_the_problem_of_the_driver_gives_back_what_it_has_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise WorkersError("not now")

    monkeypatch.setattr(processes.ProcessWorkers, "start", stopped)
    problem = map_bo.digits_problem(2, size=20)
    problem.prepare()
    with pytest.raises(WorkersError, match="not now"):
        Processes(1).open(problem)
    assert problem._loaded is None
    assert isinstance(problem, Problem)


class TestSupervision:
    """What happens where a pool breaks or the supervising thread fails, without a process."""

    @pytest.fixture
    def idle(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessWorkers]:
        """Workers that think that their one process is ready."""
        monkeypatch.setattr(Slot, "start", lambda slot: setattr(slot, "idle", True))
        monkeypatch.setattr(Slot, "look", lambda slot, metrics: None)
        workers = ProcessWorkers([Place(b"", {}, 1)], (map_bo.Metric("m"),), script=False)
        workers.start()
        yield workers
        workers.close(abandon=True)

    def test_a_task_that_meets_a_broken_pool_waits_for_the_next(
        self, idle: ProcessWorkers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        again: list[Slot] = []
        monkeypatch.setattr(Slot, "_again", lambda slot: again.append(slot))
        [slot] = idle._slots
        slot.pool.stop()  # type: ignore[no-untyped-call]
        waiting = idle.submit(task(0))
        until = time.monotonic() + 5
        while not again and time.monotonic() < until:
            time.sleep(0.01)
        assert again == [slot]
        assert not waiting.done()
        assert [one for one, _ in idle._queue] == [task(0)]

    def test_nobody_waits_for_workers_that_are_not_looked_after(
        self, idle: ProcessWorkers, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fails(*arguments: object) -> bool:
            raise OSError("too many open files")

        monkeypatch.setattr(Slot, "launch", fails)
        for _ in range(2):  # the second comes when nobody looks any more
            with pytest.raises(WorkersError, match="too many open files"):
                idle.submit(task(0)).result(timeout=5)
