"""Merging within bounded memory: resident memory as the system counts it, at its peak."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from map_bo.merging.export.model import merge_checkpoints
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.merging.vectors.storage import resident_bytes
from map_bo.operators.sparse import Della, Ties
from tests.merging.hard_checkpoints import threads
from tests.merging.large_checkpoints import memory_of, write_family

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@pytest.fixture
def peak() -> Callable[[], int]:
    """Forget this process's peak; return what tells the new one, in bytes."""

    def told() -> int:
        lines = STATUS.read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

    try:
        CLEAR.write_text("5")
    except OSError:
        pytest.skip("the system does not tell the peak of resident memory")
    if told() > resident_bytes() + 20_000_000:
        pytest.skip("the system does not forget the peak of resident memory")
    return told


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("small")
    yield write_family(folder, 50)
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "operator", [TaskArithmetic(), Ties(), Della()], ids=lambda o: type(o).__name__
)
def test_temporary_memory_is_what_was_allowed(
    operator: MergeOperator, small: dict[str, Any], tmp_path: Path, peak: Callable[[], int]
) -> None:
    allowed = resident_bytes() + 110_000_000  # the models are 50 MB each, 400 MB in float32
    with threads(2):
        merge_checkpoints(
            small["base"],
            small["experts"],
            small["coefficients"],
            tmp_path / "m",
            operator=operator,
            max_memory=allowed,
            progress=False,
        )
    assert peak() < allowed


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("large")
    yield write_family(folder, 1000)
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "bound", "count"),
    [("task_arithmetic", 700, 2), ("ties", 400, 12), ("della", 700, 2)],
)
def test_a_process_keeps_to_its_bound(
    name: str, bound: int, count: int, large: dict[str, Any], tmp_path: Path
) -> None:
    told = memory_of(
        {
            **large,
            "operator": {"name": name},
            "out": str(tmp_path / "m"),
            "max_memory": f"{bound}MB",
            "threads": count,
        }
    )
    shutil.rmtree(tmp_path / "m")
    assert told["peak"] < bound * 1e6
