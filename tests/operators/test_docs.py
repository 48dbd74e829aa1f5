"""What docs/operators.md shows is what happens."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from map_bo.operators.averages import Slerp, WeightedAverage
from map_bo.operators.consensus import Consensus
from map_bo.operators.nearswap import NearSwap
from map_bo.operators.pcb import Pcb
from map_bo.operators.sce import Sce
from map_bo.operators.searchable import SearchableOperator
from map_bo.operators.shared_regions import Ram
from map_bo.operators.sparse import Breadcrumbs, Dare, Della, Magnitude, Ties
from map_bo.operators.spectral.isotropic import IsoC, IsoCTS
from map_bo.operators.spectral.knots import KnOTS
from map_bo.operators.spectral.tsv import TSVM
from map_bo.operators.spherical import MultiSlerp, NuSlerp
from map_bo.operators.statistics.data_free import DataFreeRegMean
from map_bo.operators.stock import ModelStock

TEXT = (Path(__file__).parents[2] / "docs" / "operators.md").read_text()
CLASSES: tuple[type[SearchableOperator], ...] = (
    WeightedAverage,
    Slerp,
    Magnitude,
    Ties,
    Breadcrumbs,
    Dare,
    Della,
    Consensus,
    TSVM,
    IsoC,
    IsoCTS,
    KnOTS,
    DataFreeRegMean,
    MultiSlerp,
    NuSlerp,
    ModelStock,
    NearSwap,
    Pcb,
    Sce,
    Ram,
)
TITLES = {
    "Dare": "DARE",
    "DataFreeRegMean": "RegMean without data",
    "Della": "DELLA",
    "IsoC": "Iso-C",
    "IsoCTS": "Iso-CTS",
    "ModelStock": "Model Stock",
    "MultiSlerp": "Multi-SLERP",
    "NearSwap": "Nearswap",
    "NuSlerp": "NuSLERP",
    "Pcb": "PCB",
    "Ram": "RAM",
    "Sce": "SCE",
    "Slerp": "SLERP",
    "TSVM": "TSV-M",
    "Ties": "TIES",
}


def test_the_snippets_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snippets = re.findall(r"<!-- snippet -->\n```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(snippets) == TEXT.count("```python")
    monkeypatch.chdir(tmp_path)
    exec("\n".join(snippets), {"__name__": "docs"})
    printed = capsys.readouterr().out
    for said in re.findall(r"print\(.*\)  # (.*)", TEXT):
        assert said.split("...")[0] in printed, said


@pytest.mark.parametrize("kind", CLASSES)
def test_the_table_says_what_can_be_searched(kind: type[SearchableOperator]) -> None:
    (row,) = re.findall(rf"^\| \[.*?\| `{kind.__name__}` \|.*$", TEXT, flags=re.MULTILINE)
    searched = row.split("|")[4]
    assert set(re.findall(r"`(\w+)`", searched)) == set(kind.searchable)


@pytest.mark.parametrize("kind", CLASSES)
def test_the_defaults_are_those_of_the_class(kind: type[SearchableOperator]) -> None:
    heading = TITLES.get(kind.__name__, kind.__name__)
    if kind is WeightedAverage:
        heading = "Weighted average"
    (section,) = re.findall(rf"^## {heading}\n(.*?)^## ", TEXT, flags=re.MULTILINE | re.DOTALL)
    defaults = {f.name: f.default for f in dataclasses.fields(kind)}
    for name, value in re.findall(r"^\| `(\w+)` \| (.*?) \|", section, flags=re.MULTILINE):
        shown = value.strip("`")
        default = defaults[name]
        assert shown == (f"{default:g}" if isinstance(default, float) else str(default)), name


def test_links_lead_to_headings_and_files() -> None:
    headings = {
        re.sub(r"[^\w -]", "", line[3:]).lower().replace(" ", "-")
        for line in TEXT.splitlines()
        if line.startswith("## ")
    }
    for link in re.findall(r"\]\(#([^)]+)\)", TEXT):
        assert link in headings, link
