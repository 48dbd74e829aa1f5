"""What holds for every operator with settings: laws of merging, and the words of its errors."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.averages import Slerp, WeightedAverage
from map_bo.operators.consensus import Consensus
from map_bo.operators.nearswap import NearSwap
from map_bo.operators.pcb import Pcb
from map_bo.operators.sce import Sce
from map_bo.operators.searchable import SearchableOperator
from map_bo.operators.shared_regions import Ram
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Magnitude, Ties
from map_bo.operators.spectral.isotropic import IsoCTS
from map_bo.operators.spectral.knots import KnOTS
from map_bo.operators.spectral.tsv import TSVM
from map_bo.operators.spherical import MultiSlerp, NuSlerp
from map_bo.operators.statistics.data_free import DataFreeRegMean
from map_bo.plain import from_plain, to_plain
from tests.operators.cases import (
    OPERATORS,
    SHAPES,
    chunked,
    coefficients,
    hard_vectors,
    label,
    merge,
    write,
)

BLOCKS = {"first": r"^layer\.0", "rest": "*"}
every = pytest.mark.parametrize("operator", OPERATORS, ids=label)
linear = pytest.mark.parametrize(
    "operator",
    [
        WeightedAverage(),
        Slerp(),
        Slerp(of="weights"),
        Magnitude(density=1.0),
        Dare(drop_rate=0.0),
        MultiSlerp(),
        MultiSlerp(of="weights"),
        NuSlerp(),
        NuSlerp(along="column", of="weights"),
        NearSwap(strength=100.0),
    ],
    ids=label,
)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


@linear
def test_one_hot_is_the_expert(operator: SearchableOperator) -> None:
    vectors = hard_vectors()
    for n in range(3):
        expert = vectors.base + vectors.deltas[n]
        assert close(merge(operator, vectors, torch.eye(3)[n]), expert)


@every
def test_order_of_the_experts_does_not_matter(operator: SearchableOperator) -> None:
    vectors = hard_vectors()
    order = [2, 0, 1]
    other = replace(
        vectors,
        experts=tuple(vectors.experts[n] for n in order),
        rows=torch.cat([vectors.rows[:1], vectors.deltas[order]]),
    )
    c = coefficients(operator, 3)
    moved = torch.cat([c[:3][order], c[3:]])
    assert close(merge(operator, vectors, c), merge(operator, other, moved))


@every
@pytest.mark.parametrize("chunk", [1, 3, 7, 64])
def test_pieces_do_not_matter(operator: SearchableOperator, chunk: int) -> None:
    vectors = hard_vectors()
    prepared = operator.prepare(vectors)
    c = coefficients(operator, 3)
    whole = write(prepared, vectors, c)
    assert close(write(chunked(prepared, chunk), vectors, c), whole, 1e-6)


@pytest.mark.parametrize(
    "operator", [Dare(drop_rate=0.6), Della(), Dare(drop_rate=0.9, seed=4)], ids=label
)
def test_masks_do_not_depend_on_pieces_or_the_order_of_tensors(
    operator: SearchableOperator,
) -> None:
    vectors = hard_vectors(zeros=0.0)
    prepared = operator.prepare(vectors)
    found = {}
    for chunk in (1 << 17, 1, 5, 64):
        # Of one expert alone: where it does not move, it was dropped.
        rows = write(chunked(prepared, chunk), vectors, [0.0, 1.0, 0.0])
        found[chunk] = {s.name: s.of(rows) != s.of(vectors.base) for s in vectors.layout.slots}
    for masks in found.values():
        for name, mask in masks.items():
            assert torch.equal(mask, found[1][name])
    turned = tuple(reversed(vectors.layout.slots))
    other = replace(vectors, layout=replace(vectors.layout, slots=turned))
    again = torch.zeros(vectors.layout.size)

    def put(slot: int, start: int, piece: torch.Tensor) -> None:
        turned[slot].of(again).view(-1)[start : start + len(piece)].copy_(piece)

    operator.prepare(other).run(torch.tensor([0.0, 1.0, 0.0]), put)
    for slot in vectors.layout.slots:
        assert torch.equal(slot.of(again) != slot.of(vectors.base), found[1][slot.name])


@every
def test_bfloat16_storage_merges_the_stored_numbers(operator: SearchableOperator) -> None:
    narrow = hard_vectors(dtype=torch.bfloat16)
    wide = replace(narrow, rows=narrow.rows.float())
    c = coefficients(operator, 3)
    assert torch.equal(merge(operator, narrow, c), merge(operator, wide, c))
    rounded = merge(operator, narrow, c, dtype=torch.bfloat16)
    assert torch.equal(rounded, merge(operator, wide, c).bfloat16())


@every
def test_blocks_are_merged_each_with_its_own_coefficients(operator: SearchableOperator) -> None:
    vectors = hard_vectors()
    by_block = replace(operator, blocks=BLOCKS)
    c = coefficients(by_block, 3)
    found = merge(by_block, vectors, c)
    table = c[:6].view(3, 2)
    for block in range(2):
        alone = merge(operator, vectors, torch.cat([table[:, block], c[6:]]))
        for slot in vectors.layout.slots:
            if by_block.block(slot.name) == block:
                assert torch.equal(slot.of(found), slot.of(alone))


@every
def test_number_of_threads_does_not_change_a_bit(operator: SearchableOperator) -> None:
    # Threads share out whole pieces, and torch uses one thread within each.
    vectors = hard_vectors(shapes={"a": (300, 70), "b": (50,), "c": ()})
    c = coefficients(operator, 3)
    alone = merge(operator, vectors, c, chunk=1000)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in range(3):
            assert torch.equal(merge(operator, vectors, c, chunk=1000), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "operator",
    [
        Ties(),
        Ties(election="count", density=0.7),
        Ties(normalisation="none"),
        Magnitude(),
        Breadcrumbs(density=0.5, joining="elect"),
        Dare(drop_rate=0.4),
        Della(),
        Consensus(),
        TSVM(),
        IsoCTS(),
        KnOTS(),
        NearSwap(strength=0.5),
        Pcb(density=0.4),
        Ram(threshold=0.4),
        Sce(density=0.5),
    ],
    ids=label,
)
@settings(max_examples=10)
@given(
    st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3),
    st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3),
    st.floats(-1, 1),
)
def test_linear_in_the_coefficients(
    operator: SearchableOperator, a: list[float], b: list[float], t: float
) -> None:
    vectors = hard_vectors()
    prepared = operator.prepare(vectors)
    both = torch.tensor(a) + t * torch.tensor(b)
    left = write(prepared, vectors, both) - vectors.base
    right = write(prepared, vectors, a) - vectors.base
    right = right + t * (write(prepared, vectors, b) - vectors.base)
    assert torch.allclose(left, right, atol=1e-4)


@given(st.floats(0.1, 3.0))
def test_only_ratios_count_in_an_average(factor: float) -> None:
    vectors = hard_vectors()
    c = torch.tensor([0.2, 0.5, 0.1])
    found = merge(WeightedAverage(), vectors, factor * c)
    assert close(found, merge(WeightedAverage(), vectors, c))


@pytest.mark.parametrize("operator", [Ties(search=["scale"]), Dare(search=["scale"])], ids=label)
def test_scale_multiplies_all_coefficients(operator: SearchableOperator) -> None:
    vectors = hard_vectors()
    found = merge(operator, vectors, [0.3, 0.2, 0.4, 2.0])
    assert close(found, merge(operator, vectors, [0.6, 0.4, 0.8, 1.0]))
    settings: Any = {"search": (), "scale": 2.0}
    assert close(found, merge(replace(operator, **settings), vectors, [0.3, 0.2, 0.4]))


@pytest.mark.parametrize(
    ("operator", "name", "value"),
    [
        (Dare(), "drop_rate", 0.3),
        (Della(), "drop_rate", 0.5),
        (Della(), "epsilon", 0.02),
        (Consensus(), "strictness", 0.7),
        (Ties(), "scale", 0.4),
        (KnOTS(), "scale", 0.4),
        (DataFreeRegMean(), "alpha", 0.3),
        (DataFreeRegMean(), "ridge", 0.2),
    ],
)
def test_a_searched_setting_is_the_setting(
    operator: SearchableOperator, name: str, value: float
) -> None:
    vectors = hard_vectors()
    c = [0.3, 0.8, 0.4]
    settings: Any = {name: value}
    fixed = merge(replace(operator, **settings), vectors, c)
    searched = replace(operator, search=[name])
    assert torch.equal(merge(searched, vectors, [*c, value]), fixed)


def test_space_has_the_settings_behind_the_coefficients() -> None:
    operator = Della(blocks=BLOCKS, search={"epsilon": (0.0, 0.05), "scale": [0.5, 2]})
    space = operator.space(("a", "b"), lower=-1, upper=2)
    assert space.names == ("a/first", "a/rest", "b/first", "b/rest", "epsilon", "scale")
    assert space.owner == (0, 0, 1, 1, -1, -1)
    assert space.lower == (-1.0,) * 4 + (0.0, 0.5)
    assert space.defaults == (0.05, 1.0)  # 0.1 is not within the bounds
    assert Ties(search="density").space(("a",), lower=0, upper=1).lower == (0.0, 0.05)


@every
def test_settings_are_equal_by_value(operator: SearchableOperator) -> None:
    told = to_plain(operator)
    again = from_plain(told)
    assert again == operator
    assert to_plain(again) == told


@pytest.mark.parametrize(
    ("make", "said", "hint"),
    [
        (lambda: Ties(density=2), "density must .* got 2", "between 0 and 1"),
        (lambda: Ties(density=-0.1), "density must .* got -0.1", "between 0 and 1"),
        (lambda: Ties(density="much"), "density must .* got 'much'", "between 0 and 1"),  # type: ignore[arg-type]
        (lambda: Ties(density=True), "density must .* got True", "between 0 and 1"),
        (lambda: Ties(density=float("nan")), "density must .* got nan", "between 0 and 1"),
        (lambda: Ties(trim="layer"), "trim must .* got 'layer'", "global, tensor"),
        (lambda: Ties(election="sum"), "election must .* got 'sum'", "mass, weighted_mass, count"),
        (lambda: Ties(normalisation="mean"), "normalisation must", "agreeing, weights, none"),
        (lambda: Ties(joining="mean"), "joining must .* got 'mean'", "sum, elect"),
        (lambda: Ties(scale=float("inf")), "scale must .* got inf", "finite"),
        (lambda: Ties(scale="big"), "scale must .* got 'big'", "finite"),  # type: ignore[arg-type]
        (lambda: Breadcrumbs(gamma=1.5), "gamma must .* got 1.5", "between 0 and 1"),
        (lambda: Dare(drop_rate=1), "drop_rate must .* got 1", r"\[0, 1\)"),
        (lambda: Dare(seed=0.5), "seed must .* got 0.5", "whole number"),  # type: ignore[arg-type]
        (lambda: Dare(seed=True), "seed must .* got True", "whole number"),
        (lambda: Della(drop_rate=0.01), "from -0.04 to 0.06", "epsilon <= 2 drop_rate"),
        (lambda: Della(epsilon=2), "epsilon must .* got 2", "between 0 and 1"),
        (lambda: Consensus(strictness=-1), "strictness must .* got -1", "of at least 0"),
        (lambda: Consensus(strictness=float("inf")), "strictness must .* got inf", "of at least 0"),
        (lambda: Consensus(strictness="x"), "strictness must .* got 'x'", "of at least 0"),  # type: ignore[arg-type]
        (lambda: Consensus(agreement=0), "agreement must .* got 0", "of at least 1"),
        (lambda: Consensus(agreement=True), "agreement must .* got True", "of at least 1"),
        (lambda: Slerp(of="angles"), "of must .* got 'angles'", "deltas, weights"),
        (lambda: Slerp(norms="max"), "norms must .* got 'max'", "mean, own"),
        (lambda: Ties(search=["trim"]), "ties cannot search 'trim'", "density, scale"),
        (lambda: Slerp(search=["of"]), "slerp cannot search 'of'", "none"),
        (lambda: Ties(search=7), "ties cannot search '7'", "density"),  # type: ignore[arg-type]
        (lambda: Ties(search={"density": [0.1]}), r"got \[0.1\]", "lower, upper"),
        (lambda: Ties(search={"density": 0.1}), "ascending numbers, got 0.1", "lower, upper"),  # type: ignore[dict-item]
        (lambda: Ties(search={"density": "ab"}), "ascending numbers, got 'ab'", "lower, upper"),  # type: ignore[dict-item]
        (lambda: Ties(search={"density": (0.9, 0.1)}), "bounds of density", "ascending numbers"),
        (lambda: Ties(search={"density": (0.5, 1.1)}), "density must .* got 1.1", "between 0"),
        (lambda: Dare(search={"drop_rate": (0, 1)}), "drop_rate must .* got 1.0", r"\[0, 1\)"),
        # Possible one by one, and not together.
        (
            lambda: Della(search={"drop_rate": (0.1, 0.9), "epsilon": (0.0, 0.3)}),
            "from -0.05 to 0.25",
            "epsilon",
        ),
        (lambda: Ties(blocks={}), "there are no blocks", "leave out"),
        (lambda: Ties(blocks={"a": "("}), "not a regular expression", r"'\*'"),
    ],
)
def test_wrong_settings_are_refused(make: Any, said: str, hint: str) -> None:
    with pytest.raises(MergeError, match=said) as caught:
        make()
    assert caught.value.hint is not None
    assert re.search(hint, str(caught.value)), str(caught.value)


def test_no_search_is_said_in_several_ways() -> None:
    assert Ties(search=None) == Ties(search=()) == Ties(search={}) == Ties()  # type: ignore[arg-type]


def test_what_does_not_fit_the_models_is_refused() -> None:
    vectors = hard_vectors(experts=2)
    with pytest.raises(MergeError, match="3 tasks must agree and there are 2") as caught:
        Consensus(agreement=3).prepare(vectors)
    assert "from 1 to 2" in str(caught.value.hint)
    with pytest.raises(MergeError, match="belongs to no block"):
        Ties(blocks={"a": "layer"}).prepare(vectors)
    with pytest.raises(MergeError, match="no floating tensor belongs to the blocks b"):
        Ties(blocks={"a": "*", "b": "nowhere"}).prepare(vectors)


@pytest.mark.parametrize("operator", [WeightedAverage(), Slerp()], ids=label)
def test_averages_take_no_negative_coefficients(operator: SearchableOperator) -> None:
    with pytest.raises(MergeError, match="no negative coefficients, and the lower bound is -1"):
        operator.space(("a", "b"), lower=-1, upper=1)
    vectors = hard_vectors()
    prepared = operator.prepare(vectors)
    out = torch.full((vectors.layout.size,), 7.0)
    with pytest.raises(MergeError, match="coefficients must not be negative"):
        prepared.write(torch.tensor([1.0, -1.0, 0.5]), out)
    assert bool((out == 7.0).all())
    # What a space lets pass as rounding is 0.
    near = write(prepared, vectors, [1.0, -1e-7, 0.5])
    assert torch.equal(near, write(prepared, vectors, [1.0, 0.0, 0.5]))
    assert torch.equal(write(prepared, vectors, [0.0, -1e-7, 0.0]), zero_padded(vectors))


def zero_padded(vectors: TaskVectors) -> torch.Tensor:
    out = torch.zeros(vectors.layout.size)
    for slot in vectors.layout.slots:
        slot.of(out).copy_(slot.of(vectors.base))
    return out


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskVectors, OnDiskVectors]:
    """The same models resident and on disk, with a variance, in float32 and bfloat16."""
    folder = tmp_path_factory.mktemp("models")
    vectors = hard_vectors(shapes={**SHAPES, "bn.running_var": (6,)})
    opened = []
    for i, row in enumerate(vectors.rows):
        flat = row if not i else vectors.base + row
        tensors = {s.name: s.of(flat).clone() for s in vectors.layout.slots}
        tensors["bn.running_var"].abs_().add_(0.1)
        tensors["layer.1.weight"] = tensors["layer.1.weight"].bfloat16()
        path = folder / f"{i}.safetensors"
        save_file(tensors, path)
        opened.append(open_checkpoint(path))
    base, *experts = opened
    named = dict(zip(vectors.experts, experts, strict=True))
    return (
        TaskVectors.load(base, named, check_base=False),
        OnDiskVectors(base, named, check_base=False),
    )


@pytest.mark.parametrize("operator", [Dare(drop_rate=0.6), Della()], ids=label)
def test_masks_of_models_on_disk_are_the_same(
    operator: SearchableOperator, files: tuple[TaskVectors, OnDiskVectors]
) -> None:
    resident, _ = files
    for chunk in (3, 1 << 17):
        found = [merge(operator, vectors, [0.0, 1.0, 0.0], chunk=chunk) for vectors in files]
        moved = [out != resident.base for out in found]
        assert torch.equal(*moved)


@every
def test_models_on_disk_are_merged_alike(
    operator: SearchableOperator, files: tuple[TaskVectors, OnDiskVectors]
) -> None:
    resident, streamed = files
    for c in (coefficients(operator, 3), 3 * coefficients(operator, 3, seed=1)):
        c[3:].clamp_(0.1, 0.15)
        alone = merge(operator, resident, c)
        # Rows lie otherwise in memory, so that products may round otherwise.
        assert close(merge(operator, streamed, c), alone, 1e-6)
        assert close(merge(operator, streamed, c, chunk=17), alone)
