from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from map_bo.problems.zoo.fine_tuning import Schedule, fine_tune
from map_bo.rng import make_generator

SCHEDULE = Schedule(steps=12, batch=4, rate=0.05)
INPUTS = torch.randn(10, 3, generator=make_generator(0))
TARGETS = INPUTS @ torch.tensor([1.0, -2.0, 0.5])


class Killed(Exception):
    pass


def train(state: Path, *, seed: int = 0, stop: int | None = None) -> tuple[Tensor, int]:
    """Fit a line; return its slope, and how many losses were computed."""
    slope = nn.Parameter(torch.zeros(3))
    computed = 0

    def loss(rows: Sequence[int]) -> Tensor:
        nonlocal computed
        if computed == stop:
            raise Killed
        computed += 1
        return (INPUTS[rows] @ slope - TARGETS[rows]).square().mean()

    generator = make_generator(seed)
    with contextlib.suppress(Killed):
        fine_tune({"slope": slope}, loss, 10, SCHEDULE, generator=generator, state=state, every=0)
    return slope.detach(), computed


def test_it_minimises_the_loss(tmp_path: Path) -> None:
    slope, computed = train(tmp_path / "state")
    assert computed == 12
    before, after = TARGETS.square().mean(), (INPUTS @ slope - TARGETS).square().mean()
    assert float(after) < 0.9 * float(before)


def test_a_killed_training_gives_the_weights_of_one_that_was_not(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole")
    for stop in (1, 5):
        _, computed = train(tmp_path / "killed", stop=stop)
        assert computed == stop
    resumed, computed = train(tmp_path / "killed")
    assert computed == 12 - 6  # none is computed twice
    assert torch.equal(resumed, whole)


def test_a_damaged_state_starts_anew(tmp_path: Path) -> None:
    whole, _ = train(tmp_path / "whole")
    train(tmp_path / "killed", stop=5)
    content = (tmp_path / "killed").read_bytes()
    (tmp_path / "killed").write_bytes(content[:-7])
    again, computed = train(tmp_path / "killed")
    assert computed == 12
    assert torch.equal(again, whole)


def test_the_seed_draws_the_batches(tmp_path: Path) -> None:
    one, _ = train(tmp_path / "one")
    other, _ = train(tmp_path / "other", seed=1)
    assert not torch.equal(one, other)


def test_a_pass_shows_each_example_once() -> None:
    rows = [SCHEDULE.rows(step, 10, make_generator(0)) for step in range(6)]
    assert [len(batch) for batch in rows] == [4, 4, 2, 4, 4, 2]
    for one in (rows[:3], rows[3:]):
        assert sorted(row for batch in one for row in batch) == list(range(10))
    assert rows[:3] != rows[3:]


def test_the_rate_rises_and_falls() -> None:
    rates = [Schedule(20, 1, 1.0).rate_of(step) for step in range(20)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2:] == pytest.approx([1 - i / 18 for i in range(18)])


def test_steps_are_reported_also_those_done_before(tmp_path: Path) -> None:
    train(tmp_path / "state", stop=5)
    reported: list[int] = []
    slope = nn.Parameter(torch.zeros(3))
    fine_tune(
        {"slope": slope},
        lambda rows: (INPUTS[rows] @ slope).square().mean(),
        10,
        SCHEDULE,
        generator=make_generator(0),
        state=tmp_path / "state",
        on_step=lambda: reported.append(0),
    )
    assert len(reported) == 12


def test_large_gradients_are_cut_to_norm_1(tmp_path: Path) -> None:
    # Adam's step does not feel the scale of all gradients, but that of one among them.
    def slope(scale: float) -> Tensor:
        p = nn.Parameter(torch.zeros(1))
        scales = iter([scale, 1.0])
        fine_tune(
            {"p": p},
            lambda rows: p.sum() * next(scales),
            1,
            Schedule(2, 1, 0.1),
            generator=make_generator(0),
            state=tmp_path / "state",
            every=100,
        )
        return p.detach()

    assert torch.allclose(slope(1e6), slope(1.0), atol=1e-6)
