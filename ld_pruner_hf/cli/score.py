"""ld-pruner score."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..loading import load_pipeline
from ..pipeline import score
from ..scores import CRITERIA
from .common import ROWS_FILE, add_pipeline, add_scoring, scoring_arguments, slug

NAME = "score"
HELP = "score every operator: how far does taking it out move the final latents?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser)
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="folder for scores.jsonl, .csv and .json; default: <pipeline>-scores"
    )
    add_scoring(parser)


def run(args: argparse.Namespace) -> None:
    folder = Path(args.output or slug(args.pipeline) + "-scores")
    how = scoring_arguments(args)
    criterion = args.criterion or CRITERIA[0]
    pipe = load_pipeline(args.pipeline, args.dtype, args.device)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"rows go to {folder / ROWS_FILE}; if interrupted, run the same command again to go on", file=sys.stderr)
    scores = score(pipe, component=args.component, criterion=criterion, resume_from=folder / ROWS_FILE, **how)
    scores.to_csv(folder / "scores.csv")
    scores.to_json(folder / "scores.json")
    print(scores)
    print(f"\nwritten to {folder}: scores.jsonl, scores.csv, scores.json")
