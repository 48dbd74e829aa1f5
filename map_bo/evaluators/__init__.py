"""Evaluators: scoring one model, with the uncertainty of the score.

The ready-made ones are found here by name, ``map_bo.evaluators.accuracy``; each is imported when it
is first asked for, so that what one of them needs is not needed by the others.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "Data": "map_bo.evaluators.data",
    "Embeddings": "map_bo.evaluators.embeddings",
    "Entropy": "map_bo.evaluators.entropy",
    "ExampleEvaluator": "map_bo.evaluators.examples",
    "Generation": "map_bo.evaluators.generation",
    "ImageClassification": "map_bo.evaluators.images.classification",
    "Items": "map_bo.evaluators.items",
    "LMEval": "map_bo.evaluators.lm_eval",
    "Perplexity": "map_bo.evaluators.perplexity",
    "Regression": "map_bo.evaluators.text.regression",
    "SeveralMetrics": "map_bo.evaluators.metrics",
    "TextClassification": "map_bo.evaluators.text.classification",
    "TextPairs": "map_bo.evaluators.text.classification",
    "TorchLoader": "map_bo.evaluators.loaders.torch_loader",
    "ZeroShot": "map_bo.evaluators.images.zero_shot",
    "accuracy": "map_bo.evaluators.evaluator",
    "mean_loss": "map_bo.evaluators.evaluator",
    "mean_probability": "map_bo.evaluators.evaluator",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME)
