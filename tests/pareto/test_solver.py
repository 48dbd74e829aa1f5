from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Generator, Tensor

from map_bo.pareto.dominance import non_dominated
from map_bo.pareto.evolution import NSGA2
from map_bo.pareto.gradient import GradientSolver
from map_bo.pareto.solver import FrontSolver, solve_front
from map_bo.rng import make_generator
from map_bo.space import CoefficientSpace
from tests.choices import CHOICE, truth


@dataclass
class Recording:
    """A solver that notes the spaces it was given."""

    seen: list[CoefficientSpace] = field(default_factory=list)

    def solve(self, mean: object, space: CoefficientSpace, *, generator: Generator) -> Tensor:
        self.seen.append(space)
        return space.sample(4, generator=generator)


@pytest.mark.parametrize("solver", [GradientSolver(points=40, steps=25), NSGA2(40, 30)])
def test_the_front_of_a_choice_is_that_of_all_options(solver: FrontSolver) -> None:
    X = solve_front(solver, truth, CHOICE, generator=make_generator(3))
    CHOICE.check(X)
    Y = truth(X)
    assert bool(non_dominated(Y).all())
    # The first metric is best under TIES alone, the second under the sum alone.
    assert X[Y[:, 0].argmax(), 2] == 1
    assert X[Y[:, 1].argmax(), 2] == 0
    best = torch.tensor([0.7, 0.4, 1.0, 0.6]).double()
    assert float((X[Y[:, 0].argmax()] - best).abs().max()) < 0.05
    everywhere = truth(CHOICE.sample(2000, generator=make_generator(4)))
    beaten = (everywhere.unsqueeze(1) > Y + 0.02).all(-1).any(0)
    assert not bool(beaten.any())


def test_each_option_is_solved_alone_and_a_space_without_a_choice_as_it_is() -> None:
    solver = Recording()
    solve_front(solver, truth, CHOICE, generator=make_generator(0))
    assert solver.seen == list(CHOICE.by_option)
    box = CoefficientSpace.box(("a", "b"))
    alone = solve_front(solver, truth, box, generator=make_generator(0))
    assert solver.seen[3] == box
    assert torch.equal(alone, box.sample(4, generator=make_generator(0)))
