from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import Tensor

from map_bo.errors import CheckpointError, MergeError
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.export.bounded import merge_linearly
from map_bo.merging.export.model import ExportSettings, digest_all
from tests.merging.checkpoint_files import BASE, Tied, export, merged
from tests.merging.hard_checkpoints import hard_family, opened, threads


class TestTies:
    def test_a_tied_tensor_is_merged_and_written_once(self, tmp_path: Path) -> None:
        base, expert = open_checkpoint(Tied(0)), open_checkpoint(Tied(1))
        stream = list(
            # The alias has weights of its own here; those of the canonical name count.
            merge_linearly(base, {"a": expert}, lambda n: {"a": 1.0 if n == "embed" else 0.5})
        )
        assert [name for name, _ in stream] == ["embed", "head.weight"]
        assert stream[0][1] is stream[1][1]
        out = export(
            tmp_path / "m", tensors=stream, base=base, experts={"a": expert}, coefficients={"a": 1}
        )
        with safe_open(out / "model.safetensors", framework="pt") as file:
            assert list(file.keys()) == ["embed"]
            assert file.metadata() == {"format": "pt", "head.weight": "embed"}
        assert open_checkpoint(out).names == base.names
        assert open_checkpoint(out).ties == base.ties
        model = Tied(2)
        load_model(model, str(out / "model.safetensors"))
        torch.testing.assert_close(model.head.weight, Tied(1).embed)

    def test_shards_record_ties_too(self, tmp_path: Path) -> None:
        base = open_checkpoint(Tied(0))
        stream = merge_linearly(base, {}, lambda n: {})
        extra = open_checkpoint({**Tied(0).state_dict(), "z": torch.ones(100)})
        out = export(
            tmp_path / "m",
            tensors=[*stream, ("z", torch.ones(100))],
            base=extra,
            experts={},
            coefficients={},
            shard_bytes=100,
        )
        assert len(list(out.glob("model-*.safetensors"))) == 2
        assert open_checkpoint(out).ties == {"head.weight": "embed"}

    @pytest.mark.parametrize("order", [1, -1])
    def test_tied_tensors_that_differ_are_not_written(self, tmp_path: Path, order: int) -> None:
        stream = [("embed", torch.ones(5, 3)), ("head.weight", torch.zeros(5, 3))][::order]
        with pytest.raises(MergeError, match="one tensor in the base but differ in the merged"):
            export(tmp_path / "m", tensors=stream, base=open_checkpoint(Tied(0)), experts={})
        assert not list(tmp_path.iterdir())


class TestExport:
    def test_the_weights_come_back(self, tmp_path: Path) -> None:
        out = export(tmp_path / "m")
        assert out == tmp_path / "m"
        assert sorted(p.name for p in out.iterdir()) == [
            "README.md",
            "mergekit.yaml",
            "model.safetensors",
            "recipe.yaml",
        ]
        expected = dict(merged())
        assert open_checkpoint(out).digest() == open_checkpoint(expected).digest()
        for name, value in load_file(out / "model.safetensors").items():
            assert torch.equal(value, expected[name])

    def test_a_path_as_text_relative_and_below_new_folders(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert export_to_text("new/folder") == tmp_path / "new" / "folder"

    @pytest.mark.parametrize("shard_bytes", [1, 60, 100])
    def test_shards(self, tmp_path: Path, shard_bytes: int) -> None:
        out = export(tmp_path / "m", shard_bytes=shard_bytes)
        whole = export(tmp_path / "whole")
        assert not (out / "model.safetensors").exists()
        index = json.loads((out / "model.safetensors.index.json").read_text())
        assert sorted(index["weight_map"]) == list(BASE.names)
        files = sorted(out.glob("model-*.safetensors"))
        assert {f.name for f in files} == set(index["weight_map"].values())
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
        sizes = []
        for file in files:
            tensors = load_file(file)
            sizes.append(sum(t.nbytes for t in tensors.values()))
            assert sizes[-1] <= shard_bytes or len(tensors) == 1
        assert index["metadata"]["total_size"] == sum(sizes)
        assert open_checkpoint(out).digest() == open_checkpoint(whole).digest()

    def test_tensors_may_come_in_any_order_layout_and_float_dtype(self, tmp_path: Path) -> None:
        tensors = {
            name: value.float() if value.dtype == torch.bfloat16 else value
            for name, value in reversed(list(merged()))
        }
        tensors["first.weight"] = tensors["first.weight"].t().contiguous().t()
        out = export(tmp_path / "m", tensors=tensors.items())
        assert open_checkpoint(out).digest() == open_checkpoint(dict(merged())).digest()

    def test_only_one_tensor_is_held(self, tmp_path: Path) -> None:
        import weakref

        alive: list[weakref.ref[Tensor]] = []

        def stream() -> Iterator[tuple[str, Tensor]]:
            for name in BASE.names:
                assert sum(ref() is not None for ref in alive) <= 1
                tensor = BASE.load(name).clone()
                alive.append(weakref.ref(tensor))
                yield name, tensor

        export(tmp_path / "m", tensors=stream())

    def test_an_empty_folder_is_filled_and_its_permissions_are_ordinary(
        self, tmp_path: Path
    ) -> None:
        (tmp_path / "m").mkdir()
        ordinary = (tmp_path / "m").stat().st_mode
        out = export(tmp_path / "m")
        assert (out / "model.safetensors").is_file()
        assert out.stat().st_mode == ordinary

    def test_files_that_make_a_model_usable_are_carried(self, tmp_path: Path) -> None:
        base = tmp_path / "base"
        export(base)
        carried = {
            "config.json",
            "tokenizer.json",
            "tokenizer.model",
            "merges.txt",
            "chat_template.jinja",
            "LICENSE",
            "additional_chat_templates/tool.jinja",
        }
        left = {"trainer_state.json", "modeling.py", "optimizer.pt", "x.index.json"}
        (base / "additional_chat_templates").mkdir()
        for name in carried | left | {"README.md"}:
            (base / name).write_text(name)
        out = export(tmp_path / "m", base=open_checkpoint(base))
        found = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
        written = {"model.safetensors", "recipe.yaml", "mergekit.yaml", "README.md"}
        assert found == carried | written
        assert (out / "README.md").read_text() != "README.md"
        for name in carried:
            assert (out / name).read_text() == name


def export_to_text(out: str) -> Path:
    return export(Path(out))


class TestRefusals:
    def refused(self, tmp_path: Path, message: str, **changes: Any) -> MergeError:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(MergeError, match=message) as caught:
            export(tmp_path / "m", **changes)
        assert sorted(tmp_path.rglob("*")) == before
        assert caught.value.hint
        return caught.value

    def test_a_folder_in_use(self, tmp_path: Path) -> None:
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "precious").write_text("x")
        self.refused(tmp_path, "m exists and is not empty")
        assert (tmp_path / "m" / "precious").read_text() == "x"

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "m").write_text("x")
        self.refused(tmp_path, "m exists and is not a folder")

    def test_a_dangling_link(self, tmp_path: Path) -> None:
        (tmp_path / "m").symlink_to(tmp_path / "nowhere")
        self.refused(tmp_path, "m exists and is not a folder")

    def test_a_folder_filled_meanwhile(self, tmp_path: Path) -> None:
        def stream() -> Iterator[tuple[str, Tensor]]:
            yield from merged()
            (tmp_path / "m").mkdir()
            (tmp_path / "m" / "other").write_text("x")

        with pytest.raises(MergeError, match="m cannot be written: Directory not empty"):
            export(tmp_path / "m", tensors=stream())
        assert [p.name for p in tmp_path.rglob("*")] == ["m", "other"]

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
    def test_an_exception_while_writing_leaves_nothing(
        self, tmp_path: Path, error: type[BaseException]
    ) -> None:
        def stream() -> Iterator[tuple[str, Tensor]]:
            for i, pair in enumerate(merged()):
                if i == 3:
                    assert list(tmp_path.glob(".m.*.partial/*"))
                    raise error("boom")
                yield pair

        with pytest.raises(error, match="boom"):
            export(tmp_path / "m", tensors=stream())
        assert not list(tmp_path.iterdir())

    def test_a_full_disk_is_seen_first(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 100_000))
        self.refused(tmp_path, r"needs 0\.001 GB, and .* has 0\.000 GB free")

    @pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
    def test_a_disk_that_fails_while_writing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
    ) -> None:
        def fail(descriptor: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fail)
        error = self.refused(tmp_path, f"m cannot be written: {os.strerror(code)}")
        assert ("space" in str(error.hint)) == (code == errno.ENOSPC)

    def test_a_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(MergeError, match="cannot be written: "):
            export(tmp_path / "file" / "m")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("first.bias"), "lacks 1 of the base's tensors: first.bias"),
            (lambda t: t.update(more=torch.ones(1)), "'more' is not in the base"),
            (
                lambda t: t.update({"first.bias": torch.ones(5)}),
                r"'first\.bias' is \[5\] and \[4\] in the base",
            ),
            (
                lambda t: t.update({"third.counter": torch.tensor(1.0)}),
                r"'third\.counter' is torch\.float32 and torch\.int64 in the base",
            ),
        ],
    )
    def test_tensors_that_are_not_those_of_the_base(
        self, tmp_path: Path, change: Any, message: str
    ) -> None:
        tensors = dict(merged())
        change(tensors)
        self.refused(tmp_path, message, tensors=tensors.items())

    def test_a_tensor_twice(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "was given twice", tensors=[*merged(), *merged()])

    def test_a_dtype_that_safetensors_lacks(self, tmp_path: Path) -> None:
        base = open_checkpoint({"w": torch.ones(2, dtype=torch.complex128)})
        self.refused(tmp_path, "safetensors has no dtype for w", base=base)

    def test_no_shard_size(self, tmp_path: Path) -> None:
        self.refused(tmp_path, "shard_bytes must .* got 0", shard_bytes=0)

    def test_a_record_that_is_no_data(self, tmp_path: Path) -> None:
        self.refused(tmp_path, r"record\.a\[1\] is a object", record={"a": [1, object()]})


def test_a_broken_export_is_seen(tmp_path: Path) -> None:
    out = export(tmp_path / "m")
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_checkpoint(out)


@pytest.mark.parametrize("count", [1, 3])
def test_each_is_computed_once_and_kept(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = opened(*hard_family(tmp_path))
    expected = [open_checkpoint(c.source).digest() for c in (base, *experts.values())]
    with threads(count):
        digest_all([base, *experts.values()])
    monkeypatch.setattr(Checkpoint, "read", lambda *arguments: pytest.fail("read again"))
    assert [c.digest() for c in (base, *experts.values())] == expected


def test_a_file_that_has_gone_is_told(tmp_path: Path) -> None:
    base, experts = opened(*hard_family(tmp_path))
    (tmp_path / "code" / "model.safetensors").unlink()
    with threads(3), pytest.raises(CheckpointError, match="cannot be read"):
        digest_all([base, *experts.values()])


def test_settings_are_checked_when_they_are_made() -> None:
    settings = ExportSettings("1GB", "2 MiB")
    assert (settings.memory, settings.shard_bytes) == (10**9, 2 << 20)
    assert ExportSettings().memory is None
    with pytest.raises(MergeError, match=r"max_memory must .* got 'much'"):
        ExportSettings("much")
    with pytest.raises(MergeError, match=r"shard_size must .* got 0"):
        ExportSettings(shard_size=0)
