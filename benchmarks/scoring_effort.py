"""Scoring with less effort against the paper's loop: CPU time, and how far the choice agrees.

    python benchmarks/scoring_effort.py --naive naive.jsonl --output table.csv

The naive loop is the one of the paper as one would write it: for each operator and stand-in, for each prompt and seed, one call
of the pipeline. Its rows go to a file, and an interrupted run goes on. Then the same settings are scored with each effort.
`--spend 30 10` adds estimates that may spend a 30th and a 10th of the loop's denoiser inputs. `--interleaved 12` measures 12 rows, spread
over the model, in turns by the loop and by effort="exact", and compares time and scores. What is compared are the scores of
operators (their best stand-in): Spearman's correlation, and the share of the lowest k of the loop that are among the lowest k.
"""

import argparse
import csv
import json
import platform
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from scipy.stats import spearmanr

import ld_pruner_hf
from ld_pruner_hf import Modification, applied, demo, find_operators
from ld_pruner_hf.effort import EFFORTS
from ld_pruner_hf.latents import preserved
from ld_pruner_hf.reuse import FirstStep
from ld_pruner_hf.scoring import latent_distances, output_sets
from ld_pruner_hf.trajectory import evenly

KS = (10, 20, 30, 42)


def naive_distances(pipe, prompts, args):
    sets = []
    for prompt in prompts:
        runs = [
            pipe(
                prompt,
                num_inference_steps=args.steps,
                output_type="latent",
                generator=torch.Generator().manual_seed(seed),
            ).images
            for seed in range(args.seeds)
        ]
        sets.append(torch.cat(runs).double())
    return sets


def naive_rows(pipe, prompts, args):
    """(path, stand-in) -> row, from the file as far as it has them, else measured."""
    path = Path(args.naive)
    rows = {}
    if path.exists():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[row["path"], row["stand_in"]] = row
    if args.measured_only:
        return rows, len(rows)
    operators = find_operators(pipe, prompt=prompts[0], progress=False)
    todo = [(o, spec) for o in operators for spec in o.stand_ins]
    originals = naive_distances(pipe, prompts, args)
    with path.open("a") as file:
        for operator, spec in todo:
            if (operator.path, spec.name) in rows:
                continue
            start = time.process_time()
            pairs = naive_row(pipe, prompts, args, originals, Modification(operator.path, operator.kind, spec))
            row = {"path": operator.path, "stand_in": spec.name}
            row |= {"avg_dist": [avg for avg, _ in pairs], "std_dist": [std for _, std in pairs]}
            rows[operator.path, spec.name] = row | {"cpu_s": time.process_time() - start}
            file.write(json.dumps(rows[operator.path, spec.name]) + "\n")
            file.flush()
    return rows, len(todo)


def naive_row(pipe, prompts, args, originals, modification):
    with applied(pipe.unet, [modification]):
        return distances(originals, naive_distances(pipe, prompts, args))


def distances(originals, modified):
    return [latent_distances(a, b) for a, b in zip(originals, modified, strict=True)]


def interleaved(pipe, prompts, args):
    """The loop and effort="exact" in turns: CPU seconds a row, and the largest relative difference of a score."""
    operators = find_operators(pipe, prompt=prompts[0], progress=False)
    todo = [Modification(o.path, o.kind, spec) for o in operators for spec in o.stand_ins]
    conditions = [{"prompt": p, "num_inference_steps": args.steps} for p in prompts]
    seconds, difference = {"naive": 0.0, "exact": 0.0}, 0.0
    with preserved(pipe):
        sets = output_sets(pipe, "unet", conditions, range(args.seeds), batch_size=8, pooled=False)
        first_step = FirstStep(
            pipe.unet, [partial(sets.first_step, i) for i in range(len(sets.jobs))], [m.path for m in todo]
        )
        by_loop, by_batch = naive_distances(pipe, prompts, args), sets.collect()
        for m in evenly(todo, args.interleaved):
            start = time.process_time()
            naive = naive_row(pipe, prompts, args, by_loop, m)
            middle = time.process_time()
            with applied(pipe.unet, [m]), first_step.reused([m.path]):
                exact = distances(by_batch, sets.collect())
            seconds["naive"] += middle - start
            seconds["exact"] += time.process_time() - middle
            a, b = (sum(map(sum, pairs)) for pairs in (naive, exact))
            difference = max(difference, abs(a - b) / a)
            print(
                f"  {m.path} {m.stand_in.name}: {middle - start:.2f} and {time.process_time() - middle:.2f} CPU s",
                flush=True,
            )
    each = {name: round(total / args.interleaved, 3) for name, total in seconds.items()}
    print(
        f"CPU s a row: {each}, {each['naive'] / each['exact']:.2f} times cheaper; scores differ by at most {difference:.1e}"
    )


def best(scores):
    """path -> the score of its best stand-in."""
    lowest = {}
    for (path, _), score in scores.items():
        lowest[path] = min(score, lowest.get(path, score))
    return lowest


def lowest(scores, k):
    return set(sorted(scores, key=scores.get)[:k])


def measure(pipe, prompts, effort, naive, args):
    """Score with one effort, and compare with the naive loop."""
    started = []
    start = time.process_time()
    found = ld_pruner_hf.score(
        pipe, prompts, seeds=args.seeds, num_inference_steps=args.steps, effort=effort,
        on_cost=lambda cost: started.append(time.process_time()),
    )  # fmt: skip
    end = time.process_time()
    reference = best({key: sum(row["avg_dist"]) + sum(row["std_dist"]) for key, row in naive.items()})
    estimate = best({row.key: row.score() for row in found if row.key in naive})
    result = {"effort": effort, "cpu_s": round(end - started[0], 2), "with_finding_cpu_s": round(end - start, 2)}
    paths = list(reference)
    a, b = [reference[p] for p in paths], [estimate[p] for p in paths]
    result["spearman"] = round(spearmanr(a, b)[0], 4)
    for k in KS:
        result[f"overlap_{k}"] = round(len(lowest(reference, k) & lowest(estimate, k)) / k, 3)
    ratios = sorted(y / x for x, y in zip(a, b, strict=True))
    result["median_ratio"] = round(statistics.median(ratios), 4)
    result["largest_relative_error"] = f"{max(abs(r - 1) for r in ratios):.1e}"
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--naive", default="naive.jsonl", help="file of the naive loop's rows")
    parser.add_argument("--measured-only", action="store_true", help="take the rows that are there; measure no more")
    parser.add_argument("--output", default="scoring_effort.csv")
    parser.add_argument("--efforts", nargs="*", default=["fast", "balanced", "exact"])
    parser.add_argument("--interleaved", type=int, metavar="ROWS", help="only this")
    parser.add_argument("--spend", nargs="*", type=int, default=[])
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = demo.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    prompts = demo.PROMPTS["emoji"][: args.prompts]
    if args.interleaved:
        return interleaved(pipe, prompts, args)
    naive, rows = naive_rows(pipe, prompts, args)
    seconds = statistics.fmean(row["cpu_s"] for row in naive.values()) * rows
    print(
        f"{platform.machine()}, 1 thread; naive loop: {len(naive)} of {rows} rows measured, {seconds:.0f} CPU s for all"
    )
    EFFORTS.update({f"1/{n}": n for n in args.spend})
    with open(args.output, "a", newline="") as file:
        writer = None
        for effort in [*args.efforts, *(f"1/{n}" for n in args.spend)]:
            result = measure(pipe, prompts, effort, naive, args)
            result["times_cheaper"] = round(seconds / result["cpu_s"], 1)
            writer = writer or csv.DictWriter(file, list(result))
            if not file.tell():
                writer.writeheader()
            writer.writerow(result)
            file.flush()
            print(result, flush=True)


if __name__ == "__main__":
    main()
