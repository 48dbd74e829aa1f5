"""Every file under conf/ composes; every experiment runs in a smoke size; wrong keys are told."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict

from map_bo.app.build import (
    build_nested,
    build_problem,
    build_settings,
    build_tracking,
    working_directory,
)
from map_bo.app.jobs import RENAMED
from map_bo.app.schema import register
from map_bo.constraints import AtLeast, AtMost
from map_bo.errors import ConfigError, DataError, SamplerError
from map_bo.loop.mirrors import Local
from map_bo.loop.run import Run
from map_bo.loop.settings import Settings
from map_bo.loop.stopping import Stop
from map_bo.nested.optimize import nested_run
from map_bo.nested.settings import Nested
from map_bo.plain import to_plain
from map_bo.samplers.adaptive import Adaptive
from map_bo.surrogates.feasibility import Requirements
from map_bo.surrogates.outliers import Screened
from map_bo.surrogates.processes.gp import GP
from map_bo.surrogates.quadratic import Quadratic
from map_bo.tracking.jsonl import MemoryStore
from map_bo.tracking.tracker import Tracking
from map_bo.tracking.wandb.mirror import Wandb
from map_bo.workers.dask import Dask
from map_bo.workers.processes import Processes
from map_bo.workers.ray import Ray
from map_bo.workers.resident import identity_of_problem

CONF = Path(__file__).parents[2] / "conf"
GROUPS = {
    group.name: sorted(
        path.stem for path in group.glob("*.yaml") if (group.name, path.stem) not in RENAMED
    )
    for group in CONF.iterdir()
    if group.is_dir() and list(group.glob("*.yaml"))
}


# Of models of the hub; run by tests/integration/test_suites.py on stand-ins in a folder.
OF_FILES = {"checkpoints", "hf", "images", "clip_eight", "glue_flan_t5", "glue_gpt2"}
OF_FILES |= {"text", "decoder", "told"}  # told: has neither names nor metrics of its own
OF_SUITES = {"clip_b32", "clip_b16", "clip_l14", "flan_t5_glue", "flan_t5_glue_lora"}
OF_SUITES |= {"flan_t5_large_glue_lora", "gpt2_glue"}


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    register()
    with initialize_config_module("map_bo.conf", version_base="1.3"):
        yield


def composed(*overrides: str) -> DictConfig:
    return compose("config", overrides=list(overrides))


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group, names in GROUPS.items() for name in names]
)
def test_every_file_composes(group: str, name: str) -> None:
    config = composed(f"{group}={name}")
    assert config.loop.budget >= 1
    if group == "tracking":  # several may be chosen, each a node of its own
        assert set(config.tracking) == {name} - {"none"}
    elif (group, name) in (("nested", "none"), ("workers", "inline")):
        assert not config[group]
    elif group != "experiment":
        assert "_target_" in config[group]


@pytest.mark.parametrize("name", sorted(set(GROUPS["problem"]) - OF_FILES))
def test_every_problem_builds(name: str, zoo_cache: Path) -> None:
    small = ["problem.epochs=1"] if name == "digits" else []
    problem = build_problem(composed(f"problem={name}", *(f"+{key}" for key in small)))
    assert problem.space.d >= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPS["operator"])
def test_digits_build_with_every_operator(name: str, zoo_cache: Path) -> None:
    problem = build_problem(composed(f"operator={name}", "problem.experts=2", "+problem.epochs=1"))
    assert problem.space.d >= 2


def test_workers_are_built_with_the_problem_s_configuration_as_their_recipe() -> None:
    assert build_settings(composed()).workers is None
    settings = build_settings(composed("workers=processes", "workers.count=3", "problem=bumps"))
    assert isinstance(settings.workers, Processes)
    assert (settings.workers.count, settings.workers.threads) == (3, None)
    recipe = settings.workers.recipe
    assert recipe is not None
    built, mine = recipe.build(), build_problem(composed("problem=bumps"))
    assert identity_of_problem(built) == identity_of_problem(mine)


def test_workers_of_a_cluster_are_built_with_it_too() -> None:
    ray = build_settings(composed("workers=ray", "workers.count=3", "problem=bumps")).workers
    assert isinstance(ray, Ray)
    assert (ray.count, ray.gpus_per_worker, ray.recipe is None) == (3, 0, False)
    words = ("workers=dask", "workers.address=tcp://h:1", "workers.resources={GPU: 1}")
    dask = build_settings(composed(*words, "problem=bumps")).workers
    assert isinstance(dask, Dask)
    assert (dask.address, dask.count, dask.recipe is None) == ("tcp://h:1", None, False)
    assert type(dask.resources) is dict


def test_a_run_recorded_before_there_were_workers_has_none() -> None:
    plain = OmegaConf.to_container(composed(), resolve=True)
    assert isinstance(plain, dict)
    del plain["workers"]
    assert build_settings(OmegaConf.create(plain)).workers is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["workers=ray", "workers.count=0"], "count must be .*got 0"),
        (["workers=dask"], "by its address or by its scheduler file, got neither"),
        (["workers=processes", "workers.count=0"], "count must be .*got 0"),
        (["workers=processes", "workers.devices=[gpu]"], "'gpu' is not a device"),
        (["workers=processes", "+workers.cuont=3"], "has no option 'cuont'"),
        (["+workers._target_=map_bo.Metric", "+workers.name=m"], "builds a Metric"),
    ],
)
def test_wrong_workers_are_told(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_settings(composed(*overrides))


@pytest.mark.parametrize("group", ["surrogate", "sampler", "solver"])
def test_every_part_builds(group: str) -> None:
    for name in GROUPS[group]:
        # The published fit has no uncertainty that the default sampler could look through.
        other = ["sampler=sobol"] if (group, name) == ("surrogate", "published") else []
        assert isinstance(build_settings(composed(f"{group}={name}", *other)), Settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(GROUPS["experiment"]) - OF_SUITES))
def test_every_experiment_runs_in_a_smoke_size(name: str, zoo_cache: Path) -> None:
    config = composed(f"experiment={name}", "+problem.epochs=1", "loop.budget=8")
    OmegaConf.update(config, "problem.experts", min(3, config.problem.experts))
    if "points" in config.solver:
        OmegaConf.update(config, "solver.points", 30)
    nested = build_nested(config)
    if nested is None:
        result = Run(build_problem(config), build_settings(config), MemoryStore()).drive()
    else:
        config.loop.budget = 12
        problem, settings = build_problem(config), build_settings(config)
        result = nested_run(problem, settings, nested, MemoryStore()).drive()
    assert len(result.front) >= 1


@pytest.mark.parametrize("name", GROUPS["experiment"])
def test_every_experiment_has_its_command_in_its_header(name: str) -> None:
    header = (CONF / "experiment" / f"{name}.yaml").read_text().split("\n\n")[0]
    assert f"map-bo run experiment={name}" in header


@pytest.mark.parametrize(("group", "old"), RENAMED)
def test_an_old_name_is_the_new_one(group: str, old: str) -> None:
    assert composed(f"{group}={old}") == composed(f"{group}={RENAMED[group, old]}")


def test_the_sampler_can_have_every_surrogate_that_a_run_can() -> None:
    folder = CONF / "sampler" / "surrogate"
    assert sorted(path.stem for path in folder.glob("*.yaml")) == GROUPS["surrogate"]
    for name in GROUPS["surrogate"]:
        config = composed("sampler=ucb", f"sampler/surrogate={name}")
        assert config.sampler.surrogate == composed(f"surrogate={name}").surrogate
        head, other = (
            (CONF / place / f"{name}.yaml").read_text().split("\n")[0]
            for place in ("surrogate", "sampler/surrogate")
        )
        assert head == other  # what it is, in one line


def test_constraints_are_written_as_one_reads_them() -> None:
    settings = build_settings(composed("loop.constraints={safe: '>= 0.9', film: '<= 1.7'}"))
    assert settings.constraints == (AtLeast("safe", 0.9), AtMost("film", 1.7))
    listed = build_settings(composed("loop.constraints=['safe >= 0.9']", "loop.failures=ignore"))
    assert listed.requirements == Requirements("ignore", constraints=(AtLeast("safe", 0.9),))
    assert build_settings(composed()).constraints is None
    with pytest.raises(ConfigError, match="failures must be"):
        build_settings(composed("loop.failures=forget"))


def test_a_surrogate_of_the_samplers_own_comes_before_that_of_the_run() -> None:
    settings = build_settings(composed("surrogate=gp"))
    assert settings.sampler == Adaptive()
    assert settings.run_sampler == Adaptive(surrogate=Screened(GP()))
    own = ["surrogate=gp", "sampler/surrogate=quadratic", "+sampler.surrogate.link=identity"]
    settings = build_settings(composed(*own))
    assert settings.run_sampler == Adaptive(surrogate=Screened(Quadratic(link="identity")))
    with pytest.raises(ConfigError, match="sampler has no option 'surrogate'"):
        build_settings(composed("sampler=sobol", "sampler/surrogate=gp"))
    with pytest.raises(SamplerError, match="PublishedQuadratic does not leave evaluations out"):
        build_settings(composed("sampler=bins", "surrogate=published"))


SWEPT = [name for name in GROUPS["experiment"] if name.startswith("ablation_")]


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEPT)
def test_every_value_that_a_study_sweeps_over_composes_and_builds(name: str) -> None:
    study = yaml.safe_load((CONF / "experiment" / f"{name}.yaml").read_text())
    swept = study["hydra"]["sweeper"]["params"]
    assert swept.pop("seed") == "range(10)"
    parsed = OverridesParser.create().parse_overrides([f"{k}={v}" for k, v in swept.items()])
    options = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        for one in parsed
    ]
    for overrides in itertools.product(*options):
        config = composed(f"experiment={name}", *overrides)
        assert isinstance(build_settings(config), Settings)
        assert build_nested(config) is None or isinstance(build_nested(config), Nested)
        for override in overrides:
            key, _, value = override.partition("=")
            if key not in GROUPS:  # a plain value
                assert OmegaConf.select(config, key) == yaml.safe_load(value.replace(":", ": "))


def test_the_old_name_of_promote_is_still_an_option() -> None:
    with pytest.warns(DeprecationWarning, match="is now nested.promote"):
        nested = build_nested(composed("nested=fronts", "nested.hand_up=surrogate"))
    assert nested == build_nested(composed("nested=fronts", "nested.promote=surrogate"))


@pytest.mark.parametrize("name", sorted(set(GROUPS["nested"]) - {"none", "by_hand"}))
def test_every_way_of_nesting_builds(name: str) -> None:
    assert isinstance(build_nested(composed(f"nested={name}")), Nested)


def test_a_tree_by_hand_has_to_be_given() -> None:
    with pytest.raises(ConfigError, match=r"nested\.tree|Missing mandatory"):
        build_nested(composed("nested=by_hand"))
    tree = "nested.tree=[[rot90,invert],[flip,permute]]"
    built = build_nested(composed("nested=by_hand", tree))
    assert built is not None
    assert built.tree == [["rot90", "invert"], ["flip", "permute"]]


def test_the_composed_defaults_are_those_of_the_settings() -> None:
    loop: Any = OmegaConf.to_container(composed().loop)
    fresh = Settings(budget=24)
    parts = {"seed", "sampler", "surrogate", "solver", "workers"}
    assert set(loop) == {one.name for one in fields(Settings)} - parts
    # A rule is a node of its own; without a criterion it is no rule.
    assert loop.pop("stop") == {**asdict(Stop()), "criterion": None}
    assert fresh.stop is None
    assert loop == {key: getattr(fresh, key) for key in loop}
    assert composed().seed == fresh.seed
    built = build_settings(composed())
    assert [getattr(built, key) for key in loop] == [getattr(fresh, key) for key in loop]
    assert to_plain(built.surrogate) == to_plain(fresh.surrogate)
    assert to_plain(built.sampler) == to_plain(fresh.sampler)
    assert to_plain(built.solver) == to_plain(fresh.solver)


def test_the_configuration_repeats_no_default_and_describes_every_option() -> None:
    text = (CONF / "config.yaml").read_text()
    assert yaml.safe_load(text)["loop"] == {"budget": 24}
    described = set(re.findall(r"^#   (loop[.\w]*) {2,}\S", text, re.MULTILINE)) | {"loop.budget"}
    options = {f"loop.{one.name}" for one in fields(Settings)}
    options -= {f"loop.{name}" for name in ("seed", "sampler", "surrogate", "solver", "workers")}
    assert described == options | {f"loop.stop.{one.name}" for one in fields(Stop)}


def test_the_types_of_the_schema_are_those_of_the_settings() -> None:
    for wrong in ("loop.batch=many", "loop.guard=3.5", "loop.stop.patience=x", "loop.timeout=soon"):
        with pytest.raises(ConfigCompositionException):
            composed(wrong)
    assert composed("loop.timeout=3").loop.timeout == 3.0
    assert composed("loop.reference={a: 1}").loop.reference == {"a": 1}
    with pytest.raises(ConfigCompositionException):
        composed("loop.bacth=2")


@pytest.mark.parametrize(
    ("overrides", "stop"),
    [
        ([], None),
        (["loop.stop=null"], None),
        (["loop.stop.criterion=regret"], Stop()),
        (
            ["loop.stop.criterion=hypervolume", "loop.stop.tolerance=0.02", "loop.stop.least=9"],
            Stop("hypervolume", 0.02, least=9),
        ),
        (["loop.stop={criterion: regret, patience: 3}"], Stop(patience=3)),
    ],
)
def test_a_stopping_rule_is_configured(overrides: list[str], stop: Stop | None) -> None:
    assert build_settings(composed(*overrides)).stop == stop


def test_a_wrong_stopping_rule_is_told() -> None:
    with pytest.raises(ConfigCompositionException, match="tolerence"):
        composed("loop.stop.tolerence=0.01")
    with pytest.raises(ConfigError, match="no stopping criterion 'regrets'") as caught:
        build_settings(composed("loop.stop.criterion=regrets"))
    assert "did you mean 'regret'?" in (caught.value.hint or "")
    with pytest.raises(ConfigError, match=r"stop\.tolerance is given and stop\.criterion"):
        build_settings(composed("loop.stop.tolerance=0.01"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+problem.expertz=3"], "problem has no option 'expertz'"),
        (["problem._target_=map_bo.nowhere.Nothing"], "cannot be imported"),
    ],
)
def test_a_wrong_key_is_told(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_problem(composed(*overrides))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], [Local()]),
        (["tracking=none"], []),
        (["tracking=[]"], []),
        (["tracking=local"], [Local()]),
        (["tracking=wandb"], [Wandb()]),
        (
            ["tracking=[local,wandb]", "tracking.wandb.tags=[a]", "tracking.wandb.mode=offline"],
            [Local(), Wandb(tags=("a",), mode="offline")],
        ),
    ],
)
def test_trackers_are_combined(overrides: list[str], expected: list[Tracking]) -> None:
    assert build_tracking(composed(*overrides)) == expected


def test_a_run_recorded_before_there_were_trackers_has_the_local_files() -> None:
    config = composed()
    with open_dict(config):
        del config["tracking"]
    assert build_tracking(config) == [Local()]


@pytest.mark.parametrize(
    ("overrides", "message", "hint"),
    [
        (["tracking=wandb", "+tracking.wandb.projekt=x"], "no option 'projekt'", "project"),
        (
            ["tracking=wandb", "tracking.wandb.mode=of"],
            r"mode of wandb must be .*, got 'of'",
            "offline",
        ),
        (["+tracking.mine={a: 1}"], "tracking.mine has no _target_", "tracking=NAME"),
        (
            ["+tracking.mine={_target_: map_bo.rng.make_generator, seed: 3}"],
            r"tracking\.mine must build a tracker, and builds a Generator",
            "tracking=none, local, wandb",
        ),
    ],
)
def test_a_wrong_tracker_is_told(overrides: list[str], message: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_tracking(composed(*overrides))
    assert hint in str(caught.value.hint)


def test_what_is_not_a_problem_is_told() -> None:
    config = composed()
    config.problem = {"_target_": "map_bo.rng.make_generator", "seed": 3}
    with pytest.raises(ConfigError, match=r"must build a problem, and .* builds a Generator"):
        build_problem(config)


def test_the_problems_own_errors_pass_through() -> None:
    with pytest.raises(DataError, match="2"):
        build_problem(composed("problem.experts=40"))


def test_a_typo_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError) as caught:
        build_settings(composed("+sampler.anchor=true"))
    assert "sampler" in caught.value.message
    with pytest.raises(ConfigError) as caught:
        build_settings(composed("sampler=sobol", "+sampler.anchor=true"))
    assert caught.value.hint == "did you mean 'sampler.anchors'?"


def test_the_working_directory_is_restored(tmp_path: Path) -> None:
    before = Path.cwd()
    with pytest.raises(ValueError, match="inside"), working_directory(tmp_path):  # noqa: PT012
        assert Path.cwd() == tmp_path.resolve()
        raise ValueError("inside")
    assert Path.cwd() == before
    with working_directory(tmp_path / "gone"):
        assert Path.cwd() == before


@pytest.mark.parametrize(
    ("problem", "key"),
    [
        *(
            (problem, "fixed")
            for problem in ("digits", "images", "text", "decoder", "checkpoints", "hf")
        ),
        *((problem, key) for problem in ("checkpoints", "hf") for key in ("metrics", "heads")),
    ],
)
@pytest.mark.parametrize("form", ["problem.{}={{math: 1}}", "+problem.{}.math=1"])
def test_mappings_of_problems_are_given_whole_or_by_entry(
    problem: str, key: str, form: str
) -> None:
    overrides = [f"problem={problem}", "problem.base=b"][: 1 + (problem in ("checkpoints", "hf"))]
    config = compose("config", overrides=[*overrides, form.format(key)])
    assert config.problem[key] == {"math": 1}


def test_options_of_a_choice_are_files_of_the_group(zoo_cache: Path) -> None:
    config = composed(
        "operator=choice",
        "operator.options.ties.election=count",
        "+operator@operator.options.slerp=slerp",
        "~operator.options.dare",
        "problem.experts=2",
        "+problem.epochs=1",
    )
    space = build_problem(config).space
    assert space.choice is not None
    assert space.choice.options == ("task_arithmetic", "ties", "slerp")
    assert space.choice.owners == {"ties.density": "ties"}
    told = to_plain(build_problem(config)._operator)["fields"]["options"]  # type: ignore[attr-defined]
    assert told["ties"]["fields"]["election"] == "count"


def test_a_wrong_key_of_an_option_is_told_with_its_place(zoo_cache: Path) -> None:
    config = composed("operator=choice", "+operator.options.ties.densty=0.3", "problem.experts=2")
    with pytest.raises(ConfigError, match=r"operator\.options\.ties has no option 'densty'"):
        build_problem(config)


def test_an_option_is_fixed_by_name(zoo_cache: Path) -> None:
    fixed = ("problem.fixed={operator: ties, rot90: 1}", "problem.experts=2", "+problem.epochs=1")
    space = build_problem(composed("operator=choice", *fixed)).space
    assert space.fixed == {"rot90": 1.0, "operator": 1.0}
