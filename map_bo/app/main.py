"""The console script ``map-bo``. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import argparse
import io
import logging
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from traceback import walk_tb
from typing import Any, NoReturn

from map_bo.app.arguments import (
    Command,
    pairs,
    parser,
    require_distinct_jobs,
    surrogate_of_sampler,
    with_added_key,
    with_bare_trust,
    with_configuration,
    with_options_last,
    with_workers,
)
from map_bo.errors import ConfigError, MapBoError, SettingsError, did_you_mean, first_line

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 is done, 2 a user's mistake, 130 interrupted.

    1 means that only a part was done: some jobs of a sweep did not finish, and its report lists
    them; a report was written but could not be published on Weights & Biases; or a record was
    checked and is damaged.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name in a file may be no text
            stream.reconfigure(errors="backslashreplace")
    try:
        _dispatch(arguments)
    except MapBoError as error:
        _fail(error.message, error.hint)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader of a pipe has closed it (`map-bo choose ... | head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    except OSError as error:
        _fail(
            f"{error.filename or 'a file'}: {error.strerror or error}",
            "name a directory that exists and that you can write to, or free some disk space",
        )


def _fail(message: str, hint: str | None = None, *, status: int = 2) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    if hint:
        sys.stderr.write(f"hint: {hint}\n")
    raise SystemExit(status)


def _dispatch(arguments: list[str]) -> None:
    if arguments[:1] == ["run"]:
        _run(arguments[1:])
    elif arguments[:1] in (["-sc"], ["--shell-completion"]):
        _complete(arguments)
    else:
        arguments = with_options_last(with_bare_trust(arguments))
        options = parser(_FUNCTIONS).parse_args(arguments)
        command: Command = options.command
        command(options)


_EDITED = "restore it from a copy if it was edited by hand"


def _choice_of(options: argparse.Namespace) -> Any:
    prefer = pairs(options.prefer, "--prefer")
    at_least = pairs(options.at_least, "--at-least")
    at_most = pairs(options.at_most, "--at-most")
    result = _load(options.run)
    if options.normalised:
        at_least, at_most = _in_own_units(result, at_least, at_most)
    if options.point is not None:
        if prefer or at_least or at_most:
            raise ConfigError("--point and a preference were both given", hint="give one of them")
        return result.point(options.point)

    def choice(of: Any) -> Any:
        return of.choose(
            prefer,
            at_least=at_least,
            at_most=at_most,
            rule=options.rule,
            confidence=options.confidence or None,
            keep_blend=not options.no_blend,
        )

    first = choice(result)  # a wrong name should not wait for the surrogate
    try:
        return choice(_load(options.run, refit=True, trust=options.trust))
    except SettingsError as error:
        if options.trust:
            raise
        # Whoever cannot trust or import the surrogate has the points of the front all the same.
        sys.stderr.write(
            "note: the choice is a point of the front and was not solved for this preference: "
            f"{error.message}\nhint: {error.hint}\n"
        )
        return first


def _in_own_units(
    result: Any, at_least: Mapping[str, float], at_most: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return bounds on shares of the experts' own scores as bounds on the metrics."""
    from map_bo.report.normalised import OwnScores

    own = OwnScores.of(result.seen, result.space)
    lower: dict[str, float] = {}
    upper: dict[str, float] = {}
    for given, more in ((at_least, True), (at_most, False)):
        for name, share in given.items():
            bounds = lower if more != own.is_minimised(name) else upper
            bounds[name] = own.bound(name, share)
    return lower, upper


def _load(run: str, *, refit: bool = False, trust: Sequence[str] = ()) -> Any:
    from map_bo.loop.reading import created_of, load_result
    from map_bo.nested.reading import is_nested, load_nested

    created = created_of(run)
    if trust:
        _look_in(Path.cwd(), (created.get("config") or {}).get("cwd"))
    load = load_nested if is_nested(created) else load_result
    return load(run, refit=refit, trust=trust)


def _look_in(*folders: str | Path | None) -> None:
    """Let the modules of packages that the user trusts be found in these folders too."""
    sys.path.extend(str(folder) for folder in folders if folder and str(folder) not in sys.path)


def _loaded(options: argparse.Namespace) -> Any:
    """Return the run with its surrogate; without it where the user does not trust that."""
    try:
        return _load(options.run, refit=True, trust=options.trust)
    except SettingsError:
        if options.trust:
            raise
        return _load(options.run)


def _confirm(options: argparse.Namespace) -> None:
    from map_bo.app.runs.measuring import confirm

    confirm(options, _choice_of(options), _loaded(options))


def _choose(options: argparse.Namespace) -> None:
    choice = _choice_of(options)
    found = None
    if options.measure:
        from dataclasses import replace

        from map_bo.app.runs.measuring import measure

        found = measure(options, choice, _loaded(options))
        choice = replace(choice, real=found.measured.Y[0])
    own = None
    if options.normalised:
        from map_bo.report.normalised import OwnScores

        result = _load(options.run)
        own = OwnScores.of(result.seen, result.space)
    if options.json:
        import json

        said = choice.describe()
        if own is not None:
            names = [metric.name for metric in choice.metrics]
            shares = zip(names, own.normalise(choice.mean).tolist(), strict=True)
            said["normalised"] = {name: None if x != x else x for name, x in shares}
        if found is not None:
            said["measured"] = found.summary()
        sys.stdout.write(json.dumps(said, indent=2) + "\n")
        return
    from rich.console import Console

    from map_bo.report.run.cards import print_choice

    console = Console()
    where = "Optimised for this preference, near point" if choice.refined else "Point"
    where = "The uniform blend, near point" if choice.blend else where
    console.print(f"{where} {choice.point} of {options.run}", highlight=False, markup=False)
    print_choice(
        console,
        space=choice.space,
        metrics=choice.metrics,
        x=choice.x,
        mean=choice.mean,
        lower=choice.lower,
        upper=choice.upper,
        real=choice.real,
        corrected=choice.corrected,
        own=own,
    )
    for note in choice.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    if found is not None:
        from map_bo.app.runs.measuring import show

        console.print()
        show(found)


def _merge(options: argparse.Namespace) -> None:
    from map_bo.app.merge import merge_choice, merge_recipe, recipe_at, row_of
    from map_bo.app.trust import recorded_configuration
    from map_bo.loop.reading import created_of
    from map_bo.merging.export.draft import refuse_existing

    refuse_existing(options.out)  # first: before anything is read or fitted
    recipe = recipe_at(options.run)
    if recipe is not None:
        _look_in(*([Path.cwd()] if options.trust else []))
        written = merge_recipe(recipe, options)
    else:
        recorded = created_of(options.run).get("config")
        run, trust = os.path.abspath(options.run), options.trust
        with recorded_configuration(run, recorded, trust=trust, parts=("problem",)):
            pass  # what is not trusted is refused before anything is fitted
        # A wrong name is refused before checkpoints are read.
        choice = _choice_of(options) if options.row is None else row_of(run, options)
        if options.row is None or options.measure:
            choice = _judged(options, choice)
        out = os.path.abspath(options.out)
        with recorded_configuration(run, recorded, trust=trust, parts=("problem",)) as config:
            written = merge_choice(choice, options, config, run=run, out=out)
    sys.stdout.write(written + "\n")


def _judged(options: argparse.Namespace, choice: Any) -> Any:
    """Return a choice with its verdict, and measured where that is asked for."""
    from dataclasses import replace

    result = _loaded(options)
    if not options.measure:
        return replace(choice, verdict=result.verdict(choice).describe())
    from map_bo.app.runs.measuring import measure, show

    found = measure(options, choice, result)
    show(found)
    return replace(choice, real=found.measured.Y[0], confirmed=found.summary())


def log_to_stderr() -> None:
    """Show the log, as `run` does: progress where there is no terminal, and warnings."""
    logging.basicConfig(
        level=logging.INFO, format="[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"
    )


def _resume(options: argparse.Namespace) -> None:
    from map_bo.app.task import drive, show
    from map_bo.app.trust import recorded_configuration
    from map_bo.loop.reading import created_of

    log_to_stderr()
    directory, here = Path(options.run).absolute(), Path.cwd()
    recorded = created_of(directory).get("config")
    with recorded_configuration(options.run, recorded, trust=options.trust) as config:
        changed: Any = None
        changes: dict[str, Any] = {}
        if options.overrides:
            from map_bo.app.runs.overrides import with_overrides

            choices = (recorded or {}).get("choices") or {}
            changed, changes = with_overrides(config, with_workers(options.overrides), choices)
        result = drive(
            config,
            directory,
            retry_failed=options.retry_failed,
            changed=changed,
            changes=changes,
        )
    show(result, here)


def _ask(options: argparse.Namespace) -> None:
    from map_bo.app.runs.asking import ask

    ask(options)


def _tell(options: argparse.Namespace) -> None:
    from map_bo.app.runs.asking import tell

    tell(options)


def _report(options: argparse.Namespace) -> None:
    from map_bo.tracking.jsonl import is_run

    if options.more or not is_run(options.run):
        _report_comparison(options)
        return
    from map_bo.errors import DataError
    from map_bo.foreign import understood
    from map_bo.loop.mirrors import view_of
    from map_bo.loop.reading import load_result
    from map_bo.report.run.artifacts import write_report

    wandb = options.wandb or options.wandb_project
    for name, asked in (("--baseline", options.baseline), ("--wandb", wandb)):
        if asked:
            raise ConfigError(
                f"{name} is for a comparison of several runs, and {options.run} is a single run",
                hint="name a sweep, or several runs",
            )
    out = options.out or options.run
    result = load_result(options.run)
    with understood(DataError, f"the record in {options.run}", hint=_EDITED):
        write_report(view_of(result, normalised=options.normalised), Path(out))
    sys.stdout.write(f"report written to {out}/report.html\n")


def _report_comparison(options: argparse.Namespace) -> None:
    from map_bo.app.comparison import compare_directories, publish_comparison

    given = [options.run, *options.more]
    out = options.out or ("comparison" if options.more else options.run)
    compared = compare_directories(given, out, baseline=options.baseline)
    sys.stdout.write(f"comparison of {compared.finished} runs written to {compared.page}\n")
    for name, reason in compared.missing:
        sys.stdout.write(f"did not finish: {name}: {reason}\n")
    if not (options.wandb or options.wandb_project):
        return
    try:
        address, offline = publish_comparison(compared.found, place=options.wandb_project)
    except MapBoError as error:
        sys.stdout.flush()
        _fail(error.message, error.hint, status=1)
    sys.stdout.write(f"W&B Report: {address}\n")
    if offline:
        sys.stdout.write(
            f"{offline} of its runs were recorded offline; upload them with `wandb sync`\n"
        )


def _export(options: argparse.Namespace) -> None:
    from map_bo.app.ax_commands import export_run

    export_run(options)


def _import(options: argparse.Namespace) -> None:
    from map_bo.app.ax_commands import import_into

    import_into(options)


def _check(options: argparse.Namespace) -> None:
    from map_bo.app.record_commands import check

    check(options)


def _repair(options: argparse.Namespace) -> None:
    from map_bo.app.record_commands import repair

    repair(options)


def _outcomes(options: argparse.Namespace) -> None:
    from map_bo.app.record_commands import write_table

    write_table(options)


def _cache(options: argparse.Namespace) -> None:
    from map_bo.app.record_commands import show_cache

    show_cache(options)


def _init(options: argparse.Namespace) -> None:
    from map_bo.app.init import check_task, is_file, written_file
    from map_bo.values import whole_number

    examples = whole_number("--examples", options.examples, least=1)
    if is_file(options.base):
        if options.expert or options.task:
            raise ConfigError(
                f"{options.base} is a configuration, and experts or tasks were given as well",
                hint="add them in the file, or name a base",
            )
        file = options.base
    else:
        file = str(written_file(options))
        sys.stdout.write(f"{file} written\n")
        if options.no_check:
            sys.stdout.write(f"next: map-bo init {shlex.quote(file)}, which tries it out\n")
            return

    refused: list[MapBoError] = []

    def task(config: Any) -> None:
        try:
            check_task(config, file=file, examples=examples)
        except MapBoError as error:  # Hydra would print the overrides of a job that failed
            refused.append(error)

    try:
        _run([file, *_WITHOUT_A_RUN], task)
        if refused:
            raise refused[0]
    except MapBoError as error:
        if not os.path.isfile(file):
            raise
        again = f"correct {file}, then try it out with `map-bo init {shlex.quote(file)}`"
        hint = f"{error.hint}\nhint: {again}" if error.hint else again
        raise type(error)(error.message, hint=hint) from error


_WITHOUT_A_RUN = (
    "hydra.run.dir=.",
    "hydra.output_subdir=null",
    "~hydra.callbacks.refuse_existing_run",
    "hydra/job_logging=none",
    "hydra/hydra_logging=none",
)


def _run(arguments: list[str], task: Any = None) -> None:
    """Call Hydra, and turn its exceptions for a wrong override into one clear error.

    Args:
        arguments: The arguments after ``run``.
        task: Function of the composed configuration; the run by default.
    """
    import hydra
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import OmegaConfBaseException

    from map_bo.app.installed import hidden
    from map_bo.app.jobs import UNNAMED, Refused, run_task
    from map_bo.app.schema import register
    from map_bo.app.worker_process import announce_sweep

    job = run_task if task is None else task
    _refuse_pickles(arguments)
    arguments = with_configuration(arguments)
    register()
    announce_sweep()
    if not any(argument in ("-sc", "--shell-completion") for argument in arguments):
        sys.stderr.writelines(f"note: {told}\n" for told in hidden())
    # Hydra prints its own traces and exits with 1 unless told to raise; here errors become ours.
    asked = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    compose = hydra.main(version_base="1.3", config_path="pkg://map_bo.conf", config_name="config")
    require_distinct_jobs(arguments, UNNAMED)
    arguments = [surrogate_of_sampler(argument) for argument in with_workers(arguments)]
    try:
        while True:
            sys.argv = ["map-bo", *arguments]
            try:
                compose(job)()
                break
            except HydraException as error:
                added = with_added_key(arguments, str(error))
                if added is None:
                    raise
                arguments = added
    except Refused as refused:
        raise refused.error from None
    except (HydraException, OmegaConfBaseException) as error:
        if asked == "1":
            raise
        if isinstance(error, MissingConfigException) and error.options and error.missing_cfg_file:
            group, _, option = error.missing_cfg_file.rpartition("/")
            hint = did_you_mean(option, error.options)
            if group == "workers":
                hint += "; workers=4 is short for four processes"
            _fail(f"{group} has no option {option!r}", hint)
        parts = [str(error)] + ([str(error.__cause__)] if error.__cause__ else [])
        lines = dict.fromkeys(line.rstrip() for part in parts for line in part.strip().split("\n"))
        text = "\n".join(line for line in lines if not line.strip().startswith(_INSIDE))
        _fail(text, "see the groups and their options with `map-bo run --help`")
    except (MapBoError, OSError):
        raise
    except Exception as error:
        if asked == "1" or _is_within(job, error):
            raise
        # Hydra composes the configuration before it calls the task, and trips over some values.
        said = first_line(error)
        if "Config group override must be" in said:
            said = f"a group of the configuration must be chosen by a name ({said})"
        _fail(
            f"the options cannot be understood: {said}",
            "choose groups by names, as in sampler=sobol; see them with `map-bo run --help`",
        )
    finally:
        if asked is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = asked


_INSIDE = ("full_key: ", "object_type=", "reference_type=")
"""How lines begin in which OmegaConf tells what it has inside."""


def _is_within(function: Any, error: BaseException) -> bool:
    """Return whether an error was raised inside of a function."""
    frames = walk_tb(error.__traceback__)
    return any(frame.f_code is function.__code__ for frame, _ in frames)


def _refuse_pickles(arguments: Sequence[str]) -> None:
    """Refuse Hydra's way of running a configuration again, which unpickles a file."""
    for argument in arguments:
        option = argument.partition("=")[0]
        if len(option) > len("--ex") and "--experimental-rerun".startswith(option):
            raise ConfigError(
                f"{option} reads a pickle, which could run any code",
                hint="continue a run with `map-bo resume RUN`, or give its overrides again",
            )


def _complete(arguments: list[str]) -> None:
    """Complete commands for the shell, and overrides after ``run`` through Hydra."""
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    if any(argument.startswith("query=") for argument in arguments):
        if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
            sys.stdout.write("\n".join(("run", *_FUNCTIONS)) + "\n")
            return
        if words[1] != "run":
            return
        os.environ["COMP_LINE"] = line.replace(" run", "", 1)
    _run(arguments)


_FUNCTIONS: Mapping[str, Command] = {
    "init": _init,
    "resume": _resume,
    "ask": _ask,
    "tell": _tell,
    "choose": _choose,
    "merge": _merge,
    "confirm": _confirm,
    "report": _report,
    "export": _export,
    "import": _import,
    "check": _check,
    "repair": _repair,
    "outcomes": _outcomes,
    "cache": _cache,
}


if __name__ == "__main__":
    main()
