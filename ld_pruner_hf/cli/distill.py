"""ld-pruner distill: `accelerate launch training/distill.py`, wherever the script lies."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.commands.config.config_args import default_config_file

NAME = "distill"
HELP = "finetune a pruned pipeline towards its original; takes the flags of training/distill.py (--help lists them)"
PARSER = {"prefix_chars": "\0", "add_help": False}  # every flag is the script's, --help too


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("flags", nargs="*", metavar="--FLAG ...")


def script_path(name: str) -> Path:
    """A script of `training/`: inside the installed package, or beside it in a source checkout.

    Raises:
        ValueError: in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    places = [package / "training" / name, package.parent / "training" / name]
    for place in places:
        if place.is_file():
            return place
    raise ValueError(f"{name}: not found in {places[0].parent} or {places[1].parent}; install ld_pruner_hf again")


def launch(flags: Sequence[str]) -> int:
    """Start the script as `accelerate config` says, on all devices; its exit code."""
    plain = torch.accelerator.device_count() < 2 and not Path(default_config_file).is_file()
    launcher = [] if plain else ["-m", "accelerate.commands.launch"]
    return subprocess.run([sys.executable, *launcher, str(script_path("distill.py")), *flags]).returncode


def run(args: argparse.Namespace) -> None:
    if code := launch(args.flags):
        raise SystemExit(code)
