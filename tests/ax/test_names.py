from __future__ import annotations

import pytest

from map_bo.ax.names import names_for
from map_bo.data import Metric
from map_bo.space import CoefficientSpace


def test_coefficients_and_metrics_of_one_name_are_told_apart() -> None:
    names = names_for(CoefficientSpace.box(("math", "code")), [Metric("math"), Metric("code")])
    assert names.parameters == ("c_math", "c_code")
    assert names.metrics == ("math", "code")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("far from b", "far_from_b"),
        ("math/attn.0", "math_attn_0"),
        ("a__dot__b", "a_dot_b"),  # Ax would read it as a.b
        ("invert", "m_invert"),  # a function of sympy
        ("sum", "m_sum"),
        ("lambda", "m_lambda"),
        ("2nd", "m_2nd"),
        ("trial_status", "m_trial_status"),
        ("é", "_"),
    ],
)
def test_names_can_stand_in_an_expression(name: str, expected: str) -> None:
    from map_bo.ax.database import require_storage

    require_storage()
    from ax.core.objective import Objective
    from ax.core.parameter_constraint import ParameterConstraint

    (found,) = names_for(CoefficientSpace.box(("x",)), [Metric(name)]).metrics
    assert found == expected
    objective = Objective(expression=f"-{found}", metric_name_to_signature={found: found})
    assert objective.metric_names == [found]
    (parameter,) = names_for(CoefficientSpace.box((name,)), [Metric("m")]).parameters
    constraint = ParameterConstraint(inequality=f"0.5 * {parameter} <= 1.0")
    assert constraint.constraint_dict == {parameter: 0.5}


def test_names_stay_different() -> None:
    names = names_for(CoefficientSpace.box(("a/b", "a b")), [Metric("c_a_b"), Metric("c a b")])
    assert names.parameters == ("c_a_b", "c_a_b_2")
    assert names.metrics == ("c_a_b_3", "c_a_b_4")
