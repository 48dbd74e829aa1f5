from __future__ import annotations

import pickle

import torch

from map_bo.rng import child, make_generator
from map_bo.workers.workers import Task


def test_a_task_carries_its_point_and_its_chance_exactly() -> None:
    generator = make_generator(5)
    x = torch.rand(7, generator=generator, dtype=torch.float64)
    task = pickle.loads(pickle.dumps(Task.of("index", 3, 1, x, generator=child(generator, "one"))))
    assert torch.equal(task.point, x)
    assert make_generator(task.seed).initial_seed() == child(generator, "one").initial_seed()
