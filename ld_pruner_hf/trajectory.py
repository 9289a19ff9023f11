"""The original trajectory: what the denoiser is called with, and returns, while the unmodified pipeline denoises."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .latents import Condition, RecordedCall, decoder_call, final_latents, make_jobs, record_call
from .profiling import run


def output_tensor(output: Any) -> Any:
    """The sample (B, ...) that a model returns, whatever it is wrapped in; None where it returns none, to fill a cache.

    Samples in a list (Z-Image) are stacked, or if their shapes differ joined to (1, n).
    """
    first = output if isinstance(output, torch.Tensor) else output[0]
    if not isinstance(first, (list, tuple)):
        return first
    same = all(sample.shape == first[0].shape for sample in first)
    return torch.stack(list(first)) if same else torch.cat([sample.flatten() for sample in first])[None]


@dataclass(frozen=True)
class Moment:
    """One call of the denoiser on the original trajectory, and its output (B, ...)."""

    call: RecordedCall
    output: torch.Tensor


def part_of(tensor: torch.Tensor, rows: list[int] | slice, batch: int) -> torch.Tensor:
    """An argument of a call with `batch` rows, for some of them."""
    return tensor[rows] if tensor.ndim and len(tensor) == batch else tensor


def rows_of(moment: Moment, rows: Sequence[int]) -> Moment:
    """The same moment for some rows of its batch."""
    batch, chosen = len(moment.output), list(rows)
    return Moment(moment.call.mapped(lambda t: part_of(t, chosen, batch)), moment.output[chosen])


def record_run(
    pipe: Any, model: nn.Module, call: Condition, seeds: Sequence[int]
) -> tuple[list[Moment], torch.Tensor]:
    """All calls of `model` in one pipeline call, in order, and the final latents. Run it inside `preserved(pipe)`."""
    moments: list[Moment] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        sample = output_tensor(output)
        if sample is not None:
            moments.append(Moment(RecordedCall(args, dict(kwargs)), sample.detach()))

    handle = model.register_forward_hook(keep, with_kwargs=True)
    try:
        latents = final_latents(pipe, call, seeds)
    finally:
        handle.remove()
    return moments, latents


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` items, spread evenly from the first to the last; all of them where there are not so many."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def calibration_set(
    pipe: Any, component: str, conditions: Sequence[Condition], seeds: Sequence[int], batch_size: int, size: int
) -> list[Moment]:
    """Calls of the original component for about `size` of its inputs, one latent at one step each.

    They are spread evenly over conditions and steps, with about as many latents as steps; of an autoencoder the inputs are
    the final latents. Run it inside `preserved(pipe)`.
    """
    model: nn.Module = getattr(pipe, component)
    decodes = record_call(pipe, component, conditions[0]).method == "decode"
    chosen = evenly(conditions, size if decodes else math.ceil(math.sqrt(size)))
    jobs = make_jobs(pipe, chosen, seeds[: math.ceil(math.sqrt(size) / len(chosen))], batch_size)
    latents = sum(len(job.seeds) for job in jobs)
    moments: list[Moment] = []
    for job in jobs:
        if decodes:
            call = decoder_call(pipe, component, job.call, job.seeds)
            moments.append(Moment(call, output_tensor(run(model, call))))
        else:
            moments += evenly(record_run(pipe, model, job.call, job.seeds)[0], max(1, size // latents))
    return moments
