"""Rows in a cache: the same numbers and refusals, whatever happened to the files before."""

from __future__ import annotations

import errno
import json
import os
import pickle
import resource
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapters.adapter import adapter_checkpoint
from map_bo.merging.align.vocabulary import fit_vocabulary
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.task_vectors import TaskVectors, cosines
from map_bo.rng import make_generator
from tests.merging.adapter_files import SHAPES, small_adapters, small_base, write_adapter
from tests.merging.small_models import MODELS, family

State = dict[str, Tensor]
C = torch.tensor([0.3, 0.9, 0.1], dtype=torch.float64)


def models(kind: str = "mlp") -> tuple[Checkpoint, dict[str, Checkpoint]]:
    base, experts = family(kind)
    return open_checkpoint(base), {name: open_checkpoint(model) for name, model in experts.items()}


def merged(vectors: TaskVectors, c: Tensor = C) -> Tensor:
    out = torch.full((vectors.layout.size,), torch.nan)
    TaskArithmetic().prepare(vectors).write(c, out)
    return out


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.endswith(".lock")]


def the_entry(folder: Path) -> Path:
    (entry,) = entries(folder)
    assert not entry.name.startswith(".")
    return entry


@pytest.fixture
def built(tmp_path: Path) -> TaskVectors:
    base, experts = models("cnn")
    return TaskVectors.load(base, experts, cache=tmp_path / "rows")


@contextmanager
def nothing_filled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fill(*_: object, **__: object) -> None:
        raise AssertionError("the checkpoints were read again")

    with monkeypatch.context() as patch:
        patch.setattr("map_bo.merging.vectors.task_vectors.fill", fill)
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", sorted(MODELS))
def test_mapped_rows_are_those_in_memory(
    kind: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = models(kind)
    resident = TaskVectors.load(base, experts, dtype=dtype)
    first = TaskVectors.load(base, experts, dtype=dtype, cache=tmp_path)
    with nothing_filled(monkeypatch):
        again = TaskVectors.load(base, experts, dtype=dtype, cache=tmp_path)
    for mapped in (first, again):
        assert torch.equal(mapped.rows, resident.rows)
        assert mapped.rows.dtype == dtype
        assert torch.equal(merged(mapped), merged(resident))
        assert mapped.layout == resident.layout
        assert mapped.fixed.keys() == resident.fixed.keys()
        assert all(torch.equal(mapped.fixed[k], v) for k, v in resident.fixed.items())
        assert [where for where, _ in mapped.floors] == [where for where, _ in resident.floors]
        for (_, a), (_, b) in zip(mapped.floors, resident.floors, strict=True):
            assert torch.equal(a, b)
        assert torch.equal(cosines(mapped), cosines(resident))
        assert not mapped.resident
        assert resident.resident
        assert mapped.nbytes == resident.nbytes


def test_adapters_stay_factors_beside_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small_base()
    adapters = small_adapters(tmp_path, base)
    whole = {
        name: base.load(name) + 0.1 * torch.rand(shape, generator=make_generator(4))
        for name, shape in SHAPES.items()
    }
    experts: dict[str, Checkpoint] = {
        "math": adapters["math"],
        "whole": open_checkpoint(whole),
        "chat": adapters["chat"],
    }
    resident = TaskVectors.load(base, experts)
    TaskVectors.load(base, experts, cache=tmp_path / "rows")
    with nothing_filled(monkeypatch):
        mapped = TaskVectors.load(base, experts, cache=tmp_path / "rows")
    assert len(mapped.rows) == 2
    assert mapped.dense == resident.dense == (1,)
    assert mapped.adapted.keys() == resident.adapted.keys()
    assert torch.equal(merged(mapped), merged(resident))
    for index, slot in enumerate(mapped.layout.slots):
        assert torch.equal(mapped.read(index, 0, slot.numel), resident.read(index, 0, slot.numel))
    assert mapped.nbytes == resident.nbytes
    only = {name: experts[name] for name in ("math", "chat")}
    alone = TaskVectors.load(base, only, cache=tmp_path / "rows")
    assert torch.equal(merged(alone, C[:2]), merged(TaskVectors.load(base, only), C[:2]))


def test_names_do_not_matter_and_all_else_does(tmp_path: Path) -> None:
    base, experts = models()
    a, b, c = experts.values()
    TaskVectors.load(base, {"a": a, "b": b}, cache=tmp_path)
    renamed = TaskVectors.load(base, {"x": a, "y": b}, cache=tmp_path)
    assert renamed.experts == ("x", "y")
    assert len(entries(tmp_path)) == 1
    others: list[tuple[Checkpoint, dict[str, Checkpoint], torch.dtype]] = [
        (base, {"b": b, "a": a}, torch.float32),
        (base, {"a": a, "c": c}, torch.float32),
        (base, {"a": a, "b": b}, torch.bfloat16),
        (c, {"a": a, "b": b}, torch.float32),
    ]
    for other, given, dtype in others:
        before = len(entries(tmp_path))
        TaskVectors.load(other, given, dtype=dtype, cache=tmp_path)
        assert len(entries(tmp_path)) == before + 1


def test_ties_matter(tmp_path: Path) -> None:
    base, experts = family("tied")
    loose = open_checkpoint({k: v.clone() for k, v in base.state_dict().items()})
    given = {name: open_checkpoint(model) for name, model in experts.items()}
    apart = TaskVectors.load(loose, given, cache=tmp_path)
    ties = {"output.weight": "embed.weight"}
    together = TaskVectors.load(loose, given, ties=ties, cache=tmp_path)
    assert (len(apart.layout.slots), len(together.layout.slots)) == (4, 3)
    assert torch.equal(together.rows, TaskVectors.load(loose, given, ties=ties).rows)


def test_an_adapter_of_another_base_is_not_taken_for_that_of_this_one(tmp_path: Path) -> None:
    """Its own digest is that of its factors; as a whole model it depends on its base too."""
    base = small_base()
    moved = [
        open_checkpoint({name: base.load(name) + shift for name in base.names})
        for shift in (0.01, 0.02)
    ]
    folder = write_adapter(tmp_path / "adapter", SHAPES, seed=1, modules=["head"])
    for other in moved:
        experts = {"x": adapter_checkpoint(folder, other)}
        mapped = TaskVectors.load(base, experts, cache=tmp_path / "rows")
        assert torch.equal(mapped.rows, TaskVectors.load(base, experts).rows)
    assert len(entries(tmp_path / "rows")) == 2


def test_a_fitted_vocabulary_matters(tmp_path: Path) -> None:
    """The digest of a fitted expert is that of the expert as given, however rows are matched."""

    def model(folder: str, seed: int, tokens: str) -> Checkpoint:
        generator = make_generator(seed)
        path = tmp_path / folder
        path.mkdir()
        state = {
            "embed_tokens.weight": torch.randn(4, 3, generator=generator),
            "fc.weight": torch.randn(3, 3, generator=generator),
        }
        save_file(state, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"vocab_size": 4}))
        (path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
        return open_checkpoint(path)

    base = model("base", 0, "abcd")
    moved = [model(tokens, 1, tokens) for tokens in ("bacd", "abdc")]
    assert moved[0].digest() == moved[1].digest()
    for expert in moved:
        experts = {"x": fit_vocabulary(expert, base, "tokens")}
        mapped = TaskVectors.load(base, experts, cache=tmp_path / "rows")
        assert torch.equal(mapped.rows, TaskVectors.load(base, experts).rows)
    assert len(entries(tmp_path / "rows")) == 2


def test_the_base_check_holds_for_rows_that_were_written_without_it(tmp_path: Path) -> None:
    generator = make_generator(0)
    base, other = (
        open_checkpoint({"w": torch.randn(50, 60, generator=generator)}) for _ in range(2)
    )
    TaskVectors.load(base, {"x": other}, cache=tmp_path, check_base=False)
    with pytest.raises(MergeError, match=r"'renamed' does not look .* 1\.4\d times"):
        TaskVectors.load(base, {"renamed": other}, cache=tmp_path)


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path) -> None:
    base, experts = models()
    name = "first.weight"
    state = {key: experts["e0"].load(key).clone() for key in base.names}
    broken = open_checkpoint({**state, name: torch.full_like(state[name], torch.nan)})
    for wrong, message in (
        ({"x": broken}, "holds NaN"),
        ({"x": base}, "it is the base"),
        ({"x": experts["e0"], "y": open_checkpoint(state)}, "have the same weights"),
    ):
        for _ in range(2):
            with pytest.raises(MergeError, match=message):
                TaskVectors.load(base, wrong, cache=tmp_path)
    assert not entries(tmp_path)


def test_a_copied_cache_is_compared_and_taken(
    built: TaskVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tmp_path / "rows", tmp_path / "copy")
    base, experts = models("cnn")
    with nothing_filled(monkeypatch):
        found = TaskVectors.load(base, experts, cache=tmp_path / "copy")
    assert torch.equal(found.rows, built.rows)


def test_a_cache_that_cannot_be_written_serves_what_it_has(
    built: TaskVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refused)  # a superuser may write everywhere
    cnn, cnns = models("cnn")
    assert torch.equal(TaskVectors.load(cnn, cnns, cache=tmp_path / "rows").rows, built.rows)
    mlp, mlps = models("mlp")
    with pytest.raises(MergeError, match=r"cannot be kept in .*rows: Permission denied") as caught:
        TaskVectors.load(mlp, mlps, cache=tmp_path / "rows")
    assert "can be written" in str(caught.value.hint)


def test_a_full_disk_is_told_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = models()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
    try:
        with pytest.raises(MergeError, match="cannot be kept in") as caught:
            TaskVectors.load(base, experts, cache=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "nothing was left behind" in str(caught.value.hint)
    assert not entries(tmp_path)

    def full(fd: int, content: memoryview, at: int) -> int:
        if at > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written(fd, content, at)

    written = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(MergeError, match="No space left on device"):
            TaskVectors.load(base, experts, cache=tmp_path)
    assert not entries(tmp_path)
    assert torch.equal(
        TaskVectors.load(base, experts, cache=tmp_path).rows, TaskVectors.load(base, experts).rows
    )


def test_too_little_room_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(100))
    base, experts = models()
    with pytest.raises(MergeError, match=r"100 bytes free, and they take 2\.56 kB"):
        TaskVectors.load(base, experts, cache=tmp_path)
    assert not entries(tmp_path)


def test_pickled_rows_are_a_place(built: TaskVectors, tmp_path: Path) -> None:
    content = pickle.dumps(TaskArithmetic().prepare(built))
    out = torch.empty(built.layout.size)
    pickle.loads(content).write(C, out)
    assert torch.equal(out, merged(built))
    base = {"w": torch.randn(3000, 50, generator=make_generator(0))}
    large = TaskVectors.load(
        open_checkpoint(base),
        {"x": open_checkpoint({"w": 1.1 * base["w"]})},
        cache=tmp_path / "large",
    )
    assert len(pickle.dumps(large)) < 5000 < large.nbytes
    shutil.rmtree(tmp_path / "rows")
    with pytest.raises(MergeError, match="cannot be mapped"):
        pickle.loads(content)
    assert torch.equal(merged(built), out)  # a map outlives the name of its file


def test_released_pages_come_back(built: TaskVectors) -> None:
    before = merged(built)
    built.release()
    assert torch.equal(merged(built), before)


def test_threads_that_ask_at_once_share_one_entry(tmp_path: Path) -> None:
    base, experts = models()
    wanted = TaskVectors.load(base, experts).rows
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: TaskVectors.load(base, experts, cache=tmp_path), range(8)))
    assert all(torch.equal(each.rows, wanted) for each in found)
    the_entry(tmp_path)


def test_candidates_write_nothing(tmp_path: Path) -> None:
    base, experts = models()
    vectors = TaskVectors.load(base, experts, cache=tmp_path)
    prepared = TaskArithmetic().prepare(vectors)
    out = torch.empty(vectors.layout.size)

    def state() -> object:
        return sorted((str(p), p.stat().st_mtime_ns, p.stat().st_size) for p in tmp_path.rglob("*"))

    def written() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(dict(line.split(": ") for line in lines)["write_bytes"])

    before = state()
    bytes_before = written()
    for c in torch.rand(100, 3, generator=make_generator(0), dtype=torch.float64):
        prepared.write(c, out)
    assert written() == bytes_before
    assert state() == before


def test_only_the_cpu_maps(tmp_path: Path) -> None:
    base, experts = models()
    with pytest.raises(MergeError, match="rows for meta cannot be mapped"):
        TaskVectors.load(base, experts, cache=tmp_path, device="meta")
