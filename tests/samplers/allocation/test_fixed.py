"""Fixed subsets and successive halving: what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from map_bo.errors import ConfigError
from map_bo.samplers.allocation.fixed import Fixed, SuccessiveHalving
from tests.loop.items import ItemProblem
from tests.samplers.allocation.test_allocation import start


@pytest.mark.parametrize("examples", [0, -1, 2.5, "many"])
def test_a_subset_has_a_whole_number_of_examples(examples: Any) -> None:
    with pytest.raises(ConfigError, match="examples of a fixed subset"):
        Fixed(examples)


def test_a_subset_larger_than_the_set_is_all_of_it() -> None:
    [part] = Fixed(1000).first(start(ItemProblem(1, 100), 3.0))
    assert part.stop == 100


@pytest.mark.parametrize(("share", "factor"), [(0.0, 2), (2.0, 2), (0.5, 1)])
def test_impossible_rungs_are_refused(share: float, factor: int) -> None:
    with pytest.raises(ConfigError):
        SuccessiveHalving(share=share, factor=factor)
