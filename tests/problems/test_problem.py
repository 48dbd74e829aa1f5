from __future__ import annotations

from map_bo.problems.problem import Describable, description_of
from tests.loop.bowls import Bowls


class Silent:
    """A problem that says nothing of itself."""

    space, metrics, evaluate = Bowls().space, Bowls().metrics, Bowls().evaluate


def test_a_problem_that_says_nothing_is_known_by_its_type() -> None:
    assert description_of(Silent()) == {"type": "Silent"}
    assert not isinstance(Silent(), Describable)
    assert description_of(Bowls(noise=0.5))["noise"] == 0.5
