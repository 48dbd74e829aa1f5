from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
from torch import nn

from map_bo.errors import ConfigError, EvaluationError, MergeError
from map_bo.evaluators import kinds
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.kinds import (
    KINDS,
    code_in,
    evaluator_from,
    import_callable,
    known_kinds,
    refuse_all,
)
from map_bo.evaluators.metrics import DeclaresMetrics
from tests.installed_package import forget, write_package


@dataclass(frozen=True, kw_only=True)
class Block:
    path: str
    limit: int | None = None
    clean: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise EvaluationError(f"limit must be at least 1, got {self.limit}", hint="give 1")


Block.__module__ = "map_bo.evaluators.data"  # nested settings are those of map_bo


class Scored:
    def __init__(
        self,
        *,
        data: Block,
        grader: Callable[[str], float] | None = None,
        named: Mapping[str, Callable[[str], float] | float] | None = None,
        pattern: str | Sequence[str] = "",
        tokenizer: str | None = None,
    ) -> None:
        self.data, self.grader, self.named = data, grader, named
        self.pattern, self.tokenizer = pattern, tokenizer

    def __call__(self, model: nn.Module) -> float:
        return 0.5


@pytest.fixture(autouse=True)
def scored(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**KINDS, "scored": f"{__name__}:Scored"}
    monkeypatch.setattr(kinds, "KINDS", MappingProxyType(known))


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_task.py").write_text(
        "print('imported')\n"
        "def grade(text): return 1.0\n"
        "def score(model): return 0.25\n"
        "def make(share): return lambda model: share\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    yield "own_task"
    sys.path[:] = before
    sys.modules.pop("own_task", None)


def build(settings: object, **more: object) -> Scored:
    made = evaluator_from("problem.tasks.sst2", settings, **more)  # type: ignore[arg-type]
    assert isinstance(made, Scored)
    return made


class TestBuilding:
    def test_a_nested_block_is_built_from_a_mapping_or_its_path_alone(self) -> None:
        full = build({"kind": "scored", "data": {"path": "a.csv", "limit": 3}})
        assert full.data == Block(path="a.csv", limit=3)
        assert build({"kind": "scored", "data": "a.csv"}).data == Block(path="a.csv")

    def test_defaults_are_for_those_that_take_them_and_gave_nothing(self) -> None:
        defaults = {"tokenizer": "base", "processor": "base"}
        settings = {"kind": "scored", "data": "a"}
        assert build(settings, defaults=defaults).tokenizer == "base"
        assert build({**settings, "tokenizer": "own"}, defaults=defaults).tokenizer == "own"

    def test_functions_are_imported_where_the_evaluator_takes_one(self, own: str) -> None:
        grade = import_callable(f"{own}:grade", "key")
        made = build(
            {
                "kind": "scored",
                "data": {"path": f"{own}:grade", "clean": f"{own}:grade"},
                "grader": f"{own}:grade",
                "named": {"a": f"{own}:grade", "b": 2.0},
                "pattern": [f"{own}:grade"],
            }
        )
        assert made.grader is grade
        assert made.data.path == f"{own}:grade"
        assert (made.data.clean or str).__name__ == grade.__name__
        assert made.named == {"a": grade, "b": 2.0}
        assert made.pattern == [f"{own}:grade"]

    def test_a_function_of_the_users_own(self, own: str) -> None:
        assert evaluator_from("t", f"{own}:score")(nn.Identity()) == 0.25
        made = evaluator_from("t", {"kind": f"{own}:make", "share": 0.5})
        assert made(nn.Identity()) == 0.5

    def test_what_can_be_called_stays(self) -> None:
        assert evaluator_from("t", len) is len  # type: ignore[comparison-overlap]

    def test_installed_packages_bring_kinds(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.syspath_prepend(write_package(tmp_path / "site"))
        assert {"quarter", "scored", "scores"} <= set(known_kinds())
        assert evaluator_from("t", "quarter")(nn.Identity()) == 0.25
        assert evaluator_from("t", {"kind": "scores"})(nn.Identity()) == 0.75
        assert list(code_in("t", {"kind": "scores"})) == []
        forget()


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "message", "hint"),
        [
            (3, "problem.tasks.sst2 must be a mapping with a kind, got 3", "kinds are"),
            ({"data": "a"}, "problem.tasks.sst2 has no kind", "kinds are"),
            ({"knid": "scored"}, "has no kind", "did you mean 'problem.tasks.sst2.kind' by 'knid'"),
            ({"kind": 3}, "has the kind 3, which is not text", "kinds are"),
            ({"kind": "scorde"}, "sst2.kind 'scorde' is not known", "did you mean 'scored'?"),
            ({"kind": "scored"}, "problem.tasks.sst2 lacks 'data'", "give problem.tasks.sst2.data"),
            (
                {"kind": "scored", "dta": "a.csv"},
                "problem.tasks.sst2 has no setting 'dta'",
                "did you mean 'problem.tasks.sst2.data'?",
            ),
            (
                {"kind": "scored", "data": {"path": "a", "lmit": 3}},
                "problem.tasks.sst2.data has no setting 'lmit'",
                "did you mean 'problem.tasks.sst2.data.limit'?",
            ),
            (
                {"kind": "scored", "data": {"path": "a", "limit": 0}},
                "problem.tasks.sst2.data: limit must be at least 1, got 0",
                "give 1",
            ),
            (
                {"kind": "scored", "data": {"path": "a", "limit": "x"}},
                "problem.tasks.sst2.data cannot be built",
                "check the values below problem.tasks.sst2.data",
            ),
            (
                {"kind": "scored", "data": "a", "grader": "grade"},
                "problem.tasks.sst2.grader must name a function, got 'grade'",
                "write it as module:function",
            ),
            (
                {"kind": "scored", "data": "a", "grader": "no_such:grade"},
                "problem.tasks.sst2.grader 'no_such:grade' cannot be imported",
                "modules are looked for",
            ),
            ("no_such:score", "sst2.kind 'no_such:score' cannot be imported", "modules are looked"),
        ],
    )
    def test_the_key_is_named(self, settings: object, message: str, hint: str) -> None:
        with pytest.raises((ConfigError, EvaluationError)) as caught:
            build(settings)
        assert message in caught.value.message
        assert caught.value.hint is not None
        assert hint in caught.value.hint

    def test_everything_that_is_wrong_with_one_is_said_together(self) -> None:
        with pytest.raises(ConfigError) as caught:
            build({"kind": "scored", "data": {"pth": "a"}, "grader": "x", "more": 1})
        said = caught.value.message
        assert "no setting 'more'" in said
        assert "no setting 'pth'" in said
        assert "got 'x'" in said

    def test_everything_that_is_wrong_in_several_places_is_said_together(self) -> None:
        refuse_all([])
        one, two = MergeError("a is wrong", hint="fix a"), ConfigError("b is wrong")
        with pytest.raises(MergeError, match="a is wrong"):
            refuse_all([one])
        with pytest.raises(ConfigError, match=r"2 parts .*\n  - a is wrong \(fix a\)\n  - b is wr"):
            refuse_all([one, two])


class TestCode:
    def test_what_would_be_imported_is_found_without_importing(
        self, own: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        settings = {
            "kind": "scored",
            "data": {"path": "data:plain", "clean": "own_task:grade"},
            "grader": "own_task:grade",
            "named": {"a": "own_task:grade"},
            "pattern": "answer:x",
            "tokenizer": "hub:name",
        }
        assert list(code_in("t", settings)) == [
            ("t.data.clean", "own_task:grade"),
            ("t.grader", "own_task:grade"),
            ("t.named.a", "own_task:grade"),
        ]
        assert capsys.readouterr().out == ""
        assert "own_task" not in sys.modules

    def test_a_kind_of_others_and_all_that_it_may_name(self) -> None:
        settings = {"kind": "theirs:Make", "deep": [{"x": "other:f"}, "plain text"]}
        assert list(code_in("t", settings)) == [
            ("t.kind", "theirs:Make"),
            ("t.deep[0].x", "other:f"),
        ]
        assert list(code_in("t", "theirs:score")) == [("t.kind", "theirs:score")]


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_evaluators_with_keyword_settings_of_known_types(kind: str) -> None:
    made = kinds._of_map_bo(kind)
    assert issubclass(made, ExampleEvaluator) or isinstance(made, DeclaresMetrics)
    parameters = inspect.signature(made).parameters.values()
    positional = [p.name for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert positional == (["score", "size"] if kind == "items" else [])
    assert set(kinds._hints(made)) >= {p.name for p in parameters}


@pytest.mark.parametrize("name", ["évil", "e-vil", "evil:x", "e vil"])
def test_nothing_is_imported_that_was_not_found_to_be_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be imported is what a record is judged by, so it must be the same."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    ran = tmp_path / "ran"
    (tmp_path / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')\ngrade = print\n")
    settings = {"kind": "generation", "data": "rows.csv", "grader": f"{name}:grade"}
    assert not list(code_in("t", settings))
    with pytest.raises(ConfigError, match=r"t\.grader must name a function"):
        evaluator_from("t", settings)
    assert not ran.exists()
