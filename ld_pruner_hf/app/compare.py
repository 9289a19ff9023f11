"""Original, pruned and finetuned from the same prompt and noise, with what each costs. No gradio.

Versions share everything but what pruning took out: a pruned denoiser is a second tree of modules over the same weights.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

from ..evaluation.generation import find_sample_rate
from ..latents import RecordedCall, call_parameters, find_denoiser, make_jobs, preserved, steps_argument
from ..loading import load_pipeline, pick_device
from ..modeling import plan_of
from ..pipeline import prune
from ..plan import PruningPlan
from ..planning import make_plan
from ..profiling import count_macs, device_of, measure_latency, processor_name, run
from ..scores import OperatorScores
from ..selection import innermost
from ..surgery import align_, check_plan, count_params
from .config import SCORES_FILE, AppConfig, ModelEntry

MAX_SEED = 2**31 - 1
MAX_GUIDANCE = 30
MAX_TURNS = 20
MEASURING_SECONDS = 1.0  # no further turn begins after it
BY_SCORE = "least important operators"
"""The version that takes out the k operators with the lowest scores."""

Progress = Callable[[float, str], Any]
"""Called with the share that is done, 0 to 1, and what is going on."""


@dataclass(frozen=True)
class Request:
    """What a visitor asks for.

    Attributes:
        model: name of a pipeline of the config. version: `BY_SCORE`, or the title of one of the model's versions.
        k: how many operators to take out, for `BY_SCORE`. seed: of the first picture; each further one has the next seed.
    """

    model: str
    prompt: str = ""
    version: str = BY_SCORE
    k: int = 1
    seed: int = 0
    steps: int = 20
    guidance: float = 1.0
    pictures: int = 1


@dataclass(frozen=True)
class Cost:
    """What a version of the denoiser costs, measured right after it drew.

    Attributes:
        params: its parameters. macs: multiply-accumulates of one call for one sample.
        call_ms, call_iqr_ms: median time of a call, and distance of the quartiles, over `calls` calls of `batch_size` samples.
    """

    params: int
    macs: int
    call_ms: float
    call_iqr_ms: float
    calls: int
    batch_size: int


@dataclass(frozen=True)
class Column:
    """What one version made: pictures, or spectrograms and (samples a second, int16 samples) of the sounds."""

    name: str
    images: list[Image.Image]
    sounds: list[tuple[int, np.ndarray]]
    cost: Cost


@dataclass(frozen=True)
class Comparison:
    """The columns, the original first and a finetuned version last; `plan`: what was taken out; `device`: what ran it."""

    request: Request
    columns: list[Column]
    plan: PruningPlan | None
    device: str


# ---- one pipeline and its versions -----------------------------------------------------------------------------------


def over_same_weights(model: nn.Module) -> nn.Module:
    """A copy of the tree of modules; parameters and buffers are the same objects."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


class Model:
    """A pipeline of the config with its scores and versions, loaded on the CPU.

    Args:
        cached: how many pruned denoisers are kept ready.

    Raises:
        ValueError: no such pipeline; neither scores nor versions. PlanError: scores or a plan of another architecture.
    """

    def __init__(self, entry: ModelEntry, cached: int) -> None:
        self.entry = entry
        self.pipe: Any = load_pipeline(entry.pipeline, entry.dtype, "cpu")
        self.component = find_denoiser(self.pipe)
        self.original: nn.Module = getattr(self.pipe, self.component)
        align_(self.original)
        parameters = call_parameters(self.pipe)
        self.takes_prompt = "prompt" in parameters
        self.takes_guidance = "guidance_scale" in parameters
        own_guidance = parameters["guidance_scale"].default if self.takes_guidance else 1.0
        self.guidance: float = own_guidance if entry.guidance is None else entry.guidance
        self.rate = find_sample_rate(self.pipe)
        if hasattr(self.pipe, "mel"):  # librosa compiles itself at first use, which takes seconds
            self.pipe.mel.image_to_audio(Image.new("L", (self.pipe.mel.x_res, self.pipe.mel.y_res)))
        self.scores = self._load_scores()
        self.versions = {v.title: self._load_version(v.plan, v.pipeline) for v in entry.versions}
        if self.scores is None and not self.versions:
            raise ValueError(
                f"{entry.name}: there is nothing to compare with; make scores with `ld-pruner score {entry.pipeline}` and name the "
                "file in `scores:`, or list `versions:`"
            )
        self.pruned = lru_cache(maxsize=cached)(self._prune)

    def _load_scores(self) -> OperatorScores | None:
        path = self.entry.scores or Path(self.pipe.name_or_path) / SCORES_FILE
        if not self.entry.scores and not Path(path).is_file():
            return None
        scores = OperatorScores.load(path)
        make_plan(self.pipe, 1, scores=scores)  # raises if they are of another model
        return scores

    def _load_version(
        self, plan_file: str | None, pipeline: str | None
    ) -> tuple[PruningPlan | None, nn.Module | None]:
        """(plan, finetuned denoiser)."""
        plan, finetuned = (PruningPlan.load(plan_file) if plan_file else None), None
        if pipeline is not None:
            finetuned = getattr(load_pipeline(pipeline, self.entry.dtype, "cpu"), self.component)
            plan = plan_of(finetuned)
        if plan is not None:
            check_plan(self.original, plan)
        return plan, finetuned

    @property
    def is_audio(self) -> bool:
        return self.rate is not None

    @property
    def max_k(self) -> int:
        """The most operators that can be taken out together; 0 without scores."""
        return len(innermost([row.path for row in self.scores.ranked() if row.error is None])) if self.scores else 0

    @property
    def choices(self) -> list[str]:
        """What can be compared with the original."""
        return [*([BY_SCORE] if self.scores else []), *self.versions]

    def _prune(self, version: str, k: int) -> tuple[PruningPlan, nn.Module]:
        """As `pipe.prune` does it, in a copy that shares the weights."""
        target = k if version == BY_SCORE else self.versions[version][0]
        if target is None:
            raise ValueError(f"version {version!r} has no plan")
        pipe = copy.copy(self.pipe)
        setattr(pipe, self.component, over_same_weights(self.original))
        how = {**self.entry.call, **({"prompt": ""} if self.takes_prompt else {})}
        plan = prune(
            pipe, target, component=self.component, scores=self.scores if version == BY_SCORE else None, **how
        )
        assert isinstance(plan, PruningPlan)
        return plan, getattr(pipe, self.component)

    def denoisers(self, version: str, k: int) -> tuple[PruningPlan | None, dict[str, nn.Module]]:
        """(what is taken out, name -> denoiser), the original first and a finetuned one last."""
        found = {"Original": self.original}
        plan, finetuned = self.versions.get(version, (None, None))
        if version == BY_SCORE or plan is not None:
            plan, found[f"k = {k}" if version == BY_SCORE else f"{len(plan or ())} operators out"] = self.pruned(
                version, k if version == BY_SCORE else 0
            )
        if finetuned is not None:
            found[version] = finetuned
        return plan, found

    def to(self, device: str) -> None:
        """Move everything there; nothing happens where it is already."""
        self.pipe.to(device)
        for _, finetuned in self.versions.values():
            if finetuned is not None:
                finetuned.to(device)

    def call(self, request: Request) -> dict[str, Any]:
        """The arguments of the pipeline's call."""
        call = {**self.entry.call, **steps_argument(self.pipe, request.steps)}
        if self.takes_prompt:
            call["prompt"] = request.prompt
        if self.takes_guidance:
            call["guidance_scale"] = request.guidance
        return call


# ---- drawing and measuring -------------------------------------------------------------------------------------------


@contextmanager
def watched(denoiser: nn.Module, on_call: Callable[[int], Any]) -> Iterator[list[RecordedCall]]:
    """Tell `on_call` how many calls of the denoiser have ended; yields a list that takes the arguments of the first."""
    first: list[RecordedCall] = []
    ended = itertools.count(1)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not first:
            first.append(RecordedCall(args, dict(kwargs)))

    handles = [
        denoiser.register_forward_pre_hook(before, with_kwargs=True),
        denoiser.register_forward_hook(lambda *_: on_call(next(ended))),
    ]
    try:
        yield first
    finally:
        for handle in handles:
            handle.remove()


def time_in_turns(calls: Sequence[tuple[nn.Module, RecordedCall]]) -> list[list[float]]:
    """Times of each denoiser's call in ms, at least 3 of them. The denoisers take turns, so that a busy moment hits none alone."""
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    with torch.no_grad():
        for turn in range(MAX_TURNS):
            if turn >= 3 and time.perf_counter() - start > MEASURING_SECONDS:
                break
            for own, (denoiser, call) in zip(times, calls, strict=True):
                own.append(measure_latency(lambda: run(denoiser, call), device_of(denoiser), repeats=1, warmup=0)[0])  # noqa: B023
    return times


def to_int16(sound: Any) -> np.ndarray:
    """A sound as (samples,) or (samples, channels) int16; scaled down where it is louder than full scale."""
    wave = torch.as_tensor(sound).float().cpu().numpy().squeeze()
    wave = np.nan_to_num(wave.T if wave.ndim > 1 and wave.shape[0] < wave.shape[1] else wave)
    return (wave / max(1.0, float(np.abs(wave).max(initial=0.0))) * 32767).astype(np.int16)


def spectrogram(wave: np.ndarray, bins: int = 128, top_db: float = 80.0) -> Image.Image:
    """Loudness over time (left to right) and frequency (low ones below): a grey picture, from silence to full scale."""
    mono = wave.astype(np.float64) if wave.ndim == 1 else wave.mean(axis=1)
    size = 2 * bins
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(mono / 32768, (0, size)), size)[:: size // 4]
    loudness = np.abs(np.fft.rfft(frames * np.hanning(size), axis=1)[:, :bins]) / (size / 4)
    decibels = 20 * np.log10(np.maximum(loudness, 1e-10))
    grey = np.clip((decibels + top_db) * 255 / top_db, 0, 255).astype(np.uint8)
    return ImageOps.flip(Image.fromarray(grey.T))


class Comparer:
    """All pipelines of the config, and one run at a time on the device.

    Models are moved to the device by the first run, not before: on ZeroGPU hardware there is none until then.
    """

    def __init__(self, config: AppConfig, device: str = "auto") -> None:
        self.config, self._device = config, device
        if device != "auto":
            pick_device(device)
        self.models = {entry.name: Model(entry, config.limits.cached) for entry in config.models}
        self._macs: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
        self._lock = threading.Lock()

    def check(self, request: Request) -> Model:
        """The model that is asked for.

        Raises:
            ValueError: what is asked for is not in the config, or beyond its limits.
        """
        for name, text in (("Model", request.model), ("Prompt", request.prompt), ("Version", request.version)):
            if not isinstance(text, str):
                raise ValueError(f"{name}: got {text!r}, expected text.")
        if request.model not in self.models:
            raise ValueError(f"Model: got {request.model!r}, expected one of {list(self.models)}.")
        model, limits = self.models[request.model], self.config.limits
        if request.version not in model.choices:
            raise ValueError(f"Version: got {request.version!r}, expected one of {model.choices}.")
        if model.takes_prompt and not request.prompt.strip():
            raise ValueError("Prompt: it is empty; write what should be drawn.")
        if len(request.prompt) > limits.prompt:
            raise ValueError(f"Prompt: got {len(request.prompt)} characters, expected at most {limits.prompt}.")
        _check_whole("Seed", request.seed, 0, MAX_SEED - limits.pictures)
        _check_whole("Steps", request.steps, 1, limits.steps)
        _check_whole("Pictures", request.pictures, 1, limits.pictures)
        if request.version == BY_SCORE:
            _check_whole("Operators", request.k, 1, model.max_k)
        if not isinstance(request.guidance, (int, float)) or not 0 <= request.guidance <= MAX_GUIDANCE:
            raise ValueError(f"Guidance: got {request.guidance!r}, expected a number from 0 to {MAX_GUIDANCE}.")
        return model

    def compare(self, request: Request, progress: Progress = lambda share, text: None) -> Comparison:
        """Draw with every version from the same noise, then measure them.

        Raises:
            ValueError: see `check`.
        """
        model = self.check(request)
        with self._lock:
            device = pick_device(self._device)
            model.to(device)
            plan, denoisers = model.denoisers(request.version, request.k)
            made, calls = [], []
            for i, (name, denoiser) in enumerate(denoisers.items()):

                def step(n: int, i: int = i, name: str = name) -> None:
                    share = (i + min(1.0, n / request.steps)) / len(denoisers)
                    progress(0.9 * share, f"{name}: step {min(n, request.steps)} of {request.steps}")

                images, sounds, call = self._draw(model, denoiser, request, step)
                made.append((name, images, sounds))
                calls.append((denoiser, call))
            progress(0.9, "measuring")
            columns = [Column(*m, cost) for m, cost in zip(made, self._measure(calls), strict=True)]
        return Comparison(request, columns, plan, _device_name(device))

    def _draw(
        self, model: Model, denoiser: nn.Module, request: Request, on_step: Callable[[int], Any]
    ) -> tuple[list[Image.Image], list[tuple[int, np.ndarray]], RecordedCall]:  # fmt: skip
        """(pictures or spectrograms, sounds, first call of the denoiser)."""
        pipe = copy.copy(model.pipe)
        setattr(pipe, model.component, denoiser)
        seeds = range(request.seed, request.seed + request.pictures)
        images: list[Image.Image] = []
        waves: list[np.ndarray] = []
        with preserved(pipe), watched(denoiser, on_step) as calls:
            for job in make_jobs(pipe, [model.call(request)], seeds, len(seeds)):
                generators = [torch.Generator("cpu").manual_seed(seed) for seed in job.seeds]
                output = pipe(**job.call, generator=generators if len(generators) > 1 else generators[0])
                images += output.get("images", [])
                waves += [to_int16(sound) for sound in output.get("audios", [])]
        if not calls:
            raise RuntimeError(f"{request.model}: its {model.component} did not run")
        if model.rate is None:
            return images, [], calls[0]
        drawn = [ImageOps.flip(image) for image in images] or [spectrogram(wave) for wave in waves]
        return drawn, [(model.rate, wave) for wave in waves], calls[0]

    def _measure(self, calls: list[tuple[nn.Module, RecordedCall]]) -> list[Cost]:
        costs = []
        for (denoiser, call), times in zip(calls, time_in_turns(calls), strict=True):
            if denoiser not in self._macs:
                self._macs[denoiser] = count_macs(denoiser, call)[0][""]
            low, median, high = statistics.quantiles(times, n=4)
            costs.append(
                Cost(count_params(denoiser), self._macs[denoiser], median, high - low, len(times), call.batch_size)
            )
        return costs


def _device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor_name()} ({threads} thread{'s' if threads > 1 else ''})" if device == "cpu" else device


def _check_whole(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        got = "nothing" if value is None or (isinstance(value, float) and math.isnan(value)) else f"{value!r}"
        raise ValueError(f"{name}: got {got}, expected a whole number from {low} to {high}.")
