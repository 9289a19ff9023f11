"""A folder that a command writes: checked before long work, replaced only when everything new is there."""

from __future__ import annotations

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..loading import PLAN_FILE
from ..measurements import MEASUREMENTS_FILE, Measurements
from ..plan import PruningPlan
from ..stock import StockRecord
from .common import ROWS_FILE

_STAGING = ".ld-pruner-new"


def _is_ours(name: str) -> bool:
    """Files that a run leaves for the next one: the rows of each round of scoring, and what is being saved."""
    return name == _STAGING or fnmatch(name, f"{Path(ROWS_FILE).stem}*{Path(ROWS_FILE).suffix}")


def check_output(folder: Path, overwrite: bool) -> Path:
    """Make the folder for a pruned pipeline, before any long work.

    A file of scores in it is no obstacle: an interrupted run left it there and is resumed. With `overwrite`, a folder is
    only ever emptied if it holds a pipeline.

    Raises:
        ValueError: it has other content. OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = sorted(p.name for p in folder.iterdir() if not _is_ours(p.name))
    if content and not overwrite:
        raise ValueError(
            f"{folder}: the output folder is not empty (it has {content[0]}); choose another, or pass --overwrite"
        )
    if content and "model_index.json" not in content:
        raise ValueError(
            f"{folder}: --overwrite replaces only a saved pipeline, and this folder has no model_index.json"
        )
    return folder


def save_into(pipe: Any, folder: Path, done: PruningPlan | StockRecord, measurements: Measurements) -> None:
    """Save pipeline, measurements, and the plan if there is one, completely beside what the folder has; then put them in its place."""
    staging = folder / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    pipe.save_pretrained(staging)
    if isinstance(done, PruningPlan):
        done.save(staging / PLAN_FILE)
    measurements.save(staging / MEASUREMENTS_FILE)
    for old in folder.iterdir():
        if _is_ours(old.name):
            continue
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()
    for new in staging.iterdir():
        os.replace(new, folder / new.name)
    staging.rmdir()
