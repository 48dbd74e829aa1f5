"""The main job on real models: merge four digit experts, see the trade-offs, choose and export.

python experiments/quickstart/demo.py [--out DIR] [--budget 24]

The same on the command line is `map-bo run`, `map-bo choose` and `map-bo merge`; this script
calls them, so what it prints is what they print.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from map_bo.app.main import main as map_bo


def main() -> None:
    """Run, choose and merge with the defaults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--budget", type=int, default=24)
    options = parser.parse_args()
    if (options.out / "events.jsonl").exists():
        shutil.rmtree(options.out)  # an earlier demo's

    run = str(options.out)
    map_bo(["run", f"hydra.run.dir={run}", f"loop.budget={options.budget}"])
    print("\nA choice: rot90 matters twice as much as the others, flip must stay above 0.5")
    preference = ["--prefer", "rot90=2", "--prefer", "invert=1", "--prefer", "flip=1"]
    preference += ["--prefer", "permute=1", "--at-least", "flip=0.5"]
    map_bo(["choose", run, *preference])
    map_bo(["merge", run, *preference, "--out", f"{run}/merged"])
    for path in sorted((options.out / "merged").iterdir()):
        print(f"  {path}")


if __name__ == "__main__":
    main()
