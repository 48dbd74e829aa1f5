"""The numbers of the studies are written by a command, never by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from experiments.record_numbers import FIRST, LAST, command_of, numbers, with_numbers
from map_bo.errors import ConfigError
from tests.report.fake_runs import comparison

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "experiments" / "ablations").glob("*.md"))


def test_numbers_stand_between_the_marks_and_nothing_else_changes() -> None:
    text = f"before\n{FIRST}\nold\n{LAST}\nafter\n"
    written = with_numbers(text, "new")
    assert written == f"before\n{FIRST}\nnew\n{LAST}\nafter\n"
    assert with_numbers(written, "new") == written
    with pytest.raises(ConfigError, match="no place for numbers"):
        with_numbers("nothing", "new")


def test_numbers_name_their_command_and_their_reference_point() -> None:
    text = numbers(comparison(seeds=2), "map-bo run -m a=1,2")
    assert text.startswith("`map-bo run -m a=1,2`")
    assert "reference point rot90" in text
    assert "Dominance win rate" in text


def test_the_command_is_the_recorded_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no multirun\.yaml"):
        command_of(tmp_path)
    overrides = {
        "hydra": ["hydra.sweep.dir=x", "hydra/launcher=joblib"],
        "task": ["progress=false", "seed=0,1"],
    }
    (tmp_path / "multirun.yaml").write_text(yaml.safe_dump({"hydra": {"overrides": overrides}}))
    assert command_of(tmp_path) == "map-bo run -m hydra/launcher=joblib seed=0,1"


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_study_has_its_claim_command_and_numbers(path: Path) -> None:
    text = path.read_text()
    assert "Claim:" in text
    name = f"ablation_{path.stem}"
    assert f"`map-bo run -m experiment={name}`" in text
    assert (ROOT / "conf" / "experiment" / f"{name}.yaml").exists()
    assert recorded(text).startswith("`map-bo run -m ")


def recorded(text: str) -> str:
    return text.partition(FIRST)[2].partition(LAST)[0].strip()


def test_the_reproduction_has_its_claim_command_and_numbers() -> None:
    text = (ROOT / "experiments" / "reproduction" / "published.md").read_text()
    assert "Claim:" in text
    assert "experiment=reference,reference_kind_box,defaults" in recorded(text)


def test_every_study_has_a_file() -> None:
    swept = (ROOT / "conf" / "experiment").glob("ablation_*.yaml")
    assert {f"ablation_{path.stem}" for path in STUDIES} == {path.stem for path in swept}
