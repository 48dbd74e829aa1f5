from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import SurrogateError
from map_bo.surrogates.links import (
    IdentityLink,
    Link,
    LogitLink,
    LogLink,
    SoftplusLink,
    from_link,
    links_for,
    observed_on_link,
    target_units,
    to_link,
)

LINKS: list[Link] = [
    IdentityLink(),
    LogitLink(),
    LogitLink(-2.0, 3.0),
    LogLink(),
    LogLink(-1.5),
    SoftplusLink(),
    SoftplusLink(0.7),
]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("link", LINKS, ids=str)
@given(f=st.floats(-6, 6))
def test_forward_undoes_inverse(link: Link, f: float) -> None:
    value = tensor(f)
    torch.testing.assert_close(link.forward(link.inverse(value)), value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("link", LINKS, ids=str)
@given(f=st.floats(-30, 30))
def test_slope_is_the_derivative_of_the_inverse(link: Link, f: float) -> None:
    value = tensor(f).requires_grad_(True)
    (derivative,) = torch.autograd.grad(link.inverse(value).sum(), value)
    torch.testing.assert_close(link.slope(value.detach()), derivative, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("link", LINKS, ids=str)
@given(y=st.floats(-1e3, 1e3))
def test_any_value_has_a_finite_place_and_order_is_kept(link: Link, y: float) -> None:
    f = link.forward(tensor(y, y + 0.5))
    assert bool(torch.isfinite(f).all())
    assert float(f[0]) <= float(f[1])


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_inverse_stays_finite_far_out(link: Link) -> None:
    f = tensor(-1e3, 1e3).requires_grad_(True)
    y = link.inverse(f)
    (gradient,) = torch.autograd.grad(y.sum(), f)
    assert bool(torch.isfinite(y).all())
    assert bool(torch.isfinite(gradient).all())


def test_values_at_a_bound_move_by_the_margin() -> None:
    logit, log, softplus = LogitLink(0, 2, 5e-4), LogLink(1.0, 1e-6), SoftplusLink(1.0, 1e-6)
    torch.testing.assert_close(logit.inside(tensor(0, 1, 2.5)), tensor(1e-3, 1, 1.999))
    torch.testing.assert_close(log.inside(tensor(0, 3)), tensor(1 + 1e-6, 3))
    torch.testing.assert_close(softplus.inside(tensor(0, 3)), tensor(1 + 1e-6, 3))
    # A distance larger than the margin counts, for a proportion never past a quarter.
    moved = LogitLink().inside(tensor(1, 1), tensor(0.1, 0.9))
    torch.testing.assert_close(moved, tensor(0.9, 0.75))


def test_links_follow_the_kind_of_the_metric() -> None:
    metrics = (
        Metric("a", lower=-1.0, upper=2.0),
        Metric("b", kind="loss", direction="min", lower=0.5),
        Metric("c", kind="unbounded"),
    )
    assert links_for(metrics) == (LogitLink(-1.0, 2.0), LogLink(0.5), IdentityLink())
    assert links_for(metrics, kind="identity") == (IdentityLink(),) * 3
    with pytest.raises(SurrogateError, match=r"no link kind 'probit'.*\n.*'auto' and 'identity'"):
        links_for(metrics, kind="probit")  # type: ignore[arg-type]


def test_columns_go_through_their_own_links() -> None:
    links = (LogitLink(), LogLink(), IdentityLink())
    Y = torch.tensor([[[0.5, 1.0, -3.0]]], dtype=torch.float64)
    assert to_link(Y, links).tolist() == [[[0.0, 0.0, -3.0]]]
    torch.testing.assert_close(from_link(to_link(Y, links), links), Y)


@given(k=st.integers(0, 50), n=st.integers(1, 50))
def test_counted_proportions_are_smoothed_by_half_a_success(k: int, n: int) -> None:
    k = min(k, n)
    metric = Metric("a", lower=-1.0, upper=3.0)
    seen = Observations(
        X=torch.zeros(1, 1),
        Y=tensor(-1 + 4 * k / n).view(1, 1),
        metrics=(metric,),
        Yvar=tensor(0.0).view(1, 1),  # the count takes precedence
        counts=tensor(n).view(1, 1),
    )
    Z, var = observed_on_link(seen, links_for((metric,)))
    p = (k + 0.5) / (n + 1)
    assert float(Z) == pytest.approx(math.log(p / (1 - p)), abs=1e-9)
    assert float(var) == pytest.approx(1 / ((n + 1) * p * (1 - p)))
    Z, var = observed_on_link(seen, links_for((metric,), kind="identity"))
    assert float(Z) == float(seen.Y)
    assert float(var) == pytest.approx(16 * p * (1 - p) / (n + 1))


def test_other_variances_go_through_the_delta_method() -> None:
    metrics = (Metric("a"), Metric("b", kind="loss"), Metric("c", kind="unbounded"))
    seen = Observations(
        X=torch.zeros(2, 1),
        Y=torch.tensor([[0.8, 2.0, 5.0], [0.8, 2.0, 5.0]]),
        metrics=metrics,
        Yvar=torch.tensor([[1e-4, 1e-2, 0.3], [torch.nan, torch.nan, torch.nan]]),
    )
    Z, var = observed_on_link(seen, links_for(metrics))
    expected = tensor(math.log(4), math.log(2), 5.0)
    torch.testing.assert_close(Z, expected.expand(2, -1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(var[0], tensor(1e-4 / 0.16**2, 1e-2 / 4, 0.3), rtol=1e-5, atol=1e-8)
    assert bool(var[1].isnan().all())


def test_a_value_at_a_bound_is_never_exact() -> None:
    metrics = (Metric("a"),)
    seen = Observations(
        X=torch.zeros(3, 1),
        Y=tensor(1.0, 1.0, 0.5).view(3, 1),
        metrics=metrics,
        Yvar=tensor(0.0, 4e-4, 0.0).view(3, 1),
    )
    Z, var = observed_on_link(seen, links_for(metrics))
    assert math.isnan(float(var[0]))
    # Moved inside by half its own deviation of .02.
    assert float(Z[1]) == pytest.approx(math.log(99))
    assert float(var[1]) == pytest.approx(4e-4 / (0.99 * 0.01) ** 2)
    assert float(var[2]) == 0.0


@pytest.mark.parametrize("unit", [1e-12, 1e-9, 1.0, 1e12])
def test_a_unit_only_moves_the_logarithm_of_a_loss(unit: float) -> None:
    metric = Metric("b", kind="loss", direction="min")
    Y = tensor(0.0, 0.2, 1e-7, 3.0).unsqueeze(-1)
    X = torch.arange(4.0).unsqueeze(-1)
    links = links_for((metric,))
    Z, _ = observed_on_link(Observations(X, Y, (metric,)), links)
    moved, _ = observed_on_link(Observations(X, unit * Y, (metric,)), links)
    torch.testing.assert_close(moved - math.log(unit), Z)
    assert float(from_link(Z, links)[0]) == pytest.approx(0.5e-7), "half the nearest positive loss"


def test_proportions_near_a_bound_are_told_apart() -> None:
    metric = Metric("a")
    Y = tensor(1.0, 0.9999, 0.9998, 0.5).unsqueeze(-1)
    seen = Observations(torch.arange(4.0).unsqueeze(-1), Y, (metric,))
    Z, _ = observed_on_link(seen, links_for((metric,)))
    back = from_link(Z, links_for((metric,)))
    torch.testing.assert_close(back[1:], Y[1:], rtol=1e-12, atol=0.0)
    assert float(back[0]) == pytest.approx(0.99995)
    # Far from anything, a value at the bound is half a success in a thousand away from it.
    Z, _ = observed_on_link(seen.select([0, 3]), links_for((metric,)))
    assert float(from_link(Z, links_for((metric,)))[0]) == pytest.approx(0.9995)


def test_constants_have_the_unit_of_their_magnitude() -> None:
    links = (IdentityLink(), IdentityLink(), IdentityLink(), LogLink())
    shift = tensor(2e7, 1e-300, 0.0, -20.0)
    assert target_units(shift, tensor(0.0, 0.0, 0.0, 0.0), links).tolist() == [2e7, 1e-300, 1, 1]
    spread = tensor(1e-3, 1e-305, 1e-300, 1e-3)
    assert target_units(shift, spread, links).tolist() == spread.tolist()


def test_losses_stay_as_far_from_their_bound_as_is_asked() -> None:
    y = torch.tensor([0.0, 0.1, 3.0], dtype=torch.float64)
    far = torch.full_like(y, 0.25)
    for link in (LogLink(0.0, 0.0), SoftplusLink(0.0, 0.0)):
        assert link.inside(y, far).tolist() == [0.25, 0.25, 3.0]
