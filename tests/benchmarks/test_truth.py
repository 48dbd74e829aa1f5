from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benchmarks.quality.cases_models import CNN_PARTS, MLP_LAYERS, FewExamples, digits_networks
from benchmarks.quality.truth import Examples, MergedNetworks
from map_bo.errors import DataError, MergeError
from map_bo.merging.vectors.linear_merge import TaskArithmetic
from map_bo.problems.problem import Problem
from map_bo.problems.zoo.digits import DigitsZoo, digits_problem
from map_bo.rng import make_generator
from tests.contracts.problem_contract import ProblemContract

SETTINGS = [
    ("mlp", None, 1.0),
    ("mlp", MLP_LAYERS, 1.0),
    ("mlp", None, 3.0),
    ("cnn", None, 1.0),
    ("cnn", CNN_PARTS, 1.0),
]


@pytest.fixture(scope="module")
def pair() -> MergedNetworks:
    return digits_networks(DigitsZoo(2, epochs=1))


@pytest.mark.parametrize(("arch", "blocks", "reach"), SETTINGS)
def test_it_measures_what_the_problem_measures(
    arch: str, blocks: dict[str, str] | None, reach: float
) -> None:
    operator = TaskArithmetic(blocks)
    problem = digits_problem(
        3, arch=arch, epochs=1, operator=operator, lower=1 - reach, upper=reach
    )
    networks = digits_networks(DigitsZoo(3, arch, epochs=1), operator)
    assert networks.d == problem.space.d
    X = torch.cat([problem.space.anchors().X, problem.space.sample(8, generator=make_generator(1))])
    seen = problem.evaluate(X, generator=make_generator(0))
    assert bool(seen.ok.all())
    assert float(seen.Y.std(0).amin()) > 0.005  # else anything would do
    gap = ((networks.accuracy(X) - seen.Y) * networks.examples).abs()
    assert float(gap.max()) < 1.5  # rounding may turn one example of 797
    assert float(gap.mean()) < 0.1


def test_chunks_do_not_matter(pair: MergedNetworks) -> None:
    X = torch.rand(70, 2, generator=make_generator(2), dtype=torch.float64)
    together = pair.accuracy(X)
    alone = torch.cat([pair.accuracy(x.unsqueeze(0)) for x in X])
    assert float((together - alone).abs().max()) * pair.examples < 1.5
    assert together.dtype == torch.float64
    assert pair.accuracy(X[:0]).shape == (0, 2)


def test_which_examples_are_right_adds_up_to_the_accuracy(pair: MergedNetworks) -> None:
    X = torch.rand(5, 2, generator=make_generator(2), dtype=torch.float64)
    right = pair.right(X)
    assert right.shape == (5, 2, 797)
    assert right.dtype == torch.bool
    assert torch.equal(right.double().mean(-1), pair.accuracy(X))


def test_what_is_not_finite_is_wrong(pair: MergedNetworks) -> None:
    assert bool((pair.accuracy(torch.full((1, 2), 1e30)) == 0).all())


def test_refuses_other_widths_and_networks(pair: MergedNetworks) -> None:
    with pytest.raises(MergeError, match="coefficients have shape"):
        pair.accuracy(torch.zeros(1, 3))
    files = DigitsZoo(2, epochs=1).checkpoints()
    examples = Examples(torch.zeros(1, 64), torch.zeros(1, dtype=torch.long))
    for network, message in (
        (nn.Linear(64, 10), "a Linear is not run in batches"),
        (nn.Sequential(nn.Linear(64, 10), nn.Tanh()), "layer 1 is Tanh"),
        (nn.Sequential(nn.Conv2d(2, 2, 3, groups=2)), "layer 0 is Conv2d"),
    ):
        with pytest.raises(MergeError, match=message):
            MergedNetworks(network, files.base, dict(files.experts), [examples])


# --- few examples an evaluation


@pytest.fixture(scope="module")
def few(pair: MergedNetworks) -> FewExamples:
    return FewExamples(digits_problem(2, epochs=1), pair)


class TestFewExamplesContract(ProblemContract):
    noise_free = False

    @pytest.fixture
    def problem(self, few: FewExamples) -> Problem:
        return few


def repeated(few: FewExamples, times: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the truth at one point, many measurements of it, and their announced variances."""
    X = torch.tensor([[0.4, 0.7]])
    seen = [few.evaluate(X, generator=make_generator(seed)) for seed in range(times)]
    return (
        few.networks.accuracy(X)[0],
        torch.cat([one.Y for one in seen]),
        torch.cat([one.Yvar for one in seen]),
    )


def test_the_noise_is_binomial_around_the_truth(few: FewExamples) -> None:
    truth, Y, Yvar = repeated(few, 600)
    expected = truth * (1 - truth) / 100
    assert bool(((Y.mean(0) - truth).abs() < 4 * (expected / 600).sqrt()).all())
    ratio = Y.var(0) / expected
    assert bool(((ratio > 0.8) & (ratio < 1.25)).all())
    assert bool(((Yvar.mean(0) / expected - 1).abs() < 0.05).all())
    errors = (Y - truth) / expected.sqrt()
    assert abs(float((errors[:, 0] * errors[:, 1]).mean())) < 0.17  # each metric on its own


def test_every_row_draws_its_own_hundred_examples(few: FewExamples) -> None:
    X = torch.tensor([[0.4, 0.7]]).expand(6, 2)
    seen = few.evaluate(X, generator=make_generator(0))
    assert bool((seen.counts == 100).all())
    torch.testing.assert_close((seen.Y * 100).round(), seen.Y * 100)
    assert len(torch.unique(seen.Y, dim=0)) > 2


def test_refuses_no_examples(pair: MergedNetworks) -> None:
    with pytest.raises(DataError, match=r"count must .* got 0"):
        FewExamples(digits_problem(2, epochs=1), pair, 0)
