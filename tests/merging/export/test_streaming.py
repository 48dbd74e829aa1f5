from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.bounded import merge_linearly
from tests.merging.checkpoint_files import (
    BASE,
    COEFFICIENTS,
    EXPERTS,
    NAMES,
    Tied,
    merged,
    tensors_of,
)


def by_hand(weights: Mapping[str, float]) -> dict[str, Tensor]:
    base, result = tensors_of(0), {}
    for name, value in base.items():
        wide = {torch.bfloat16: torch.float32}.get(value.dtype, value.dtype)
        result[name] = value
        if value.is_floating_point() or value.is_complex():
            total = value.to(wide)
            for i, expert in enumerate(NAMES, start=1):
                delta = tensors_of(i)[name].to(wide) - value.to(wide)
                total = total + weights[expert] * delta
            result[name] = total.to(value.dtype)
    return result


class TestMergeStreamed:
    def test_it_is_the_weighted_sum_in_the_dtype_of_the_base(self) -> None:
        result = dict(merged())
        expected = by_hand(COEFFICIENTS)
        assert list(result) == sorted(expected)
        for name, value in expected.items():
            assert result[name].dtype == value.dtype
            torch.testing.assert_close(result[name], value)

    def test_other_tensors_are_those_of_the_base(self) -> None:
        result = dict(merged())
        assert result["third.counter"] == 0
        assert torch.equal(result["third.mask"], tensors_of(0)["third.mask"])

    def test_weight_zero_is_the_base_bit_for_bit_and_reads_no_expert(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for expert in EXPERTS.values():
            monkeypatch.setattr(expert, "load", None)
        for weights in ({}, dict.fromkeys(NAMES, 0.0)):
            assert open_checkpoint(dict(merged(weights))).digest() == BASE.digest()

    @given(a=st.floats(-2, 2), b=st.floats(-2, 2))
    def test_it_is_linear_in_the_weights(self, a: float, b: float) -> None:
        name, value = next(iter(merged({NAMES[0]: a, NAMES[1]: b})))
        assert name == "first.bias"  # float64
        base, one, two = (tensors_of(i)[name] for i in range(3))
        expected = (1 - a - b) * base + a * one + b * two
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)

    def test_bfloat16_is_summed_in_float32(self) -> None:
        base = torch.ones(1, dtype=torch.bfloat16)
        experts = {str(i): open_checkpoint({"w": base * 1.0078125}) for i in range(64)}
        weights = dict.fromkeys(experts, 1 / 16)
        _, value = next(merge_linearly(open_checkpoint({"w": base}), experts, lambda name: weights))
        # Each step alone is lost when it is rounded to bfloat16.
        assert value.item() == 1.03125

    def test_weights_may_differ_between_tensors(self) -> None:
        result = dict(
            merge_linearly(
                BASE, EXPERTS, lambda name: {"math": 1.0 if name.startswith("first") else 0.0}
            )
        )
        torch.testing.assert_close(result["first.weight"], tensors_of(1)["first.weight"])
        assert torch.equal(result["second.weight"], tensors_of(0)["second.weight"])

    def test_neither_base_nor_expert_is_changed(self) -> None:
        before = [c.digest() for c in (BASE, *EXPERTS.values())]
        for _, tensor in merged():
            if tensor.is_floating_point() and tensor.numel():
                assert tensor.data_ptr() not in {BASE.load(n).data_ptr() for n in BASE.names}
        assert [c.digest() for c in (BASE, *EXPERTS.values())] == before

    def test_variances_stay_above_the_least_of_the_models(self) -> None:
        base = open_checkpoint({"norm.running_var": torch.tensor([1.0, 4.0])})
        experts = {
            "a": open_checkpoint({"norm.running_var": torch.tensor([0.5, 5.0])}),
            "b": open_checkpoint({"norm.running_var": torch.tensor([0.25, 6.0])}),
        }
        [(_, value)] = merge_linearly(base, experts, lambda name: {"a": 3.0})
        assert value.tolist() == [0.25, 7.0]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop("first.bias"), "'math' lacks 1 of the base's tensors: first.bias"),
            (lambda t: t.update(extra=torch.ones(1)), "'math' has 1 tensors that the base lacks"),
            (
                lambda t: t.update({"first.weight": torch.ones(3, 4)}),
                r"other shapes than the base: first\.weight \[3, 4\] against \[4, 3\]",
            ),
            (
                lambda t: t.update({"first.weight": torch.ones(4, 3, dtype=torch.int8)}),
                r"other kinds of dtype than the base: first\.weight torch\.int8",
            ),
        ],
    )
    def test_an_expert_that_does_not_fit_is_refused_at_once(
        self, change: Any, message: str
    ) -> None:
        tensors = tensors_of(1)
        change(tensors)
        with pytest.raises(MergeError, match=message) as caught:
            merge_linearly(BASE, {"math": open_checkpoint(tensors)}, lambda name: {})
        assert caught.value.hint

    def test_an_expert_in_another_float_dtype_fits(self) -> None:
        half = open_checkpoint({"w": torch.full((2,), 3.0, dtype=torch.float16)})
        base = open_checkpoint({"w": torch.ones(2)})
        [(_, value)] = merge_linearly(base, {"a": half}, lambda name: {"a": 0.5})
        assert value.dtype == torch.float32
        assert value.tolist() == [2.0, 2.0]

    def test_bad_weights(self) -> None:
        with pytest.raises(MergeError, match="unknown experts code"):
            next(merged({"code": 1.0}))
        with pytest.raises(MergeError, match=r"weight of math for tensor 'first\.bias' is not f"):
            next(merged({"math": float("nan")}))

    def test_an_expert_may_lack_the_alias_or_keep_only_it(self) -> None:
        weight = Tied(1).embed.detach()
        for name in ("embed", "head.weight"):
            stream = merge_linearly(
                open_checkpoint(Tied(0)),
                {"a": open_checkpoint({name: weight})},
                lambda n: {"a": 1.0},
            )
            torch.testing.assert_close(dict(stream)["embed"], weight)

    def test_an_alias_that_only_the_expert_has_is_no_further_tensor(self) -> None:
        base = open_checkpoint({"embed": Tied(0).embed})
        [(name, value)] = merge_linearly(
            base, {"a": open_checkpoint(Tied(1))}, lambda n: {"a": 1.0}
        )
        assert name == "embed"
        torch.testing.assert_close(value, Tied(1).embed.detach())

    def test_an_expert_that_unties_is_refused(self) -> None:
        tensors = {k: v.clone() for k, v in Tied(1).state_dict().items()}
        base = open_checkpoint(Tied(0))
        equal = merge_linearly(base, {"a": open_checkpoint(tensors)}, lambda n: {"a": 1.0})
        assert len(list(equal)) == 2
        tensors["head.weight"] += 1
        stream = merge_linearly(base, {"a": open_checkpoint(tensors)}, lambda n: {"a": 1.0})
        with pytest.raises(MergeError, match=r"'embed' and 'head\.weight' are one tensor .* 'a'"):
            list(stream)
