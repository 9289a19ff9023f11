"""The pipelines that ship with the package: small, complete, documented, and they draw."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

import ld_pruner_hf
from ld_pruner_hf import demo, plan_of


def draw(pipe, prompts, **call) -> np.ndarray:
    generator = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(prompts, num_inference_steps=3, generator=generator, output_type="np", **call).images


def test_names_and_paths():
    assert demo.names() == ["emoji"]
    assert (demo.path("emoji") / "model_index.json").is_file()
    with pytest.raises(ValueError, match=r"demo pipeline: got 'dogs', expected one of \['emoji'\]"):
        demo.load("dogs")


def test_the_pipeline_is_at_most_20_megabytes():
    files = [f for f in demo.path("emoji").rglob("*") if f.is_file() and f.name != "scores.jsonl"]
    assert 1e6 < sum(f.stat().st_size for f in files) <= 20e6


def test_weights_are_safetensors_alone():
    suffixes = {f.suffix for f in demo.path("emoji").rglob("*") if f.is_file()}
    assert ".safetensors" in suffixes and not suffixes & {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py"}


def test_the_model_card_says_what_matters():
    card = (demo.path("emoji") / "README.md").read_text().lower()
    assert card.startswith("---\n")
    for word in ("license", "data", "train", "noto"):
        assert word in card, word


def test_it_is_a_plain_stable_diffusion_pipeline(demo_pipe):
    assert type(demo_pipe) is StableDiffusionPipeline and plan_of(demo_pipe.unet) is None
    assert {p.dtype for p in demo_pipe.unet.parameters()} == {torch.float32}
    for name in ("dtype", "torch_dtype"):
        assert demo.load("emoji", **{name: torch.float16}).unet.dtype == torch.float16


def test_it_draws_different_finite_pictures(demo_pipe):
    pictures = draw(demo_pipe, demo.PROMPTS["emoji"][:3])
    assert pictures.shape == (3, 64, 64, 3) and np.isfinite(pictures).all()
    assert all(p.std() > 0.02 for p in pictures), "a picture is blank"
    assert all(np.abs(a - b).mean() > 0.02 for i, a in enumerate(pictures) for b in pictures[:i])


def test_it_has_at_least_150_candidates(demo_pipe):
    operators = ld_pruner_hf.find_operators(demo_pipe, latency=False, progress=False)
    assert sum(o.is_candidate for o in operators) >= 150
    kinds = {o.kind for o in operators if o.is_candidate}
    assert kinds >= {"ResnetBlock2D", "Transformer2DModel", "Attention", "FeedForward", "Downsample2D", "Upsample2D"}


def test_it_can_be_scored_pruned_saved_and_loaded(tmp_path):
    pipe = tiny.quiet(demo.load())
    original = draw(pipe, ["red heart"])
    before = tiny.snapshot(pipe)
    scores = pipe.score("red heart", num_inference_steps=2, include="mid_block", kinds=["ResnetBlock2D", "Attention"])
    assert len(scores) >= 4 and not any(r.error for r in scores)
    assert tiny.differences(before, tiny.snapshot(pipe)) == [] and np.array_equal(draw(pipe, ["red heart"]), original)
    pipe.prune(2)
    pipe.save_pretrained(tmp_path)
    pruned = draw(pipe, ["red heart"])
    assert not np.array_equal(pruned, original)
    loaded = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert np.array_equal(draw(loaded, ["red heart"]), pruned)
