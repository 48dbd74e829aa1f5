from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from map_bo.evaluators.isolation import global_state
from map_bo.evaluators.isolation.global_state import Devices, World, read_autocast, write_autocast


def test_every_part_can_be_read_and_written_back() -> None:
    for part in global_state._PARTS:
        found = part.state()
        assert found is not global_state._UNKNOWN, part.name
        part.write(found)
        assert part.always or part.state() == found, part.name
    assert len({part.name for part in global_state._PARTS}) == len(global_state._PARTS)


def test_a_part_that_cannot_be_read_is_left_alone() -> None:
    def refuse(found: object = None) -> None:
        raise RuntimeError

    part = global_state._Part("it", refuse, refuse)
    assert part.restore(part.state()) is None


def test_a_part_is_not_written_without_need() -> None:
    written: list[object] = []
    part = global_state._Part("it", lambda: 1, written.append)
    assert part.restore(1) is None
    assert not written
    part.restore(2)
    assert written == [2]


def test_devices_below_other_modes() -> None:
    before = Devices.read()
    with torch.device("meta"):
        inside = Devices.read()
        assert inside != before
        inside.without().write()
        assert torch.zeros(1).device.type == "cpu"
        inside.write()
        assert torch.zeros(1).device.type == "meta"
    assert Devices.read() == before


def test_autocast_is_put_back() -> None:
    before = read_autocast()
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.float16)
    write_autocast(before)
    assert read_autocast() == before


def test_a_directory_that_was_renamed_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    world = World()
    here.rename(tmp_path / "there")
    os.chdir("/")
    assert world.restore() == []
    assert Path.cwd() == tmp_path / "there"


def test_a_directory_that_is_gone_from_the_start_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    here.rmdir()
    world = World()
    assert world.restore() == []


def test_a_stream_that_was_closed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr(sys, "stdout", file)
        world = World()
        file.close()
        assert world.restore() == ["a standard stream (ValueError: it was closed)"]
        assert World().restore() == []  # from then on it is as it was found


def test_an_alarm_of_the_callers_goes_on() -> None:
    test, _ = signal.getitimer(signal.ITIMER_REAL)  # pytest's own
    signal.setitimer(signal.ITIMER_REAL, 50)
    try:
        world = World()
        signal.alarm(0)
        assert world.restore() == []
        assert 40 < signal.getitimer(signal.ITIMER_REAL)[0] <= 50
        world = World()
        time.sleep(0.03)
        assert world.restore() == []
        assert 40 < signal.getitimer(signal.ITIMER_REAL)[0] < 49.98
    finally:
        signal.setitimer(signal.ITIMER_REAL, test)


def test_descriptors_are_not_used_up() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    before = count()
    for _ in range(20):
        World().restore()
    assert count() == before


def test_the_umask_and_print_options_are_put_back() -> None:
    world = World()
    before = os.umask(0o777)
    torch.set_printoptions(precision=1)  # type: ignore[no-untyped-call]
    assert world.restore() == []
    assert os.umask(before) == before
    assert "1.2346" in str(torch.tensor([1.23456]))
