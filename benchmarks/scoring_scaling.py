"""How the cost of scoring grows with operators, conditions and steps: the paper's loop and each effort, on the emoji pipeline.

    python benchmarks/scoring_scaling.py --output scaling.csv

One of the three is varied at a time. The loop and effort="exact" are timed on some rows, in turns, and extrapolated to all; the
estimates are made whole. Seconds are CPU seconds of one thread. How it grows with processes: `scoring_processes.py`.
"""

import argparse
import csv
import sys
import time

import torch
from scoring_effort import Loop, interleaved

import ld_pruner_hf
from ld_pruner_hf import demo
from ld_pruner_hf.profiling import processor_name

PARTS = {"middle": ["mid_block"], "inner levels": ["mid_block", "*_blocks.[12]"], "all": None}
COLUMNS = ["operators", "prompts", "steps", "rows", "inputs a row", "loop s", "exact s", "balanced s", "fast s"]
USUAL = {"part": "all", "prompts": 2, "steps": 5}
CASES = [
    USUAL,
    *(USUAL | {"part": part} for part in PARTS if part != USUAL["part"]),
    *(USUAL | {"prompts": n} for n in (1, 4, 8)),
    *(USUAL | {"steps": n} for n in (2, 10, 20)),
]


def estimate(pipe, prompts, effort, case, seeds):
    """CPU seconds, without finding the operators."""
    started = []
    ld_pruner_hf.score(
        pipe, prompts, seeds=seeds, num_inference_steps=case["steps"], effort=effort, include=PARTS[case["part"]],
        on_cost=lambda cost: started.append(time.process_time()),
    )  # fmt: skip
    return time.process_time() - started[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="scoring_scaling.csv")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--sample", type=int, default=4, help="rows of the loop and of effort='exact' that are timed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = demo.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    print(f"demo:emoji, {processor_name()}, 1 thread, {args.seeds} seeds")
    with open(args.output, "w", newline="") as file:
        for out in (writers := [csv.DictWriter(f, COLUMNS) for f in (file, sys.stdout)]):
            out.writeheader()
        for case in CASES:
            prompts = demo.PROMPTS["emoji"][: case["prompts"]]
            loop = Loop(pipe, prompts, argparse.Namespace(steps=case["steps"], **vars(args)), PARTS[case["part"]])
            naive, exact, _ = interleaved(loop, args.sample)
            seconds = [naive, exact, *(estimate(pipe, prompts, e, case, args.seeds) for e in ("balanced", "fast"))]
            operators = len({m.path for m in loop.todo})
            inputs = 2 * args.seeds * case["prompts"] * case["steps"]  # guidance runs two a step
            values = [
                operators,
                case["prompts"],
                case["steps"],
                len(loop.todo),
                inputs,
                *(round(s, 1) for s in seconds),
            ]
            for out in writers:
                out.writerow(dict(zip(COLUMNS, values, strict=True)))
            file.flush()
            sys.stdout.flush()


if __name__ == "__main__":
    main()
