"""Latent shifts for a hundredth of the cost: first-order estimates of all operators, put right by real errors of some [ours].

1. `linear_run`: backward passes along a few original trajectories estimate all operators at once; where first order is at
   fault, the module around the operator runs for real.
2. Refinement: real errors, for as many operators as the cost allows: those nearest to the cut if it is known how many will be
   taken out, until no other is near enough to matter; else the least important.

A real error is that of the modified denoiser's output at inputs of the original trajectories. Its square counts by how much such
errors grow on the way to the final latent, as the backward passes have measured. No denoising run is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from .latents import Job
from .linear import LinearRun, Todo, linear_run
from .plan import Modification
from .profiling import run
from .reuse import FirstStep
from .selection import competing
from .surgery import applied
from .trajectory import Moment, evenly, output_tensor, rows_of

EFFORTS = {"exact": 1, "balanced": 60, "fast": 450}
"""effort -> the denoiser inputs of the paper's loop, for each that is spent. "exact" is the loop itself, and the definition.

They go through the denoiser in larger batches than the loop's, so that the time becomes less still.
"""

MAX_LATENTS = 16
ROWS_IN_A_CALL = 12
AROUND = {"balanced": 4.0, "fast": 1.0}
"""effort -> denoiser calls' worth of MACs for each call, to run the modules around operators."""
REFINEMENT_POINTS = 32, 64
STAGES, SURE = 4, 3.0
"""Refinement near the cut is done in so many stages, and stops where rows are so many standard deviations away from it."""
LINEAR_SHARE, LINEAR_COST = 0.4, 4.5


@dataclass(frozen=True)
class Budget:
    """What may be spent, in inputs of the denoiser (one row of a batch).

    Attributes:
        latents: of the linear estimates. around: denoiser calls' worth, for each call, of running modules around
            operators. refined: how many rows of scores get real errors, at `points` inputs each.
    """

    latents: int
    around: float = 0.0
    refined: int = 0
    points: int = 0

    @classmethod
    def of(cls, effort: str, rows: int, latents: int, inputs: int, k: int | None = None) -> Budget:
        """Share out the cost.

        Args:
            rows: operators and stand-ins. latents: of the paper's loop. inputs: of the denoiser, that one latent takes.
            k: how many operators will be taken out, if that is known: refinement near the cut needs few rows.
        """
        total = rows * latents * inputs / EFFORTS[effort]
        least, most = REFINEMENT_POINTS
        linear = cls._linear(effort, total * LINEAR_SHARE, latents, inputs)
        rest = total - linear.cost(inputs)
        points = int(min(most, linear.latents * inputs, max(least, rest / rows)))
        refined = min(rows, int(rest / points))
        if points < least or refined < (rows / 20 if k is None else k / 4):  # too few: better linear estimates instead
            return cls._linear(effort, total, latents, inputs)
        return replace(linear, refined=refined, points=points)

    @classmethod
    def _linear(cls, effort: str, total: float, latents: int, inputs: int) -> Budget:
        best = cls(1, AROUND.get(effort, 1.0))
        while (
            best.latents < min(latents, MAX_LATENTS) and replace(best, latents=best.latents + 1).cost(inputs) <= total
        ):
            best = replace(best, latents=best.latents + 1)
        return best

    def cost(self, inputs: int) -> float:
        """Of everything, in denoiser inputs; for each latent a run, a forward, another with stand-ins, and a backward."""
        linear = self.latents * inputs * (LINEAR_COST + self.around)
        return linear + self.refined * self.points


def estimate_moves(
    pipe: Any,
    model: nn.Module,
    jobs: Sequence[Job],
    todo: Todo,
    budget: Budget,
    seed: int,
    steps: int,
    k: int | None,
    batch_size: int,
    on_row: Callable[[], Any],
) -> torch.Tensor:
    """Estimate how far each row of `todo` moves the final latents. Run it inside `preserved(pipe)`.

    Args:
        jobs: the runs to look at, of so many scheduler `steps`. k: how many operators will be taken out, if that is known.
        batch_size: memory is taken for the denoising of so many latents. on_row: called for each row whose real error has been measured.

    Returns:
        (1 or 2, rows): the mean of each half of the latents; NaN where there is no estimate.

    Raises:
        ValueError: the pipeline's arithmetic cannot be differentiated.
    """
    runs: list[LinearRun] = []
    for i, job in enumerate(jobs):
        around = runs[0] if runs else budget.around
        runs.append(linear_run(pipe, model, job, todo, seed + i, steps, around, batch_size))
    squares = torch.cat([r.squares.sum(1) for r in runs], dim=1)  # (rows, latents)
    halves = [squares[:, i::2] for i in range(min(2, squares.shape[1]))]
    moves = torch.stack([half.sqrt().mean(1) for half in halves])
    return _refined(model, todo, runs, moves, budget, k, on_row) if budget.refined else moves


def _refined(
    model: nn.Module,
    todo: Todo,
    runs: Sequence[LinearRun],
    moves: torch.Tensor,
    budget: Budget,
    k: int | None,
    on_row: Callable[[], Any],
) -> torch.Tensor:
    """The estimated moves, with the real errors of `budget.refined` rows in their place."""
    points = _points(runs, budget.points)
    errors, real = _Errors(points, len(todo), len(moves)), torch.full_like(moves, math.nan)
    same_inputs = FirstStep(model, [partial(run, model, p.moment.call) for p in points], [o.path for o, _ in todo])
    for stage in range(STAGES):
        known = torch.isfinite(real[0])
        mixed = torch.where(known, real / _level(real, moves), moves)
        near = _nearness(todo, mixed.mean(0), k).masked_fill(known, math.inf)
        far = SURE * _spread(real, moves) if k else math.inf
        rows = [n for n in near.argsort().tolist() if near[n] < far]
        for n in rows[: budget.refined * (stage + 1) // STAGES - int(known.sum())]:
            operator, spec = todo[n]
            modification = Modification(operator.path, operator.kind, spec)
            with applied(model, [modification]), same_inputs.reused([operator.path]):
                errors.measure(n, model)
            on_row()
        real = errors.moves()
    return torch.where(torch.isfinite(real), real / _level(real, moves), moves)


def _nearness(todo: Todo, moves: torch.Tensor, k: int | None) -> torch.Tensor:
    """How far each row is from the last operator that competes for k places, as | log ratio |; with no k, its move."""
    if k is None:
        return moves.nan_to_num(0.0)
    best: dict[str, float] = {}
    for (operator, _), move in zip(todo, moves.tolist(), strict=True):
        best[operator.path] = min(best.get(operator.path, math.inf), move if math.isfinite(move) else math.inf)
    ranked = sorted(best, key=lambda path: best[path])
    return (moves / best[ranked[competing(ranked, k) - 1]]).log().abs().nan_to_num(0.0)


def _log_ratios(real: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    """Of real errors to estimated moves, for the n rows that have both: (parts, n)."""
    ratios = (real / moves).log()
    return ratios[:, torch.isfinite(ratios).all(0)]


def _level(real: torch.Tensor, moves: torch.Tensor) -> torch.Tensor:
    """(parts, 1): the usual ratio of real errors to estimated moves."""
    ratios = _log_ratios(real, moves)
    return ratios.median(1, keepdim=True).values.exp() if ratios.numel() else torch.ones(len(moves), 1)


def _spread(real: torch.Tensor, moves: torch.Tensor) -> float:
    """How far estimates are off: the standard deviation of log ratios, infinite before it is known."""
    ratios = _log_ratios(real, moves).mean(0)
    return ratios.std().item() if len(ratios) > 2 else math.inf


@dataclass(frozen=True)
class _Point:
    """Some rows of a denoiser call of the original trajectory, and the gradient (rows, ...) of the final latents by them."""

    moment: Moment
    gradient: torch.Tensor


def _points(runs: Sequence[LinearRun], count: int) -> list[_Point]:
    """About `count` denoiser inputs of the runs, spread over runs, calls and rows; whole calls where they must stay so."""
    calls = [(r.moments[i], r.gradients[i]) for r in runs for i in range(len(r.moments))]
    whole = not runs[0].row_memory
    most = max(len(m.output) for m, _ in calls) if whole else ROWS_IN_A_CALL
    number = max(2, math.ceil(count / most))
    while number < len(calls) and count > sum(min(most, len(m.output)) for m, _ in evenly(calls, number)):
        number += 1
    chosen = evenly(calls, number)
    points: list[_Point] = []
    for j, (moment, gradient) in enumerate(chosen):
        batch, missing = len(moment.output), count - sum(len(p.moment.output) for p in points)
        each = batch if whole else min(batch, math.ceil(missing / (len(chosen) - j)))
        rows = sorted((j + r * batch // each) % batch for r in range(each))
        points.append(_Point(rows_of(moment, rows), gradient[rows].float()))
    return points


class _Errors:
    """Real errors of the denoiser's output at some points, and how far they move the final latents.

    The squared gradient says how much a squared error grows on its way if it has no direction of its own; multiplied with the
    error, how much it does grow, but that varies by chance. So errors are weighted by the one, and the weights of a point by
    how much larger the other is, on average over the operators.

    Args:
        rows: how many there are to measure. parts: how many estimates to make for each, from every so many-th input.
    """

    def __init__(self, points: Sequence[_Point], rows: int, parts: int) -> None:
        self.points, self.parts = points, parts
        self.sizes = [len(p.moment.output) for p in points]
        self.expected = torch.full((rows, sum(self.sizes)), math.nan, dtype=torch.float64)
        self.grown = self.expected.clone()

    def measure(self, n: int, model: nn.Module) -> None:
        """Row n is what the model, as it is now, does."""
        expected, grown = [], []
        for p in self.points:
            error = (output_tensor(run(model, p.moment.call)).float() - p.moment.output.float()).flatten(1)
            gradient = p.gradient.flatten(1)
            expected.append(error.square().sum(1) * gradient.square().mean(1))
            grown.append(torch.linalg.vecdot(gradient, error).square())
        self.expected[n], self.grown[n] = (torch.cat(parts).double().cpu() for parts in (expected, grown))

    def moves(self) -> torch.Tensor:
        """(parts, rows), NaN where nothing was measured."""
        known = torch.isfinite(self.expected).all(1) & (self.expected.sum(1) > 0)
        totals = self.expected[known].sum(1, keepdim=True)  # every operator counts alike
        expected, grown = ((v[known] / totals).mean(0).split(self.sizes) for v in (self.expected, self.grown))
        growth = torch.cat(
            [(g.sum() / e.sum()).expand(len(e)) for e, g in zip(expected, grown, strict=True)]
        ).nan_to_num(1.0)
        squares = self.expected * growth
        return torch.stack([squares[:, i :: self.parts].sum(1).sqrt() for i in range(self.parts)])
