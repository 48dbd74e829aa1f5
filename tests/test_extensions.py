"""What installed packages register is found without an import, and trusted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from map_bo.errors import SettingsError
from map_bo.extensions import GROUPS, installed, is_registered, origin
from map_bo.plain import from_plain, to_plain
from tests.installed_package import forget, write_package


@pytest.fixture(autouse=True)
def theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(write_package(tmp_path / "site"))
    yield
    forget()


def test_entry_points_are_found_without_an_import() -> None:
    found = installed()
    assert set(found) == set(GROUPS)
    assert [point.value for point in found["sampler"]["halton"]] == ["their_package.parts:Halton"]
    assert len(found["sampler"]["twice"]) == 2
    assert "their_package" not in sys.modules


def test_registered_classes_are_built_from_files_without_further_trust() -> None:
    told = {"class": "their_package.parts:Halton", "fields": {"strength": 5}}
    made = from_plain(told)
    assert made.strength == 5
    assert from_plain(to_plain(made)) == made


def test_under_another_name_too() -> None:
    assert is_registered("their_package.parts", "Flat")  # registered as their_package:Flat
    assert from_plain({"class": "their_package.parts:Flat", "fields": {}}).link == "auto"


@pytest.mark.parametrize("name", ["their_package.parts:Other", "their_package.parts:Sobol2"])
def test_other_classes_of_the_package_are_not(name: str) -> None:
    with pytest.raises(SettingsError, match="their_package is not a package whose code"):
        from_plain({"class": name, "fields": {}})


def test_a_package_that_registers_nothing_is_not_loaded_for_it() -> None:
    assert not is_registered("os", "PathLike")
    assert "their_package" not in sys.modules


def test_the_package_is_told_by_its_name() -> None:
    [halton] = installed()["sampler"]["halton"]
    assert origin(halton) == "their-package"
