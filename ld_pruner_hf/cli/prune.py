"""ld-pruner prune."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from ..latents import find_denoiser, make_conditions
from ..loading import is_repo_id, load_pipeline, load_plan
from ..measurements import measured
from ..pipeline import check_goals, profile, prune
from ..plan import SEVERAL, PlanError, PruningPlan
from ..planning import SCORING_ONLY
from ..presets import PRESETS
from ..scores import OperatorScores
from ..selection import METHODS
from ..stock import StockRecord
from .common import ROWS_FILE, add_pipeline, add_scoring, call_arguments, scoring_arguments
from .output import check_output, save_into

NAME = "prune"
HELP = "take operators out and save the pipeline"


BUDGETS = ("params", "macs", "latency", "memory")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser)
    parser.add_argument(
        "target", metavar="K|PLAN", nargs="?", help="how many operators to take out; or a pruning plan: a file, a Hub id (user/plan), or "
        f"a hand-made one ({', '.join(PRESETS)}); or give a budget instead",
    )  # fmt: skip
    for unit, what in zip(BUDGETS, ("parameters", "MACs", "latency, measured here", "peak memory"), strict=True):
        parser.add_argument(f"--{unit}", type=float, metavar="SHARE", help=f"take away this share of the {what}: 0.3")
    parser.add_argument(
        "--method",
        choices=[*METHODS, "rounds"],
        help="how to choose; default: top-k for K, knapsack for a budget",
    )
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="rounds of --method rounds")
    parser.add_argument(
        "--fit", nargs="?", const=True, default=False, choices=["affine"], help="fit the stand-ins to the operators in closed form; "
        "affine: identities and zeros too",
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


def _target(text: str | None) -> int | str | PruningPlan | None:
    """K, the name of a hand-made plan, or a plan."""
    if text is None or text in PRESETS:
        return text
    if re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    try:
        return load_plan(text)
    except PlanError as error:
        if Path(text).exists():
            raise
        raise ValueError(
            f"{text}: no such file, no Hub id, no whole number and none of the hand-made plans ({', '.join(PRESETS)})"
        ) from error


def run(args: argparse.Namespace) -> None:
    target = _target(args.target)
    goals = {unit: getattr(args, unit) for unit in BUDGETS} | {"method": args.method, "rounds": args.rounds}
    check_goals(target, goals, args.fit)
    named = isinstance(target, (str, PruningPlan))
    if named and (args.scores or args.criterion):
        raise ValueError(
            "--scores and --criterion choose operators; a plan or preset names them already, leave these options out"
        )
    if Path(args.pipeline).is_dir() and Path(args.pipeline).resolve() == Path(args.output).resolve():
        raise ValueError(
            f"{args.output}: the output folder is the pipeline itself, which would be lost; choose another"
        )
    how = scoring_arguments(args)
    if args.scores:
        goals["scores"] = OperatorScores.load(args.scores)
    folder = check_output(Path(args.output), args.overwrite)
    pipe = load_pipeline(args.pipeline, args.dtype, args.device)
    if named or args.scores:
        how = {name: value for name, value in how.items() if name not in SCORING_ONLY}
    else:
        how["resume_from"] = folder / ROWS_FILE
    call = {"prompt": how["conditions"][0]} if how["conditions"] else {}
    call |= call_arguments(args)
    chosen = args.component or (target.component if isinstance(target, PruningPlan) else None) or None
    component = chosen.split(SEVERAL)[0] if chosen else find_denoiser(pipe, **make_conditions(pipe, None, call)[0])
    measuring = {"component": component, "repeats": args.repeats, **call}
    before = profile(pipe, **measuring)
    done = prune(pipe, target, criterion=args.criterion, component=chosen, fit=args.fit, **goals, **how)
    after = profile(pipe, **measuring)
    base = args.pipeline if is_repo_id(args.pipeline) and not Path(args.pipeline).exists() else None
    save_into(pipe, folder, done, measured(component, before, after, call, base))
    print(done)
    plain = isinstance(done, StockRecord) or done.how["saved_as"].startswith("stock")
    how_to_load = "it loads with plain diffusers" if plain else "load it after `import ld_pruner_hf`"
    print(f"\nbefore: {before}\nafter:  {after}\nsaved to {folder}; {how_to_load}")
