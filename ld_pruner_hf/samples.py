"""Pictures and sounds of the original and the pruned pipeline from the same noise, for a model card."""

from __future__ import annotations

import os
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from .latents import preserved, steps_argument


@dataclass(frozen=True)
class Sample:
    """What one call made: a picture (for sounds, the spectrogram, if the pipeline gives one), and a sound.

    `sound` has (samples,) float values from -1 to 1, at `rate` samples a second.
    """

    picture: Image.Image | None = None
    sound: np.ndarray | None = None
    rate: int = 0

    def save_sound(self, path: str | os.PathLike) -> None:
        """Write the sound as a 16-bit mono WAV."""
        if self.sound is None:
            raise ValueError(f"{path}: the sample has no sound")
        with wave.open(os.fspath(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(self.rate)
            file.writeframes((32767 * np.clip(self.sound, -1, 1)).astype("<i2").tobytes())


def draw_samples(
    pipe: Any, conditions: Sequence[Mapping[str, Any]], steps: int | None = None, seed: int = 0
) -> list[Sample]:
    """One sample a condition, the i-th from seed `seed + i` whatever the model; the pipeline is left as it was.

    Raises:
        ValueError: the pipeline makes neither pictures nor sounds.
    """
    samples = []
    for i, condition in enumerate(conditions):
        generator = torch.Generator("cpu").manual_seed(seed + i)
        with preserved(pipe):
            made = pipe(**condition, **steps_argument(pipe, steps), generator=generator)
        pictures, sounds = getattr(made, "images", None), getattr(made, "audios", None)
        if pictures is None and getattr(made, "frames", None) is not None:
            pictures = made.frames[0]  # of a video, the first frame
        if pictures is None and sounds is None:
            raise ValueError(f"{type(pipe).__name__} returned {type(made).__name__}, expected pictures or sounds")
        picture = None if pictures is None else pictures[0]
        picture = picture if isinstance(picture, Image.Image) else None
        sound = None if sounds is None else np.asarray(torch.as_tensor(sounds[0]).float().cpu())
        if sound is not None:
            sound = sound.reshape(-1, sound.shape[-1]).mean(0)  # (channels, samples) -> (samples,)
        samples.append(Sample(picture, sound, 0 if sound is None else _rate(pipe)))
    return samples


def _rate(pipe: Any) -> int:
    """Samples a second of the sounds that the pipeline makes."""
    if hasattr(pipe, "mel"):
        return int(pipe.mel.get_sample_rate())
    for part in ("vocoder", "vae", "unet"):
        config = getattr(getattr(pipe, part, None), "config", {})
        rate = config.get("sampling_rate") or config.get("sample_rate")
        if rate:
            return int(rate)
    raise ValueError(f"{type(pipe).__name__}: none of its models says the sampling rate of its sounds")
