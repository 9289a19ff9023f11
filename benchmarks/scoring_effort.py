"""Scoring with less effort against the paper's loop: CPU time, and how far the choice agrees.

    python benchmarks/scoring_effort.py --pipeline emoji --naive naive.jsonl --output table.csv

The naive loop is the one of the paper as one would write it: for each operator and stand-in, for each prompt and seed, one call
of the pipeline. Its rows go to a file, and an interrupted run goes on. Then the same settings are scored with each effort, and
once more for each k with k known in advance; `--sample` rows of the loop are timed just before and after each of them, so that
both are measured under the same load. What is compared are the scores of operators (their best stand-in) by Spearman's
correlation, and the operators that `top_k` chooses: how many of them agree, and how much more damage the choice by the estimates
does than the choice by the loop, by the loop's scores (their root sum of squares, as damages add up).

    --interleaved 12       only measures 12 rows, spread over the model, in turns by the loop and by effort="exact", and what
                           effort="exact" does once for all rows
    --reference exact      for loops that would take days: the scores to compare with are those of effort="exact", which differ from
                           the loop's by rounding (--interleaved shows by how much); the loop's time is that of the sample
    --other 3 100          only compares the loop with effort="exact" on the prompts from the fourth on and the seeds from 100 on:
                           how far two loops agree; with `--lowest 150` of the operators only
"""

import argparse
import csv
import json
import math
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from scipy.stats import spearmanr

import ld_pruner_hf
from ld_pruner_hf import Modification, applied, demo, find_operators, top_k
from ld_pruner_hf.latents import final_latents, make_conditions, preserved, steps_argument
from ld_pruner_hf.memory import freed_memory_kept
from ld_pruner_hf.profiling import processor_name
from ld_pruner_hf.reuse import FirstStep
from ld_pruner_hf.scoring import latent_distances, output_sets
from ld_pruner_hf.trajectory import evenly
from ld_pruner_hf.twins import find_twins

KS = (10, 20, 30, 42)


class Loop:
    """The paper's loop on a shipped pipeline.

    Attributes:
        todo: all modifications. rows: (path, stand-in) -> what was measured.
    """

    def __init__(self, pipe, prompts, args, include=None):
        self.pipe, self.seeds = pipe, range(args.seeds)
        self.conditions = make_conditions(pipe, prompts, steps_argument(pipe, args.steps))
        operators = find_operators(pipe, include=include, progress=False, latency=False, **self.conditions[0])
        self.todo = [Modification(o.path, o.kind, spec) for o in operators for spec in o.stand_ins]
        self.originals = self.latents()
        self.rows = {}

    def latents(self):
        with preserved(self.pipe):
            return [torch.cat([final_latents(self.pipe, c, [seed]) for seed in self.seeds]) for c in self.conditions]

    def measure(self, modification):
        start = time.process_time()
        with applied(self.pipe.unet, [modification]):
            pairs = distances(self.originals, self.latents())
        avg, std = zip(*pairs, strict=True)
        row = {"path": modification.path, "stand_in": modification.stand_in.name, "avg_dist": avg, "std_dist": std}
        return row | {"cpu_s": time.process_time() - start}

    def run(self, path):
        """Measure every row that the file does not have."""
        if path.exists():
            self.rows = {(row["path"], row["stand_in"]): row for row in map(json.loads, path.read_text().splitlines())}
        with path.open("a") as file:
            for m in self.todo:
                if (m.path, m.stand_in.name) not in self.rows:
                    self.rows[m.path, m.stand_in.name] = row = self.measure(m)
                    file.write(json.dumps(row) + "\n")
                    file.flush()

    def run_exact(self, path, prompts, args):
        """The same with effort="exact"."""
        how = {"num_inference_steps": args.steps, "seeds": args.seeds}
        found = ld_pruner_hf.score(self.pipe, prompts, resume_from=path, **how)
        self.rows = {row.key: {"avg_dist": row.avg_dist, "std_dist": row.std_dist} for row in found}

    def seconds(self, sample):
        """CPU seconds a row, now."""
        chosen = evenly(self.todo, sample)
        return sum(self.measure(m)["cpu_s"] for m in chosen) / len(chosen)

    def scores(self, like):
        """The loop's scores, as the `OperatorScores` that were made with less effort."""
        rows = []
        for row in like:
            found = self.rows[row.key]
            rows.append(replace(row, avg_dist=tuple(found["avg_dist"]), std_dist=tuple(found["std_dist"])))
        return replace(like, rows=tuple(rows))


def distances(originals, modified):
    return [latent_distances(a, b) for a, b in zip(originals, modified, strict=True)]


def compare(loop, found):
    """Agreement of scores with the loop's."""
    reference = loop.scores(found)
    best, estimated = ({row.path: row.score() for row in s.ranked()} for s in (reference, found))
    result = {"spearman": round(float(spearmanr(list(best.values()), [estimated[p] for p in best])[0]), 4)}
    by_loop = {row.key: row.score() for row in reference}
    for k in KS:
        a, b = ([row.key for row in top_k(s, k)] for s in (reference, found))
        result[f"overlap_{k}"] = round(len({path for path, _ in a} & {path for path, _ in b}) / k, 3)
        result[f"damage_{k}"] = round(math.hypot(*map(by_loop.get, b)) / math.hypot(*map(by_loop.get, a)), 3)
        sure = ld_pruner_hf.agreement(found, partial(top_k, k=k))
        result[f"agreement_{k}"] = "" if sure is None else round(sure, 3)
    return result


def measure(loop, prompts, effort, k, args):
    """Score with one effort, between two samples of the loop, and compare."""
    started = []
    naive = loop.seconds(args.sample)
    found = ld_pruner_hf.score(
        loop.pipe, prompts, seeds=args.seeds, num_inference_steps=args.steps, effort=effort, k=k,
        on_cost=lambda cost: started.append(time.process_time()),
    )  # fmt: skip
    seconds = time.process_time() - started[0]
    naive = (naive + loop.seconds(args.sample)) / 2
    result = {"effort": effort, "k": k or "", "cpu_s": round(seconds, 2)}
    result["times_cheaper"] = round(naive * len(loop.todo) / seconds, 1)
    return result | compare(loop, found)


class Exact:
    """Rows of the loop by effort="exact". Use it inside `preserved(pipe)`.

    Attributes:
        rows: how many it measures; the others do the same as one of them. once: CPU seconds of what it does once for all.
    """

    def __init__(self, loop):
        self.unet = loop.pipe.unet
        start = time.process_time()
        how = {"seeds": loop.seeds, "batch_size": 8, "pooled": False}
        self.sets = output_sets(loop.pipe, "unet", loop.conditions, **how)
        one = output_sets(loop.pipe, "unet", loop.conditions[:1], **how | {"seeds": [0]})
        todo = [(m, m.stand_in) for m in loop.todo]
        self.rows = len(todo) - len(find_twins(self.unet, todo, one.collect, partial(one.first_step, 0)))
        first = [partial(self.sets.first_step, i) for i in range(len(self.sets.jobs))]
        self.first_step = FirstStep(self.unet, first, [m.path for m in loop.todo])
        self.originals = self.sets.collect()
        self.once = time.process_time() - start

    def measure(self, m):
        """(score, CPU seconds)"""
        with freed_memory_kept():
            self.sets.first_step(0)  # takes the memory that the row before would have left
            start = time.process_time()
            with applied(self.unet, [m]), self.first_step.reused([m.path]):
                score = sum(map(sum, distances(self.originals, self.sets.collect())))
            return score, time.process_time() - start


def interleaved(loop, count):
    """Some rows of the loop, spread over the model, in turns by the loop and by effort="exact".

    Returns:
        CPU seconds of the whole loop and of all by effort="exact", and the largest relative difference of a score.
    """
    naive, exact, difference = 0.0, 0.0, 0.0
    with preserved(loop.pipe):
        cheaper = Exact(loop)
        for m in evenly(loop.todo, count):
            row, (score, took) = loop.measure(m), cheaper.measure(m)
            naive, exact = naive + row["cpu_s"], exact + took
            expected = sum(row["avg_dist"]) + sum(row["std_dist"])
            difference = max(difference, abs(score - expected) / expected)
            print(f"  {m.path} {m.stand_in.name}: {row['cpu_s']:.2f} and {took:.2f} CPU s", flush=True)
    print(
        f"{naive / exact:.2f} times cheaper a row; {len(loop.todo) - cheaper.rows} of {len(loop.todo)} rows do the same as another; "
        f"{cheaper.once:.1f} CPU s once for all"
    )
    return naive / count * len(loop.todo), cheaper.once + exact / count * cheaper.rows, difference


def another_loop(loop, args):
    """How far the loop on other prompts and seeds agrees, on all or the lowest operators."""
    first, seed = args.other
    prompts = demo.PROMPTS[args.pipeline][first : first + args.prompts] if args.pipeline in demo.PROMPTS else None
    how = {"num_inference_steps": args.steps, "seeds": args.seeds}
    if args.lowest:
        best = {}
        for (path, _), row in loop.rows.items():
            best[path] = min(sum(row["avg_dist"]) + sum(row["std_dist"]), best.get(path, float("inf")))
        how["include"] = sorted(best, key=best.get)[: args.lowest]
    path = Path(args.naive).with_suffix(f".from-{first}-{seed}.jsonl")
    found = ld_pruner_hf.score(loop.pipe, prompts, seed=seed, resume_from=path, **how)
    print(f"the loop on prompts from {first} and seeds from {seed}, {len(found)} rows: {compare(loop, found)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", choices=demo.names(), default="emoji")
    parser.add_argument("--naive", default="naive.jsonl", help="file of the naive loop's rows")
    parser.add_argument("--output", default="scoring_effort.csv")
    parser.add_argument("--efforts", nargs="*", default=["fast", "balanced", "exact"])
    parser.add_argument("--ks", nargs="*", type=int, default=KS, help="score with these k known in advance, too")
    parser.add_argument("--sample", type=int, default=4, help="rows of the loop that are timed before and after")
    parser.add_argument("--reference", choices=["naive", "exact"], default="naive")
    parser.add_argument("--interleaved", type=int, metavar="ROWS")
    parser.add_argument("--other", type=int, nargs=2, metavar=("PROMPT", "SEED"))
    parser.add_argument("--lowest", type=int)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pipe = demo.load(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    prompts = demo.PROMPTS[args.pipeline][: args.prompts] if args.pipeline in demo.PROMPTS else None
    loop = Loop(pipe, prompts, args)
    print(f"demo:{args.pipeline}, {processor_name()}, 1 thread, {len(loop.todo)} rows")
    if args.interleaved:
        naive, exact, difference = interleaved(loop, args.interleaved)
        print(
            f"{naive:.0f} and {exact:.0f} CPU s, {naive / exact:.2f} times cheaper; scores differ by at most {difference:.1e}"
        )
        return
    if args.reference == "exact":
        loop.run_exact(args.naive, prompts, args)
        print(f"the whole naive loop would take {loop.seconds(args.sample) * len(loop.todo):.0f} CPU s")
    else:
        loop.run(Path(args.naive))
        print(f"the whole naive loop took {sum(row['cpu_s'] for row in loop.rows.values()):.0f} CPU s")
    if args.other:
        return another_loop(loop, args)
    with open(args.output, "a", newline="") as file:
        writer = None
        for effort in args.efforts:
            for k in (None, *(args.ks if effort != "exact" else ())):
                result = measure(loop, prompts, effort, k, args)
                writer = writer or csv.DictWriter(file, list(result))
                if not file.tell():
                    writer.writeheader()
                writer.writerow(result)
                file.flush()
                print(result, flush=True)


if __name__ == "__main__":
    main()
