"""Two tiny decoders, each tuned to a domain: from their merges to losses, answers and a front."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import map_bo
from map_bo.errors import EvaluationError
from map_bo.evaluators.generation import Generation
from map_bo.evaluators.lm_eval import LMEval
from map_bo.evaluators.perplexity import Perplexity
from map_bo.rng import make_generator
from tests.evaluators.harness_tasks import write_tasks
from tests.evaluators.tiny_language import tiny_decoder, tiny_tokenizer

DOMAINS = {
    "cats": ["the cat sat on the mat", "the cat ran on the mat", "yes the cat sat"],
    "dogs": ["two dogs ran far, far away", "three dogs ran far", "no dogs ran far away"],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer(adds_bos=True)


@pytest.fixture(scope="module")
def decoders(tokenizer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """State dicts: the base, and two that were trained from it on a domain each."""
    start = tiny_decoder(len(tokenizer), scale=0.05)
    found = {"base": {name: one.clone() for name, one in start.state_dict().items()}}
    for domain, texts in DOMAINS.items():
        model = tiny_decoder(len(tokenizer), scale=0.05)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        ids = [
            torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
            for text in texts
        ]
        for _ in range(25):
            optimizer.zero_grad()
            sum(model(input_ids=one, labels=one).loss for one in ids).backward()
            optimizer.step()
        found[domain] = {name: one.detach().clone() for name, one in model.state_dict().items()}
    return found


def problem(
    decoders: Mapping[str, Any], tokenizer: Any, evaluators: Mapping[str, Any]
) -> map_bo.MergedModelProblem:
    return map_bo.MergedModelProblem(
        tiny_decoder(len(tokenizer)),
        base=decoders["base"],
        experts={domain: decoders[domain] for domain in DOMAINS},
        evaluators=evaluators,
    )


def perplexities(tokenizer: Any, folder: Path) -> dict[str, Perplexity]:
    for domain, texts in DOMAINS.items():
        (folder / f"{domain}.txt").write_text("\n".join(texts))
    return {
        domain: Perplexity(data=str(folder / f"{domain}.txt"), tokenizer=tokenizer)
        for domain in DOMAINS
    }


def test_losses_of_two_domains_and_answers_against_their_length(
    decoders: Mapping[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "yes the", "target": "cat sat"},
        {"prompt": "three", "target": "dogs ran far"},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    talk = Generation(
        data=str(tmp_path / "questions.jsonl"), tokenizer=tokenizer, max_new_tokens=12
    )
    merged = problem(decoders, tokenizer, {**perplexities(tokenizer, tmp_path), "talk": talk})
    assert [(m.name, m.direction) for m in merged.metrics] == [
        ("cats", "min"),
        ("dogs", "min"),
        ("talk_score", "max"),
        ("talk_tokens", "min"),
    ]
    X = torch.tensor([[1, 0], [0, 1], [0.5, 0.5], [0, 0]], dtype=torch.float64)
    seen = merged.evaluate(X, generator=make_generator(0))
    assert seen.failures == (None,) * 4
    cats, dogs, score, tokens = seen.Y.T
    assert cats[0] < cats[2] < cats[3]
    assert dogs[1] < dogs[2] < dogs[3]
    assert cats[0] < cats[1]
    assert dogs[1] < dogs[0]
    assert score[:2].tolist() == [0.5, 0.5]  # each says what it has read
    assert bool((tokens > 0).all() & (tokens <= 12).all())
    assert bool((seen.Yvar[:, :2] > 0).all())
    again = merged.evaluate(X[:1], generator=make_generator(1))
    assert torch.equal(again.Y, seen.Y[:1])
    own = perplexities(tokenizer, tmp_path)["cats"]
    model = tiny_decoder(len(tokenizer))
    model.load_state_dict(merged.merged(X[2]))
    own.prepare(model)
    assert own(model)["loss"].value == pytest.approx(float(cats[2]), rel=1e-5)


@pytest.mark.slow
def test_the_front_of_two_domains(
    decoders: Mapping[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    merged = problem(decoders, tokenizer, perplexities(tokenizer, tmp_path))
    result = map_bo.optimize(merged, budget=12, seed=0)
    assert len(result.front.X) > 3
    assert result.front.metrics[0].direction == "min"


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_the_harness_is_called_on_every_merge(
    decoders: Mapping[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    folder = write_tasks(tmp_path)
    harness = LMEval(tasks=["choice", "texts"], include_path=folder, tokenizer=tokenizer)
    merged = problem(decoders, tokenizer, {"harness": harness})
    names = [metric.name for metric in merged.metrics]
    assert names[0] == "harness_choice_acc"
    X = torch.tensor([[1, 0], [0, 1]], dtype=torch.float64)
    seen = merged.evaluate(X, generator=make_generator(0))
    assert seen.failures == (None, None)
    assert seen.counts[:, 0].tolist() == [5, 5]
    bits = names.index("harness_texts_bits_per_byte")
    assert bool((seen.Yvar[:, bits] > 0).all())
    assert seen.Y[0, bits] != seen.Y[1, bits]


def test_everything_that_does_not_fit_is_refused_at_once(
    decoders: Mapping[str, Any], tokenizer: Any, tmp_path: Path
) -> None:
    own = perplexities(tokenizer, tmp_path)
    (tmp_path / "nothing.jsonl").write_text('{"prompt": "a"}')
    bad = Generation(data=str(tmp_path / "nothing.jsonl"), tokenizer=tokenizer)
    long = Perplexity(data=str(tmp_path / "cats.txt"), tokenizer=tokenizer, max_length=4000)
    merged = problem(decoders, tokenizer, {"cats": own["cats"], "talk": bad, "long": long})
    with pytest.raises(EvaluationError, match="2 evaluators cannot be used") as found:
        merged.prepare()
    assert "no column 'target'" in found.value.message
    assert "max_length is 4000" in found.value.message
