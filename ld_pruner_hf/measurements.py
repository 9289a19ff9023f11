"""What was measured when a pipeline was pruned. It is kept beside the pipeline, so that a model card needs no second run."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import __version__ as diffusers_version

from .plan import FORMAT_VERSION, PlanError, read_json, write_atomically
from .profiling import Profile, processor_name

MEASUREMENTS_FILE = "measurements.json"
MEASUREMENTS_FORMAT = "ld_pruner_hf.measurements"


@dataclass(frozen=True)
class Measurements:
    """The cost of one denoiser call before and after pruning.

    Attributes:
        component: which model of the pipeline.
        before, after: `before` is None where the original was not at hand.
        environment: processor, threads and versions of both.
        call: the numbers among the arguments of the pipeline's call (height, guidance_scale, ...); no prompts.
        base_model: the Hub id of the original; None if it has none.
    """

    component: str
    before: Profile | None
    after: Profile
    environment: str
    call: dict[str, Any] = field(default_factory=dict)
    base_model: str | None = None

    def save(self, path: str | os.PathLike) -> None:
        """Write everything as JSON; per-operator figures are left out."""
        data = {k: getattr(self, k) for k in self.__dataclass_fields__}
        for name in ("before", "after"):
            profile = data[name]
            data[name] = profile and {k: v for k, v in profile.to_dict().items() if k != "operators"}
        document = {"format": MEASUREMENTS_FORMAT, "version": FORMAT_VERSION, **data}
        write_atomically(path, json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Measurements:
        """Read what `save` wrote; `PlanError` if it is missing, damaged or from a newer version."""
        data = read_json(path, MEASUREMENTS_FORMAT)
        try:
            known = {k: data[k] for k in cls.__dataclass_fields__}
            for name in ("before", "after"):
                known[name] = known[name] and Profile(**known[name])
            return cls(**known)
        except (KeyError, TypeError) as error:
            raise PlanError(f"{path}: {error!r}; the file is damaged, measure again") from error


def measured(
    component: str, before: Profile | None, after: Profile, call: Mapping[str, Any], base_model: str | None = None
) -> Measurements:
    """`Measurements` of two profiles that were just made with the call's arguments."""
    numbers = {k: v for k, v in call.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return Measurements(component, before, after, environment_of(after), numbers, base_model)


def environment_of(profile: Profile) -> str:
    """What a profile was measured on, in words: processor, threads, dtype, versions."""
    device = processor_name() if profile.device == "cpu" else profile.device
    threads = f"{profile.threads} thread{'s' if profile.threads != 1 else ''}"
    return (
        f"{device} ({platform.machine()}, {threads}), {profile.dtype}, "
        f"torch {torch.__version__}, diffusers {diffusers_version}, Python {platform.python_version()}"
    )
