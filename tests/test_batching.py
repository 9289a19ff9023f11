"""The batch size found by trial."""

from __future__ import annotations

import pytest
import tiny
import torch

from ld_pruner_hf import batching
from ld_pruner_hf.batching import quickest_batch_size
from ld_pruner_hf.latents import make_conditions


def trial(monkeypatch, pipe, seconds, conditions=None, seeds=range(64)):
    """The batch size for a device that takes so many seconds for a batch; and those that were tried."""
    clock, tried = [0.0], []

    def denoise(pipe, call, job_seeds, stop_after):
        assert stop_after == 1
        tried.append(len(job_seeds))
        clock[0] += seconds(len(job_seeds))

    monkeypatch.setattr(batching, "final_latents", denoise)
    monkeypatch.setattr(batching.time, "perf_counter", lambda: clock[0])
    conditions = make_conditions(pipe, conditions, {"num_inference_steps": 2})
    return quickest_batch_size(pipe, conditions, seeds), sorted(set(tried))


def test_the_batch_grows_while_a_latent_gets_cheaper(pipe, monkeypatch, capsys):
    assert trial(monkeypatch, pipe, lambda n: 6 + n, "pizza") == (64, [1, 2, 4, 8, 16, 32, 64])
    assert trial(monkeypatch, pipe, lambda n: 6 + max(n, n * n / 16), "pizza") == (16, [1, 2, 4, 8, 16, 32])
    assert capsys.readouterr().err.splitlines()[1] == "batch size 16: 1375.0 ms a latent and step"


def test_it_ends_where_latents_or_memory_do(pipe, monkeypatch):
    assert trial(monkeypatch, pipe, lambda n: 6.0, "pizza", range(5)) == (4, [1, 2, 4])
    images = [{"prompt": "pizza", "guidance_scale": g} for g in (1.0, 2.0)]
    assert trial(monkeypatch, pipe, lambda n: 6.0, images) == (1, [1]), "one call each"

    def scarce(n):
        if n > 2:
            raise torch.OutOfMemoryError("no more")
        return 6.0

    assert trial(monkeypatch, pipe, scarce, "pizza") == (2, [1, 2, 4])
    assert trial(monkeypatch, pipe, lambda n: scarce(n + 2), "pizza") == (1, [1])

    def alone(n):
        if n > 1:
            raise ValueError("`prompt` has to be of type `str`")
        return 6.0

    assert trial(monkeypatch, pipe, alone, "pizza") == (1, [1, 2])
    with pytest.raises(ValueError, match="of type `str`"):
        trial(monkeypatch, pipe, lambda n: alone(n + 1), "pizza")


def test_scores_are_those_of_any_batch_size(pipe, monkeypatch):
    monkeypatch.setattr("ld_pruner_hf.scoring.quickest_batch_size", lambda *_: 2)
    how = {"num_inference_steps": 2, "include": "mid_block", "kinds": "Attention"}
    found, given = (pipe.score(tiny.PROMPTS[:2], batch_size=n, **how) for n in (None, 8))
    assert found.settings["batch_size"] is None
    assert [r.score() for r in found] == pytest.approx([r.score() for r in given], rel=1e-4)
