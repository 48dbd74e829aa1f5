"""What a language model writes: whether the answers are right, how long they are, how fast."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from map_bo.data import Metric
from map_bo.errors import ConfigError, EvaluationError, did_you_mean
from map_bo.evaluators.data import Data
from map_bo.evaluators.evaluator import Measurement, device_of, evaluating
from map_bo.evaluators.examples import ExampleEvaluator
from map_bo.evaluators.isolation.quiet import quiet
from map_bo.evaluators.language.decoding import Drawing, RefusesNaN, Stopping, ends_of, greedy
from map_bo.evaluators.language.grading import Grading, Which, texts_of
from map_bo.evaluators.language.models import (
    longest_input,
    pad_id,
    plain_ids,
    pretrained,
    starts_with_bos,
)
from map_bo.evaluators.text.tokens import check_vocabulary, load_tokenizer
from map_bo.plain import identity_of
from map_bo.rng import child, make_generator
from map_bo.values import real_number, switch, whole_number

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Answer", "Generation", "fill"]

_FIELD = re.compile(r"\{\{|\}\}|\{(\w+)\}")
_METRICS: dict[str, Metric] = {
    "score": Metric("score"),
    "tokens": Metric("tokens", direction="min", kind="loss"),
    "seconds": Metric("seconds", direction="min", kind="loss"),
}


@dataclass(frozen=True)
class Answer:
    """What a model wrote for one example.

    Attributes:
        text: The text, up to a stop string or the end.
        tokens: How many tokens were generated, with the one that ended it.
        seconds: Time of its batch over the number of examples in that batch.
    """

    text: str
    tokens: int
    seconds: float


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return a template with ``{name}`` replaced by the values; ``{{`` and ``}}`` are braces."""

    def put(found: re.Match[str]) -> str:
        return values[found[1]] if found[1] else found[0][0]

    return _FIELD.sub(put, template)


class Generation(ExampleEvaluator):
    """What a language model writes for prompts: the score of its answers, and their length.

    Causal models and those with an encoder (T5) work. Prompts are padded on the left (of causal
    models) and masked, so that an answer does not depend on its batch. Decoding is greedy unless a
    temperature is given; then every example draws from a generator of its own, seeded by ``seed``
    and the example, and the draws are the same for every model. Penalties and other defaults of
    the model's own generation settings are not used, except for the tokens that end a text.

    An answer is right when it is equal to the target, or to any of a list of targets, without
    spaces around it. With ``pattern`` the answer is what the pattern finds in the text: its first
    group, or all of it where it has none; where it finds nothing, the score is 0. With ``grader``
    the score is what that function says of the answer.

    Args:
        data: Prompts and targets, by the roles that the template names and ``target``: a data
            block, its settings, or a path.
        tokenizer: Folder or hub id of the tokenizer, or a tokenizer of transformers; None is the
            model's own.
        template: The prompt, with roles of the data in braces.
        system: System message, with ``chat_template``.
        chat_template: Whether to put the prompt into the tokenizer's chat template, as the message
            of the user.
        max_new_tokens: Longest answer.
        stop: Strings that end an answer; they are not part of it.
        pattern: Regular expression (Python's syntax) that finds the answer in the text.
        which: Which of its matches.
        pattern_seconds: Longest time that the pattern may take on a text; the evaluation fails
            beyond, with the pattern in the message.
        ignore_case: Whether upper and lower case are the same.
        ignore_punctuation: Whether punctuation is left out.
        words: What stands for a target of the data: ``{0: "no", 1: "yes"}``; None for itself.
        grader: Function of the answer and the target that returns a number in [0, 1]; in a
            configuration ``module:function``.
        metrics: Which of ``score`` (a proportion), ``tokens`` (generated, to minimise) and
            ``seconds`` (per example, to minimise; not reproducible) are measured.
        temperature: 0 is greedy; above, tokens are drawn.
        top_k: Only that many likeliest tokens are drawn from.
        top_p: Only the likeliest tokens up to this share of probability are drawn from.
        seed: Seed of the draws.
        batch_size: Examples per call.

    Raises:
        ConfigError: For a setting that is not possible.
    """

    def __init__(
        self,
        *,
        data: Data | Mapping[str, Any] | str,
        tokenizer: object = None,
        template: str = "{prompt}",
        system: str | None = None,
        chat_template: bool = False,
        max_new_tokens: int = 64,
        stop: str | Sequence[str] = (),
        pattern: str | None = None,
        which: Which = "first",
        pattern_seconds: float = 1.0,
        ignore_case: bool = False,
        ignore_punctuation: bool = False,
        words: Mapping[Any, str] | None = None,
        grader: Callable[[str, Any], float] | None = None,
        metrics: str | Sequence[str] = ("score", "tokens"),
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 0,
        batch_size: int = 8,
    ) -> None:
        super().__init__(batch_size=batch_size)
        self.data = Data.of(data)
        self.tokenizer = tokenizer
        self.template = template
        self._fields = tuple(dict.fromkeys(f for f in _FIELD.findall(_text(template)) if f))
        if not self._fields or "target" in self._fields:
            raise ConfigError(
                f"the template must name roles of the prompt, got {template!r}",
                hint="write roles in braces, such as 'Question: {prompt}\\nAnswer:'; the target is "
                "what the model is to find",
            )
        self.chat_template = switch("chat_template", chat_template)
        self.system = system
        if system is not None and not self.chat_template:
            raise ConfigError(
                "a system message is given without the chat template",
                hint="add chat_template=True, or write it into the template",
            )
        self.max_new_tokens = whole_number("max_new_tokens", max_new_tokens, least=1)
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(one, str) and one for one in self.stop):
            raise ConfigError(
                f"stop strings must be text, got {self.stop!r}", hint="such as stop=['\\n']"
            )
        self.grading = Grading(
            pattern, which, pattern_seconds, ignore_case, ignore_punctuation, grader
        )
        if words is not None and not (isinstance(words, Mapping) and words):
            raise ConfigError(
                f"words must map targets to texts, got {words!r}",
                hint="such as words={0: 'no', 1: 'yes'}",
            )
        self.words = None if words is None else {str(key): str(w) for key, w in words.items()}
        self._measured = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        for name in self._measured:
            if name not in _METRICS:
                raise ConfigError(
                    f"generation does not measure {name!r}", hint=did_you_mean(name, _METRICS)
                )
        if not self._measured or len(set(self._measured)) < len(self._measured):
            raise ConfigError(
                f"metrics must be different ones, got {self._measured!r}",
                hint=f"choose from {', '.join(_METRICS)}",
            )
        self.temperature = real_number("temperature", temperature, least=0)
        self.top_k = None if top_k is None else whole_number("top_k", top_k, least=1)
        self.top_p = None if top_p is None else real_number("top_p", top_p, above=0, most=1)
        if not self.temperature and (top_k is not None or top_p is not None):
            raise ConfigError(
                "top_k and top_p are for drawing, and the temperature is 0",
                hint="give a temperature, such as 1, or leave them out",
            )
        self.seed = whole_number("seed", seed, least=0)
        self._prompts: _Prompts | None = None

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that were asked for, in that order."""
        return tuple(_METRICS[name] for name in self._measured)

    @property
    def size(self) -> int:
        """The number of prompts."""
        return len(self._known.ids)

    @property
    def means(self) -> tuple[bool, ...]:
        """All metrics are means."""
        return (True,) * len(self._measured)

    @property
    def digest(self) -> str:
        """Digest of prompts, targets and all settings that decide the outcomes."""
        return self._known.digest

    @property
    def repeats(self) -> bool:
        """Whether answers are greedy and no time is measured."""
        return not self.temperature and "seconds" not in self._measured

    @property
    def _known(self) -> _Prompts:
        return self.require_ready(self._prompts, "the prompts have not been read")

    def prepare(self, model: nn.Module) -> None:
        """Read and tokenise the prompts.

        Raises:
            EvaluationError: When there are none, a target cannot be compared, a prompt leaves no
                room for an answer, the model cannot generate, or the tokenizer is of another
                vocabulary or has no chat template.
        """
        network = pretrained(model, by="generation")
        if not network.can_generate():
            raise EvaluationError(
                f"{type(network).__name__} cannot generate text",
                hint="give a causal language model, such as of AutoModelForCausalLM",
            )
        tokenizer = load_tokenizer(self.tokenizer, network)
        check_vocabulary(tokenizer, network)
        if self.chat_template and not tokenizer.chat_template:
            raise EvaluationError(
                "the tokenizer has no chat template",
                hint="leave chat_template out, or give the tokenizer of the tuned model",
            )
        examples = self.data.read([*self._fields, "target"])
        columns = {name: [str(v) for v in examples.columns[name]] for name in self._fields}
        prompts = [
            fill(self.template, dict(zip(columns, row, strict=True)))
            for row in zip(*columns.values(), strict=True)
        ]
        targets = examples.columns["target"]
        if self.words is not None:
            lacking = sorted({str(one) for one in targets} - set(self.words))
            if lacking:
                raise EvaluationError(
                    f"{examples.where} holds the target {lacking[0]!r}, for which there is no "
                    f"word; there are words for {', '.join(self.words)}",
                    hint=f"add it: words={{..., {lacking[0]!r}: ...}}",
                )
            targets = tuple(self.words[str(one)] for one in targets)
        if self.grading.grader is None:
            for row, target in zip(examples.rows, targets, strict=True):
                if not texts_of(target):
                    raise EvaluationError(
                        f"the target in row {row + 1} of {examples.where} is a "
                        f"{type(target).__name__}, which no answer is equal to",
                        hint="give text, a number or a list of texts, or a grader",
                    )
        ids = self._tokenise(prompts, tokenizer, encoder=network.config.is_encoder_decoder)
        limit = longest_input(network)
        if limit is not None:
            # An encoder reads the prompt alone, and its decoder the answer.
            room = limit - self.max_new_tokens * (not network.config.is_encoder_decoder)
            rows = [row for row, one in zip(examples.rows, ids, strict=True) if len(one) > room]
            if rows:
                raise EvaluationError(
                    f"{len(rows)} of {len(ids)} prompts of {examples.where} are longer than "
                    f"{room} tokens, such as row {rows[0] + 1}: the model reads {limit} tokens, "
                    f"and answers have up to {self.max_new_tokens}",
                    hint="shorten the prompts, or lower max_new_tokens",
                )
        self._prompts = _Prompts(
            tuple(ids),
            tuple(targets),
            tokenizer,
            _digest([self._settings(), ids, [repr(target) for target in targets]]),
        )

    def check_data(self) -> None:
        """Read the prompts and targets; see `ExampleEvaluator`."""
        self.data.read([*self._fields, "target"])

    def outcomes(self, model: nn.Module, items: Tensor) -> Tensor:
        """Return the metrics of each example, ``b x m``, or ``b`` of a single one."""
        answers = self._generate(pretrained(model, by="generation"), items)
        found = {
            "tokens": [float(answer.tokens) for answer in answers],
            "seconds": [answer.seconds for answer in answers],
        }
        if "score" in self._measured:
            found["score"] = [
                self.grading.score(answer.text, self._known.targets[item])
                for answer, item in zip(answers, items.tolist(), strict=True)
            ]
        columns = [torch.tensor(found[name], dtype=torch.float64) for name in self._measured]
        return columns[0] if len(columns) == 1 else torch.stack(columns, -1)

    def summary(self, outcomes: Tensor, items: Tensor | None = None) -> dict[str, Measurement]:
        """Return the means of outcomes; see the base class.

        Where all answers are equally long, as those that were cut off are, the noise of their
        length is not known.
        """
        found = super().summary(outcomes, items)
        return {
            name: replace(seen, variance=None) if seen.variance == 0 else seen
            for name, seen in found.items()
        }

    def answers(self, model: nn.Module, items: Sequence[int] | Tensor) -> list[Answer]:
        """Return what the model writes for some examples, to read it.

        Args:
            model: The model.
            items: Indices of examples.
        """
        network = pretrained(model, by="generation")
        indices = torch.as_tensor(items)
        answers: list[Answer] = []
        with evaluating(model), torch.inference_mode():
            for start in range(0, len(indices), self.batch_size):
                answers += self._generate(network, indices[start : start + self.batch_size])
        return answers

    def _settings(self) -> dict[str, Any]:
        left_out = ("data", "tokenizer", "grading", "batch_size")
        own = {k: v for k, v in vars(self).items() if k[0] != "_" and k not in left_out}
        return {**own, "metrics": self._measured, "grading": identity_of(self.grading)}

    def _tokenise(
        self, prompts: list[str], tokenizer: PreTrainedTokenizerBase, *, encoder: bool
    ) -> list[list[int]]:
        if self.chat_template:  # which writes the tokens that begin and end a text itself
            before = [] if self.system is None else [{"role": "system", "content": self.system}]
            texts = [
                str(
                    tokenizer.apply_chat_template(
                        [*before, {"role": "user", "content": prompt}],
                        tokenize=False,
                        add_generation_prompt=True,
                    )
                )
                for prompt in prompts
            ]
            return plain_ids(tokenizer, texts)
        if encoder:
            return [list(ids) for ids in tokenizer(prompts, verbose=False)["input_ids"]]
        ids = plain_ids(tokenizer, prompts)
        if starts_with_bos(tokenizer):
            ids = [[int(tokenizer.bos_token_id), *one] for one in ids]
        if not all(ids):  # something has to come before the first token
            start = tokenizer.bos_token_id or tokenizer.eos_token_id or 0
            ids = [one or [int(start)] for one in ids]
        return ids

    def _generate(self, model: PreTrainedModel, items: Tensor) -> list[Answer]:
        known, device = self._known, device_of(model)
        network: Any = model  # transformers does not say that `generate` is a method
        rows = [known.ids[item] for item in items.tolist()]
        longest, b = max(map(len, rows)), len(rows)
        encoder = bool(model.config.is_encoder_decoder)
        ids = torch.full((b, longest), pad_id(known.tokenizer))
        mask = torch.zeros((b, longest), dtype=torch.long)
        for i, row in enumerate(rows):
            part = slice(0, len(row)) if encoder else slice(longest - len(row), longest)
            ids[i, part] = torch.tensor(row)
            mask[i, part] = 1
        ends = ends_of(model, known.tokenizer)
        stopping = Stopping(known.tokenizer, self.stop, ends, 1 if encoder else longest, b)
        begin = _now(device)
        with quiet("transformers"):
            found = network.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                generation_config=greedy(
                    self.max_new_tokens, ends=ends, pad=pad_id(known.tokenizer)
                ),
                stopping_criteria=[stopping],
                logits_processor=self._processors(items),
            )
        seconds = (_now(device) - begin) / b
        texts = stopping.texts(found)
        lengths = stopping.lengths(found)
        return [Answer(text, length, seconds) for text, length in zip(texts, lengths, strict=True)]

    def _processors(self, items: Tensor) -> list[RefusesNaN | Drawing]:
        if not self.temperature:
            return [RefusesNaN()]
        parent = make_generator(self.seed)
        generators = [child(parent, "example", item) for item in items.tolist()]
        return [RefusesNaN(), Drawing(generators, self.temperature, self.top_k, self.top_p)]


@dataclass(frozen=True, eq=False)
class _Prompts:
    """Tokenised prompts.

    Attributes:
        ids: Tokens of each prompt.
        targets: What the data have as the target of each.
        tokenizer: The tokenizer.
        digest: Digest of all that decides the outcomes.
    """

    ids: tuple[list[int], ...]
    targets: tuple[object, ...]
    tokenizer: PreTrainedTokenizerBase
    digest: str


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"the template must be text, got {value!r}", hint="such as '{prompt}'")
    return value


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
