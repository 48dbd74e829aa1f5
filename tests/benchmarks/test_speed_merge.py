"""The benchmark of merging: its models, its clock, its yardstick, and what it leaves behind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.run import FURTHER
from benchmarks.speed import merge, merge_streaming
from benchmarks.speed.merge_adapters import adapters, in_full
from benchmarks.speed.merge_cuda import lines_of, measure_on
from benchmarks.speed.merge_disk import models_on_disk, require_space
from benchmarks.speed.merge_models import coefficients, resident, tensors, write_folders
from benchmarks.speed.merge_operators import CASES, Case, rows_of
from benchmarks.speed.merge_part import (
    Copy,
    Options,
    Outcome,
    Way,
    in_turns,
    over,
    row,
    storages,
    table_of,
)
from benchmarks.speed.merge_peers import loop_merge, module_of, require_equal, states_of
from benchmarks.speed.merge_shapes import SIZES, LlamaShape, Size
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.linear_merge import TaskArithmetic

ROOT = Path(__file__).parents[2]
TINY = LlamaShape(width=64, layers=1, intermediate=96, vocabulary=50)


def test_the_full_sizes_are_those_that_are_promised() -> None:
    full = SIZES["full"]
    assert len(full.resident.tensors()) == 111
    assert full.resident.parameters == pytest.approx(134.1e6, rel=1e-3)
    assert full.streamed.parameters == pytest.approx(1.5e9, rel=0.02)


@pytest.mark.slow
def test_the_tensors_are_those_of_a_llama() -> None:
    transformers = pytest.importorskip("transformers")
    settings = TINY.config("float32")
    for key in ("architectures", "model_type", "torch_dtype"):
        del settings[key]
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    assert {n: tuple(p.shape) for n, p in model.state_dict().items()} == TINY.tensors()


def test_ways_take_turns_and_the_first_does_not_count() -> None:
    calls: list[tuple[str, int]] = []

    def way(name: str, seconds: list[float]) -> Way:
        def run(turn: int) -> float:
            calls.append((name, turn))
            return seconds[turn]

        return run

    seconds = in_turns({"copy": way("copy", [9, 1, 4, 2]), "x": way("x", [0, 3, 4, 4])}, 3)
    assert calls == [(name, turn) for turn in range(4) for name in ("copy", "x")]
    assert seconds == {"copy": [1, 4, 2], "x": [3, 4, 4]}
    assert over(seconds) == {"copy": 1, "x": 2}  # the median of 3, 1, 2; the medians' is 4 / 2
    assert in_turns({"x": way("x", [5])}, 1, warm_up=False) == {"x": [5]}


def test_the_ratio_is_taken_within_a_turn() -> None:
    # The machine slows everything down fourfold in one turn: no ratio changes.
    assert over({"copy": [1, 4, 1], "x": [2, 8, 2]})["x"] == 2
    assert over({"copy": [1, 10, 10], "x": [3, 3, 40]})["x"] == 3


def test_the_copy_moves_the_bytes_that_it_says() -> None:
    source = torch.arange(24, dtype=torch.bfloat16).view(4, 6)
    copy = Copy(source, 60)
    assert torch.equal(copy(), source.view(-1)[:15])
    assert copy.nbytes == 60


def test_numbers_are_drawn_each_for_itself_and_the_same_again() -> None:
    vectors = resident(TINY, 2, torch.float32)
    assert torch.equal(vectors.rows, resident(TINY, 2, torch.float32).rows)
    for flat in vectors.rows:
        values = torch.cat([slot.of(flat).flatten() for slot in vectors.layout.slots])
        assert len(torch.unique(values.abs())) > 0.99 * TINY.parameters
    assert not torch.equal(vectors.rows[1], vectors.rows[2])


def test_candidates_differ_from_turn_to_turn() -> None:
    assert not torch.equal(coefficients(3, 1), coefficients(3, 2))
    assert len(set(coefficients(8).tolist())) == 8


def test_folders_are_checkpoints_in_shards(tmp_path: Path) -> None:
    folders = write_folders(tmp_path, TINY, 2, torch.bfloat16, shards=3)
    assert len(folders.files) == 9
    base = open_checkpoint(folders.base)
    assert {name: tuple(base.shape(name)) for name in base.names} == TINY.tensors()
    for expert in folders.experts.values():
        name = "model.layers.0.mlp.up_proj.weight"
        change = open_checkpoint(expert).load(name).float() - base.load(name).float()
        assert 0.001 < float(change.std()) < 0.004
    assert folders.nbytes == sum(
        base.load(name).numel() * base.dtype(name).itemsize for name in base.names
    )


def test_folders_are_removed_whatever_happens(tmp_path: Path) -> None:
    def interrupted() -> None:
        with models_on_disk(tmp_path, TINY, 1, torch.float32, shards=1) as merges:
            assert merges.folders.base.is_dir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--scratch"):
        require_space(tmp_path, 1 << 60)


def test_a_copy_of_files_reports_its_own_memory_alone(tmp_path: Path) -> None:
    held = torch.ones(1 << 26)  # 256 MB of this process, which are not the copy's
    with models_on_disk(tmp_path, TINY, 2, torch.float32, shards=2) as merges:
        assert merges.way("copy", "copy")(0) > 0
        assert len(list(merges.out.iterdir())) == 2
        assert 1e6 < merges.peaks["copy"] < 1e8
        assert merges.cached is None or merges.cached > 0.9
        assert merges.moved == 4 * merges.folders.nbytes
        with pytest.raises(SystemExit, match="KeyError"):
            merges.way("none", "none")(0)
    assert len(held)


def test_a_way_that_merges_otherwise_is_not_timed() -> None:
    vectors = resident(TINY, 3, torch.float32)
    out = torch.empty(vectors.layout.size)
    c = coefficients(3)
    TaskArithmetic().prepare(vectors).write(c, out)
    merged = loop_merge(vectors)(c)
    require_equal("the loop", vectors, out, merged)
    with pytest.raises(SystemExit, match="the loop merges"):
        require_equal("the loop", vectors, out, loop_merge(vectors)(1.01 * c))


def test_a_module_has_the_state_that_it_is_made_of() -> None:
    state = states_of(resident(TINY, 1, torch.float32))["e0"]
    made = module_of(state).state_dict()
    assert set(made) == set(state)
    assert all(torch.equal(made[name], tensor) for name, tensor in state.items())


def test_adapters_in_full_are_the_same_task_vectors() -> None:
    factors = adapters(TINY, 2, 4, torch.float32)
    full = in_full(factors)
    assert factors.nbytes < full.nbytes
    changed = {
        name
        for name, tensor in tensors(full, full.deltas.abs().amax(0)).items()
        if bool(tensor.any())
    }
    assert changed == set(TINY.linear())
    assert torch.equal(full.deltas, factors.deltas)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_every_operator_is_measured_with_fixed_and_searched_settings(
    case: Case,
) -> None:
    vectors = resident(TINY, 3, torch.float32)
    out = torch.zeros(vectors.layout.size)
    copy = Copy(vectors.rows, 5 * out.numel() * 4)
    found = rows_of(case, vectors, out, copy, 1)
    ways = {"copy", "fixed"} | ({"searched"} if case.searched else set())
    assert set(found["seconds"]) == ways
    assert found["over copy"]["copy"] == 1
    assert ("prepare searched" in found) == (case.searched is not None)
    assert bool(out.any())


def test_what_is_measured_on_a_device_is_a_share_of_its_copy() -> None:
    found = measure_on("cpu", TINY, torch.float32, 1)
    assert found["share"]["copy"] == 1
    for name, values in found["all seconds"].items():
        assert found["share"][name] == pytest.approx(found["all seconds"]["copy"][0] / values[0])
    assert [line.count("|") for line in lines_of("float32", found)] == [7, 7, 7]


def test_storages_are_those_that_task_vectors_take() -> None:
    assert storages()[:2] == (torch.float32, torch.bfloat16)


def test_a_table_has_as_many_cells_as_heads() -> None:
    table = table_of("note", ("a", "b", "c"), [row("x", None, 12.345), row(1, 0.5, "y")])
    assert table == [
        "note",
        "",
        "| a | b | c |",
        "|---|---|---|",
        "| x |  | 12.3 |",
        "| 1 | 0.500 | y |",
    ]


def test_each_part_is_recorded_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def part(name: str) -> Callable[[Options], Outcome]:
        return lambda options: Outcome(name, [name], {"streamed": options.size.streamed.layers})

    monkeypatch.setattr(merge, "PARTS", {name: part(name) for name in merge.PARTS})
    monkeypatch.setattr("signal.signal", lambda *_: None)
    out = tmp_path / "merge.json"
    monkeypatch.setattr(
        sys, "argv", ["merge", "--smoke", "--out", str(out), "--only", "linear", "cuda"]
    )
    merge.main()
    assert {path.name for path in tmp_path.iterdir()} == {"merge.json", "merge_cuda.json"}
    record = json.loads((tmp_path / "merge_cuda.json").read_text())
    assert record["table"] == ["cuda"]
    assert record["data"] == {"streamed": SIZES["smoke"].streamed.layers}


def test_every_part_has_its_place_in_the_readme() -> None:
    stems = [merge.record_of(Path("merge.json"), part).stem for part in merge.PARTS]
    assert stems == ["merge", *FURTHER["merge"]]
    text = (ROOT / "README.md").read_text()
    for stem in stems:
        assert f"<!-- table:{stem} -->\n" in text
        assert f"<!-- /table:{stem} -->" in text


@pytest.mark.slow
def test_checkpoints_are_merged_within_the_cap(tmp_path: Path) -> None:
    size = Size(TINY, TINY, repeats=1, disk_repeats=1)
    outcome = merge_streaming.measure(Options(size, tmp_path))
    for operator in merge_streaming.OPERATORS:
        assert outcome.data["peak bytes"][operator] < outcome.data["cap"]
        whole, rest = (outcome.data["seconds"][f"{operator}{end}"] for end in ("", ", rest"))
        assert whole == pytest.approx(rest + outcome.data["seconds"]["digests"])
    assert len(outcome.table) == 4 + 6
    assert not list(tmp_path.iterdir())
