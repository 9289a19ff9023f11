"""Several processes fill one table: the same as one makes, whatever happens to one of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_scores import row, scores

from ld_pruner_hf import OperatorScores, PlanError
from ld_pruner_hf.scores import RowFile

ALL = [row(name) for name in "abcdefg"]
KEYS = [r.key for r in ALL]
BY_KEY = {r.key: r for r in ALL}

WORKER = """
import os, sys, time, torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
import ld_pruner_hf
from ld_pruner_hf import scores
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
scores.RowFile.PATIENCE = 1.0, 4.0
if os.environ["RANK"] == os.environ.get("STANDS_STILL"):
    append = scores.RowFile.append
    def slow(self, row):
        append(self, row)
        time.sleep(600)
    scores.RowFile.append = slow
table = pipe.score("pizza", resume_from=sys.argv[2], num_inference_steps=2, include="mid_block", kinds=["Attention", "LayerNorm"])
print(len(table), "rows")
"""


def file_of(path: Path, rank: int, processes: int = 2) -> RowFile:
    return RowFile(path, scores().header(), rank, processes)


def test_each_process_takes_its_share_and_all_see_the_whole(tmp_path):
    path = tmp_path / "scores.jsonl"
    files = [file_of(path, rank) for rank in range(2)]
    shares = [[key for key, _ in zip(f.pending(KEYS), range(4 - rank), strict=False)] for rank, f in enumerate(files)]
    assert shares == [KEYS[0::2], KEYS[1::2]]
    for f, share in zip(files, shares, strict=True):
        for key in share:
            f.append(BY_KEY[key])
    assert list(files[0].pending(KEYS))[4:] == [] and files[0].found.keys() == set(KEYS)
    files[0].end(KEYS)
    files[1].end(KEYS)
    assert OperatorScores.load(path).rows == tuple(ALL), "in the order of the model, not of the processes"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_lost_process_leaves_is_taken_over(tmp_path, monkeypatch):
    path = tmp_path / "scores.jsonl"
    monkeypatch.setattr(RowFile, "PATIENCE", (0.0, 0.3))
    lost, alive = file_of(path, 1), file_of(path, 0)
    lost.append(ALL[1])
    measured = []
    for key in alive.pending(KEYS):
        measured.append(key)
        alive.append(BY_KEY[key])
    assert sorted(measured) == sorted(set(KEYS) - {ALL[1].key})
    alive.end(KEYS)
    assert OperatorScores.load(path).rows == tuple(ALL)
    lost.append(ALL[3])  # it was only slow: the table stays whole
    assert OperatorScores.load(path).rows == tuple(ALL) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("processes", [1, 3])
def test_any_number_of_processes_goes_on_from_parts(tmp_path, processes):
    path = tmp_path / "scores.jsonl"
    for rank in range(2):
        file_of(path, rank).append(ALL[rank])
    part = tmp_path / "scores.jsonl.part1"
    part.write_bytes(part.read_bytes() + b'{"path": "cut o')
    again = file_of(path, 0, processes)
    assert again.found.keys() == {ALL[0].key, ALL[1].key}
    missing = [key for key in KEYS if key not in again.found]
    for key in missing[::processes] if processes == 1 else missing:
        again.append(BY_KEY[key])
    again.end(KEYS)
    assert OperatorScores.load(path).rows == tuple(ALL) and list(tmp_path.iterdir()) == [path]


def test_parts_of_another_run_are_refused(tmp_path):
    path = tmp_path / "scores.jsonl"
    file_of(path, 0).append(ALL[0])
    with pytest.raises(PlanError, match=r"scores.jsonl.part0: made by another run"):
        RowFile(path, scores(weights="other").header(), 1, 2)


@pytest.mark.parametrize("lost", [False, True])
def test_two_real_processes_make_the_table_of_one(pipe, tmp_path, lost):
    pipe.save_pretrained(tmp_path / "pipe")
    path = tmp_path / "scores.jsonl"
    whole = pipe.score("pizza", num_inference_steps=2, include="mid_block", kinds=["Attention", "LayerNorm"])
    environment = os.environ | {"WORLD_SIZE": "2", **({"STANDS_STILL": "1"} if lost else {})}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "pipe"), str(path)],
            env=environment | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        if lost:
            part = tmp_path / "scores.jsonl.part1"
            deadline = time.monotonic() + 240
            while not part.exists() or part.read_bytes().count(b"\n") < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(processes[1].pid, signal.SIGKILL)
        out = [p.communicate(timeout=300)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert out[0] == f"{len(whole)} rows\n" and (lost or out[1] == out[0])
    table = OperatorScores.load(path)
    assert [(r.key, r.avg_dist, r.std_dist) for r in table] == [(r.key, r.avg_dist, r.std_dist) for r in whole]
    assert not list(tmp_path.glob("*.part*"))
