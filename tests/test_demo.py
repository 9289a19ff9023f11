"""The pipelines that ship with the package: small, complete, documented, and they draw."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from diffusers import AudioDiffusionPipeline, DiffusionPipeline, LDMPipeline, StableDiffusionPipeline
from safetensors import safe_open

import ld_pruner_hf
from ld_pruner_hf import cli, demo, plan_of
from ld_pruner_hf.latents import steps_argument


def draw(pipe, prompts, **call) -> np.ndarray:
    generator = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return pipe(prompts, num_inference_steps=3, generator=generator, output_type="np", **call).images


LIMITS = {"emoji": 20e6, "clothing": 15e6, "digits": 15e6}  # bytes on disk
every_pipeline = pytest.mark.parametrize("name", demo.names())
unconditional = pytest.mark.parametrize("name", [name for name in demo.names() if name != "emoji"])
with_digits = pytest.mark.skipif("digits" not in demo.names(), reason="the digits pipeline is not installed")


def load(name):
    if name == "digits":
        pytest.importorskip("librosa")
    return tiny.quiet(demo.load(name))


def samples(pipe, seeds=(0, 1, 2), steps=3) -> np.ndarray:
    """What an unconditional pipeline makes from these seeds: pictures (N, H, W, ...) in [0, 1], spectrograms for sound.

    Not the sound itself: librosa's Griffin-Lim starts from random phases, so it differs from call to call.
    """
    call = steps_argument(pipe, steps)
    pictures = pipe(batch_size=len(seeds), generator=[torch.Generator().manual_seed(s) for s in seeds], **call).images
    return np.stack([np.asarray(p) for p in pictures]) / 255


def test_names_and_paths():
    assert set(demo.names()) <= set(LIMITS) and demo.names()[0] == "emoji"
    assert (demo.path("emoji") / "model_index.json").is_file()
    with pytest.raises(ValueError, match=r"demo pipeline: got 'dogs', expected one of \['emoji'"):
        demo.load("dogs")


@every_pipeline
def test_size_on_disk(name):
    files = [f for f in demo.path(name).rglob("*") if f.is_file() and f.name != "scores.jsonl"]
    assert 1e6 < sum(f.stat().st_size for f in files) <= LIMITS[name]


@every_pipeline
def test_weights_are_safetensors_alone_in_half_precision(name):
    suffixes = {f.suffix for f in demo.path(name).rglob("*") if f.is_file()}
    assert ".safetensors" in suffixes and not suffixes & {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".py"}
    for file in demo.path(name).rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(k).get_dtype() for k in weights.keys()} <= {"F16", "I64"}  # noqa: SIM118


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("emoji", ["noto", "license: apache-2.0"]),
        ("clothing", ["clothing-dataset-small", "cc0", "license: apache-2.0"]),
        ("digits", ["free spoken digit dataset", "jackson", "share-alike", "license: cc-by-sa-4.0"]),
    ],
)
def test_the_model_card_says_what_matters(name, words):
    if name not in demo.names():
        pytest.skip(f"the {name} pipeline is not installed")
    card = (demo.path(name) / "README.md").read_text().lower()
    assert card.startswith("---\n")
    for word in (*words, "## data", "## training", "## limits", f"pretrain_{name}.yaml", "samples.png"):
        assert word in card, word
    assert list(demo.path(name).glob("LICENSE*")) and (demo.path(name) / "samples.png").is_file()


@with_digits
def test_digits_without_librosa(monkeypatch):
    monkeypatch.setattr(demo, "is_librosa_available", lambda: False)
    with pytest.raises(ImportError, match=r"librosa.*pip install 'ld_pruner_hf\[audio\]'"):
        demo.load("digits")
    assert demo.load("clothing").unet is not None


@unconditional
def test_unconditional_pipelines_are_plain(name):
    pipe = load(name)
    assert type(pipe) is {"clothing": LDMPipeline, "digits": AudioDiffusionPipeline}[name]
    assert plan_of(pipe.unet) is None and {p.dtype for p in pipe.unet.parameters()} == {torch.float32}
    made = samples(pipe)
    assert made.shape == {"clothing": (3, 64, 64, 3), "digits": (3, 64, 64)}[name]
    assert all(m.std() > 0.02 for m in made), "a picture is blank"
    assert all(np.abs(a - b).mean() > 0.02 for i, a in enumerate(made) for b in made[:i])


@with_digits
def test_digits_sound_for_a_moment_and_end_in_silence():
    """A spoken digit takes about half of its second, and speech changes from frame to frame."""
    pipe = load("digits")
    output = pipe(batch_size=4, steps=10, generator=[torch.Generator().manual_seed(s) for s in range(4)])
    assert output.audios.shape == (4, 1, 8064) and np.isfinite(output.audios).all()
    loudness = np.sqrt((output.audios**2).reshape(4, 4, -1).mean(-1))  # (samples, quarters of the second)
    assert (loudness[:, :2].max(1) > 10 * loudness[:, 3]).all()
    frames = np.stack([np.asarray(p, dtype=float) for p in output.images])  # (samples, bands, time)
    assert (np.abs(np.diff(frames[..., :16], axis=-1)).mean(axis=(1, 2)) > 2).all()


@unconditional
def test_unconditional_pipelines_have_many_candidates(name):
    operators = ld_pruner_hf.find_operators(load(name), latency=False, progress=False)
    kinds = {o.kind for o in operators if o.is_candidate}
    assert sum(o.is_candidate for o in operators) >= 90
    assert kinds >= {"ResnetBlock2D", "Attention", "Downsample2D", "Upsample2D"}


@unconditional
def test_unconditional_pipelines_can_be_scored_pruned_saved_and_loaded(name, tmp_path, monkeypatch):
    pipe = load(name)
    original, before = samples(pipe), tiny.snapshot(pipe)
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.vqvae), "decode", lambda *_, **__: pytest.fail("decoded while scoring"))
        scores = pipe.score(num_inference_steps=2, seeds=2, include="mid_block", kinds=["ResnetBlock2D", "Attention"])
    assert len(scores) >= 3 and not any(r.error for r in scores)
    assert tiny.differences(before, tiny.snapshot(pipe)) == [] and np.array_equal(samples(pipe), original)
    pipe.prune(2)
    pipe.save_pretrained(tmp_path)
    pruned = samples(pipe)
    assert pruned.std() > 0.02 and not np.array_equal(pruned, original)
    loaded = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded) is type(pipe) and np.array_equal(samples(loaded), pruned)


@unconditional
def test_unconditional_pipelines_from_the_command_line(name, tmp_path, capsys):
    load(name)
    scored, pruned = str(tmp_path / "scored"), str(tmp_path / "pruned")
    few = ["--num-inference-steps", "1", "--seeds", "2", "--include", "mid_block.resnets.0.*"]
    assert cli.main(["score", f"demo:{name}", "-o", scored, *few]) == 0
    prune = ["prune", f"demo:{name}", "2", "-o", pruned, "--scores", f"{scored}/scores.jsonl", "--repeats", "2"]
    assert cli.main(prune) == 0
    assert len(plan_of(DiffusionPipeline.from_pretrained(pruned).unet)) == 2
    assert cli.main(["score", f"demo:{name}", "-o", scored, "--prompt", "a shirt"]) == 2
    assert "takes no argument ['prompt']" in capsys.readouterr().err


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
