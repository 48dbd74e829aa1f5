"""Old names of modules lead to today's."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from map_bo.moved import MODULES, NAMES, current, with_current_targets


def test_every_old_module_has_a_home() -> None:
    for new in set(MODULES.values()) - {"ax.node"}:
        assert find_spec(f"map_bo.{new}") is not None, new


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("map_bo.problems.zoo.digits_problem", "map_bo.problems.zoo.digits.digits_problem"),
        ("map_bo.problems.zoo.digits.digits_problem", "map_bo.problems.zoo.digits.digits_problem"),
        ("map_bo.samplers.bins.Bins", "map_bo.samplers.published.bins.Bins"),
        ("map_bo.tracking.wandb.Wandb", "map_bo.tracking.wandb.mirror.Wandb"),
        (
            "map_bo.samplers.bins_reference.BinsReference",
            "map_bo.samplers.published.public_code.PublishedBins",
        ),
        (
            "map_bo.surrogates.reference.ReferenceQuadratic",
            "map_bo.surrogates.published.PublishedQuadratic",
        ),
        ("map_bo.loop.settings.Settings", "map_bo.loop.settings.Settings"),
        (
            "map_bo.samplers.posterior.PosteriorDriven",
            "map_bo.samplers.posterior.driven.PosteriorDriven",
        ),
        ("map_bo.problems.zoo.data.digits", "map_bo.problems.zoo.data.digits"),
        ("map_bo.operators.regmean.RegMean", "map_bo.operators.statistics.regmean.RegMean"),
        (
            "map_bo.operators.statistics.Statistics",
            "map_bo.operators.statistics.statistics.Statistics",
        ),
        ("map_bo.ax.plain", "map_bo.plain"),
        ("somebody.samplers.bins.Bins", "somebody.samplers.bins.Bins"),
    ],
)
def test_a_recorded_name_leads_to_todays(old: str, new: str) -> None:
    assert current(old) == new
    assert current(new) == new


def test_a_module_of_today_in_a_package_with_an_old_name_is_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As any new module of map_bo.samplers.posterior, which was a module once."""
    monkeypatch.setattr("map_bo.moved.__file__", str(tmp_path / "moved.py"))
    (tmp_path / "samplers" / "posterior").mkdir(parents=True)
    (tmp_path / "samplers" / "posterior" / "fresh.py").touch()
    assert current("map_bo.samplers.posterior.fresh.X") == "map_bo.samplers.posterior.fresh.X"


def test_targets_of_a_recorded_configuration() -> None:
    old, new = "map_bo.samplers.bins.Bins", "map_bo.samplers.published.bins.Bins"
    tree = {"a": [{"_target_": old, "x": old}], "b": 1}
    assert with_current_targets(tree) == {"a": [{"_target_": new, "x": old}], "b": 1}


DIGITS = "map_bo.problems.zoo.digits.digits_problem"
IMPORTED = "map_bo.problems.merged.imported.imported_problem"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"_target_": DIGITS, "examples": 50}, {"_target_": DIGITS, "size": 50}),
        ({"_target_": DIGITS, "examples": None}, {"_target_": DIGITS, "size": None}),
        # As today's configuration is when the old option is set: it counts, as it does when built.
        ({"_target_": DIGITS, "size": None, "examples": 50}, {"_target_": DIGITS, "size": 50}),
        (
            {"_target_": "map_bo.digits_problem", "size": 20, "examples": None},
            {"_target_": "map_bo.digits_problem", "size": 20, "examples": None},
        ),
        (
            {"_target_": IMPORTED, "metrics": {"a": {"examples": "same"}}},
            {"_target_": IMPORTED, "metrics": {"a": {"resampling": "same"}}},
        ),
    ],
)
def test_options_of_a_recorded_configuration(old: object, new: object) -> None:
    assert with_current_targets({"problem": old}) == {"problem": new}


@pytest.mark.parametrize(
    "same",
    [
        {"_target_": "somebody.digits_problem", "examples": 50},
        {"_target_": IMPORTED, "experts": {"examples": "x"}, "evaluators": {"examples": "y"}},
        {"_target_": IMPORTED, "metrics": {"examples": {"direction": "min"}}},
        {"_target_": DIGITS, "operator": {"_target_": "somebody.Merge", "examples": 3}},
    ],
)
def test_what_only_looks_like_an_old_option_stays(same: object) -> None:
    assert with_current_targets(same) == same


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement",
    [
        "from map_bo.merging.hub import hub_model",
        pytest.param("from map_bo.samplers.bins import Bins", marks=pytest.mark.slow),
        "from map_bo.problems.merged import MergedModelProblem",  # today a package of this name
        pytest.param("from map_bo.tracking.wandb import Wandb", marks=pytest.mark.slow),
        pytest.param("from map_bo.operators.fisher import Fisher", marks=pytest.mark.slow),
        pytest.param(
            "from map_bo.operators.statistics import load_statistics", marks=pytest.mark.slow
        ),
        pytest.param("import map_bo.merging.task_arithmetic", marks=pytest.mark.slow),
    ],
)
def test_an_old_import_works_and_warns(statement: str) -> None:
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as told:\n"
        "    warnings.simplefilter('always')\n"
        f"    {statement}\n"
        "said = [str(w.message) for w in told if 'is now' in str(w.message)]\n"
        "assert len(set(said)) == 1 and 'map_bo.' in said[0], said\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("old", NAMES)
def test_an_old_name_in_a_module_of_today_works_and_warns(old: str) -> None:
    module, _, name = f"map_bo.{old}".rpartition(".")
    with pytest.warns(DeprecationWarning, match=f"{name} is now map_bo.*{NAMES[old]}"):
        found = getattr(import_module(module), name)
    assert found.__name__ == NAMES[old]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        import_module(module).nothing  # noqa: B018


def test_a_name_that_never_was_is_no_attribute() -> None:
    import map_bo.problems.merged as package

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018
