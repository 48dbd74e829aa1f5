from __future__ import annotations

from map_bo.report.comparison.comparison import UNSET, variation


def test_what_the_user_named_comes_first() -> None:
    found = variation(
        [
            {"surrogate": "gp", "surrogate._target_": "GP", "seed": "0", "loop.budget": "24"},
            {"surrogate": "hybrid", "surrogate._target_": "Hybrid", "seed": "0"},
        ],
        ["surrogate"],
    )
    assert found.keys == ("surrogate",)
    assert found.labels == ("surrogate=gp", "surrogate=hybrid")


def test_what_follows_from_another_setting_is_left_out() -> None:
    runs = [
        {"loop.budget": b, "sampler.points": b, "surrogate": s, "seed": seed}
        for b in ("9", "12")
        for s in ("gp", "auto")
        for seed in ("0", "1")
    ]
    found = variation(runs)
    assert set(found.keys) == {"surrogate", "loop.budget"}
    assert found.values["loop.budget"] == ("9", "12")
    assert len(found.order) == 4
    assert len(found.labels) == 8


def test_the_seed_and_what_goes_with_it_are_no_variants() -> None:
    runs = [{"seed": seed, "problem.seed": seed, "a": "1"} for seed in ("0", "1", "2")]
    found = variation(runs)
    assert found.keys == ()
    assert found.order == ("all runs",)


def test_a_setting_that_some_runs_lack_is_said_to_be_missing() -> None:
    found = variation([{"seed": "0"}, {"seed": "0", "problem.epochs": "2"}])
    assert found.labels == (f"problem.epochs={UNSET}", "problem.epochs=2")


def test_numbers_are_ordered_by_size() -> None:
    found = variation([{"loop.budget": b} for b in ("36", "9", "120", "null")])
    assert found.order == tuple(f"loop.budget={b}" for b in ("9", "36", "120", "null"))
