from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from map_bo.data import Metric, Observations
from map_bo.errors import DataError, SpaceError
from map_bo.problems.problem import Problem
from map_bo.problems.synthetic import ConcaveQuadratics, SigmoidQuadratics
from map_bo.problems.table import TableProblem
from map_bo.report.run.tables import write_evaluations_csv
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from tests.choices import CHOICE, some_of
from tests.choices import METRICS as CHOICE_METRICS
from tests.contracts.problem_contract import ProblemContract, same

SPACE = CoefficientSpace.box(("a", "b"))
METRICS = (Metric("accuracy"), Metric("loss", direction="min", kind="loss"))
OTHER = (Metric("other", direction="min", kind="loss"),)


def recorded() -> Observations:
    """Four rows: two exact ones, a failed one, and a second try of that one."""
    return Observations(
        X=torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.25, 0.5], [0.25, 0.5]]),
        Y=torch.tensor([[0.5, 2.0], [0.9, 1.0], [torch.nan, torch.nan], [0.7, 1.5]]),
        metrics=METRICS,
        Yvar=torch.tensor([[0.01, 0.0], [0.02, 0.1], [torch.nan, torch.nan], [0.03, torch.nan]]),
        counts=torch.tensor([[50.0, torch.nan]]).expand(4, 2),
        cost=torch.tensor([1.5, 2.5, 0.5, 3.5]),
        failures=(None, None, "out of memory", None),
    )


def look_up(problem: TableProblem, *rows: list[float]) -> Observations:
    return problem.evaluate(torch.tensor(rows, dtype=torch.float64), generator=make_generator(0))


class TestTableContract(ProblemContract):
    @pytest.fixture
    def problem(self) -> Problem:
        truth = ConcaveQuadratics(2, 2, noise=0.1)
        X = truth.space.sample(12, generator=make_generator(0))
        return TableProblem(truth.evaluate(X, generator=make_generator(0)), truth.space)

    @pytest.fixture
    def points(self, problem: Problem) -> Tensor:
        assert isinstance(problem, TableProblem)
        return problem.candidates[2:7]


class TestNearestTableContract(TestTableContract):
    @pytest.fixture
    def problem(self) -> Problem:
        truth = SigmoidQuadratics(2, 2, count=30)
        X = truth.space.sample(12, generator=make_generator(0))
        table = truth.evaluate(X, generator=make_generator(0))
        return TableProblem(table, truth.space, nearest=True)


def test_returns_what_was_recorded() -> None:
    seen = look_up(TableProblem(recorded(), SPACE), [1.0, 0.0], [0.0, 0.0])
    assert same(seen, recorded().select([1, 0]))
    assert seen.cost.tolist() == [2.5, 1.5]


def test_finds_rows_within_the_tolerance() -> None:
    problem = TableProblem(recorded(), SPACE, tolerance=0.1)
    seen = look_up(problem, [0.95, 0.05], [0.0, 0.09])
    assert seen.Y[:, 0].tolist() == pytest.approx([0.9, 0.5])
    torch.testing.assert_close(seen.X[0], torch.tensor([0.95, 0.05], dtype=torch.float64))


def test_of_several_rows_within_the_tolerance_the_nearest_counts() -> None:
    problem = TableProblem(recorded(), SPACE, tolerance=2.0)
    assert look_up(problem, [0.9, 0.0]).Y[0, 0] == pytest.approx(0.9)
    assert look_up(problem, [0.1, 0.0]).Y[0, 0] == pytest.approx(0.5)


def test_a_row_that_was_not_recorded_fails_and_names_the_nearest_distance() -> None:
    seen = look_up(TableProblem(recorded(), SPACE), [1.0, 0.5], [1.0, 0.0])
    assert seen.failures == ("this point is not in the table; the nearest is 0.5 away", None)
    assert bool(torch.isnan(seen.Y[0]).all())
    assert bool(torch.isnan(seen.Yvar[0]).all())
    assert seen.cost[0] == 0


def test_a_success_counts_before_a_failure_at_the_same_point() -> None:
    seen = look_up(TableProblem(recorded(), SPACE), [0.25, 0.5])
    assert seen.failures == (None,)
    assert seen.Y[0, 0] == pytest.approx(0.7)


def test_a_recorded_failure_keeps_its_reason() -> None:
    problem = TableProblem(recorded().select([0, 2]), SPACE)
    seen = look_up(problem, [0.25, 0.5])
    assert seen.failures == ("out of memory",)
    nearest = TableProblem(recorded().select([0, 2]), SPACE, nearest=True)
    assert look_up(nearest, [0.3, 0.6]).failures == ("out of memory",)


def test_the_first_of_several_successes_counts() -> None:
    twice = (
        recorded()
        .select([0])
        .append(Observations(torch.zeros(1, 2), torch.tensor([[0.6, 3.0]]), METRICS))
    )
    assert look_up(TableProblem(twice, SPACE), [0.0, 0.0]).Y[0, 0] == pytest.approx(0.5)


def test_nearest_snaps_to_the_recorded_point() -> None:
    seen = look_up(TableProblem(recorded(), SPACE, nearest=True), [0.8, 0.1], [0.2, 0.6])
    assert seen.X.tolist() == [[1.0, 0.0], [0.25, 0.5]]
    assert seen.Y[:, 0].tolist() == pytest.approx([0.9, 0.7])


def test_candidates_are_the_distinct_points_in_order() -> None:
    candidates = TableProblem(recorded(), SPACE).candidates
    assert candidates.tolist() == [[0.0, 0.0], [1.0, 0.0], [0.25, 0.5]]


def test_the_description_changes_with_the_content() -> None:
    first = TableProblem(recorded(), SPACE).describe()
    assert first == TableProblem(recorded(), SPACE).describe()
    assert first != TableProblem(recorded().select([0, 1, 2]), SPACE).describe()
    assert first["evaluations"] == 4


def test_refuses_an_empty_table() -> None:
    with pytest.raises(DataError, match="the table holds no evaluations"):
        TableProblem(Observations.empty(2, METRICS), SPACE)


def test_refuses_a_space_of_another_width() -> None:
    with pytest.raises(DataError, match="the table has 2 coefficients and the space 1: a"):
        TableProblem(recorded(), CoefficientSpace.box(("a",)))


def test_refuses_recorded_points_outside_the_space() -> None:
    with pytest.raises(SpaceError, match="leave the space"):
        TableProblem(recorded(), CoefficientSpace.box(("a", "b"), upper=0.9))


@pytest.mark.parametrize("tolerance", [-1.0, float("inf"), float("nan")])
def test_refuses_an_impossible_tolerance(tolerance: float) -> None:
    with pytest.raises(DataError, match="tolerance must"):
        TableProblem(recorded(), SPACE, tolerance=tolerance)


@given(st.data())
def test_every_recorded_point_is_found_again(data: st.DataObject) -> None:
    value = st.floats(0, 1, width=32)
    X = torch.tensor(
        data.draw(st.lists(st.tuples(value, value), min_size=1, max_size=12, unique=True)),
        dtype=torch.float64,
    )
    table = Observations(X, torch.arange(2.0 * len(X)).view(-1, 2), METRICS[1:] + OTHER)
    problem = TableProblem(table, SPACE, tolerance=0.0)
    assert same(problem.evaluate(X, generator=make_generator(0)), table)


# --- files


def write(folder: Path, *lines: str) -> Path:
    path = folder / "evaluations.csv"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


HEADER = "c:a,c:b,y:accuracy,var:accuracy,n:accuracy,y:loss,var:loss,n:loss,cost,failure"


def test_reads_what_a_run_writes(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.csv"
    write_evaluations_csv(recorded(), SPACE, path)
    problem = TableProblem.from_csv(path, metrics=METRICS, space=SPACE)
    assert same(problem.observations, recorded())
    assert torch.equal(problem.observations.cost, recorded().cost)
    assert problem.space == SPACE


def test_keeps_every_digit(tmp_path: Path) -> None:
    truth = ConcaveQuadratics(3, 2)
    X = truth.space.sample(20, generator=make_generator(0))
    seen = truth.evaluate(X, generator=make_generator(0))
    write_evaluations_csv(seen, truth.space, tmp_path / "e.csv")
    problem = TableProblem.from_csv(tmp_path / "e.csv", metrics=truth.metrics, tolerance=0.0)
    assert same(problem.evaluate(X, generator=make_generator(0)), seen)


def test_reads_by_hand_what_only_has_coefficients_and_values(tmp_path: Path) -> None:
    path = write(tmp_path, "c:a,y:accuracy,y:score", "0.5,0.9,7", "", "2,0.8,-1")
    problem = TableProblem.from_csv(path)
    assert problem.metrics == (Metric("accuracy"), Metric("score", kind="unbounded"))
    assert (problem.space.lower, problem.space.upper) == ((0.0,), (2.0,))
    seen = problem.observations
    assert seen.Y.tolist() == [[0.9, 7.0], [0.8, -1.0]]
    assert bool(torch.isnan(seen.Yvar).all())
    assert bool(torch.isnan(seen.counts).all())
    assert seen.cost.tolist() == [0, 0]
    assert seen.failures == (None, None)


def test_reads_the_metrics_and_coefficients_in_the_order_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path, HEADER, "0.1,0.2,0.9,0.01,50,1.5,,,3,")
    problem = TableProblem.from_csv(
        path, metrics=METRICS[::-1], space=CoefficientSpace.box(("b", "a")), nearest=True
    )
    assert problem.observations.X.tolist() == [[0.2, 0.1]]
    assert problem.observations.Y.tolist() == [[1.5, 0.9]]
    assert problem.observations.counts[0, 1] == 50
    assert problem.nearest
    assert len(TableProblem.from_csv(path, metrics=METRICS[:1]).metrics) == 1


def test_reads_failures(tmp_path: Path) -> None:
    path = write(
        tmp_path, HEADER, "0,0,,,,,,,1,out of memory", "1,0,0.5,,,2,,,1,", "0,1,0.5,,,,,,1,late"
    )
    seen = TableProblem.from_csv(path, metrics=METRICS).observations
    assert seen.failures == ("out of memory", None, "late")
    assert bool(torch.isnan(seen.Y[[0, 2]]).all())


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "is empty"),
        ([HEADER], "holds no evaluations"),
        (["y:accuracy", "0.5"], "has no column c:NAME; its columns are y:accuracy"),
        (["c:a", "0.5"], "has no column y:NAME; its columns are c:a"),
        (["c:a,c:a,y:x", "0,0,0"], "has the columns c:a twice"),
        (["c:a,y:x,var:z", "0,0,0"], "has a column var:z but no y:z"),
        (["c:a,y:x,n:z", "0,0,0"], "has a column n:z but no y:z"),
        (["c:a,y:x", "0,0", "0"], "line 3 of .* has 1 values for 2 columns"),
        (["c:a,y:x", "0,0,0"], "line 2 of .* has 3 values for 2 columns"),
        (["c:a,y:x", "0,0", "zero,0"], "line 3 of .* has 'zero' in column c:a"),
        (["c:a,y:x", ",0"], "line 2 of .* has '' in column c:a"),
        (["c:a,y:x", "nan,0"], "line 2 of .* has 'nan' in column c:a"),
        (["c:a,y:x", "0,"], "line 2 of .* has '' in column y:x"),
        (["c:a,y:x", "0,inf"], "line 2 of .* has 'inf' in column y:x"),
        (["c:a,y:x,var:x", "0,0,much"], "line 2 of .* has 'much' in column var:x"),
        (["c:a,y:x,cost", "0,0,1s"], "line 2 of .* has '1s' in column cost"),
        (["c:a,y:x,n:x", "0,0,-3"], "counts must be positive"),
        (["c:a,y:x", '"0,0'], "cannot be read"),
    ],
)
def test_refuses_files_that_are_wrong(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TableProblem.from_csv(write(tmp_path, *lines))


def test_refuses_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.csv cannot be read"):
        TableProblem.from_csv(tmp_path / "nothing.csv")


def test_refuses_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.csv"
    path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="cannot be read"):
        TableProblem.from_csv(path)


def test_refuses_metrics_that_the_file_does_not_have(tmp_path: Path) -> None:
    path = write(tmp_path, "c:a,y:x", "0,0")
    with pytest.raises(DataError, match="no column for the metrics z") as caught:
        TableProblem.from_csv(path, metrics=[Metric("x"), Metric("z")])
    assert caught.value.hint == "it has x"


def test_refuses_a_space_with_other_coefficients(tmp_path: Path) -> None:
    path = write(tmp_path, "c:a,y:x", "0,0")
    with pytest.raises(DataError, match="has the coefficients a; the space has b"):
        TableProblem.from_csv(path, space=CoefficientSpace.box(("b",)))


def test_the_table_of_a_choice_is_read_in_its_space_alone(tmp_path: Path) -> None:
    seen = some_of(CHOICE, 12)
    path = tmp_path / "evaluations.csv"
    write_evaluations_csv(seen, CHOICE, path)
    table = TableProblem.from_csv(path, space=CHOICE, metrics=CHOICE_METRICS)
    assert table.space == CHOICE
    again = table.evaluate(seen.X, generator=make_generator(0))
    assert torch.equal(again.Y, seen.Y)
    with pytest.raises(DataError, match="has a choice, operator, and no space says what its codes"):
        TableProblem.from_csv(path)
