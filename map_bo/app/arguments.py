"""Commands and options of the console script, except for those that Hydra reads."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from map_bo.app.init import init_options, is_file
from map_bo.app.merge import merge_options
from map_bo.app.runs.measuring import confirm_options
from map_bo.errors import ConfigError

__all__ = [
    "Command",
    "pairs",
    "parser",
    "require_distinct_jobs",
    "surrogate_of_sampler",
    "with_added_key",
    "with_bare_trust",
    "with_configuration",
    "with_options_last",
    "with_workers",
]

Command = Callable[[argparse.Namespace], None]
"""Carries out a command with its options."""

_DESCRIPTION = "Find the Pareto front of merging fine-tuned models, for a handful of evaluations."
_EPILOG = """\
examples:
  map-bo run                                            four digit experts, no set-up needed
  map-bo run problem=digits problem.experts=6 loop.budget=30 seed=3
  map-bo init BASE --expert math=MODEL --task math=KIND:DATA   your own models, without Python
  map-bo run map_bo.yaml                                what `init` has written
  map-bo run -m surrogate=quadratic,gp seed=0,1,2       a sweep and the comparison of its runs
  map-bo report SWEEP                                   write that comparison again
  map-bo choose RUN --prefer rot90=2 --at-least flip=0.6
  map-bo merge RUN --prefer rot90=2 --out merged
  map-bo confirm RUN --prefer rot90=2                   on examples that the search never saw
  map-bo run map_bo.yaml workers=4                      four evaluations at a time
  map-bo resume RUN                                     continue after any interruption
  map-bo resume RUN loop.budget=48                      extend it, also when it has finished
  map-bo ask RUN -n 4 --json                            points for a cluster of your own
  map-bo tell RUN 3 --json '{"rot90": 0.61, "flip": 0.7}'
  map-bo export RUN --to ax.db                          the run as an Ax experiment
  map-bo check RUN                                      whether its record is whole
  map-bo outcomes RUN --out outcomes.csv                the outcome of every example

`map-bo run --help` lists the configuration groups and their options.
"""


def parser(functions: Mapping[str, Command]) -> argparse.ArgumentParser:
    """Return the parser of all commands.

    Args:
        functions: Command -> its function, which is ``command`` of the parsed options. ``run``
            takes Hydra's overrides instead and is here only for its help.
    """
    from map_bo import __version__

    top = argparse.ArgumentParser(
        prog="map-bo",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"map-bo {__version__}")
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    commands.add_parser(
        "run", help="find a front; takes a FILE.yaml and Hydra overrides (see map-bo run --help)"
    )

    text = "write a configuration for your models and data, and try it out"
    init = commands.add_parser("init", help=text, description=text)
    init_options(init)
    init.set_defaults(command=functions["init"])

    resume = _command(
        commands,
        "resume",
        "continue an interrupted run, or extend one that has finished",
        functions["resume"],
    )
    resume.add_argument(
        "overrides",
        nargs="*",
        metavar="KEY=VALUE",
        help="settings from now on, such as loop.budget=48 loop.timeout=600 tracking=wandb",
    )
    resume.add_argument(
        "--retry-failed", action="store_true", help="repeat the evaluations that failed"
    )
    _trust_option(resume)

    asking = _command(
        commands,
        "ask",
        "propose points of a run that is evaluated elsewhere, and record that they wait",
        functions["ask"],
    )
    asking.add_argument(
        "-n", dest="count", type=int, default=1, metavar="N", help="how many (default: 1)"
    )
    asking.add_argument(
        "--waiting", action="store_true", help="list the rows that wait instead of proposing some"
    )
    asking.add_argument("--json", action="store_true", help="print the rows as JSON")
    _trust_option(asking)

    telling = _command(
        commands, "tell", "record what was measured at a row that waits", functions["tell"]
    )
    telling.add_argument("row", type=int, metavar="ROW", help="number of the row")
    telling.add_argument(
        "--json",
        required=True,
        metavar="OUTCOME",
        help="""'{"METRIC": VALUE, ...}', where a value may be {"value": V, "variance": S, """
        """"n": N}; or '{"failed": "reason"}'; a file that holds it; or - for standard input""",
    )
    _trust_option(telling)

    choose = _command(
        commands, "choose", "choose a point of the front by preference", functions["choose"]
    )
    _choice_options(choose)
    choose.add_argument("--json", action="store_true", help="print the choice as JSON")
    _measure_option(choose)

    merge = _command(
        commands, "merge", "write the merged model of a point of the front", functions["merge"]
    )
    _choice_options(merge)
    _measure_option(merge)
    merge_options(merge)

    confirm = _command(
        commands,
        "confirm",
        "measure a choice, the uniform blend, the experts and the base on examples that the "
        "search never saw",
        functions["confirm"],
    )
    _choice_options(confirm)
    confirm_options(confirm)

    report = _command(
        commands,
        "report",
        "write the report of a run or sweep again, or compare several runs",
        functions["report"],
    )
    report.add_argument("more", nargs="*", metavar="RUN", help="further runs or sweeps to compare")
    report.add_argument(
        "--out", metavar="DIR", help="where to write (default: RUN; of several: comparison)"
    )
    report.add_argument(
        "--normalised",
        action="store_true",
        help="of a single run, also show scores as shares of those of each task's own expert",
    )
    report.add_argument(
        "--baseline", metavar="VARIANT", help="variant that the others are compared with"
    )
    report.add_argument(
        "--wandb", action="store_true", help="also publish the comparison as a W&B Report"
    )
    report.add_argument(
        "--wandb-project",
        metavar="[ENTITY/]PROJECT",
        help="project of the runs, if not the one that they were recorded in",
    )

    export = _command(commands, "export", "write a run as an Ax experiment", functions["export"])
    export.add_argument("--to", required=True, metavar="FILE", help="SQLite file to write (new)")
    export.add_argument("--name", help="name of the experiment (default: the run directory's)")

    text = "record the trials of an Ax experiment in a run"
    taking = commands.add_parser("import", help=text, description=text)
    taking.add_argument("database", metavar="FILE", help="SQLite file of Ax")
    taking.add_argument("--into", required=True, metavar="RUN", help="directory of a run")
    taking.add_argument("--name", help="name of the experiment, when the file holds several")
    taking.set_defaults(command=functions["import"])

    _command(
        commands,
        "check",
        "check the record of a run for damage, and say what can be saved",
        functions["check"],
    )
    repair = _command(
        commands,
        "repair",
        "keep the whole lines of a damaged record, and a copy of the damaged file",
        functions["repair"],
    )
    repair.add_argument(
        "--append", metavar="FILE", help="add events that were printed for lack of room"
    )

    outcomes = _command(
        commands,
        "outcomes",
        "write the outcome of every example in every evaluation of a run as a table",
        functions["outcomes"],
    )
    outcomes.add_argument(
        "--out", required=True, metavar="FILE", help="file that ends in .csv, .csv.gz or .parquet"
    )

    text = "say what is in the cache of evaluations, or empty it"
    cache = commands.add_parser("cache", help=text, description=text)
    cache.add_argument("--file", metavar="FILE", help="another file than that of this user")
    cache.add_argument("--clear", action="store_true", help="remove all entries")
    cache.add_argument("--json", action="store_true", help="print what is there as JSON")
    cache.set_defaults(command=functions["cache"])
    return top


def _command(commands: Any, name: str, text: str, function: Command) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("run", metavar="RUN", help="directory of a run")
    parser.set_defaults(command=function)
    return parser


def _choice_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prefer",
        action="append",
        default=[],
        metavar="METRIC=WEIGHT",
        help="weight of a metric (repeatable; by default all metrics weigh alike)",
    )
    for name, text in (("at-least", "lower"), ("at-most", "upper")):
        parser.add_argument(
            f"--{name}",
            action="append",
            default=[],
            metavar="METRIC=VALUE",
            help=f"{text} bound on a metric, in its own unit (repeatable)",
        )
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.9,
        metavar="P",
        help="probability with which the bounds are to hold when the merge is measured (default: "
        "%(default)s; 0 uses the prediction alone)",
    )
    parser.add_argument(
        "--rule",
        choices=("weighted_sum", "chebyshev"),
        default="weighted_sum",
        help="how the weighted metrics become one number (default: %(default)s)",
    )
    parser.add_argument(
        "--no-blend",
        action="store_true",
        help="choose the best merge for the preference also where it is not clearly better than "
        "the uniform blend",
    )
    parser.add_argument(
        "--normalised",
        action="store_true",
        help="show scores as shares of those of each task's own expert, and take the values of "
        "--at-least and --at-most as such shares (of a metric to be minimised, the expert's value "
        "divided by the merge's)",
    )
    _trust_option(parser)
    parser.add_argument(
        "--point", type=int, metavar="K", help="choose point K of front.csv instead of a preference"
    )


def _measure_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--measure",
        action="store_true",
        help="evaluate the choice for real, record that, and show it beside the prediction",
    )


def _trust_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="append",
        nargs="?",
        const="*",
        default=[],
        metavar="PACKAGE",
        help="package whose code the files may name, and so run (repeatable); without a name: all "
        "that they name (see docs/security.md)",
    )


def with_bare_trust(arguments: Sequence[str]) -> list[str]:
    """Return arguments in which ``--trust`` alone does not take what follows for its package.

    What follows is a package when it is a dotted name and not the directory of a run or recipe.
    """
    found = []
    for this, after in zip(arguments, [*arguments[1:], ""], strict=True):
        bare = this == "--trust" and not _is_package(after)
        found.append("--trust=*" if bare else this)
    return found


def with_options_last(arguments: Sequence[str]) -> list[str]:
    """Return the arguments of ``resume`` with its options after the run and its changes.

    argparse takes a list of words only where no option stands between them.
    """
    if list(arguments[:1]) != ["resume"]:
        return list(arguments)
    words: list[str] = []
    options: list[str] = []
    rest = list(arguments[1:])
    while rest:
        this = rest.pop(0)
        if this == "--trust" and rest:
            options += [this, rest.pop(0)]
        else:
            (options if this.startswith("-") else words).append(this)
    return ["resume", *words, *options]


def _is_package(text: str) -> bool:
    folder = Path(text)
    return all(map(str.isidentifier, text.split("."))) and not any(
        (folder / name).exists() for name in ("events.jsonl", "recipe.yaml")
    )


def with_configuration(arguments: Sequence[str]) -> list[str]:
    """Return arguments of ``run`` in which ``FILE.yaml`` is what Hydra begins with.

    Raises:
        ConfigError: When there is no such file, or it cannot be the beginning.
    """
    found = list(arguments)
    for i, argument in enumerate(arguments):
        before = arguments[i - 1] if i else ""
        if is_file(argument) and "=" not in argument and not before.startswith(("-c", "--config")):
            found[i : i + 1] = _as_primary(Path(argument))
            break
    return found


def _as_primary(file: Path) -> list[str]:
    """Return the options with which Hydra begins with a file."""
    if not file.is_file():
        raise ConfigError(
            f"{file} does not exist",
            hint="write one with `map-bo init BASE --expert NAME=PATH --task NAME=KIND:DATA`",
        )
    if file.stem in ("config", "base_config"):
        raise ConfigError(
            f"{file} is called like the configuration of map_bo itself",
            hint="give the file another name, such as map_bo.yaml",
        )
    if file.suffix != ".yaml":
        raise ConfigError(f"{file} must end in .yaml", hint="rename it")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    if not any(line.split("#")[0].strip() in ("- config", "- /config") for line in lines):
        raise ConfigError(
            f"{file} does not begin with the configuration of map_bo",
            hint="let its defaults begin with it, as in the files that `map-bo init` writes:\n"
            "defaults:\n  - config\n  - override problem: hf\n  - _self_",
        )
    return ["--config-dir", str(file.absolute().parent), "--config-name", file.stem]


def surrogate_of_sampler(override: str) -> str:
    """Return an override as Hydra takes it: ``sampler.surrogate=gp`` chooses from a group.

    The group is ``sampler/surrogate``, which is how it is written in files. ``null``, a mapping and
    whatever else is no name stay values.
    """
    key, _, value = override.partition("=")
    names = value.split(",")
    if key != "sampler.surrogate" or names == ["null"] or not all(map(str.isidentifier, names)):
        return override
    return f"sampler/surrogate={value}"


def with_workers(arguments: Sequence[str]) -> list[str]:
    """Return overrides in which ``workers=4`` is what Hydra takes it for: so many processes.

    ``workers=0`` is the process of the run itself. Several numbers, as of a sweep, stay several.
    """
    found = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+") != "workers" or not _NUMBERS.fullmatch(value):
            found.append(argument)
        elif value == "0":
            found.append("workers=inline")
        else:
            found += ["workers=processes", f"workers.count={value}"]
    return found


def require_distinct_jobs(arguments: Sequence[str], unnamed: Collection[str]) -> None:
    """Refuse a sweep over what is not in the names of its jobs, which would share a directory.

    Args:
        arguments: Those of the command, as Hydra gets them.
        unnamed: Groups and settings that are not in the names.

    Raises:
        ConfigError: Naming the override.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    named = any(argument.startswith("hydra.sweep.subdir=") for argument in arguments)
    if named or not {"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(arguments):
        return
    for argument in arguments:
        group = re.split(r"[.@=]", argument.lstrip("+~"), maxsplit=1)[0]
        if group not in unnamed or "=" not in argument:
            continue
        try:
            several = OverridesParser.create().parse_override(argument).is_sweep_override()
        except HydraException:
            continue  # Hydra says what is wrong with it
        if several:
            raise ConfigError(
                f"a sweep cannot vary {group}, got {argument}: it is in the name of no job, so "
                "these jobs would share one directory",
                hint="give one value, or name the jobs yourself, such as "
                "'hydra.sweep.subdir=${hydra.job.num}'",
            )


_NUMBERS = re.compile(r"-?[\d.]+(,-?[\d.]+)*")
_MAPPINGS = re.compile(r"problem\.(tasks|experts|evaluators|heads|metrics)\.")


def with_added_key(arguments: Sequence[str], refused: str) -> list[str] | None:
    """Return the overrides with one that adds a key, where Hydra refused to set it.

    Names of tasks and experts and their settings are the user's own, so they need no ``+``;
    whether a task has such a setting is checked when the configuration is read.

    Args:
        arguments: The overrides.
        refused: What Hydra says.

    Returns:
        None where it was another key that was refused, or something else.
    """
    found = re.match(r"Could not override '([^']+)'", refused)
    if found is None or not _MAPPINGS.match(found.group(1)):
        return None
    added = [f"++{a}" if a.startswith(f"{found.group(1)}=") else a for a in arguments]
    return None if added == list(arguments) else added


def pairs(given: list[str], option: str) -> dict[str, float]:
    """Return the numbers that an option gives to metrics.

    Args:
        given: Texts ``METRIC=NUMBER``.
        option: The option that they were given to.

    Raises:
        ConfigError: When one is of another form, or a metric is named twice.
    """
    found: dict[str, float] = {}
    for text in given:
        name, separator, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            separator = ""
        if not separator or not name:
            raise ConfigError(
                f"{option} must be METRIC=NUMBER, got {text!r}",
                hint=f"write it as in {option} code=0.5",
            )
        if name in found:
            raise ConfigError(f"{option} names {name!r} twice", hint="give each metric once")
        found[name] = number
    return found
