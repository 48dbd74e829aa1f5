"""What every evaluator that scores example by example keeps."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import EvaluationError
from map_bo.evaluators.evaluator import Measurement, Prepares
from map_bo.evaluators.examples import ExampleEvaluator, listening
from map_bo.evaluators.metrics import DeclaresMetrics, measure_all, metrics_of
from map_bo.evaluators.scoring import Scored


class ExampleEvaluatorContract:
    """Derive, and give fixtures ``evaluator`` (new, not prepared) and ``model`` (fits it)."""

    @pytest.fixture
    def evaluator(self) -> ExampleEvaluator:
        raise NotImplementedError

    @pytest.fixture
    def model(self) -> nn.Module:
        raise NotImplementedError

    @pytest.fixture
    def ready(self, evaluator: ExampleEvaluator, model: nn.Module) -> ExampleEvaluator:
        evaluator.prepare(model)
        return evaluator

    def test_it_declares_what_it_can(self, evaluator: ExampleEvaluator) -> None:
        assert isinstance(evaluator, DeclaresMetrics)
        assert isinstance(evaluator, Prepares)
        assert all(isinstance(metric, Metric) for metric in evaluator.metrics)
        assert metrics_of({"task": evaluator}, None)

    def test_nothing_is_known_before_it_is_prepared(self, evaluator: ExampleEvaluator) -> None:
        evaluator.check_data()  # which reads, and gets nothing ready
        with pytest.raises(EvaluationError):
            _ = evaluator.size
        with pytest.raises(EvaluationError):
            _ = evaluator.digest

    def test_outcomes_have_their_shape(self, ready: ExampleEvaluator, model: nn.Module) -> None:
        found = ready.score(model, torch.arange(ready.size))
        m = len(ready.metrics)
        assert found.shape == ((ready.size,) if m == 1 else (ready.size, m))
        assert found.dtype == torch.float64
        assert not found.is_inference()

    def test_outcomes_belong_to_their_examples(
        self, ready: ExampleEvaluator, model: nn.Module
    ) -> None:
        whole = ready.score(model, torch.arange(ready.size))
        items = torch.arange(ready.size - 1, -1, -2)
        torch.testing.assert_close(ready.score(model, items), whole[items], rtol=1e-4, atol=1e-5)
        items = torch.tensor([1, 0, 1, ready.size - 1, 0, 1])  # as when examples are drawn anew
        torch.testing.assert_close(ready.score(model, items), whole[items], rtol=1e-4, atol=1e-5)

    def test_metrics_are_the_means_that_they_are_said_to_be(
        self, ready: ExampleEvaluator, model: nn.Module
    ) -> None:
        items = torch.arange(0, ready.size, 2)
        assert len(ready.means) == len(ready.metrics)
        parts: list[Tensor | None] = [None, *([items] if ready.divisible else [])]
        for part in parts:
            outcomes = ready.score(model, torch.arange(ready.size) if part is None else part)
            table = outcomes.reshape(len(outcomes), -1)
            if part is None:
                found = ready.summary(outcomes)
            elif not any(ready.means):  # so few may say nothing of a correlation
                continue
            else:
                found = ready.summary(outcomes, part)
            for metric, mean, column in zip(
                ready.metrics, ready.means, table.unbind(-1), strict=True
            ):
                if mean and metric.name in found:
                    assert found[metric.name].value == pytest.approx(float(column.nanmean()))

    def test_labels_are_one_per_example(self, ready: ExampleEvaluator) -> None:
        strata = ready.strata
        if strata is not None:
            assert strata.shape == (ready.size,)
            assert not strata.is_floating_point()
            assert len(strata.unique()) < ready.size  # type: ignore[no-untyped-call]

    def test_it_is_scored_by_example_as_a_problem_scores_it(
        self, ready: ExampleEvaluator, model: nn.Module
    ) -> None:
        """The numbers are those of calling it, to the last bit, and a part has its own."""
        scored = Scored.of("task", ready)
        assert scored is not None
        assert (scored.size, scored.digest) == (ready.size, ready.digest)
        found, table = scored.measure(model, [])
        assert found == measure_all("task", ready, model)
        assert table.shape == (ready.size, len(ready.metrics))
        if not ready.divisible:
            return
        items = torch.arange(ready.size - 1, -1, -2)
        outcomes = scored.outcomes(ready.score(model, items), items)
        torch.testing.assert_close(
            outcomes.values, table[outcomes.items], rtol=1e-4, atol=1e-5, equal_nan=True
        )

    def test_calling_it_is_the_summary_of_all(
        self, ready: ExampleEvaluator, model: nn.Module
    ) -> None:
        called = ready(model)
        assert isinstance(called, Mapping)
        assert list(called) == [metric.name for metric in ready.metrics]
        assert dict(called) == ready.summary(ready.score(model, torch.arange(ready.size)))
        for name, seen in measure_all("task", ready, model).items():
            assert isinstance(seen, Measurement), (name, seen)

    def test_preparing_again_changes_nothing(
        self, ready: ExampleEvaluator, model: nn.Module
    ) -> None:
        before, digest = ready.score(model, torch.arange(ready.size)), ready.digest
        ready.prepare(model)
        assert ready.digest == digest
        assert torch.equal(ready.score(model, torch.arange(ready.size)), before)

    def test_the_mode_of_the_model_comes_back(
        self, ready: ExampleEvaluator, model: nn.Module
    ) -> None:
        model.train()
        ready.score(model, torch.tensor([0]))
        assert model.training

    @pytest.mark.parametrize("items", [[], [0.5], [-1], [10**6], [[0]]])
    def test_indices_that_are_not_possible_are_refused(
        self, ready: ExampleEvaluator, model: nn.Module, items: list[object]
    ) -> None:
        with pytest.raises(EvaluationError):
            ready.score(model, torch.tensor(items))

    def test_it_tells_how_far_it_is(self, ready: ExampleEvaluator, model: nn.Module) -> None:
        heard: list[tuple[int, int]] = []
        with listening(lambda done, of: heard.append((done, of))):
            ready.score(model, torch.arange(ready.size))
        assert heard[-1] == (ready.size, ready.size)
        assert heard == sorted(heard)
