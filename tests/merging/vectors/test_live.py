from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors.linear_merge import LinearMerge, TaskArithmetic
from map_bo.merging.vectors.live import LiveModel, model_ties
from map_bo.merging.vectors.task_vectors import TaskVectors
from tests.merging.small_models import MODELS, Tied, build, family, inputs

C = torch.tensor([0.4, 0.1, 0.3], dtype=torch.float64)
KINDS = sorted(MODELS)


def prepared(kind: str) -> tuple[TaskVectors, LinearMerge]:
    base, experts = family(kind)
    vectors = TaskVectors.load(
        open_checkpoint(base), {name: open_checkpoint(e) for name, e in experts.items()}
    )
    linear = TaskArithmetic().prepare(vectors)
    assert isinstance(linear, LinearMerge)
    return vectors, linear


def live_model(model: nn.Module, vectors: TaskVectors) -> LiveModel:
    return LiveModel(model, vectors.layout, fixed=vectors.fixed)


def photograph(model: nn.Module) -> dict[str, Any]:
    """Return all that must be as before: objects, memory, bytes, flags, hooks, modes."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "objects": {name: id(tensor) for name, tensor in tensors},
        "memory": {name: tensor.data_ptr() for name, tensor in tensors},
        "bytes": {name: tensor.detach().numpy().tobytes() for name, tensor in tensors},
        "flags": {
            name: (tensor.requires_grad, tensor.dtype, tensor.shape) for name, tensor in tensors
        },
        "grads": {
            name: None if p.grad is None else (id(p.grad), p.grad.tolist())
            for name, p in model.named_parameters()
        },
        "modules": {name: (id(m), m.training) for name, m in model.named_modules()},
        "hooks": {name: list(m._forward_hooks) for name, m in model.named_modules()},
    }


def vandalise(model: nn.Module) -> None:
    """Do to a model whatever an evaluator might."""
    model.train()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.add_(7)
    first = next(iter(model.parameters()))
    first.data = torch.zeros(1, dtype=torch.float64)
    first.requires_grad_(not first.requires_grad)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    name, child = next(iter(model.named_children()))
    child.register_forward_hook(lambda *_: torch.zeros(1))
    setattr(model, name, nn.Identity())
    model.add_module("further", nn.Linear(2, 2))


def interrupted(live: LiveModel, merge: LinearMerge) -> None:
    with live:
        vandalise(live.write(merge, C))
        raise KeyboardInterrupt


@pytest.mark.parametrize("kind", KINDS)
def test_write_is_the_load(kind: str) -> None:
    vectors, merge = prepared(kind)
    model, reference = build(kind, 5), build(kind, 6)
    flat = torch.empty_like(vectors.base)
    merge.write(C, flat)
    reference.load_state_dict(vectors.layout.state_dict(flat, vectors.fixed))
    with live_model(model, vectors) as live:
        found = live.write(merge, C)
        assert found is model
        x = inputs(kind)
        assert torch.equal(found(x), reference(x))
        for name, tensor in reference.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor), name
        start, stop = live.flat.data_ptr(), live.flat.data_ptr() + live.flat.nbytes
        assert all(start <= p.data_ptr() < stop for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("raises", [False, True])
def test_model_is_left_as_found(kind: str, raises: bool) -> None:
    vectors, merge = prepared(kind)
    model = build(kind, 5).train()
    list(model.children())[-1].eval()
    first = next(iter(model.parameters()))
    first.requires_grad_(False)
    last = list(model.parameters())[-1]
    last.grad = torch.full_like(last, 3.0)
    next(iter(model.children())).register_forward_hook(lambda *_: None)
    before = photograph(model)
    live = live_model(model, vectors)
    for _ in range(2):  # it can be entered again
        if raises:
            with pytest.raises(KeyboardInterrupt):
                interrupted(live, merge)
        else:
            with live:
                vandalise(live.write(merge, C))
        assert photograph(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_into_the_next_candidate(kind: str) -> None:
    vectors, merge = prepared(kind)
    x = inputs(kind)
    with live_model(build(kind, 5), vectors) as live:
        expected = live.write(merge, C)(x).detach().clone()
        before = photograph(live.model)
        vandalise(live.model)
        found = live.write(merge, C)
        assert not any(module.training for module in found.modules())
        assert torch.equal(found(x), expected)
        assert photograph(found) == before


def test_batch_norm_in_training_mode_does_not_leak() -> None:
    vectors, merge = prepared("cnn")
    x = inputs("cnn")
    with live_model(build("cnn", 5), vectors) as live:
        expected = live.write(merge, C)(x).detach().clone()
        live.model.train()(x)
        assert int(live.model.state_dict()["norm.num_batches_tracked"]) != int(
            vectors.fixed["norm.num_batches_tracked"]
        )
        again = live.write(merge, C)
        assert torch.equal(
            again.state_dict()["norm.num_batches_tracked"],
            vectors.fixed["norm.num_batches_tracked"],
        )
        assert torch.equal(again(x), expected)


def test_gradients_can_be_taken_of_the_live_model() -> None:
    vectors, merge = prepared("mlp")
    model = build("mlp", 5)
    with live_model(model, vectors) as live:
        live.write(merge, C)(inputs("mlp")).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_may_be_used_in_inference_mode() -> None:
    vectors, merge = prepared("cnn")
    model = build("cnn", 5)
    with torch.inference_mode():
        live = live_model(model, vectors)
        with live:
            live.write(merge, C)(inputs("cnn"))
    with live:
        assert live.write(merge, C)(inputs("cnn")).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_model_of_another_dtype(dtype: torch.dtype) -> None:
    vectors, merge = prepared("mlp")
    model = build("mlp", 5).to(dtype)
    expected = torch.empty_like(vectors.base)
    merge.write(C, expected)
    before = photograph_bytes(model)
    with live_model(model, vectors) as live:
        assert live.flat.dtype == dtype
        live.write(merge, C)
        for slot in vectors.layout.slots:
            found = model.state_dict()[slot.name]
            assert found.dtype == dtype
            assert torch.allclose(found.float(), slot.of(expected), rtol=1e-2)
    assert photograph_bytes(model) == before


def photograph_bytes(model: nn.Module) -> dict[str, Any]:
    return {
        name: (id(p), p.data_ptr(), p.double().tolist()) for name, p in model.named_parameters()
    }


def test_model_of_mixed_dtypes_rounds_once() -> None:
    vectors, merge = prepared("cnn")
    model = build("cnn", 5)
    model.get_submodule("conv").bfloat16()
    expected = torch.empty_like(vectors.base)
    merge.write(C, expected)
    before = photograph_bytes(model)
    with live_model(model, vectors) as live:
        assert live.flat.dtype == torch.float32
        for _ in range(2):
            live.write(merge, C)
            for slot in vectors.layout.slots:
                found = model.state_dict()[slot.name]
                assert torch.equal(found, slot.of(expected).to(found.dtype))
    assert photograph_bytes(model) == before


def test_tied_weights_stay_tied() -> None:
    vectors, merge = prepared("tied")
    model = build("tied", 5)
    assert isinstance(model, Tied)
    with live_model(model, vectors) as live:
        live.write(merge, C)
        assert model.output.weight is model.embed.weight
    assert model.output.weight is model.embed.weight


def test_weights_tied_through_memory_alone() -> None:
    vectors, merge = prepared("tied")
    model = build("tied", 5)
    assert isinstance(model, Tied)
    model.output.weight = nn.Parameter(model.embed.weight.data)
    assert model_ties(model) == {"output.weight": "embed.weight"}
    with live_model(model, vectors) as live:
        live.write(merge, C)
        assert model.output.weight.data_ptr() == model.embed.weight.data_ptr()
    assert model.output.weight.data_ptr() == model.embed.weight.data_ptr()


def test_untied_model_of_tied_checkpoints() -> None:
    vectors, merge = prepared("tied")
    model = build("tied", 5)
    assert isinstance(model, Tied)
    model.output.weight = nn.Parameter(torch.zeros(6, 4))
    with live_model(model, vectors) as live:
        live.write(merge, C)
        assert torch.equal(model.output.weight, model.embed.weight)
    assert not model.output.weight.any()


def edited(change: Callable[[nn.Module], object]) -> nn.Module:
    model = build("cnn", 5)
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.add_module("more", nn.Linear(1, 1)),
            r"lacks 2 .* model Cnn: more.weight, more",
        ),
        (lambda m: delattr(m, "head"), r"Cnn lacks 2 tensors of the base: head.bias, head.weight"),
        (lambda m: setattr(m, "head", nn.Linear(4, 5)), r"'head.weight' is \[5, 4\] in the model"),
        (
            lambda m: setattr(m.norm, "num_batches_tracked", torch.zeros(2, dtype=torch.long)),
            r"'norm.num_batches_tracked' is \[2\] in the model and \[\] in the base",
        ),
        (
            lambda m: setattr(m.norm, "num_batches_tracked", torch.zeros(())),
            r"'norm.num_batches_tracked' is torch.float32 in the model and of another kind",
        ),
        (lambda m: m.head.to("meta"), "lie on cpu, meta"),
        (
            lambda m: m.register_state_dict_post_hook(
                lambda _m, state, *_: state.update({"head.bias": torch.zeros(3)})
            ),
            "'head.bias' of the state dict is not a parameter or buffer",
        ),
    ],
)
def test_models_that_do_not_fit_are_refused(
    change: Callable[[nn.Module], object], message: str
) -> None:
    vectors, _ = prepared("cnn")
    with pytest.raises(MergeError, match=message):
        live_model(edited(change), vectors)


def test_model_that_ties_what_checkpoints_keep_apart_is_refused() -> None:
    base, experts = family("tied")
    loose = {
        name: open_checkpoint({k: v.clone() for k, v in model.state_dict().items()})
        for name, model in {"base": base, **experts}.items()
    }
    vectors = TaskVectors.load(loose.pop("base"), loose)
    with pytest.raises(MergeError, match=r"the model ties embed.weight, output.weight"):
        live_model(build("tied"), vectors)


def test_counters_and_masks_only_one_side_has_are_no_obstacle() -> None:
    base, experts = family("mlp")
    mask = {"mask": torch.ones(3, dtype=torch.bool)}
    vectors = TaskVectors.load(
        open_checkpoint({**base.state_dict(), **mask}),
        {k: open_checkpoint({**e.state_dict(), **mask}) for k, e in experts.items()},
    )
    model = build("mlp")
    model.register_buffer("steps", torch.tensor(4))
    with live_model(model, vectors) as live:
        live.write(TaskArithmetic().prepare(vectors), C)
        steps = model.get_buffer("steps")
        steps += 1
        live.write(TaskArithmetic().prepare(vectors), C)
        assert int(steps) == 4


def test_use_outside_and_twice_is_refused() -> None:
    vectors, merge = prepared("mlp")
    live = live_model(build("mlp"), vectors)
    with pytest.raises(MergeError, match="the model is not live"):
        live.write(merge, C)
    with live, pytest.raises(MergeError, match="live already"), live:
        pass
    with pytest.raises(MergeError, match="the model is not live"):
        _ = live.flat


def test_two_live_models_may_be_nested() -> None:
    vectors, merge = prepared("mlp")
    model = build("mlp", 5)
    before = photograph(model)
    with live_model(model, vectors) as outer:
        expected = outer.write(merge, C)(inputs("mlp")).detach().clone()
        with live_model(model, vectors) as inner:
            inner.write(merge, -C)
        assert torch.equal(model(inputs("mlp")), expected)
    assert photograph(model) == before


def test_failure_while_entering_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, _ = prepared("mlp")
    model = build("mlp", 5)
    before = photograph(model)
    live = live_model(model, vectors)

    def fail() -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(live, "clean", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        live.__enter__()
    assert photograph(model) == before


def test_merged_tensors_are_told_once_with_their_place() -> None:
    vectors, merge = prepared("tied")
    model = build("tied", 5)
    live = live_model(model, vectors)
    with pytest.raises(MergeError, match="the model is not live"):
        live.merged_tensors()
    with live:
        live.write(merge, torch.full((3,), 0.3))
        merged = live.merged_tensors()
        assert len({id(tensor) for tensor, _ in merged}) == len(merged)
        assert {slot.name for _, slot in merged} == {slot.name for slot in vectors.layout.slots}
        assert all(torch.equal(tensor, slot.of(live.flat)) for tensor, slot in merged)
