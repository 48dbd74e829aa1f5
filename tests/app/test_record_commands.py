from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from map_bo.app.main import main
from map_bo.evaluators.evaluator import Measurement
from map_bo.loop.optimize import optimize
from map_bo.loop.reading import load_result, load_state, outcomes_table
from map_bo.loop.run import Run
from map_bo.nested.optimize import optimize_nested
from map_bo.problems.evaluation_cache import CachedMeasurements, EvaluationCache
from map_bo.rng import make_generator
from map_bo.samplers.allocation.fixed import SuccessiveHalving
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.surrogates.quadratic import Quadratic
from map_bo.tracking import side_file
from map_bo.tracking.codec import encode_event, encode_metric, encode_observations
from map_bo.tracking.jsonl import JsonlStore
from map_bo.tracking.store import Event
from tests.integration.mistakes import failing
from tests.loop.bowls import Bowls, quick
from tests.loop.items import ItemProblem
from tests.nested.hills import Hills
from tests.tracking.scored import ScoredBowls
from tests.unsealed import unseal

PARTS = {name: getattr(quick(), name) for name in ("sampler", "surrogate", "solver")}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    optimize(Bowls(), 8, run_dir=tmp_path / "run", progress=False, tracking="none", **PARTS)
    return tmp_path / "run"


def change(run: Path, edit: Callable[[list[bytes]], list[bytes]]) -> bytes:
    """Edit the lines of a record and return it as it is then."""
    path = run / "events.jsonl"
    path.write_bytes(b"".join(edit(path.read_bytes().splitlines(keepends=True))))
    return path.read_bytes()


def checked(run: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Return the status and the output of `map-bo check`."""
    capsys.readouterr()
    try:
        main(["check", str(run)])
    except SystemExit as end:
        return int(end.code or 0), capsys.readouterr().out
    return 0, capsys.readouterr().out


def test_a_whole_record_is_said_to_be_whole_and_is_not_touched(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / "events.jsonl").read_bytes()
    status, said = checked(run, capsys)
    assert status == 0
    assert f"{run}: whole" in said
    assert f"whole lines: {before.count(bytes([10]))} (8 of 8 evaluations, finished)" in said
    main(["repair", str(run)])
    assert "needs no repair" in capsys.readouterr().out
    assert (run / "events.jsonl").read_bytes() == before
    assert not list(run.glob("*repair*"))


def test_a_damaged_record_is_refused_checked_repaired_and_gone_on_with(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = load_result(run)
    damaged = change(run, lambda lines: [*lines[:7], lines[7].replace(b"[", b"[ ", 1), *lines[8:]])
    said = failing(capsys, "choose", str(run))
    assert "line 8 of" in said
    assert f"lines 1 to 7 are whole; `map-bo check {run}`" in said
    status, said = checked(run, capsys)
    assert status == 1
    assert "whole lines: 7 (2 of 8 evaluations" in said
    assert "damage: line 8: it was changed after it was written" in said
    main(["repair", str(run)])
    assert "7 lines are kept" in capsys.readouterr().out
    assert (run / "events.before-repair.jsonl").read_bytes() == damaged
    assert checked(run, capsys)[0] == 0
    optimize(Bowls(), 8, run_dir=run, progress=False, tracking="none", **PARTS)
    again = load_result(run)
    assert again.seen.Y.tolist() == whole.seen.Y.tolist()
    assert again.front.X.tolist() == whole.front.X.tolist()


def test_whole_lines_with_data_that_do_not_fit_are_cut_off_too(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run, lambda lines: lines[:4])
    JsonlStore.open(run).append(Event("observed", {"index": 99}))
    assert "line 5: event 5 ('observed')" in checked(run, capsys)[1]
    main(["repair", str(run)])
    assert (run / "events.jsonl").read_bytes().count(b"\n") == 4
    assert checked(run, capsys)[0] == 0


def test_lines_that_are_missing_at_the_end_of_a_finished_run_are_noticed(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "summary.json").write_text("{}")
    assert checked(run, capsys)[0] == 0
    change(run, lambda lines: lines[:-1])
    status, said = checked(run, capsys)
    assert (status, "whole lines are missing at its end" in said) == (1, True)
    assert f"map-bo resume {run}" in said


def test_a_record_of_version_0_1_and_one_that_was_gone_on_with(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(run, lambda lines: lines[:5])
    unseal(run)
    status, said = checked(run, capsys)
    assert (status, "without checksums: 5; a changed number cannot be seen" in said) == (0, True)
    optimize(Bowls(), 8, run_dir=run, progress=False, tracking="none", **PARTS)
    assert "5; the checksum of the line after them covers them" in checked(run, capsys)[1]
    change(run, lambda lines: [lines[0].replace(b"1", b"2", 1), *lines[1:]])
    assert checked(run, capsys)[0] == 1


def test_a_nested_record_is_examined_node_by_node(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimize_nested(
        Hills(), 24, run_dir=tmp_path, progress=False, tracking="none", verify=2, **PARTS
    )
    status, said = checked(tmp_path, capsys)
    assert (status, "measurements of a nested run" in said) == (0, True)
    unseal(tmp_path, lambda text: text.replace('"index":1,', '"index":77,', 1))
    status, said = checked(tmp_path, capsys)
    assert (status, "an event of a node cannot be read" in said) == (1, True)
    main(["repair", str(tmp_path)])
    assert checked(tmp_path, capsys)[0] == 0


def test_what_could_not_be_written_is_added_later(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (run / "events.jsonl").read_bytes().splitlines(keepends=True)
    row = next(i for i, line in enumerate(lines) if b'"kind":"observed"' in line)
    change(run, lambda lines: lines[:row])
    printed = tmp_path / "printed"
    printed.write_bytes(lines[row])
    main(["repair", str(run), "--append", str(printed)])
    assert "1 events were added" in capsys.readouterr().out
    assert (run / "events.jsonl").read_bytes() == b"".join(lines[: row + 1])
    assert sorted(load_state(run)[0].outcomes) == [0]
    said = failing(capsys, "repair", str(run), "--append", str(printed))
    assert "does not follow the record" in said
    printed.write_text(json.dumps({"not": "an event"}))
    assert "not an event" in failing(capsys, "repair", str(run), "--append", str(printed))
    assert "cannot be read" in failing(capsys, "repair", str(run), "--append", str(run / "none"))
    assert (run / "events.jsonl").read_bytes() == b"".join(lines[: row + 1])


@pytest.mark.parametrize("content", [b"", b"{}\n"])
def test_a_check_promises_no_repair_where_nothing_is_whole(
    run: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    change(run, lambda lines: [content])
    (run / "summary.json").write_text("{}")
    status, said = checked(run, capsys)
    assert status == 1
    assert "restore it from a copy" in said
    assert "map-bo re" not in said


def test_a_record_of_which_nothing_is_whole_is_left_alone(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = change(run, lambda lines: [b"{}\n", *lines])
    assert "restore it from a copy" in failing(capsys, "repair", str(run))
    assert (run / "events.jsonl").read_bytes() == damaged
    assert "holds no run" in failing(capsys, "check", str(run.parent))


def test_a_run_that_was_extended_is_whole_and_shows_the_budget_in_force(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "summary.json").write_text("{}")  # left by a mirror that could not be removed
    Run(Bowls(), quick(12, verify=None, retries=1), JsonlStore.open(run))
    (run / "summary.json").write_text("{}")
    status, said = checked(run, capsys)
    assert (status, "8 of 12 evaluations, not finished" in said) == (0, True), said
    change(run, lambda lines: [*lines[:-1], lines[-1].replace(b'"reopens":true', b'"reopens":3')])
    assert checked(run, capsys)[0] == 1


def test_the_cache_of_evaluations_is_shown_and_emptied(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "kept.sqlite"
    entry = CachedMeasurements("math", {"value": Measurement(0.5)}, 90.0)
    EvaluationCache(file).put({"a": entry, "b": entry})
    main(["cache", "--file", str(file)])
    shown = capsys.readouterr().out
    assert f"{file}: 2 entries" in shown
    assert "measuring them took 180 s in all" in shown
    assert "  math: 2\n" in shown
    main(["cache", "--file", str(file), "--json"])
    assert json.loads(capsys.readouterr().out)["entries"] == {"math": 2}
    main(["cache", "--file", str(file), "--clear"])
    assert capsys.readouterr().out == "removed 2 entries\n"
    with pytest.raises(SystemExit) as end:
        main(["cache", "--file", str(tmp_path / "none")])
    assert end.value.code == 2
    assert "there is no file" in capsys.readouterr().err


# Outcomes of examples


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """A finished run whose outcomes of examples stand beside its record."""
    optimize(ScoredBowls(), 8, run_dir=tmp_path / "run", progress=False, tracking="none", **PARTS)
    return tmp_path / "run"


def test_outcomes_beside_a_record_are_part_of_it(
    scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = checked(scored, capsys)
    assert (status, "belong to no line" in said) == (0, False)
    with open(scored / "outcomes.bin", "ab") as file:
        file.write(b"left by a kill")
    status, said = checked(scored, capsys)
    assert (status, "14 bytes of outcomes beside the record belong to no line" in said) == (0, True)
    main(["repair", str(scored)])
    assert "needs no repair" in capsys.readouterr().out
    moved = scored.rename(scored.with_name("moved"))
    assert checked(moved, capsys)[0] == 0
    assert len(load_state(moved)[0].outcomes[0].examples[0]) == 2


def test_lost_outcomes_are_refused_and_a_repair_keeps_the_values(
    scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = load_state(scored)
    before = (scored / "events.jsonl").read_bytes()
    os.truncate(scored / "outcomes.bin", (scored / "outcomes.bin").stat().st_size // 2)
    said = failing(capsys, "choose", str(scored))
    assert "outcomes of the examples of 'far from b'" in said
    assert f"map-bo repair {scored}" in said
    status, said = checked(scored, capsys)
    assert status == 1
    assert "the outcomes of the examples of 'far from b' are lost: outcomes.bin has" in said
    assert "; and 8 more" in said
    assert "leaves out the outcomes of 5 lines (far from b, near a) and keeps all values" in said
    assert "makes the other evaluations again" not in said
    main(["repair", str(scored)])
    said = capsys.readouterr().out
    assert "8 of 8 evaluations, finished" in said
    assert "examples in 5 lines (far from b, near a) are lost and were left out" in said
    assert (scored / "events.before-repair.jsonl").read_bytes() == before
    assert checked(scored, capsys)[0] == 0
    after, _ = load_state(scored)
    assert torch.equal(after.data.Y, whole.data.Y)
    assert after.summary == whole.summary
    kept = [len(row) for row in after.data.examples]
    assert kept == [2, 2, 2, 1, 0, 0, 0, 0]
    [(name, last)] = after.data.examples[3].items()
    assert torch.equal(last.values, whole.data.examples[3][name].values)


def test_damage_to_both_files_is_repaired_at_once(
    scored: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (scored / "outcomes.bin").unlink()
    change(scored, lambda lines: [*lines[:-3], lines[-3].replace(b"[", b"[ ", 1), *lines[-2:]])
    status, said = checked(scored, capsys)
    assert (status, "leaves out the outcomes of" in said) == (1, True)
    assert "makes the other evaluations again" in said
    main(["repair", str(scored)])
    assert checked(scored, capsys)[0] == 0
    optimize(ScoredBowls(), 8, run_dir=scored, progress=False, tracking="none", **PARTS)
    assert load_state(scored)[0].summary is not None


def test_a_printed_measurement_is_added_with_its_outcomes(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = list(JsonlStore.open(scored).read())
    lines = (scored / "events.jsonl").read_bytes().splitlines(keepends=True)
    row = next(i for i, line in enumerate(lines) if b'"kind":"observed"' in line)
    for printed in (encode_event(whole[row]), lines[row]):  # as it is printed, and as it stood
        change(scored, lambda lines, row=row: lines[:row])  # type: ignore[misc]
        (tmp_path / "printed").write_bytes(printed)
        main(["repair", str(scored), "--append", str(tmp_path / "printed")])
        assert "1 events were added" in capsys.readouterr().out
        assert list(JsonlStore.open(scored).read()) == whole[: row + 1]


def test_a_record_with_lost_outcomes_of_a_nested_run_is_repaired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = JsonlStore.create(tmp_path)
    X = torch.full((1, 2), 0.5)
    problem = ScoredBowls()
    seen = problem.evaluate(X, generator=make_generator(0))
    created = {
        "settings": {},
        "space": problem.space.describe(),
        "metrics": [encode_metric(metric) for metric in problem.metrics],
        "nested": {"tree": []},
    }
    store.append(Event("created", created))
    names = [metric.name for metric in problem.metrics]
    store.append(Event("measured", {"names": names, "observation": encode_observations(seen)}))
    inner = {"index": 0, "observation": encode_observations(seen)}
    node = {"node": "root", "kind": "created", "data": created}
    proposed = {"node": "root", "kind": "proposed", "data": {"X": X.tolist(), "seconds": 0.0}}
    store.append(Event("node", node))
    store.append(Event("node", proposed))
    store.append(Event("node", {"node": "root", "kind": "observed", "data": inner}))
    assert checked(tmp_path, capsys)[0] == 0
    assert set(outcomes_table(tmp_path)["evaluator"]) == set(names)
    (tmp_path / "outcomes.bin").unlink()
    status, said = checked(tmp_path, capsys)
    assert (status, "leaves out the outcomes of 2 lines" in said) == (1, True)
    main(["repair", str(tmp_path)])
    status, said = checked(tmp_path, capsys)
    assert (status, "1 measurements of a nested run" in said) == (0, True), said
    assert not len(outcomes_table(tmp_path)["row"])


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_outcomes_are_written_as_a_table(
    scored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    main(["outcomes", str(scored), "--out", str(tmp_path / name)])
    assert (
        f"96000 outcomes of 8 evaluations written to {tmp_path / name}" in capsys.readouterr().out
    )
    table = outcomes_table(scored)
    assert len(table["row"]) == 96000
    content = (tmp_path / name).read_bytes()
    text = (gzip.decompress(content) if name.endswith("gz") else content).decode()
    lines = text.splitlines()
    assert lines[0] == "row,evaluator,metric,example,outcome"
    assert [float(line.rpartition(",")[2]) for line in lines[1:]] == table["outcome"].tolist()
    last = load_state(scored)[0].data.examples[7]["far from b"]
    assert table["outcome"][-6000:].tolist() == last.values[:, 0].tolist()


def test_a_table_of_nothing_is_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = failing(capsys, "outcomes", str(run), "--out", str(tmp_path / "table.csv"))
    assert "holds no outcomes of examples" in said
    said = failing(capsys, "outcomes", str(tmp_path / "none"), "--out", str(tmp_path / "table.ods"))
    assert "'table.ods'" in said, "before anything is read"
    assert not (tmp_path / "table.csv").exists()


@pytest.mark.slow
def test_a_run_that_tops_rows_up_goes_on_after_its_outcomes_were_lost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_file, "_INLINE", 0)
    monkeypatch.setattr(side_file, "_SMALL", 0)
    settings: dict[str, Any] = {
        "sampler": Sobol(), "surrogate": Quadratic(), "verify": 1, "progress": False,
        "tracking": "none", "items": SuccessiveHalving(share=0.25, factor=2),
    }  # fmt: skip
    optimize(ItemProblem(2, 80), 5, run_dir=tmp_path, **settings)
    kinds = [event.kind for event in JsonlStore.open(tmp_path).read()]
    assert checked(tmp_path, capsys)[0] == 0
    [_, _, _, fourth, *_] = [i for i, kind in enumerate(kinds) if kind == "observed"]
    change(tmp_path, lambda old: old[: fourth + 1])  # its row would get more examples next
    os.truncate(tmp_path / "outcomes.bin", 150)
    assert checked(tmp_path, capsys)[0] == 1
    main(["repair", str(tmp_path)])
    assert checked(tmp_path, capsys)[0] == 0
    before, _ = load_state(tmp_path)
    lost = [row for row, one in before.outcomes.items() if len(one.examples[0]) < 2]
    assert lost == [2, 3]
    optimize(ItemProblem(2, 80), 5, run_dir=tmp_path, **settings)
    after, _ = load_state(tmp_path)
    assert after.summary is not None
    assert after.summary["full_evaluations"] <= 5 + 1e-9
    for row in lost:  # with more examples, their values would be those of the new ones alone
        assert torch.equal(after.outcomes[row].Y, before.outcomes[row].Y)
        assert torch.equal(after.outcomes[row].counts, before.outcomes[row].counts)
    again = [event.kind for event in JsonlStore.open(tmp_path).read()]
    assert again.count("scored") > 1, "others get more"
