"""What several commands share: options, and the arguments that they stand for."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from ..effort import EFFORTS
from ..loading import DTYPES
from ..operators import STANDINS
from ..scores import CRITERIA

ROWS_FILE = "scores.jsonl"


def file_of_prompts(path: str) -> list[str]:
    prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts: {path} has no line with a prompt")
    return prompts


def call_argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=VALUE, for example height=512")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def call_arguments(args: argparse.Namespace) -> dict[str, Any]:
    call = dict(args.call)
    if args.guidance_scale is not None:
        call["guidance_scale"] = args.guidance_scale
    return call


def _batch_size(text: str) -> int | None:
    return None if text == "auto" else int(text)


def scoring_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `score` that the options ask for; a file of prompts is read here, before anything loads."""
    return {
        "conditions": file_of_prompts(args.prompts) if args.prompts else args.prompt,
        "num_inference_steps": args.num_inference_steps,
        "seeds": args.seeds,
        "seed": args.seed,
        "pooled": args.pooled,
        "include": args.include,
        "exclude": args.exclude,
        "kinds": args.kinds,
        "standins": args.standins,
        "batch_size": args.batch_size,
        "calibration": args.calibration,
        "effort": args.effort,
        "skip_free": args.skip_free,
        **call_arguments(args),
    }


def slug(pipeline: str) -> str:
    """A pipeline's name as part of a file name: the last part of a path or id."""
    return re.sub(
        r"[^A-Za-z0-9._-]+",
        "-",
        Path(pipeline).resolve().name if Path(pipeline).is_dir() else pipeline.rpartition("/")[2],
    )


def add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pipeline",
        metavar="PIPELINE",
        help="a pipeline's folder, a Hub id (org/model), or one that ships: demo:emoji, demo:clothing, demo:digits",
    )
    parser.add_argument(
        "--component", metavar="C", help="which of its models; default: what denoises (a+b for several)"
    )
    add_call(parser)


def add_call(parser: argparse.ArgumentParser) -> None:
    """What goes to the pipeline's call, and where it runs."""
    parser.add_argument(
        "--guidance-scale", type=float, metavar="G", help="guidance of the calls; default: the pipeline's own"
    )
    parser.add_argument(
        "--call", type=call_argument, action="append", default=[], metavar="NAME=VALUE", help="any other argument of the "
        "pipeline's call, for example height=512; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda, cuda:1, ...; auto takes the accelerator if any"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="precision of the weights")


def add_scoring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scoring")
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", nargs="+", action="extend", metavar="P", help="prompts to score with; default: 50 built-in ones, where the "
        "pipeline takes a prompt",
    )  # fmt: skip
    prompts.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    group.add_argument(
        "--num-inference-steps", type=int, metavar="N", help="denoising steps; default: the pipeline's own"
    )
    group.add_argument("--seeds", type=int, default=2, metavar="N", help="latents per prompt")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="the first seed")
    group.add_argument("--criterion", choices=CRITERIA, help=f"what to rank by; default: {CRITERIA[0]}")
    group.add_argument(
        "--effort", choices=list(EFFORTS), default="exact", help="exact: the paper's loop; balanced, fast: estimates for "
        "about a hundredth and a 400th of its time",
    )  # fmt: skip
    group.add_argument(
        "--skip-free", action="store_true", help="not what holds no parameters and makes no MACs (activations)"
    )
    group.add_argument("--pooled", action="store_true", help="compare all latents as one set, not one set per prompt")
    group.add_argument(
        "--include", nargs="+", action="extend", metavar="PAT", help='only these operators: "mid_block*" "*.attn1"'
    )
    group.add_argument("--exclude", nargs="+", action="extend", metavar="PAT", help="not these operators")
    group.add_argument(
        "--kinds", nargs="+", action="extend", metavar="CLASS", help="only operators of these classes: Attention"
    )
    group.add_argument(
        "--standins", choices=STANDINS, default="all", help="paper: without zeros for residual branches"
    )
    group.add_argument(
        "--calibration", type=int, default=64, metavar="N", help="inputs of the denoiser that criteria other than "
        "latent-shift look at",
    )  # fmt: skip
    group.add_argument(
        "--batch-size",
        type=_batch_size,
        default=8,
        metavar="N",
        help="latents per pipeline call; auto finds the quickest by trial, and whether weights are to be channels last",
    )
