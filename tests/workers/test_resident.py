from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Generator, Tensor

import map_bo
from map_bo.data import Metric, Observations
from map_bo.errors import WorkersError
from map_bo.problems.problem import Problem
from map_bo.rng import make_generator
from map_bo.workers.inline import InlineWorkers
from map_bo.workers.recipe import Recipe
from map_bo.workers.resident import Resident, identity_of_problem
from map_bo.workers.workers import Task


class Noisy:
    """Two metrics with noise from the generator; says where its files are."""

    space = map_bo.CoefficientSpace(("a", "b"), (0.0, 0.0), (1.0, 1.0))
    metrics = (Metric("one"), Metric("two"))

    def __init__(self, digest: str = "1", source: str = "here") -> None:
        self.digest, self.source = digest, source
        self.events: list[str] = []

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "noisy", "experts": {"a": {"digest": self.digest, "source": self.source}}}

    def prepare(self) -> None:
        self.events.append("prepared")

    def with_mapped_rows(self) -> Problem:
        self.events.append("mapped")
        return self

    def evaluate(self, X: Tensor, *, generator: Generator) -> Observations:
        noise = torch.rand(len(X), 2, generator=generator).double()
        return Observations(X, (X + noise) / 2, self.metrics)


def task(metrics: tuple[str, ...] | None = None) -> Task:
    return Task("index", 3, 0, (0.25, 0.5), 17, metrics)


def test_it_measures_what_the_driver_would_and_tells_its_name() -> None:
    resident = Resident.build(Recipe.of(Noisy()), expected=identity_of_problem(Noisy()))
    outcome = resident.evaluate(task())
    mine = InlineWorkers(Noisy()).submit(task()).result()
    assert torch.equal(outcome.observations.Y, mine.observations.Y)
    assert outcome.key == task().key
    assert outcome.worker == f"{socket.gethostname()}/{os.getpid()}"


def test_the_problem_is_prepared_with_what_is_shared() -> None:
    resident = Resident.build(Recipe.of(Noisy()))
    assert isinstance(resident.problem, Noisy)
    assert resident.problem.events == ["mapped", "prepared"]


def test_some_metrics_are_measured_where_only_those_are_asked_for() -> None:
    resident = Resident.build(Recipe.of(Noisy()))
    row = resident.evaluate(task(("two",))).observations
    assert [metric.name for metric in row.metrics] == ["two"]
    assert torch.equal(row.Y[:, 0], resident.evaluate(task()).observations.Y[:, 1])


def test_where_files_lie_is_no_difference() -> None:
    assert identity_of_problem(Noisy("1", "here")) == identity_of_problem(Noisy("1", "there"))


def test_another_problem_is_refused_by_what_differs() -> None:
    with pytest.raises(WorkersError, match="another problem than the driver: expert a differ"):
        Resident.build(Recipe.of(Noisy("2")), expected=identity_of_problem(Noisy("1")))


def test_another_version_is_refused_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = identity_of_problem(Noisy())
    monkeypatch.setattr(map_bo, "__version__", "0.0.1")
    with pytest.raises(
        WorkersError, match=r"the version of map_bo differ[^\n]*\n.*install the same"
    ):
        Resident.build(Recipe.of(Noisy()), expected=expected)


class Large(Noisy):
    """Takes 100 GB on its device."""

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = torch.device(device)

    def on(self, device: torch.device | str) -> Problem:
        return Large(str(device))

    def memory(self) -> int:
        return 100_000_000_000


def test_more_workers_than_a_gpu_has_room_for_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 150_000_000_000))
    assert Resident.build(Recipe.of(Large()), device="cuda:0").name.endswith("/cuda:0")
    with pytest.raises(WorkersError, match=r"2 workers on cuda:0 need about 200.0 GB"):
        Resident.build(Recipe.of(Large()), device="cuda:0", sharing=2)


def test_a_device_that_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(device: torch.device) -> tuple[int, int]:
        raise RuntimeError("invalid device ordinal\nmore words")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lacking)
    with pytest.raises(WorkersError, match="device cuda:7 cannot be used: invalid device ordinal"):
        Resident.build(Recipe.of(Large()), device="cuda:7")


def test_examples_belong_to_the_identity() -> None:
    small, large = (map_bo.digits_problem(2, size=size) for size in (20, 30))
    mine, other = identity_of_problem(small), identity_of_problem(large)
    assert {name for name in mine if mine[name] != other.get(name)}
    x = small.evaluate(torch.tensor([[0.5, 0.5]]).double(), generator=make_generator(0))
    assert len(x) == 1
