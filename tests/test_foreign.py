from __future__ import annotations

import os
from pathlib import Path

import pytest

from map_bo.errors import ConfigError, DataError
from map_bo.foreign import parse_json, parse_yaml, read_json, read_text, read_yaml, understood


def doubled(levels: int) -> str:
    """Return YAML of few lines that is nine times as large with each of them."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (doubled(9), "aliases repeat too much"),
        ("a: &a [*a]", r"alias \*a contains itself"),
        ("a: &a {b: *a}", r"alias \*a contains itself"),
        ("a: &a\n  - &b [*a]\n", "contains itself"),
        ("[" * 5000, "nested more than 100 deep"),
        ("- " * 5000 + "1", "nested more than 100 deep"),
        ("a: [", "expected the node content|while parsing"),
        ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: 2001-99-99", "month"),
        ("a: " + "1" * 5000, "digits|integer"),
        ("? [a]\n: b", "constructing a mapping"),
        ("a: *nothing", "undefined alias"),
    ],
)
def test_yaml_that_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


def test_yaml_that_is_read() -> None:
    assert parse_yaml("a: &x [1, 2]\nb: [*x, *x]\n") == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    assert parse_yaml(doubled(3))["a2"][0][0][0] == "x"
    assert parse_yaml("<<: {a: 1}\nb: 2") == {"a": 1, "b": 2}
    assert parse_yaml("") is None


def test_json_is_bounded() -> None:
    assert parse_json('{"a": [1, 1e400]}') == {"a": [1, float("inf")]}
    for text in ("[" * 100_000, '{"a":' * 100_000, "[1", "1" * 5000):
        with pytest.raises(ValueError, match=r"nested|Expecting|digits"):
            parse_json(text)


def test_only_regular_files_of_a_possible_size_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("[1]")
    assert (read_json(tmp_path / "a"), read_yaml(tmp_path / "a")) == ([1], [1])
    with pytest.raises(ValueError, match="it has 3 bytes, and 2 are the most"):
        read_text(tmp_path / "a", most=2)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    for name in ("pipe", "endless"):
        with pytest.raises(ValueError, match="not a regular file"):
            read_text(tmp_path / name)
    (tmp_path / "b").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="utf-8"):
        read_text(tmp_path / "b")


def test_what_malformed_data_raise_is_one_error() -> None:
    with (
        pytest.raises(DataError, match="the file cannot be read: KeyError: 'x'") as caught,
        understood(DataError, "the file", hint="restore it"),
    ):
        dict[str, int]()["x"]
    assert caught.value.hint == "restore it"
    assert isinstance(caught.value.__cause__, KeyError)
    for error in (ConfigError("mine"), FileNotFoundError("gone"), KeyboardInterrupt()):
        with pytest.raises(type(error)), understood(DataError, "the file", hint=""):
            raise error
