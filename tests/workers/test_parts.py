"""Parts of examples are scored alike wherever they are: here, in processes, and behind a pool."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch

from map_bo.data import Observations
from map_bo.errors import DataError, MapBoError
from map_bo.examples.sets import Part, order_of
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.workers.inline import InlineWorkers
from map_bo.workers.pool import Pool
from map_bo.workers.processes import Processes
from map_bo.workers.workers import Task, Workers
from tests.workers import examined

ORDER = 5
MAKE = "tests.workers.examined:make"


@pytest.fixture(scope="module")
def here() -> MergedModelProblem:
    return examined.make()


@pytest.fixture(
    scope="module",
    params=[
        "inline",
        pytest.param("processes", marks=pytest.mark.slow),
        pytest.param("pool", marks=pytest.mark.slow),
    ],
)
def workers(request: pytest.FixtureRequest, here: MergedModelProblem) -> Iterator[Workers]:
    if request.param == "inline":
        yield InlineWorkers(here)
        return
    executor = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    settings = Processes(1, factory=MAKE, threads=1)
    opened = (
        settings.open(here)
        if request.param == "processes"
        else Pool(executor, factory=MAKE, threads=1).open(here)
    )
    yield opened
    opened.close()
    executor.shutdown()


def score(
    workers: Workers,
    *parts: Part,
    x: tuple[float, ...] = (0.3, 0.1, 0.6),
    timeout: float | None = None,
) -> Observations:
    task = Task("index", 0, 0, x, 11, timeout=timeout, parts=parts, order=ORDER)
    return workers.submit(task).result(timeout=120).observations


def test_outcomes_are_those_of_the_problem_to_the_last_bit(
    workers: Workers, here: MergedModelProblem
) -> None:
    parts = Part("loss", 0, 25), Part("ready", 10, 30), Part("plain", 0, 1)
    seen = score(workers, *parts)
    mine = score(InlineWorkers(here), *parts)
    assert [metric.name for metric in seen.metrics] == ["loss", "ready", "plain"]
    assert seen.failures == (None,)
    for name in ("X", "Y", "Yvar", "counts"):
        one, other = getattr(seen, name), getattr(mine, name)
        assert torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0)), name
    assert set(seen.examples[0]) == {"loss", "ready"}
    for key, (start, stop) in {"loss": (0, 25), "ready": (10, 30)}.items():
        one, two = seen.examples[0][key], mine.examples[0][key]
        order = order_of(here.example_sets[key], ORDER, key)
        assert torch.equal(one.items, order[start:stop].sort().values)
        assert torch.equal(one.values.nan_to_num(-1.0), two.values.nan_to_num(-1.0))
    values = seen.examples[0]["loss"].values[:, 0]
    failed = int((seen.examples[0]["loss"].items % 10 == 3).sum())
    assert int(values.isnan().sum()) == failed > 0
    assert float(seen.Y[0, 0]) == pytest.approx(float(values.nanmean()), abs=1e-12)


def test_a_failing_evaluator_costs_itself_alone(workers: Workers) -> None:
    seen = score(workers, Part("broken", 0, 5), Part("ready", 0, 5))
    assert [metric.name for metric in seen.metrics] == ["ready", "broken"]
    assert seen.Y[0].isfinite().tolist() == [True, False]
    assert "'broken' raised RuntimeError: no such layer" in (seen.failures[0] or "")
    assert list(seen.examples[0]) == ["ready"]


def test_a_part_that_takes_too_long_fails_and_the_next_does_not(
    workers: Workers, here: MergedModelProblem
) -> None:
    order = order_of(here.example_sets["slow"], ORDER, "slow").tolist()
    at = order.index(examined.SLOW)
    late = score(workers, Part("slow", at, at + 1), timeout=1.0)
    assert "longer than 1 s" in (late.failures[0] or "")
    assert late.examples == ({},)
    start = (at + 1) % len(order)
    assert score(workers, Part("slow", start, start + 1), timeout=30.0).failures == (None,)


def test_parts_that_there_are_not_end_the_run(workers: Workers) -> None:
    for part in (Part("ready", 0, 61), Part("other", 0, 1)):
        with pytest.raises((DataError, MapBoError), match="there are no examples 0 to"):
            score(workers, part)
