"""ld-pruner report."""

from __future__ import annotations

import argparse
import ast
from pathlib import Path

from ..evaluation import Evaluation
from ..evaluation.generation import kind_of
from ..latents import call_parameters, default_prompts, steps_argument
from ..loading import load_pipeline
from ..pipeline import make_plan
from ..plan import PlanError
from ..report import require_matplotlib
from ..reporting import ReportContent, draw_all, read_log, write_report
from ..scores import CRITERIA, OperatorScores
from ..sweep import SWEEP_FILE, Sweep
from .common import add_call, call_arguments, file_of_prompts, slug

NAME = "report"
HELP = "one self-contained page about a pipeline's pruning: figures, sample grids, tables, sounds"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pipeline", metavar="PIPELINE", help="a pipeline's folder, a Hub id (org/model), or demo:emoji"
    )
    parser.add_argument("--scores", required=True, metavar="FILE", help="its scores, from ld-pruner score")
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="folder for index.html, PNG and CSV files; default: <pipeline>-report"
    )
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 42, 80], metavar="K", help="columns of the grids")
    parser.add_argument(
        "--criteria", nargs="+", choices=list(CRITERIA), metavar="C", help="formulae of the grids; default: all that the "
        "scores hold",
    )  # fmt: skip
    parser.add_argument("--sweep", metavar="FILE", help=f"{SWEEP_FILE} of ld-pruner sweep, or its folder")
    parser.add_argument(
        "--evaluation",
        nargs="+",
        default=[],
        metavar="FILE",
        help="evaluation.json of ld-pruner evaluate: before and after",
    )
    parser.add_argument(
        "--training-log", nargs="+", default=[], metavar="FILE", help="log.csv of finetunings with training/distill.py"
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="a text file with one prompt a line; default: those of the scores"
    )
    parser.add_argument("--samples", type=int, default=6, metavar="N", help="lines of the grids")
    parser.add_argument("--num-inference-steps", type=int, metavar="N", help="denoising steps of the samples")
    add_call(parser)


def _sweep(path: str) -> Sweep:
    return Sweep.load(Path(path) / SWEEP_FILE if Path(path).is_dir() else path)


def _logs(paths: list[str]) -> dict[str, list[dict[str, float]]]:
    """Named by their folders, or by their whole paths where these are alike."""
    names = [Path(p).resolve().parent.name for p in paths]
    return {n if names.count(n) == 1 else p: read_log(p) for n, p in zip(names, paths, strict=True)}


def _prompts_of(scores: OperatorScores) -> list[str]:
    """Those that the operators were scored with."""
    found = []
    for condition in scores.settings.get("conditions", []):
        try:
            found.append(ast.literal_eval(condition.get("prompt", "None")))
        except (ValueError, SyntaxError):  # told by a digest alone
            continue
    return list(dict.fromkeys(prompt for prompt in found if isinstance(prompt, str)))


def run(args: argparse.Namespace) -> None:
    require_matplotlib()
    scores = OperatorScores.load(args.scores)
    sweep = _sweep(args.sweep) if args.sweep else None
    evaluations = tuple(Evaluation.load(path) for path in args.evaluation)
    training = _logs(args.training_log)
    if args.samples < 1:
        raise ValueError(f"--samples: got {args.samples}, expected at least 1")
    pipe = load_pipeline(args.pipeline, args.dtype, args.device)
    prompts = None
    if "prompt" in call_parameters(pipe):
        prompts = file_of_prompts(args.prompts) if args.prompts else _prompts_of(scores) or default_prompts()
        prompts = prompts[: args.samples]
    call = {**steps_argument(pipe, args.num_inference_steps), **call_arguments(args)}
    criteria = dict.fromkeys([scores.criterion, *(args.criteria or scores.criteria)])
    try:
        plans = {c: {k: make_plan(pipe, k, scores=scores, criterion=c) for k in sorted(set(args.k))} for c in criteria}
    except PlanError as error:
        raise ValueError(f"--scores {args.scores}: {error}") from error
    n = len(prompts) if prompts else args.samples
    samples = draw_all(pipe, plans, call, prompts, n)
    what = "sound" if kind_of(pipe) == "audio" else "picture"
    how = f"One {what} a line, from the same noise in each column. Nothing was trained after pruning."
    labels = prompts or [f"seed {i}" for i in range(n)]
    name = Path(args.pipeline).resolve().name if Path(args.pipeline).is_dir() else args.pipeline
    content = ReportContent(name, scores, plans, samples, labels, how, sweep, evaluations, training)
    page = write_report(args.output or slug(args.pipeline) + "-report", content)
    print(f"written to {page}; figures, grids and tables are beside it")
