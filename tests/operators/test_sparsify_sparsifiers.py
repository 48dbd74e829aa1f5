from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.merging.vectors.parallel import arena
from map_bo.operators import sparsify as module
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Magnitude
from map_bo.operators.sparsify import RankDrop, element_keys, rank_all, row_width
from tests.operators.cases import hard_vectors


def test_width_of_rows() -> None:
    shapes = [
        (),
        (0,),
        (7,),
        (5, 6),
        (2, 5, 6),
        (8, 4, 3, 3),
        (8, 4, 1, 1),
        (3, 0),
        (2, 3, 2, 2, 2),
    ]
    assert [row_width(shape) for shape in shapes] == [1, 0, 7, 6, 6, 36, 4, 0, 24]


def test_ranks_kept_and_ranked_anew_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = hard_vectors()
    widths = tuple(row_width(slot.shape) for slot in vectors.layout.slots)
    known = rank_all(vectors, widths)
    monkeypatch.setattr(module, "_RANKED", 10)
    short = rank_all(vectors, widths)
    keys = element_keys(vectors, 1)
    for slot, where in enumerate(vectors.layout.slots):
        assert torch.equal(known[slot], short[slot])
        unit = max(widths[slot], 1)
        for start in range(0, where.numel, unit):
            rows = vectors.read(slot, start, start + unit)[1:]
            arena.reset()
            kept = RankDrop(keys, widths, known, 0.5, 0.4).apply(rows, slot, start).clone()
            anew = RankDrop(keys, widths, None, 0.5, 0.4).apply(rows, slot, start)
            assert torch.equal(kept, anew)


@pytest.mark.parametrize("trim", ["tensor", "global"])
@given(st.floats(0, 1), st.floats(0, 1))
def test_band_keeps_what_the_shares_say(trim: str, density: float, gamma: float) -> None:
    vectors = hard_vectors(shapes={"a": (20, 7), "b": (13,)}, experts=2, zeros=0.0)
    # Differing magnitudes, so that shares are exact.
    vectors.rows[1:] = torch.linspace(-1, 1.01, vectors.rows[1:].numel()).view_as(vectors.rows[1:])
    made = Breadcrumbs(density=density, gamma=gamma, trim=trim).sparsifier(vectors)
    kept, total = 0, 0
    for slot, where in enumerate(vectors.layout.slots):
        arena.reset()
        rows = vectors.read(slot, 0, where.numel)[1:]
        out = made.apply(rows, slot, 0)
        assert torch.equal(out[out != 0], rows[out != 0])
        kept, total = kept + int((out[0] != 0).sum()), total + where.numel
        if trim == "tensor":
            assert abs(int((out[0] != 0).sum()) - density * where.numel) <= 2
            sizes = rows[0].abs().sort(descending=True).values
            gone = int(min(gamma, 1 - density) * where.numel + 1e-9)
            if bool(out[0].any()):
                assert float(out[0].abs().max()) == float(sizes[gone])
    assert abs(kept - density * total) <= 4


@pytest.mark.parametrize(
    ("searched", "name"),
    [
        (Magnitude(search=["density"]), "density"),
        (Breadcrumbs(search=["density", "gamma"]), "density"),
        (Breadcrumbs(search=["density", "gamma"]), "gamma"),
    ],
)
def test_searched_shares_are_followed(searched: Magnitude, name: str) -> None:
    vectors = hard_vectors(shapes={"a": (40, 40)}, zeros=0.0)
    made = searched.sparsifier(vectors)
    rows = vectors.read(0, 0, 1600)[1:]
    counts = []
    for value in (0.0, 0.02, 0.3, 0.6, 0.9, 1.0):
        arena.reset()
        counts.append(int((made.at({name: value}).apply(rows, 0, 0)[0] != 0).sum()))
    if name == "density":
        # A fifth of the magnitudes are the same one, so that shares are no closer than that.
        for count, value in zip(counts, (0.0, 0.02, 0.3, 0.6, 0.9, 1.0), strict=True):
            assert abs(count / 1600 - value) < 0.22
        assert counts == sorted(counts)
        assert (counts[0], counts[-1]) == (0, 1600)
    else:
        assert len(set(counts)) > 1
    assert made.at({}) is made or made.at({}).apply(rows, 0, 0) is not None


def test_gamma_leaves_short_tensors_and_equal_numbers() -> None:
    vectors = hard_vectors(shapes={"scalar": (), "bias": (20,), "w": (30, 30)}, zeros=0.0)
    vectors.rows[1:] = 0.25
    for operator in (
        Breadcrumbs(density=0.9, gamma=0.01),
        Breadcrumbs(density=0.9, search=["gamma"]),
    ):
        made = operator.sparsifier(vectors)
        for slot, where in enumerate(vectors.layout.slots):
            arena.reset()
            rows = vectors.read(slot, 0, where.numel)[1:]
            assert torch.equal(made.apply(rows, slot, 0), rows)


def test_masks_of_seeds_and_experts_differ() -> None:
    vectors = hard_vectors(shapes={"w": (50, 50)}, zeros=0.0)
    rows = vectors.read(0, 0, 2500)[1:]
    masks = []
    for operator in (Dare(drop_rate=0.5), Dare(drop_rate=0.5, seed=1), Della(drop_rate=0.5)):
        arena.reset()
        masks += list((operator.sparsifier(vectors).apply(rows, 0, 0) != 0).clone())
    for i, first in enumerate(masks[:6]):
        for second in masks[:i]:
            assert 0.4 < float((first == second).double().mean()) < 0.6
