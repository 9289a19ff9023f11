"""Latent shifts for a hundredth of the cost: first-order estimates of all operators, put right by real errors of some [ours].

1. `linear_run`: backward passes along a few original trajectories estimate all operators at once; where first order is at
   fault, the module around the operator runs for real.
2. Refinement: the real errors of the least important, where the choice is made, for as many as the cost allows.

A real error is that of the modified denoiser's output at inputs of the original trajectories. Its square counts by how much it
grows on the way to the final latent, as the backward passes have measured. No denoising run is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from .latents import Job
from .linear import LinearRun, Todo, linear_run
from .plan import Modification
from .profiling import run
from .surgery import applied
from .trajectory import Moment, evenly, output_tensor, rows_of

EFFORTS = {"exact": 1, "balanced": 64, "fast": 450}
"""effort -> the denoiser inputs of the paper's loop, for each that is spent. "exact" is the loop itself, and the definition.

They go through the denoiser in larger batches than the loop's, so that the time becomes less still.
"""

MAX_LATENTS, MAX_PROBES = 16, 4
ROWS_IN_A_CALL = 8
AROUND = {"balanced": 4.0, "fast": 1.0}
"""effort -> denoiser calls' worth of MACs for each call, to run the modules around operators."""
REFINEMENT_POINTS = 24, 64
LINEAR_SHARE = 0.6


@dataclass(frozen=True)
class Budget:
    """What may be spent, in inputs of the denoiser (one row of a batch).

    Attributes:
        latents, probes: of the linear estimates. around: denoiser calls' worth, for each call, of running modules around
            operators. refined: how many rows of scores get real errors, at `points` inputs each.
    """

    latents: int
    probes: int
    around: float = 0.0
    refined: int = 0
    points: int = 0

    @classmethod
    def of(cls, effort: str, rows: int, latents: int, inputs: int) -> Budget:
        """Share out the cost.

        Args:
            rows: operators and stand-ins. latents: of the paper's loop. inputs: of the denoiser, that one latent takes.
        """
        total = rows * latents * inputs / EFFORTS[effort]
        least, most = REFINEMENT_POINTS
        linear = cls._linear(effort, total * LINEAR_SHARE, latents, inputs)
        rest = total - linear.cost(inputs)
        points = int(min(most, linear.latents * inputs, max(least, rest / rows)))
        refined = min(rows, int(rest / points))
        if refined < rows / 20:  # too few to matter: better linear estimates instead
            return cls._linear(effort, total, latents, inputs)
        return replace(linear, refined=refined, points=points)

    @classmethod
    def _linear(cls, effort: str, total: float, latents: int, inputs: int) -> Budget:
        best = cls(1, 1, AROUND.get(effort, 1.0))
        while (
            best.latents < min(latents, MAX_LATENTS) and replace(best, latents=best.latents + 1).cost(inputs) <= total
        ):
            best = replace(best, latents=best.latents + 1)
        while best.probes < MAX_PROBES and replace(best, probes=best.probes + 1).cost(inputs) <= total:
            best = replace(best, probes=best.probes + 1)
        return best

    def cost(self, inputs: int) -> float:
        """Of everything, in denoiser inputs; for each latent a run, a forward with hooks, and a backward for each probe."""
        linear = self.latents * inputs * (2.3 + 1.5 * self.probes + self.around)
        return linear + self.refined * self.points


@dataclass(frozen=True)
class Estimates:
    """Estimated root mean square moves of the final latents.

    Attributes:
        moves: (rows,); NaN where there is no estimate. halves: (2, rows), each from one half of the latents.
    """

    moves: torch.Tensor
    halves: torch.Tensor

    def agreement(self, k: int) -> float:
        """Share of the k lowest rows that both halves of the latents agree on: how sure the choice of k is, or better."""
        a, b = (set(half.nan_to_num(math.inf).argsort()[:k].tolist()) for half in self.halves)
        return len(a & b) / k


def estimate_moves(
    pipe: Any,
    model: nn.Module,
    jobs: Sequence[Job],
    todo: Todo,
    budget: Budget,
    seed: int,
    steps: int,
    on_row: Callable[[], Any],
) -> Estimates:
    """Estimate how far each row of `todo` moves the final latents. Run it inside `preserved(pipe)`.

    Args:
        jobs: the runs to look at, of so many scheduler `steps`. on_row: called for each row whose real error has been measured.

    Raises:
        ValueError: the pipeline's arithmetic cannot be differentiated.
    """
    runs: list[LinearRun] = []
    for i, job in enumerate(jobs):
        around = runs[0].around if runs else budget.around
        runs.append(linear_run(pipe, model, job, todo, budget.probes, seed + i, steps, around))
    squares = torch.cat([r.squares.sum(1) for r in runs], dim=1)  # (rows, latents)
    moves = squares.mean(1).sqrt()
    halves = torch.stack([squares[:, i::2].mean(1).sqrt() for i in range(2)])

    def errors(rows: Sequence[int], count: int) -> torch.Tensor:
        points = _points(runs, count)
        found = torch.full_like(moves, float("nan"))
        for n in rows:
            operator, spec = todo[n]
            with applied(model, [Modification(operator.path, operator.kind, spec)]):
                found[n] = _weighted_error(model, points)
            on_row()
        return found

    if budget.refined:
        real = errors(moves.nan_to_num(0.0).argsort()[: budget.refined].tolist(), budget.points)
        measured = torch.isfinite(real)
        moves = torch.where(measured, real / _level(real, moves), moves)
    return Estimates(moves, halves)


def _level(errors: torch.Tensor, moves: torch.Tensor) -> float:
    """The usual ratio of real errors to estimated moves."""
    both = torch.isfinite(errors) & torch.isfinite(moves) & (errors > 0) & (moves > 0)
    return (errors[both] / moves[both]).log().median().exp().item() if both.any() else 1.0


def _points(runs: Sequence[LinearRun], count: int) -> list[tuple[Moment, torch.Tensor]]:
    """About `count` denoiser inputs of the runs, spread over runs, calls and rows, with the gain of each row's error."""
    calls = [(r.moments[i], r.gains[i]) for r in runs for i in range(len(r.moments))]
    chosen = evenly(calls, max(2, math.ceil(count / ROWS_IN_A_CALL)))
    each = math.ceil(count / len(chosen))
    points = []
    for j, (moment, gain) in enumerate(chosen):
        batch = len(moment.output)
        rows = sorted({(j + r * batch // each) % batch for r in range(min(each, batch))})
        points.append((rows_of(moment, rows), gain[rows].double().cpu()))
    return points


def _weighted_error(model: nn.Module, points: Sequence[tuple[Moment, torch.Tensor]]) -> float:
    total = 0.0
    for moment, gain in points:
        error = output_tensor(run(model, moment.call)).double() - moment.output.double()
        total += (error.flatten(1).square().sum(1).cpu() * gain).sum().item()
    return math.sqrt(total)
