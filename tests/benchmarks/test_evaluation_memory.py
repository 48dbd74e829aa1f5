"""The benchmark of memory: what it watches, and that it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.run import MODULES, README
from benchmarks.speed import evaluation_memory
from benchmarks.speed.evaluation_memory import anonymous, main, measure, watch_anonymous
from benchmarks.speed.merge_shapes import LlamaShape

TINY = LlamaShape(width=64, layers=1, intermediate=96, vocabulary=50)


@pytest.mark.skipif(not anonymous(), reason="the system does not tell anonymous memory")
def test_a_peak_between_the_ends_is_seen() -> None:
    size = 1 << 27
    with watch_anonymous(every=0.001) as seen:
        block = torch.ones(size // 4)
        for _ in range(20):
            block.add_(1)
        del block
    assert max(seen) - seen[0] > size // 2
    assert seen[-1] < max(seen) - size // 4


def test_the_readme_has_a_place_for_the_table() -> None:
    assert MODULES["evaluation_memory"] == evaluation_memory.__name__
    assert "<!-- table:evaluation_memory -->" in README.read_text()


@pytest.mark.slow
def test_rows_beyond_the_cap_are_mapped_and_those_within_are_not(tmp_path: Path) -> None:
    rows = 9 * TINY.parameters * 4
    inside = measure(TINY, str(4 * rows), tmp_path, mapped=False)
    assert not inside["mapped"]
    beyond = measure(TINY, str(rows // 2), tmp_path, mapped=True)
    assert beyond["mapped"]
    assert beyond["rows"] == rows
    assert beyond["resident"] >= beyond["anonymous"] >= beyond["before"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_command_writes_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "memory.json"
    line = ["memory", "--smoke", "--scratch", str(tmp_path), "--out", str(out)]
    monkeypatch.setattr(sys, "argv", line)
    main()
    record = json.loads(out.read_text())
    assert [one["mapped"] for one in record["data"]["cases"]] == [False, True]
    assert "in memory" in record["table"][4]
    assert "mapped" in record["table"][5]
