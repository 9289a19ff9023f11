"""ld-pruner additivity."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..additivity import measure_additivity
from ..curves import additivity_figure
from ..latents import only_one
from ..loading import load_pipeline
from ..plan import SEVERAL
from ..planning import OPERATORS_ONLY
from ..report import figure_png, require_matplotlib
from ..scores import OperatorScores
from .common import add_pipeline, add_scoring, scoring_arguments

NAME = "additivity"
HELP = "do single scores add up? Random sets of operators: predicted against measured joint damage"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser)
    parser.add_argument(
        "--scores",
        required=True,
        metavar="FILE",
        help="scores of this pipeline; pass the scoring options they were made with",
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for additivity.csv, .txt and .png"
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[2, 4, 8, 16, 32], metavar="N", help="how many operators a set has"
    )
    parser.add_argument("--sets", type=int, default=6, metavar="N", help="sets of each size")
    parser.add_argument(
        "--among",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="draw from this share of the operators, the least important",
    )
    add_scoring(parser)


def run(args: argparse.Namespace) -> None:
    how = {name: value for name, value in scoring_arguments(args).items() if name not in OPERATORS_ONLY}
    scores = OperatorScores.load(args.scores)
    only_one(scores.component.split(SEVERAL), NAME)
    scores = scores.with_criterion(args.criterion or scores.criterion)
    require_matplotlib()
    pipe = load_pipeline(args.pipeline, args.dtype, args.device)
    found = measure_additivity(
        pipe,
        scores,
        sizes=args.sizes,
        sets=args.sets,
        among=args.among,
        component=args.component or scores.component,
        **how,
    )
    folder = Path(args.output)
    found.to_csv(folder / "additivity.csv")
    (folder / "additivity.txt").write_text(f"{found}\n", encoding="utf-8")
    (folder / "additivity.png").write_bytes(figure_png(additivity_figure(found)))
    print(found)
    print(f"\nwritten to {folder}: additivity.csv, additivity.txt, additivity.png")
