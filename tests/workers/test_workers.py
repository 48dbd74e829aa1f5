from __future__ import annotations

import pickle

import pytest
import torch

from map_bo.errors import ConfigError
from map_bo.rng import child, make_generator
from map_bo.workers.workers import Task, read_workers


def test_a_task_carries_its_point_and_its_chance_exactly() -> None:
    generator = make_generator(5)
    x = torch.rand(7, generator=generator, dtype=torch.float64)
    task = pickle.loads(pickle.dumps(Task.of("index", 3, 1, x, generator=child(generator, "one"))))
    assert torch.equal(task.point, x)
    assert make_generator(task.seed).initial_seed() == child(generator, "one").initial_seed()


@pytest.mark.parametrize("given", [None, 0, "0"])
def test_nothing_means_the_driver_s_own_process(given: object) -> None:
    if given == "0":
        with pytest.raises(ConfigError, match="got '0'"):
            read_workers(given)
        return
    assert read_workers(given) is None


@pytest.mark.parametrize("given", [-1, 2.5, "four", True, object(), {"count": 2}])
def test_what_is_no_workers_is_refused(given: object) -> None:
    with pytest.raises(ConfigError, match="workers must be"):
        read_workers(given)
