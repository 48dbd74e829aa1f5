"""Decoding batch by batch, where each answer ends, and draws, by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

from map_bo.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Drawing", "RefusesNaN", "Stopping", "ends_of", "greedy"]


class Stopping:
    """Ends each answer of a batch by itself, and remembers how long it was.

    Args:
        tokenizer: The tokenizer.
        stop: Strings that end an answer.
        ends: Tokens that end one.
        start: Where in the rows the answers begin.
        rows: Number of rows.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        ends: Sequence[int],
        start: int,
        rows: int,
    ) -> None:
        self._tokenizer, self._stop, self._start = tokenizer, stop, start
        self._ends = frozenset(ends)
        self._length: list[int | None] = [None] * rows
        # Each token has one byte of the string or more; those of a cut character have none.
        self._tail = max((len(one.encode()) for one in stop), default=0) + 4

    def __call__(self, input_ids: Tensor, scores: object, **_: object) -> Tensor:
        """Return which rows have ended (``b``); see ``StoppingCriteria`` of transformers."""
        length = input_ids.shape[1] - self._start
        ends = input_ids[:, self._start :][:, -self._tail :].tolist()
        for i, end in enumerate(ends):
            if self._length[i] is None and self._ended(end):
                self._length[i] = length
        done = [length is not None for length in self._length]
        return torch.tensor(done, device=input_ids.device)

    def _ended(self, end: list[int]) -> bool:
        """Return whether a text is over, by its last tokens."""
        if end and end[-1] in self._ends:
            return True
        if not self._stop:
            return False
        text = str(self._tokenizer.decode(end))  # with special tokens, which may be stop strings
        return any(one in text for one in self._stop)

    def lengths(self, found: Tensor) -> list[int]:
        """Return how many tokens each answer has."""
        most = found.shape[1] - self._start
        return [most if length is None else length for length in self._length]

    def texts(self, found: Tensor) -> list[str]:
        """Return the answers, without what stopped them."""
        texts = []
        for row, length in zip(found.tolist(), self.lengths(found), strict=True):
            written = row[self._start : self._start + length]
            text = str(self._tokenizer.decode(written, skip_special_tokens=True))
            cuts = [at for one in self._stop if (at := text.find(one)) >= 0]
            texts.append(text[: min(cuts)] if cuts else text)
        return texts


class RefusesNaN:
    """Stops a model whose outputs are NaN: the largest of them would still be some token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (``b x tokens``) as they are; see ``LogitsProcessor``.

        Raises:
            EvaluationError: When one is NaN.
        """
        if bool(scores.isnan().any()):
            raise EvaluationError(
                "the model's outputs hold NaN",
                hint="these coefficients break the model; narrow the bounds if many do",
            )
        return scores


class Drawing:
    """Makes greedy decoding draw: the largest of log-probabilities plus Gumbel noise is a draw.

    (Gumbel 1954; Maddison, Tarlow and Minka 2014, A* Sampling, section 2.) So each example draws
    from a generator of its own, whatever its batch.
    """

    def __init__(
        self,
        generators: Sequence[Generator],
        temperature: float,
        top_k: int | None,
        top_p: float | None,
    ) -> None:
        self._generators, self._temperature = generators, temperature
        self._top_k, self._top_p = top_k, top_p

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (``b x tokens``) whose largest is the draw; see ``LogitsProcessor``."""
        logits = (scores.float() / self._temperature).log_softmax(-1)
        if self._top_k is not None and self._top_k < logits.shape[-1]:
            least = logits.topk(self._top_k, -1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self._top_p is not None:
            ranked, order = logits.softmax(-1).sort(-1, descending=True)
            beyond = (ranked.cumsum(-1) - ranked) >= self._top_p  # what comes before is enough
            logits = logits.masked_fill(beyond.scatter(-1, order, beyond), -torch.inf)
        uniform = torch.stack(
            [
                torch.rand(logits.shape[-1], generator=one, dtype=torch.float64)
                for one in self._generators
            ]
        )
        noise = -(-uniform.clamp(min=1e-300).log()).log()
        return logits + noise.to(logits)


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text, by the model's settings and the tokenizer."""
    settings = model.generation_config
    said = None if settings is None else settings.eos_token_id
    found = {said} if isinstance(said, int) else set(said or [])
    if isinstance(tokenizer.eos_token_id, int):
        found.add(tokenizer.eos_token_id)
    return sorted(found)


def greedy(most: int, *, ends: Sequence[int], pad: int) -> GenerationConfig:
    """Return settings of greedy decoding, whatever the model's own are.

    Args:
        most: Longest answer, in tokens.
        ends: Tokens that end one.
        pad: Token to pad with.
    """
    from transformers import GenerationConfig

    # What is not said here is taken from the model, whose penalties would not be greedy.
    settings: dict[str, object] = {
        "max_new_tokens": most,
        "do_sample": False,
        "num_beams": 1,
        "num_return_sequences": 1,
        "min_length": 0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "encoder_repetition_penalty": 1.0,
        "encoder_no_repeat_ngram_size": 0,
        "return_dict_in_generate": False,
        "use_cache": True,
        "eos_token_id": list(ends) or None,
        "pad_token_id": pad,
    }
    return GenerationConfig.from_dict(settings)
