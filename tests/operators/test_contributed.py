"""An operator that is not ours keeps the contract, merges, and is known by its recipe."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from map_bo.app.main import main
from map_bo.errors import SettingsError
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.merging.export.model import merge_checkpoints
from map_bo.merging.vectors.operator import MergeOperator
from map_bo.operators.recipes import merge_again
from tests.contracts.operator_contract import OperatorContract
from tests.merging.hard_checkpoints import hard_family
from tests.operators.contributed import Shrink

ROOT = Path(__file__).parents[2]
OPERATOR = Shrink(strength=0.1, search={"strength": (0.05, 0.2)})


class TestShrink(OperatorContract):
    @pytest.fixture
    def operator(self) -> MergeOperator:
        return Shrink()


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    base, experts = hard_family(tmp_path / "in")
    given = {**dict.fromkeys(experts, 0.5), "strength": 0.15}
    return merge_checkpoints(
        base, experts, given, tmp_path / "merged", operator=OPERATOR, progress=False
    )


def test_its_recipe_names_the_class(merged: Path) -> None:
    told = yaml.safe_load((merged / "recipe.yaml").read_text())["operator"]
    assert told["class"] == "tests.operators.contributed:Shrink"
    assert told["fields"]["strength"] == 0.1


def test_its_recipe_is_followed_by_those_who_trust_its_package(
    merged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["merge", str(merged), "--out", str(tmp_path / "again")])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "tests is not a package whose code is run on the word of a file" in said
    assert "--trust tests" in said
    assert not (tmp_path / "again").exists()
    main(["merge", str(merged), "--out", str(tmp_path / "again"), "--trust", "tests"])
    assert open_checkpoint(tmp_path / "again").digest() == open_checkpoint(merged).digest()


def test_in_python(merged: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="tests is not a package"):
        merge_again(merged, tmp_path / "again", progress=False)
    merge_again(merged, tmp_path / "again", trust=["tests.operators.contributed"], progress=False)
    assert open_checkpoint(tmp_path / "again").digest() == open_checkpoint(merged).digest()


@pytest.mark.slow
def test_from_the_directory_where_the_module_stands(merged: Path, tmp_path: Path) -> None:
    """As by the console script, whose directory is not that of the user."""
    own = Path(ROOT / "tests" / "operators" / "contributed.py").read_text()
    (tmp_path / "my_operators.py").write_text(own)
    recipe = merged / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("tests.operators.contributed", "my_operators"))
    script = "from map_bo.app.main import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, "merge", "merged", "--out", "x", "--trust", "my_operators"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert open_checkpoint(tmp_path / "x").digest() == open_checkpoint(merged).digest()


def test_an_installed_package_that_registers_it_needs_no_further_trust(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site" / "theirs-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[map_bo.operators]\nshrink = tests.operators.contributed:Shrink\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "site")
    main(["merge", str(merged), "--out", str(tmp_path / "again")])
    assert open_checkpoint(tmp_path / "again").digest() == open_checkpoint(merged).digest()
