"""Write the numbers of a sweep into the file of its study, from the stores of its runs alone.

    map-bo run -m experiment=ablation_surrogates hydra.sweep.dir=SWEEP ...
    python experiments/record_numbers.py SWEEP experiments/ablations/surrogates.md

What stands between the two marks of the file is replaced; the rest is left as it is.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml

from map_bo.errors import ConfigError
from map_bo.loop.reading import read_runs
from map_bo.loop.summary import versions
from map_bo.report.comparison.comparison import Comparison, compare
from map_bo.report.comparison.page import markdown_part
from map_bo.report.comparison.tables import (
    Table,
    difference_table,
    measure_tables,
    scale_words,
    summary_words,
    win_rate_tables,
)

FIRST, LAST = "<!-- numbers: written by experiments/record_numbers.py -->", "<!-- end -->"


def main(argv: Sequence[str] | None = None) -> None:
    """Replace the numbers of a study's file by those of a sweep."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="directory of a sweep")
    parser.add_argument("file", type=Path, metavar="FILE", help="Markdown file of a study")
    parser.add_argument("--baseline", metavar="VARIANT", help="variant to compare with")
    options = parser.parse_args(argv)
    found = compare(
        read_runs([options.sweep], beside=options.file.parent),
        title=options.file.stem,
        baseline=options.baseline,
    )
    text = with_numbers(options.file.read_text(), numbers(found, command_of(options.sweep)))
    options.file.write_text(text)


def command_of(sweep: Path) -> str:
    """Return the command of a sweep, as Hydra recorded it; its directory is left out."""
    path = sweep / "multirun.yaml"
    if not path.exists():
        raise ConfigError(
            f"{sweep} holds no multirun.yaml", hint="name the directory of `map-bo run -m`"
        )
    recorded = yaml.safe_load(path.read_text())["hydra"]["overrides"]
    own = [word for word in recorded["hydra"] if word.startswith("hydra/")]
    words = [word for word in recorded["task"] if not word.startswith("progress=")]
    return " ".join(["map-bo run -m", *own, *words])


def numbers(found: Comparison, command: str) -> str:
    """Return the tables of a comparison as Markdown, with the command they came from."""
    gaps = difference_table(found)
    kept = ("map-bo", "torch", "botorch")
    known = ", ".join(f"{name} {version}" for name, version in versions().items() if name in kept)
    parts: list[str | Table] = [
        summary_words(found),
        scale_words(found),
        *measure_tables(found),
        *([gaps] if gaps else []),
        *win_rate_tables(found),
    ]
    lines = [f"`{command}` ({known})", ""]
    for part in parts:
        lines += [*markdown_part(part), ""]
    return "\n".join(lines).rstrip()


def with_numbers(text: str, written: str) -> str:
    """Return ``text`` with ``written`` between its marks.

    Raises:
        ConfigError: When it does not hold the two marks once each, in order.
    """
    before, first, rest = text.partition(FIRST)
    _, last, after = rest.partition(LAST)
    if not first or not last:
        raise ConfigError(
            "the file has no place for numbers",
            hint=f"put {FIRST} and {LAST} on lines of their own",
        )
    return f"{before}{FIRST}\n{written}\n{LAST}{after}"


if __name__ == "__main__":
    main()
