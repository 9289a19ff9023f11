"""ld-pruner show."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..plan import PLAN_FORMAT, PruningPlan
from ..scores import CRITERIA, OperatorScores

NAME = "show"
HELP = "print a pruning plan or a file of scores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="pruning_plan.json, scores.jsonl or scores.json")
    parser.add_argument("--criterion", choices=CRITERIA, help="rank scores by this criterion; default: the file's own")


def run(args: argparse.Namespace) -> None:
    path = Path(args.file)
    with path.open(encoding="utf-8", errors="replace") as file:
        beginning = file.read(200)
    if f'"{PLAN_FORMAT}"' in beginning:
        print(PruningPlan.load(path))
        return
    scores = OperatorScores.load(path)
    print(scores.with_criterion(args.criterion or scores.criterion))
