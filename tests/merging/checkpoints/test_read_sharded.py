from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from map_bo.errors import CheckpointError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from tests.merging.checkpoints.test_checkpoint import some_tensors, write_sharded
from tests.merging.damaged import GOOD, refused, safetensors_bytes, written

SHARD = "model-0.safetensors"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_sharded(tmp_path / "m", some_tensors()).parent


def index_of(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def rewrite(folder: Path, text: str) -> None:
    index_of(folder).write_text(text)


class TestIndex:
    @pytest.mark.parametrize(
        ("shard", "part"),
        [
            ("/etc/passwd", "is '/etc/passwd', which leads out of the folder"),
            ("../m/model-0.safetensors", "which leads out of the folder"),
            ("sub/model-0.safetensors", "which leads out of the folder"),
            ("..\\model-0.safetensors", "which leads out of the folder"),
            ("..", "which leads out of the folder"),
            (".", "which leads out of the folder"),
            ("", "not a file name"),
            ("a\0.safetensors", r"is 'a\x00.safetensors', not a file name"),
            ("a" * 300 + ".safetensors", "not a file name"),
            (3, "is a int, not a name"),
            (None, "is a NoneType, not a name"),
            ({"a": "b"}, "is a dict, not a name"),
            (["model-0.safetensors"], "is a list, not a name"),
        ],
    )
    def test_shards_that_are_no_names(self, model: Path, shard: object, part: str) -> None:
        rewrite(model, json.dumps({"weight_map": {"layer.weight": shard}}))
        refused(model, str(index_of(model)), "no usable weight_map", "'layer.weight'", part)

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ('{"weight_map": {"a": "x", "a": "y"}}', "it has the key 'a' twice"),
            ('{"weight_map": {}, "weight_map": {"a": "y"}}', "the key 'weight_map' twice"),
            ('{"weight_map": ' + "[" * 100_000, "nested too deeply"),
            ('{"weight_map": [["a", "model-0.safetensors"]]}', "no usable weight_map"),
            ("<!DOCTYPE html>\n<title>404</title>", "it is an HTML or XML page"),
            ("version https://git-lfs.github.com/spec/v1\n", "it is a git-lfs pointer"),
            ("", "it is an empty file"),
        ],
    )
    def test_malformed(self, model: Path, text: str, part: str) -> None:
        rewrite(model, text)
        refused(model, str(index_of(model)), part)

    def test_a_huge_one_is_not_read(self, model: Path) -> None:
        os.truncate(index_of(model), 1 << 40)
        refused(model, f"must have at most 100000000 bytes, got {1 << 40}")

    def test_tensors_that_it_does_not_name(self, model: Path) -> None:
        index = json.loads(index_of(model).read_text())
        save_file({"layer.weight": torch.ones(1), "more": torch.ones(1)}, model / SHARD)
        rewrite(model, json.dumps(index))
        refused(model, SHARD, "holds tensors that model.safetensors.index.json does not name: more")

    def test_thousands_of_shards(self, tmp_path: Path) -> None:
        content = safetensors_bytes({"a": GOOD["a"]}, b"\0\0\x80\x3f" * 2)
        weight_map = {}
        for i in range(1500):
            name = f"model-{i}.safetensors"
            written(tmp_path / name, content.replace(b'"a"', f'"{i:04}"'.encode(), 1))
            weight_map[f"{i:04}"] = name
        for name in weight_map.values():  # the header grew by three letters
            file = tmp_path / name
            data = file.read_bytes()
            length = int.from_bytes(data[:8], "little") + 3
            file.write_bytes(length.to_bytes(8, "little") + data[8:])
        rewrite(tmp_path, json.dumps({"weight_map": weight_map}))
        checkpoint = open_checkpoint(tmp_path)
        assert len(checkpoint.names) == 1500
        assert checkpoint.load("1499").tolist() == [1, 1]
        weight_map["ghost"] = "gone.safetensors"
        rewrite(tmp_path, json.dumps({"weight_map": weight_map}))
        refused(tmp_path, "names the shard 'gone.safetensors'")


class TestFiles:
    """Shards, and files given by name, that are no regular files."""

    @pytest.fixture(params=["shard", "file", "index"])
    def place(self, model: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
        path = index_of(model) if request.param == "index" else model / SHARD
        path.unlink()
        return path, (path if request.param == "file" else model)

    def test_a_folder(self, place: tuple[Path, Path]) -> None:
        path, source = place
        path.mkdir()
        if source == path:
            refused(source, str(path), "holds no weights")
        else:
            refused(source, f"{path} cannot be read: it is a folder")

    def test_a_pipe(self, place: tuple[Path, Path]) -> None:
        path, source = place
        os.mkfifo(path)
        refused(source, f"{path} cannot be read: it is a pipe")

    def test_a_socket(self, place: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        path, source = place
        monkeypatch.chdir(path.parent)  # an address has at most 108 bytes
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
            refused(source, f"{path} cannot be read: it is a socket")

    def test_a_device(self, place: tuple[Path, Path]) -> None:
        path, source = place
        path.symlink_to("/dev/zero")
        if source == path or path.name != SHARD:
            refused(source, f"{path} cannot be read: it is a device")
        else:
            refused(source, f"{path} was refused", "out of the model's folder, to /dev/zero")

    def test_a_dangling_link(self, place: tuple[Path, Path]) -> None:
        path, source = place
        path.symlink_to("nowhere")
        refused(source, f"{path} cannot be read: it is a link to nowhere, which does not exist")

    def test_a_link_to_itself(self, place: tuple[Path, Path]) -> None:
        path, source = place
        path.symlink_to(path.name)
        refused(source, str(path))


class TestLinks:
    def move_away(self, model: Path, where: Path, target: Path | str | None = None) -> None:
        """Move all shards to another place, with links where they were."""
        where.mkdir(parents=True)
        for shard in model.glob("model-*.safetensors"):
            shard.rename(where / shard.name)
            shard.symlink_to((where if target is None else Path(target)) / shard.name)

    def test_within_the_folder(self, model: Path) -> None:
        self.move_away(model, model / "parts", "parts")
        assert open_checkpoint(model).digest() == open_checkpoint(some_tensors()).digest()

    def test_out_of_the_folder(self, model: Path, tmp_path: Path) -> None:
        self.move_away(model, tmp_path / "elsewhere", "../elsewhere")
        error = refused(model, "was refused", "a link out of the model's folder, to", "elsewhere")
        assert "copy the file" in str(error.hint)

    def test_a_chain_of_links_out_of_the_folder(self, model: Path, tmp_path: Path) -> None:
        self.move_away(model, tmp_path / "elsewhere")
        shard = model / SHARD
        shard.rename(model / "first")
        shard.symlink_to("first")
        refused(model, str(shard), "a link out of the model's folder")

    def test_a_folder_that_is_itself_a_link(self, model: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(model)
        assert open_checkpoint(tmp_path / "link").source == str(tmp_path / "link")

    def snapshot(self, model: Path, tmp_path: Path) -> Path:
        folder = tmp_path / "hub" / "models--org--name" / "snapshots" / ("c" * 40)
        folder.parent.mkdir(parents=True)
        model.rename(folder)
        return folder

    def test_a_snapshot_of_the_hub_links_to_its_blobs(self, model: Path, tmp_path: Path) -> None:
        folder = self.snapshot(model, tmp_path)
        self.move_away(folder, folder.parents[1] / "blobs", "../../blobs")
        assert open_checkpoint(folder).digest() == open_checkpoint(some_tensors()).digest()

    def test_blobs_may_be_links_to_those_of_the_whole_cache(
        self, model: Path, tmp_path: Path
    ) -> None:
        folder = self.snapshot(model, tmp_path)
        blobs, shared = folder.parents[1] / "blobs", tmp_path / "hub" / "blobs" / "ab"
        self.move_away(folder, blobs, "../../blobs")
        shared.mkdir(parents=True)
        for blob in list(blobs.iterdir()):
            blob.rename(shared / blob.name)
            blob.symlink_to(f"../../blobs/ab/{blob.name}")
        assert open_checkpoint(folder).digest() == open_checkpoint(some_tensors()).digest()

    def test_a_snapshot_may_not_link_to_another_model(self, model: Path, tmp_path: Path) -> None:
        folder = self.snapshot(model, tmp_path)
        self.move_away(folder, tmp_path / "hub" / "models--org--other" / "blobs")
        refused(folder, "a link out of the model's folder")

    def test_one_file_given_by_name_may_be_a_link_anywhere(
        self, model: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "x.safetensors").symlink_to(model / SHARD)
        assert open_checkpoint(tmp_path / "x.safetensors").names == ("layer.weight",)
        (tmp_path / "m2").mkdir()
        (tmp_path / "m2" / "model.safetensors").symlink_to(model / SHARD)
        assert open_checkpoint(tmp_path / "m2").names == ("layer.weight",)


@pytest.mark.parametrize("source", ["a\0b", "x" * 5000, "~no_such_user_here/x"])
def test_text_that_is_no_path(source: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be read as a path"):
        open_checkpoint(source)
