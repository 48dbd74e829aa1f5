from __future__ import annotations

import pickle
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from map_bo.errors import MergeError
from map_bo.merging.align.layout import FlatLayout, is_variance, join_ties
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors import row_filling
from map_bo.merging.vectors import task_vectors as similarity
from map_bo.merging.vectors.task_vectors import TaskVectors, cosines
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from tests.contracts.operator_contract import example_vectors
from tests.merging.small_models import MODELS, build, family

State = dict[str, Tensor]


def state(seed: int = 0, **further: Tensor) -> State:
    generator = make_generator(seed)
    return {
        "a.weight": torch.randn(3, 4, generator=generator),
        "b.bias": torch.randn(5, generator=generator),
        **further,
    }


def moved(base: Mapping[str, Tensor], seed: int = 1) -> State:
    generator = make_generator(seed)
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in base.items()
    }


def load(
    base: Mapping[str, Tensor] | nn.Module,
    experts: Mapping[str, Mapping[str, Tensor] | nn.Module],
    dtype: torch.dtype | None = None,
    check_base: bool = True,
    ties: Mapping[str, str] | None = None,
) -> TaskVectors:
    return TaskVectors.load(
        open_checkpoint(base),
        {name: open_checkpoint(expert) for name, expert in experts.items()},
        dtype=dtype,
        check_base=check_base,
        ties=ties,
    )


def test_layout_and_rows() -> None:
    base = state()
    expert = moved(base)
    vectors = load(base, {"x": expert})
    layout = vectors.layout
    assert [slot.name for slot in layout.slots] == ["a.weight", "b.bias"]
    assert [slot.offset for slot in layout.slots] == [0, 32]
    assert layout.size == 64
    assert vectors.rows.shape == (2, 64)
    assert vectors.deltas.shape == (1, 64)
    for slot in layout.slots:
        assert torch.equal(slot.of(vectors.base), base[slot.name])
        assert torch.equal(slot.of(vectors.deltas[0]), expert[slot.name] - base[slot.name])
    assert not vectors.rows[:, 12:32].any()  # padding


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_state_dict_comes_back(kind: str) -> None:
    base, experts = family(kind)
    vectors = load(base, experts)
    found = vectors.layout.state_dict(vectors.base, vectors.fixed)
    wanted = base.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    found["probe" if "probe" in found else sorted(found)[0]].zero_()
    assert vectors.base.any()  # the tensors are new


def test_tied_tensors_lie_once() -> None:
    base, experts = family("tied")
    layout = load(base, experts).layout
    assert [slot.name for slot in layout.slots] == ["embed.weight", "middle.bias", "middle.weight"]
    assert layout.ties == {"output.weight": "embed.weight"}


def test_experts_may_leave_out_tied_names_or_repeat_them() -> None:
    base, experts = family("tied")
    short = {k: v for k, v in experts["e0"].state_dict().items() if k != "embed.weight"}
    long = {k: v.clone() for k, v in experts["e1"].state_dict().items()}
    vectors = load(base, {"e0": short, "e1": long})
    slot = vectors.layout.slots[0]
    for i, name in enumerate(("e0", "e1")):
        expected = experts[name].state_dict()["embed.weight"] - base.state_dict()["embed.weight"]
        assert torch.equal(slot.of(vectors.deltas[i]), expected)


def test_ties_of_the_model_join_equal_tensors() -> None:
    base, experts = family("tied")
    loose = {k: v.clone() for k, v in base.state_dict().items()}
    ties = {"output.weight": "embed.weight", "unknown": "embed.weight"}
    assert len(load(loose, experts).layout.slots) == 4
    assert len(load(loose, experts, ties=ties).layout.slots) == 3
    assert join_ties(open_checkpoint(loose), ties) == {"output.weight": "embed.weight"}


@pytest.mark.parametrize("where", ["the base", "expert 'e0'"])
def test_ties_that_differ_are_refused(where: str) -> None:
    base, experts = family("tied")
    states = {"the base": base.state_dict(), "expert 'e0'": experts["e0"].state_dict()}
    states[where]["output.weight"] = states[where]["output.weight"] + 1
    with pytest.raises(MergeError, match=f"'embed.weight' and 'output.weight'.* in {where}"):
        load(
            states["the base"],
            {"e0": states["expert 'e0'"]},
            ties={"output.weight": "embed.weight"},
        )


def test_missing_extra_and_misshapen_tensors_are_named() -> None:
    base = state()
    expert = moved(base)
    without = {"a.weight": expert["a.weight"]}
    with pytest.raises(MergeError, match=r"expert 'x' lacks 1 of the base's tensors: b.bias"):
        load(base, {"x": without})
    with pytest.raises(MergeError, match="expert 'x' has 1 tensors that the base lacks: c"):
        load(base, {"x": {**expert, "c": torch.ones(1)}})
    with pytest.raises(MergeError, match=r"other shapes.*b.bias \[6\] against \[5\]") as caught:
        load(base, {"x": {**expert, "b.bias": torch.ones(6)}})
    assert caught.value.hint is not None
    assert "same architecture" in caught.value.hint
    with pytest.raises(MergeError, match=r"kinds of dtype.*b.bias torch.int64 against torch.flo"):
        load(base, {"x": {**expert, "b.bias": torch.ones(5, dtype=torch.int64)}})


def test_counters_may_differ_and_come_from_the_base() -> None:
    base = state(count=torch.tensor(5), table=torch.arange(4))
    expert = {**moved(base), "count": torch.tensor(9)}
    vectors = load(base, {"x": expert})
    assert vectors.layout.fixed == ("count", "table")
    assert int(vectors.fixed["count"]) == 5
    base["count"].fill_(6)
    assert int(vectors.fixed["count"]) == 5  # a copy
    with pytest.raises(MergeError, match=r"'table' \(torch.int64\) differs .* expert 'x'"):
        load(base, {"x": {**expert, "table": torch.arange(4) + 1}})


def test_unmergeable_bases_are_refused() -> None:
    with pytest.raises(MergeError, match="no floating tensors"):
        load({"n": torch.arange(3)}, {"x": {"n": torch.arange(3)}})
    wave = {"w": torch.ones(2, dtype=torch.complex64)}
    with pytest.raises(MergeError, match=r"'w' of the base is torch.complex64"):
        load(wave, {"x": wave})
    with pytest.raises(MergeError, match="no experts"):
        load(state(), {})
    with pytest.raises(MergeError, match=r"cannot be stored as torch.float64"):
        load(state(), {"x": moved(state())}, dtype=torch.float64)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    base = state()
    broken = moved(base)
    broken["b.bias"][2] = value
    with pytest.raises(MergeError, match=r"tensor 'b.bias' of expert 'x' holds NaN or infinity"):
        load(base, {"x": broken})
    with pytest.raises(MergeError, match=r"tensor 'b.bias' of the base holds NaN"):
        load(broken, {"x": base})


def test_base_among_the_experts_and_duplicates_are_refused() -> None:
    base = state()
    expert = moved(base)
    with pytest.raises(MergeError, match="expert 'y': its task vector is zero: it is the base"):
        load(base, {"x": expert, "y": {k: v.clone() for k, v in base.items()}})
    with pytest.raises(MergeError, match="experts 'x' and 'z' have the same weights"):
        load(base, {"x": expert, "y": moved(base, 2), "z": dict(expert)})


def test_expert_of_another_base_is_refused_with_the_numbers() -> None:
    generator = make_generator(0)

    def draw() -> State:
        return {
            "w": torch.randn(50, 60, generator=generator),
            "norm": torch.full((4000,), 1.0),  # alike in all models, and no evidence
        }

    base, other = draw(), draw()
    with pytest.raises(MergeError, match=r"'x' does not look .* -?0\.0\d\d, .* 1\.4\d times") as e:
        load(base, {"x": other})
    assert "check_base=False" in str(e.value)
    assert load(base, {"x": other}, check_base=False).experts == ("x",)


def test_base_check_lets_long_training_and_small_models_pass() -> None:
    generator = make_generator(0)
    base = {"w": torch.randn(50, 60, generator=generator)}
    # Training that adds twice the norm of the base leaves a cosine of about .45.
    far = {"w": base["w"] + 2 * torch.randn(50, 60, generator=generator)}
    assert load(base, {"x": far}).experts == ("x",)
    assert load(state(0), {"x": state(7)}).experts == ("x",)
    zeros = {"w": torch.zeros(50, 60)}
    assert load(zeros, {"x": base}).experts == ("x",)


def test_dtypes_may_differ() -> None:
    base = {k: v.bfloat16() for k, v in state().items()}
    expert = {k: v.double() for k, v in moved(base).items()}
    vectors = load(base, {"x": expert})
    assert vectors.rows.dtype == torch.float32
    slot = vectors.layout.slots[0]
    assert slot.dtype == torch.bfloat16
    expected = (expert[slot.name] - base[slot.name].double()).float()
    assert torch.equal(slot.of(vectors.deltas[0]), expected)
    assert torch.equal(slot.of(vectors.base), base[slot.name].float())


def test_bfloat16_rounds_deltas_not_weights() -> None:
    base = {"w": torch.full((4,), 1.0)}
    expert = {"w": torch.full((4,), 1.0 + 1e-4)}  # one plus 1e-4 is one in bfloat16
    vectors = load(base, {"x": expert}, dtype=torch.bfloat16)
    assert vectors.rows.dtype == torch.bfloat16
    assert torch.allclose(vectors.deltas[0, :4].float(), torch.tensor(1e-4), rtol=1e-2)


def test_float16_keeps_more_digits_than_bfloat16() -> None:
    base = {"w": torch.randn(50, 60, generator=make_generator(0))}
    expert = {"w": base["w"] + 0.01 * torch.randn(50, 60, generator=make_generator(1))}
    exact = load(base, {"x": expert}).rows
    errors = [
        float((load(base, {"x": expert}, dtype=dtype).rows.float() - exact).norm() / exact.norm())
        for dtype in (torch.float16, torch.bfloat16)
    ]
    assert errors[0] < 3e-4 < errors[1] < 3e-3


@pytest.mark.parametrize("where", ["the base", "expert 'x'"])
def test_numbers_beyond_float16_are_refused_by_name(where: str) -> None:
    base = {**state(), "wide": torch.tensor([1.0, 65504.0])}
    expert = {**moved(base), "wide": torch.tensor([2.0, 65504.0])}
    assert load(base, {"x": expert}, dtype=torch.float16).base.max() == 65504
    base["wide"] = torch.tensor([1.0, 7e4 if where == "the base" else -6e4])
    expert["wide"] = torch.tensor([2.0, 7e4 if where == "the base" else 6e4])
    largest = "70000" if where == "the base" else r"1\.2e\+05"
    with pytest.raises(MergeError, match=rf"'wide' of {where} .* float16.*65504: .*{largest}") as e:
        load(base, {"x": expert}, dtype=torch.float16)
    assert "torch.bfloat16" in str(e.value.hint)
    for dtype in (torch.bfloat16, torch.float32):
        assert load(base, {"x": expert}, dtype=dtype).rows.isfinite().all()


def test_numbers_beyond_float32_are_refused_too() -> None:
    base = {k: v.double() for k, v in state().items()}
    expert = moved(base)
    expert["a.weight"][0, 0] = 1e39
    with pytest.raises(MergeError, match=r"cannot be stored as float32.*it holds 1e\+39"):
        load(base, {"x": expert})


def test_task_vectors_that_float16_rounds_away_are_refused() -> None:
    base = {"w": torch.randn(50, 60, generator=make_generator(0))}
    step = torch.randn(50, 60, generator=make_generator(1))
    for size, lost in ((1e-6, r"1\.\d\d%"), (1e-9, r"100\.00%")):
        expert = {"w": (base["w"].double() + size * step.double())}
        with pytest.raises(MergeError, match=rf"task vector of expert 'x' by {lost}") as caught:
            load(base, {"x": expert}, dtype=torch.float16)
        assert "torch.bfloat16, which takes the same memory" in str(caught.value.hint)
        assert load(base, {"x": expert}, dtype=torch.bfloat16).experts == ("x",)
    fine = {"w": (base["w"].double() + 1e-5 * step.double())}
    assert load(base, {"x": fine}, dtype=torch.float16).experts == ("x",)


def test_experts_that_agree_in_the_first_pieces_are_told_apart() -> None:
    base = {f"{i}.w": torch.randn(4, 5, generator=make_generator(i)) for i in range(4)}
    same = {name: tensor + 0.1 for name, tensor in base.items()}
    late = [{**same, f"{i}.w": base[f"{i}.w"] + 0.2} for i in (2, 3)]
    experts = {"a": same, "b": late[0], "c": late[1]}
    assert load(base, experts).experts == ("a", "b", "c")
    with pytest.raises(MergeError, match="experts 'b' and 'e' have the same weights"):
        load(base, {**experts, "d": {**late[1], "0.w": base["0.w"]}, "e": dict(late[0])})


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    base, experts = family("cnn")
    whole = load(base, experts)
    for piece in (1, 7):
        monkeypatch.setattr(row_filling, "_PIECE", piece)
        cut = load(base, experts)
        assert torch.equal(cut.rows, whole.rows)
        for (_, a), (_, b) in zip(cut.floors, whole.floors, strict=True):
            assert torch.equal(a, b)


def test_threads_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # To the bit: each entry is read and subtracted by itself.
    base, experts = family("cnn")
    alone = load(base, experts)
    monkeypatch.setattr(row_filling, "_PIECE", 5)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in range(5):
            found = load(base, experts)
            assert torch.equal(found.rows, alone.rows)
            with pytest.raises(MergeError, match="experts 'e1' and 'twin' have the same weights"):
                load(base, {**experts, "twin": experts["e1"]})
    finally:
        torch.set_num_threads(before)


def test_pickled_vectors_are_whole() -> None:
    vectors = load(*family("cnn"))
    found = pickle.loads(pickle.dumps(vectors))
    assert torch.equal(found.rows, vectors.rows)
    assert found.layout == vectors.layout


def test_variances_are_kept_at_the_least_of_the_models() -> None:
    assert is_variance("norm.running_var")
    assert is_variance("running_var")
    assert not is_variance("norm.running_mean")
    base = {**state(), "bn.running_var": torch.tensor([1.0, 2.0])}
    expert = {**moved(base), "bn.running_var": torch.tensor([0.5, 3.0])}
    vectors = load(base, {"x": expert})
    slot = next(slot for slot in vectors.layout.slots if is_variance(slot.name))
    for row, least in ((vectors.base - 9, [0.5, 2.0]), (vectors.base + 9, [10.0, 11.0])):
        out = row.clone()
        vectors.keep_variances(out)
        assert slot.of(out).tolist() == least
        rest = torch.ones(len(out), dtype=torch.bool)
        rest[slot.offset : slot.stop] = False
        assert torch.equal(out[rest], row[rest])


def test_loading_reads_and_leaves_the_models_alone() -> None:
    base, experts = family("cnn")
    before = {k: v.clone() for k, v in base.state_dict().items()}
    vectors = load(base, experts)
    vectors.rows.zero_()
    assert all(torch.equal(before[k], v) for k, v in base.state_dict().items())


def test_layout_of_a_module_with_scalars_and_empty_tensors() -> None:
    model = build("mlp")
    model.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    model.register_parameter("nothing", nn.Parameter(torch.zeros(0, 3)))
    layout = FlatLayout.of(open_checkpoint(model), {})
    flat = torch.arange(layout.size, dtype=torch.float32)
    found = layout.state_dict(flat, {})
    assert found["scale"].shape == ()
    assert found["nothing"].shape == (0, 3)


def expected(vectors: TaskVectors) -> torch.Tensor:
    deltas = vectors.deltas.double()
    return cosine_similarity(deltas[:, None], deltas[None], dim=-1)


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_they_are_the_cosines_of_torch(kind: str) -> None:
    base, experts = family(kind, 4)
    vectors = TaskVectors.load(
        open_checkpoint(base), {name: open_checkpoint(model) for name, model in experts.items()}
    )
    found = cosines(vectors)
    assert found.dtype == torch.float64
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found, expected(vectors))
    torch.testing.assert_close(found.diagonal(), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
def test_chunks_do_not_matter(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors = example_vectors(dtype=dtype)
    monkeypatch.setattr(similarity, "_CHUNK", chunk)
    torch.testing.assert_close(cosines(vectors), expected(vectors), rtol=1e-12, atol=1e-12)


def test_opposite_and_orthogonal_experts() -> None:
    base = {"weight": torch.zeros(2, 3)}
    step = torch.eye(3)[:2]
    experts = {
        "up": {"weight": step},
        "down": {"weight": -3 * step},
        "aside": {"weight": torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 5.0]])},
    }
    vectors = TaskVectors.load(
        open_checkpoint(base), {name: open_checkpoint(one) for name, one in experts.items()}
    )
    found = cosines(vectors)
    expected = torch.tensor([[1, -1, 0], [-1, 1, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    assert float(found.abs().max()) <= 1.0


def test_a_problem_says_how_alike_its_experts_are() -> None:
    base, experts = family("mlp")
    problem = MergedModelProblem(
        build("mlp"), base=base, experts=experts, evaluators={"a": lambda model: 0.5}
    )
    flat = torch.stack(
        [
            torch.cat([(v - base.state_dict()[k]).flatten() for k, v in e.state_dict().items()])
            for e in experts.values()
        ]
    ).double()
    expected = cosine_similarity(flat[:, None], flat[None], dim=-1)
    torch.testing.assert_close(problem.similarity(), expected, atol=1e-6, rtol=1e-6)
