"""What a merged-model problem demands of its parts before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from map_bo.errors import MergeError
from map_bo.merging.operator import MergeOperator
from map_bo.merging.task_arithmetic import TaskArithmetic
from map_bo.problems.differentiable import check_differentiable
from map_bo.problems.evaluators import Evaluator
from map_bo.space import CoefficientSpace

__all__ = ["built_model", "check_gradients", "check_model", "check_space"]


def check_model(model: object) -> None:
    """Refuse a model that is neither a module nor a function.

    Raises:
        MergeError: When it is not callable.
    """
    if not callable(model):
        raise MergeError(
            f"the model is a {type(model).__name__}",
            hint="give a torch.nn.Module, or a function that returns one",
        )


def built_model(source: nn.Module | Callable[[], nn.Module], device: torch.device) -> nn.Module:
    """Return the model: the one that was given, or what the function returns, on a device.

    Raises:
        MergeError: When the function returns something else.
    """
    model = source if isinstance(source, nn.Module) else source()
    if not isinstance(model, nn.Module):
        raise MergeError(
            f"the model function returned a {type(model).__name__}",
            hint="it must return a torch.nn.Module",
        )
    return model if model is source else model.to(device)


def check_space(space: CoefficientSpace, natural: CoefficientSpace) -> None:
    """Refuse a space of other coefficients than the operator's own, ``natural``.

    Raises:
        MergeError: When names or owners differ.
    """
    if (space.names, space.owner) != (natural.names, natural.owner):
        raise MergeError(
            f"the space has the coefficients {', '.join(space.names)}; the operator takes "
            f"{', '.join(natural.names)}",
            hint="build the space from the same experts and blocks, in the same order",
        )


def check_gradients(
    evaluators: Mapping[str, Evaluator], operator: MergeOperator, *, recalibrated: bool
) -> None:
    """Refuse gradients where metrics are no differentiable function of the coefficients.

    Raises:
        MergeError: For an operator that is not linear in its coefficients, and with recalibration.
        EvaluationError: For an evaluator without gradients.
    """
    if not isinstance(operator, TaskArithmetic):
        raise MergeError(
            f"gradients were asked for, and {type(operator).__name__} is not linear in its "
            "coefficients",
            hint="use TaskArithmetic, or pass gradients=False",
        )
    if recalibrated:
        raise MergeError(
            "gradients were asked for together with recalibration, and they would leave out how "
            "the statistics follow the coefficients",
            hint="leave recalibration out, or pass gradients=False",
        )
    for name, evaluator in evaluators.items():
        check_differentiable(name, evaluator)
