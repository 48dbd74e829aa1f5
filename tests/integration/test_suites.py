"""The suites of the hub, on tiny stand-ins of the same shapes that lie in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from map_bo.app.build import build_problem
from map_bo.app.schema import register
from map_bo.rng import make_generator
from tests.evaluators.images import tiny as images
from tests.evaluators.text.tiny_text import WORDS, drawn, rows_file, tiny_gpt2, word_tokenizer
from tests.evaluators.tiny_language import tiny_encoder_decoder, tiny_tokenizer
from tests.integration.hf_models import moved, save, write_tower
from tests.merging.peft_models import trained

transformers = pytest.importorskip("transformers")
pytest.importorskip("PIL")


@pytest.fixture(autouse=True)
def hydra() -> Iterator[None]:
    register()
    with initialize_config_module("map_bo.conf", version_base="1.3"):
        yield


def composed(name: str, root: Path) -> DictConfig:
    return compose("config", overrides=[f"experiment={name}", f"problem.root={root}"])


def place(root: Path, name: str) -> Path:
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def evaluate(config: DictConfig) -> Any:
    problem = build_problem(config)
    X = torch.full((1, problem.space.d), 0.3).double()
    found = problem.evaluate(X, generator=make_generator(0))
    assert found.failures == (None,)
    return found


@pytest.mark.parametrize("name", ["clip_b32", "clip_b16", "clip_l14"])
def test_clip_on_eight_tasks(name: str, tmp_path: Path) -> None:
    config = composed(name, tmp_path)
    base = images.clip()
    folder = place(tmp_path, config.problem.base)
    save(base, folder)
    images.write_tokenizer(folder)
    images.write_processor(folder)
    assert len(config.problem.experts) == len(config.problem.tasks) == 8
    for seed, (task, expert) in enumerate(config.problem.experts.items()):
        write_tower(base, place(tmp_path, expert), seed)
        data = config.problem.tasks[task].data
        images.write_images(place(tmp_path, data.path) / data.split, each=1)
    OmegaConf.update(config, "problem.tasks.svhn.data.name", None)  # of the hub alone
    found = evaluate(config)
    assert [metric.name for metric in found.metrics] == list(config.problem.tasks)
    assert found.counts.tolist() == [[3.0] * 8]


def glue(root: Path, config: DictConfig) -> None:
    """Write rows with the columns and labels of each task of GLUE, and let the tasks find them."""
    columns = ["sentence", "sentence1", "sentence2", "question", "question1", "question2"]
    columns += ["premise", "hypothesis"]
    for name, task in config.problem.tasks.items():
        labels = 3 if name == "mnli" else 2
        rows = [
            {**{c: f"the {WORDS[(i + j) % 9]} film" for j, c in enumerate(columns)}, "label": i}
            for i in range(labels)
        ]
        task.data.path = rows_file(place(root, "nyu-mll") / f"{name}.jsonl", rows)
        task.data.name = task.data.split = None


def test_gpt2_on_glue(tmp_path: Path) -> None:
    config = composed("gpt2_glue", tmp_path)
    base = transformers.GPT2LMHeadModel(tiny_gpt2().config)
    drawn(base, 0)
    save(base, place(tmp_path, config.problem.base), word_tokenizer())
    for seed, (task, expert) in enumerate(config.problem.experts.items()):
        model = tiny_gpt2(seed, classes=3 if task == "mnli" else 2)
        moved(base.transformer, model.transformer, seed)
        save(model, place(tmp_path, expert))
    glue(tmp_path, config)
    found = evaluate(config)
    assert [metric.name for metric in found.metrics] == list(config.problem.experts)
    assert found.counts.tolist() == [[2.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0]]


def test_flan_t5_on_glue(tmp_path: Path) -> None:
    config = composed("flan_t5_glue", tmp_path)
    tokenizer = tiny_tokenizer()
    base = tiny_encoder_decoder(len(tokenizer))
    save(base, place(tmp_path, config.problem.base), tokenizer)
    for seed, expert in enumerate(config.problem.experts.values()):
        save(moved(base, tiny_encoder_decoder(len(tokenizer)), seed), place(tmp_path, expert))
    glue(tmp_path, config)
    assert [metric.name for metric in evaluate(config).metrics] == list(config.problem.tasks)


@pytest.mark.parametrize("name", ["flan_t5_glue_lora", "flan_t5_large_glue_lora"])
def test_flan_t5_with_adapters(name: str, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    config = composed(name, tmp_path)
    tokenizer = tiny_tokenizer()
    save(tiny_encoder_decoder(len(tokenizer)), place(tmp_path, config.problem.base), tokenizer)
    for seed, expert in enumerate(config.problem.experts.values()):
        base = tiny_encoder_decoder(len(tokenizer))
        trained(base, place(tmp_path, expert), seed, target_modules=["q", "v"])
    glue(tmp_path, config)
    assert [metric.name for metric in evaluate(config).metrics] == list(config.problem.tasks)
