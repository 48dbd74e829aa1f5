from __future__ import annotations

import logging
import math
import pickle
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from map_bo.data import Metric
from map_bo.errors import ConfigError, EvaluationError, MissingDependencyError
from map_bo.evaluators.evaluator import Measurement
from map_bo.evaluators.examples import ExampleEvaluator, listening
from map_bo.evaluators.kinds import evaluator_from
from map_bo.evaluators.lm_eval import LMEval
from map_bo.evaluators.perplexity import Perplexity
from tests.contracts.example_evaluator_contract import ExampleEvaluatorContract
from tests.evaluators.harness_tasks import write_tasks
from tests.evaluators.surroundings import surroundings
from tests.evaluators.tiny_language import tiny_decoder, tiny_encoder_decoder, tiny_tokenizer

needs_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def model(tokenizer: Any) -> nn.Module:
    return tiny_decoder(len(tokenizer))  # type: ignore[no-any-return]


@needs_harness
@pytest.mark.parametrize(
    ("tasks", "metrics"),
    [
        ("choice", {"choice": "acc"}),
        ("choice", None),
        ("texts", {"texts": "bits_per_byte"}),
        ("texts", None),
        ("answer", None),
        ("by_task", None),
        ("last", {"last": "perplexity"}),
        ("brier", None),
    ],
    ids=str,
)
class TestOneTask(ExampleEvaluatorContract):
    @pytest.fixture
    def evaluator(self, tasks: str, metrics: Any, folder: str, tokenizer: Any) -> ExampleEvaluator:
        return LMEval(
            tasks=tasks, metrics=metrics, include_path=folder, tokenizer=tokenizer, batch_size=2
        )

    @pytest.fixture
    def model(self, tokenizer: Any) -> nn.Module:
        return tiny_decoder(len(tokenizer))  # type: ignore[no-any-return]


def prepared(folder: str, tokenizer: Any, model: nn.Module, **settings: Any) -> LMEval:
    evaluator = LMEval(include_path=folder, tokenizer=tokenizer, **settings)
    evaluator.prepare(model)
    return evaluator


@needs_harness
def test_values_are_those_of_the_harness(folder: str, tokenizer: Any, model: nn.Module) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = ["choice", "choice_few", "texts", "answer", "last", "brier"]
    own = prepared(folder, tokenizer, model, tasks=tasks)(model)
    manager = TaskManager(include_path=folder, include_defaults=False)
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=tasks, task_manager=manager
    )
    values = {
        f"{task}_{key.replace(',none', '').replace(',', '_')}": value
        for task, results in found["results"].items()
        for key, value in results.items()
        if "," in key and "stderr" not in key
    }
    assert set(own) == set(values)
    for name, value in values.items():
        assert own[name].value == pytest.approx(float(value), rel=1e-6), name
    for task in ("choice", "choice_few"):
        error = found["results"][task]["acc_stderr,none"]
        share, count = own[f"{task}_acc"].value, own[f"{task}_acc"].count
        assert count is not None
        assert error == pytest.approx(math.sqrt(share * (1 - share) / (count - 1)))


@needs_harness
def test_metrics_are_known_with_direction_and_kind(folder: str) -> None:
    def metrics(tasks: Any, **settings: Any) -> tuple[Metric, ...]:
        return LMEval(tasks=tasks, include_path=folder, **settings).metrics

    assert metrics("texts") == (
        Metric("word_perplexity", "min", "loss", lower=1),
        Metric("byte_perplexity", "min", "loss", lower=1),
        Metric("bits_per_byte", "min", "loss"),
    )
    assert metrics("answer") == (Metric("exact_match_letter"), Metric("exact_match_whole"))
    one = metrics("answer", metrics={"answer": "exact_match,whole"})
    assert one == (Metric("exact_match"),)
    assert metrics("by_size") == metrics("by_task") == (Metric("acc"),)
    names = [metric.name for metric in metrics(["last", "by_size"])]
    assert names == ["last_perplexity", "last_acc", "by_size_acc"]
    names = [metric.name for metric in metrics("plain", metrics={"texts": ["bits_per_byte"]})]
    assert names == ["choice_acc", "choice_acc_norm", "texts_bits_per_byte"]
    assert [metric.name for metric in metrics("half_corpus")] == ["acc"]
    assert metrics("brier") == (Metric("brier_score", "min", "loss"),)


@needs_harness
def test_several_tasks_are_scored_in_one_call(
    folder: str, tokenizer: Any, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval import evaluator as harness

    evaluator = prepared(folder, tokenizer, model, tasks=["choice", "texts", "answer"])
    calls: list[object] = []
    plain = harness.evaluate

    def counting(**settings: Any) -> Any:
        calls.append(settings["samples"])
        return plain(**settings)

    monkeypatch.setattr(harness, "evaluate", counting)
    seen = evaluator(model)
    assert len(calls) == 1
    assert list(seen) == [metric.name for metric in evaluator.metrics]
    outcomes = evaluator.score(model, torch.arange(evaluator.size))
    assert outcomes.shape == (13, 7)
    names = [task for task, _ in evaluator.documents]
    assert evaluator.documents[:4] == [("choice", 0), ("texts", 0), ("answer", 0), ("choice", 1)]
    owners = ["choice"] * 2 + ["texts"] * 3 + ["answer"] * 2
    belongs = torch.tensor([[name == owner for owner in owners] for name in names])
    assert torch.equal(outcomes.isfinite(), belongs)
    items = torch.tensor([8, 0, 7, 0])
    some = evaluator.score(model, items)
    torch.testing.assert_close(some, outcomes[items], equal_nan=True, rtol=1e-5, atol=1e-6)
    assert calls[-1] == {"choice": [0], "texts": [2], "answer": [2]}
    assert evaluator.summary(some, items)["choice_acc"].count == 2
    with pytest.raises(EvaluationError, match="4 outcomes of 13 documents"):
        evaluator.summary(some)


@needs_harness
def test_few_shot_prompts_do_not_depend_on_the_other_documents(
    folder: str, tokenizer: Any, model: nn.Module
) -> None:
    evaluator = prepared(
        folder, tokenizer, model, tasks="choice", num_fewshot=2, metrics={"choice": "acc_norm"}
    )
    asked: list[tuple[str, ...]] = []

    def prompts(items: list[int]) -> list[tuple[str, ...]]:
        leaf = evaluator._known.leaves[0]
        return [one.arguments for one in leaf.chosen(items).instances]

    asked = prompts([0, 1, 2, 3, 4])
    assert prompts([3]) == asked[9:12]
    assert len({one[0].count("?") for one in asked}) == 1
    assert asked[0][0].count("?") == 3  # two examples and the question
    told = prepared(folder, tokenizer, model, tasks="choice", num_fewshot=2, seed=7)
    assert told.digest != evaluator.digest


@needs_harness
def test_the_digest_follows_prompts_and_targets_alone(
    tokenizer: Any, model: nn.Module, tmp_path: Path
) -> None:
    digests = []
    for name, changed in (("a", False), ("b", False), ("c", True)):
        (tmp_path / name).mkdir()
        folder = write_tasks(tmp_path / name)
        if changed:  # the requests are for all choices, and do not tell which is right
            rows = (tmp_path / name / "choice.jsonl").read_text()
            (tmp_path / name / "choice.jsonl").write_text(
                rows.replace('"answer": 1', '"answer": 0')
            )
        digests.append(prepared(folder, tokenizer, model, tasks="choice").digest)
    digests.append(prepared(folder, tokenizer, model, tasks="choice", batch_size=2).digest)
    assert digests[0] == digests[1]
    assert digests[2] == digests[3]
    assert digests[0] != digests[2]


@needs_harness
def test_metrics_of_which_some_documents_say_nothing_are_left_out(
    folder: str, tokenizer: Any, model: nn.Module
) -> None:
    both = prepared(folder, tokenizer, model, tasks=["choice", "answer"])
    items = torch.tensor([i for i, (task, _) in enumerate(both.documents) if task == "choice"])
    found = both.summary(both.score(model, items), items)
    whole = both(model)
    assert found
    assert all(name.startswith("choice") for name in found)
    assert {name: whole[name] for name in found} == found
    assert len(whole) > len(found)


@needs_harness
def test_documents_can_be_chosen(folder: str, tokenizer: Any, model: nn.Module) -> None:
    whole = prepared(folder, tokenizer, model, tasks="choice")
    outcomes = whole.score(model, torch.arange(5))
    first = prepared(folder, tokenizer, model, tasks="choice", limit=2)
    assert torch.equal(first.score(model, torch.arange(2)), outcomes[:2])
    share = prepared(folder, tokenizer, model, tasks="choice", limit=0.5)
    assert share.size == 3  # rounded up, as the harness does
    chosen = prepared(folder, tokenizer, model, tasks="choice", samples={"choice": [4, 1]})
    assert chosen.documents == [("choice", 1), ("choice", 4)]
    assert torch.equal(chosen.score(model, torch.arange(2)), outcomes[[1, 4]])


@needs_harness
def test_prompts_follow_the_settings(folder: str, model: nn.Module) -> None:
    def asked(task: str, **settings: Any) -> tuple[Any, ...]:
        tokenizer = tiny_tokenizer(chat=True)
        found = prepared(folder, tokenizer, model, tasks=task, **settings)._known.leaves[0]
        arguments: tuple[Any, ...] = found.requests[0][0].arguments
        return arguments

    assert asked("answer")[0] == "the cat sat?"
    chat = asked("answer", chat_template=True, system="no")
    assert chat[0] == "[system]no[user]the cat sat?[assistant]"
    assert asked("answer")[1]["max_gen_toks"] == 4
    assert asked("answer", generation={"max_gen_toks": 2})[1]["max_gen_toks"] == 2


@needs_harness
def test_groups_are_averaged_as_they_say(folder: str, tokenizer: Any, model: nn.Module) -> None:
    tasks = prepared(
        folder, tokenizer, model, tasks=["choice", "choice_few"],
        metrics={"choice": "acc", "choice_few": "acc"},
    )(model)  # fmt: skip
    a, b = tasks["choice_acc"].value, tasks["choice_few_acc"].value
    by_size = prepared(folder, tokenizer, model, tasks="by_size")(model)["acc"]
    assert by_size == Measurement((5 * a + 3 * b) / 8, count=8)
    by_task = prepared(folder, tokenizer, model, tasks="by_task")(model)["acc"]
    assert by_task.value == pytest.approx((a + b) / 2)
    spread = a * (1 - a) / 4 + b * (1 - b) / 2
    assert by_task.variance == pytest.approx(spread / 4)
    assert a != b  # or the means would be one


@needs_harness
def test_variances_of_losses_are_those_of_the_documents(
    folder: str, tokenizer: Any, model: nn.Module
) -> None:
    evaluator = prepared(folder, tokenizer, model, tasks="texts")
    outcomes = evaluator.score(model, torch.arange(3))
    sizes = torch.tensor([22.0, 6.0, 37.0], dtype=torch.float64)
    bits = outcomes[:, 2]
    value = float((bits * sizes).sum() / sizes.sum())
    variance = float(((bits - value) * sizes).square().sum() / sizes.sum() ** 2 * 3 / 2)
    seen = evaluator(model)
    assert seen["bits_per_byte"].value == pytest.approx(value)
    assert seen["bits_per_byte"].variance == pytest.approx(variance)
    perplexity = seen["byte_perplexity"]
    assert perplexity.value == pytest.approx(2**value)
    assert perplexity.variance == pytest.approx((2**value * math.log(2)) ** 2 * variance)


@needs_harness
def test_bits_per_byte_are_those_of_the_evaluator_of_perplexity(
    folder: str, tokenizer: Any, model: nn.Module
) -> None:
    harness = prepared(folder, tokenizer, model, tasks="texts", metrics={"texts": "bits_per_byte"})
    own = Perplexity(data=f"{folder}/texts.jsonl", tokenizer=tokenizer, measure="bits_per_byte")
    own.prepare(model)
    a, b = own(model)["bits_per_byte"], harness(model)["bits_per_byte"]
    assert a.value == pytest.approx(b.value, rel=1e-6)
    assert a.variance == pytest.approx(b.variance, rel=1e-4)
    torch.testing.assert_close(
        own.score(model, torch.arange(3)), harness.score(model, torch.arange(3)), rtol=1e-5, atol=0
    )


@needs_harness
def test_models_with_an_encoder_work(folder: str, tokenizer: Any) -> None:
    model = tiny_encoder_decoder(len(tokenizer))
    evaluator = prepared(folder, tokenizer, model, tasks=["choice", "answer"])
    assert evaluator(model)["choice_acc"].count == 5


@needs_harness
def test_it_is_quiet_and_leaves_no_trace(
    folder: str,
    tokenizer: Any,
    model: nn.Module,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    _ = LMEval(tasks="choice", include_path=folder).metrics  # imports the harness
    capfd.readouterr()
    before = surroundings()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.INFO):
        prepared(folder, tokenizer, model, tasks=["choice", "texts", "answer"])(model)
    assert surroundings() == before
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert all(torch.equal(state[name], one) for name, one in model.state_dict().items())


@needs_harness
def test_it_tells_how_far_it_is_while_it_works(
    folder: str, tokenizer: Any, model: nn.Module
) -> None:
    evaluator = prepared(folder, tokenizer, model, tasks=["choice", "texts"])
    heard: list[tuple[int, int]] = []
    with listening(lambda done, of: heard.append((done, of))):
        evaluator(model)
    assert heard == sorted(heard)
    assert {(2, 8), (5, 8), (8, 8)} <= set(heard)


@needs_harness
def test_a_model_that_is_broken_has_no_score(folder: str, tokenizer: Any) -> None:
    model = tiny_decoder(len(tokenizer))
    for task in ("choice", "texts", "answer"):
        evaluator = prepared(folder, tokenizer, model, tasks=task)
        with torch.no_grad():
            weight = model.lm_head.weight.clone()
            model.lm_head.weight.fill_(torch.nan)
        with pytest.raises(EvaluationError, match="NaN"):
            evaluator(model)
        with torch.no_grad():
            model.lm_head.weight.copy_(weight)


@needs_harness
def test_it_can_be_sent_to_another_process(folder: str, tokenizer: Any, model: nn.Module) -> None:
    evaluator = prepared(folder, tokenizer, model, tasks="choice")
    other = pickle.loads(pickle.dumps(evaluator))
    assert other.metrics == evaluator.metrics
    with pytest.raises(EvaluationError, match="not been loaded"):
        _ = other.size
    other.prepare(model)
    assert other.digest == evaluator.digest


@needs_harness
@pytest.mark.parametrize(
    ("settings", "wanted", "hint"),
    [
        ({"tasks": "empty"}, "the task 'empty'", ""),
        ({"tasks": "no_tasks"}, "the group 'no_tasks' has no tasks", "themselves"),
        ({"tasks": "corpus"}, "no metric of 'corpus' can be measured .mcc", "mean over documents"),
        ({"tasks": "unsafe"}, "'unsafe' runs code that the model writes", "unsafe_code=True"),
        ({"tasks": "lost"}, "task 'lost' cannot be loaded: UndefinedError", "templates"),
        ({"tasks": ["choice", "by_size"]}, "'choice' is in 'choice' and in 'by_size'", "leave one"),
        ({"tasks": "choice", "metrics": {"choice": "ac"}}, "no metric 'ac'", "did you mean 'acc'"),
        (
            {"tasks": "answer", "metrics": {"answer": "exact_match,hole"}},
            "no filter 'hole'",
            "did you mean 'whole'",
        ),
        ({"tasks": "choice", "metrics": {"chioce": "acc"}}, "is not evaluated", "'choice'"),
        ({"tasks": "choice", "samples": {"choice": [5]}}, "hold 5, and it has 5", "from 0 to 4"),
        ({"tasks": "choice", "samples": {"chice": [0]}}, "'chice', which is not", "'choice'"),
        ({"tasks": "choice", "chat_template": True}, "no chat template", "leave"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(
    folder: str, tokenizer: Any, model: nn.Module, settings: Any, wanted: str, hint: str
) -> None:
    with pytest.raises(EvaluationError, match=wanted) as found:
        prepared(folder, tokenizer, model, **settings)
    assert hint in (found.value.hint or "")


@needs_harness
def test_a_tokenizer_of_another_vocabulary_is_refused(folder: str, tokenizer: Any) -> None:
    with pytest.raises(EvaluationError, match="the model embeds 90"):
        prepared(folder, tokenizer, tiny_decoder(90), tasks="choice")


@needs_harness
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_tasks_that_the_harness_lacks_are_refused_together(
    folder: str, tokenizer: Any, model: nn.Module
) -> None:
    evaluator = LMEval(
        tasks=["arc_esy", "choice", "hellaswg"], include_path=folder, tokenizer=tokenizer
    )
    assert evaluator.metrics[0].name == "acc"
    with pytest.raises(EvaluationError, match=r"no task 'arc_esy'.*no task 'hellaswg'") as found:
        evaluator.prepare(model)
    assert "did you mean 'arc_easy'?" in (found.value.hint or "")
    pattern = LMEval(tasks="half_c*", include_path=folder)
    assert [metric.name for metric in pattern.metrics] == ["acc"]
    own = LMEval(tasks=["mmlu", "gsm8k", "wikitext"])
    assert [(metric.name, metric.direction) for metric in own.metrics] == [
        ("mmlu_acc", "max"),
        ("gsm8k_exact_match_strict-match", "max"),
        ("gsm8k_exact_match_flexible-extract", "max"),
        ("wikitext_word_perplexity", "min"),
        ("wikitext_byte_perplexity", "min"),
        ("wikitext_bits_per_byte", "min"),
    ]


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"tasks": []}, "tasks must be names"),
        ({"tasks": ["a", 3]}, "tasks must be names"),
        ({"tasks": "a", "metrics": {"a": []}}, "metrics of 'a' must be names"),
        ({"tasks": "a", "limit": 0}, "limit must be a number above 0"),
        ({"tasks": "a", "limit": 2.5}, "limit must be a whole number"),
        ({"tasks": "a", "limit": 2, "samples": {"a": [1]}}, "both limit and samples"),
        ({"tasks": "a", "samples": {"a": []}}, "samples of 'a' are empty"),
        ({"tasks": "a", "samples": {"a": [-1]}}, "samples of 'a' must be"),
        ({"tasks": "a", "num_fewshot": -1}, "num_fewshot must be"),
        ({"tasks": "a", "unsafe_code": "no"}, "unsafe_code must be true or false"),
    ],
)
def test_settings_that_are_not_possible_are_refused(settings: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        LMEval(**settings)


def test_without_the_harness_the_install_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("map_bo.errors.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="evaluation harness needs lm_eval") as found:
        _ = LMEval(tasks="arc_easy").metrics
    assert found.value.hint == 'pip install "map-bo[lm-eval]"'


def test_making_one_reads_nothing(tmp_path: Path) -> None:
    LMEval(tasks="arc_easy", include_path=str(tmp_path / "nothing"))


def test_a_configuration_makes_one() -> None:
    settings = {
        "kind": "lm_eval",
        "tasks": ["arc_easy", "wikitext"],
        "metrics": {"arc_easy": "acc_norm"},
        "samples": {"arc_easy": [0, 2]},
    }
    evaluator = evaluator_from("t", settings)
    assert isinstance(evaluator, LMEval)
    assert evaluator.tasks == ("arc_easy", "wikitext")
    assert evaluator.wanted == {"arc_easy": ("acc_norm",)}
    assert evaluator.samples == {"arc_easy": (0, 2)}
