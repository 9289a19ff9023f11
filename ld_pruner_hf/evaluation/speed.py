"""What pipelines cost: models timed in turns with a stated uncertainty, MACs of a whole generation, memory, size on disk."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..latents import call_parameters, find_denoiser, modules_of, preserved, record_call
from ..profiling import count_call_macs, device_of, peak_memory_of, run, synchronize

CONFIDENCE = 0.99
RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """Times in ms of one of several models that took turns."""

    times_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms)

    @property
    def iqr_ms(self) -> float:
        low, _, high = statistics.quantiles(self.times_ms, n=4)
        return high - low


@dataclass(frozen=True)
class SpeedUp:
    """How many times quicker a model is than another: the median over rounds, and its confidence interval."""

    value: float
    low: float
    high: float

    @property
    def uncertainty(self) -> float:
        """The farther end of the interval."""
        return max(self.high - self.value, self.value - self.low)


def time_in_turns(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int = 20, warmup: int = 3
) -> dict[str, Timing]:
    """Time functions in turns, one call of each a round, every other round in reverse, so that drifts hit all alike."""
    if rounds < 5:
        raise ValueError(f"rounds: got {rounds}, needs at least 5 for an uncertainty")
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for i in range(warmup + rounds):
        for name in order if i % 2 == 0 else reversed(order):
            synchronize(device)
            start = time.perf_counter()
            calls[name]()
            synchronize(device)
            if i >= warmup:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: Timing(tuple(t)) for name, t in times.items()}


def speed_up(original: Timing, other: Timing) -> SpeedUp:
    """Median over rounds of original's time / other's time; 99% interval of the median by the bootstrap over rounds."""
    ratios = np.array(original.times_ms) / np.array(other.times_ms)
    picks = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    medians = np.median(ratios[picks], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians, [tail, 1 - tail])
    return SpeedUp(float(np.median(ratios)), float(low), float(high))


def denoiser_call(pipe: Any, call: dict[str, Any], component: str | None = None) -> Callable[[], Any]:
    """A function that makes the pipeline's first denoiser call again."""
    with preserved(pipe):
        name = find_denoiser(pipe, component)
        recorded = record_call(pipe, name, call)
    model = getattr(pipe, name)

    def repeat() -> Any:
        with torch.no_grad():
            return run(model, recorded)

    return repeat


def time_pipelines(pipes: Mapping[str, Any], call: dict[str, Any], rounds: int = 20) -> dict[str, Timing]:
    """One denoiser call of each pipeline, in turns."""
    training = {name: [m.training for m in denoiser_of(pipe).modules()] for name, pipe in pipes.items()}
    try:
        for pipe in pipes.values():
            denoiser_of(pipe).eval()
        calls = {name: denoiser_call(pipe, call) for name, pipe in pipes.items()}
        return time_in_turns(calls, device_of(denoiser_of(next(iter(pipes.values())))), rounds)
    finally:
        for name, pipe in pipes.items():
            for module, flag in zip(denoiser_of(pipe).modules(), training[name], strict=True):
                module.training = flag


def denoiser_of(pipe: Any) -> torch.nn.Module:
    return getattr(pipe, find_denoiser(pipe))


def one_sample(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """The call for a single sample, with its noise fixed."""
    generator = {"generator": torch.Generator().manual_seed(0)} if "generator" in call_parameters(pipe) else {}
    return {**call, **generator}


def macs_per_image(pipe: Any, call: dict[str, Any]) -> int:
    """MACs of everything that the pipeline runs for one sample: text encoder, all denoising steps, decoder."""
    with preserved(pipe):
        return count_call_macs(lambda: pipe(**one_sample(pipe, call)))


def pipeline_params(pipe: Any) -> int:
    """Parameters of all its models."""
    return sum(p.numel() for part in modules_of(pipe).values() for p in part.parameters())


def size_on_disk(pipe: Any, name: str | None = None) -> int | None:
    """Bytes of the folder that the pipeline was loaded from; None if there is none."""
    candidates = [name, pipe.config.get("_name_or_path")]
    for folder in (Path(c).expanduser() for c in candidates if c):
        if (folder / "model_index.json").is_file():
            return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    return None


def peak_memory_of_generation(pipe: Any, call: dict[str, Any]) -> int:
    """Bytes of all weights and of the tensors alive while the pipeline makes one sample, at their most; see `profiling.peak_memory`."""
    with preserved(pipe):
        return peak_memory_of(lambda: pipe(**one_sample(pipe, call)), modules_of(pipe).values())
