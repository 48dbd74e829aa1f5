from __future__ import annotations

import pytest

from map_bo.problems.merged.problem import MergedModelProblem
from map_bo.problems.zoo.digits import digits_problem


@pytest.fixture(scope="session")
def tiny_zoo() -> MergedModelProblem:
    """Two experts trained for one epoch, each evaluation on 50 images."""
    return digits_problem(2, epochs=1, size=50)
