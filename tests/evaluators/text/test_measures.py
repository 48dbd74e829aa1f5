from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import f1_score

from map_bo.errors import EvaluationError
from map_bo.evaluators.text.measures import correlation, macro_f1
from map_bo.rng import make_generator


def drawn(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = make_generator(seed)
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    return x, 0.6 * x + torch.randn(n, generator=generator, dtype=torch.float64)


def test_macro_f1_is_that_of_scikit_learn_over_the_classes_that_there_are() -> None:
    generator = make_generator(0)
    true = torch.randint(4, (60,), generator=generator)
    predicted = torch.where(torch.rand(60, generator=generator) < 0.6, true, (true + 1) % 5)
    found = macro_f1(predicted.double(), true)
    expected = f1_score(true.numpy(), predicted.numpy(), labels=[0, 1, 2, 3], average="macro")
    assert found.value == pytest.approx(expected)
    left = [
        f1_score(
            np.delete(true.numpy(), i),
            np.delete(predicted.numpy(), i),
            labels=[0, 1, 2, 3],
            average="macro",
        )
        for i in range(60)
    ]
    assert found.variance == pytest.approx(59 / 60 * np.sum((np.array(left) - np.mean(left)) ** 2))


def test_macro_f1_of_one_example_has_no_variance() -> None:
    assert macro_f1(torch.tensor([1.0]), torch.tensor([1])).variance is None


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_correlations_are_those_of_scipy(kind: str) -> None:
    x, y = drawn(50)
    x[:10], y[5:9] = x[0], y[5]  # ties
    expected = {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[kind](x.numpy(), y.numpy())
    found = correlation(x, y, "pearson" if kind == "pearson" else "spearman")
    assert found.value == pytest.approx(float(expected.statistic))


def test_the_jackknife_of_pearson_leaves_one_out() -> None:
    x, y = drawn(30)
    left = np.array(
        [
            float(stats.pearsonr(np.delete(x.numpy(), i), np.delete(y.numpy(), i)).statistic)
            for i in range(30)
        ]
    )
    expected = 29 / 30 * ((left - left.mean()) ** 2).sum()
    assert correlation(x, y, "pearson").variance == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_variances_are_those_of_repeated_samples(kind: str) -> None:
    word = "pearson" if kind == "pearson" else "spearman"
    found = [correlation(*drawn(100, seed), word) for seed in range(300)]  # type: ignore[arg-type]
    spread = float(np.var([one.value for one in found]))
    told = float(np.mean([one.variance for one in found if one.variance is not None]))
    assert told == pytest.approx(spread, rel=0.3)


def test_constant_numbers_have_no_correlation() -> None:
    x, y = drawn(5)
    with pytest.raises(EvaluationError, match="all 5 predictions are 2, and have no correlation"):
        correlation(torch.full((5,), 2.0), y, "spearman")
    with pytest.raises(EvaluationError, match="all 5 true numbers are 1"):
        correlation(x, torch.ones(5), "pearson")
    assert correlation(x[:3], y[:3], "spearman").variance is None
    assert correlation(x[:3], y[:3], "pearson").variance is None
