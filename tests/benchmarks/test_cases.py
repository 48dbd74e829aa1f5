from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import map_bo
from benchmarks.quality import cases_core
from benchmarks.quality.cases import Case, available, case, names, row
from benchmarks.quality.cases_core import Scale
from benchmarks.quality.cases_functions import UnitBox, conflicting_seed
from benchmarks.quality.cases_images import missing_images
from map_bo.data import to_maximisation
from map_bo.errors import ConfigError, DataError, MapBoError
from map_bo.pareto.dominance import dominates
from map_bo.pareto.evolution import direct_search
from map_bo.pareto.indicators import preference_weights
from map_bo.problems.botorch_functions import BotorchProblem
from map_bo.problems.problem import Problem
from map_bo.problems.synthetic import ConcaveQuadratics, SigmoidQuadratics
from map_bo.rng import child, make_generator
from tests.contracts.problem_contract import ProblemContract
from tests.problems.fake_images import write_images

TINY = {"epochs": 1}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cases_core, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


# --- names


def test_the_suites_hold_every_family() -> None:
    assert set(names("all")) == set(names("real")) | set(names("synthetic"))
    assert len(set(names("all"))) == len(names("all"))
    assert set(names("smoke")) <= set(names("all"))
    for name in (
        "digits-mlp-4",
        "digits-cnn-16",
        "digits-mlp-8-noisy",
        "concave-4",
        "sigmoid-8-noisy",
        "bumps-4",
        "blocks-12",
        "blocks-24",
        "images-4",
        "plateau-4",
        "botorch-dtlz2-2",
    ):
        assert name in names("all")


@pytest.mark.parametrize(
    ("ask", "message", "hint"),
    [
        (lambda: case("digits-mlp-5"), "no case 'digits-mlp-5'", "digits-mlp-"),
        (lambda: case("qqqqqqq"), "no case 'qqqqqqq'", "cases are digits-mlp-2"),
        (lambda: available("concav-2"), "no case 'concav-2'", "concave-2"),
        (lambda: names("everything"), "no suite 'everything'", "real, synthetic, all, smoke"),
        (lambda: case("concave-2", epochs=1), "no option 'epochs'", "it has seed"),
        (lambda: case("digits-mlp-2", few=3, depth=1), "no option 'depth'", "seed, epochs, few"),
    ],
)
def test_unknown_names_are_told_with_near_ones(
    ask: Callable[[], object], message: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        ask()
    assert caught.value.hint is not None
    assert hint in caught.value.hint


def test_image_cases_are_skipped_with_a_reason_where_there_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MAP_BO_DATA", raising=False)
    assert available("digits-mlp-4") is None
    assert available("images-4") == "no folder of image sets is given"
    monkeypatch.setenv("MAP_BO_DATA", str(tmp_path))
    (tmp_path / "mnist").mkdir()
    assert missing_images() == f"{tmp_path} has no fashion_mnist, notmnist, usps"
    with pytest.raises(DataError, match=r"images-4 is not available: .* has no fashion_mnist"):
        case("images-4")


# --- scale


def test_a_case_is_made_once() -> None:
    assert case("concave-2") is case("concave-2")
    assert case("concave-2", seed=3) is not case("concave-2")
    assert case("concave-2", seed=3).digest != case("concave-2").digest


def test_real_models_are_scaled_by_base_and_experts() -> None:
    one = case("digits-mlp-2", **TINY)
    anchors = one.problem.space.anchors()
    Y = one.problem.evaluate(anchors.X, generator=make_generator(0)).Y
    torch.testing.assert_close(one.low, Y[:3].amin(0))
    torch.testing.assert_close(one.high, Y[1:3].amax(0))
    gains = one.gains(one.truth(anchors.X))
    torch.testing.assert_close(gains[:3].amin(0), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(gains[1:3].amax(0), torch.ones(2, dtype=torch.float64))
    assert one.real_models
    assert one.known_front is None


@pytest.mark.parametrize(
    "name", ["concave-2", "concave-4", "sigmoid-4", "sigmoid-8", "bumps-2", "botorch-dtlz2-4"]
)
def test_no_point_dominates_a_known_front(name: str) -> None:
    one = case(name)
    front = one.known_front
    assert front is not None
    assert bool((front <= 1 + 1e-9).all())
    torch.testing.assert_close(front.amax(0), torch.ones(one.m, dtype=torch.float64))
    assert bool((front >= -1e-9).all())
    X = one.problem.space.sample(3000, generator=make_generator(0))
    gains = one.gains(one.truth(X)) - 1e-3
    assert not bool(dominates(gains.unsqueeze(1), front.unsqueeze(0)).any())


def test_fronts_that_are_not_known_are_not_claimed() -> None:
    for name in ("bumps-8", "botorch-branin-currin", "botorch-vehicle-safety"):
        one = case(name)
        assert one.known_front is None
        assert bool((one.high > one.low).all())
        X = one.problem.space.sample(2000, generator=make_generator(0))
        assert float(one.gains(one.truth(X)).amax()) <= 1.001


def test_there_is_a_trade_off_in_every_quadratic_case() -> None:
    for n in (2, 4, 8):
        problem = ConcaveQuadratics(n, n, conflicting_seed(n))
        front = problem.pareto_front(500, generator=make_generator(0))
        assert float((front.amax(0) - front.amin(0)).amin()) > 0.25


def test_noisy_cases_share_the_truth_and_tell_their_noise() -> None:
    X = torch.rand(4, 2, generator=make_generator(0), dtype=torch.float64)
    for kind, expected in (("concave", 0.05**2), ("sigmoid", None), ("bumps", 0.05**2)):
        exact, noisy = case(f"{kind}-2"), case(f"{kind}-2-noisy")
        assert torch.equal(exact.truth(X), noisy.truth(X))
        seen = noisy.problem.evaluate(X, generator=make_generator(0))
        assert not torch.equal(seen.Y, noisy.truth(X))
        if expected is None:
            assert isinstance(noisy.problem, SigmoidQuadratics)
            assert bool((seen.counts == 100).all())
        else:
            assert bool(((seen.Yvar - expected).abs() < 1e-12).all())
        assert torch.equal(exact.problem.evaluate(X, generator=make_generator(0)).Y, exact.truth(X))


def test_the_wide_box_is_for_merged_models() -> None:
    assert case("concave-2").wide() is None
    assert case("botorch-dtlz2-2").wide() is None
    for name in ("digits-mlp-2", "digits-mlp-2-noisy"):
        one = case(name, **TINY)
        wide = one.wide()
        assert wide is not None
        assert wide.space.bounds.tolist() == [[-3.0, -3.0], [3.0, 3.0]]
        X = torch.tensor([[-2.0, 2.5]])
        assert one.truth(X).shape == (1, 2)
        assert len(wide.evaluate(X, generator=make_generator(0))) == 1


def test_the_truth_checks_what_it_is_asked() -> None:
    one = case("concave-2")
    assert one.truth(torch.zeros(0, 2)).shape == (0, 2)
    with pytest.raises(DataError, match="concave-2 has 2 coefficients"):
        one.truth(torch.zeros(1, 3))


class TestUnitBoxContract(ProblemContract):
    @pytest.fixture
    def problem(self) -> Problem:
        return UnitBox(BotorchProblem("VehicleSafety"))


def test_the_unit_box_is_the_function_in_its_own_box() -> None:
    inner = BotorchProblem("VehicleSafety")
    box = UnitBox(inner)
    assert box.space.bounds.tolist() == [[0.0] * 5, [1.0] * 5]
    X = torch.rand(6, 5, generator=make_generator(0), dtype=torch.float64)
    seen = box.evaluate(X, generator=make_generator(0))
    assert torch.equal(seen.X, X)
    torch.testing.assert_close(seen.Y, inner.true_values(1 + 2 * X))
    torch.testing.assert_close(seen.Y, box.true_values(X))


# --- direct search


def counted(fail_after: int | None = None) -> tuple[Case, list[int]]:
    """Return a case that writes down how many rows its truth measures, and may break."""
    problem = ConcaveQuadratics(2, 2)
    rows: list[int] = []

    def measure(X: Tensor) -> Tensor:
        if fail_after is not None and sum(rows) + len(X) > fail_after:
            raise KeyboardInterrupt
        rows.append(len(X))
        return problem.true_values(X)

    scale = Scale(torch.zeros(2).double(), torch.ones(2).double())
    return Case("counted", "synthetic", problem, measure, scale, False, {"kind": "test"}), rows


def test_direct_search_returns_every_evaluation_in_order() -> None:
    one, rows = counted()
    found = one.direct(250, 3)
    _, Y = direct_search(
        lambda X: to_maximisation(one.truth(X), one.problem.metrics),
        one.problem.space,
        evaluations=250,
        generator=child(make_generator(3), "direct"),
    )
    torch.testing.assert_close(found, Y)
    assert sum(rows) == 500  # the search and the comparison
    assert not torch.equal(found, one.direct(250, 4))


def test_a_direct_search_is_made_once_and_goes_on_where_it_was() -> None:
    one, rows = counted()
    long = one.direct(430, 0)
    assert sum(rows) == 430
    assert torch.equal(one.direct(430, 0), long)
    assert torch.equal(one.direct(210, 0), long[:210])
    assert sum(rows) == 430
    assert torch.equal(one.direct(600, 0)[:430], long)
    assert sum(rows) == 600


def test_a_killed_direct_search_repeats_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases_core, "_SAVE_EVERY", 0.0)
    broken, before = counted(fail_after=320)
    with pytest.raises(KeyboardInterrupt):
        broken.direct(600, 0)
    assert sum(before) == 300
    one, after = counted()
    resumed = one.direct(600, 0)
    assert sum(after) == 300
    fresh = _fresh(600)
    assert torch.equal(resumed, fresh)


def _fresh(evaluations: int) -> Tensor:
    one, _ = counted()
    _, Y = direct_search(
        one.truth,
        one.problem.space,
        evaluations=evaluations,
        generator=child(make_generator(0), "direct"),
    )
    return Y


@pytest.mark.parametrize("damage", ["garbage", "another search"])
def test_a_damaged_record_is_searched_again(damage: str, cache: Path) -> None:
    one, rows = counted()
    found = one.direct(200, 0)
    (path,) = (cache / "direct").glob("counted-*.pt")
    if damage == "garbage":
        path.write_bytes(b"nothing")
    else:
        kept = torch.load(path, weights_only=True)
        torch.save({"X": kept["X"].flip(0), "Y": kept["Y"] + 1}, path)
    assert torch.equal(one.direct(200, 0), found)
    assert sum(rows) == 400


# --- with the rest


@pytest.mark.slow
def test_a_case_can_be_optimised() -> None:
    for name, options in (("digits-mlp-2-noisy", TINY), ("botorch-branin-currin", {})):
        one = case(name, **options)
        result = map_bo.optimize(one.problem, 8, seed=0, progress=False)
        assert one.gains(one.truth(result.front.X)).shape == (len(result.front), 2)


def test_image_cases_measure_what_the_problem_measures(tmp_path: Path) -> None:
    root = write_images(tmp_path / "images", train=80, test=505)
    one = case("images-4", root=str(root), epochs=1)
    X = torch.rand(3, 4, generator=make_generator(0), dtype=torch.float64)
    seen = one.problem.evaluate(X, generator=make_generator(0))
    assert float((one.truth(X) - seen.Y).abs().max()) * 500 < 1.5
    noisy = case("images-4-noisy", root=str(root), epochs=1)
    assert torch.equal(noisy.truth(X), one.truth(X))
    assert bool((noisy.problem.evaluate(X, generator=make_generator(0)).counts == 100).all())


def test_the_table_has_the_sizes_and_the_blend() -> None:
    cells = row(case("digits-mlp-2", **TINY)).split(" | ")
    assert cells[:4] == ["| digits-mlp-2", "digits", "2", "2"]
    assert len(cells) == 8


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in names("real") if "noisy" not in name])
def test_every_real_truth_is_what_the_problem_measures(name: str) -> None:
    if reason := available(name):
        pytest.skip(reason)
    one = case(name)
    X = one.problem.space.sample(3, generator=make_generator(5))
    seen = one.problem.evaluate(X, generator=make_generator(0))
    assert float(((one.truth(X) - seen.Y) * seen.counts).abs().max()) < 1.5


def blend_regret(name: str) -> float:
    """Return what the uniform blend leaves to gain, over preferences, against direct search."""
    one = case(name)
    anchors = one.problem.space.anchors()
    blend = one.gains(one.truth(anchors.X[-1:]))
    weights = preference_weights(60, one.m, generator=make_generator(1))
    best = torch.cat([one.direct(1500, 0), blend]) @ weights.T
    return float((best.amax(0) - (blend @ weights.T)[0]).mean())


def test_on_the_plateau_the_blend_is_nearly_the_best_and_elsewhere_it_is_not() -> None:
    assert blend_regret("plateau-4") < 0.03
    assert blend_regret("digits-mlp-4") > 0.08


@pytest.mark.slow
@pytest.mark.parametrize("name", names("smoke"))
def test_every_case_of_the_smoke_suite_can_be_optimised(name: str) -> None:
    result = map_bo.optimize(case(name).problem, 10, seed=0, progress=False)
    assert len(result.front) >= 1


def test_errors_are_of_the_family() -> None:
    with pytest.raises(MapBoError):
        case("nothing")
