"""Small pipelines that we trained ourselves and that ship with the package: everything runs with no download."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import is_librosa_available

PROMPTS = {
    "emoji": [
        "red heart",
        "cat face",
        "pizza",
        "grinning face",
        "rocket",
        "evergreen tree",
        "crescent moon",
        "blue car",
    ],
}
"""Prompts that show what a text-to-image pipeline draws; they come from its training captions. Unconditional ones have none."""


def names() -> list[str]:
    """Names of the pipelines that are installed."""
    return [name for name in ("emoji", "clothing", "digits") if (_root() / name / "model_index.json").is_file()]


def _root() -> Path:
    return Path(str(resources.files(__name__)))


def path(name: str) -> Path:
    """Folder of a shipped pipeline; a plain diffusers folder with fp16 weights.

    Raises:
        ValueError: no pipeline of that name is installed.
    """
    if name not in names():
        raise ValueError(f"demo pipeline: got {name!r}, expected one of {names()}")
    return _root() / name


def load(name: str = "emoji", **kwargs: Any) -> DiffusionPipeline:
    """Load a shipped pipeline, in float32 unless `dtype` says otherwise.

    "emoji": 64x64 emoji from their names, a plain `StableDiffusionPipeline` (10M parameters).
    "clothing": 64x64 photos of clothes from noise alone, a plain `LDMPipeline` (5M parameters).
    "digits": spoken digits from noise alone, one second at 8 kHz, a plain `AudioDiffusionPipeline` (5M parameters).

    Raises:
        ValueError: no pipeline of that name is installed.
        ImportError: "digits" without librosa.
    """
    folder = path(name)
    if (folder / "mel").is_dir() and not is_librosa_available():
        raise ImportError(
            f"demo pipeline {name!r}: spectrograms need librosa, which is not installed; pip install 'ld_pruner_hf[audio]'"
        )
    if "torch_dtype" not in kwargs:  # diffusers' earlier name of it
        kwargs.setdefault("dtype", torch.float32)
    return DiffusionPipeline.from_pretrained(folder, **kwargs)
