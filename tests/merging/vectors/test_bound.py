"""Weights that are still as they were written, and every way to change them that is found."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.bound import bit_sums
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.live import LiveModel
from map_bo.merging.vectors.operator import Deltas, PreparedMerge
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from tests.merging.small_models import MODELS, build, family, inputs

C = torch.tensor([0.4, 0.1, 0.3], dtype=torch.float64)
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8)


def same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> bool:
    return all(map(torch.equal, one, other))


@given(
    st.sampled_from(DTYPES),
    st.sampled_from([1, 3, 1023, 4096, 30_001]),
    st.data(),
)
def test_sums_differ_after_any_one_change(
    dtype: torch.dtype, size: int, data: st.DataObject
) -> None:
    tensor = (torch.arange(size) % 251).to(dtype)
    before = bit_sums(tensor)
    content = tensor.view(torch.uint8)
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    assert not same(bit_sums(tensor), before)


def test_sums_differ_after_a_permutation() -> None:
    tensor = torch.arange(50_000, dtype=torch.float32)
    before = bit_sums(tensor)
    assert same(bit_sums(tensor.clone()), before)
    rows = tensor.view(-1, 50)
    rows.copy_(rows[:, torch.randperm(50, generator=make_generator(0))])
    assert not same(bit_sums(tensor), before)


def test_sums_differ_by_a_sign_of_zero_and_agree_on_nan() -> None:
    zero, nan = torch.zeros(5), torch.full((5,), torch.nan)
    assert not same(bit_sums(zero), bit_sums(-zero))
    assert same(bit_sums(nan), bit_sums(nan.clone()))


def first(model: nn.Module) -> Tensor:
    return next(iter(model.parameters()))


def in_place(model: nn.Module) -> None:
    with torch.no_grad():
        first(model)[0] += 1


def under_inference_mode(model: nn.Module) -> None:
    with torch.inference_mode():
        first(model).mul_(2)


def through_detach(model: nn.Module) -> None:
    first(model).detach().view(-1)[-1] = 9


def through_data(model: nn.Module) -> None:
    first(model).data.view(-1)[-1] += 1


def through_numpy(model: nn.Module) -> None:
    array = first(model).detach().numpy()
    array *= np.float32(1.5)


def through_dlpack(model: nn.Module) -> None:
    torch.from_dlpack(first(model).detach()).fill_(3)  # type: ignore[attr-defined]


def through_the_storage(model: nn.Module) -> None:
    first(model).untyped_storage().fill_(0)  # type: ignore[attr-defined]


def by_a_fused_optimiser(model: nn.Module) -> None:
    parameter = first(model)
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.1, fused=True).step()


def by_an_optimiser(model: nn.Module) -> None:
    parameter = first(model)
    parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD([parameter], lr=0.1).step()


def by_a_state_dict(model: nn.Module) -> None:
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})


def by_giving_up_the_memory(model: nn.Module) -> None:
    first(model).untyped_storage().resize_(0)


def in_both_of_two_places(model: nn.Module) -> None:
    flat = first(model).data.view(-1)
    flat[0] += 1
    flat[1] -= 1


CHANGES = [
    in_place,
    under_inference_mode,
    through_detach,
    through_data,
    through_numpy,
    through_dlpack,
    through_the_storage,
    by_a_fused_optimiser,
    by_an_optimiser,
    by_a_state_dict,
    by_giving_up_the_memory,
    in_both_of_two_places,
]


def replace_a_parameter(model: nn.Module) -> None:
    module = next(m for m in model.modules() if "weight" in m._parameters)
    module._parameters["weight"] = nn.Parameter(torch.zeros_like(module._parameters["weight"]))  # type: ignore[arg-type]


def halve(model: nn.Module) -> None:
    model.half()


def train(model: nn.Module) -> None:
    model.train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)


def point_elsewhere(model: nn.Module) -> None:
    first(model).data = torch.zeros(2)


def hook(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, given, output: output * 2)


LEAVES_WEIGHTS = [replace_a_parameter, halve, train, point_elsewhere, hook]


def live_model(kind: str) -> tuple[LiveModel, Callable[[], nn.Module]]:
    base, experts = family(kind)
    vectors = TaskVectors.load(
        open_checkpoint(base), {name: open_checkpoint(e) for name, e in experts.items()}
    )
    live = LiveModel(build(kind, 5), vectors.layout, fixed=vectors.fixed)
    prepared = TaskArithmetic().prepare(vectors)
    return live, lambda: live.write(prepared, C)


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_found(kind: str, change: Callable[[nn.Module], None]) -> None:
    live, write = live_model(kind)
    with live:
        expected = write()(inputs(kind))
        live.hold()
        change(live.model)
        assert not live.rewind()
        assert not live.rewind()  # nothing is held any more
        assert torch.equal(write()(inputs(kind)), expected)


@pytest.mark.parametrize("kind", sorted(MODELS))
@pytest.mark.parametrize("change", LEAVES_WEIGHTS)
def test_what_leaves_the_weights_is_undone_without_another_merge(
    kind: str, change: Callable[[nn.Module], None]
) -> None:
    live, write = live_model(kind)
    with live:
        expected = write()(inputs(kind))
        live.hold()
        for _ in range(2):
            change(live.model)
            assert live.rewind()
            assert not any(module.training for module in live.model.modules())
            assert torch.equal(live.model(inputs(kind)), expected)


def test_nothing_is_held_of_another_candidate_or_another_time() -> None:
    live, write = live_model("mlp")
    with live:
        write()
        live.hold()
        write()
        assert not live.rewind()
        live.hold()
    with live:
        assert not live.rewind()


class Counting:
    """Counts how often a candidate is written."""

    def __init__(self, prepared: PreparedMerge, written: list[Tensor]) -> None:
        self.prepared, self.written = prepared, written

    def write(self, c: Tensor, out: Tensor) -> None:
        self.written.append(c)
        self.prepared.write(c, out)


class CountingArithmetic(TaskArithmetic):
    def prepare(self, deltas: Deltas) -> PreparedMerge:  # type: ignore[override]
        return Counting(super().prepare(deltas), WRITTEN)


WRITTEN: list[Tensor] = []


@pytest.mark.parametrize(("change", "writes"), [(None, 1), (in_place, 4), (through_data, 4)])
def test_one_merge_serves_all_evaluators_that_leave_it_alone(
    change: Callable[[nn.Module], None] | None, writes: int
) -> None:
    base, experts = family("mlp")

    def score(model: nn.Module) -> float:
        value = float(model(inputs("mlp")).sigmoid().mean().detach())
        if change is not None:
            change(model)
        return value

    WRITTEN.clear()
    problem = MergedModelProblem(
        build("mlp"),
        base=base,
        experts=experts,
        evaluators=dict.fromkeys("abcd", score),
        operator=CountingArithmetic(),
    )
    seen = problem.evaluate(C.unsqueeze(0), generator=make_generator(0))
    assert seen.failures == (None,)
    assert len(set(seen.Y[0].tolist())) == 1
    assert len(WRITTEN) == writes


def test_an_evaluator_that_raises_after_a_change_is_undone_too() -> None:
    base, experts = family("mlp")

    def bad(model: nn.Module) -> float:
        through_data(model)
        raise ValueError("no")

    def good(model: nn.Module) -> float:
        return float(model(inputs("mlp")).sigmoid().mean().detach())

    def evaluate(**evaluators: Callable[[nn.Module], float]) -> float:
        problem = MergedModelProblem(
            build("mlp"), base=base, experts=experts, evaluators=evaluators
        )
        return float(problem.evaluate(C.unsqueeze(0), generator=make_generator(0)).Y[0, -1])

    assert evaluate(bad=bad, good=good) == evaluate(good=good)
