from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from map_bo.evaluators.isolation.global_state import World


def test_a_directory_is_found_again_where_all_descriptors_were_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    world = World()
    held = world._directory._held
    assert held is not None
    descriptor = held.now()
    assert descriptor is not None
    os.close(descriptor)
    other = os.open(os.devnull, os.O_RDONLY)  # it may have taken the number
    os.chdir("/")
    torch.set_grad_enabled(False)
    assert world.restore() == []
    assert Path.cwd() == tmp_path
    assert torch.is_grad_enabled()
    os.fstat(other)
    os.close(other)


def test_standard_streams_that_were_closed_or_led_away_are_put_back() -> None:
    before = [os.fstat(number) for number in range(3)]
    world = World()
    os.close(0)
    away = os.open(os.devnull, os.O_WRONLY)
    os.dup2(away, 1)
    os.close(away)
    assert world.restore() == []
    assert all(map(os.path.samestat, before, [os.fstat(number) for number in range(3)]))


def test_a_stream_that_cannot_be_put_back_is_told() -> None:
    world = World()
    held = world._streams._held.pop(0)
    world._streams._held[0] = held
    kept = os.dup(0)
    descriptor = held.now()
    assert descriptor is not None
    os.close(descriptor)
    os.close(0)
    try:
        assert world.restore() == ["descriptor 0 (its descriptors were closed)"]
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_no_descriptor_is_left_open() -> None:
    count = len(os.listdir("/dev/fd"))
    for _ in range(3):
        world = World()
        assert world.restore() == []
    assert len(os.listdir("/dev/fd")) == count
