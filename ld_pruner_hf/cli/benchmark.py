"""ld-pruner benchmark."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..benchmark import DEFAULT_WAYS, Benchmark, BenchmarkSettings, Finetune, save_results, table
from ..curves import benchmark_figures
from ..loading import load_pipeline
from ..report import figure_png, require_matplotlib
from ..selection import SAVINGS
from .common import add_pipeline, add_scoring, call_arguments, file_of_prompts, scoring_arguments
from .distill import launch

NAME = "benchmark"
HELP = "which way of choosing does the least damage at the same budget? A table and figures, resumable"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    default = BenchmarkSettings()
    add_pipeline(parser)
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for everything; resumed if it exists"
    )
    parser.add_argument(
        "--ways", nargs="+", default=list(DEFAULT_WAYS), metavar="WAY", help="CRITERION:METHOD, with +fit or +affine for fitted "
        "stand-ins, or the name of a hand-made plan",
    )  # fmt: skip
    budgets = parser.add_mutually_exclusive_group()
    for unit in SAVINGS:
        budgets.add_argument(
            f"--{unit}", type=float, nargs="+", metavar="SHARE", help=f"shares of the {unit} to take away"
        )
    parser.add_argument("--k", type=int, nargs="+", default=[], metavar="K", help="numbers of operators to take out")
    parser.add_argument("--rounds", type=int, default=default.rounds, metavar="N", help="rounds of the method rounds")
    parser.add_argument("--test-prompts", metavar="FILE", help="prompts to measure with; default: those of the scores")
    parser.add_argument(
        "--test-seeds", type=int, default=default.test_seeds, metavar="N", help="seeds to measure with"
    )
    parser.add_argument("--test-steps", type=int, metavar="N", help="denoising steps to measure with")
    parser.add_argument(
        "--after-kd",
        type=int,
        default=0,
        metavar="STEPS",
        help="distil every candidate for so many steps, too, and measure again",
    )
    parser.add_argument(
        "--kd-config",
        metavar="FILE",
        help="flags of ld-pruner distill for it; default: 128 samples of the original, no data set",
    )
    add_scoring(parser)


def distil_with(args: argparse.Namespace) -> Finetune:
    """A function that runs `ld-pruner distill` on a pruned pipeline, in a folder of its own, and loads the result."""
    folder = Path(args.output) / "distilled"
    flags = ["--config", args.kd_config] if args.kd_config else ["--data_free", "128"]

    def finetune(pipe: Any, steps: int) -> Any:
        number = sum(1 for _ in folder.glob("*-student"))
        student, out = folder / f"{number}-student", folder / f"{number}-after-{steps}-steps"
        pipe.save_pretrained(student)
        where = ["--teacher", args.pipeline, "--student", str(student), "--output_dir", str(out)]
        if code := launch([*flags, *where, "--max_train_steps", str(steps)]):
            raise RuntimeError(f"the distillation of {student} ended with exit code {code}; see its messages above")
        return load_pipeline(str(out), args.dtype, args.device)

    return finetune


def run(args: argparse.Namespace) -> None:
    how = scoring_arguments(args)
    named = ("conditions", "num_inference_steps", "seeds", "include", "exclude", "kinds", "batch_size")
    unit = next((u for u in SAVINGS if getattr(args, u)), BenchmarkSettings.unit)
    goals = getattr(args, unit)
    settings = BenchmarkSettings(
        ways=tuple(args.ways), unit=unit, goals=tuple(goals if goals else () if args.k else BenchmarkSettings.goals),
        ks=tuple(args.k), rounds=args.rounds, component=args.component,
        test_conditions=file_of_prompts(args.test_prompts) if args.test_prompts else None,
        test_seeds=args.test_seeds, test_steps=args.test_steps,
        call=call_arguments(args), **{name: how[name] for name in named},
    )  # fmt: skip
    require_matplotlib()
    pipe = load_pipeline(args.pipeline, args.dtype, args.device)
    pipe.set_progress_bar_config(disable=True)
    results = Benchmark(pipe, args.output, settings).run(distil_with(args) if args.after_kd else None, args.after_kd)
    folder = Path(args.output)
    save_results(folder / "benchmark.csv", results)
    (folder / "benchmark.md").write_text(table(results) + "\n", encoding="utf-8")
    for name, figure in benchmark_figures(results).items():
        (folder / f"{name}.png").write_bytes(figure_png(figure))
    print(table(results))
    print(f"\nwritten to {folder}: benchmark.csv, benchmark.md, figures, plans, scores")
