"""What every page allows: its own style sheet and pictures, and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

import pytest

from map_bo.report.comparison.page import comparison_html
from map_bo.report.page_style import styled
from map_bo.report.run.page import write_html
from tests.report.comparison.test_page import IMAGES
from tests.report.fake_runs import comparison
from tests.report.fake_views import make_view
from tests.report.run.test_page import PIXEL


def run_page(folder: Path) -> str:
    (folder / "front.png").write_bytes(PIXEL)
    write_html(make_view(2), folder / "report.html", [folder / "front.png"])
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["run", "comparison"])
def test_a_page_allows_its_style_and_pictures_alone(kind: str, tmp_path: Path) -> None:
    text = run_page(tmp_path) if kind == "run" else comparison_html(comparison(seeds=2), IMAGES)
    (policy,) = re.findall(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', text)
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'",
        "style-src": f"'sha256-{digest}'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    # It counts for what follows it, so only the encoding may come before.
    assert re.search(r'<head>\s*<meta charset="utf-8">\s*<meta http-equiv="Content-S', text)
    # What the policy would forbid is not there.
    assert not re.search(r"<[^>]*\sstyle=|<script|<[^>]*\son\w+=", text)
    assert set(re.findall(r'src="(data:)?', text)) <= {"data:"}


def test_another_style_has_another_hash() -> None:
    assert styled("a {}") != styled("b {}")
    assert "<style>a {}</style>" in styled("a {}")
