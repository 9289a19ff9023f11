"""Scoring by one process and by several: how much faster, the same table, and what is left when one is killed.

    python benchmarks/scoring_processes.py --processes 2

Each run is started by torchrun; every process computes with one thread, so it needs a core (or, with CUDA, a device) of its own.
The clock runs from the moment when all processes have loaded the pipeline. Then one of them is killed while it scores, and one
process goes on from what is there.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from ld_pruner_hf import OperatorScores, demo, score
from ld_pruner_hf.profiling import processor_name
from ld_pruner_hf.scoring import process


def work(args):
    """One of the processes."""
    torch.set_num_threads(1)
    rank, processes = process()
    pipe = demo.load(args.pipeline)
    if torch.cuda.is_available():
        pipe.to(f"cuda:{rank % torch.cuda.device_count()}")
    pipe.set_progress_bar_config(disable=True)
    prompts = demo.PROMPTS[args.pipeline][:3] if args.pipeline in demo.PROMPTS else None
    folder = Path(args.worker)
    (folder / f"ready{rank}").write_text(str(os.getpid()))
    while len(list(folder.glob("ready*"))) < processes:
        time.sleep(0.01)
    times = [time.time()]
    score(
        pipe, prompts, num_inference_steps=args.steps, include=args.include, resume_from=folder / "scores.jsonl",
        on_cost=lambda cost: times.append(time.time()),
    )  # fmt: skip
    (folder / f"times{rank}").write_text(json.dumps([*times, time.time()]))


def launch(folder, processes, args):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [__file__, "--worker", str(folder), "--pipeline", args.pipeline, "--steps", str(args.steps)]
    return subprocess.Popen([*command, "--include", *args.include], stderr=subprocess.DEVNULL)


def finish(folder, processes, args):
    """(table, seconds in all, seconds without finding the operators) of a run to its end."""
    if launch(folder, processes, args).wait():
        raise SystemExit(f"{processes} processes failed")
    times = [json.loads(path.read_text()) for path in folder.glob("times*")]
    table = {row.key: (row.avg_dist, row.std_dist) for row in OperatorScores.load(folder / "scores.jsonl")}
    ends = max(t[2] for t in times)
    return table, ends - min(t[0] for t in times), ends - min(t[1] for t in times)


def kill_one(folder, args):
    """Kill the last process when it has scored two rows; torchrun then ends the others. Returns how many rows are kept."""
    part = folder / f"scores.jsonl.part{args.processes - 1}"
    running = launch(folder, args.processes, args)
    while running.poll() is None and (not part.exists() or part.read_bytes().count(b"\n") < 3):
        time.sleep(0.05)
    os.kill(int((folder / f"ready{args.processes - 1}").read_text()), 9)
    running.wait()
    for path in folder.glob("ready*"):
        path.unlink()
    return sum(path.read_bytes().count(b"\n") - 1 for path in folder.glob("scores.jsonl.part*"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--pipeline", choices=demo.names(), default="emoji")
    parser.add_argument("--include", nargs="+", default=["mid_block*"], help="operators to score")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{processor_name()}, 1 thread a process"
    print(f"demo:{args.pipeline}, {device}")
    found = {}
    for processes in (1, args.processes):
        with tempfile.TemporaryDirectory() as folder:
            found[processes] = table, whole, rows = finish(Path(folder), processes, args)
        print(f"{processes} processes: {len(table)} rows in {rows:.1f} s, {whole:.1f} s with finding them", flush=True)
    one, many = found[1], found[args.processes]
    print(
        f"{one[2] / many[2]:.2f} times the rate ({one[1] / many[1]:.2f} with finding); same table: {one[0] == many[0]}"
    )
    with tempfile.TemporaryDirectory() as folder:
        kept = kill_one(Path(folder), args)
        table = finish(Path(folder), 1, args)[0]
    print(f"one killed: {kept} rows kept; one process finished the rest; same table: {table == one[0]}")


if __name__ == "__main__":
    main()
