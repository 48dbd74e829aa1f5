from __future__ import annotations

from dataclasses import replace

import torch

from map_bo.data import Metric
from map_bo.scale import Scale
from tests.test_scale import BASE, METRICS, SPACE, A, B, seen


class TestUnitsOfSeveralScales:
    plain = Scale(METRICS, torch.tensor([0.0, 3.0]), torch.tensor([1.0, 1.0]), "plain")
    apart = replace(plain, unit=torch.tensor([0.5, 4.0]))

    def test_without_a_unit_of_its_own_none_has_one(self) -> None:
        assert Scale.common([self.plain, self.plain], "both").unit is None
        assert Scale.common([self.plain], "one").metrics == METRICS

    def test_a_unit_in_any_of_them_gives_the_larger_of_each_metric(self) -> None:
        for scales in ([self.plain, self.apart], [self.apart, self.plain]):
            assert Scale.common(scales, "both").width.tolist() == [1.0, 4.0]

    def test_a_part_keeps_which_metrics_have_a_range(self) -> None:
        still = replace(self.plain, ranged=torch.tensor([False, True]))
        assert still.select([0]).rangeless == ("up",)
        assert still.select([1]).rangeless == ()
        assert self.apart.select([1, 0]).width.tolist() == [4.0, 0.5]


def test_the_rule_lists_the_metrics_whose_value_was_given() -> None:
    three = (*METRICS, Metric("third", kind="unbounded"))
    data = seen([BASE, A, B], [[0, 3, 0], [1, 2, 1], [0.5, 1, 2]], three)
    rule = Scale.of(data, SPACE, {"up": 0.1, "third": 0.2}).rule
    assert rule.startswith("given by the user for up, third, else worst of")
    # What is not given is what it would be without: 0 stands for nothing.
    assert float(Scale.of(data, SPACE, {"up": 0.1}).point[2]) == 0.0
    shifted = replace(data, Y=data.Y + torch.tensor([0.0, 0.0, 5.0]))
    assert float(Scale.of(shifted, SPACE, {"up": 0.1}).point[2]) == 5.0
