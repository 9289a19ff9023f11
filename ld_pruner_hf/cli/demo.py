"""ld-pruner demo."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import demo
from ..demo.job import KS, DemoSettings, run_demo
from ..loading import pick_device

NAME = "demo"
HELP = "score and prune a pipeline that ships with the package, and write a page about it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = DemoSettings()
    parser.add_argument(
        "-o", "--output", default="demo-output", metavar="DIR", help="folder for the page and everything on it"
    )
    parser.add_argument(
        "--pipeline", choices=demo.names(), default=default.name, help="which shipped pipeline; default: %(default)s"
    )
    parser.add_argument(
        "--k",
        type=int,
        nargs="+",
        metavar="K",
        help=f"how many operators to take out; default: {KS[default.name]} for {default.name}",
    )
    parser.add_argument(
        "--num-inference-steps", type=int, default=default.num_inference_steps, metavar="N", help="steps for scoring"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=default.seeds,
        metavar="N",
        help="latents per prompt for scoring; three times as many without prompts",
    )
    parser.add_argument(
        "--picture-steps", type=int, default=default.picture_steps, metavar="N", help="steps for the pictures"
    )
    parser.add_argument(
        "--include", nargs="+", action="extend", metavar="PAT", help="score only these operators; default: all"
    )
    parser.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda, ...; auto takes the accelerator if any"
    )


def run(args: argparse.Namespace) -> None:
    settings = DemoSettings(
        name=args.pipeline, ks=tuple(dict.fromkeys(args.k or KS[args.pipeline])), num_inference_steps=args.num_inference_steps, seeds=args.seeds,
        picture_steps=args.picture_steps, include=tuple(args.include or ()),
    )  # fmt: skip
    result = run_demo(args.output, settings, pick_device(args.device))
    print(f"\n{result.scores}\n")
    for name, measured in result.profiles.items():
        print(f"{name:<9} {measured}")
    print(f"\nopen {Path(args.output) / 'index.html'} in a browser")
