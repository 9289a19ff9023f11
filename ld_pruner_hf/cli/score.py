"""ld-pruner score."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..loading import load_pipeline
from ..pipeline import score
from ..planning import denoisers_of
from ..scores import CRITERIA
from ..scoring import ScoringCost, process, score_cost
from .common import ROWS_FILE, add_pipeline, add_scoring, scoring_arguments, slug

NAME = "score"
HELP = "score every operator: how far does taking it out move the final latents?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser)
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="folder for scores.jsonl, .csv and .json; default: <pipeline>-scores"
    )
    parser.add_argument(
        "-k",
        type=int,
        metavar="K",
        help="how many operators will be taken out: estimates are then refined where that choice is made",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what it would cost, from a short measurement")
    add_scoring(parser)


def run(args: argparse.Namespace) -> None:
    folder = Path(args.output or slug(args.pipeline) + "-scores")
    how = {
        **scoring_arguments(args),
        "component": args.component,
        "criterion": args.criterion or CRITERIA[0],
        "k": args.k,
    }
    pipe = load_pipeline(args.pipeline, args.dtype, args.device)
    if args.dry_run:
        for component in denoisers_of(pipe, args.component, how):
            print(f"{component}: {score_cost(pipe, **{**how, 'component': component})}")
        return
    rank, processes = process()
    if rank:  # the first process speaks for all
        pipe.set_progress_bar_config(disable=True)
    folder.mkdir(parents=True, exist_ok=True)
    if not rank:
        together = f", shared by {processes} processes" if processes > 1 else ""
        print(
            f"rows go to {folder / ROWS_FILE}{together}; if interrupted, run the same command again to go on",
            file=sys.stderr,
        )
    scores = score(pipe, resume_from=folder / ROWS_FILE, on_cost=None if rank else _print_cost, **how)
    if rank:
        return
    scores.to_csv(folder / "scores.csv")
    scores.to_json(folder / "scores.json")
    print(scores)
    print(f"\nwritten to {folder}: scores.jsonl, scores.csv, scores.json")


def _print_cost(cost: ScoringCost) -> None:
    print(cost, file=sys.stderr)
