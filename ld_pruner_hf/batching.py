"""How many latents to denoise at once, and how convolutions' weights are to lie in memory: found by trial [ours]."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .latents import Condition, Job, final_latents, make_jobs, preserved

GAIN, REPEATS = 0.95, 2
"""With a batch twice as large, or channels last, a latent must take at most this share of the time, in the best of so many runs."""


@contextmanager
def quickest_way(
    pipe: Any,
    component: str,
    conditions: Sequence[Condition],
    seeds: Sequence[int],
    batch_size: int | None,
    quiet: bool,
) -> Iterator[int]:
    """The batch size; if it is None, it is found by trial, and inside the component's weights are channels last where that is quicker.

    Run it inside `preserved(pipe)`.
    """
    if batch_size is not None:
        yield batch_size
        return
    batch_size = quickest_batch_size(pipe, conditions, seeds, quiet)
    model = getattr(pipe, component)
    weights = [p for p in model.parameters() if p.ndim == 4]
    if not weights or not all(p.is_contiguous() for p in weights):  # nothing to choose, or chosen by the user
        yield batch_size
        return
    job = make_jobs(pipe, conditions, seeds, batch_size)[0]
    before = _seconds(pipe, job)
    try:
        model.to(memory_format=torch.channels_last)
        after = _seconds(pipe, job)
        quicker = after <= GAIN * before
        if not quicker:
            model.to(memory_format=torch.contiguous_format)
        if not quiet:
            chosen = "channels last" if quicker else "contiguous"
            print(
                f"weights {chosen}: {1e3 * before:.1f} ms a step contiguous, {1e3 * after:.1f} channels last",
                file=sys.stderr,
            )
        yield batch_size
    finally:
        model.to(memory_format=torch.contiguous_format)


def quickest_batch_size(pipe: Any, conditions: Sequence[Condition], seeds: Sequence[int], quiet: bool = False) -> int:
    """How many latents to denoise in one pipeline call, by trial of one step each; the choice is printed unless `quiet`.

    The number is doubled while a latent takes less time for it, as far as the pipeline takes so many together and memory lasts.
    """
    best, least = 1, float("inf")
    with preserved(pipe):
        size = 1
        while True:
            job = make_jobs(pipe, conditions, seeds, size)[0]
            seconds = _seconds(pipe, job) / len(job.seeds) if len(job.seeds) == size else float("inf")
            if seconds >= GAIN * least:  # also where not even one latent fits: the run itself then says so
                break
            best, least, size = size, seconds, 2 * size
    if not quiet:
        print(f"batch size {best}: {1e3 * least:.1f} ms a latent and step", file=sys.stderr)
    return best


def _seconds(pipe: Any, job: Job) -> float:
    """Of one denoising step, the best of `REPEATS` after one for warm-up; infinite where memory does not suffice, or where the
    pipeline takes no more than one latent a call."""
    times = []
    try:
        for _ in range(REPEATS + 1):
            start = time.perf_counter()
            final_latents(pipe, job.call, job.seeds, stop_after=1)
            times.append(time.perf_counter() - start)
    except Exception as error:
        if len(job.seeds) == 1 and not isinstance(error, torch.OutOfMemoryError):
            raise
        return float("inf")
    return min(times[1:])
