from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from map_bo.cached import cache_root, digest_of, kept, read_tensors, write_tensors


def test_the_folder_is_given_or_that_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MAP_BO_CACHE", str(tmp_path / "environment"))
    assert cache_root() == tmp_path / "environment"
    assert cache_root(tmp_path) == tmp_path


def test_tensors_are_made_once(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> dict[str, Tensor]:
        made.append(1)
        return {"a": torch.tensor([1.5, 2.0], dtype=torch.bfloat16)}

    path = tmp_path / "inner" / "a.safetensors"
    assert torch.equal(kept(path, make)["a"], kept(path, make)["a"])
    assert made == [1]
    path.write_bytes(path.read_bytes()[:-1])
    assert torch.equal(kept(path, make)["a"], torch.tensor([1.5, 2.0], dtype=torch.bfloat16))
    assert made == [1, 1]
    assert read_tensors(path) is not None


def test_a_folder_that_cannot_be_written_costs_a_warning_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        found = kept(tmp_path / "file" / "a.safetensors", lambda: {"a": torch.ones(2)})
    assert torch.equal(found["a"], torch.ones(2))
    assert "cannot be written" in caplog.text
    assert "MAP_BO_CACHE" in caplog.text


def test_a_digest_tells_names_dtypes_shapes_and_bits() -> None:
    first = {"a": torch.zeros(2), "b": torch.tensor(1)}
    others = [
        {"a": torch.zeros(2), "c": torch.tensor(1)},
        {"a": torch.zeros(2, dtype=torch.bfloat16), "b": torch.tensor(1)},
        {"a": torch.zeros(2, 1), "b": torch.tensor(1)},
        {"a": torch.tensor([0.0, -0.0]), "b": torch.tensor(1)},
        {"a": torch.zeros(2)},
    ]
    assert len({digest_of(one) for one in [first, *others]}) == 6
    assert digest_of(dict(reversed(first.items()))) == digest_of(first)


def test_what_was_written_comes_back(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a", {"a": torch.arange(3)})
    found = read_tensors(tmp_path / "a")
    assert found is not None
    assert found["a"].tolist() == [0, 1, 2]
    assert read_tensors(tmp_path / "b") is None
