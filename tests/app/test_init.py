from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from map_bo.app.arguments import parser, with_configuration
from map_bo.app.init import parse_expert, parse_task, written_file
from map_bo.errors import ConfigError


def options(*arguments: str) -> argparse.Namespace:
    names = [
        *("init", "resume", "ask", "tell", "choose", "merge", "report", "export", "import"),
        *("check", "repair", "outcomes", "cache", "confirm"),
    ]
    return parser(dict.fromkeys(names, lambda options: None)).parse_args(["init", *arguments])


@pytest.mark.parametrize(
    ("text", "name", "place"),
    [
        ("math=models/math", "math", "models/math"),
        ("models/bert-sst2/", "bert_sst2", "models/bert-sst2/"),
        ("somebody/clip_sun397@v1", "clip_sun397", "somebody/clip_sun397@v1"),
        ("models/lr=1e-3/math", "math", "models/lr=1e-3/math"),
    ],
)
def test_an_expert_has_a_name_or_is_called_like_its_folder(
    text: str, name: str, place: str
) -> None:
    assert parse_expert(text) == (name, place)


@pytest.mark.parametrize("text", ["", "math=", "/", "@v1"])
def test_an_expert_without_a_name_or_place_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--expert must be NAME=PATH"):
        parse_expert(text)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("perplexity:a.txt", {"kind": "perplexity", "data": {"path": "a.txt"}}),
        (
            "perplexity:org/set,split=test,columns.text=body,limit=3,batch_size=4,unit=document",
            {
                "kind": "perplexity",
                "data": {
                    "path": "org/set",
                    "split": "test",
                    "columns": {"text": "body"},
                    "limit": 3,
                },
                "batch_size": 4,
                "unit": "document",
            },
        ),
        (
            "generation:a.jsonl,metrics=[score, seconds],stop=',',pattern='(\\d+), yes'",
            {
                "kind": "generation",
                "data": {"path": "a.jsonl"},
                "metrics": ["score", "seconds"],
                "stop": ",",
                "pattern": "(\\d+), yes",
            },
        ),
        (
            "{kind: perplexity, data: {path: a.txt}}",
            {"kind": "perplexity", "data": {"path": "a.txt"}},
        ),
        ("torch:my_task:loader", {"kind": "torch", "loader": "my_task:loader"}),
        ("my_task:score", {"kind": "my_task:score"}),
        ("my_task:make,share=0.5", {"kind": "my_task:make", "share": 0.5}),
    ],
)
def test_a_task_is_its_kind_its_data_and_settings(text: str, settings: Any) -> None:
    assert parse_task(f"t={text}") == ("t", settings)


@pytest.mark.parametrize("text", ["Q: {prompt}", "Q: {prompt} A:", "- {prompt}", "*", "a: b: c"])
def test_a_text_with_a_colon_is_a_text(text: str) -> None:
    assert parse_task(f"t=generation:a.txt,template={text}")[1]["template"] == text


def test_a_kind_for_all_tasks() -> None:
    found = {"kind": "perplexity", "data": {"path": "a.txt", "split": "[:5]"}}
    assert parse_task("t=a.txt,split='[:5]'", kind="perplexity") == ("t", found)
    assert parse_task("t=generation:a.txt", kind="perplexity")[1]["kind"] == "generation"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("perplexity:a.txt", "must be NAME=KIND:DATA", "as in --task sst2="),
        ("t=", "must be NAME=KIND:DATA", "as in"),
        ("t=perplexty:a.txt", "the kind of task 't' is not known", "did you mean 'perplexity'?"),
        ("t=a.txt", "the kind of task 't' is not known: 'a.txt'", "choose from"),
        ("t=perplexity:a.txt,quick", "has the setting 'quick'", "as in split=test"),
        ("t=perplexity:a.txt,data=b.txt,data.split=x", "cannot be set", "give one"),
        ("t={kind: [}", "the value of t cannot be read: {kind: [}", "close its brackets"),
    ],
)
def test_a_task_of_another_form_is_refused(text: str, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_task(text)
    assert message in caught.value.message
    assert caught.value.hint is not None
    assert hint in caught.value.hint


class TestFile:
    def test_it_holds_what_was_given_and_begins_with_our_configuration(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        file = written_file(
            options(
                "bert", "--expert", "a=A", "--expert", "b=B", "--task", "a=perplexity:a.txt",
                "--task", "b=perplexity:b.txt,limit=9", "--limit", "5",
                "--set", "problem.missing=base", "--set", "operator=ties", "--set", "seed=3",
                "--set", "loop.retries=2",
            )
        )  # fmt: skip
        assert file == Path("map_bo.yaml")
        assert yaml.safe_load(file.read_text()) == {
            "defaults": [
                "config",
                {"override problem": "hf"},
                {"override operator": "ties"},
                "_self_",
            ],
            "problem": {
                "base": "bert",
                "experts": {"a": "A", "b": "B"},
                "tasks": {
                    "a": {"kind": "perplexity", "data": {"path": "a.txt", "limit": 5}},
                    "b": {"kind": "perplexity", "data": {"path": "b.txt", "limit": 9}},
                },
                "missing": "base",
            },
            "loop": {"budget": 24, "retries": 2},
            "seed": 3,
        }

    def test_settings_that_are_commented_out_are_those_of_the_problem(self, tmp_path: Path) -> None:
        """Taking a comment away gives a configuration with the same meaning."""
        out = tmp_path / "own.yaml"
        arguments = ["bert", "--expert", "A", "--task", "a=perplexity:a.txt", "--out", str(out)]
        written_file(options(*arguments))
        text = out.read_text().replace("  # Settings", "  ## Settings").partition("\nloop:")[0]
        bare = re.sub(r"^  # (?!-)", "  ", text, flags=re.MULTILINE)
        shipped = Path(__file__).parents[2] / "conf" / "problem" / "hf.yaml"
        known = yaml.safe_load(shipped.read_text())
        told = yaml.safe_load(bare)["problem"]
        assert set(told) - {"base", "experts", "tasks"} >= {"lower", "upper", "dtype", "missing"}
        assert {k: v for k, v in told.items() if k not in ("base", "experts", "tasks")} == {
            k: known[k] for k in told if k not in ("base", "experts", "tasks")
        }

    def test_a_file_is_not_written_over(self, tmp_path: Path) -> None:
        out = tmp_path / "map_bo.yaml"
        arguments = ["bert", "--expert", "A", "--task", "a=perplexity:a.txt", "--out", str(out)]
        written_file(options(*arguments))
        with pytest.raises(ConfigError, match="is there already") as caught:
            written_file(options(*arguments))
        assert f"map-bo init {out}" in str(caught.value.hint)
        written_file(options(*arguments, "--force", "--budget", "7"))
        assert "budget: 7" in out.read_text()

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--task", "a=perplexity:a.txt"], "no expert was given"),
            (["--expert", "A"], "no task was given"),
            (["--expert", "A", "--expert", "x/A"], "the expert 'A' was given twice"),
            (["--set", "problem.missing"], "--set must be KEY=VALUE"),
            (["--out", "own.json"], "--out must be a .yaml file"),
        ],
    )
    def test_what_cannot_be_written_is_refused_and_nothing_is(
        self,
        arguments: list[str],
        message: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        if "--set" in arguments or "--out" in arguments:
            arguments = [*arguments, "--expert", "A", "--task", "a=perplexity:a.txt"]
        with pytest.raises(ConfigError, match=message):
            written_file(options("bert", *arguments))
        assert not list(tmp_path.iterdir())


class TestRunOfAFile:
    def test_hydra_begins_with_it(self, tmp_path: Path) -> None:
        file = tmp_path / "own.yaml"
        file.write_text("defaults:\n  - config  # ours\n  - _self_\n")
        begun = ["--config-dir", str(tmp_path), "--config-name", "own"]
        assert with_configuration([str(file), "seed=3"]) == [*begun, "seed=3"]
        assert with_configuration(["-m", str(file), "x=a.yaml"]) == ["-m", *begun, "x=a.yaml"]

    def test_other_arguments_stay(self) -> None:
        for arguments in (["problem=digits"], ["--config-name", "a.yaml"], ["-cn", "a.yaml"]):
            assert with_configuration(arguments) == arguments

    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("gone.yaml", None, "does not exist"),
            ("config.yaml", "defaults: [config]", "is called like the configuration of map_bo"),
            ("own.yml", "defaults:\n  - config\n", r"must end in \.yaml"),
            ("own.yaml", "problem: {}\n", "does not begin with the configuration of map_bo"),
        ],
    )
    def test_what_cannot_be_the_beginning_is_refused(
        self, name: str, text: str | None, message: str, tmp_path: Path
    ) -> None:
        if text is not None:
            (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            with_configuration([str(tmp_path / name)])


def test_a_setting_of_a_task_joins_what_the_task_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = written_file(
        options(
            "lm", "--expert", "a=A", "--task", "h=lm_eval:arc_easy,limit=5",
            "--task", "a=perplexity:a.txt", "--set", "problem.tasks.h.tasks=[one, two]",
            "--set", "problem.tasks={a: {batch_size: 4}}", "--set", "problem.experts.b=B",
            "--set", "loop={retries: 2}",
        )
    )  # fmt: skip
    found = yaml.safe_load(file.read_text())
    assert found["problem"] == {
        "base": "lm",
        "experts": {"a": "A", "b": "B"},
        "tasks": {
            "h": {"kind": "lm_eval", "tasks": ["one", "two"], "limit": 5},
            "a": {"kind": "perplexity", "data": {"path": "a.txt"}, "batch_size": 4},
        },
    }
    assert found["loop"] == {"budget": 24, "retries": 2}
