from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import torch

from map_bo.problems.zoo.datasheet import (
    complete_datasheet,
    lacks_scores,
    read_datasheet,
    versions,
)


class Scoring:
    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[str, ...]]] = []

    def __call__(self, network: str, names: Sequence[str]) -> dict[str, float]:
        self.calls.append((network, tuple(names)))
        return dict.fromkeys(names, 0.5 if network == "base" else 0.75)


def complete(folder: Path, sets: Sequence[str], score: Scoring) -> None:
    facts = {name: {"train": 960, "test": 300} for name in sets}
    complete_datasheet(folder, {"seed": 3}, facts, "accuracy", score)


def test_scores_every_network_on_every_set(tmp_path: Path) -> None:
    assert lacks_scores(tmp_path, ("trec", "sst2"))
    score = Scoring()
    complete(tmp_path, ("trec", "sst2"), score)
    assert score.calls == [(name, ("trec", "sst2")) for name in ("base", "trec", "sst2")]
    assert not lacks_scores(tmp_path, ("trec", "sst2"))
    sheet = read_datasheet(tmp_path)
    assert sheet["scores"]["base"] == {"trec": 0.5, "sst2": 0.5}
    assert sheet["zoo"] == {"seed": 3}
    assert sheet["sets"]["trec"] == {"train": 960, "test": 300}
    assert sheet["versions"]["torch"] == torch.__version__


def test_what_is_known_is_not_measured_again(tmp_path: Path) -> None:
    complete(tmp_path, ("trec", "sst2"), Scoring())
    score = Scoring()
    complete(tmp_path, ("trec", "subj"), score)
    assert score.calls == [
        ("base", ("subj",)),
        ("trec", ("subj",)),
        ("subj", ("trec", "subj")),
    ]
    assert set(read_datasheet(tmp_path)["sets"]) == {"trec", "sst2", "subj"}
    assert lacks_scores(tmp_path, ("sst2", "subj"))


def test_an_interrupted_sheet_goes_on(tmp_path: Path) -> None:
    class Stopping(Scoring):
        def __call__(self, network: str, names: Sequence[str]) -> dict[str, float]:
            if network == "sst2":
                raise KeyboardInterrupt
            return super().__call__(network, names)

    with contextlib.suppress(KeyboardInterrupt):
        complete(tmp_path, ("trec", "sst2"), Stopping())
    score = Scoring()
    complete(tmp_path, ("trec", "sst2"), score)
    assert score.calls == [("sst2", ("trec", "sst2"))]


def test_a_damaged_sheet_is_made_anew(tmp_path: Path) -> None:
    complete(tmp_path, ("trec", "sst2"), Scoring())
    (tmp_path / "datasheet.json").write_text("{")
    assert read_datasheet(tmp_path) == {}
    score = Scoring()
    complete(tmp_path, ("trec", "sst2"), score)
    assert len(score.calls) == 3


def test_it_can_be_read(tmp_path: Path) -> None:
    complete(tmp_path, ("trec", "sst2"), Scoring())
    text = (tmp_path / "DATASHEET.md").read_text()
    assert "- seed: 3" in text
    assert "| trec | 300 | 960 |" in text
    assert "| base | 0.5000 | 0.5000 |" in text
    assert "| sst2 | 0.7500 | 0.7500 |" in text


def test_versions_name_python_and_torch() -> None:
    assert {"python", "torch", "map-bo"} <= versions().keys()
