"""Samples from a pipeline to a folder: one file a sample, each from a seed of its own, so that any run can go on or be shared out."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..latents import call_parameters, find_denoiser, preserved, scheduler_names
from ..plan import FORMAT_VERSION, read_json, write_atomically
from ..surgery import weights_of
from .samples import FAILED, Unusable, picture_of

GENERATION_FORMAT = "ld_pruner_hf.generation"
SETTINGS_FILE = "generation.json"
RATE_NAMES = ("sampling_rate", "sample_rate")


def kind_of(pipe: Any) -> str:
    """ "audio" for pipelines that make sound, else "image"."""
    return "audio" if "audio" in type(pipe).__name__.lower() or find_sample_rate(pipe) else "image"


def find_sample_rate(pipe: Any) -> int | None:
    """Sample rate in Hz of the sound that the pipeline makes; None if it tells none."""
    if hasattr(pipe, "mel"):
        return int(pipe.mel.get_sample_rate())
    for part in (getattr(pipe, name, None) for name in ("vocoder", "vae")):
        for source in (getattr(part, "config", None), part):
            for name in RATE_NAMES:
                if rate := getattr(source, name, None):
                    return int(rate)
    return None


def sample_rate_of(pipe: Any) -> int:
    """As `find_sample_rate`; ValueError if the pipeline tells none."""
    rate = find_sample_rate(pipe)
    if rate is None:
        raise ValueError(f"{type(pipe).__name__}: no sample rate found in its mel, vocoder or vae")
    return rate


def generate(
    pipe: Any,
    folder: str | os.PathLike,
    n: int,
    *,
    prompts: Sequence[str] | None = None,
    call: dict[str, Any] | None = None,
    seed: int = 0,
    batch_size: int = 8,
    resolution: int | None = None,
    rank: int = 0,
    processes: int = 1,
) -> Path:
    """Draw samples 0 ... n - 1 into `folder`; those that are there already are kept.

    Sample i takes prompt i (from the start again where there are fewer) and the noise of seed + i, whatever the batches and
    processes. Pictures become `000012.png`; sounds `000012.wav`, with their spectrogram `000012.png` where the pipeline draws
    one. A sample with NaN becomes `000012.failed` and is counted later on.

    Args:
        resolution: pictures are made smaller to this many pixels a side, as BK-SDM does (512 -> 256).
        rank, processes: this process draws every `processes`-th sample.

    Raises:
        ValueError: the folder holds samples of another model or other settings; the pipeline needs prompts and has none.
    """
    folder, call = Path(folder), dict(call or {})
    if n < 1:
        raise ValueError(f"n: got {n}, expected at least 1 sample")
    if prompts is None and "prompt" in call_parameters(pipe) and not {"prompt", "prompt_embeds"} & set(call):
        raise ValueError(f"{type(pipe).__name__} takes prompts; pass prompts= (--prompts FILE)")
    _check_settings(folder, _settings(pipe, prompts, call, seed, resolution))
    kind, parameters = kind_of(pipe), call_parameters(pipe)
    suffix = ".wav" if kind == "audio" else ".png"
    missing = [i for i in range(rank, n, processes) if not _done(folder, i, suffix)]
    together = "generator" in parameters and (prompts is not None or "batch_size" in parameters)
    size = batch_size if together else 1
    with preserved(pipe), tqdm(total=len(missing), desc=f"samples for {folder.name}", unit="sample") as bar:
        for start in range(0, len(missing), size):
            indices = missing[start : start + size]
            batch = dict(call)
            if prompts is not None:
                batch["prompt"] = [prompts[i % len(prompts)] for i in indices]
            elif "batch_size" in parameters:
                batch["batch_size"] = len(indices)
            draw = _draw_sounds if kind == "audio" else _draw_pictures
            draw(pipe, batch, [seed + i for i in indices], [folder / f"{i:06d}" for i in indices], resolution)
            bar.update(len(indices))
    return folder


def _done(folder: Path, i: int, suffix: str) -> bool:
    return any((folder / f"{i:06d}{s}").exists() for s in (suffix, FAILED))


def _settings(
    pipe: Any, prompts: Sequence[str] | None, call: dict[str, Any], seed: int, resolution: int | None
) -> dict[str, Any]:
    """What the samples depend on, apart from their number."""
    digest = None if prompts is None else hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:16]
    return {
        "pipeline": type(pipe).__name__,
        "weights": weights_of(getattr(pipe, find_denoiser(pipe))),
        "scheduler": scheduler_names(pipe),
        "prompts": digest,
        "call": {name: repr(value)[:200] for name, value in sorted(call.items())},
        "seed": seed,
        "resolution": resolution,
    }


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS_FILE
    if not file.exists():
        header = {"format": GENERATION_FORMAT, "version": FORMAT_VERSION}
        write_atomically(file, json.dumps(header | settings, indent=1) + "\n")
        return
    old = read_json(file, GENERATION_FORMAT)
    differ = [f"{k}: {old.get(k)!r} there, {v!r} now" for k, v in settings.items() if old.get(k) != v]
    if differ:
        raise ValueError(f"{folder}: holds samples of another run ({'; '.join(differ)}); choose another folder")


def _write(path: Path, data: bytes) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    aside.write_bytes(data)
    os.replace(aside, path)


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return out.getvalue()


def _generators(pipe: Any, seeds: Sequence[int]) -> dict[str, Any]:
    if "generator" not in call_parameters(pipe):
        torch.manual_seed(seeds[0])
        return {}
    generators = [torch.Generator("cpu").manual_seed(s) for s in seeds]
    return {"generator": generators if len(generators) > 1 else generators[0]}


def _draw_pictures(
    pipe: Any, call: dict[str, Any], seeds: Sequence[int], stems: Sequence[Path], resolution: int | None
) -> None:
    # As numbers: turned into pictures by the pipeline, NaN would silently become black.
    numbers = {"output_type": "np"} if "output_type" in call_parameters(pipe) else {}
    images = pipe(**{**call, **numbers, **_generators(pipe, seeds)}).images
    for stem, image in zip(stems, images, strict=True):
        try:
            picture = picture_of(np.asarray(image))
        except Unusable as error:
            _write(stem.with_suffix(FAILED), str(error).encode())
            continue
        if resolution is not None:
            picture = picture.resize((resolution, resolution), Image.Resampling.BICUBIC)
        _write(stem.with_suffix(".png"), _png(picture))


def _draw_sounds(
    pipe: Any, call: dict[str, Any], seeds: Sequence[int], stems: Sequence[Path], resolution: int | None
) -> None:
    with np.errstate(invalid="ignore"):
        output = pipe(**{**call, **_generators(pipe, seeds)})
    audios = getattr(output, "audios", None)
    if audios is None:
        raise ValueError(f"{type(pipe).__name__}: its output has no sounds (audios)")
    pictures = getattr(output, "images", None)
    for i, stem in enumerate(stems):
        wave = np.asarray(torch.as_tensor(np.asarray(audios[i])).float()).squeeze()
        if not np.isfinite(wave).all():
            _write(stem.with_suffix(FAILED), b"not finite (NaN or infinite)")
            continue
        if pictures is not None:
            _write(stem.with_suffix(".png"), _png(pictures[i]))
        _write(stem.with_suffix(".wav"), wav_bytes(wave, sample_rate_of(pipe)))


def wav_bytes(wave: np.ndarray, rate: int) -> bytes:
    """A waveform (T,) or (channels, T) in -1 ... 1 as a 16-bit wav file."""
    from scipy.io import wavfile

    out = io.BytesIO()
    wave = wave.T if wave.ndim == 2 else wave
    wavfile.write(out, rate, (np.clip(wave, -1, 1) * 32767).round().astype(np.int16))
    return out.getvalue()


def spectrograms_to_sounds(spectrograms: Sequence[bytes], mel: Any, folder: str | os.PathLike) -> Path:
    """Invert spectrograms (files of pictures) with the pipeline's own `Mel`, once; so both sides of FAD went through it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(tqdm(spectrograms, desc="spectrograms to sound", unit="sample")):
        path = folder / f"{i:06d}.wav"
        if not path.exists():
            picture = Image.open(io.BytesIO(data)).convert("L")
            _write(path, wav_bytes(np.asarray(mel.image_to_audio(picture)), mel.get_sample_rate()))
    return folder
