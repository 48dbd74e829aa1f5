from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import nn

import map_bo
from map_bo.errors import ConfigError, EvaluationError
from map_bo.evaluators.embeddings import Embeddings
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.rng import make_generator
from tests.contracts.example_evaluator_contract import ExampleEvaluatorContract
from tests.evaluators.text.tiny_text import (
    WORDS,
    readable_bert,
    reviews,
    rows_file,
    tiny_bert,
    word_tokenizer,
)

pytest.importorskip("transformers", reason="the extra `huggingface` is not installed")


def pairs() -> list[dict[str, object]]:
    first, second = reviews(24), reviews(24, 3)
    return [
        {
            "first": a["text"],
            "second": b["text"],
            "score": len(set(str(a["text"]).split()) & set(str(b["text"]).split())) + i / 100,
        }
        for i, (a, b) in enumerate(zip(first, second, strict=True))
    ]


def answers() -> list[dict[str, object]]:
    """Return documents of one word and some filler, and the queries that they answer."""
    found: list[dict[str, object]] = [
        {"query": f"{word} {word}", "document": f"the {word}"} for word in WORDS[:8]
    ]
    return [*found, {"query": "good good", "document": "a good"}]


@pytest.fixture
def similar(tmp_path: Path) -> str:
    return rows_file(tmp_path / "pairs.jsonl", pairs())


@pytest.fixture
def asked(tmp_path: Path) -> str:
    return rows_file(tmp_path / "asked.jsonl", answers())


def evaluator(path: str, **settings: Any) -> Embeddings:
    return Embeddings(data=path, tokenizer=word_tokenizer(), batch_size=4, **settings)


class TestSimilarity(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self, similar: str) -> ExampleEvaluator:
        return evaluator(similar)

    @pytest.fixture
    def model(self) -> nn.Module:
        made: nn.Module = tiny_bert()
        return made


class TestRetrieval(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self, asked: str) -> ExampleEvaluator:
        return evaluator(asked, task="retrieval", at=[1, 3])

    @pytest.fixture
    def model(self) -> nn.Module:
        made: nn.Module = tiny_bert()
        return made


def embedded(model: Any, text: object) -> torch.Tensor:
    with torch.inference_mode():
        hidden = model(**word_tokenizer()(text, return_tensors="pt")).last_hidden_state[0]
    mean: torch.Tensor = hidden.mean(0)
    unit: torch.Tensor = mean / torch.linalg.vector_norm(mean)
    return unit


def test_outcomes_are_cosines_and_their_ranks_are_compared(similar: str) -> None:
    scored, model = evaluator(similar), tiny_bert()
    scored.prepare(model)
    found = scored.score(model, torch.arange(24))
    expected = [
        float(embedded(model, row["first"]) @ embedded(model, row["second"])) for row in pairs()
    ]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    scores = [float(str(row["score"])) for row in pairs()]
    rho = float(stats.spearmanr(found.numpy(), scores).statistic)
    seen = scored(model)["spearman"]
    assert seen.value == pytest.approx(rho)
    assert seen.variance == pytest.approx((1 - rho**2) ** 2 * (1 + rho**2 / 2) / 21)
    part = torch.arange(3, 12)
    again = scored.summary(found[part], part)["spearman"].value
    assert again == pytest.approx(float(stats.spearmanr(found[part], scores[3:12]).statistic))


def test_a_query_is_answered_by_one_of_its_documents_among_the_nearest(asked: str) -> None:
    scored, model = evaluator(asked, task="retrieval", at=[1, 2, 5]), tiny_bert()
    scored.prepare(model)
    assert scored.size == 8  # "good good" is asked once
    found = scored.score(model, torch.arange(8))
    queries = list(dict.fromkeys(str(row["query"]) for row in answers()))
    documents = [str(row["document"]) for row in answers()]
    for query, outcome in zip(queries, found, strict=True):
        near = sorted(documents, key=lambda d: -float(embedded(model, query) @ embedded(model, d)))
        right = {str(row["document"]) for row in answers() if row["query"] == query}
        rank = min(
            sum(one not in right for one in near[: near.index(document)]) for document in right
        )
        assert outcome.tolist() == [float(rank < k) for k in (1, 2, 5)]
    summary = scored(model)
    assert [summary[f"accuracy_at_{k}"].count for k in (1, 2, 5)] == [8, 8, 8]


def test_a_readable_encoder_finds_its_documents(asked: str) -> None:
    scored = evaluator(asked, task="retrieval")
    scored.prepare(readable_bert())
    assert scored(readable_bert())["accuracy_at_1"].value > 0.8


def test_further_documents_and_prefixes(asked: str, tmp_path: Path) -> None:
    corpus = rows_file(tmp_path / "corpus.jsonl", [{"document": "a film"}, {"document": "the a"}])
    plain = evaluator(asked, task="retrieval", at=9)
    with pytest.raises(EvaluationError, match="has 9 different documents"):
        plain.prepare(tiny_bert())
    more = evaluator(asked, task="retrieval", at=9, corpus=corpus)
    more.prepare(tiny_bert())
    assert len(more.ready.second) == 11
    marked = evaluator(asked, task="retrieval", query_prefix="very ", document_prefix="not ")
    marked.prepare(tiny_bert())
    assert marked.ready.first.ids[1] == 5 + WORDS.index("very")
    assert marked.ready.second.ids[1] == 5 + WORDS.index("not")


def test_equal_scores_are_refused(tmp_path: Path) -> None:
    rows = [row | {"score": 1} for row in pairs()]
    with pytest.raises(EvaluationError, match=r"all scores of .* are 1, and nothing correlates"):
        evaluator(rows_file(tmp_path / "a.jsonl", rows)).prepare(tiny_bert())


def test_an_encoder_that_gives_the_same_for_all_fails(similar: str, asked: str) -> None:
    first, second = evaluator(similar), evaluator(asked, task="retrieval")
    model = tiny_bert()
    first.prepare(model)
    second.prepare(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.encoder.layer[-1].output.LayerNorm.bias.fill_(1.0)
    with pytest.raises(EvaluationError, match="predictions are 1, and have no correlation"):
        first(model)
    assert second(model)["accuracy_at_1"].value == 0  # ties count against a query
    with torch.no_grad():
        model.encoder.layer[-1].output.LayerNorm.bias.zero_()
    with pytest.raises(EvaluationError, match="are NaN or infinite"):
        second(model)


def test_pooling_of_the_folder_is_taken(similar: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    word_tokenizer().save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    scored = Embeddings(data=similar, tokenizer=str(folder))
    scored.prepare(tiny_bert())
    assert scored.ready.pooling == "cls"


@pytest.mark.slow
def test_models_of_sentence_transformers_are_scored_as_they_embed(
    similar: str, tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers", reason="it is not installed")
    tiny_bert().save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    whole = library.SentenceTransformer(str(tmp_path / "model"), device="cpu")
    whole.save(str(tmp_path / "saved"))
    first = whole.encode([row["first"] for row in pairs()], convert_to_tensor=True)
    second = whole.encode([row["second"] for row in pairs()], convert_to_tensor=True)
    expected = torch.cosine_similarity(first.double(), second.double())
    of_itself = Embeddings(data=similar)
    of_itself.prepare(whole)
    found = of_itself.score(whole, torch.arange(24))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    of_folder = Embeddings(data=similar, tokenizer=str(tmp_path / "saved"))
    of_folder.prepare(tiny_bert())
    found = of_folder.score(tiny_bert(), torch.arange(24))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    state = whole.state_dict()
    merged = map_bo.MergedModelProblem(
        whole,
        base=state,
        experts={"a": {name: tensor * 1.01 for name, tensor in state.items()}},
        evaluators={"similar": Embeddings(data=similar)},
        check_base=False,
    )
    seen = merged.evaluate(torch.zeros(1, 1).double(), generator=make_generator(0))
    assert float(seen.Y) == pytest.approx(of_itself(whole)["spearman"].value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "clustering"}, "task must be one of similarity, retrieval"),
        ({"at": 3}, "at was given, and the task is similarity"),
        ({"query_prefix": "q: "}, "query_prefix was given, and the task is similarity"),
        ({"task": "retrieval", "at": [1, 1]}, "at must be different numbers"),
        ({"task": "retrieval", "at": 0}, "at must be"),
        ({"pooling": "max"}, "pooling must be one of"),
    ],
)
def test_settings_that_are_not_possible_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as found:
        evaluator("a.csv", **settings)
    assert found.value.hint


def test_a_query_may_be_asked_twice(asked: str) -> None:
    scored, model = evaluator(asked, task="retrieval", at=[1, 3]), tiny_bert()
    scored.prepare(model)
    whole = scored.score(model, torch.arange(scored.size))
    items = torch.arange(scored.size).repeat(2)
    assert torch.equal(scored.score(model, items), whole.repeat(2, 1))
