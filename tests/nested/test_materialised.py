from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.errors import ConfigError, StoreError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.nested import materialised
from map_bo.nested.materialised import MaterialisedRun, Models, composes, rebuild_root
from map_bo.nested.optimize import nested_run, optimize_nested
from map_bo.nested.result import NestedResult
from map_bo.nested.run import NestedRun
from map_bo.nested.settings import Nested
from map_bo.nested.tree import Group, NodePath
from map_bo.operators.sparse import Ties
from map_bo.space import CoefficientSpace
from map_bo.tracking.jsonl import JsonlStore, MemoryStore
from map_bo.tracking.store import Event, RunStore
from map_bo.workers.workers import Workers
from tests.nested.electing import Counted, by_hand, electing, models
from tests.nested.hills import Hills, options, quick

BUDGET = 21
HOWS: dict[str, dict[str, Any]] = {
    "points": {"stages": 2, "points": 2},
    "one point": {"tree": [[["e0", "e3"], "e1"], "e2"], "points": 1},
    "point": {"stages": 2, "promote": "point"},
    "published": {
        "group_size": 2, "order": "score", "promote": "point", "measure": "children",
        "budget_split": "equal",
    },
    "preference": {
        "stages": 2, "promote": "point",
        "preferences": ({"e0": 3.0, "e1": 1.0, "e2": 0.0, "e3": 1.0},),
    },
}  # fmt: skip


def run(
    store: RunStore, name: str = "points", budget: int = BUDGET, **changes: Any
) -> NestedResult:
    problem = changes.pop("problem", None) or electing()
    how = Nested(**HOWS[name], **changes)
    return nested_run(problem, quick(budget), how, store).drive()


@cache
def finished(name: str) -> tuple[NestedResult, MemoryStore, list[str]]:
    """Return a run of so small a budget that its parts do not divide it, its record and tasks."""
    store, counted = MemoryStore(), Counted()
    return run(store, name, problem=electing(counted=counted)), store, counted.names


def merged_again(result: NestedResult, x: Tensor, kind: str = "mlp") -> dict[str, Tensor]:
    """Merge by hand, from what the record says the nodes promoted."""
    base, experts = models(kind, 4)
    handed = {node.name: node for node in result.nodes}

    def made(path: NodePath, group: Group, c: Tensor) -> dict[str, Tensor]:
        sources: dict[str, Mapping[str, Tensor]] = {}
        for i, child in enumerate(group.children):
            if isinstance(child, str):
                sources[child] = experts[child]
                continue
            node = handed[".".join(map(str, (*path, i)))]
            for number, told in enumerate(node.promoted):
                below = children_of(child, (*path, i), handed)
                row = torch.tensor([told.get(name, 0.0) for name in below], dtype=torch.float64)
                name = child.label if len(node.promoted) == 1 else f"{child.label} #{number + 1}"
                sources[name] = made((*path, i), child, row)
        return by_hand(base, sources, c)

    assert result.tree is not None
    return made((), result.tree, x)


def children_of(group: Group, path: NodePath, handed: Mapping[str, Any]) -> list[str]:
    """Return the names of a node's coefficients."""
    names: list[str] = []
    for i, child in enumerate(group.children):
        if isinstance(child, str):
            names.append(child)
            continue
        count = len(handed[".".join(map(str, (*path, i)))].promoted)
        names += [child.label] if count == 1 else [f"{child.label} #{k + 1}" for k in range(count)]
    return names


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], atol: float = 1e-5) -> bool:
    return set(one) == set(other) and all(
        torch.allclose(tensor, other[name], atol=atol) for name, tensor in one.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", HOWS)
def test_the_exported_model_is_the_one_merged_again_by_hand(name: str, tmp_path: Path) -> None:
    result, _, _ = finished(name)
    assert result.tree is not None
    handed = {node.name: node for node in result.nodes}
    assert result.space.names == tuple(children_of(result.tree, (), handed))
    choice = result.choose({"e0": 1.0, "e2": 1.0})
    written = open_checkpoint(choice.export(tmp_path / "out"))
    found = {tensor: written.load(tensor) for tensor in written.names}
    assert same(found, merged_again(result, choice.x))
    base = models("mlp", 4)[0]
    assert not same(found, base, atol=1e-2)
    assert "name: elect" in (tmp_path / "out" / "recipe.yaml").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", HOWS)
def test_measured_values_are_those_of_the_models_merged_by_hand(name: str) -> None:
    result, _, _ = finished(name)
    whole = electing()
    verified = result.front.verified
    assert int(verified.sum()) >= 1
    X = torch.cat([result.front.X[verified], result.seen.X[-3:]])
    Y = torch.cat([result.front.real[verified], result.seen.Y[-3:]])
    for x, y in zip(X, Y, strict=True):
        model = merged_again(result, x)
        alone = whole.with_experts({"merged": model}, [metric.name for metric in result.metrics])
        with alone.load(torch.zeros(1)) as live:
            live.load_state_dict(model)
            values = [alone._evaluators[metric.name](live) for metric in result.metrics]
        assert values == pytest.approx(y.tolist(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", HOWS)
def test_no_more_is_measured_than_there_is_and_every_node_its_own_tasks(name: str) -> None:
    result, _, measured = finished(name)
    assert result.data_sets == len(measured) <= BUDGET * 4
    assert sum(node.data_sets for node in result.nodes) <= result.data_sets
    for node in result.nodes:
        assert node.tasks == len(node.label.split("+"))


def outcome(result: NestedResult) -> list[Any]:
    tensors = [result.seen.X, result.seen.Y, result.front.X, result.front.mean, result.front.real]
    told = [tensor.nan_to_num(-99.0).tolist() for tensor in tensors]
    return [*told, result.data_sets, [node.describe() for node in result.nodes]]


class CrashError(StoreError):
    """Stands for SIGKILL: nothing takes it for a failed evaluation, and nothing is written on."""

    def __init__(self) -> None:
        super().__init__("the process was killed")


class CrashingStore:
    def __init__(self, inner: RunStore, at: int) -> None:
        self.inner, self.left = inner, at

    def append(self, event: Event) -> None:
        self.left -= 1
        if self.left < 0:
            raise CrashError
        self.inner.append(event)

    def read(self) -> Iterator[Event]:
        return self.inner.read()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["points", pytest.param("published", marks=pytest.mark.slow)])
def test_a_run_that_was_killed_goes_on_to_the_same_end(name: str, tmp_path: Path) -> None:
    expected, whole, _ = finished(name)
    kinds = [event.kind for event in whole.read()]
    handed = [i for i, kind in enumerate(kinds) if kind == "handed"]
    # After a merge was promoted, in the root, and while the outcome is recorded.
    places = [handed[0] + 1, handed[-1] + 3, len(kinds) - 3]
    for at in places:
        store = MemoryStore()
        with pytest.raises(CrashError):
            run(CrashingStore(store, at), name)
        again = run(store, name)
        assert outcome(again) == outcome(expected)
        # A kill repeats the start of the evaluation that it struck.
        once = [kind for kind in kinds if kind != "started"]
        assert [event.kind for event in store.read() if event.kind != "started"] == once
        model = again.point(0).export(tmp_path / str(at))
        other = merged_again(expected, expected.front.X[0])
        written = open_checkpoint(model)
        assert same({key: written.load(key) for key in written.names}, other)


def test_a_finished_run_measures_nothing_again() -> None:
    expected, store, _ = finished("points")
    counted = Counted()
    again = run(store, problem=electing(counted=counted))
    assert outcome(again) == outcome(expected)
    assert not counted.names


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mlp", "tied"])
def test_models_that_do_not_fit_in_memory_go_to_files(kind: str, tmp_path: Path) -> None:
    held = finished("points")[0] if kind == "mlp" else run(MemoryStore(), problem=electing(kind))
    folder = tmp_path / "run"
    filed = run(JsonlStore.create(folder), problem=electing(kind), memory=0.0)
    assert outcome(filed) == outcome(held)
    files = sorted((folder / "merged").iterdir())
    count = sum(len(node.promoted) for node in held.nodes)
    assert [file.name for file in files] == [f"{i}.safetensors" for i in range(count)]
    names = [name for node in held.nodes for name in names_of(node)]
    for name, file in zip(names, files, strict=True):
        checkpoint = open_checkpoint(file)
        row = handed_row(held, name)
        expected = part_by_hand(held, name, row, kind)
        assert same({key: checkpoint.load(key) for key in checkpoint.names}, expected)
    choice = filed.choose({"e1": 1.0})
    written = open_checkpoint(choice.export(tmp_path / "out"))
    found = {key: written.load(key) for key in written.names}
    assert same(found, merged_again(held, choice.x, kind))
    # A run that goes on makes its files anew.
    for file in files:
        file.unlink()
    again = run(JsonlStore.open(folder), problem=electing(kind), memory=0.0)
    assert outcome(again) == outcome(held)
    assert sorted((folder / "merged").iterdir()) == files


def names_of(node: Any) -> list[str]:
    count = len(node.promoted)
    return [node.label] if count == 1 else [f"{node.label} #{i + 1}" for i in range(count)]


def handed_row(result: NestedResult, name: str) -> Mapping[str, float]:
    return next(
        told
        for node in result.nodes
        for own, told in zip(names_of(node), node.promoted, strict=True)
        if own == name
    )


def part_by_hand(
    result: NestedResult, name: str, row: Mapping[str, float], kind: str
) -> dict[str, Tensor]:
    base, experts = models(kind, 4)
    leaves = name.split(" #")[0].split("+")
    c = torch.tensor([row.get(leaf, 0.0) for leaf in leaves], dtype=torch.float64)
    return by_hand(base, {leaf: experts[leaf] for leaf in leaves}, c)


@pytest.mark.parametrize("name", HOWS)
def test_the_models_of_a_finished_run_can_be_made_once_more(name: str) -> None:
    result, store, _ = finished(name)
    again: Any = rebuild_root(electing(), result, list(store.read()))
    assert again.space.names == result.space.names
    for x in result.front.X[:3]:
        assert same(again.merged(x), merged_again(result, x))
        own: Any = result.problem
        assert same(own.merged(x), again.merged(x), atol=0.0)


def test_a_record_without_what_was_promoted_cannot_be_rebuilt() -> None:
    result, store, _ = finished("points")
    events = [e for e in store.read() if e.kind != "handed" or e.data["node"] != "1"]
    with pytest.raises(StoreError, match="does not say what node '1' promoted"):
        rebuild_root(electing(), result, events)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"promote": "surrogate"}, "nested.promote=surrogate needs an operator that is linear"),
        ({"refine": 4}, "nested.refine=4 needs an operator that is linear"),
        ({"inform": True}, "nested.inform=true needs an operator that is linear"),
        (
            {"promote": "point", "preferences": ({f"e{i}": 1.0 for i in range(4)},) * 2},
            "2 preferences need an operator that is linear",
        ),
    ],
)
def test_what_needs_a_linear_operator_is_refused(settings: dict[str, Any], match: str) -> None:
    counted = Counted()
    with pytest.raises(ConfigError, match=match) as caught:
        nested_run(electing(counted=counted), quick(), Nested(**settings), MemoryStore())
    assert caught.value.hint
    assert not counted.names


def test_workers_are_refused_where_merges_do_not_compose() -> None:
    @dataclasses.dataclass(frozen=True)
    class Given:
        count: int | None = 2

        def open(self, problem: object) -> Workers:
            raise AssertionError("nothing is started")

    with pytest.raises(ConfigError, match="workers cannot evaluate a nested run") as caught:
        nested_run(electing(), quick(workers=Given()), Nested(), MemoryStore())
    assert "task_arithmetic" in str(caught.value.hint)


def test_the_operator_says_which_run_it_is() -> None:
    assert not composes(electing())
    assert composes(electing(operator=None))
    one = nested_run(electing(), quick(), Nested(), MemoryStore())
    other = nested_run(electing(operator=None), quick(), Nested(), MemoryStore())
    assert isinstance(one, MaterialisedRun)
    assert type(other) is NestedRun
    with pytest.raises(ConfigError, match="Hills has no models to merge in stages"):
        MaterialisedRun(Hills(), quick(), Nested(), MemoryStore())


def test_one_stage_is_one_merge_of_the_experts(tmp_path: Path) -> None:
    result = optimize_nested(
        electing(), 12, nested=Nested(stages=1), progress=False, tracking="none", **options()
    )
    assert result.space.names == ("e0", "e1", "e2", "e3")
    base, experts = models("mlp", 4)
    x = result.front.X[0]
    written = open_checkpoint(result.point(0).export(tmp_path / "out"))
    found = {key: written.load(key) for key in written.names}
    assert same(found, by_hand(base, experts, x))


def test_models_are_kept_in_memory_as_long_as_they_fit(tmp_path: Path) -> None:
    tensors = {"weight": torch.arange(10.0)}  # 40 bytes
    kept = Models(tmp_path, 90)
    for name in "abc":
        kept.keep(name, {"weight": tensors["weight"] + ord(name)})
    assert [isinstance(kept[name], dict) for name in "abc"] == [True, True, False]
    for name in "abc":
        found = open_checkpoint(kept[name]).load("weight")
        assert torch.equal(found, tensors["weight"] + ord(name))
    assert [file.name for file in (tmp_path / "merged").iterdir()] == ["2.safetensors"]
    without = Models(None, 0)
    without.keep("a", tensors)
    assert isinstance(without["a"], dict)


def test_a_full_disk_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **settings: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(materialised, "save_file", full)
    with pytest.raises(StoreError, match="No space left on device") as caught:
        Models(tmp_path, 0).keep("a", {"weight": torch.ones(3)})
    assert "resume" in str(caught.value.hint)


@pytest.mark.slow
def test_searched_settings_are_each_nodes_own() -> None:
    def problem() -> Any:
        return electing(operator=Ties(search=["density"]))

    store = MemoryStore()
    result = run(store, problem=problem())
    assert result.space.settings == ("density",)
    assert result.space.defaults == (0.2,)
    result.space.check(result.seen.X)
    assert result.seen.X[0, -1] == 0.2
    for node in result.nodes:
        for handed in node.promoted:
            assert 0.05 <= handed["density"] <= 1.0
            assert any(abs(v) > 1e-3 for name, v in handed.items() if name != "density")
    half = MemoryStore()
    events = list(store.read())
    with pytest.raises(CrashError):
        run(CrashingStore(half, len(events) - 4), problem=problem())
    assert outcome(run(half, problem=problem())) == outcome(result)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["score", "conflict"])
def test_orders_measure_with_the_settings_at_rest(order: str) -> None:
    problem = electing(operator=Ties(search={"density": (0.3, 0.9)}, density=0.5))
    how = Nested(stages=2, points=1, order=order)  # type: ignore[arg-type]
    result = nested_run(problem, quick(60), how, MemoryStore()).drive()
    result.space.check(result.seen.X)
    assert result.space.defaults == (0.5,)


def test_settings_are_not_searched_where_merges_compose() -> None:
    box = CoefficientSpace.box(("a", "b", "c", "d"))
    space = CoefficientSpace(
        (*box.names, "density"),
        (*box.lower, 0.1),
        (*box.upper, 0.9),
        owner=(*box.owner, -1),
        experts=box.experts,
        defaults=(0.2,),
    )
    with pytest.raises(ConfigError, match="density cannot be searched") as caught:
        nested_run(Hills(box=space), quick(30), Nested(), MemoryStore())
    assert "leave it out" in str(caught.value.hint)
