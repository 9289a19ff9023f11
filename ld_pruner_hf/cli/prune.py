"""ld-pruner prune."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..latents import find_denoiser, make_conditions
from ..loading import is_repo_id, load_pipeline, load_plan
from ..measurements import measured
from ..modeling import plan_of
from ..pipeline import make_plan, profile, prune
from ..plan import PlanError, PruningPlan
from ..presets import PRESETS
from ..scores import OperatorScores
from .common import ROWS_FILE, add_pipeline, add_scoring, call_arguments, scoring_arguments
from .output import check_output, save_into

NAME = "prune"
HELP = "take operators out and save the pipeline"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser)
    parser.add_argument(
        "target", metavar="K|PLAN", help="how many operators to take out; or a pruning plan: a file, a Hub id (user/plan), or a "
        f"hand-made one ({', '.join(PRESETS)})",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for the pruned pipeline and its plan"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a pipeline that is saved in DIR")
    parser.add_argument(
        "--scores", metavar="FILE", help="scores to choose by; default: score first (resumed from DIR)"
    )
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed calls before and after")
    add_scoring(parser)


def _target(text: str) -> int | str | PruningPlan:
    """K, the name of a hand-made plan, or a plan."""
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    if text in PRESETS:
        return text
    try:
        return load_plan(text)
    except PlanError as error:
        if Path(text).exists():
            raise
        raise ValueError(
            f"{text}: got no whole number, no file, no Hub id and none of the hand-made plans ({', '.join(PRESETS)})"
        ) from error


def run(args: argparse.Namespace) -> None:
    target = _target(args.target)
    if not isinstance(target, int) and (args.scores or args.criterion):
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
    if isinstance(target, int):
        scoring = {} if given else {**how, "resume_from": folder / ROWS_FILE}
        target = make_plan(pipe, target, scores=given, criterion=args.criterion, component=args.component, **scoring)
    call = {"prompt": how["conditions"][0]} if how["conditions"] else {}
    call |= call_arguments(args)
    named = args.component or getattr(target, "component", None) or None
    component = find_denoiser(pipe, named, **make_conditions(pipe, None, call)[0])
    measuring = {"component": component, "repeats": args.repeats, **call}
    before = profile(pipe, **measuring)
    done = prune(pipe, target, component=args.component)
    after = profile(pipe, **measuring)
    base = args.pipeline if is_repo_id(args.pipeline) and not Path(args.pipeline).exists() else None
    plan = done if isinstance(done, PruningPlan) else None
    save_into(pipe, folder, plan, measured(component, before, after, call, base))
    print(done)
    needs = "" if plan_of(getattr(pipe, component)) is None else "; load it after `import ld_pruner_hf`"
    print(f"\nbefore: {before}\nafter:  {after}\nsaved to {folder}{needs}")
