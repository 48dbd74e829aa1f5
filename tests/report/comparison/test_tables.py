from __future__ import annotations

from map_bo.report.comparison.comparison import Comparison, compare
from map_bo.report.comparison.page import comparison_markdown
from map_bo.report.comparison.tables import (
    Link,
    difference_table,
    measure_tables,
    missing_table,
    runs_table,
    scale_table,
    scale_words,
    summary_words,
    varied_table,
    win_rate_tables,
)
from tests.report.fake_runs import comparison, failed, record


def test_every_row_has_as_many_cells_as_there_are_columns() -> None:
    found = comparison(seeds=2, more=[failed()])
    gaps, varied, missing = difference_table(found), varied_table(found), missing_table(found)
    assert gaps is not None
    assert varied is not None
    assert missing is not None
    tables = [gaps, varied, missing, *measure_tables(found), *win_rate_tables(found)]
    for table in [*tables, runs_table(found), scale_table(found)]:
        assert table.caption
        assert table.rows
        assert all(len(row) == len(table.columns) for row in table.rows), table.caption


def test_predicted_and_real_stand_in_columns_of_their_own() -> None:
    quality, cost = measure_tables(comparison(seeds=2))
    assert [("real" in c, "predicted" in c) for c in quality.columns[2:5]] == [
        (True, False),
        (True, False),
        (False, True),
    ]
    assert "evaluations, lower is better" in cost.columns


def test_the_reference_point_is_stated() -> None:
    found = comparison(seeds=2)
    words = scale_words(found)
    assert f"rot90 {float(found.scale.point[0]):.3f}" in words
    assert "worst of base and experts" in words


def test_the_words_count_what_there_is() -> None:
    words = summary_words(comparison(seeds=2, more=[failed()]))
    assert "4 finished runs of 2 variants with 2 seeds (0, 1)." in words
    assert "1 did not finish" in words


def test_few_pairs_decide_nothing_and_more_do() -> None:
    few, many = difference_table(comparison(seeds=2)), difference_table(comparison(seeds=5))
    assert few is not None
    assert many is not None
    assert not any(word in str(cell) for cell in few.rows[0] for word in ("higher", "lower"))
    column = [i for i, title in enumerate(many.columns) if title.startswith("evaluations")]
    assert [many.rows[0][i] for i in column] == ["-6.0 [-6.0, -6.0] lower"]
    assert [many.rows[0][1], few.rows[0][1]] == ["5", "2"]
    assert "surrogate=gp" in many.caption


def test_both_win_rates_are_named_and_the_diagonal_is_empty() -> None:
    tables = win_rate_tables(comparison(seeds=2))
    assert [table.caption.split(" of ")[0] for table in tables] == [
        "Per-objective win rate",
        "Dominance win rate",
    ]
    for table in tables:
        assert [row[i + 1] for i, row in enumerate(table.rows)] == ["", ""]


def test_runs_are_linked_and_failures_say_why() -> None:
    found = comparison(seeds=2, more=[failed()])
    first = runs_table(found).rows[0][0]
    assert isinstance(first, Link)
    assert first.target.endswith("report.html")
    table = missing_table(found)
    assert table is not None
    assert table.rows[0][1:] == ("failed", "out of memory")
    assert missing_table(comparison(seeds=1)) is None


def test_a_large_matrix_has_numbers_for_columns_and_a_larger_one_is_left_out() -> None:
    def of(variants: int) -> Comparison:
        runs = [record({"s": f"a{i}", "seed": "0"}, evaluations=5) for i in range(variants)]
        return compare(runs, title="x")

    table = win_rate_tables(of(7))[0]
    assert table.columns == ("variant", *"1234567")
    assert [row[0] for row in table.rows[:2]] == ["1: s=a0", "2: s=a1"]
    assert win_rate_tables(of(6))[0].columns[1] == "s=a0"
    assert not win_rate_tables(of(25))
    text = comparison_markdown(of(25))
    assert "The win rates of 25 variants, each over each, are left out." in text
