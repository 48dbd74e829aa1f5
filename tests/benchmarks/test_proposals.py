"""The comparison of surrogates behind the proposals: what differs, what is told, what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.quality import proposals
from benchmarks.quality.methods import PROPOSALS, matching
from benchmarks.quality.proposals import BASELINE, CASES, DOCUMENT, TABLE, document, verdicts
from benchmarks.quality.tidy import read
from benchmarks.record import RESULTS
from tests.benchmarks.test_analysis import row

CHEAP = "proposals-quadratic"


def measured(seed: int, method: str, n: int, regret: float, seconds: float) -> dict[str, Any]:
    numbers = {"regret": regret, "regret_solved": regret, "share": 1 - regret}
    return row(CASES[0], method, seed, n, propose_s=seconds, **numbers)


def rows(gain: float) -> list[dict[str, Any]]:
    """One case; at 24 evaluations the cheap surrogate has ``gain`` less regret."""
    found = []
    for seed in range(10):
        found += [measured(seed, BASELINE, 12, 0.2, 1.0), measured(seed, CHEAP, 12, 0.2, 0.5)]
        found += [measured(seed, BASELINE, 24, 0.1, 7.0), measured(seed, CHEAP, 24, 0.1 - gain, 2)]
    return found


def test_the_document_is_what_the_rows_say() -> None:
    assert document(read(RESULTS / TABLE)) == DOCUMENT.read_text()


def test_only_the_surrogate_of_the_sampler_differs() -> None:
    entries = matching(["proposals"])
    assert [entry.name for entry in entries] == list(PROPOSALS)
    told = [entry.describe() for entry in entries]
    samplers = [each.pop("sampler") for each in told]
    assert all(each == told[0] for each in told)
    assert len(set(samplers)) == len(PROPOSALS)
    assert told[0]["surrogate"].startswith("Auto(")
    for sampler, path in zip(samplers, PROPOSALS.values(), strict=True):
        # A surrogate of None would be measured as whatever the package's default is that day.
        assert f"surrogate={path.split(':')[1]}(" in sampler


def test_a_verdict_is_about_the_surrogate_that_is_named() -> None:
    assert "regret: clearly better in 1, clearly worse in 0 of 2" in "\n".join(verdicts(rows(0.05)))
    assert "share of hypervolume: clearly better in 0, clearly worse in 1 of 2" in "\n".join(
        verdicts(rows(-0.05))
    )


def test_seconds_are_those_of_one_proposal() -> None:
    assert proposals.seconds(rows(0.0), CASES[0], BASELINE) == pytest.approx(0.5)
    assert proposals.seconds(rows(0.0), CASES[0], CHEAP) == pytest.approx(0.125)
    assert proposals.seconds([], CASES[0], CHEAP) is None


def test_groups_hold_every_case() -> None:
    assert set(proposals.EXACT) | set(proposals.NOISY) == set(CASES)
    assert not set(proposals.SETTLED) & set(proposals.FRESH)


def test_the_command_runs_small_and_records_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = sorted(path.name for path in RESULTS.iterdir())
    text = DOCUMENT.read_text()
    proposals.main(["--smoke", "--methods", CHEAP, "--out", str(tmp_path / "p.json")])
    assert "1 cells, 0 of them done before" in capsys.readouterr().out
    assert (tmp_path / "p.json").exists()
    assert sorted(path.name for path in RESULTS.iterdir()) == before
    assert DOCUMENT.read_text() == text
