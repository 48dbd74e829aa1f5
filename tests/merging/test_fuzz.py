"""Files changed at random: the readers give what a file says, or a CheckpointError."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load as library_load
from safetensors.torch import save

from map_bo.errors import CheckpointError
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.checkpoints.tensors import raw_bytes
from tests.merging.damaged import little_room

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "a.bias": torch.ones(3, dtype=torch.bfloat16),
    "b": torch.tensor(7),
    "mask": torch.tensor([True, False, True]),
    "none": torch.zeros(0, 2),
}

quick = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
long = settings(quick, max_examples=2000)


def pickled(zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


SAFETENSORS = save(TENSORS, {"format": "pt", "tied": "b"})
ZIPPED, LEGACY = pickled(True), pickled(False)


@pytest.fixture(autouse=True)
def limited() -> Iterator[None]:
    with little_room():
        yield


def opened(path: Path) -> Checkpoint | None:
    """Open a file and read all of it; None when it is refused, as it must be when it is wrong."""
    try:
        checkpoint = open_checkpoint(path)
        for name in checkpoint.names:
            tensor = checkpoint.load(name)
            assert (tensor.shape, tensor.dtype) == (checkpoint.shape(name), checkpoint.dtype(name))
            count = tensor.numel()
            piece = checkpoint.read(name, count // 3, count)
            assert bytes(raw_bytes(piece)) == bytes(raw_bytes(tensor))[-piece.nbytes or count :]
    except CheckpointError as error:
        refusal = error
    else:
        return checkpoint
    assert refusal.hint
    return None


@st.composite
def flipped(draw: st.DrawFn, content: bytes) -> bytes:
    changed = bytearray(content)
    for place in draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        changed[place] = draw(st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 127, 255])))
    return bytes(changed)


@st.composite
def cut(draw: st.DrawFn, content: bytes) -> bytes:
    start = draw(st.integers(0, len(content)))
    more = draw(st.binary(max_size=12))
    gone = draw(st.one_of(st.integers(0, 40), st.just(len(content))))
    return content[:start] + more + content[start + gone :]


def mutated(content: bytes) -> st.SearchStrategy[bytes]:
    return st.one_of(flipped(content), cut(content))


ODD: list[Any] = [0, 1, -1, 3, 1 << 31, 1 << 62, 1 << 64, 2.0, True, None, "", "F32", "I64", "BOOL"]
ODD += ["a.weight", "b", [], [0], [2, 2], [0, 48], [48, 56], {}, {"dtype": "F32"}, "../x", "\0"]


@st.composite
def edited(draw: st.DrawFn, text: bytes) -> bytes:
    """Change, remove, rename or add an entry somewhere in JSON."""
    content = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        holder: Any = content
        for _ in range(draw(st.integers(0, 3))):
            inner = [v for v in _values(holder) if isinstance(v, (dict, list)) and v]
            if not inner:
                break
            holder = draw(st.sampled_from(inner))
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            continue
        key = draw(st.sampled_from(keys))
        action = draw(st.sampled_from(["set", "set", "remove", "rename"]))
        value = draw(st.sampled_from(ODD)) if action == "set" else holder[key]
        if action in {"remove", "rename"}:
            del holder[key]
        if action == "rename" and isinstance(holder, dict):
            key = draw(st.one_of(st.sampled_from([*keys, "", "new"]), st.text(max_size=3)))
        if action != "remove" and (isinstance(holder, dict) or action == "set"):
            holder[key] = json.loads(json.dumps(value))
    return json.dumps(content).encode()


def _values(holder: Any) -> list[Any]:
    return list(holder.values()) if isinstance(holder, dict) else list(holder)


@st.composite
def with_other_header(draw: st.DrawFn) -> bytes:
    length = int.from_bytes(SAFETENSORS[:8], "little")
    header = draw(
        st.one_of(edited(SAFETENSORS[8 : 8 + length]), mutated(SAFETENSORS[8 : 8 + length]))
    )
    told = draw(st.sampled_from([len(header)] * 4 + [length, 0, 1 << 40, (1 << 64) - 1]))
    return told.to_bytes(8, "little") + header + SAFETENSORS[8 + length :]


def check_safetensors(path: Path, content: bytes) -> None:
    """What is not refused is exactly what the library reads from the same bytes."""
    path.write_bytes(content)
    checkpoint = opened(path)
    if checkpoint is None:
        assert content != SAFETENSORS
        return
    expected = library_load(content)
    assert set(checkpoint.names) - set(checkpoint.ties) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.dtype(name) == tensor.dtype
        assert checkpoint.shape(name) == tensor.shape
        assert bytes(raw_bytes(checkpoint.load(name))) == bytes(raw_bytes(tensor))


def check_zipped(path: Path, content: bytes) -> None:
    """Names and layouts are those that were saved; no more bytes differ than were changed."""
    path.write_bytes(content)
    checkpoint = opened(path)
    if checkpoint is None:
        assert content != ZIPPED
        return
    changed = len(content) - len(ZIPPED)
    if changed == 0:
        changed = sum(a != b for a, b in zip(content, ZIPPED, strict=True))
        assert differing(checkpoint) <= changed
    else:
        assert differing(checkpoint) == 0


def differing(checkpoint: Checkpoint) -> int:
    assert set(checkpoint.names) == set(TENSORS)
    count = 0
    for name, tensor in TENSORS.items():
        assert checkpoint.layout(name) == open_checkpoint({name: tensor}).layout(name)
        both = zip(raw_bytes(checkpoint.load(name)), raw_bytes(tensor), strict=True)
        count += sum(a != b for a, b in both)
    return count


def check_legacy(path: Path, content: bytes) -> None:
    """The old format has no checksums: what is read must only hang together."""
    path.write_bytes(content)
    checkpoint = opened(path)
    assert checkpoint is not None or content != LEGACY


def check_index(folder: Path, content: bytes) -> None:
    """Every tensor that is not refused is the shard's."""
    for name, tensor in TENSORS.items():
        shard = folder / f"{name}.safetensors"
        if not shard.exists():
            shard.write_bytes(save({name: tensor}))
    index = folder / "model.safetensors.index.json"
    index.write_bytes(content)
    checkpoint = opened(index)
    if checkpoint is None:
        assert content != INDEX
        return
    for name in checkpoint.names:
        assert torch.equal(checkpoint.load(name), TENSORS[name])


INDEX = json.dumps(
    {
        "metadata": {"total_size": 73},
        "weight_map": {name: f"{name}.safetensors" for name in TENSORS},
    }
).encode()

Case = tuple[str, Callable[[Path, bytes], None], st.SearchStrategy[bytes]]
CASES: dict[str, Case] = {
    "safetensors": ("x.safetensors", check_safetensors, mutated(SAFETENSORS)),
    "header": ("x.safetensors", check_safetensors, with_other_header()),
    "zip": ("x.pt", check_zipped, mutated(ZIPPED)),
    "legacy": ("x.bin", check_legacy, mutated(LEGACY)),
    "index": ("", check_index, st.one_of(mutated(INDEX), edited(INDEX))),
}


def law(case: str, path: Path) -> Callable[[], None]:
    name, check, contents = CASES[case]

    @given(content=contents)
    def holds(content: bytes) -> None:
        check(path / name, content)

    return holds


@pytest.mark.parametrize("case", CASES)
def test_a_changed_file_is_read_right_or_refused(case: str, tmp_path: Path) -> None:
    quick(law(case, tmp_path))()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_thousands_of_changed_files(case: str, tmp_path: Path) -> None:
    long(law(case, tmp_path))()


@pytest.mark.parametrize(
    ("case", "content"),
    [("safetensors", SAFETENSORS), ("zip", ZIPPED), ("legacy", LEGACY), ("index", INDEX)],
)
def test_an_unchanged_file_is_read(case: str, content: bytes, tmp_path: Path) -> None:
    name, check, _ = CASES[case]
    check(tmp_path / name, content)
