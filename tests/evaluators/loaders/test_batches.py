from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from map_bo.errors import EvaluationError
from map_bo.evaluators.loaders.batches import LoadedBatches, in_order

CPU = torch.device("cpu")


def data(n: int = 10) -> TensorDataset:
    return TensorDataset(torch.arange(2.0 * n).reshape(n, 2), torch.arange(n) % 3)


def rows(loaded: LoadedBatches, items: list[int]) -> tuple[Any, Any]:
    """Return inputs and targets of single tensors in the order of the items."""
    found = list(loaded.parts(torch.tensor(items), CPU))
    inputs = in_order([(places, x) for places, x, _ in found], len(items))
    return inputs, in_order([(places, y) for places, _, y in found], len(items))


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.zeros(2)


class Noisy(TensorDataset):
    """A data set that draws from all global generators."""

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        x, y = (tensor[index] for tensor in self.tensors)
        return x + torch.randn(()) + float(np.random.rand()) + random.random(), y  # noqa: NPY002


def test_examples_are_found_by_index_across_batches() -> None:
    loaded = LoadedBatches.read(DataLoader(data(), batch_size=4))
    assert (loaded.size, loaded.largest) == (10, 4)
    inputs, targets = rows(loaded, [9, 0, 5, 4, 9])
    assert inputs[:, 0].tolist() == [18, 0, 10, 8, 18]
    assert targets.tolist() == [0, 0, 2, 1, 0]


def test_a_whole_batch_is_what_the_loader_gave() -> None:
    batch = torch.rand(4, 2)
    loaded = LoadedBatches.read([(batch, torch.zeros(4))])
    ((_, inputs, _),) = loaded.parts(torch.arange(4), CPU)
    assert inputs.data_ptr() == batch.data_ptr()


def test_a_shuffling_loader_has_one_order_in_every_process() -> None:
    def read(seed: int = 0) -> LoadedBatches:
        return LoadedBatches.read(DataLoader(Noisy(*data().tensors), 3, shuffle=True), seed=seed)

    first, again = read(), read()
    assert first.digest == again.digest
    assert read(1).digest != first.digest
    assert sorted(first.where[:, 0].tolist()) == first.where[:, 0].tolist()


def test_global_generators_are_left_as_they_were() -> None:
    drawn_next = np.random.get_state(legacy=False)  # noqa: NPY002
    before = torch.get_rng_state(), str(drawn_next), random.getstate()
    LoadedBatches.read(DataLoader(Noisy(*data().tensors), 3, shuffle=True))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state(legacy=False)) == before[1]  # noqa: NPY002
    assert random.getstate() == before[2]


def test_batches_of_several_lengths_are_not_padded_together() -> None:
    batches = [
        {"ids": torch.ones(2, 3), "label": torch.tensor([0, 1])},
        {"ids": torch.ones(2, 5), "label": torch.tensor([2, 3])},
        {"ids": torch.zeros(1, 3), "label": torch.tensor([4])},
    ]
    loaded = LoadedBatches.read(batches)
    found = list(loaded.parts(torch.tensor([4, 3, 0]), CPU))
    assert [tuple(inputs["ids"].shape) for _, inputs, _ in found] == [(2, 3), (1, 5)]
    assert [(places.tolist(), y.tolist()) for places, _, y in found] == [
        ([0, 2], [4, 0]),
        ([1], [3]),
    ]


def test_forms_of_batches() -> None:
    x, y = torch.rand(2, 3), torch.tensor([0, 1])
    cases: list[tuple[object, object, object]] = [
        (x, x, None),
        ([x], x, None),
        ((x, y), x, y),
        ([x, [0, 1]], x, y),
        ((x, x, y), (x, x), y),
        ({"a": x, "labels": y}, {"a": x}, y),
        ({"a": x.numpy(), "b": None}, {"a": x}, None),
        (({"a": x}, {"first": y, "second": y}), {"a": x}, {"first": y, "second": y}),
        (({"text": ["one", "two"]}, y), {"text": ["one", "two"]}, y),
    ]
    for batch, inputs, targets in cases:
        ((found, wanted),) = LoadedBatches.read([batch]).batches
        assert str((found, wanted)) == str((inputs, targets))


def test_the_key_of_the_labels_can_be_given() -> None:
    batch = {"a": torch.rand(2, 3), "labels": torch.rand(2), "grade": torch.tensor([4, 5])}
    ((inputs, targets),) = LoadedBatches.read([batch], labels=("grade",)).batches
    assert set(inputs) == {"a", "labels"}
    assert targets.tolist() == [4, 5]


def test_a_limit_takes_the_first() -> None:
    loaded = LoadedBatches.read(DataLoader(data(), batch_size=4), limit=6)
    assert rows(loaded, list(range(6)))[0][:, 0].tolist() == [0, 2, 4, 6, 8, 10]
    assert LoadedBatches.read(DataLoader(data(), batch_size=4), limit=100).size == 10
    assert LoadedBatches.read(DataLoader(Endless(), batch_size=4), limit=6).size == 6


def test_a_loader_that_may_have_no_end_is_refused() -> None:
    with pytest.raises(EvaluationError, match="no length") as found:
        LoadedBatches.read(DataLoader(Endless(), batch_size=4))
    assert "limit" in (found.value.hint or "")


def test_a_function_returns_the_loader() -> None:
    assert LoadedBatches.read(lambda: DataLoader(data(), batch_size=4)).size == 10
    with pytest.raises(EvaluationError, match="the loader is a int"):
        LoadedBatches.read(lambda: 3)


def failing() -> Iterator[Tensor]:
    yield torch.zeros(2)
    raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no examples"),
        ([(torch.zeros(0, 2), torch.zeros(0))], "no examples"),
        ([(torch.zeros(3, 2), torch.zeros(2))], "3 inputs and 2 targets"),
        ([torch.zeros(2), (torch.zeros(2), torch.zeros(2))], "some have not"),
        ([(torch.zeros(()), torch.zeros(()))], "without rows"),
        ([({"a": torch.zeros(2), "b": torch.zeros(3)}, torch.zeros(2))], r"have \[2, 3\] rows"),
        ([object()], "holds a object"),
        ([({"labels": torch.zeros(2)})], r"have no rows"),
    ],
)
def test_what_are_no_batches_is_refused(batches: list[object], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        LoadedBatches.read(batches)


def test_what_a_loader_raises_is_told() -> None:
    with pytest.raises(EvaluationError, match="OSError: the disk is gone"):
        LoadedBatches.read(failing, limit=9)


def test_the_digest_is_of_the_content() -> None:
    def digest(x: Tensor) -> str:
        return LoadedBatches.read([{"x": x, "label": torch.zeros(len(x))}]).digest

    x = torch.arange(4.0)
    assert digest(x) == digest(x.clone())
    assert len({digest(x), digest(x.reshape(4, 1)), digest(x.bfloat16()), digest(x + 1)}) == 4
