from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.vectors import task_vectors as similarity
from map_bo.merging.vectors.task_vectors import TaskVectors, cosines
from map_bo.problems.merged.problem import MergedModelProblem
from tests.contracts.operator_contract import example_vectors
from tests.merging.small_models import MODELS, build, family


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
