"""ld-pruner sweep."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..evaluation import METRICS, EvaluationSettings
from ..scores import CRITERIA, OperatorScores
from ..sweep import DEFAULT_KS, SWEEP_FILE, sweep
from .common import add_call, slug
from .evaluate import add_samples, sample_settings

NAME = "sweep"
HELP = "quality and measured speed-up over k; where the cliff is, and how many operators to take out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pipeline", metavar="PIPELINE", help="a pipeline's folder, a Hub id (org/model), or demo:emoji"
    )
    parser.add_argument("--scores", required=True, metavar="FILE", help="its scores, from ld-pruner score")
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="samples, figures, sweep.json; default: <pipeline>-sweep"
    )
    parser.add_argument(
        "--k", type=int, nargs="+", default=list(DEFAULT_KS), metavar="K", help="operators to take out"
    )
    parser.add_argument("--metric", choices=list(METRICS), default="fid", metavar="M", help=f"of: {' '.join(METRICS)}")
    parser.add_argument("--criterion", choices=list(CRITERIA), help="formula to rank by; default: that of the scores")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="how much worse than the original may be recommended",
    )
    add_samples(parser)
    add_call(parser)


def run(args: argparse.Namespace) -> None:
    given = sample_settings(args)
    if "n" not in given and given.get("prompts"):
        given["n"] = len(given["prompts"])
    output = Path(args.output or slug(args.pipeline) + "-sweep")
    result = sweep(
        args.pipeline, OperatorScores.load(args.scores), output, args.k, args.metric, EvaluationSettings(**given),
        args.criterion, args.tolerance,
    )  # fmt: skip
    print(f"{result}\n\nwritten to {output}: {SWEEP_FILE}, sweep.csv, figures; samples are beside them")
