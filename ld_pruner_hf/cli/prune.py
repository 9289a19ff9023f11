"""ld-pruner prune."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..loading import load_pipeline
from ..pipeline import make_plan, profile, prune
from ..plan import PruningPlan
from ..scores import OperatorScores
from .common import ROWS_FILE, add_pipeline, add_scoring, call_arguments, scoring_arguments
from .output import check_output, save_into

NAME = "prune"
HELP = "take operators out and save the pipeline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser)
    parser.add_argument("target", metavar="K|PLAN.json", help="how many operators to take out, or a pruning plan")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for the pruned pipeline and its plan"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a pipeline that is saved in DIR")
    parser.add_argument(
        "--scores", metavar="FILE", help="scores to choose by; default: score first (resumed from DIR)"
    )
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed calls before and after")
    add_scoring(parser)


def _target(text: str) -> int | PruningPlan:
    """K or the path of a plan."""
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else PruningPlan.load(text)


def run(args: argparse.Namespace) -> None:
    target = _target(args.target)
    if isinstance(target, PruningPlan) and (args.scores or args.criterion):
        raise ValueError(
            "--scores and --criterion choose operators; the plan already names them, leave these options out"
        )
    if Path(args.pipeline).is_dir() and Path(args.pipeline).resolve() == Path(args.output).resolve():
        raise ValueError(
            f"{args.output}: the output folder is the pipeline itself, which would be lost; choose another"
        )
    how = scoring_arguments(args)
    given = OperatorScores.load(args.scores) if args.scores else None
    folder = check_output(Path(args.output), args.overwrite)
    pipe = load_pipeline(args.pipeline, args.dtype, args.device)
    if not isinstance(target, PruningPlan):
        scoring = {} if given else {**how, "resume_from": folder / ROWS_FILE}
        target = make_plan(pipe, target, scores=given, criterion=args.criterion, component=args.component, **scoring)
    call = {"prompt": how["conditions"][0]} if how["conditions"] else {}
    call |= call_arguments(args)
    measuring = {"component": target.component or args.component, "repeats": args.repeats, **call}
    before = profile(pipe, **measuring)
    plan = prune(pipe, target, component=args.component)
    after = profile(pipe, **measuring)
    save_into(pipe, folder, plan)
    print(plan)
    print(f"\nbefore: {before}\nafter:  {after}\nsaved to {folder}; load it after `import ld_pruner_hf`")
