r"""The diagonal Fisher information of a model on data, from gradients of single examples.

``F = 1/n sum_i E_{y ~ p(y | x_i)} (d log p(y | x_i) / d theta)^2``, elementwise: the diagonal
estimate of Matena and Raffel, *Merging Models with Fisher-Weighted Averaging*, arXiv 2111.09832
(their section on Fisher merging). The square is taken of each example's gradient; the square of a
batch's mean gradient is another quantity, which shrinks with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, vjp, vmap

from map_bo.errors import MergeError
from map_bo.merging.checkpoints.checkpoint import CheckpointSource
from map_bo.merging.vectors.live import model_ties
from map_bo.operators.statistics.batches import (
    Batch,
    call,
    digest_of,
    each_batch,
    evaluating,
    map_batch,
    targets_of,
)
from map_bo.operators.statistics.statistics import Statistics, finish_statistics

__all__ = ["LogLikelihood", "fisher", "next_tokens"]

LogLikelihood = Callable[[nn.Module, Any], Tensor]
"""``(model, batch) -> n`` log-likelihoods, one per example, differentiable in the weights."""

_LABELS = ("exact", "sampled", "given")
_HELD = 1 << 26  # numbers of per-example gradients held at once: 256 MiB in float32
_MOST = 64  # examples at once


def fisher(
    model: nn.Module,
    batches: Iterable[Any],
    log_likelihood: LogLikelihood | None = None,
    *,
    labels: str | None = None,
    samples: int = 1,
    generator: Generator | None = None,
    limit: int | None = None,
    chunk: int | None = None,
    data: str = "",
    of: CheckpointSource | None = None,
) -> Statistics:
    """Return the diagonal Fisher information of all floating parameters, a mean over examples.

    Without ``log_likelihood`` the model is a classifier: it returns logits (``n x K``), or an
    object that has them as ``logits``, as Hugging Face models do. The labels behind the gradients
    are then, by ``labels``:

    - ``"exact"`` (default): the expectation over the model's own predictions, as Matena and Raffel
      define it, with one gradient for each of the ``K`` classes. Labels in the batches are not
      used, and may be missing.
    - ``"sampled"``: ``samples`` labels per example, drawn from those predictions: for many classes.
    - ``"given"``: the labels in the batches. This is the empirical Fisher, which is cheaper and no
      estimate of the same thing: where the model fits its labels perfectly it is zero.

    With ``log_likelihood`` it is the empirical Fisher of that function, because nothing else can
    be known of it; `next_tokens` is the one of a causal language model, whose expectation over all
    texts is out of reach.

    Buffers (BatchNorm's statistics) have no gradient and get none; `Fisher` averages them.
    Per-example gradients are computed together by ``torch.func.vmap``, or, for a model that it
    cannot transform, one by one. The model is in evaluation mode meanwhile, and is left as it was.

    Args:
        model: The expert, on the device to compute on.
        batches: ``(inputs..., labels)``, or mappings with the arguments of a Hugging Face model.
        log_likelihood: ``(model, batch) -> n`` log-likelihoods, where the default does not fit.
        labels: ``"exact"``, ``"sampled"`` or ``"given"``; see above.
        samples: Labels drawn for each example, with ``labels="sampled"``.
        generator: Their source; a generator on the CPU.
        limit: Use so many examples at most; a few hundred are enough in the paper.
        chunk: Examples whose gradients are held at once, each as large as the model; by default
            what fits into 256 MiB. With 1, ``vmap`` is not used.
        data: What to call the data in the record.
        of: The expert's checkpoint, where it differs from the model in dtype or names.

    Raises:
        MergeError: When there are no batches, or a batch, a likelihood or the result cannot be
            used.
    """
    mode = labels or ("exact" if log_likelihood is None else "given")
    _check_settings(mode, log_likelihood, samples, generator, chunk)
    parameters = {
        f"model.{name}": parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
    }
    if not parameters:
        raise MergeError(
            "the model has no floating parameters", hint="give the expert with its weights"
        )
    where = next(iter(parameters.values())).device
    size = sum(parameter.numel() for parameter in parameters.values())
    scorer = _Scorer(model, log_likelihood or _log_probabilities)
    gradients = _Gradients(scorer, parameters, chunk or max(1, min(_MOST, _HELD // size)))
    examples = 0
    with evaluating(model):
        for batch, n in each_batch(batches, where, limit):
            for start in range(0, n, gradients.chunk):
                part = map_batch(lambda t, s=start: t[s : s + gradients.chunk], batch)  # type: ignore[misc]
                with torch.no_grad():
                    scores = scorer(part)
                count = min(gradients.chunk, n - start)
                _check_scores(scores, count, log_likelihood is None)
                if log_likelihood is not None:
                    directions = torch.ones_like(scores)[:, None]
                else:
                    directions = _directions(scores, part, mode, samples, generator)
                gradients.add(part, directions)
            examples += n
    if examples and not any(bool(total.any()) for total in gradients.totals.values()):
        raise MergeError(
            "no log-likelihood depends on the weights: all gradients are zero",
            hint="compute it without torch.no_grad() and .detach(); given labels that the model "
            "is certain of have no gradient either, and labels='exact' is better",
        )
    return finish_statistics(
        "fisher",
        {
            name.removeprefix("model."): total / max(1, examples)
            for name, total in gradients.totals.items()
        },
        model=digest_of(model, of),
        examples=examples,
        settings={
            "labels": mode,
            "log_likelihood": getattr(log_likelihood, "__qualname__", type(log_likelihood).__name__)
            if log_likelihood is not None
            else "classifier",
            **({"samples": samples} if mode == "sampled" else {}),
        },
        data=data,
        ties=model_ties(model),
    )


def next_tokens(model: nn.Module, batch: Any) -> Tensor:
    """Return the log-likelihood of each text under a Hugging Face causal language model (``n``).

    It sums ``log p(token | tokens before)`` over the tokens that ``attention_mask`` keeps, or,
    where the batch has ``labels``, over those whose label is not -100.
    """
    output = call(model, batch)
    targets = batch.get("labels", batch["input_ids"])[:, 1:]
    kept = targets != -100
    if "labels" not in batch and "attention_mask" in batch:
        kept = batch["attention_mask"][:, 1:].bool()
    scores = output.logits[:, :-1].float().log_softmax(-1)
    found = scores.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    result: Tensor = (found * kept).sum(-1)
    return result


class _Scorer(nn.Module):
    """Makes a function of a model and a batch a module, so that its weights can be replaced."""

    def __init__(self, model: nn.Module, score: LogLikelihood) -> None:
        super().__init__()
        self.model = model
        self.score = score

    def forward(self, batch: Batch) -> Tensor:
        return self.score(self.model, batch)


def _log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    output = call(model, batch)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise MergeError(
            f"the model returns {shape}; a classifier returns one row of logits per example",
            hint="pass log_likelihood, a function (model, batch) -> one number per example; "
            "`next_tokens` is that of a causal language model",
        )
    return logits.float().log_softmax(-1)


class _Gradients:
    """Sums of squared per-example gradients.

    Args:
        scorer: From a batch to ``n`` or ``n x K`` scores.
        parameters: Name -> value, of all that is differentiated by.
        chunk: Examples at once.
    """

    def __init__(self, scorer: _Scorer, parameters: dict[str, Tensor], chunk: int) -> None:
        self.scorer = scorer
        self.parameters = parameters
        self.chunk = chunk
        self.totals = {
            name: torch.zeros_like(value, dtype=torch.float32) for name, value in parameters.items()
        }
        self.together = chunk > 1

    def add(self, batch: Batch, directions: Tensor) -> None:
        """Add the squares of each example's derivatives along its directions (``n x S (x K)``)."""
        if self.together and len(directions) > 1:
            try:
                found = self._together(batch, directions)
            except Exception:
                # The scores of this batch were computed before, so it is vmap that fails; if it
                # is not, the way below raises the same again.
                self.together = False
            else:
                for name, total in self.totals.items():
                    total += found[name].sum(0)
                return
        for i in range(len(directions)):
            self._alone(map_batch(lambda tensor, i=i: tensor[i : i + 1], batch), directions[i])  # type: ignore[misc]

    def _together(self, batch: Batch, directions: Tensor) -> dict[str, Tensor]:
        def one(example: Batch, along: Tensor) -> dict[str, Tensor]:
            alone = map_batch(lambda tensor: tensor.unsqueeze(0), example)

            def score(parameters: dict[str, Tensor]) -> Tensor:
                result: Tensor = functional_call(self.scorer, parameters, (alone,))[0]
                return result

            pull: Callable[..., Any] = vjp(score, self.parameters)[1]
            squares: dict[str, Tensor] = {}
            for direction in along.unbind():
                (gradient,) = pull(direction)
                for name, value in gradient.items():
                    square = value.float().square()
                    squares[name] = squares[name] + square if name in squares else square
            return squares

        found: dict[str, Tensor] = vmap(one)(batch, directions)
        return found

    def _alone(self, batch: Batch, along: Tensor) -> None:
        leaves = {name: p.detach().requires_grad_() for name, p in self.parameters.items()}
        with torch.enable_grad():
            score = functional_call(self.scorer, leaves, (batch,))[0]
        if not score.requires_grad:
            return  # it does not depend on the weights
        for k, direction in enumerate(along.unbind()):
            gradients = torch.autograd.grad(
                score,
                list(leaves.values()),
                direction,
                retain_graph=k + 1 < len(along),
                allow_unused=True,
            )
            for total, gradient in zip(self.totals.values(), gradients, strict=True):
                if gradient is not None:
                    total += gradient.float().square()


def _directions(
    scores: Tensor, batch: Batch, mode: str, samples: int, generator: Generator | None
) -> Tensor:
    """Return ``n x S x K``: for each example the labels to differentiate, scaled.

    The scale is the square root of a label's weight, as the gradient is squared afterwards.
    """
    classes = scores.shape[1]
    if mode == "exact":
        return torch.diag_embed((scores / 2).exp())
    if mode == "sampled":
        drawn = torch.multinomial(
            scores.exp().cpu(), samples, replacement=True, generator=generator
        ).to(scores.device)
    else:
        drawn = targets_of(batch).long()[:, None]
        if drawn.dim() != 2 or int(drawn.min()) < 0 or int(drawn.max()) >= classes:
            raise MergeError(
                f"labels of shape {list(drawn.shape[:1] + drawn.shape[2:])} do not name one of "
                f"{classes} classes per example",
                hint=f"labels are whole numbers from 0 to {classes - 1}",
            )
    scale = drawn.shape[1] ** -0.5
    chosen: Tensor = torch.nn.functional.one_hot(drawn, classes)
    result: Tensor = chosen.to(scores) * scale
    return result


def _check_settings(
    mode: str,
    log_likelihood: LogLikelihood | None,
    samples: int,
    generator: Generator | None,
    chunk: int | None,
) -> None:
    if mode not in _LABELS:
        raise MergeError(
            f"labels must be one of {', '.join(_LABELS)}, got {mode!r}", hint="see `fisher`"
        )
    if log_likelihood is not None and mode != "given":
        raise MergeError(
            f"labels={mode!r} needs the logits of a classifier, and a log_likelihood was given",
            hint="leave out labels, or log_likelihood",
        )
    if mode == "sampled" and generator is None:
        raise MergeError(
            "labels are to be sampled without a generator",
            hint="pass generator=map_bo.rng.make_generator(seed)",
        )
    if samples < 1 or (chunk is not None and chunk < 1):
        raise MergeError(
            f"samples and chunk must be at least 1, got {samples} and {chunk}",
            hint="leave chunk out for what fits into 256 MiB",
        )


def _check_scores(scores: Any, n: int, classifier: bool) -> None:
    good = isinstance(scores, Tensor) and scores.dim() == (2 if classifier else 1)
    if not good or len(scores) != n:
        shape = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise MergeError(
            f"the log-likelihood of {n} examples is {shape}",
            hint="return one number per example (not their mean)",
        )
    if not bool(torch.isfinite(scores).all()):
        raise MergeError(
            "the log-likelihood of an example is NaN or infinite",
            hint="look for NaN in the data and the weights; compute in float32",
        )
