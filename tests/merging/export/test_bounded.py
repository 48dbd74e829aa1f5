from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.export.bounded import (
    Merge,
    merge_bounded,
    merge_by_pieces,
    merge_by_tensor,
    merge_linearly,
    merges_files,
    reads_pieces,
)
from map_bo.merging.export.model import merge_checkpoints
from map_bo.merging.vectors import kernel as kernels
from map_bo.merging.vectors.kernel import Kernel, KernelMerge
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import Deltas, PreparedMerge
from map_bo.merging.vectors.storage import resident_bytes
from map_bo.operators.sparse import Della, Ties
from map_bo.operators.statistics.regmean import RegMean
from map_bo.space import CoefficientSpace
from tests.merging.checkpoint_files import (
    BASE,
    COEFFICIENTS,
    EXPERTS,
    NAMES,
    Tied,
    merged,
    tensors_of,
)
from tests.merging.hard_checkpoints import hard_family, hard_tensors, loaded, opened, threads


def family(tensors: Mapping[str, Tensor]) -> tuple[Checkpoint, dict[str, Checkpoint]]:
    return open_checkpoint(tensors), {"e": open_checkpoint(tensors)}


def merge_of(
    base: Checkpoint, experts: Mapping[str, Checkpoint], operator: Any, c: Tensor, **settings: Any
) -> Merge:
    return Merge(base, experts, operator, tuple(experts), c, **{"check_base": False, **settings})


def collected(pieces: Any) -> dict[str, Tensor]:
    parts: dict[str, dict[int, Tensor]] = {}
    pieces(lambda name, start, piece: parts.setdefault(name, {}).update({start: piece.clone()}))
    return {name: torch.cat([part[at] for at in sorted(part)]) for name, part in parts.items()}


class Opaque:
    """An operator without further abilities, for a merge of its own."""

    def space(self, experts: tuple[str, ...], *, lower: float, upper: float) -> CoefficientSpace:
        return CoefficientSpace.box(experts, lower=lower, upper=upper)

    def prepare(self, deltas: Deltas) -> PreparedMerge:
        return TaskArithmetic().prepare(deltas)


def test_what_can_be_merged_from_files() -> None:
    narrow = open_checkpoint(hard_tensors("base", torch.bfloat16))
    assert reads_pieces(narrow, TaskArithmetic())
    assert reads_pieces(narrow, Ties())
    assert not reads_pieces(BASE, Ties())  # float64 and complex
    assert not reads_pieces(narrow, Opaque())
    assert merges_files(BASE, TaskArithmetic())  # tensor by tensor
    assert not merges_files(BASE, Ties())
    assert not merges_files(narrow, Opaque())


def test_an_operator_that_needs_loaded_task_vectors() -> None:
    merge = merge_of(BASE, EXPERTS, Opaque(), torch.tensor([0.5, 0.5]))
    assert merge.weights is None
    for way in (merge_bounded, merge_by_pieces):
        with pytest.raises(MergeError, match="Opaque cannot merge by pieces") as caught:
            way(merge)
        assert "loaded problem" in str(caught.value.hint)
    with pytest.raises(MergeError, match="Opaque is not linear"):
        merge_by_tensor(merge)
    tensors = {"w": torch.ones(1)}
    assert dict(merge_bounded(replace(merge, tensors=tensors))) == tensors  # type: ignore[arg-type]


def test_a_merge_says_its_coefficients_and_weights() -> None:
    merge = merge_of(BASE, EXPERTS, TaskArithmetic(), torch.tensor([0.5, -1.0]))
    assert merge.coefficients == dict(zip(EXPERTS, (0.5, -1.0), strict=True))
    assert merge.weights is not None
    assert merge.weights("any") == merge.coefficients
    blocks = {"first": "^first", "rest": "*"}
    tied = replace(
        merge,
        operator=TaskArithmetic(blocks),
        names=("a", "b", "c", "d"),
        c=torch.tensor([1.0, 2.0, 3.0, 4.0]),
        ties={"first.weight": "last.weight"},
    )
    assert tied.weights is not None
    assert list(tied.weights("first.bias").values()) == [1.0, 3.0]
    assert list(tied.weights("first.weight").values()) == [2.0, 4.0]  # those of its tensor


def test_inputs_are_checked_at_once_and_passes_are_made_when_pieces_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, experts = opened(*hard_family(tmp_path))
    c = torch.tensor([0.5, 0.5, 0.5])
    passes: list[int] = []
    real = Ties.prepare_pieces

    def prepare_pieces(self: Ties, deltas: Deltas) -> KernelMerge:
        passes.append(1)
        return real(self, deltas)

    monkeypatch.setattr(Ties, "prepare_pieces", prepare_pieces)
    pieces = merge_by_pieces(merge_of(base, experts, Ties(), c))
    assert passes == []
    assert sorted(collected(pieces)) == sorted(n for n in base.names if base.shape(n).numel())
    assert passes == [1]
    with pytest.raises(MergeError, match="lacks"):
        merge_by_pieces(
            merge_of(base, {"e": open_checkpoint({"one": torch.ones(1, 1)})}, Ties(), c[:1])
        )


def test_one_tensor_under_three_names_of_which_the_base_records_two(tmp_path: Path) -> None:
    value = torch.arange(6.0)
    base = {"b": value, "c": value, "a": value.clone(), "other": torch.ones(3)}
    assert open_checkpoint(base).ties == {"c": "b"}
    tuned = {"c": value + 2, "other": torch.zeros(3)}
    out = merge_checkpoints(
        base,
        {"e": tuned},
        {"e": 0.5},
        tmp_path / "m",
        operator=Ties(density=1.0),
        ties={"c": "a"},
        check_base=False,
        progress=False,
    )
    found = loaded(out)
    for name in "abc":
        torch.testing.assert_close(found[name], value + 1)
    assert open_checkpoint(out).ties == {"c": "b"}


@pytest.mark.parametrize("alias", [torch.bfloat16, torch.float32])
def test_a_tied_name_keeps_its_own_dtype(alias: torch.dtype, tmp_path: Path) -> None:
    value = torch.arange(6.0)
    base = {"a": value, "b": value.to(alias)}
    out = merge_checkpoints(
        base, {"e": {"a": value + 1}}, {"e": 1.0}, tmp_path / "m", ties={"b": "a"}, progress=False
    )
    assert loaded(out)["b"].dtype == alias
    torch.testing.assert_close(loaded(out)["b"].float(), value + 1)


def test_fixed_tensors_go_by_pieces_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("map_bo.merging.align.experts._PIECE", 4)
    table = torch.arange(10)
    base, experts = family({"w": torch.ones(3), "table": table, "none": torch.zeros(0).long()})
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("loaded whole"))
    found = collected(
        merge_by_pieces(
            merge_of(base, experts, TaskArithmetic(), torch.tensor([0.5]), check_base=True)
        )
    )
    assert torch.equal(found["table"], table)


class Wide(Kernel):
    """A kernel that cuts at multiples of 20000 and takes a MB besides for each thread."""

    def unit(self, slot: int) -> int:
        return 20_000

    def overhead(self, threads: int) -> int:
        return 1_000_000 * threads

    def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
        return rows[0].clone()


class TestLimit:
    def merge(self, kernel: Kernel) -> KernelMerge:
        deltas = OnDiskVectors(*family({"w": torch.ones(1_000_000)}), check_base=False)
        return KernelMerge(deltas, kernel, (0,))

    def test_much_room_changes_nothing(self) -> None:
        merge = self.merge(Wide())
        merge.limit(10**12, 4)
        assert (merge._threads, merge._chunk) == (4, kernels._CHUNK["cpu"] // 2)

    @pytest.mark.parametrize("share", [1.0, 1.5, 2.1, 3.7, 10.0])
    def test_threads_and_pieces_fit(self, share: float) -> None:
        merge = self.merge(Wide())
        least = merge.least_memory()
        room = int(share * least)
        merge.limit(room, 8)
        assert merge._threads == min(8, int(share))
        each = (least - 1_000_000) // 20_000
        assert merge._chunk >= 20_000
        assert merge._threads * (merge._chunk * each + 1_000_000) <= room

    def test_less_than_the_least_is_refused(self) -> None:
        merge = self.merge(Wide())
        with pytest.raises(MergeError, match=r"merging needs \d+ MB besides .* are allowed"):
            merge.limit(merge.least_memory() - 1, 8)

    def test_rows_of_della_are_not_cut(self) -> None:
        base, experts = family({"w": torch.ones(3, 100_000)})
        merge = Della().prepare(OnDiskVectors(base, experts, check_base=False))
        merge.limit(merge.least_memory(), 4)
        found: list[tuple[int, int]] = []
        merge.run(torch.ones(1), lambda slot, start, piece: found.append((start, len(piece))))
        assert sorted(found) == [(0, 100_000), (100_000, 100_000), (200_000, 100_000)]

    def test_products_of_layers_are_counted(self) -> None:
        base, experts = family({"w": torch.ones(5, 300)})
        operator = RegMean({"e": {"w": torch.eye(300)}})
        merge = operator.prepare(OnDiskVectors(base, experts, check_base=False))
        assert merge.least_memory() > 12 * 8 * 300**2

    def test_fewer_threads_prepare_where_memory_is_short(self, tmp_path: Path) -> None:
        base, experts = opened(*hard_family(tmp_path))
        c = torch.tensor([0.5, 0.5, 0.5])
        seen: list[int | None] = []

        class Telling(Ties):
            def kernel(self, deltas: Any) -> Kernel:
                seen.append(deltas.threads)
                return super().kernel(deltas)

        with threads(6):
            for spare in (64_000_000 + 70_000_000, 10**10):
                memory = resident_bytes() + spare
                collected(merge_by_pieces(merge_of(base, experts, Telling(), c), memory))
        assert seen == [2, 6]


def test_the_tensors_of_a_linear_merge_in_its_own_precision_are_checked() -> None:
    merge = merge_of(BASE, EXPERTS, TaskArithmetic(), torch.tensor([0.5, 0.0]))
    assert len(list(merge_by_tensor(merge))) == len(BASE.names)
    with pytest.raises(MergeError, match="max_memory is 1 MB"):
        merge_by_tensor(merge, 1_000_000)


def by_hand(weights: Mapping[str, float]) -> dict[str, Tensor]:
    base, result = tensors_of(0), {}
    for name, value in base.items():
        wide = {torch.bfloat16: torch.float32}.get(value.dtype, value.dtype)
        result[name] = value
        if value.is_floating_point() or value.is_complex():
            total = value.to(wide)
            for i, expert in enumerate(NAMES, start=1):
                delta = tensors_of(i)[name].to(wide) - value.to(wide)
                total = total + weights[expert] * delta
            result[name] = total.to(value.dtype)
    return result


class TestMergeLinearly:
    def test_it_is_the_weighted_sum_in_the_dtype_of_the_base(self) -> None:
        result = dict(merged())
        expected = by_hand(COEFFICIENTS)
        assert list(result) == sorted(expected)
        for name, value in expected.items():
            assert result[name].dtype == value.dtype
            torch.testing.assert_close(result[name], value)

    def test_other_tensors_are_those_of_the_base(self) -> None:
        result = dict(merged())
        assert result["third.counter"] == 0
        assert torch.equal(result["third.mask"], tensors_of(0)["third.mask"])

    def test_weight_zero_is_the_base_bit_for_bit_and_reads_no_expert(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for expert in EXPERTS.values():
            monkeypatch.setattr(expert, "load", None)
        for weights in ({}, dict.fromkeys(NAMES, 0.0)):
            assert open_checkpoint(dict(merged(weights))).digest() == BASE.digest()

    @given(a=st.floats(-2, 2), b=st.floats(-2, 2))
    def test_it_is_linear_in_the_weights(self, a: float, b: float) -> None:
        name, value = next(iter(merged({NAMES[0]: a, NAMES[1]: b})))
        assert name == "first.bias"  # float64
        base, one, two = (tensors_of(i)[name] for i in range(3))
        expected = (1 - a - b) * base + a * one + b * two
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)

    def test_bfloat16_is_summed_in_float32(self) -> None:
        base = torch.ones(1, dtype=torch.bfloat16)
        experts = {str(i): open_checkpoint({"w": base * 1.0078125}) for i in range(64)}
        weights = dict.fromkeys(experts, 1 / 16)
        _, value = next(merge_linearly(open_checkpoint({"w": base}), experts, lambda name: weights))
        # Each step alone is lost when it is rounded to bfloat16.
        assert value.item() == 1.03125

    def test_weights_may_differ_between_tensors(self) -> None:
        result = dict(
            merge_linearly(
                BASE, EXPERTS, lambda name: {"math": 1.0 if name.startswith("first") else 0.0}
            )
        )
        torch.testing.assert_close(result["first.weight"], tensors_of(1)["first.weight"])
        assert torch.equal(result["second.weight"], tensors_of(0)["second.weight"])

    def test_neither_base_nor_expert_is_changed(self) -> None:
        before = [c.digest() for c in (BASE, *EXPERTS.values())]
        for _, tensor in merged():
            if tensor.is_floating_point() and tensor.numel():
                assert tensor.data_ptr() not in {BASE.load(n).data_ptr() for n in BASE.names}
        assert [c.digest() for c in (BASE, *EXPERTS.values())] == before

    def test_variances_stay_above_the_least_of_the_models(self) -> None:
        base = open_checkpoint({"norm.running_var": torch.tensor([1.0, 4.0])})
        experts = {
            "a": open_checkpoint({"norm.running_var": torch.tensor([0.5, 5.0])}),
            "b": open_checkpoint({"norm.running_var": torch.tensor([0.25, 6.0])}),
        }
        [(_, value)] = merge_linearly(base, experts, lambda name: {"a": 3.0})
        assert value.tolist() == [0.25, 7.0]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("first.bias"), "'math' lacks 1 of the base's tensors: first.bias"),
            (lambda t: t.update(extra=torch.ones(1)), "'math' has 1 tensors that the base lacks"),
            (
                lambda t: t.update({"first.weight": torch.ones(3, 4)}),
                r"other shapes than the base: first\.weight \[3, 4\] against \[4, 3\]",
            ),
            (
                lambda t: t.update({"first.weight": torch.ones(4, 3, dtype=torch.int8)}),
                r"other kinds of dtype than the base: first\.weight torch\.int8",
            ),
        ],
    )
    def test_an_expert_that_does_not_fit_is_refused_at_once(
        self, change: Any, message: str
    ) -> None:
        tensors = tensors_of(1)
        change(tensors)
        with pytest.raises(MergeError, match=message) as caught:
            merge_linearly(BASE, {"math": open_checkpoint(tensors)}, lambda name: {})
        assert caught.value.hint

    def test_an_expert_in_another_float_dtype_fits(self) -> None:
        half = open_checkpoint({"w": torch.full((2,), 3.0, dtype=torch.float16)})
        base = open_checkpoint({"w": torch.ones(2)})
        [(_, value)] = merge_linearly(base, {"a": half}, lambda name: {"a": 0.5})
        assert value.dtype == torch.float32
        assert value.tolist() == [2.0, 2.0]

    def test_bad_weights(self) -> None:
        with pytest.raises(MergeError, match="unknown experts code"):
            next(merged({"code": 1.0}))
        with pytest.raises(MergeError, match=r"weight of math for tensor 'first\.bias' is not f"):
            next(merged({"math": float("nan")}))

    def test_an_expert_may_lack_the_alias_or_keep_only_it(self) -> None:
        weight = Tied(1).embed.detach()
        for name in ("embed", "head.weight"):
            stream = merge_linearly(
                open_checkpoint(Tied(0)),
                {"a": open_checkpoint({name: weight})},
                lambda n: {"a": 1.0},
            )
            torch.testing.assert_close(dict(stream)["embed"], weight)

    def test_an_alias_that_only_the_expert_has_is_no_further_tensor(self) -> None:
        base = open_checkpoint({"embed": Tied(0).embed})
        [(name, value)] = merge_linearly(
            base, {"a": open_checkpoint(Tied(1))}, lambda n: {"a": 1.0}
        )
        assert name == "embed"
        torch.testing.assert_close(value, Tied(1).embed.detach())

    def test_an_expert_that_unties_is_refused(self) -> None:
        tensors = {k: v.clone() for k, v in Tied(1).state_dict().items()}
        base = open_checkpoint(Tied(0))
        equal = merge_linearly(base, {"a": open_checkpoint(tensors)}, lambda n: {"a": 1.0})
        assert len(list(equal)) == 2
        tensors["head.weight"] += 1
        stream = merge_linearly(base, {"a": open_checkpoint(tensors)}, lambda n: {"a": 1.0})
        with pytest.raises(MergeError, match=r"'embed' and 'head\.weight' are one tensor .* 'a'"):
            list(stream)
