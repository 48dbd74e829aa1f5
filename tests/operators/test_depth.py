from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from map_bo.errors import MergeError
from map_bo.evaluators.evaluator import mean_probability
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.model import merge_checkpoints
from map_bo.merging.vectors.blocks import HasBlocks, with_known_blocks
from map_bo.merging.vectors.kernel import ReadsPieces
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.merging.vectors.on_disk import OnDiskVectors
from map_bo.merging.vectors.operator import HasDerivatives, Linear, MergeOperator
from map_bo.merging.vectors.task_vectors import TaskVectors
from map_bo.operators.depth import DepthProfile
from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.rng import make_generator
from tests.contracts.operator_contract import EXPERTS, OperatorContract
from tests.merging.small_models import build, family

LAYERS = 4
NAMES = ["embed.weight", *(f"h.{k}.weight" for k in range(LAYERS)), "ln_f.weight", "head.weight"]
PLACES = [0.0, 0.0, 1 / 3, 2 / 3, 1.0, 1.0, 1.0]


class TestDepthProfile(OperatorContract):
    def fitted(self, operator: MergeOperator, vectors: TaskVectors) -> MergeOperator:
        return DepthProfile()  # the longer example has fewer names

    @pytest.fixture(params=["by name", "given"])
    def operator(self, request: pytest.FixtureRequest) -> MergeOperator:
        given = {"0": r"running", "0.25": "bias", "1": "*"}
        return DepthProfile() if request.param == "by name" else DepthProfile(blocks=given)


def layered(experts: int = 2) -> TaskVectors:
    generator = make_generator(2)

    def draw() -> dict[str, torch.Tensor]:
        return {name: torch.randn(6, 5, generator=generator) for name in NAMES}

    base = draw()
    tuned = {f"e{n}": {k: base[k] + 0.3 * v for k, v in draw().items()} for n in range(experts)}
    return TaskVectors.load(
        open_checkpoint(base), {name: open_checkpoint(state) for name, state in tuned.items()}
    )


def merged(operator: MergeOperator, vectors: TaskVectors, c: list[float]) -> torch.Tensor:
    out = torch.full((vectors.layout.size,), torch.nan)
    operator.prepare(vectors).write(torch.tensor(c, dtype=torch.float64), out)
    return out


def test_coefficients_are_those_of_the_first_and_the_last_layer() -> None:
    space = DepthProfile().space(("math", "code"), lower=-0.5, upper=2.0)
    assert space.names == ("math/first", "math/last", "code/first", "code/last")
    assert space.owner == (0, 0, 1, 1)


def test_scales_go_linearly_from_layer_to_layer() -> None:
    vectors = layered()
    found = merged(DepthProfile(), vectors, [0.2, 1.4, 0.9, 0.0])
    places = dict(zip(NAMES, PLACES, strict=True))
    for slot in vectors.layout.slots:
        p = places[slot.name]
        math, code = 0.2 + 1.2 * p, 0.9 - 0.9 * p
        base, one, two = (slot.of(row) for row in vectors.rows)
        torch.testing.assert_close(slot.of(found), base + math * one + code * two)


def test_the_papers_scales_are_alpha_and_alpha_plus_beta() -> None:
    # alpha + beta (l - 1) / (L - 1) for the layers l = 1 .. L of the merged task vector.
    vectors, alpha, beta = layered(), 0.3, 0.5
    found = merged(DepthProfile(), vectors, [alpha, alpha + beta] * 2)
    for layer in range(1, LAYERS + 1):
        slot = next(s for s in vectors.layout.slots if s.name == f"h.{layer - 1}.weight")
        base, one, two = (slot.of(row) for row in vectors.rows)
        scale = alpha + beta * (layer - 1) / (LAYERS - 1)
        torch.testing.assert_close(slot.of(found), base + scale * (one + two))


@given(st.floats(-1, 2), st.floats(-1, 2))
def test_equal_ends_are_task_arithmetic(one: float, two: float) -> None:
    vectors = layered()
    left = merged(DepthProfile(), vectors, [one, one, two, two])
    assert torch.allclose(left, merged(TaskArithmetic(), vectors, [one, two]), atol=1e-6)


def test_it_is_linear_and_knows_its_weights() -> None:
    vectors, c = layered(), torch.tensor([0.2, 1.4, 0.9, -0.3], dtype=torch.float64)
    base = open_checkpoint({s.name: s.of(vectors.base) for s in vectors.layout.slots})
    operator = with_known_blocks(DepthProfile(), base, {})
    assert isinstance(operator, Linear)
    assert isinstance(operator, HasBlocks)
    assert isinstance(operator, ReadsPieces)
    weights = operator.weights(("e0", "e1"), c)
    found = merged(operator, vectors, c.tolist())
    assert torch.equal(found, merged(DepthProfile(), vectors, c.tolist()))
    for slot in vectors.layout.slots:
        told = weights(slot.name)
        base_row, one, two = (slot.of(row) for row in vectors.rows)
        expected = base_row + told["e0"] * one + told["e1"] * two
        torch.testing.assert_close(slot.of(found), expected)


def test_derivatives_are_those_of_the_coefficients() -> None:
    vectors = layered()
    prepared = DepthProfile().prepare(vectors)
    assert isinstance(prepared, HasDerivatives)
    gradient = torch.randn(vectors.layout.size, generator=make_generator(7))
    found = prepared.directional(gradient)
    for k, direction in enumerate(torch.eye(4).tolist()):
        moved = merged(DepthProfile(), vectors, direction) - vectors.base
        assert float(found[k]) == pytest.approx(float(moved @ gradient), rel=1e-3, abs=1e-3)


def test_pieces_from_disk_are_the_same_merge(tmp_path: Path) -> None:
    vectors, c = layered(), [0.2, 1.4, 0.9, -0.3]
    states = {
        name: {s.name: s.of(vectors.base + delta).clone() for s in vectors.layout.slots}
        for name, delta in zip(
            ("base", "e0", "e1"), [0 * vectors.base, *vectors.deltas], strict=True
        )
    }
    base, *experts = (open_checkpoint(state) for state in states.values())
    named = dict(zip(("e0", "e1"), experts, strict=True))
    out = torch.empty(vectors.layout.size)
    DepthProfile().prepare(OnDiskVectors(base, named)).write(torch.tensor(c), out)
    torch.testing.assert_close(out, merged(DepthProfile(), vectors, c), rtol=1e-5, atol=1e-6)
    given = dict(zip(("e0/first", "e0/last", "e1/first", "e1/last"), c, strict=True))
    folder = merge_checkpoints(
        base, named, given, tmp_path / "m", operator=DepthProfile(), progress=False
    )
    written = open_checkpoint(folder)
    for slot in vectors.layout.slots:
        torch.testing.assert_close(written.load(slot.name), slot.of(out), rtol=1e-5, atol=1e-6)


def test_names_without_layers_have_ends_only() -> None:
    vectors = TaskVectors.load(
        open_checkpoint({"stem.weight": torch.ones(3), "classifier.weight": torch.ones(3)}),
        {
            "e": open_checkpoint(
                {"stem.weight": torch.zeros(3), "classifier.weight": torch.zeros(3)}
            )
        },
        check_base=False,
    )
    found = merged(DepthProfile(), vectors, [0.0, 1.0])
    for slot in vectors.layout.slots:
        assert bool((slot.of(found) == float(slot.name == "stem.weight")).all())


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        (None, "has no positions"),
        ("kinds", "are 'kinds'"),
        ({"first": "a", "last": "b"}, "got first, last"),
        ({"1": "a", "0": "b"}, "must ascend from 0 to 1, got 1, 0"),
        ({"0": "a", "1.5": "b"}, "got 0, 1.5"),
        ({"0": "(", "1": "b"}, "is not a regular expression"),
    ],
)
def test_positions_that_cannot_be(blocks: object, why: str) -> None:
    with pytest.raises(MergeError, match=why) as caught:
        DepthProfile(blocks=blocks)  # type: ignore[arg-type]
    assert caught.value.hint


def test_positions_may_be_numbers_as_yaml_reads_them() -> None:
    given = {0: "a", 0.5: "b", 1: "*"}
    made = DepthProfile(blocks=given)  # type: ignore[arg-type]
    assert made == DepthProfile(blocks={"0": "a", "0.5": "b", "1": "*"})


def test_wrong_coefficients_are_told() -> None:
    with pytest.raises(MergeError, match=r"must have shape \(6,\)"):
        DepthProfile(blocks={"0": "a", "1": "*"}).weights(EXPERTS, torch.zeros(3))


def problem(operator: MergeOperator, *, gradients: bool = False) -> MergedModelProblem:
    base, experts = family("mlp")
    x = torch.randn(40, 5, generator=make_generator(3))
    evaluator = mean_probability(x, torch.arange(40) % 3, batch_size=8)
    return MergedModelProblem(
        build("mlp", 5),
        base=base,
        experts=experts,
        evaluators={"p": evaluator},
        operator=operator,
        gradients=gradients,
    )


class TestInAProblem:
    def test_gradients_by_both_ends_sum_to_those_of_task_arithmetic(self) -> None:
        X = torch.tensor([[0.1, 0.2, 0.15]], dtype=torch.float64)
        ends = X.repeat_interleave(2, dim=1)
        generator = make_generator(0)
        own = problem(DepthProfile(), gradients=True).evaluate(ends, generator=generator)
        known = problem(TaskArithmetic(), gradients=True).evaluate(X, generator=make_generator(0))
        assert own.gradients is not None
        assert known.gradients is not None
        torch.testing.assert_close(own.Y, known.Y)
        both = own.gradients.reshape(*known.gradients.shape, 2).sum(-1)
        torch.testing.assert_close(both, known.gradients, rtol=1e-4, atol=1e-6)

    def test_merges_compose_and_are_written_from_the_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        c = torch.tensor([0.1, 0.9, 0.4, 0.2, 0.0, 0.5], dtype=torch.float64)
        merging = problem(DepthProfile())
        assert merging.composes
        wanted = merging.merged(c)
        monkeypatch.setattr(TaskVectors, "load", lambda *_, **__: pytest.fail("loaded"))
        out = problem(DepthProfile()).export(c, tmp_path / "m")
        for name, tensor in wanted.items():
            torch.testing.assert_close(open_checkpoint(out).load(name), tensor)
