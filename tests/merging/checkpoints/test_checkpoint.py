from __future__ import annotations

import json
import pickle
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from map_bo.errors import CheckpointError
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 3, generator=generator)
    return {
        "layer.weight": weight,
        "layer.bias": torch.randn(5, generator=generator, dtype=torch.float64),
        "half": torch.randn(4, 2, generator=generator).to(torch.bfloat16),
        "counter": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
    }


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embed = nn.Parameter(torch.randn(6, 4, generator=generator))
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed


def write_sharded(folder: Path, tensors: dict[str, Tensor], suffix: str = "safetensors") -> Path:
    folder.mkdir()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        shard = f"{stem}-{i}.{suffix}"
        if suffix == "safetensors":
            save_file({name: tensor}, folder / shard)
        else:
            torch.save({name: tensor}, folder / shard)
        weight_map[name] = shard
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def saved(tmp_path: Path, form: str) -> Any:
    tensors = some_tensors()
    folder = tmp_path / "folder"
    match form:
        case "mapping":
            return tensors
        case "safetensors":
            save_file(tensors, tmp_path / "x.safetensors")
            return tmp_path / "x.safetensors"
        case "folder":
            folder.mkdir()
            save_file(tensors, folder / "model.safetensors")
            return str(folder)
        case "other name":
            folder.mkdir()
            save_file(tensors, folder / "diffusion.safetensors")
            return folder
        case "sharded":
            write_sharded(folder, tensors)
            return folder
        case "index":
            return write_sharded(folder, tensors)
        case "sharded bin":
            write_sharded(folder, tensors, "bin")
            return folder
        case "pt" | "pth" | "bin":
            torch.save(tensors, tmp_path / f"x.{form}")
            return tmp_path / f"x.{form}"
        case "legacy pt":
            torch.save(tensors, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
            return tmp_path / "x.pt"
        case "pytorch folder":
            folder.mkdir()
            torch.save(tensors, folder / "pytorch_model.bin")
            return folder
        case _:
            torch.save({form: tensors, "epoch": 3, "optimizer": {}}, tmp_path / "x.pt")
            return tmp_path / "x.pt"


FORMS = [
    "mapping",
    "safetensors",
    "folder",
    "other name",
    "sharded",
    "index",
    "sharded bin",
    "pt",
    "pth",
    "bin",
    "legacy pt",
    "pytorch folder",
    "state_dict",
    "model_state_dict",
    "model",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_tensors_and_digest(tmp_path: Path, form: str) -> None:
    tensors = some_tensors()
    checkpoint = open_checkpoint(saved(tmp_path, form))
    assert checkpoint.names == tuple(sorted(tensors))
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tensor.shape
        assert checkpoint.dtype(name) == tensor.dtype
        loaded = checkpoint.load(name)
        assert loaded.dtype == tensor.dtype
        assert loaded.device.type == "cpu"
        assert torch.equal(loaded, tensor)
    assert checkpoint.digest() == open_checkpoint(tensors).digest()
    assert checkpoint.directory is None
    assert not checkpoint.ties


def test_an_open_checkpoint_is_returned_as_it_is() -> None:
    checkpoint = open_checkpoint(some_tensors())
    assert open_checkpoint(checkpoint) is checkpoint


def test_source_says_where_the_weights_come_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(tmp_path, "pt")
    monkeypatch.chdir(tmp_path)
    assert open_checkpoint("x.pt").source == str(path)
    assert open_checkpoint(Tied()).source == "Tied in memory"
    assert open_checkpoint(some_tensors()).source == "state dict in memory (6 tensors)"
    assert repr(open_checkpoint(path)) == f"Checkpoint({str(path)!r}, 6 tensors)"


def test_a_hugging_face_directory_is_one_with_a_config(tmp_path: Path) -> None:
    folder = Path(saved(tmp_path, "folder"))
    (folder / "config.json").write_text("{}")
    assert open_checkpoint(folder).directory == folder
    assert open_checkpoint(folder / "model.safetensors").directory is None


def test_only_the_tensor_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(saved(tmp_path, "sharded"))
    untouched = tmp_path / "folder" / "model-1.safetensors"
    untouched.unlink()
    assert torch.equal(checkpoint.load("layer.weight"), some_tensors()["layer.weight"])
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors cannot be read"):
        checkpoint.load("layer.bias")


@pytest.mark.parametrize("form", ["mapping", "safetensors", "sharded", "pt"])
def test_a_checkpoint_crosses_process_boundaries(tmp_path: Path, form: str) -> None:
    checkpoint = open_checkpoint(saved(tmp_path, form))
    checkpoint.load("half")
    copy = pickle.loads(pickle.dumps(checkpoint))
    assert copy.digest() == checkpoint.digest()


class TestDigest:
    @given(data=st.data())
    def test_any_change_changes_it_and_order_does_not(self, data: st.DataObject) -> None:
        tensors = some_tensors()
        names = data.draw(st.permutations(sorted(tensors)))
        reference = open_checkpoint(tensors).digest()
        assert open_checkpoint({name: tensors[name] for name in names}).digest() == reference
        name = data.draw(st.sampled_from([n for n in names if tensors[n].numel()]))
        change = data.draw(st.sampled_from(["value", "shape", "dtype", "name"]))
        changed = dict(tensors)
        flat = tensors[name].clone().reshape(-1)
        if change == "value":
            flat[0] = ~flat[0] if flat.dtype == torch.bool else flat[0] + 1
            changed[name] = flat.reshape(tensors[name].shape)
        elif change == "shape":
            changed[name] = flat.reshape(1, *tensors[name].shape)
        elif change == "dtype":
            changed[name] = tensors[name].to(torch.complex64)
        else:
            changed[name + "'"] = changed.pop(name)
        assert open_checkpoint(changed).digest() != reference

    def test_memory_layout_does_not_matter(self) -> None:
        weight = some_tensors()["layer.weight"]
        turned = weight.t().contiguous().t()
        assert not turned.is_contiguous()
        assert open_checkpoint({"w": turned}).digest() == open_checkpoint({"w": weight}).digest()

    def test_bits_count_not_numbers(self) -> None:
        zeros = torch.zeros(3)
        assert open_checkpoint({"w": zeros}).digest() != open_checkpoint({"w": -zeros}).digest()
        nan = {"w": torch.tensor([float("nan")])}
        assert open_checkpoint(nan).digest() == open_checkpoint(nan).digest()

    def test_it_is_computed_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        checkpoint = open_checkpoint(saved(tmp_path, "safetensors"))
        first = checkpoint.digest()
        monkeypatch.setattr(Checkpoint, "load", None)
        assert checkpoint.digest() == first

    def test_it_follows_weights_that_change_in_memory(self) -> None:
        model = nn.Linear(3, 2)
        checkpoint = open_checkpoint(model)
        before = checkpoint.digest()
        with torch.no_grad():
            model.weight.add_(1)
        assert checkpoint.digest() != before

    def test_it_works_on_inference_tensors(self) -> None:
        with torch.inference_mode():
            tensors = {"w": torch.ones(2)}
        checkpoint = open_checkpoint(tensors)
        assert checkpoint.digest() == open_checkpoint({"w": torch.ones(2)}).digest()
        with torch.inference_mode():
            tensors["w"].mul_(2)
        assert checkpoint.digest() == open_checkpoint({"w": torch.full((2,), 2.0)}).digest()

    def test_lazily_conjugated_tensors_count_by_value(self) -> None:
        value = torch.tensor([1 + 2j, 3 - 1j])
        lazy, real = value.conj(), value.conj().resolve_conj().clone()
        assert open_checkpoint({"w": lazy}).digest() == open_checkpoint({"w": real}).digest()


class TestTies:
    def test_a_module_keeps_all_names_and_says_which_is_canonical(self) -> None:
        checkpoint = open_checkpoint(Tied())
        assert checkpoint.ties == {"head.weight": "embed"}
        assert {"embed", "head.weight", "norm.running_mean"} <= set(checkpoint.names)
        assert torch.equal(checkpoint.load("head.weight"), checkpoint.load("embed"))

    def test_pt_files_keep_them(self, tmp_path: Path) -> None:
        model = Tied()
        torch.save(model.state_dict(), tmp_path / "x.pt")
        checkpoint = open_checkpoint(tmp_path / "x.pt")
        assert checkpoint.ties == {"head.weight": "embed"}
        assert checkpoint.digest() == open_checkpoint(model).digest()

    def test_safetensors_metadata_restore_them(self, tmp_path: Path) -> None:
        model = Tied()
        save_model(model, str(tmp_path / "x.safetensors"))
        checkpoint = open_checkpoint(tmp_path / "x.safetensors")
        assert checkpoint.names == open_checkpoint(model).names
        assert len(checkpoint.ties) == 1
        assert torch.equal(checkpoint.load("head.weight"), model.embed)
        assert torch.equal(checkpoint.load("embed"), model.embed)

    def test_a_file_without_the_alias_has_the_same_digest_but_not_the_name(
        self, tmp_path: Path
    ) -> None:
        model = Tied()
        tensors = model.state_dict()
        del tensors["head.weight"]
        save_file(tensors, tmp_path / "x.safetensors")
        checkpoint = open_checkpoint(tmp_path / "x.safetensors")
        assert "head.weight" not in checkpoint.names
        assert checkpoint.digest() == open_checkpoint(model).digest()

    def test_views_of_one_buffer_are_no_ties(self) -> None:
        flat = torch.arange(6.0)
        checkpoint = open_checkpoint({"a": flat[:3], "b": flat[3:], "c": flat.view(2, 3)})
        assert not checkpoint.ties


def test_a_variant_beside_a_model_of_no_name(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.fp16-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3)}, tmp_path / "model.fp16-00002-of-00002.safetensors")
    places = {n: f"model.fp16-0000{i}-of-00002.safetensors" for i, n in enumerate("ab", start=1)}
    index = tmp_path / "model.safetensors.index.fp16.json"
    index.write_text(json.dumps({"weight_map": places}))
    for source in (tmp_path, index):
        assert open_checkpoint(source).names == ("a", "b")


class TestRefusals:
    def refused(self, source: Any, *parts: str) -> None:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(source)
        for part in parts:
            assert part in caught.value.message
        assert caught.value.hint

    def test_missing(self, tmp_path: Path) -> None:
        self.refused(tmp_path / "no.pt", str(tmp_path / "no.pt"), "does not exist")
        self.refused("gpt2-of-the-hub", "gpt2-of-the-hub does not exist")

    def test_no_checkpoint_at_all(self) -> None:
        self.refused(3, "a int is not a checkpoint")

    def test_unknown_suffix(self, tmp_path: Path) -> None:
        (tmp_path / "x.h5").write_bytes(b"x")
        self.refused(tmp_path / "x.h5", "x.h5 has the unknown suffix '.h5'")

    @pytest.mark.parametrize("name", ["x.gguf", "x.GGUF", "", "x.safetensors", "x.bin"])
    def test_a_gguf_file_says_how_to_convert_it(self, tmp_path: Path, name: str) -> None:
        (tmp_path / (name or "x.gguf")).write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(CheckpointError, match=r"(a|the) GGUF file") as caught:
            open_checkpoint(tmp_path / name)
        assert "GgufConfig(dequantize=True)" in str(caught.value.hint)

    @pytest.mark.parametrize("source", [{}, nn.ReLU()])
    def test_empty(self, source: Any) -> None:
        self.refused(source, "holds no tensors")

    def test_empty_file(self, tmp_path: Path) -> None:
        save_file({}, tmp_path / "x.safetensors")
        self.refused(tmp_path / "x.safetensors", "x.safetensors holds no tensors")

    @pytest.mark.parametrize("keep", [0, 4, 40, 300, -1])
    @pytest.mark.parametrize("form", ["safetensors", "pt", "legacy pt"])
    def test_truncated(self, tmp_path: Path, form: str, keep: int) -> None:
        path = saved(tmp_path, form)
        path.write_bytes(path.read_bytes()[:keep])
        self.refused(path, str(path), "cannot be read: ")

    @pytest.mark.parametrize("suffix", ["safetensors", "pt"])
    def test_not_a_checkpoint_inside(self, tmp_path: Path, suffix: str) -> None:
        path = tmp_path / f"x.{suffix}"
        path.write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
        self.refused(path, "cannot be read")

    def test_a_truncated_shard(self, tmp_path: Path) -> None:
        index = write_sharded(tmp_path / "m", some_tensors())
        shard = index.parent / "model-0.safetensors"
        shard.write_bytes(shard.read_bytes()[:-4])
        self.refused(index.parent, str(shard), "cannot be read")

    def test_entries_that_are_no_tensors(self) -> None:
        self.refused({"w": torch.ones(1), "lr": 0.1}, "see the entry 'lr'")
        self.refused({3: torch.ones(1), "a": 1}, "see the entries 3, 'a'")
        self.refused({str(i): i for i in range(8)}, "and 3 more")

    def test_extra_state_of_a_module_is_left_out(self) -> None:
        class Fancy(nn.Linear):
            def get_extra_state(self) -> dict[str, int]:
                return {"scale": 3}

        assert open_checkpoint(Fancy(2, 2)).names == ("bias", "weight")

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            ("{", "cannot be read"),
            ("[]", "no usable weight_map"),
            ('{"weight_map": {"a": "../a.safetensors"}}', "no usable weight_map"),
            ('{"weight_map": {"a": "gone.safetensors"}}', "names the shard 'gone.safetensors'"),
            ('{"weight_map": {}}', "holds no tensors"),
        ],
    )
    def test_a_bad_index(self, tmp_path: Path, content: str, part: str) -> None:
        index = tmp_path / "model.safetensors.index.json"
        index.write_text(content)
        self.refused(tmp_path, part)

    def test_an_index_that_names_a_missing_tensor(self, tmp_path: Path) -> None:
        index = write_sharded(tmp_path / "m", some_tensors())
        content = json.loads(index.read_text())
        content["weight_map"]["ghost"] = "model-0.safetensors"
        index.write_text(json.dumps(content))
        self.refused(index, "tensor 'ghost' is in 'model-0.safetensors', which does not hold it")

    def test_a_folder_without_weights_or_with_many(self, tmp_path: Path) -> None:
        self.refused(tmp_path, str(tmp_path), "holds no weights")
        for name in ("a", "b"):
            save_file(some_tensors(), tmp_path / f"{name}.safetensors")
        self.refused(tmp_path, "holds 2 weight files", "a.safetensors, b.safetensors")

    def test_an_adapter(self, tmp_path: Path) -> None:
        save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
        self.refused(tmp_path, "holds an adapter")

    def test_a_folder_of_several_adapters(self, tmp_path: Path) -> None:
        for name in ("math", "code"):
            (tmp_path / name).mkdir()
            save_file({"a": torch.zeros(1)}, tmp_path / name / "adapter_model.safetensors")
        self.refused(tmp_path, "adapters in folders of it: code, math")

    def test_tensors_that_cannot_be_merged(self) -> None:
        self.refused(nn.Linear(2, 2, device="meta"), "'weight' has no data")
        self.refused({"s": torch.eye(2).to_sparse()}, "'s' is sparse_coo")

    def test_a_dtype_that_torch_does_not_have(self, tmp_path: Path) -> None:
        header = json.dumps(
            {"w": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}
        ).encode()
        header += b" " * (-len(header) % 8)
        path = tmp_path / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
        self.refused(path, "tensor 'w' has the dtype F8_E8M0")

    @pytest.mark.parametrize("ask", ["shape", "dtype", "load"])
    def test_an_unknown_name(self, ask: str) -> None:
        with pytest.raises(CheckpointError, match="has no tensor 'nope'"):
            getattr(open_checkpoint(some_tensors()), ask)("nope")
