"""Load a pipeline by its name: a folder, a Hub id, or one that ships with the package; or a plan: a file or a Hub id."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError

from . import demo
from .plan import PruningPlan

PLAN_FILE = "pruning_plan.json"
"""The name of a plan beside a pruned pipeline, and in a repository of the Hub."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def pick_device(device: str) -> str:
    """The device by name; "auto" is the accelerator if there is one, each process of a launch its own.

    Raises:
        ValueError: a device that is not there.
    """
    accelerator = torch.accelerator.current_accelerator()  # None on a machine that has only a CPU
    if device == "auto":
        if accelerator is None:
            return "cpu"
        rank = int(os.environ.get("LOCAL_RANK", 0))
        return f"{accelerator.type}:{rank % torch.accelerator.device_count()}" if rank else accelerator.type
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, expected for example 'auto', 'cpu' or 'cuda'") from error
    if kind not in ("cpu", accelerator.type if accelerator is not None else "cpu"):
        raise ValueError(f"device: got {device!r}, but torch finds no such device here; use cpu")
    return device


def load_pipeline(name: str, dtype: str = "float32", device: str = "auto") -> Any:
    """Load a pipeline from a local folder, from the Hub, or one that ships with the package (`demo:emoji`).

    Raises:
        ValueError: unknown demo pipeline, dtype or device; a name that is neither a pipeline's folder nor found on the Hub.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype!r}, expected one of {list(DTYPES)}")
    device = pick_device(device)
    precision = {"dtype": DTYPES[dtype]}  # always: transformers would load its parts in the checkpoint's own dtype
    if name.startswith("demo:"):
        demo_pipe: Any = demo.load(name.removeprefix("demo:"), **precision)
        return demo_pipe.to(device)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{name}: the folder has no model_index.json, so it holds no diffusers pipeline")
        return DiffusionPipeline.from_pretrained(folder, **precision).to(device)
    if not is_repo_id(name):
        raise ValueError(
            f"{name}: no such folder; expected a pipeline's folder, a Hub id such as org/model, or demo:emoji"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(name, **precision)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(f"{name}: no local folder, and not loaded from the Hub either: {one_line(error)}") from error
    return pipe.to(device)


def is_repo_id(name: str) -> bool:
    """Could this be the id of a repository of the Hub (`user/name`)? A folder of that name may be there all the same."""
    return re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", name) is not None


def load_plan(name: str | os.PathLike, token: str | None = None) -> PruningPlan:
    """Load a pruning plan from a file, from a folder that has one, or from a repository of the Hub.

    Raises:
        ValueError: none of these; a repository without a plan. PlanError: damaged, or of a newer version.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / PLAN_FILE
    if path.is_file() or not is_repo_id(str(name)):
        return PruningPlan.load(path)
    try:
        return PruningPlan.load(hf_hub_download(str(name), PLAN_FILE, token=token))
    except RemoteEntryNotFoundError as error:
        raise ValueError(f"{name}: this repository of the Hub has no {PLAN_FILE}; expected one with a plan") from error
    except (OSError, HfHubHTTPError) as error:
        raise ValueError(f"{name}: no such file here, and no plan from the Hub either: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
