"""The surrogate of a run is what its sampler looks through: by the real command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from map_bo.app.main import main
from map_bo.loop.reading import created_of, load_state
from map_bo.tracking.jsonl import JsonlStore

JOB = [
    "problem=sigmoid",
    "problem.d=2",
    "problem.m=2",
    "sampler=front_uncertainty",
    "+sampler.restarts=1",
    "+sampler.raw_samples=16",
    "+sampler.steps=5",
    "solver.points=20",
    "loop.budget=7",
    "loop.verify=0",
    "progress=false",
]
ANCHORS = 4


def swept(directory: Path, *overrides: str) -> dict[str, Path]:
    """Do a sweep over two surrogates and return the directory of each job."""
    main(["run", "-m", *JOB, *overrides, "surrogate=quadratic,gp", f"hydra.sweep.dir={directory}"])
    jobs = [path.parent for path in directory.glob("*/events.jsonl")]
    return {created_of(job)["config"]["choices"]["surrogate"]: job for job in jobs}


def points(job: Path) -> Tensor:
    return load_state(job)[0].seen.X


def fits(job: Path) -> set[str]:
    """Return what the proposals of a run were made through, as recorded."""
    events = JsonlStore.open(job).read()
    found: list[Any] = [e.data.get("surrogate") for e in events if e.kind == "proposed"]
    return {fit["settings"].partition("(")[0] for fit in found if fit}


@pytest.mark.slow
def test_a_sweep_over_surrogates_proposes_different_points(tmp_path: Path) -> None:
    jobs = swept(tmp_path / "sweep", "tracking=none")
    quadratic, gp = points(jobs["quadratic"]), points(jobs["gp"])
    assert torch.equal(quadratic[:ANCHORS], gp[:ANCHORS])
    assert not torch.isclose(quadratic[ANCHORS:], gp[ANCHORS:], atol=1e-3).all(-1).any()
    assert fits(jobs["quadratic"]) == {"Quadratic"}
    assert fits(jobs["gp"]) == {"GP"}


@pytest.mark.slow
def test_a_surrogate_of_the_samplers_own_is_kept_and_shown(tmp_path: Path) -> None:
    jobs = swept(tmp_path / "sweep", "sampler.surrogate=quadratic")
    assert torch.equal(points(jobs["quadratic"]), points(jobs["gp"]))
    assert fits(jobs["gp"]) == {"Quadratic"}
    created = created_of(jobs["gp"])
    assert created["config"]["tree"]["sampler"]["surrogate"]["_target_"].endswith("Quadratic")
    recorded = created["settings"]["sampler"]["fields"]["surrogate"]["class"]
    assert recorded == "map_bo.surrogates.quadratic:Quadratic"
    told = "through a surrogate of its own: Quadratic"
    assert told in (jobs["gp"] / "report.html").read_text()
    assert told not in (jobs["quadratic"] / "report.html").read_text()  # it is that of the run


@pytest.mark.parametrize("old", ["surrogate=reference", "sampler=bins_reference"])
def test_an_old_name_works_and_warns(
    old: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = [key for key in JOB if "sampler" not in key]
    other = "sampler=sobol" if old.startswith("surrogate") else "surrogate=quadratic"
    main(["run", *job, other, old, "tracking=none", f"hydra.run.dir={tmp_path / 'run'}"])
    captured = capfd.readouterr()
    group = old.partition("=")[0]
    new = {"surrogate": "published", "sampler": "bins_published"}[group]
    assert f"{old} is now {group}={new}" in captured.out + captured.err
