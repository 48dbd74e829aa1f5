"""The guides for extensions are followed word by word: files, entry points, commands, contracts."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from map_bo.app.main import main
from map_bo.extensions import GROUPS
from map_bo.merging.checkpoints.checkpoint import open_checkpoint
from map_bo.rng import make_generator

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "docs" / "extend"
NAMES = sorted(path.stem for path in GUIDES.glob("*.md") if path.stem != "README")
MARKED = re.compile(r"<!-- ([a-z ]+)(?:: ([^ ]+))? -->\n```\w+\n(.*?)```", flags=re.DOTALL)


def blocks(guide: str, kind: str) -> list[tuple[str, str]]:
    """Return the blocks of a guide that are marked so, each with what its mark says further."""
    text = (GUIDES / f"{guide}.md").read_text()
    found = MARKED.findall(text)
    assert len(found) == text.count("```") // 2, "a block of the guide is not marked"
    return [(note, content) for one, note, content in found if one == kind]


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, on the path, with checkpoints of a base and two experts."""
    generator = make_generator(0)
    base = {k: v.detach().clone() for k, v in network().state_dict().items()}
    for label in ("base", "math", "code"):
        step = 0.0 if label == "base" else 0.05
        state = {k: v + step * torch.randn(v.shape, generator=generator) for k, v in base.items()}
        (tmp_path / label).mkdir()
        torch.save(state, tmp_path / label / "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("their_package")]:
        del sys.modules[name]


def install(guide: str, site: Path) -> None:
    """Write the files of a guide, and the entry points as an installed package has them."""
    for name, content in blocks(guide, "file"):
        path = site / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    points = ""
    for _, content in blocks(guide, "entry points"):
        for group, names in tomllib.loads(content)["project"]["entry-points"].items():
            assert group in GROUPS.values()
            points += f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items())
    info = site / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(points)


def run_commands(content: str) -> None:
    for line in content.strip().splitlines():
        program, *arguments = shlex.split(line)
        assert program == "map-bo"
        main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("guide", NAMES)
def test_a_guide_works_as_it_stands(guide: str, site: Path) -> None:
    install(guide, site)
    for _, content in blocks(guide, "python"):
        exec(content, {})
    for note, content in blocks(guide, "shell"):
        if note != "slow":
            run_commands(content)
    assert [path for path in site.iterdir() if (path / "events.jsonl").exists()] or (
        open_checkpoint(site / "again").digest() == open_checkpoint(site / "merged").digest()
    )


@pytest.mark.slow
def test_what_trackers_are_told_is_written(site: Path) -> None:
    install("trackers", site)
    for _, content in blocks("trackers", "shell"):
        run_commands(content)
    counts = dict(
        line.split() for line in (site / "counted" / "counts.txt").read_text().split("\n") if line
    )
    assert counts["created"] == counts["finished"] == counts["front"] == "1"
    assert int(counts["observed"]) == 8


@pytest.mark.slow
def test_an_operator_of_a_guide_is_searched_with(site: Path) -> None:
    install("operators", site)
    for note, content in blocks("operators", "shell"):
        if note == "slow":
            run_commands(content)
    assert (site / "searched" / "report.html").exists() or (
        site / "searched" / "events.jsonl"
    ).exists()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("guide", [name for name in NAMES if blocks(name, "contract")])
def test_the_parts_of_a_guide_keep_their_contract(guide: str, site: Path) -> None:
    install(guide, site)
    [(_, content)] = blocks(guide, "contract")
    (site / "test_contract.py").write_text(content)
    path = os.pathsep.join([str(site), str(ROOT)])
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-c",
            str(ROOT / "pyproject.toml"),
            "--rootdir",
            str(site),
            str(site / "test_contract.py"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_every_kind_of_part_has_a_guide() -> None:
    kinds = {group.removeprefix("map_bo.") for group in GROUPS.values()} - {"problems"}
    assert kinds == set(NAMES)
    text = (GUIDES / "README.md").read_text()
    assert all(f"({name}.md)" in text for name in NAMES)
