from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.write_shards import Pieces, Put, write_weights, writing

TENSORS = {
    "a": torch.arange(10.0),
    "b": torch.ones(3, 2),
    "none": torch.zeros(0),
    "z": torch.tensor(4),
}
BASE = open_checkpoint(TENSORS)
LAYOUTS = {name: BASE.layout(name) for name in BASE.names}


def all_pieces(put: Put) -> None:
    for name, value in TENSORS.items():
        flat = value.flatten()
        for start in range(0, len(flat), 4):
            put(name, start, flat[start : start + 4])


def without(name: str) -> Pieces:
    def pieces(put: Put) -> None:
        all_pieces(lambda n, start, piece: None if n == name else put(n, start, piece))

    return pieces


@pytest.mark.parametrize("limit", [1, 30, 10_000])
def test_pieces_and_tensors_give_the_same_files(tmp_path: Path, limit: int) -> None:
    contents = []
    for kind, tensors in (("pieces", all_pieces), ("tensors", TENSORS.items())):
        folder = tmp_path / kind
        folder.mkdir()
        counts: list[int] = []
        write_weights(folder, tensors, LAYOUTS, BASE, limit, advance=counts.append)
        assert sum(counts) == sum(value.numel() for value in TENSORS.values())
        contents.append({path.name: path.read_bytes() for path in folder.iterdir()})
        assert open_checkpoint(folder).digest() == BASE.digest()
    assert contents[0] == contents[1]


def test_what_takes_the_place_of_a_tensor(tmp_path: Path) -> None:
    for kind, tensors in (("pieces", all_pieces), ("tensors", TENSORS.items())):
        (tmp_path / kind).mkdir()
        write_weights(
            tmp_path / kind,
            tensors,
            LAYOUTS,
            BASE,
            10_000,
            instead={"a": torch.full((10,), 7.0, dtype=torch.float64)},
        )
        found = load_file(tmp_path / kind / "model.safetensors")
        assert found["a"].tolist() == [7.0] * 10
        assert torch.equal(found["b"], TENSORS["b"])


@pytest.mark.parametrize("name", ["a", "z"])
def test_a_tensor_that_was_not_put_is_missed(tmp_path: Path, name: str) -> None:
    with pytest.raises(MergeError, match=f"lacks 1 of the base's tensors: {name}\n"):
        write_weights(tmp_path, without(name), LAYOUTS, BASE, 10_000)


def test_a_piece_that_was_not_put_is_missed(tmp_path: Path) -> None:
    def pieces(put: Put) -> None:
        all_pieces(lambda n, start, piece: None if start == 8 else put(n, start, piece))

    with pytest.raises(MergeError, match="lacks 1 of the base's tensors: a"):
        write_weights(tmp_path, pieces, LAYOUTS, BASE, 10_000)


def test_the_index_names_every_tensor(tmp_path: Path) -> None:
    write_weights(tmp_path, all_pieces, LAYOUTS, BASE, 1)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(TENSORS)
    assert index["metadata"]["total_size"] == sum(layout.nbytes for layout in LAYOUTS.values())


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EFBIG, "free some space"),
        (errno.EROFS, "can be written to"),
    ],
)
def test_what_the_system_says_becomes_an_error_with_a_way_out(code: int, says: str) -> None:
    with pytest.raises(MergeError, match="m cannot be written: ") as caught, writing(Path("/m")):
        raise OSError(code, os.strerror(code))
    assert os.strerror(code) in caught.value.message
    assert says in str(caught.value.hint)
