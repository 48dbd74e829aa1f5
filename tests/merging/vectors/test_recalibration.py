from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from map_bo.errors import EvaluationError, MergeError
from map_bo.merging.vectors.recalibration import Recalibration, recalibrate, statistics
from map_bo.rng import make_generator
from tests.merging.small_models import Mlp, build


class Deep(nn.Module):
    """Norms of several kinds, one used twice, one in an unused head, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.inner = nn.ModuleDict({"sync": nn.SyncBatchNorm(3, momentum=0.3)})
        self.again = self.first[1]
        self.extra = nn.BatchNorm1d(3)
        self.without = nn.BatchNorm1d(3, track_running_stats=False)
        self.other = nn.InstanceNorm1d(3, track_running_stats=True)
        self.modes: list[list[bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append([module.training for module in (self, self.first[0], self.first[1])])
        result: Tensor = self.inner["sync"](self.first(x))
        if self.training:
            result = self.extra(result)
        return result


def batches(seed: int, count: int = 4, rows: int = 6, scale: float = 2.0) -> list[Tensor]:
    generator = make_generator(seed)
    return [scale * torch.randn(rows, 3, generator=generator) + 1 for _ in range(count)]


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


class TestRecalibrate:
    @given(seed=st.integers(0, 1000), count=st.integers(1, 5), rows=st.integers(2, 7))
    def test_statistics_are_the_average_over_batches(
        self, seed: int, count: int, rows: int
    ) -> None:
        norm, data = nn.BatchNorm1d(3), batches(seed, count, rows)
        norm.running_mean.fill_(9.0)  # type: ignore[union-attr]
        assert recalibrate(norm, data) == count
        found = statistics(norm)
        assert found.keys() == {"running_mean", "running_var", "num_batches_tracked"}
        torch.testing.assert_close(
            found["running_mean"], torch.stack([x.mean(0) for x in data]).mean(0)
        )
        torch.testing.assert_close(
            found["running_var"], torch.stack([x.var(0) for x in data]).mean(0)
        )
        assert found["num_batches_tracked"] == count

    @pytest.mark.parametrize("momentum", [None, 0.25])
    def test_nothing_is_left_of_earlier_statistics(self, momentum: float | None) -> None:
        fresh, trained = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        for x in batches(1, scale=9.0):
            trained(x)
        assert int(statistics(trained)["num_batches_tracked"]) == 4
        for norm in (fresh, trained):
            recalibrate(norm, batches(0), momentum=momentum)
        assert same(statistics(trained), statistics(fresh))

    def test_with_momentum_the_average_is_exponential(self) -> None:
        norm, data = nn.BatchNorm1d(3, momentum=None), batches(0)
        recalibrate(norm, data, momentum=0.25)
        expected = torch.zeros(3)
        for x in data:
            expected = 0.75 * expected + 0.25 * x.mean(0)
        torch.testing.assert_close(statistics(norm)["running_mean"], expected)
        assert norm.momentum is None

    def test_a_second_layer_sees_what_the_first_lets_through(self) -> None:
        """Statistics of one batch are those with which evaluation gives what training gave."""
        model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
        (data,) = batches(3, 1, 50)
        recalibrate(model, [data])
        first = model[0](data)
        second = model[1]((data - data.mean(0)) / (data.var(0, correction=0) + 1e-5).sqrt())
        torch.testing.assert_close(statistics(model)["2.running_mean"], second.mean(0))
        assert first.mean(0).abs().max() < 1e-5

    def test_only_norms_train_and_all_is_put_back(self) -> None:
        model = Deep().train()
        model.first[0].eval()
        modes = [module.training for module in model.modules()]
        weights = {k: v.clone() for k, v in model.named_parameters()}
        state = torch.random.get_rng_state()
        recalibrate(model, batches(0))
        assert model.modes == [[False, False, True]] * 4
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(v, weights[k]) for k, v in model.named_parameters())
        assert all(p.grad is None for p in model.parameters())
        assert model.inner["sync"].momentum == 0.3
        (first,) = (v for k, v in statistics(model).items() if k == "first.1.running_mean")
        torch.testing.assert_close(first, torch.stack([x.mean(0) for x in batches(0)]).mean(0))

    def test_layers_that_are_not_reached_keep_their_statistics(self) -> None:
        model = Deep()
        model.extra.running_var.fill_(5.0)  # type: ignore[union-attr]
        model.other.running_mean.fill_(3.0)  # type: ignore[union-attr]
        recalibrate(model, batches(0))
        found = statistics(model)
        assert bool((found["extra.running_var"] == 5).all())
        assert bool((model.other.running_mean == 3).all())  # type: ignore[union-attr]
        assert found["inner.sync.num_batches_tracked"] == 4
        # A layer of two names is there under both, and without statistics under none.
        assert torch.equal(found["again.running_var"], found["first.1.running_var"])
        assert found.keys() <= model.state_dict().keys()
        assert not [name for name in found if name.startswith(("without", "other"))]

    @pytest.mark.parametrize("kind", ["pair", "list", "mapping"])
    def test_kinds_of_batches(self, kind: str) -> None:
        class Named(nn.BatchNorm1d):
            def forward(self, values: Tensor) -> Tensor:
                return super().forward(values)

        plain, other = nn.BatchNorm1d(3), Named(3)
        data = batches(0)
        labels = torch.zeros(6)
        kinds: dict[str, Any] = {
            "pair": [(x, labels) for x in data],
            "list": [[x, labels] for x in data],
            "mapping": [{"values": x} for x in data],
        }
        recalibrate(plain, data)
        recalibrate(other, kinds[kind])
        assert same(statistics(plain), statistics(other))

    def test_a_loader(self) -> None:
        data = torch.cat(batches(0))
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data), batch_size=6)
        one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
        recalibrate(one, loader)
        recalibrate(other, batches(0))
        assert same(statistics(one), statistics(other))


class TestRefusals:
    @pytest.mark.parametrize(
        ("data", "kind", "message"),
        [
            ([], MergeError, "there are no batches"),
            ([torch.full((4, 3), torch.nan)], EvaluationError, "statistics of first.1, inner.sync"),
            ([torch.ones(4, 5)], EvaluationError, "on batch 0 the model raised RuntimeError: "),
            ([torch.ones(1, 3)], EvaluationError, "on batch 0 the model raised ValueError: "),
            ([*batches(0), {"z": 1}], EvaluationError, "on batch 4 the model raised TypeError"),
            ([[]], EvaluationError, "on batch 0 the model raised "),
        ],
    )
    def test_after_an_error_all_is_as_before(
        self, data: list[Any], kind: type[Exception], message: str
    ) -> None:
        model = Deep().train()
        recalibrate(model, batches(7))
        before, modes = statistics(model), [module.training for module in model.modules()]
        with pytest.raises(kind, match=message) as caught:
            recalibrate(model, data)
        assert caught.value.hint  # type: ignore[attr-defined]
        assert same(statistics(model), before)
        assert [module.training for module in model.modules()] == modes

    def test_models_without_batch_norm(self) -> None:
        untracked = nn.BatchNorm1d(3, track_running_stats=False)
        for model in (Mlp(), untracked, nn.InstanceNorm1d(3, track_running_stats=True)):
            with pytest.raises(MergeError, match="has no BatchNorm layers with running statistics"):
                recalibrate(model, batches(0))

    def test_batches_that_reach_no_layer(self) -> None:
        class Idle(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm1d(3)

            def forward(self, x: Tensor) -> Tensor:
                return x

        with pytest.raises(MergeError, match="reach none of the BatchNorm layers norm"):
            recalibrate(Idle(), batches(0))

    @pytest.mark.parametrize("momentum", [0.0, -1.0, 1.5, float("nan")])
    def test_a_momentum_that_is_none(self, momentum: float) -> None:
        with pytest.raises(MergeError, match="momentum must"):
            recalibrate(nn.BatchNorm1d(3), batches(0), momentum=momentum)


class TestRecalibration:
    def test_a_candidate_is_recalibrated_once(self) -> None:
        calls: list[int] = []

        def source() -> Iterator[Tensor]:
            calls.append(1)
            return iter(batches(len(calls)))

        recalibration, model = Recalibration(source), nn.BatchNorm1d(3)
        c = torch.tensor([0.1, 0.2])
        recalibration(model, c)
        first = statistics(model)
        model.running_var.fill_(7.0)  # type: ignore[union-attr]
        recalibration(model, c.clone())
        assert same(statistics(model), first)
        assert len(calls) == 1
        recalibration(model, c + 1)
        assert len(calls) == 2
        assert not same(statistics(model), first)

    def test_a_loader_that_shuffles_leaves_the_global_state_alone(self) -> None:
        data = torch.utils.data.TensorDataset(torch.cat(batches(0)))
        loader = torch.utils.data.DataLoader(data, batch_size=5, shuffle=True)
        state = torch.random.get_rng_state()
        Recalibration(loader)(nn.BatchNorm1d(3), torch.zeros(1))
        assert torch.equal(torch.random.get_rng_state(), state)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (3, "must be batches or a function, got a int"),
            (iter([]), "gone through again, got an iterator"),
        ],
    )
    def test_what_cannot_be_gone_through_again(self, given: Any, message: str) -> None:
        with pytest.raises(MergeError, match=message):
            Recalibration(given)


def test_a_network_in_bfloat16() -> None:
    model = build("cnn").bfloat16()
    generator = make_generator(0)
    data = [torch.randn(3, 1, 6, 6, generator=generator).bfloat16() for _ in range(3)]
    recalibrate(model, data)
    assert statistics(model)["norm.running_var"].dtype == torch.bfloat16
    assert bool(model(data[0]).isfinite().all())
