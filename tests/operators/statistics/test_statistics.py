from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from map_bo.errors import CheckpointError, MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.operators.statistics.fisher_information import fisher
from map_bo.operators.statistics.input_products import grams
from map_bo.operators.statistics.statistics import (
    Statistics,
    cached_statistics,
    load_statistics,
    save_statistics,
    statistics_of,
)
from map_bo.rng import make_generator
from tests.merging.small_models import build, tuned

MODEL = build("mlp")
BATCHES = [
    (
        torch.randn(6, 5, generator=make_generator(0)),
        torch.randint(0, 3, (6,), generator=make_generator(1)),
    )
]


def made(data: str = "six points") -> Statistics:
    return fisher(MODEL, BATCHES, data=data)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    written = made()
    path = save_statistics(tmp_path / "deep" / "one.safetensors", written)
    read = load_statistics(path, kind="fisher", model=MODEL, data="six points")
    assert read.describe() == written.describe()
    assert json.loads(json.dumps(read.describe())) == read.describe()
    assert read.model == open_checkpoint(MODEL).digest()
    assert (read.examples, read.data) == (6, "six points")
    assert read.settings == {"labels": "exact", "log_likelihood": "classifier"}
    assert read.tensors.names == written.tensors.names == tuple(sorted(MODEL.state_dict()))
    for name in read.tensors.names:
        assert torch.equal(read.tensors.load(name), written.tensors.load(name))
    assert read.tensors.digest() == read.content()
    assert pickle.loads(pickle.dumps(read)).describe() == read.describe()
    assert [file.name for file in path.parent.iterdir()] == ["one.safetensors"]


def test_what_differs_is_named(tmp_path: Path) -> None:
    path = save_statistics(tmp_path / "one.safetensors", made())
    other = tuned(MODEL, "mlp", 3)
    with pytest.raises(MergeError, match="computed for another model: its weights have") as caught:
        load_statistics(path, model=other)
    assert open_checkpoint(other).digest()[:12] in caught.value.message
    assert open_checkpoint(MODEL).digest()[:12] in caught.value.message
    with pytest.raises(MergeError, match="on 'six points', not on 'others'"):
        load_statistics(path, data="others")
    with pytest.raises(MergeError, match="holds diagonal Fisher information; inner products"):
        load_statistics(path, kind="grams")
    with pytest.raises(MergeError, match="inner products of layer inputs; diagonal Fisher"):
        statistics_of(grams(MODEL, BATCHES), "fisher")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_statistics(tmp_path / "none.safetensors")
    plain = tmp_path / "plain.safetensors"
    save_file({"a": torch.ones(2)}, plain)
    with pytest.raises(CheckpointError, match="holds no statistics"):
        load_statistics(plain)
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a.pt"):
        load_statistics(tmp_path / "a.pt")
    path = save_statistics(tmp_path / "one.safetensors", made())
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_statistics(path)
    with pytest.raises(CheckpointError, match=r"does not end in \.safetensors"):
        save_statistics(tmp_path / "one.bin", made())
    with pytest.raises(MergeError, match="a int is not the statistics"):
        statistics_of(3, "fisher")  # type: ignore[arg-type]
    version = tmp_path / "old.safetensors"
    save_file({"a": torch.ones(2)}, version, metadata={"map_bo.statistics": '{"version": 0}'})
    with pytest.raises(CheckpointError, match="statistics of version 0"):
        load_statistics(version)


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_statistics(tmp_path / "one.safetensors", made("before"))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("map_bo.operators.statistics.statistics.SafetensorsWriter.write", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_statistics(path, made("after"))
    assert load_statistics(path).data == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["one.safetensors"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save_statistics(blocked / "one.safetensors", made())


def test_cached_statistics_are_made_once(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "one.safetensors"
    calls = []

    def make() -> Statistics:
        calls.append(1)
        return made()

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: cached_statistics(path, make, model=MODEL), range(3)))
    assert len(calls) == 1
    assert {one.content() for one in found} == {made().content()}
    path.write_bytes(path.read_bytes()[:100])  # damaged
    assert cached_statistics(path, make).content() == found[0].content()
    assert len(calls) == 2
    with pytest.raises(MergeError, match="another model"):
        cached_statistics(path, make, model=tuned(MODEL, "mlp", 3))
    with pytest.raises(MergeError, match="'six points', not on 'others'"):
        cached_statistics(path, make, data="others")
    assert len(calls) == 2


def test_cached_statistics_do_not_keep_what_is_not_wanted(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    with pytest.raises(MergeError, match="another model"):
        cached_statistics(path, made, model=tuned(MODEL, "mlp", 3))
    with pytest.raises(MergeError, match="inner products"):
        cached_statistics(path, made, kind="grams")
    assert not path.exists()
    plain = tmp_path / "plain.safetensors"  # a file of somebody else's is not overwritten
    save_file({"a": torch.ones(2)}, plain)
    with pytest.raises(CheckpointError, match="holds no statistics"):
        cached_statistics(plain, made)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        cached_statistics(tmp_path / "file" / "one.safetensors", made)


def test_a_tied_tensor_is_found_under_all_its_names(tmp_path: Path) -> None:
    model = build("tied")
    tokens = torch.randint(0, 6, (4, 3), generator=make_generator(2))

    def score(model: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return model(batch[0]).log_softmax(-1)[..., 0].sum(-1)  # type: ignore[no-any-return]

    path = save_statistics(tmp_path / "one.safetensors", fisher(model, [tokens], score))
    known = load_statistics(path, model=model)
    assert known.tensors.names == ("embed.weight", "middle.bias", "middle.weight")
    assert known.find("output.weight") == known.find("embed.weight") == "embed.weight"
    assert known.find("other.weight") is None
