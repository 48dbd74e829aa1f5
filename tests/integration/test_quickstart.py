"""The examples of docs/quickstart.md: what was written before and is now, and that it agrees."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from map_bo.evaluators.evaluator import measurement_of
from map_bo.evaluators.kinds import evaluator_from
from tests.evaluators.harness_tasks import write_tasks
from tests.evaluators.images import tiny as images
from tests.integration.hf_models import save, write_classifiers, write_decoders

transformers = pytest.importorskip("transformers")
TEXT = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text()
KINDS = {
    "text_classification": "text classification",
    "zero_shot": "zero-shot CLIP",
    "perplexity": "perplexity",
    "lm_eval": "lm-eval",
}


def block(when: str, kind: str) -> str:
    found = re.search(rf"<!-- {when}: {kind} -->\n```\w+\n(.*?)```", TEXT, flags=re.DOTALL)
    assert found is not None
    return found[1]


def prepared(kind: str, folder: Path) -> tuple[Any, str]:
    """Write what an example needs; return the model that it scores, and the base's folder."""
    if kind == "text_classification":
        write_classifiers(folder)
        load: Any = transformers.AutoModelForSequenceClassification
        return load.from_pretrained("film").eval(), "bert"
    if kind == "zero_shot":
        pytest.importorskip("PIL")
        save(images.clip(), folder / "clip")
        images.write_tokenizer(folder / "clip")
        images.write_processor(folder / "clip")
        images.write_images(folder / "colours", each=2)
        return transformers.CLIPModel.from_pretrained("clip").eval(), "clip"
    write_decoders(folder)
    (folder / "base").rename(folder / "decoder")
    if kind == "lm_eval":
        (folder / "tasks").mkdir()
        write_tasks(folder / "tasks")
    return transformers.AutoModelForCausalLM.from_pretrained("cats").eval(), "decoder"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_configured_now_is_what_was_written_before(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "lm_eval" and find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAP_BO_CACHE", str(tmp_path / "cache"))
    model, base = prepared(kind, tmp_path)
    names: dict[str, Any] = {}
    exec(block("before", kind), names)
    before = measurement_of("before", names["score"](model))
    ((name, settings),) = yaml.safe_load(block("now", kind)).items()
    evaluator: Any = evaluator_from(name, settings, defaults={"tokenizer": base, "processor": base})
    evaluator.prepare(model)
    found = evaluator(model)
    now = found[next(iter(evaluator.metrics)).name]
    assert now.value == pytest.approx(before.value, rel=1e-5)
    if before.count is not None:
        assert now.count == before.count


@pytest.mark.parametrize("kind", KINDS)
def test_the_table_counts_the_lines(kind: str) -> None:
    lines = sum(bool(line.strip()) for line in block("before", kind).splitlines())
    assert f"| {KINDS[kind]} | {lines} | 0 |" in TEXT
