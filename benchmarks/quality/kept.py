"""The trained models that the study measured, kept so that it goes on the same on any machine.

python -m benchmarks.quality.kept          put the kept models where cases look for them
python -m benchmarks.quality.kept --save   keep the models that this machine trained

Training ends in other last digits on another processor, and so in other models, other truths and
a study begun anew. The files under `benchmarks/models` mirror the folder in which the problem zoo
keeps what it trained; those that are missing there are copied, nothing is overwritten.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from map_bo.problems.cache import cache_root

__all__ = ["KEPT", "restore", "save"]

KEPT = Path(__file__).resolve().parents[1] / "models"


def restore(source: Path = KEPT, target: Path | None = None) -> int:
    """Copy the kept models that are missing in ``target``; return how many."""
    return _copied(source, cache_root() if target is None else target)


def save(source: Path | None = None, target: Path = KEPT) -> int:
    """Copy the trained models that are not kept yet; return how many."""
    return _copied(cache_root() if source is None else source, target)


def _copied(source: Path, target: Path) -> int:
    count = 0
    for file in sorted(source.rglob("*.safetensors")):
        place = target / file.relative_to(source)
        if place.exists():
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = place.with_name(f".{place.name}.{os.getpid()}")
        shutil.copyfile(file, scratch)
        os.replace(scratch, place)
        count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save", action="store_true", help="keep what this machine trained")
    kept = parser.parse_args().save
    count = save() if kept else restore()
    print(f"{count} models {'kept' if kept else 'restored'}")


if __name__ == "__main__":
    main()
