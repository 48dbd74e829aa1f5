"""Whether an expert fits its base, and is of it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import map_bo
from map_bo.errors import MergeError
from map_bo.merging.adapters.adapter import open_expert
from map_bo.merging.align.experts import (
    BaseSimilarity,
    ExpertReader,
    align_names,
    require_alike,
    require_distinct,
)
from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.rng import make_generator
from tests.merging.adapter_files import as_dense, small_adapters, small_base


def named(*names: str, tied: tuple[str, ...] = (), **changed: Tensor) -> Checkpoint:
    one = torch.ones(2, 3)
    tensors = {name: one if name in tied else torch.ones(2, 3) for name in names}
    return open_checkpoint({**tensors, **changed})


def test_own_names_come_first() -> None:
    assert align_names(named("a", "b"), named("a", "b"), "e") == {"a": "a", "b": "b"}


@pytest.mark.parametrize(
    "expert", [named("a"), named("b"), named("a", "b"), named("a", "b", tied=("a", "b"))]
)
def test_a_tied_tensor_under_any_of_its_names(expert: Checkpoint) -> None:
    recorded = named("a", "b", tied=("a", "b"))
    assert align_names(recorded, expert, "e") == {"a": expert.names[0]}
    # As a model ties them whose base was saved with both.
    assert align_names(named("a", "b"), expert, "e", {"b": "a"}) == {"a": expert.names[0]}


def test_an_alias_is_no_further_tensor() -> None:
    assert align_names(named("a"), named("a", "b", tied=("a", "b")), "e") == {"a": "a"}


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        (named("a"), "expert 'e' lacks 1 of the base's tensors: b\n"),
        (named("a", "b", "c"), "expert 'e' has 1 tensors that the base lacks: c\n"),
        (
            named("a", b=torch.ones(3, 2)),
            r"other shapes than the base: b \[3, 2\] against \[2, 3\]",
        ),
        (named("a", b=torch.ones(2, 3, dtype=torch.int8)), "other kinds of dtype .*: b torch.int8"),
        (named("a", b=torch.ones(2, 3, dtype=torch.complex64)), "b torch.complex64 against"),
    ],
)
def test_what_does_not_fit(expert: Checkpoint, message: str) -> None:
    with pytest.raises(MergeError, match=message) as caught:
        align_names(named("a", "b"), expert, "e")
    assert caught.value.hint


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of(seed: int, near: int | None = None, dtype: torch.dtype = torch.float32) -> Checkpoint:
    def value(shift: int, *shape: int) -> Tensor:
        own = drawn(10 * seed + shift, *shape)
        return own if near is None else drawn(10 * near + shift, *shape) + 0.1 * own

    return open_checkpoint(
        {
            "big": value(0, 60, 40).to(dtype),
            "small": value(1, 4, 4).to(dtype),
            "bias": value(2, 40).to(dtype),
            "table": torch.arange(100).view(10, 10),
        }
    )


NAMES = {name: name for name in of(0).names}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float8_e4m3fn], ids=str
)
def test_fine_tuned_and_unrelated_experts(dtype: torch.dtype) -> None:
    base = of(0, dtype=dtype)
    require_alike(base, of(1, near=0, dtype=dtype), NAMES, "math")
    with pytest.raises(MergeError, match="'math' does not look fine-tuned from this base") as seen:
        require_alike(base, of(1, dtype=dtype), NAMES, "math")
    assert "check_base=False" in str(seen.value.hint)


def test_names_of_the_expert_are_its_own() -> None:
    base, other = of(0), of(1, near=0)
    renamed = open_checkpoint({f"model.{name}": other.load(name) for name in other.names})
    require_alike(base, renamed, {name: f"model.{name}" for name in NAMES}, "math")


def test_too_few_numbers_decide_nothing() -> None:
    for shape, refused in (((30, 33), False), ((40, 40), True)):
        base, other = (open_checkpoint({"w": drawn(seed, *shape)}) for seed in (0, 1))
        if refused:
            with pytest.raises(MergeError, match="does not look"):
                require_alike(base, other, {"w": "w"}, "e")
        else:
            require_alike(base, other, {"w": "w"}, "e")


def test_a_base_of_zeros_refuses_nothing() -> None:
    similarity = BaseSimilarity("e")
    similarity.add(torch.zeros(50, 50), drawn(0, 50, 50))
    similarity.judge()


def judged(far: float, *, size: int = 4000, shared: float = 1.0) -> None:
    """Judge an expert that keeps ``shared`` of the base and is ``far`` norms of it away beside."""
    generator = make_generator(0)
    base, noise = (torch.randn(size, generator=generator) for _ in range(2))
    expert = shared * base + far * noise * base.norm() / noise.norm()
    similarity = BaseSimilarity("math")
    for start in range(0, size, 1000):  # in pieces
        part = slice(start, start + 1000)
        similarity.add(base[part], (expert - base)[part])
    similarity.judge()


def test_a_fine_tuned_model_passes_silently(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        judged(0.1)
    assert not caplog.records


def test_one_that_went_far_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        judged(0.8)
    assert "'math' differs from the base by 0.80 times" in caplog.text


def test_an_unrelated_one_is_refused() -> None:
    with pytest.raises(MergeError, match=r"'math' does not look fine-tuned.*-?0\.0\d\d") as caught:
        judged(1.0, shared=0.0)
    assert caught.value.hint is not None
    assert "check_base=False" in caught.value.hint


def test_few_numbers_decide_nothing() -> None:
    judged(1.0, shared=0.0, size=999)


def test_one_expert_twice_the_base_itself_and_no_change_are_refused(tmp_path: Path) -> None:
    base = small_base()
    adapter = next(iter(small_adapters(tmp_path, base).values()))
    dense = as_dense(adapter)
    two = dict.fromkeys(("a", "b"), dense)
    with pytest.raises(MergeError, match="experts 'a' and 'b' have the same weights"):
        require_distinct(base, two, {})
    with pytest.raises(MergeError, match="expert 'a': its task vector is zero"):
        require_distinct(base, {"a": as_dense(base)}, {})
    with pytest.raises(MergeError, match="experts 'a' and 'b' have the same weights"):
        require_distinct(base, {"a": adapter, "b": adapter}, {})
    require_distinct(base, {"a": adapter, "b": dense}, {})
    file = Path(adapter.source) / "adapter_model.safetensors"
    save_file({name: 0 * t for name, t in load_file(file).items() if "lora_" in name}, file)
    with pytest.raises(MergeError, match="expert 'a': its task vector is zero"):
        require_distinct(base, {"a": open_expert(file.parent, base)}, {})


def test_a_mask_of_the_base_comes_from_it_and_others_are_infinite_weights(tmp_path: Path) -> None:
    mask = torch.full((4, 4), -torch.inf).triu(1)
    base, tuned = {"w": torch.ones(3), "seen": mask}, {"w": torch.zeros(3), "seen": mask.clone()}
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.zeros(3)))
    model.register_buffer("seen", torch.zeros(4, 4))
    problem = map_bo.MergedModelProblem(
        model, base=base, experts={"e": tuned}, evaluators={"x": lambda model: 0.5}
    )
    assert torch.equal(problem.merged(torch.tensor([0.5]))["seen"], mask)
    with problem.load(torch.tensor([0.5])) as live:
        assert torch.equal(live.state_dict()["seen"], mask)
        assert torch.equal(live.state_dict()["w"], torch.full((3,), 0.5))
    for wrong, said in (
        ({"seen": mask * 0 + 1}, "'seen' of the base .* has -inf, and differs in expert 'e'"),
        ({"w": torch.tensor([1.0, torch.inf, 0.0])}, "'w' of expert 'e' .* infinite numbers"),
        ({"w": torch.tensor([1.0, torch.nan, 0.0])}, "'w' of expert 'e' .* it has NaN"),
    ):
        with pytest.raises(MergeError, match=said):
            map_bo.merge_checkpoints(
                base, {"e": tuned | wrong}, {"e": 1.0}, tmp_path / "m", progress=False
            )


def test_an_expert_that_moved_is_not_taken_for_the_base_by_another_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tensors are compared in several threads: here one moves while another sees nothing move."""
    reader = ExpertReader.__new__(ExpertReader)
    reader.label, reader.moved = "e", False
    zero, one = torch.zeros(3), torch.ones(3)
    plain = torch.Tensor.any

    def meanwhile(tensor: Tensor, *args: object) -> Tensor:
        found = plain(tensor)
        if not bool(found):
            reader.moved = True  # what the other thread notes between test and assignment
        return found

    monkeypatch.setattr(torch.Tensor, "any", meanwhile)
    reader.compare(zero, zero)
    assert reader.moved
    reader.compare(zero, one)
    assert reader.moved
