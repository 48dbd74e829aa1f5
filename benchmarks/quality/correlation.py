"""How alike the errors of two merged models are on the same examples.

python -m benchmarks.quality.correlation        a table: real cases, mean correlations

The correlation, over examples, of what two models of a case get right; see
`map_bo.surrogates.links`, which takes the share of the sampling noise that differs between
evaluations from it. *Near*: coefficients about .1 apart; *far*: any two of the experts, the blend
and random points.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from benchmarks.quality.cases import available, case
from benchmarks.quality.truth import MergedNetworks
from map_bo.rng import child, make_generator

__all__ = ["correlations"]

CASES = (
    *("digits-mlp-2", "digits-mlp-4", "digits-mlp-8", "digits-mlp-16", "digits-cnn-4"),
    *("plateau-4", "images-4", "blocks-12"),
)
_POINTS = 12
_NEAR = 0.1


def correlations(name: str) -> tuple[float, float]:
    """Return the mean correlation of near and of far pairs of models of a case."""
    held = case(name)
    networks = getattr(held.measure, "__self__", None)
    assert isinstance(networks, MergedNetworks)
    space, source = held.problem.space, make_generator(0)
    X = torch.cat([space.anchors().X[1:], space.sample(_POINTS, generator=child(source, "points"))])
    step = torch.randn(X.shape, generator=child(source, "steps"), dtype=torch.float64)
    here = _standardised(networks.right(X))
    there = _standardised(networks.right(space.project(X + _NEAR * step)))
    near = (here * there).mean(-1).nanmean()
    upper = torch.triu_indices(len(X), len(X), 1)
    pairs = torch.einsum("ate,bte->tab", here, here) / here.shape[-1]
    return float(near), float(pairs[:, upper[0], upper[1]].nanmean())


def _standardised(right: Tensor) -> Tensor:
    """Return what is right (``n x m x examples``), standardised; NaN where all or none is."""
    values = right.double()
    values = values - values.mean(-1, keepdim=True)
    deviation = values.square().mean(-1, keepdim=True).sqrt()
    return values / torch.where(deviation > 0, deviation, torch.nan)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES))
    print("| case | near | far |\n|---|---|---|")
    for name in parser.parse_args().cases:
        if reason := available(name):
            print(f"| {name} | skipped: {reason} | |")
            continue
        near, far = correlations(name)
        print(f"| {name} | {near:.2f} | {far:.2f} |", flush=True)


if __name__ == "__main__":
    main()
