from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from map_bo.merging.checkpoints.checkpoint import Checkpoint, open_checkpoint
from map_bo.merging.export.model_card import model_card_text
from tests.merging.checkpoint_files import BASE, COEFFICIENTS, EXPERTS, export

CHOICE = {
    "coefficients": {"math": 0.5},
    "predicted": {"math": 0.81234, "a|b": 0.7},
    "predicted_lower": {"math": 0.75, "a|b": 0.6},
    "predicted_upper": {"math": 0.85, "a|b": 0.8},
    "corrected": {"math": 0.8, "a|b": 0.69},
    "real": {"math": 0.79, "a|b": None},
    "preference": {"weights": {"math": 2.0}, "at_least": {}, "rule": "weighted_sum"},
}


def card(**changes: Any) -> tuple[dict[str, Any], str]:
    settings: dict[str, Any] = {
        "base": BASE,
        "experts": EXPERTS,
        "operator": {"name": "task_arithmetic"},
        "coefficients": COEFFICIENTS,
        "record": {},
    }
    text = model_card_text(**{**settings, **changes})
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def folder(path: Path, seed: float = 0.0, config: str = "{}") -> Checkpoint:
    path.mkdir(parents=True)
    save_file({"w": torch.full((2, 2), seed)}, path / "model.safetensors")
    (path / "config.json").write_text(config)
    return open_checkpoint(path)


def rows(body: str, section: str) -> list[list[str]]:
    part = body.split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_notes_of_the_choice_are_in_the_card() -> None:
    note = "the bounds hold with probability 0.985 when measured"
    assert f"Note: {note}" in card(record={"choice": {**CHOICE, "notes": [note]}})[1]
    assert "Note:" not in card(record={"choice": {**CHOICE, "notes": None}})[1]


def test_the_verdict_and_what_was_confirmed_are_in_the_card() -> None:
    verdict = {"lines": ["keep the uniform blend: nothing here is distinguishable from it"]}
    body = card(record={"choice": {**CHOICE, "verdict": verdict}})[1]
    assert "## Verdict\n\n- keep the uniform blend: nothing here" in body
    confirmed = {
        "where": "held-out examples",
        "verdict": {"lines": ["take the chosen merge"]},
        "table": [["merge", "math: search"], ["the chosen merge", "0.8"]],
    }
    body = card(record={"choice": {**CHOICE, "verdict": verdict, "confirmed": confirmed}})[1]
    assert "- take the chosen merge" in body
    assert "Measured on held-out examples" in body
    assert ["the chosen merge", "0.8"] in rows(body, "Verdict")
    assert "## Verdict" not in card(record={"choice": {**CHOICE, "verdict": "x"}})[1]


class TestFrontMatter:
    def test_folders_are_named(self, tmp_path: Path) -> None:
        base = folder(tmp_path / "base", config=json.dumps({"model_type": "gpt2"}))
        expert = folder(tmp_path / "math", 1.0)
        head, _ = card(base=base, experts={"math": expert})
        assert head == {
            "base_model": [str(tmp_path / "base"), str(tmp_path / "math")],
            "base_model_relation": "merge",
            "library_name": "transformers",
            "tags": ["merge", "map-bo"],
        }

    def test_names_on_the_hub_are_told(self, tmp_path: Path) -> None:
        place = tmp_path / "models--org--tiny-gpt.2" / "snapshots" / "abc"
        cached, other = folder(place), folder(tmp_path / "b", 1.0)
        other.source = "org/other@0123"
        head, _ = card(base=cached, experts={"math": other})
        assert head["base_model"] == ["org/tiny-gpt.2", "org/other"]

    def test_what_is_in_memory_has_no_name(self, tmp_path: Path) -> None:
        head, _ = card()
        assert head == {"library_name": "pytorch", "tags": ["merge", "map-bo"]}
        head, _ = card(experts={"math": folder(tmp_path / "a")})
        assert head["base_model"] == [str(tmp_path / "a")]

    @pytest.mark.parametrize("config", ["[]", "{", "{}"])
    def test_a_configuration_that_names_no_model_is_no_transformers_model(
        self, tmp_path: Path, config: str
    ) -> None:
        assert card(base=folder(tmp_path / "b", config=config))[0]["library_name"] == "pytorch"


class TestBody:
    def test_predicted_and_measured_are_apart(self) -> None:
        _, body = card(record={"choice": CHOICE})
        assert rows(body, "Trade-offs") == [
            [
                "metric",
                "predicted",
                "95 % interval of the prediction",
                "predicted, corrected",
                "measured",
            ],
            ["---"] * 5,
            ["math", "0.8123", "0.75 to 0.85", "0.8", "0.79"],
            ["a\\|b", "0.7", "0.6 to 0.8", "0.69", "not measured"],
        ]
        assert '`{"weights": {"math": 2.0}, "rule": "weighted_sum"}`' in body

    def test_without_verification_nothing_is_corrected(self) -> None:
        unknown = {"math": None, "a|b": None}
        _, body = card(record={"choice": {**CHOICE, "corrected": unknown, "real": unknown}})
        table = rows(body, "Trade-offs")
        assert table[0][-1] == "measured"
        assert "predicted, corrected" not in table[0]
        assert [row[-1] for row in table[2:]] == ["not measured"] * 2
        assert "orrected" not in body

    @pytest.mark.parametrize("record", [{}, {"choice": None}, {"choice": {"point": 3}}])
    def test_without_metrics_there_is_no_table(self, record: dict[str, Any]) -> None:
        assert "Trade-offs" not in card(record=record)[1]

    def test_sources_and_their_digests(self) -> None:
        _, body = card()
        name = "c: #d"  # the name in the tests ends with a line break
        assert rows(body, "What was merged")[2:] == [
            ["base", "", BASE.source, BASE.digest()],
            *(["expert", n.strip(), e.source, e.digest()] for n, e in EXPERTS.items()),
        ]
        assert rows(body, "How it was merged")[2:] == [["math", "0.25"], [name, "-0.5"]]
        assert 'Operator: `{"name": "task_arithmetic"}`' in body

    def test_what_was_done_besides_is_told(self) -> None:
        _, body = card(recalibrated=True, record={"nested": {}})
        assert "batch normalisation were measured anew" in body
        assert "merged in stages" in body
        assert not [w for w in ("anew", "stages") if w in card()[1]]

    def test_names_cannot_break_the_page(self) -> None:
        name = "a|b\n# <b>[x](y)`*_\\"
        _, body = card(experts={name: BASE}, coefficients={name: 1.0})
        (row,) = rows(body, "How it was merged")[2:]
        assert row == ["a\\|b # \\<b\\>\\[x\\](y)\\`\\*\\_\\\\", "1"]


def test_the_export_has_it(tmp_path: Path) -> None:
    out = export(tmp_path / "m", record={"choice": CHOICE})
    text = (out / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: pytorch\ntags:\n- merge\n- map-bo\n---\n")
    assert "| math | 0.8123 |" in text
    assert EXPERTS["math"].digest() in text
