from __future__ import annotations

import math

import torch

from map_bo.evaluators.logits import (
    LOGIT_METRICS,
    need_labels,
    outcomes_of_logits,
    prediction_entropy,
)


def test_outcomes_of_logits() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [torch.nan, 0.0]])
    found = outcomes_of_logits(tuple(LOGIT_METRICS), logits, torch.tensor([0, 0, 0]))
    chances = logits.double().softmax(-1)[:2]
    chance = chances[:, 0]
    entropy = -(chances * chances.log()).sum(-1)
    right = torch.tensor([1.0, 0.0]).double()
    torch.testing.assert_close(found[:2], torch.stack([right, -chance.log(), chance, entropy], -1))
    assert bool(found[2].isnan().all())  # a model that is broken is not simply wrong
    assert outcomes_of_logits(["accuracy"], logits[:2], torch.tensor([0, 0])).tolist() == [1, 0]


def test_entropy_goes_from_certain_to_undecided() -> None:
    logits = torch.tensor([[1000.0, 0.0, 0.0, 0.0], [3.0, 3.0, 3.0, 3.0]])
    found = prediction_entropy(logits)
    torch.testing.assert_close(found, torch.tensor([0.0, math.log(4)]).double())


def test_entropy_alone_needs_no_labels() -> None:
    assert not need_labels(["entropy"])
    assert need_labels(["entropy", "loss"])
    assert outcomes_of_logits(["entropy"], torch.zeros(3, 2), None).shape == (3,)
