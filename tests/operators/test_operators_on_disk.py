"""What is merged by pieces from files is what is merged in memory, whatever the operator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.export.model import merge_checkpoints
from map_bo.merging.vectors import kernel as chunked
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.averages import Slerp, WeightedAverage
from map_bo.operators.consensus import Consensus
from map_bo.operators.depth import DepthProfile
from map_bo.operators.nearswap import NearSwap
from map_bo.operators.pcb import Pcb
from map_bo.operators.sce import Sce
from map_bo.operators.shared_regions import Ram
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Magnitude, Ties
from map_bo.operators.spectral.isotropic import IsoC, IsoCTS
from map_bo.operators.spectral.knots import KnOTS
from map_bo.operators.spectral.tsv import TSVM
from map_bo.operators.spherical import MultiSlerp, NuSlerp
from map_bo.operators.statistics.data_free import DataFreeRegMean
from map_bo.operators.statistics.fisher import Fisher
from map_bo.operators.statistics.regmean import RegMean
from map_bo.operators.statistics.statistics import save_statistics, statistics_of
from map_bo.operators.stock import ModelStock
from map_bo.plain import to_plain
from tests.merging.adapter_files import small_adapters, small_base
from tests.merging.hard_checkpoints import (
    BLOCKS,
    hard_family,
    loaded,
    opened,
    threads,
    whole,
)
from tests.operators.expert_statistics import fishers, inputs

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
OPERATORS: dict[str, MergeOperator] = {
    "task arithmetic": TaskArithmetic(),
    "task arithmetic in blocks": TaskArithmetic(BLOCKS),
    "average": WeightedAverage(),
    "average in blocks": WeightedAverage(blocks=BLOCKS),
    "slerp": Slerp(),
    "slerp of weights": Slerp(of="weights", norms="own", blocks=BLOCKS),
    "magnitude": Magnitude(density=0.4),
    "ties": Ties(),
    "ties by tensor": Ties(
        trim="tensor",
        density=0.5,
        election="weighted_mass",
        normalisation="weights",
        blocks=BLOCKS,
    ),
    "ties searched": Ties(search=["density", "scale"], blocks=BLOCKS),
    "ties by tensor searched": Ties(trim="tensor", search=["density"]),
    "breadcrumbs": Breadcrumbs(density=0.5, gamma=0.05),
    "breadcrumbs searched": Breadcrumbs(trim="global", search=["density", "gamma"]),
    "dare": Dare(drop_rate=0.5, seed=3),
    "dare searched": Dare(joining="elect", search=["drop_rate", "scale"], blocks=BLOCKS),
    "della": Della(),
    "della searched": Della(search=["drop_rate", "epsilon", "scale"], blocks=BLOCKS),
    "consensus": Consensus(),
    "consensus searched": Consensus(search=["strictness"], agreement=1, blocks=BLOCKS),
    "tsv-m": TSVM(),
    "tsv-m in blocks": TSVM(share=0.5, others="sum", blocks=BLOCKS),
    "iso-c": IsoC(),
    "iso-c in blocks": IsoC(skip="embed", blocks=BLOCKS),
    "knots": KnOTS(density=0.5),
    "knots searched": KnOTS(
        trim="tensor", weighted=False, search=["density", "scale"], blocks=BLOCKS
    ),
    "regmean without data": DataFreeRegMean(),
    "regmean without data searched": DataFreeRegMean(search=["alpha", "ridge"], blocks=BLOCKS),
    "iso-cts": IsoCTS(),
    "iso-cts in blocks": IsoCTS(common=0.5, blocks=BLOCKS),
    "depth profile": DepthProfile(),
    "nearswap": NearSwap(strength=0.5),
    "nearswap searched": NearSwap(search=["strength"], blocks=BLOCKS),
    "pcb": Pcb(density=0.3),
    "pcb of few numbers": Pcb(density=0.2, blocks=BLOCKS),
    "pcb searched": Pcb(search=["density"], blocks=BLOCKS),
    "ram": Ram(threshold=0.2),
    "sce": Sce(density=0.5),
    "sce of few numbers": Sce(density=0.2),
    "sce searched": Sce(search=["density"], blocks=BLOCKS),
    "multislerp": MultiSlerp(),
    "nuslerp by row": NuSlerp(blocks=BLOCKS),
    "nuslerp by column": NuSlerp(along="column", of="weights"),
    "model stock": ModelStock(),
    "model stock by row": ModelStock(each="row", blocks=BLOCKS),
}


def coefficients(operator: MergeOperator, experts: tuple[str, ...]) -> dict[str, float]:
    """Return a value for each coefficient and setting, in the bounds of the latter."""
    space = operator.space(experts, lower=0.0, upper=1.0)
    shares = torch.linspace(0.35, 0.85, space.d).tolist()
    values = zip(space.names, space.lower, space.upper, shares, strict=True)
    return {name: low + share * (high - low) for name, low, high, share in values}


def require_same(
    operator: MergeOperator,
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    out: Path,
    *,
    ties: Mapping[str, str] | None = None,
    shard_size: int | str = "5GB",
) -> dict[str, Tensor]:
    """Merge by pieces and resident, compare, and return what was written."""
    given = coefficients(operator, tuple(experts))
    c = torch.tensor(list(given.values()), dtype=torch.float64)
    expected = whole(operator, TaskVectors.load(base, experts, check_base=False, ties=ties), c)
    deltas = OnDiskVectors(base, experts, check_base=False, ties=ties)
    by_pieces = whole(operator, deltas, c)
    folder = merge_checkpoints(
        base,
        experts,
        given,
        out,
        operator=operator,
        shard_size=shard_size,
        ties=ties,
        check_base=False,
        progress=False,
    )
    written = loaded(folder)
    assert sorted(written) == sorted(base.names)
    for name, value in written.items():
        assert (value.shape, value.dtype) == (base.shape(name), base.dtype(name))
        canonical = deltas.layout.ties.get(name, name)
        if not value.is_floating_point():
            assert torch.equal(value, base.load(name))
            continue
        torch.testing.assert_close(by_pieces[canonical], expected[canonical], rtol=2e-6, atol=2e-6)
        # What is written is the float32 result, rounded once.
        assert torch.equal(value.float(), by_pieces[canonical].to(value.dtype).float())
    return written


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tensors of some hundred numbers into several pieces, and wait for no disk."""
    monkeypatch.setitem(chunked._CHUNK, "cpu", 100)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.mark.parametrize("name", OPERATORS)
def test_float32(name: str, tmp_path: Path) -> None:
    base, experts = opened(*hard_family(tmp_path))
    with threads(2):
        require_same(OPERATORS[name], base, experts, tmp_path / "out")


@pytest.mark.parametrize("name", ["task arithmetic", "ties", "della", "slerp", "dare searched"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, *FP8], ids=str)
def test_narrow_dtypes(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, experts = opened(*hard_family(tmp_path, dtype, dtype, shards=3))
    require_same(OPERATORS[name], base, experts, tmp_path / "out", shard_size=200)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3


@pytest.mark.parametrize("name", ["task arithmetic in blocks", "ties by tensor", "consensus"])
def test_dtypes_that_differ_between_base_and_experts(name: str, tmp_path: Path) -> None:
    kinds = (torch.float32, torch.float16, torch.float8_e5m2)
    base, experts = opened(*hard_family(tmp_path, torch.bfloat16, kinds, shards=2))
    require_same(OPERATORS[name], base, experts, tmp_path / "out")


def test_an_expert_in_float64_over_a_base_in_float32(tmp_path: Path) -> None:
    base, experts = opened(*hard_family(tmp_path, torch.float32, torch.float64))
    require_same(WeightedAverage(), base, experts, tmp_path / "out")


@pytest.mark.parametrize("name", ["task arithmetic", "ties", "della searched"])
def test_models_in_memory(name: str, tmp_path: Path) -> None:
    base, experts = opened(*hard_family(tmp_path))
    held = {label: open_checkpoint(loaded(expert)) for label, expert in experts.items()}
    require_same(OPERATORS[name], open_checkpoint(loaded(base)), held, tmp_path / "out")


@pytest.mark.parametrize(
    "name", [n for n, o in OPERATORS.items() if to_plain(o)["fields"]["blocks"] in (None, "depths")]
)
def test_adapters_as_experts(name: str, tmp_path: Path) -> None:
    base = small_base()
    require_same(OPERATORS[name], base, small_adapters(tmp_path, base), tmp_path / "out")


@pytest.mark.parametrize("blocks", [None, BLOCKS])
@pytest.mark.parametrize("held", [True, False])
def test_fisher(blocks: Mapping[str, str] | None, held: bool, tmp_path: Path) -> None:
    base, experts = opened(*hard_family(tmp_path, torch.bfloat16, torch.bfloat16))
    found = fishers(TaskVectors.load(base, experts, check_base=False))
    if held:
        require_same(Fisher(found, blocks=blocks), base, experts, tmp_path / "out")
        return
    files = {
        label: save_statistics(tmp_path / f"{label}.safetensors", statistics_of(each, "fisher"))
        for label, each in found.items()
    }
    require_same(Fisher(files, blocks=blocks), base, experts, tmp_path / "out")


@pytest.mark.parametrize("search", [(), ["alpha"]])
def test_regmean(search: list[str], tmp_path: Path) -> None:
    base, experts = opened(*hard_family(tmp_path))
    found = {
        label: {
            name: (x := inputs(label, 90, width)).T @ x / 90
            for name, width in (("block.1.fc.weight", 33), ("block.0.conv.weight", 36))
        }
        for label in experts
    }
    require_same(RegMean(found, search=search), base, experts, tmp_path / "out")


class TestTies:
    """An embedding that is also the output layer: recorded, known to the model alone, or apart."""

    TIES: Mapping[str, str] = {"head.weight": "embed.weight"}

    def tied(self, checkpoint: Checkpoint, *, recorded: bool) -> Checkpoint:
        tensors = loaded(checkpoint)
        weight = tensors["embed.weight"]
        return open_checkpoint({**tensors, "head.weight": weight if recorded else weight.clone()})

    @pytest.mark.parametrize("name", ["task arithmetic in blocks", "ties", "dare", "della"])
    @pytest.mark.parametrize("of_base", [True, False])
    @pytest.mark.parametrize("of_experts", [True, False, None])
    def test_they_are_merged_once(
        self, name: str, of_base: bool, of_experts: bool | None, tmp_path: Path
    ) -> None:
        base, experts = opened(*hard_family(tmp_path))
        base = self.tied(base, recorded=of_base)
        if of_experts is not None:  # else they lack the alias, as files of transformers do
            experts = {k: self.tied(e, recorded=of_experts) for k, e in experts.items()}
        ties = None if of_base else self.TIES
        written = require_same(OPERATORS[name], base, experts, tmp_path / "out", ties=ties)
        assert torch.equal(written["head.weight"], written["embed.weight"])
        assert open_checkpoint(tmp_path / "out").ties == (self.TIES if of_base else {})

    def test_without_a_word_they_are_two_tensors(self, tmp_path: Path) -> None:
        base, experts = opened(*hard_family(tmp_path))
        base = self.tied(base, recorded=False)
        experts = {k: self.tied(e, recorded=False) for k, e in experts.items()}
        written = require_same(Dare(drop_rate=0.5), base, experts, tmp_path / "out")
        assert not torch.equal(written["head.weight"], written["embed.weight"])


@pytest.mark.parametrize("name", ["ties", "slerp", "della", "dare", "task arithmetic"])
def test_threads_and_lengths_of_pieces_change_no_byte(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Threads share out whole pieces, and each entry is made by the same operations in any piece.
    # Only SLERP sums over entries: in float64, whose last digits are gone in bfloat16.
    base, experts = hard_family(tmp_path, torch.bfloat16, torch.bfloat16)
    operator = OPERATORS[name]
    digests = set()
    for count, length in ((1, 1 << 17), (1, 37), (2, 100), (5, 64)):
        monkeypatch.setitem(chunked._CHUNK, "cpu", length)
        with threads(count):
            folder = merge_checkpoints(
                base,
                experts,
                coefficients(operator, tuple(experts)),
                tmp_path / f"{count}-{length}",
                operator=operator,
                check_base=False,
                progress=False,
            )
        digests.add((folder / "model.safetensors").read_bytes())
    assert len(digests) == 1


@pytest.mark.parametrize("of", ["deltas", "weights"])
def test_sums_over_a_single_tensor_do_not_depend_on_threads(of: str, tmp_path: Path) -> None:
    """torch would cut a long sum over its threads, which changes its last digits.

    So the sums are made piece by piece, with one thread within each.
    """
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(90_001, generator=generator) for _ in range(4)]
    base = {"w": draws[0]}
    experts = {f"e{i}": {"w": draws[0] + 0.1 * change} for i, change in enumerate(draws[1:])}
    written = []
    for count in (1, 4):
        with threads(count):
            folder = merge_checkpoints(
                base,
                experts,
                {"e0": 0.3, "e1": 0.2, "e2": 0.4},
                tmp_path / str(count),
                operator=Slerp(of=of),
                progress=False,
            )
        written.append(loaded(folder)["w"])
    assert torch.equal(*written)
