from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra.utils import instantiate
from omegaconf import OmegaConf

from map_bo.errors import MergeError, SettingsError
from map_bo.loop.settings import Settings
from map_bo.loop.stopping import Stop
from map_bo.moved import CLASSES
from map_bo.nested.settings import Nested
from map_bo.operators.sparse import Ties
from map_bo.operators.statistics.fisher import Fisher
from map_bo.plain import (
    flat,
    from_name,
    from_plain,
    identity_of,
    modernise,
    name_of,
    read_repr,
    to_plain,
)
from map_bo.problems.synthetic import ConcaveQuadratics
from map_bo.samplers.adaptive import Adaptive
from map_bo.samplers.designs.space_filling import Sobol
from map_bo.samplers.posterior.front_uncertainty import FrontUncertainty
from map_bo.samplers.posterior.hypervolume import QLogNEHVI
from map_bo.surrogates.auto import Auto
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic

CONF = Path(__file__).parents[1] / "conf"
FILES = [
    file
    for group in ("operator", "sampler", "surrogate", "solver")
    for file in sorted((CONF / group).glob("*.yaml"))
    if "_target_" in file.read_text()  # and is not another name of a file
]


@dataclass(frozen=True)
class Mine:
    """What a user's module may hold."""

    size: int = 1
    inner: Any = None


@dataclass(frozen=True)
class Holder:
    """Settings with fields of every kind."""

    value: Any


class NoDataclass:
    """Nothing that can be built from a file."""


HERE = [__name__]
SETTINGS = [
    Adaptive(),
    Adaptive(acquisition=FrontUncertainty(reference={"a b": -0.5, "c": 1e-17})),
    QLogNEHVI(surrogate=Quadratic(), initial=3),
    Auto(candidates=(("gp", GP()), ("flat", Quadratic(link="identity")))),
    Settings(budget=20, stop=Stop(patience=1), reference={"x": 0.5}),
    Nested(promote="point", preferences=({"a": 1.0},), budgets={"root": 9}, tasks={"a": ("x",)}),
    Ties(density=0.5, blocks={"a": "x", "rest": "*"}, search={"density": (0.1, 0.5)}),
    ConcaveQuadratics(d=2, m=2, noise=0.1),
]
VALUES = [
    None,
    True,
    3,
    0.1,
    "text",
    (1, (2.5, None), {"x": "y"}),
    {},
    (),
    {"class": "os:system", "fields": {}},
    {"path": 1, "_target_": 2},
    {1: "a", (2, 3): "b"},
    {"words": "said"},
    Path("here/there"),
    torch.float32,
    float("inf"),
]


def through_json(data: Any) -> Any:
    return json.loads(json.dumps(data))


@pytest.mark.parametrize("value", SETTINGS, ids=lambda value: type(value).__name__)
def test_settings_survive(value: Any) -> None:
    told = to_plain(value)
    assert from_plain(through_json(told)) == value
    assert from_plain(yaml.safe_load(yaml.safe_dump(told))) == value
    assert identity_of(value) == told


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_of_fields_survive(value: Any) -> None:
    again = from_plain(through_json(to_plain(Holder(value))), trust=HERE)
    assert again == Holder(value)
    assert type(again.value) is type(value)


def test_lists_come_back_as_tuples_and_numbers_of_other_libraries_as_numbers() -> None:
    numbers = torch.tensor([1.5]).numpy()
    assert from_plain(to_plain([1, [2]])) == (1, (2,))
    assert from_plain(to_plain(numbers[0])) == 1.5


def test_tensors_survive() -> None:
    tensor = torch.tensor([[1.0, float("inf")], [0.1, -3.0]], dtype=torch.float64)
    again = from_plain(to_plain(tensor))
    assert again.dtype == torch.float64
    assert torch.equal(again, tensor)


def composed(file: Path) -> Any:
    """Return the content of a configuration file, with the files of its group that it names."""
    node, parts = yaml.safe_load(file.read_text()), OmegaConf.create({})
    for name in node.pop("defaults", ()):
        name, _, place = name.partition("@")
        if place:
            OmegaConf.update(parts, place, OmegaConf.load(file.with_stem(name)), force_add=True)
    return OmegaConf.to_container(OmegaConf.merge(parts, node))


@pytest.mark.parametrize("file", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_everything_of_the_configuration_survives(file: Path) -> None:
    node = composed(file)
    made = instantiate(node, _convert_="all")
    again = from_plain(through_json(to_plain(made)))
    assert to_plain(again) == to_plain(made)
    assert to_plain(from_plain(node)) == to_plain(made)  # as Hydra writes it


def test_a_target_of_version_0_1_is_found_where_it_is_today() -> None:
    assert from_plain({"_target_": "map_bo.surrogates.gp.GP", "_convert_": "all"}) == GP()


def test_the_public_name_of_a_class_will_do() -> None:
    assert from_plain({"_target_": "map_bo.Ties", "density": 0.5}) == Ties(density=0.5)


def test_settings_within_a_target() -> None:
    inside = {"_target_": "map_bo.samplers.space_filling.Sobol", "anchors": False}
    made = from_plain({"_target_": "map_bo.samplers.hypervolume.QLogNEHVI", "design": inside})
    assert made == QLogNEHVI(design=Sobol(anchors=False))


class TestTrust:
    DATA: Mapping[str, Any] = {"class": f"{__name__}:Mine", "fields": {"size": 3}}

    def test_others_are_built_for_those_who_name_their_package(self) -> None:
        assert from_plain(self.DATA, trust=HERE) == Mine(3)
        assert from_plain(self.DATA, trust=[__name__.partition(".")[0]]) == Mine(3)

    @pytest.mark.parametrize("trust", [[], ["test"], ["map_bo"], [f"{__name__}.Mine"]])
    def test_and_refused_for_all_else_with_the_way_out(self, trust: list[str]) -> None:
        with pytest.raises(SettingsError, match="is not a package whose code is run") as caught:
            from_plain(self.DATA, trust=trust)
        assert f"--trust {__name__.partition('.')[0]}" in str(caught.value.hint)

    def test_within_settings_of_ours_too(self) -> None:
        data = to_plain(Adaptive(blocks=Mine()))  # type: ignore[arg-type]
        with pytest.raises(SettingsError, match="is not a package whose code is run"):
            from_plain(data)
        assert from_plain(data, trust=HERE) == Adaptive(blocks=Mine())  # type: ignore[arg-type]

    def test_nothing_is_imported_that_is_not_trusted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "trap.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n")
        monkeypatch.syspath_prepend(tmp_path)
        for data in (
            {"class": "trap:Trap", "fields": {}},
            {"_target_": "trap.Trap"},
            {"class": "map_bo.operators.sparse:Ties", "fields": {"blocks": {"_target_": "trap.T"}}},
            [{"mapping": [["x", {"class": "trap:Trap", "fields": {}}]]}],
        ):
            with pytest.raises(SettingsError, match="trap is not a package"):
                from_plain(data)
        assert not (tmp_path / "sprung").exists()
        assert "trap" not in sys.modules
        with pytest.raises(SettingsError, match="trap has no Trap"):
            from_plain({"class": "trap:Trap", "fields": {}}, trust=["trap"])
        assert (tmp_path / "sprung").exists()

    def test_a_dataclass_that_writes_files_is_not_built(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.safetensors"
        path.write_text("precious")
        for name in (
            "map_bo.merging.checkpoints.safetensors_files:SafetensorsWriter",
            "map_bo.operators.statistics.statistics:SafetensorsWriter",
        ):
            fields = {"path": {"path": str(path)}, "layouts": {}, "metadata": {}}
            with pytest.raises(SettingsError, match="cannot be built"):
                from_plain({"class": name, "fields": fields})
        assert path.read_text() == "precious"

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({"class": "os:system", "fields": {}}, "os is not a package"),
            ({"class": "subprocess:Popen", "fields": {"args": "x"}}, "subprocess is not a package"),
            ({"class": "map_bo.nowhere:Nothing", "fields": {}}, "map_bo.nowhere has no settings"),
            ({"class": "map_bo.samplers.nowhere:Nothing", "fields": {}}, "No module named"),
            ({"class": "map_bo.rng:make_generator", "fields": {"seed": 1}}, "rng has no settings"),
            ({"class": "map_bo.operators.sparse:number", "fields": {}}, "not a dataclass"),
            # What one of our modules only imported is not ours.
            (
                {"class": "map_bo.operators.statistics.statistics:Path", "fields": {}},
                "not a dataclass",
            ),
            ({"class": "map_bo.operators.sparse:torch.Tensor", "fields": {}}, "not a dataclass"),
            ({"class": "map_bo.operators.sparse:Ties.name", "fields": {}}, "not a dataclass"),
            ({"class": "map_bo.operators.sparse:Ties.__init__", "fields": {}}, "not a dataclass"),
            ({"class": "map_bo.operators.sparse", "fields": {}}, "not the name of a class"),
            ({"class": "map_bo/../x:Y", "fields": {}}, "not the name of a class"),
            ({"class": "__main__:f.<locals>.Y", "fields": {}}, "not the name of a class"),
            ({"class": None, "fields": {}}, "not the name of a class"),
            ({"fields": {}}, "not the name of a class"),
            ({"class": "map_bo.operators.sparse:Ties"}, "not a mapping"),
            ({"class": "map_bo.operators.sparse:Ties", "fields": [1]}, "not a mapping"),
            ({"class": "map_bo.surrogates.auto:Auto", "fields": {"lnik": 1}}, "no field 'lnik'"),
            ({"class": "map_bo.loop.settings:Settings", "fields": {}}, "cannot be built"),
            ({"_target_": "Sobol"}, "not the name of a class"),
            ({"_target_": "map_bo.digits_problem"}, "not a dataclass"),
            ({"_target_": "map_bo.surrogates.auto.Auto", "_partial_": True}, "no field"),
            ({"words": "mine.Mine()"}, "recorded in words alone"),
            ({"dtype": "Tensor"}, "there is no dtype"),
            ({"tensor": [[1], [2, 3]], "dtype": "float32"}, "cannot be read"),
            ({"tensor": [1]}, "does not write"),
            ({"mapping": 3}, "cannot be read"),
            ({"mapping": [[["a"], {"b": []}], [{}, 1]]}, "cannot be read"),
            ({"path": 3}, "does not write"),
        ],
    )
    def test_a_file_cannot_name_anything_else(self, data: dict[str, Any], message: str) -> None:
        with pytest.raises(SettingsError, match=message) as caught:
            from_plain(data)
        assert caught.value.hint

    def test_a_dataclass_that_is_only_imported_there_is_not_ours(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("map_bo.operators.sparse.Mine", Mine, raising=False)
        with pytest.raises(SettingsError, match=r":Mine cannot be built: .* is not a package"):
            from_plain({"class": "map_bo.operators.sparse:Mine", "fields": {}})

    def test_nesting_without_end(self) -> None:
        data: Any = 1
        for _ in range(100_000):
            data = [data]
        with pytest.raises(SettingsError, match="nested too deeply"):
            from_plain(data)

    def test_values_that_the_settings_refuse_are_their_own_errors(self) -> None:
        with pytest.raises(MergeError, match="density must be a number between 0 and 1"):
            from_plain({"class": "map_bo.operators.sparse:Ties", "fields": {"density": 7}})


@pytest.mark.parametrize(
    "value",
    [object(), NoDataclass(), Sobol, len, QLogNEHVI(design=NoDataclass()), {1j}],  # type: ignore[arg-type]
)
def test_what_is_no_settings_is_refused_or_put_in_words(value: object) -> None:
    with pytest.raises(SettingsError, match="cannot be written as plain data"):
        to_plain(value)
    told = identity_of(value)
    assert through_json(told) == told
    with pytest.raises(SettingsError, match="recorded in words alone"):
        from_plain(told, trust=HERE)


def test_a_class_that_cannot_be_imported_is_refused_or_put_in_words() -> None:
    @dataclass(frozen=True)
    class Local:
        size: int = 1

    with pytest.raises(SettingsError, match="only be imported where it was defined"):
        to_plain(Local())
    assert identity_of(Local(2))["words"].endswith("Local(size=2)")


@pytest.mark.slow
def test_identities_are_the_same_in_every_process() -> None:
    code = (
        "import json, torch; from map_bo.plain import identity_of; from tests.test_plain import *;"
        "print(json.dumps([identity_of(v) for v in WORDS], sort_keys=True))"
    )
    done = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=CONF.parent,
        ).stdout
        for _ in range(2)
    ]
    assert done[0] == done[1] == json.dumps([identity_of(v) for v in WORDS], sort_keys=True) + "\n"
    assert " at 0x" not in done[0]


def _function() -> None: ...


@dataclass(frozen=True)
class Described:
    """What says itself by what it is recognised."""

    data: Callable[[], None] = field(default=_function)

    def describe(self) -> dict[str, Any]:
        return {"content": "known"}


WORDS = [
    NoDataclass(),
    _function,
    Mine,
    Mine(inner=_function),
    Holder({"f": [_function, NoDataclass()]}),
    Holder(torch.arange(1000)),
]


def test_large_tensors_are_recognised_by_a_digest() -> None:
    one, other = torch.arange(1000), torch.arange(1000)
    other[-1] = 0
    assert identity_of(one) != identity_of(other)
    assert len(json.dumps(identity_of(one))) < 200


def test_what_describes_itself_does_so_wherever_it_stands() -> None:
    told = identity_of(Holder((Described(),)))
    assert told["fields"] == {"value": [{"content": "known"}]}


class TestNames:
    def test_the_names_of_version_0_1_lead_to_classes(self) -> None:
        for name in CLASSES.values():
            module, _, qualname = name.partition(":")
            assert vars(import_module(module))[qualname].__qualname__ == qualname

    def test_operators_that_were_told_by_name(self) -> None:
        told = {"name": "ties", "density": 0.5, "blocks": {"class": "x", "rest": "*"}, "search": []}
        made = from_plain(from_name(told))
        assert made == Ties(density=0.5, blocks={"class": "x", "rest": "*"})
        for other in ({"name": "magic"}, to_plain(made), {"density": 1}, "ties"):
            assert from_name(other) is other

    @pytest.mark.parametrize(
        ("data", "name"),
        [
            (to_plain(Sobol()), "Sobol"),
            (repr(Sobol()), "Sobol"),
            ({"words": "package.module.Mine(size=1)"}, "Mine"),
            ("package.module.Mine", "Mine"),
            (None, ""),
            ({}, ""),
        ],
    )
    def test_short_names(self, data: Any, name: str) -> None:
        assert name_of(data) == name


class TestRecordsOfVersion01:
    @pytest.mark.parametrize("value", SETTINGS, ids=lambda value: type(value).__name__)
    def test_a_repr_means_the_same(self, value: Any) -> None:
        assert modernise(repr(value), identity_of(value)) == identity_of(value)

    def test_every_change_is_seen(self) -> None:
        now = identity_of(Adaptive())
        for other in (
            Adaptive(acquisition=FrontUncertainty(draws=9)),
            Adaptive(acquisition=FrontUncertainty(reference={"a": 0.0})),
            FrontUncertainty(),
            Sobol(),
        ):
            assert modernise(repr(other), now) != now

    def test_fields_that_came_later_have_their_defaults(self) -> None:
        now = identity_of(Mine(inner=None))
        assert modernise("Mine(size=1)", now) == now
        assert modernise("Mine(size=1)", identity_of(Mine(inner=2))) == now
        assert modernise("Mine(size=1, gone=2)", now) != now
        assert modernise("Mine(1)", now) == now

    def test_fields_alone_and_with_a_kind(self) -> None:
        problem = ConcaveQuadratics(d=2, m=3)
        now = identity_of(problem)
        told = {"d": 2, "m": 3, "seed": 0, "noise": 0.0, "conditioning": 4.0}
        assert modernise({"kind": "concave_quadratics", **told}, now) == now
        assert modernise(told, now) == now
        assert modernise({"kind": "sigmoid_quadratics", **told}, now) != now
        assert modernise({"kind": "concave_quadratics", **told, "d": 3}, now) != now
        assert modernise({"type": "ConcaveQuadratics"}, now) == now
        assert modernise({"type": "Another"}, now) != now

    def test_modules_that_moved(self) -> None:
        now = identity_of(Sobol())
        old = {"class": "map_bo.samplers.space_filling:Sobol", "fields": {"anchors": True}}
        assert modernise(old, now) == now
        other = {"class": "mine:Sobol", "fields": {"anchors": True}}
        assert modernise(other, now) != now

    def test_operators_that_moved_are_built(self) -> None:
        now = Fisher(floor=0.5)
        told = identity_of(now)
        assert told["class"] == "map_bo.operators.statistics.fisher:Fisher"
        assert from_plain({**told, "class": "map_bo.operators.fisher:Fisher"}) == now

    def test_words(self) -> None:
        assert modernise("mine.Sampler", {"words": "mine.Sampler"}) == {"words": "mine.Sampler"}

    @pytest.mark.parametrize(
        "text",
        ["auto", "f(", "__import__('os')", "a.b()", "[x for x in y]", "f(**x)", "f(*x)", "1 + 1"],
    )
    def test_other_texts_stay_as_they_are(self, text: str) -> None:
        told = read_repr(text)
        assert told == text or told["class"] == "__import__"  # nothing was called

    def test_numbers_and_containers(self) -> None:
        told = read_repr(
            "A(-1, x=(1, [2.5, None]), y={'a': inf}, z=torch.float32, w=mappingproxy({}))"
        )
        assert told == {
            "class": "A",
            "fields": {
                0: -1,
                "x": [1, [2.5, None]],
                "y": {"a": float("inf")},
                "z": {"dtype": "float32"},
                "w": {},
            },
        }


def test_flat_names_and_values() -> None:
    told = flat(identity_of(QLogNEHVI(initial=3, reference={"a": 1.0})), "sampler")
    assert told["sampler"] == "map_bo.samplers.posterior.hypervolume:QLogNEHVI"
    assert told["sampler.initial"] == 3
    assert told["sampler.reference.a"] == 1.0
    assert told["sampler.design"] == "map_bo.samplers.designs.space_filling:Sobol"
    short = flat({"words": "x"}, "a") | flat(identity_of(Sobol()), "b", modules=False)
    assert short == {"a": "x", "b": "Sobol", "b.anchors": True}
