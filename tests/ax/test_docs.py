"""What docs/ax.md shows is what happens."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TEXT = (Path(__file__).parents[2] / "docs" / "ax.md").read_text()


@pytest.mark.slow
def test_the_snippets_run_one_after_the_other(tmp_path: Path) -> None:
    snippets = re.findall(r"<!-- snippet -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(snippets) == TEXT.count("```python")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(snippets)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("12 []"), done.stdout
    assert (tmp_path / "second" / "report.html").exists()
