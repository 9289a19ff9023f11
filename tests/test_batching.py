"""What is found by trial: the batch size, and how weights lie in memory."""

from __future__ import annotations

import pytest
import tiny
import torch

from ld_pruner_hf import batching
from ld_pruner_hf.batching import quickest_batch_size, quickest_way
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


def is_channels_last(model) -> bool:
    weights = [p for p in model.parameters() if p.ndim == 4 and max(p.shape[2:]) > 1]
    return all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


@pytest.mark.parametrize("seconds", [0.5, 1.0])
def test_weights_are_channels_last_where_that_is_quicker(pipe, monkeypatch, capsys, seconds):
    monkeypatch.setattr(batching, "_seconds", lambda *_: seconds if is_channels_last(pipe.unet) else 1.0)
    conditions = make_conditions(pipe, "pizza", {"num_inference_steps": 2})
    with quickest_way(pipe, "unet", conditions, range(4), None, quiet=False) as size:
        assert (size, is_channels_last(pipe.unet)) == (4, seconds < 1)
    assert not is_channels_last(pipe.unet) and all(p.is_contiguous() for p in pipe.unet.parameters())
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("weights channels last: 1000.0 ms" if seconds < 1 else "weights contiguous: 1000.0 ms")


def test_what_the_user_has_chosen_is_not_tried(pipe, monkeypatch):
    monkeypatch.setattr(batching, "_seconds", lambda *_: pytest.fail("tried"))
    with quickest_way(pipe, "unet", [], range(4), 3, quiet=False) as size:
        assert size == 3
    monkeypatch.setattr(batching, "quickest_batch_size", lambda *_: 2)
    pipe.unet.to(memory_format=torch.channels_last)
    with quickest_way(pipe, "unet", [], range(4), None, quiet=False) as size:
        assert size == 2
    assert is_channels_last(pipe.unet)


@pytest.mark.parametrize("quicker", [False, True])
def test_scores_are_those_of_any_way(pipe, monkeypatch, quicker):
    monkeypatch.setattr(batching, "quickest_batch_size", lambda *_: 2)
    monkeypatch.setattr(batching, "_seconds", lambda *_: 0.5 if quicker and is_channels_last(pipe.unet) else 1.0)
    how = {"num_inference_steps": 2, "include": "mid_block", "kinds": "Attention"}
    found, given = (pipe.score(tiny.PROMPTS[:2], batch_size=n, **how) for n in (None, 8))
    assert found.settings["batch_size"] is None
    assert [r.score() for r in found] == pytest.approx([r.score() for r in given], rel=1e-4)
