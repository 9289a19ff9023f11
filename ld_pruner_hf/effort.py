"""Latent shifts for a hundredth of the cost: first-order estimates of all operators, put right by real errors of some [ours].

1. `linear_run`: backward passes along a few original trajectories estimate all operators at once.
2. Calibration: what is first order at fault with, it is at fault with for all operators of a sort (taking out what a norm
   follows, say, where the gradient along the output vanishes). So the real error of one operator of each sort is measured.
3. Refinement: the real errors of the least important, where the choice is made, for as many as the cost allows.

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

from .latents import Job, RecordedCall
from .linear import LinearRun, Todo, linear_run
from .plan import Modification
from .profiling import run
from .surgery import applied
from .trajectory import Moment, evenly, output_tensor

EFFORTS = {"exact": 1, "balanced": 100, "fast": 500}
"""effort -> the denoiser inputs of the paper's loop, for each that is spent. "exact" is the loop itself, and the definition."""

MAX_LATENTS, MAX_PROBES = 16, 4
ROWS_IN_A_CALL = 8
CALIBRATION_POINTS = 4
CALIBRATION_SHARE = 0.7
FAULT = 3.5
"""By what factor a sort of operators must be over- or underestimated to be put right; less is within the error of its measurement."""
REFINEMENT_POINTS = 24, 64
LINEAR_SHARE = 0.6


@dataclass(frozen=True)
class Budget:
    """What may be spent, in inputs of the denoiser (one row of a batch).

    Attributes:
        latents, probes: of the linear estimates. sorts: of operators, that are calibrated. refined: how many rows of scores
            get real errors, at `points` inputs each.
    """

    latents: int
    probes: int
    sorts: int = 0
    refined: int = 0
    points: int = 0

    @classmethod
    def of(cls, effort: str, rows: int, sorts: int, latents: int, inputs: int) -> Budget:
        """Share out the cost.

        Args:
            rows: operators and stand-ins. sorts: of them. latents: of the paper's loop. inputs: of the denoiser, that one
                latent takes.
        """
        total = rows * latents * inputs / EFFORTS[effort]
        calibration = sorts * CALIBRATION_POINTS
        if calibration > CALIBRATION_SHARE * total:
            return cls._linear(total, latents, inputs)
        total -= calibration
        linear = replace(cls._linear(total * LINEAR_SHARE, latents, inputs), sorts=sorts)
        rest = total - linear.cost(inputs) + calibration
        least, most = REFINEMENT_POINTS
        points = int(min(most, linear.latents * inputs, max(least, rest / rows)))
        refined = min(rows, int(rest / points))
        if refined < rows / 20:  # too few to matter: better linear estimates instead
            return replace(cls._linear(total, latents, inputs), sorts=sorts)
        return replace(linear, refined=refined, points=points)

    @classmethod
    def _linear(cls, total: float, latents: int, inputs: int) -> Budget:
        best = cls(1, 1)
        while (
            best.latents < min(latents, MAX_LATENTS) and replace(best, latents=best.latents + 1).cost(inputs) <= total
        ):
            best = replace(best, latents=best.latents + 1)
        while best.probes < MAX_PROBES and replace(best, probes=best.probes + 1).cost(inputs) <= total:
            best = replace(best, probes=best.probes + 1)
        return best

    def cost(self, inputs: int) -> float:
        """Of everything, in denoiser inputs; for each latent a run, a forward with hooks, and a backward for each probe."""
        linear = self.latents * inputs * (2.3 + 1.5 * self.probes)
        return linear + self.sorts * CALIBRATION_POINTS + self.refined * self.points


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


def sorts_of(todo: Todo) -> dict[tuple[str, str, str], list[int]]:
    """Rows that first order treats alike: same class, same name in its block, same stand-in."""
    sorts: dict[tuple[str, str, str], list[int]] = {}
    for n, (operator, spec) in enumerate(todo):
        name = next((part for part in reversed(operator.path.split(".")) if not part.isdigit()), "")
        sorts.setdefault((operator.kind, name, spec.name), []).append(n)
    return sorts


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
    runs = [linear_run(pipe, model, job, todo, budget.probes, seed + i, steps) for i, job in enumerate(jobs)]
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

    if budget.sorts:
        faults = _faults(moves, list(sorts_of(todo).values()), lambda rows: errors(rows, CALIBRATION_POINTS))
        moves, halves = moves * faults, halves * faults
    if budget.refined:
        real = errors(moves.nan_to_num(0.0).argsort()[: budget.refined].tolist(), budget.points)
        measured = torch.isfinite(real)
        moves = torch.where(measured, real / _level(real, moves), moves)
    return Estimates(moves, halves)


def _level(errors: torch.Tensor, moves: torch.Tensor) -> float:
    """The usual ratio of real errors to estimated moves."""
    both = torch.isfinite(errors) & torch.isfinite(moves) & (errors > 0) & (moves > 0)
    return (errors[both] / moves[both]).log().median().exp().item() if both.any() else 1.0


def _faults(
    moves: torch.Tensor, sorts: Sequence[list[int]], errors: Callable[[Sequence[int]], torch.Tensor]
) -> torch.Tensor:
    """(rows,): what each estimate is to be multiplied by; 1 where its sort is estimated well enough."""
    middle = [sorted(rows, key=lambda n: moves[n].item())[len(rows) // 2] for rows in sorts]
    real = errors(middle)
    ratios = real / moves / _level(real, moves)
    faults = torch.ones_like(moves)
    for n, rows in zip(middle, sorts, strict=True):
        if math.isfinite(ratios[n]) and not 1 / FAULT < ratios[n] < FAULT:
            faults[rows] = ratios[n]
    return faults


def _points(runs: Sequence[LinearRun], count: int) -> list[tuple[Moment, torch.Tensor]]:
    """About `count` denoiser inputs of the runs, spread over runs, calls and rows, with the gain of each row's error."""
    calls = [(r.moments[i], r.gains[i]) for r in runs for i in range(len(r.moments))]
    chosen = evenly(calls, max(2, math.ceil(count / ROWS_IN_A_CALL)))
    each = math.ceil(count / len(chosen))
    points = []
    for j, (moment, gain) in enumerate(chosen):
        batch = len(moment.output)
        rows = sorted({(j + r * batch // each) % batch for r in range(min(each, batch))})
        points.append((_rows(moment, rows), gain[rows].double().cpu()))
    return points


def _rows(moment: Moment, rows: list[int]) -> Moment:
    batch = len(moment.output)
    call: RecordedCall = moment.call.mapped(lambda t: t[rows] if t.ndim and len(t) == batch else t)
    return Moment(call, moment.output[rows])


def _weighted_error(model: nn.Module, points: Sequence[tuple[Moment, torch.Tensor]]) -> float:
    total = 0.0
    for moment, gain in points:
        error = output_tensor(run(model, moment.call)).double() - moment.output.double()
        total += (error.flatten(1).square().sum(1).cpu() * gain).sum().item()
    return math.sqrt(total)
