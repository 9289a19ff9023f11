"""training/dreambooth.py on pruned pipelines: full and LoRA, with and without prior preservation."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import dreambooth

import ld_pruner_hf

FAST = ["--train_batch_size", 2, "--max_train_steps", 2, "--learning_rate", 1e-3, "--validation_inference_steps", 2]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pruned tiny pipelines `sd` and `ddpm`, and three pictures of a subject."""
    root = tmp_path_factory.mktemp("dreambooth")
    for name, pipe in (("sd", tiny.stable_diffusion()), ("ddpm", tiny.ddpm())):
        pipe.prune(1, num_inference_steps=1, seeds=1, kinds=["Attention"])
        pipe.save_pretrained(root / name)
    (root / "subject").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16), (200, 20 * i, 0)).save(root / "subject" / f"{i}.png")
    return root


@pytest.fixture
def run(folder, tmp_path):
    """Runs dreambooth.py in this process: `run(*flags)` -> the output folder."""

    def go(*flags, pipeline="sd", prompt=("--instance_prompt", "red sks heart")):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        common = [
            "--pretrained_model_name_or_path",
            folder / pipeline,
            "--instance_data_dir",
            folder / "subject",
            *prompt,
        ]
        dreambooth.main([str(x) for x in (*common, *FAST, "--output_dir", tmp_path / "out", *flags)])
        return tmp_path / "out"

    yield go
    AcceleratorState._reset_state(reset_partial_state=True)


def losses(out):
    with open(out / "log.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_a_pruned_pipeline_learns_its_subject(folder, run):
    out = run("--max_train_steps", 60, "--train_batch_size", 3)
    rows = losses(out)
    assert sum(r["task"] for r in rows[-10:]) < 0.9 * sum(r["task"] for r in rows[:10])
    before, after = load_file(folder / "sd" / UNET), load_file(out / UNET)
    assert before.keys() == after.keys() and any(not torch.equal(before[k], after[k]) for k in before)
    pipe = tiny.quiet(DiffusionPipeline.from_pretrained(out))
    assert len(ld_pruner_hf.plan_of(pipe.unet)) == 1
    assert tiny.picture(pipe, prompt="red sks heart").shape == (16, 16, 3)


def test_pictures_of_the_class_are_drawn_and_preserved(folder, run, tmp_path):
    classes = tmp_path / "hearts"
    flags = [
        "--with_prior_preservation",
        "--class_data_dir",
        classes,
        "--num_class_images",
        3,
        "--sample_batch_size",
        2,
    ]
    flags += ["--prior_loss_weight", 0.5]
    with pytest.raises(ValueError, match="--class_prompt is missing"):
        run(*flags)
    rows = losses(run(*flags, "--class_prompt", "red heart"))
    assert len(list(classes.glob("*.png"))) == 3
    assert all(r["loss"] == pytest.approx(r["task"] + 0.5 * r["prior"]) and r["prior"] > 0 for r in rows)
    drawn = {f: f.stat().st_mtime_ns for f in classes.iterdir()}
    run(*flags, "--class_prompt", "red heart")
    assert {f: f.stat().st_mtime_ns for f in classes.iterdir()} == drawn  # kept


def test_only_a_lora_is_saved_and_the_pruned_pipeline_loads_it(folder, run):
    out = run("--train_lora_rank", 2, "--learning_rate", 1e-1)
    assert not (out / "model_index.json").exists()
    pipe = tiny.quiet(DiffusionPipeline.from_pretrained(folder / "sd"))
    before = tiny.picture(pipe, prompt="pizza", generator=torch.Generator().manual_seed(0))
    pipe.load_lora_weights(out)
    after = tiny.picture(pipe, prompt="pizza", generator=torch.Generator().manual_seed(0))
    assert (before != after).any()


def test_a_pipeline_without_prompts(run):
    out = run("--validation_steps", 2, "--num_validation_images", 1, pipeline="ddpm", prompt=())
    assert len(losses(out)) == 2 and Image.open(out / "validation" / "step_000002.png").size == (2 * 8, 8)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--instance_data_dir", "nowhere"], "--instance_data_dir: nowhere is no folder"),
        (["--with_prior_preservation"], "needs --class_data_dir"),
        (["--num_class_images", "0"], "--num_class_images: got 0"),
        (["--mixed_precision", "fp16"], "fp16 on the CPU"),
        (["--learning_rate", "0"], "--learning_rate: got 0"),
    ],
)
def test_wrong_flags_are_named_before_anything_is_loaded(run, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(dreambooth, "load_pipeline", lambda *_: pytest.fail("a pipeline was loaded"))
    with pytest.raises(SystemExit):
        run(*flags)
    assert message in capsys.readouterr().err
