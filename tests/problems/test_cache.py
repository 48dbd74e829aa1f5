from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from map_bo.problems.cache import read_network, trained_files, training_shown, write_network


def test_only_what_is_missing_or_damaged_is_trained(tmp_path: Path) -> None:
    trained: list[str] = []

    def train(files: Mapping[str, Path]) -> None:
        for name, path in files.items():
            if read_network(path) is None:
                trained.append(name)
                write_network(path, {"weight": torch.arange(3.0)})

    folder = tmp_path / "zoo"
    files = trained_files(folder, ("a", "b"), train)
    assert files == {name: folder / f"{name}.safetensors" for name in ("a", "b")}
    assert trained == ["a", "b"]
    trained_files(folder, ("a", "b"), train)
    assert trained == ["a", "b"]
    files["b"].write_bytes(b"")
    trained_files(folder, ("a", "b", "c"), train)
    assert trained == ["a", "b", "b", "c"]


def test_a_network_comes_back_bit_for_bit_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    weights = {"weight": torch.tensor([1.5, -0.0]), "steps": torch.tensor(3)}
    assert read_network(path) is None
    write_network(path, weights)
    read = read_network(path)
    assert read is not None
    assert all(torch.equal(read[name], value) for name, value in weights.items())
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert read_network(path) is None
    assert [file.name for file in tmp_path.iterdir()] == ["one.safetensors"]


def test_nothing_is_shown_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with training_shown({"base": 2}, progress=False) as start:
        start("base")()
    with training_shown({}, progress=True) as start:
        pass
    assert capsys.readouterr().err == ""
