"""Adapters in memory: they stay factors, and everything is as with whole models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.adapters.adapter import adapter_checkpoint
from map_bo.merging.adapters.low_rank import exact_products
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.vectors import linear_merge
from map_bo.merging.vectors.blocks import Blocks, block_norms
from map_bo.merging.vectors.kernel import Kernel, KernelMerge
from map_bo.merging.vectors.linear_merge import LinearMerge, TaskArithmetic
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import Deltas
from map_bo.merging.vectors.task_vectors import TaskVectors, cosines
from map_bo.rng import make_generator
from tests.contracts.operator_contract import Allocations
from tests.merging.adapter_files import SHAPES, as_dense, small_adapters, small_base, write_adapter

BLOCKS = {"early": r"layers\.0\.", "late": "*"}
coefficients = st.lists(st.floats(-2, 2, width=32), min_size=4, max_size=4)


class Models:
    """Three adapters and a whole model over one base, resident as they are and multiplied out."""

    def __init__(self, folder: Path) -> None:
        self.base = small_base()
        full = {
            name: self.base.load(name) + 0.1 * torch.rand(shape, generator=make_generator(9))
            for name, shape in SHAPES.items()
        }
        adapters = small_adapters(folder, self.base)
        self.experts: dict[str, Checkpoint] = {
            "math": adapters["math"],
            "full": open_checkpoint(full),
            "code": adapters["code"],
            "chat": adapters["chat"],
        }
        self.dense = {name: as_dense(expert) for name, expert in self.experts.items()}
        self._loaded = {
            (kind, dtype): TaskVectors.load(self.base, experts, dtype=dtype)
            for kind, experts in (("low", self.experts), ("dense", self.dense))
            for dtype in (torch.float32, torch.bfloat16)
        }

    def low(self, dtype: torch.dtype = torch.float32) -> TaskVectors:
        return self._loaded["low", dtype]

    def multiplied_out(self, dtype: torch.dtype = torch.float32) -> TaskVectors:
        return self._loaded["dense", dtype]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("adapters"))


def merge(
    vectors: TaskVectors,
    c: list[float] | Tensor,
    blocks: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    out = torch.full((vectors.layout.size,), torch.nan, dtype=dtype)
    TaskArithmetic(blocks).prepare(vectors).write(torch.as_tensor(c, dtype=torch.float64), out)
    return out


def close(found: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


class TestRows:
    def test_only_the_base_and_whole_models_have_rows(self, models: Models) -> None:
        vectors = models.low()
        assert vectors.rows.shape == (2, vectors.layout.size)
        assert vectors.dense_experts == (1,)
        assert models.multiplied_out().dense_experts == (0, 1, 2, 3)
        assert isinstance(vectors, Deltas)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_deltas_are_those_of_whole_models(self, models: Models, dtype: torch.dtype) -> None:
        found, wanted = models.low(dtype).deltas, models.multiplied_out(dtype).deltas
        assert found.dtype == dtype
        close(found.float(), wanted.float(), 2e-6 if dtype == torch.float32 else 1e-2)

    @given(st.data())
    def test_pieces(self, models: Models, data: st.DataObject) -> None:
        vectors = models.low()
        slot = data.draw(st.integers(0, len(vectors.layout.slots) - 1))
        where = vectors.layout.slots[slot]
        start = data.draw(st.integers(0, where.numel))
        stop = data.draw(st.integers(start, where.numel))
        wanted = models.multiplied_out().read(slot, start, stop)
        room = torch.full((5, stop - start), torch.nan)
        close(vectors.read(slot, start, stop, room), wanted)
        close(vectors.read(slot, start, stop), wanted)

    @given(st.data())
    def test_pieces_from_checkpoints(self, models: Models, data: st.DataObject) -> None:
        on_disk = OnDiskVectors(models.base, models.experts)
        slot = data.draw(st.integers(0, len(on_disk.layout.slots) - 1))
        where = on_disk.layout.slots[slot]
        start = data.draw(st.integers(0, where.numel))
        stop = data.draw(st.integers(start, where.numel))
        close(on_disk.read(slot, start, stop), models.multiplied_out().read(slot, start, stop))
        for expert in models.experts.values():
            whole = expert.load(where.name).flatten()[start:stop]
            room = torch.full((stop - start,), torch.nan)
            for piece in (
                expert.read(where.name, start, stop),
                expert.read(where.name, start, stop, out=room),
            ):
                assert piece.dtype == whole.dtype
                close(piece, whole)

    def test_other_operators_read_them(self, models: Models) -> None:
        class Largest(Kernel):
            def piece(self, rows: Tensor, slot: int, start: int, c: Tensor) -> Tensor:
                scaled = rows[1:] * c[:, None].float()
                return rows[0] + scaled.gather(0, scaled.abs().argmax(0)[None])[0]

        found, wanted = (
            torch.empty(vectors.layout.size) for vectors in (models.low(), models.multiplied_out())
        )
        c = torch.tensor([0.5, 1.0, 2.0, -1.0])
        for vectors, out in ((models.low(), found), (models.multiplied_out(), wanted)):
            blocks = Blocks(None).table(vectors.layout)
            KernelMerge(vectors, Largest(), blocks, chunk=16).write(c, out)
        close(found, wanted)


class TestLinearMerge:
    @given(coefficients, st.sampled_from([torch.float32, torch.bfloat16]))
    def test_it_is_that_of_whole_models(
        self, models: Models, c: list[float], dtype: torch.dtype
    ) -> None:
        found = merge(models.low(dtype), c)
        wanted = merge(models.multiplied_out(dtype), c)
        # Factors are float32 whatever the storage; the rows of whole models are rounded.
        close(found, wanted, 5e-6 if dtype == torch.float32 else 3e-2)

    @given(coefficients, coefficients)
    def test_blocks(self, models: Models, first: list[float], second: list[float]) -> None:
        c = torch.tensor([first, second]).T.flatten()
        close(merge(models.low(), c, BLOCKS), merge(models.multiplied_out(), c, BLOCKS), 5e-6)

    @given(coefficients, coefficients)
    def test_it_is_linear(self, models: Models, first: list[float], second: list[float]) -> None:
        vectors = replace(models.low(), floors=())
        a, b = torch.tensor(first), torch.tensor(second)
        merged = merge(vectors, a) + merge(vectors, b) - vectors.base
        close(merge(vectors, a + b), merged, 1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_zero_is_the_base(self, models: Models, dtype: torch.dtype) -> None:
        vectors = models.low()
        assert torch.equal(merge(vectors, [0.0] * 4, dtype=dtype), vectors.base.to(dtype))

    @pytest.mark.parametrize("expert", range(4))
    def test_one_is_the_expert(self, models: Models, expert: int) -> None:
        vectors = models.low()
        merged = vectors.layout.state_dict(merge(vectors, torch.eye(4)[expert]), vectors.fixed)
        for name, tensor in merged.items():
            close(tensor, list(models.experts.values())[expert].load(name))

    @given(coefficients)
    def test_narrow_outputs_are_rounded_once(self, models: Models, c: list[float]) -> None:
        vectors = models.low()
        assert torch.equal(
            merge(vectors, c, dtype=torch.bfloat16),
            merge(vectors, c).bfloat16(),
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_tensors_may_be_cut(
        self, models: Models, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
    ) -> None:
        c = [1.0, 0.5, 0.25, -1.0]
        whole = merge(models.low(), c, dtype=dtype)
        monkeypatch.setattr(linear_merge, "_PIECE", {"cpu": 16, "cuda": 16})
        close(merge(models.low(), c, dtype=dtype).float(), whole.float(), 1e-6)

    def test_variances_stay_above_the_least(self, models: Models) -> None:
        found, wanted = (
            merge(vectors, [0.0, 3.0, -9.0, 0.0])
            for vectors in (models.low(), models.multiplied_out())
        )
        (slot,) = (s for s in models.low().layout.slots if s.name.endswith("running_var"))
        assert bool((slot.of(found) > 0).all())
        close(slot.of(found), slot.of(wanted))

    def test_a_lower_precision_of_products_does_not_reach_the_weights(self, models: Models) -> None:
        c = [1.0, 0.5, 0.25, -1.0]
        wanted = merge(models.low(), c)
        products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = products.fp32_precision
        products.fp32_precision = "bf16"
        try:
            assert not exact_products(torch.device("cpu"))
            close(merge(models.low(), c), wanted)
            close(models.low().deltas, models.multiplied_out().deltas)
        finally:
            products.fp32_precision = before

    def test_the_derivatives(self, models: Models) -> None:
        gradient = torch.randn(models.low().layout.size, generator=make_generator(3))
        for blocks in (None, BLOCKS):
            found, wanted = (
                TaskArithmetic(blocks).prepare(vectors)
                for vectors in (models.low(), models.multiplied_out())
            )
            assert isinstance(found, LinearMerge)
            assert isinstance(wanted, LinearMerge)
            close(found.directional(gradient), wanted.directional(gradient), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cosines_come_from_the_factors(models: Models, dtype: torch.dtype) -> None:
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    close(cosines(models.low(dtype)), cosines(models.multiplied_out(dtype)), tolerance)


def test_importance_is_that_of_whole_models(models: Models) -> None:
    block = Blocks(BLOCKS).of
    found = block_norms(models.base, models.experts, block, 2)
    close(found, block_norms(models.base, models.dense, block, 2), 1e-5)


class TestRefused:
    def test_the_same_adapter_twice(self, models: Models) -> None:
        twice = {"a": models.experts["math"], "b": models.experts["math"]}
        with pytest.raises(MergeError, match="'a' and 'b' have the same weights"):
            TaskVectors.load(models.base, twice)

    def test_an_adapter_that_changes_nothing(self, tmp_path: Path) -> None:
        base = small_base()
        folder = write_adapter(
            tmp_path, SHAPES, seed=1, modules=["head"], settings={"lora_alpha": 0}
        )
        with pytest.raises(MergeError, match=r"'still'.* it is the base"):
            TaskVectors.load(base, {"still": adapter_checkpoint(folder, base)})


def test_an_adapter_over_another_base_is_taken_as_a_whole_model(tmp_path: Path) -> None:
    base, other = small_base(), small_base()
    folder = write_adapter(tmp_path, SHAPES, seed=1, modules=["head"])
    vectors = TaskVectors.load(base, {"a": adapter_checkpoint(folder, other)})
    assert vectors.dense_experts == (0,)
    assert not vectors.adapted


def test_eight_adapters_take_little_more_than_the_base(tmp_path: Path) -> None:
    shapes = {f"layers.{i}.{m}.weight": (96, 96) for i in range(2) for m in ("q", "k", "v", "o")}
    generator = make_generator(0)
    base = open_checkpoint({n: torch.randn(s, generator=generator) for n, s in shapes.items()})
    modules = [name.removesuffix(".weight") for name in shapes]
    experts = {
        f"e{i}": adapter_checkpoint(
            write_adapter(tmp_path / str(i), shapes, seed=i, modules=modules), base
        )
        for i in range(8)
    }
    model = 4 * 8 * 96 * 96
    factors = 8 * 8 * 2 * (96 + 96) * 4
    with Allocations(()) as loading:
        vectors = TaskVectors.load(base, experts)
    assert vectors.nbytes < 1.1 * (model + factors)
    assert loading.largest <= model  # the base's row; nothing of P x N
    prepared = TaskArithmetic().prepare(vectors)
    out = torch.empty(vectors.layout.size)
    with Allocations((vectors.rows, out)) as merging:
        prepared.write(torch.linspace(-1, 1, 8), out)
    assert merging.largest <= 96 * 16 * 8  # the scaled factors of one tensor
    whole = TaskVectors.load(base, {name: as_dense(expert) for name, expert in experts.items()})
    assert whole.nbytes > 5 * vectors.nbytes
