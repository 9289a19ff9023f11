"""evaluate: samples of one or two pipelines, their quality and cost, every number with what it depends on."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import __version__ as diffusers_version
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor

from ..latents import call_parameters, find_denoiser, preserved, record_call, scheduler_names, steps_argument
from ..loading import load_pipeline, one_line, pick_device
from ..profiling import count_macs, processor_name
from ..surgery import count_params
from . import metrics as distances
from .extractors import STANDARD, make_extractor
from .generation import generate, kind_of, spectrograms_to_sounds
from .metrics import DEFAULT_METRICS, METRICS
from .results import RESULTS_FILE, Evaluation, Measurement
from .samples import Samples, open_samples, parquet_bytes, read_parquet
from .speed import macs_per_image, peak_memory_of_generation, pipeline_params, size_on_disk, speed_up, time_pipelines

AUTO = "auto"
LABELS = "AB"
EXTRACTOR_BATCH = 64
BOOTSTRAP_RESAMPLES = 20
BOOTSTRAP_FEATURES = 512  # with more, the square roots of the covariances take minutes


@dataclass(frozen=True)
class EvaluationSettings:
    """What an evaluation runs with.

    Attributes:
        n: samples of each pipeline. prompts: one a sample, from the start again where there are fewer.
        reference: folder or parquet file of real samples; reference_n: at most so many of them.
        metrics: names of `METRICS`; None takes those of `DEFAULT_METRICS` for which there is what they need.
        extractors: metric -> extractor (see `make_extractor`), or "*" for all. "auto": the standard one, and the shipped one
            where that cannot be loaded.
        call: further arguments of the pipeline's call. num_inference_steps, seed, batch_size: of the generation.
        scheduler: class name of a scheduler of diffusers to swap in (PNDMScheduler). resolution: see `generate`.
        costs: measure params, MACs, latency, memory and size. rounds: timed rounds.
        command: what the user typed.
    """

    n: int = 500
    prompts: tuple[str, ...] | None = None
    reference: str | None = None
    reference_n: int | None = None
    metrics: tuple[str, ...] | None = None
    extractors: Mapping[str, str] | None = None
    num_inference_steps: int | None = None
    call: Mapping[str, Any] | None = None
    seed: int = 0
    batch_size: int = 8
    scheduler: str | None = None
    resolution: int | None = None
    dtype: str = "float32"
    device: str = "auto"
    costs: bool = True
    rounds: int = 20
    command: str = ""


def evaluate(
    pipelines: Sequence[str], output: str | Path, settings: EvaluationSettings | None = None
) -> Evaluation | None:
    """Measure one pipeline, or two against each other on the same seeds; write `evaluation.json` into `output`.

    Under `accelerate launch` the processes share the generation; the first one measures. A run that was interrupted goes on
    with the samples that are in `output/A` and `output/B`.

    Args:
        pipelines: one or two names: a pipeline's folder, Hub id, `demo:...`; or a folder of samples made before.

    Returns:
        What was measured; None in all processes but the first.

    Raises:
        ValueError: something is asked for that cannot be measured: before anything is generated where that can be known.
    """
    settings, output = settings or EvaluationSettings(), Path(output)
    if not 1 <= len(pipelines) <= 2:
        raise ValueError(f"pipelines: got {len(pipelines)}, expected one or two")
    distances.require_torchmetrics()
    models = dict(zip(LABELS, pipelines, strict=False))
    chosen = check_metrics(settings, two=len(models) == 2)
    state = PartialState(cpu=pick_device(settings.device) == "cpu")
    if state.num_processes > 1 and settings.device == "auto":
        settings = replace(settings, device=str(state.device))  # each process has an accelerator of its own
    folders, kinds, mel = {}, set(), None
    for label, name in models.items():
        if is_sample_folder(name):
            folders[label] = Path(name)
            kinds.add("audio" if any(Path(name).rglob("*.wav")) else "image")
            continue
        pipe = prepare(name, settings)
        kinds.add(kind_of(pipe))
        mel = getattr(pipe, "mel", mel)
        folders[label] = generate(
            pipe, output / label, settings.n, prompts=settings.prompts, call=call_of(pipe, settings), seed=settings.seed,
            batch_size=settings.batch_size, resolution=settings.resolution, rank=state.process_index,
            processes=state.num_processes,
        )  # fmt: skip
        del pipe
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    if len(kinds) > 1:
        raise ValueError(f"{' and '.join(pipelines)}: one makes pictures, the other sound; they cannot be compared")
    kind = kinds.pop()
    results: list[Measurement] = []
    skipped: list[dict[str, str]] = []
    runnable = {label: name for label, name in models.items() if not is_sample_folder(name)}
    if settings.costs and runnable:
        results += measure_costs(runnable, settings)
    judge = Judge(settings, kind, chosen)
    reference = open_reference(settings, kind, output, mel)
    sets = {
        label: open_samples(folder, kind, None if label in runnable else settings.resolution).subset(settings.n)
        for label, folder in folders.items()
    }
    for label, samples in sets.items():
        original = sets["A"] if label == "B" else None
        found, missing = judge.judge(label, samples, reference, original)
        results += found
        skipped += missing
    notes = [
        f"{label}: {len(s.skipped)} of {len(s)} samples left out: {s.skipped_text()}"
        for label, s in {**sets, **({"reference": reference} if reference else {})}.items()
        if s.skipped
    ]
    evaluation = Evaluation(models, tuple(results), tuple(skipped), tuple(notes), environment())
    evaluation.save(output / RESULTS_FILE)
    return evaluation


def check_metrics(settings: EvaluationSettings, two: bool) -> list[str]:
    """The metrics to measure.

    Raises:
        ValueError: an unknown metric, or one that was asked for without what it needs.
    """
    have = {"": True, "reference": bool(settings.reference), "prompts": bool(settings.prompts), "original": two}
    if settings.metrics is None:
        return [name for name in DEFAULT_METRICS if have[METRICS[name].needs]]
    remedies = {
        "reference": "--reference FOLDER or .parquet", "prompts": "--prompts FILE", "original": "two pipelines",
    }  # fmt: skip
    for name in settings.metrics:
        if name not in METRICS:
            raise ValueError(f"metrics: got {name!r}, expected some of {list(METRICS)}")
        if not have[METRICS[name].needs]:
            raise ValueError(f"metrics: {name} needs {remedies[METRICS[name].needs]}")
    return list(settings.metrics)


def is_sample_folder(name: str) -> bool:
    """A folder of pictures or sounds, and not of a pipeline."""
    folder = Path(name).expanduser()
    return folder.is_dir() and not (folder / "model_index.json").is_file()


def prepare(name: str, settings: EvaluationSettings) -> Any:
    """The pipeline, loaded, with the scheduler that was asked for."""
    import diffusers

    pipe = load_pipeline(name, settings.dtype, settings.device)
    if settings.scheduler is not None:
        scheduler = getattr(diffusers, settings.scheduler, None)
        if scheduler is None or not hasattr(scheduler, "from_config"):
            raise ValueError(
                f"scheduler: got {settings.scheduler!r}, expected a scheduler of diffusers: PNDMScheduler"
            )
        if not hasattr(pipe, "scheduler"):
            raise ValueError(f"scheduler: {name} has several, {scheduler_names(pipe)}; leave it out")
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    return pipe


def call_of(pipe: Any, settings: EvaluationSettings) -> dict[str, Any]:
    """The call's arguments but for prompts and batch."""
    return {**steps_argument(pipe, settings.num_inference_steps), **(settings.call or {})}


def open_reference(settings: EvaluationSettings, kind: str, output: Path, mel: Any) -> Samples | None:
    """The real samples. Spectrograms in a parquet file are turned to sound once, with the pipeline's own `Mel`."""
    if settings.reference is None:
        return None
    path: Path | str = settings.reference
    if kind == "audio" and str(path).endswith(".parquet") and Path(path).is_file():
        columns = read_parquet(path).schema.names
        if "audio" not in columns and mel is not None:
            pictures = parquet_bytes(Path(path), ("image",))
            path = spectrograms_to_sounds(pictures[: settings.reference_n], mel, output / "reference")
    samples = open_samples(path, kind, settings.resolution)
    return samples if settings.reference_n is None else samples.subset(settings.reference_n)


def environment() -> dict[str, str]:
    return {
        "torch": str(torch.__version__), "diffusers": diffusers_version, "python": platform.python_version(),
        "processor": processor_name(),
    }  # fmt: skip


# ---- quality ---------------------------------------------------------------------------------------------------------


def bootstrap(distance: Callable[[Tensor], float], features: Tensor) -> list[float]:
    """A distance when the generated samples are drawn again with replacement.

    The same samples are drawn for every model, so the values of two models compare pair by pair.
    """
    generator = torch.Generator().manual_seed(0)
    n = len(features)
    return [distance(features[torch.randint(n, (n,), generator=generator)]) for _ in range(BOOTSTRAP_RESAMPLES)]


class Judge:
    """Measures the quality of sets of samples; extractors are loaded and features computed once."""

    def __init__(self, settings: EvaluationSettings, kind: str, metrics: Sequence[str]) -> None:
        self.settings, self.kind = settings, kind
        self.metrics = [name for name in metrics if METRICS[name].kind == kind]
        if settings.metrics is not None and not self.metrics:
            raise ValueError(f"metrics: {list(metrics)} are not for {kind}")
        self.device = pick_device(settings.device)
        self._extractors: dict[str, Any] = {}
        self._features: dict[tuple[int, str], tuple[Tensor, Tensor | None]] = {}

    def extractor(self, metric: str) -> Any:
        """The metric's extractor.

        Raises:
            ImportError, OSError: it is not to be had, and nothing may take its place.
        """
        given = self.settings.extractors or {}
        spec = given.get(metric, given.get("*", AUTO))
        if spec != AUTO:
            return self._load(spec)
        try:
            return self._load(STANDARD[metric])
        except (ImportError, OSError, HfHubHTTPError):
            if (fallback := METRICS[metric].fallback) is None:
                raise
            return self._load(fallback)

    def _load(self, spec: str) -> Any:
        if spec not in self._extractors:
            try:
                self._extractors[spec] = make_extractor(spec, self.kind, self.device)
            except (ImportError, OSError, HfHubHTTPError) as error:
                self._extractors[spec] = error
        if isinstance(self._extractors[spec], Exception):
            raise self._extractors[spec]
        return self._extractors[spec]

    def features(self, samples: Samples, extractor: Any) -> tuple[Tensor, Tensor | None]:
        """(features (N, D), logits or None) of all usable samples."""
        key = (id(samples), extractor.name)
        if key not in self._features:
            parts = [extractor(b) for _, b in samples.batches(EXTRACTOR_BATCH, extractor.sample_rate)]
            logits = [part[1] for part in parts if part[1] is not None]
            self._features[key] = torch.cat([part[0] for part in parts]), torch.cat(logits) if logits else None
        return self._features[key]

    def judge(
        self, label: str, samples: Samples, reference: Samples | None, original: Samples | None
    ) -> tuple[list[Measurement], list[dict[str, str]]]:
        """(what was measured, what was not and why)."""
        found, missing = [], []
        for name in self.metrics:
            needs = METRICS[name].needs
            if needs == "original" and original is None:
                continue
            try:
                found.append(self.measure(name, label, samples, reference, original))
            except (ValueError, ImportError, OSError, HfHubHTTPError) as error:
                missing.append({"name": METRICS[name].title, "model": label, "reason": one_line(error)})
        return found, missing

    def measure(
        self,
        name: str,
        label: str,
        samples: Samples,
        reference: Samples | None = None,
        original: Samples | None = None,
    ) -> Measurement:
        """One metric of one set of samples."""
        metric = METRICS[name]
        result = Measurement(
            label, metric.title, 0.0, higher_is_better=metric.higher_is_better, device=self.device_text(),
            command=self.settings.command,
        )  # fmt: skip
        if metric.needs == "original" and original is not None:
            return self._compare(name, replace(result, model="B vs A"), original, samples)
        extractor = self.extractor(name)
        result = replace(result, extractor=extractor.name)
        if metric.needs == "prompts":
            return self._match_prompts(name, result, samples, extractor)
        features, logits = self.features(samples, extractor)
        result = replace(result, n=len(features))
        if name == "is":
            if logits is None:
                raise ValueError(f"IS needs an extractor with classes; {extractor.name} has none")
            value, std = distances.inception_score(logits)
            how = f"standard deviation over {distances.INCEPTION_SPLITS} splits"
            return replace(result, value=value, uncertainty=std, uncertainty_kind=how)
        if reference is None:
            raise ValueError(f"{metric.title} needs reference samples")
        real, _ = self.features(reference, extractor)
        result = replace(result, dataset=f"{reference.where} ({len(real)} samples)")
        if name == "kid":
            value, std = distances.kernel_distance(real, features)
            how = f"standard deviation over {distances.KID_SUBSETS} subsets"
            return replace(result, value=value, uncertainty=std, uncertainty_kind=how)
        distance = {
            "fid": distances.frechet_distance, "fad": distances.frechet_distance, "cmmd": distances.cmmd,
            "clip-i": distances.mean_cosine, "dino": distances.mean_cosine,
        }[name]  # fmt: skip
        if name in ("fid", "fad") and features.shape[1] <= BOOTSTRAP_FEATURES:
            values = bootstrap(lambda x: distance(real, x), features)
            result = replace(
                result, uncertainty=statistics.stdev(values), details={"bootstrap": values},
                uncertainty_kind=f"standard deviation over {BOOTSTRAP_RESAMPLES} bootstrap resamples of the generated samples",
            )  # fmt: skip
        return replace(result, value=distance(real, features))

    def _match_prompts(self, name: str, result: Measurement, samples: Samples, extractor: Any) -> Measurement:
        """CLIP score (2104.08718: 100 x cosine, negative ones as 0; here as BK-SDM prints it, without the 100) or PickScore."""
        prompts = self.settings.prompts
        if not prompts:
            raise ValueError(f"{result.name} needs prompts")
        if not hasattr(extractor, "embed_texts"):
            raise ValueError(f"{result.name} needs an extractor that knows texts; {extractor.name} does not")
        cosines = []
        for keys, batch in samples.batches(EXTRACTOR_BATCH):
            texts = [prompts[int(key) % len(prompts)] for key in keys]
            cosines.append((extractor.embed_images(batch) * extractor.embed_texts(texts)).sum(-1))
        values = torch.cat(cosines)
        values = values * extractor.scale if name == "pickscore" else values.clamp_min(0)
        dataset = f"{len(set(prompts))} prompts"
        return _mean(replace(result, dataset=dataset), values)

    def _compare(self, name: str, result: Measurement, original: Samples, samples: Samples) -> Measurement:
        """LPIPS or SSIM between the samples that both pipelines drew from the same noise."""
        if name == "ssim":
            compare = distances.ssim
        else:
            extractor = self.extractor(name)
            if not hasattr(extractor, "perceptual_distance"):
                raise ValueError(f"LPIPS needs an extractor with stages; {extractor.name} has none")
            compare, result = extractor.perceptual_distance, replace(result, extractor=extractor.name)
        values = [compare(torch.stack(a), torch.stack(b)) for a, b in _pairs(original, samples)]
        if not values:
            raise ValueError("no sample of A has the same number as one of B")
        return _mean(result, torch.cat(values))

    def device_text(self) -> str:
        return device_text(self.device, "float32")


def _pairs(a: Samples, b: Samples) -> Any:
    """Batches of pictures that both sets have under the same key."""
    common = set(a.keys) & set(b.keys)
    loaded = [
        {key: picture for keys, batch in s.batches(EXTRACTOR_BATCH) for key, picture in zip(keys, batch, strict=True)
         if key in common}
        for s in (a, b)
    ]  # fmt: skip
    keys = sorted(set(loaded[0]) & set(loaded[1]))
    for i in range(0, len(keys), EXTRACTOR_BATCH):
        part = keys[i : i + EXTRACTOR_BATCH]
        yield [loaded[0][k] for k in part], [loaded[1][k] for k in part]


def _mean(result: Measurement, values: Tensor) -> Measurement:
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else None
    return replace(
        result, value=float(values.mean()), n=len(values), uncertainty=error,
        uncertainty_kind="standard error of the mean",
    )  # fmt: skip


# ---- cost ------------------------------------------------------------------------------------------------------------


def device_text(device: str, dtype: str) -> str:
    """For example "AMD EPYC 7763, float32, 1 thread"."""
    kind = torch.device(device).type
    name = torch.cuda.get_device_name(device) if kind == "cuda" else processor_name() if kind == "cpu" else kind
    threads = torch.get_num_threads()
    return f"{name}, {dtype}" + (f", {threads} thread{'s' if threads != 1 else ''}" if kind == "cpu" else "")


def measure_costs(models: Mapping[str, str], settings: EvaluationSettings) -> list[Measurement]:
    """Params, MACs, size, memory and latency of each pipeline, and the speed-up of the second over the first."""
    pipes = {label: prepare(name, settings) for label, name in models.items()}
    device = device_text(pick_device(settings.device), settings.dtype)
    results = []

    def add(label: str, name: str, value: float | None, unit: str = "", **more: Any) -> None:
        if value is not None:
            results.append(Measurement(label, name, value, unit, device=device, command=settings.command, **more))

    calls = {}
    for label, pipe in pipes.items():
        call = call_of(pipe, settings)
        if settings.prompts and "prompt" in call_parameters(pipe):
            call["prompt"] = settings.prompts[0]
        calls[label] = call
        component = find_denoiser(pipe)
        with preserved(pipe):
            recorded = record_call(pipe, component, call)
            per_call, conv_linear = (m[""] for m in count_macs(getattr(pipe, component), recorded))
        add(label, "params of the denoiser", count_params(getattr(pipe, component)), details={"component": component})
        add(label, "params of the pipeline", pipeline_params(pipe))
        add(label, "MACs per denoiser call and sample", per_call, details={"conv_linear": conv_linear})
        add(label, "MACs per image", macs_per_image(pipe, call), details={"parts": "everything that one call runs"})
        add(label, "size on disk", _in_millions(size_on_disk(pipe, models[label])), "MB")
        add(
            label, "peak memory of a generation", peak_memory_of_generation(pipe, call) / 1e6, "MB",
            details={"counted": "weights and live tensors"},
        )  # fmt: skip
    timings = time_pipelines(pipes, calls["A" if "A" in calls else "B"], settings.rounds)
    for label, timing in timings.items():
        add(
            label, "latency of a denoiser call", timing.median_ms, "ms", uncertainty=timing.iqr_ms, uncertainty_kind="IQR",
            n=settings.rounds,
        )  # fmt: skip
    if len(timings) == 2:
        gain = speed_up(timings["A"], timings["B"])
        add(
            "B vs A", "speed-up of a denoiser call", gain.value, "x", uncertainty=gain.uncertainty, n=settings.rounds,
            uncertainty_kind="99% interval of the median, by the bootstrap", higher_is_better=True,
            details={"low": gain.low, "high": gain.high},
        )  # fmt: skip
    return results


def _in_millions(value: int | None) -> float | None:
    return None if value is None else value / 1e6
