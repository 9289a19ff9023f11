"""ld-pruner show."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..loading import is_repo_id, load_plan
from ..plan import PLAN_FORMAT
from ..scores import CRITERIA, OperatorScores

NAME = "show"
HELP = "print a pruning plan or a file of scores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "file", metavar="FILE", help="pruning_plan.json, scores.jsonl or scores.json; a folder or Hub id (user/plan) with a plan",
    )  # fmt: skip
    parser.add_argument("--criterion", choices=CRITERIA, help="rank scores by this criterion; default: the file's own")


def run(args: argparse.Namespace) -> None:
    path = Path(args.file)
    if path.is_dir() or (not path.exists() and is_repo_id(args.file)):
        print(load_plan(args.file))
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        beginning = file.read(200)
    if f'"{PLAN_FORMAT}"' in beginning:
        print(load_plan(path))
        return
    scores = OperatorScores.load(path)
    print(scores.with_criterion(args.criterion or scores.criterion))
