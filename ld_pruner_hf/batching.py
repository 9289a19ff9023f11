"""How many latents to denoise at once: found by trial [ours]."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from .latents import Condition, Job, final_latents, make_jobs, preserved

GAIN, REPEATS = 0.95, 2
"""With a batch twice as large, a latent must take at most this share of the time, in the best of so many runs."""


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
