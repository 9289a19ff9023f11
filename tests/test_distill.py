"""training/distill.py as users run it: launched, on several processes, killed and resumed, from every recipe, and called wrongly."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import deprecated_families  # noqa: F401
import families
import numpy as np
import pytest
import tiny
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import load_file

pytest.importorskip("datasets")
TRAINING = Path(__file__).parents[1] / "training"
RECIPES = sorted((TRAINING / "recipes").glob("distill_*.yaml"))
sys.path.insert(0, str(TRAINING))

import distill  # noqa: E402
import models  # noqa: E402
import options  # noqa: E402

import ld_pruner_hf  # noqa: E402

SHIPPED = (".py", ".yaml", ".json", ".txt")

FAST = [
    *("--data_free", 8, "--data_free_steps", 2, "--train_batch_size", 2, "--max_train_steps", 2),
    *("--learning_rate", 1e-3, "--validation_inference_steps", 2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny pipelines as folders: `sd` and `sd-pruned` with `plan.json` and `scores.json`; `ddpm`, `ldm`; `pictures`."""
    root = tmp_path_factory.mktemp("distill")
    pipe = tiny.stable_diffusion()
    pipe.save_pretrained(root / "sd")
    scores = pipe.score("red heart", num_inference_steps=1, guidance_scale=1.0)
    scores.save(root / "scores.json")
    pipe.prune(12, scores=scores).save(root / "plan.json")
    pipe.save_pretrained(root / "sd-pruned")
    for name in ("ddpm", "ldm"):
        other = getattr(tiny, name)()
        other.save_pretrained(root / name)
        other.prune(1, num_inference_steps=1, seeds=1, kinds=["Attention"]).save(root / f"{name}.json")
    (root / "pictures").mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 255 - 60 * i)).save(root / "pictures" / f"{i}.png")
    captions = [f'{{"file_name": "{i}.png", "text": "number {i}"}}' for i in range(4)]
    (root / "pictures" / "metadata.jsonl").write_text("\n".join(captions))
    return root


@pytest.fixture
def run(folder, tmp_path):
    """Runs distill.py in this process: `run(*flags)` -> the output folder."""
    made = []

    def go(*flags, out=None, student=("--student", "sd-pruned"), teacher="sd", data=FAST):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        out = out or tmp_path / f"out{len(made)}"
        made.append(out)
        student = [folder / s if (folder / s).exists() else s for s in student]
        distill.main([str(x) for x in ("--teacher", folder / teacher, *student, *data, "--output_dir", out, *flags)])
        return out

    yield go
    AcceleratorState._reset_state(reset_partial_state=True)


def losses(out):
    with open(out / "log.csv", newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def launch(command, *flags, wait=True, **env):
    command = [str(x) for x in (sys.executable, "-m", *command, TRAINING / "distill.py", *flags)]
    root = str(TRAINING.parent)
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": root, **env}, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if not wait:
        return process
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


# ---- launched ------------------------------------------------------------------------------------------------------


def test_accelerate_launch_makes_a_complete_pipeline(folder, tmp_path):
    out = tmp_path / "out"
    output = launch(
        ["accelerate.commands.launch", "--cpu", "--num_processes", "1"],
        *("--teacher", folder / "sd", "--prune", 5, "--scores", folder / "scores.json", *FAST, "--output_dir", out),
    )
    assert "features compared at 4 stages" in output and "down_blocks.0 (32, 4, 4)" in output
    rows = losses(out)
    assert [r["step"] for r in rows] == [1, 2]
    assert all(r["loss"] == pytest.approx(r["task"] + r["output"] + r["feature"], rel=1e-5) for r in rows)
    assert all(r["output"] > 0 and r["feature"] > 0 for r in rows)
    pipe = DiffusionPipeline.from_pretrained(out)
    assert len(ld_pruner_hf.plan_of(pipe.unet)) == 5
    assert tiny.picture(tiny.quiet(pipe), prompt="pizza").shape == (16, 16, 3)


def test_two_processes_have_the_loss_of_one_with_twice_the_batch(folder, run, tmp_path):
    flags = ["--feature_loss", "normalised", "--max_train_steps", 4]
    single = losses(run("--train_batch_size", 4, *flags))
    launch(
        ["accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", port()],
        *(
            "--teacher",
            folder / "sd",
            "--student",
            folder / "sd-pruned",
            *FAST,
            *flags,
            "--output_dir",
            tmp_path / "two",
        ),
        ACCELERATE_USE_CPU="true",
    )
    double = losses(tmp_path / "two")
    accumulated = losses(run("--train_batch_size", 1, "--gradient_accumulation_steps", 4, *flags))
    assert len(single) == len(double) == 4 and single[0]["feature"] > 0
    for name in ("loss", "task", "output", "feature"):
        expected = pytest.approx([r[name] for r in single], rel=1e-4)
        assert [r[name] for r in double] == expected, name
        assert [r[name] for r in accumulated] == expected, name


FSDP_ON_THE_CPU = """
import runpy, sys
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

init = AcceleratorState.__init__

def on_the_cpu(self, *args, fsdp_plugin=None, **kwargs):
    init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:  # accelerate takes it on accelerators only; torch can do it with gloo
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

AcceleratorState.__init__ = on_the_cpu
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_student_that_fsdp_splits_learns_the_same(folder, run, tmp_path):
    """Losses, features and averaged weights of two processes with half a model each; their checkpoint resumes on one process."""
    script, out = tmp_path / "fsdp_on_the_cpu.py", tmp_path / "two"
    script.write_text(FSDP_ON_THE_CPU)
    flags = ["--max_train_steps", 3, "--checkpointing_steps", 2, "--use_ema"]
    single = run("--train_batch_size", 4, *flags)
    config = ["--config_file", TRAINING / "recipes" / "accelerate" / "fsdp.yaml", "--mixed_precision", "no"]
    launch(
        ["accelerate.commands.launch", *config, "--num_processes", 2, "--main_process_port", port(), script],
        *("--teacher", folder / "sd", "--student", folder / "sd-pruned", *FAST, *flags, "--output_dir", out),
        ACCELERATE_USE_CPU="true",
    )
    assert_same_run(single, out)
    run("--train_batch_size", 4, *flags, "--resume_from_checkpoint", "checkpoint-2", out=out)
    assert_same_run(single, out)


DEEPSPEED_ON_THE_CPU = """
import runpy, sys
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

# accelerate takes DeepSpeed on accelerators only; DeepSpeed itself runs on CPUs, too, with gloo
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_student_under_deepspeed_learns_the_same(folder, run, tmp_path):
    """Losses and weights of two processes that split the optimizer's state; their checkpoint resumes on two, and on nothing else."""
    pytest.importorskip("deepspeed")
    script, out = tmp_path / "deepspeed_on_the_cpu.py", tmp_path / "two"
    script.write_text(DEEPSPEED_ON_THE_CPU)
    flags = ["--max_train_steps", 3, "--checkpointing_steps", 2]
    single = run("--train_batch_size", 4, *flags)
    config = ["--config_file", TRAINING / "recipes" / "accelerate" / "deepspeed.yaml", "--mixed_precision", "no"]

    def twice(*more):
        launch(
            ["accelerate.commands.launch", *config, "--num_processes", 2, "--main_process_port", port(), script],
            *(
                "--teacher",
                folder / "sd",
                "--student",
                folder / "sd-pruned",
                *FAST,
                *flags,
                "--output_dir",
                out,
                *more,
            ),
            DS_ACCELERATOR="cpu",
        )

    twice("--train_batch_size", 1, "--gradient_accumulation_steps", 2)
    assert_same_run(single, out)
    shutil.rmtree(out / "unet")
    twice("--train_batch_size", 1, "--gradient_accumulation_steps", 2, "--resume_from_checkpoint", "checkpoint-2")
    assert_same_run(single, out)
    with pytest.raises(ValueError, match="DeepSpeed"):
        run("--train_batch_size", 4, *flags, "--resume_from_checkpoint", "checkpoint-2", out=out)


@pytest.mark.parametrize(("stage", "ema", "match"), [(3, False, "stage 3"), (2, True, "--use_ema")])
def test_deepspeed_as_it_cannot_be_used_is_refused(stage, ema, match):
    args = SimpleNamespace(use_ema=ema, train_batch_size=1, gradient_accumulation_steps=1, max_grad_norm=1.0)
    plugin = SimpleNamespace(zero_stage=stage, deepspeed_config={})
    with pytest.raises(ValueError, match=match):
        distill.configure_deepspeed(args, SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin)))


def assert_same_run(expected, got):
    for a, b in zip(losses(expected), losses(got), strict=True):
        for name in ("loss", "task", "output", "feature"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), name
    name = "unet/diffusion_pytorch_model.safetensors"
    a, b = load_file(expected / name), load_file(got / name)
    assert a.keys() == b.keys()
    # Adam divides by gradients that may be all but zero, so that single weights may differ by a step.
    assert all((a[k] - b[k]).abs().mean() < 1e-4 for k in a)


def port():
    """One that no other test run uses."""
    return 20000 + os.getpid() % 20000


@pytest.mark.parametrize("path", sorted((TRAINING / "recipes" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_configs_of_accelerate_are_read_as_they_are_meant(path):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    )
    assert args.num_processes == 8 and args.mixed_precision == "bf16"
    kind = {"fsdp": args.use_fsdp, "deepspeed": args.use_deepspeed, "ddp": args.multi_gpu}
    assert [name for name, used in kind.items() if used] == [path.stem]
    assert path.stem != "fsdp" or str(args.fsdp_version) == "2"
    assert path.stem != "deepspeed" or int(args.zero_stage) == 2


def test_processes_that_accelerate_does_not_start_are_an_error(folder, tmp_path):
    process = launch(
        ["accelerate.commands.launch", "--cpu", "--num_processes", "2"],
        *("--teacher", folder / "sd", "--student", folder / "sd-pruned", *FAST, "--output_dir", tmp_path / "out"),
        wait=False,
    )
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "--multi_gpu --num_processes N" in output


# ---- killed and resumed --------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_as_if_unbroken(folder, run, tmp_path):
    """From pictures, with EMA, warm-up and accumulation: every later loss and weight is equal to the last bit."""
    steps = 60
    data = ["--train_data_dir", folder / "pictures", "--train_batch_size", 1, "--cache_dir", tmp_path / "cache"]
    flags = [
        *(
            "--max_train_steps",
            steps,
            "--checkpointing_steps",
            3,
            "--checkpoints_total_limit",
            2,
            "--use_ema",
            "--random_flip",
        ),
        *(
            "--lr_scheduler",
            "cosine",
            "--lr_warmup_steps",
            4,
            "--gradient_accumulation_steps",
            2,
            "--learning_rate",
            1e-3,
        ),
    ]
    whole = run(*flags, data=data)
    out = tmp_path / "killed"
    common = ["--teacher", folder / "sd", "--student", folder / "sd-pruned", *data, *flags, "--output_dir", out]
    process = launch(["accelerate.commands.launch", "--cpu", "--num_processes", "1"], *common, wait=False)
    deadline = time.monotonic() + 200
    while not (out / "checkpoint-6").is_dir() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    reached = len(losses(out))
    assert 6 <= reached < steps
    run(*flags, "--resume_from_checkpoint", "latest", data=data, out=out)
    expected, got = losses(whole), losses(out)
    for a, b in zip(expected, got, strict=True):
        assert {k: v for k, v in a.items() if k != "images_per_s"} == {
            k: v for k, v in b.items() if k != "images_per_s"
        }
    weights = [load_file(o / "unet" / "diffusion_pytorch_model.safetensors") for o in (whole, out)]
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-57", "checkpoint-60"]
    assert {p.suffix for p in (out / "checkpoint-60").iterdir()} == {".safetensors", ".json"}


def test_resuming_refuses_another_run(run, tmp_path):
    out = run("--checkpointing_steps", 1)
    with pytest.raises(ValueError, match="2 samples a step, now it is 4"):
        run("--train_batch_size", 4, "--resume_from_checkpoint", "latest", out=out)
    with pytest.raises(ValueError, match="without --use_ema"):
        run("--use_ema", "--resume_from_checkpoint", "latest", out=out)
    with pytest.raises(ValueError, match="checkpoint-7"):
        run("--resume_from_checkpoint", "checkpoint-7", out=out)


# ---- what it trains ------------------------------------------------------------------------------------------------


def test_training_brings_the_student_nearer_to_its_teacher(run):
    rows = losses(run("--max_train_steps", 60, "--task_weight", 0, "--use_ema"))
    first, last = (sum(r["output"] for r in part) for part in (rows[1:11], rows[-10:]))
    assert last < 0.7 * first
    assert all(r["task"] == 0 for r in rows)


def test_only_the_student_is_trained(folder, run):
    out = run("--feature_weight", 0, "--output_weight", 0)
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        before, after = load_file(folder / "sd" / f"{part}.safetensors"), load_file(out / f"{part}.safetensors")
        assert all(torch.equal(before[k], after[k]) for k in before)
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(folder / "sd-pruned" / name), load_file(out / name)
    assert any(not torch.equal(before[k], after[k]) for k in before)


def test_lora_layers_are_trained_alone_and_merged(folder, run):
    out = run("--train_lora_rank", 2, "--learning_rate", 1e-2)
    name = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(folder / "sd-pruned" / name), load_file(out / name)
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert before.keys() == after.keys()
    assert changed and all(k.split(".")[-2] in ("to_q", "to_k", "to_v", "0") and "attn" in k for k in changed)
    assert (out / "lora").is_dir()


def test_gradient_checkpointing_and_bf16(run):
    plain = losses(run())
    checkpointed = losses(run("--gradient_checkpointing"))
    assert [r["loss"] for r in checkpointed] == pytest.approx([r["loss"] for r in plain], rel=1e-4)
    half = losses(run("--mixed_precision", "bf16", "--snr_gamma", 5.0))
    assert half[0]["task"] > 0 and half[0]["task"] != plain[0]["task"]


def test_cached_latents_and_captions(folder, run, tmp_path):
    data = ["--train_data_dir", folder / "pictures", "--train_batch_size", 2, "--max_train_steps", 2]
    out = run("--cache_latents", "--proportion_empty_prompts", 0.5, "--cache_dir", tmp_path / "cache", data=data)
    assert len(losses(out)) == 2 and list((tmp_path / "cache" / "latents").glob("*/*.safetensors"))


def test_validation_shows_original_pruned_and_student(run):
    out = run("--validation_prompts", "red heart", "pizza", "--validation_steps", 2, "--use_ema")
    for step in (0, 2):
        assert Image.open(out / "validation" / f"step_{step:06d}.png").size == (3 * 16, 2 * 16)


def test_losses_and_pictures_go_to_tensorboard(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = run("--report_to", "tensorboard", "--validation_prompts", "pizza", "--validation_steps", 2)
    readers = [EventAccumulator(str(file)).Reload() for file in (out / "logs").rglob("events.out.*")]
    (reader,) = [r for r in readers if "loss" in r.Tags()["scalars"]]  # the flags have a file of their own
    expected = [r["loss"] for r in losses(out)]
    assert [e.value for e in reader.Scalars("loss")] == pytest.approx(expected)
    assert {"task", "output", "feature", "lr", "images_per_s"} <= set(reader.Tags()["scalars"])
    assert [e.step for e in reader.Images("validation")] == [0, 2]


def test_losses_and_pictures_go_to_wandb(run, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logged, log = [], wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda self, data, *a, **k: (logged.append((data, k)), log(self, data, *a, **k))
    )
    out = run("--report_to", "wandb", "--validation_prompts", "pizza", "--validation_steps", 2)
    assert [d["loss"] for d, _ in logged if "loss" in d] == pytest.approx([r["loss"] for r in losses(out)])
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert len(list(folder.rglob("validation*.png"))) == 2 and list(folder.glob("*.wandb"))


def test_losses_and_pictures_go_to_trackio(folder, tmp_path):
    pytest.importorskip("trackio")
    flags = (
        "--report_to",
        "trackio",
        "--validation_prompts",
        "pizza",
        "--validation_steps",
        2,
        "--output_dir",
        tmp_path / "out",
    )
    student = ("--teacher", folder / "sd", "--student", folder / "sd-pruned")
    launch(
        ["accelerate.commands.launch", "--cpu", "--num_processes", "1"],
        *(*student, *FAST, *flags), TRACKIO_DIR=str(tmp_path / "trackio"),
    )  # fmt: skip
    with sqlite3.connect(tmp_path / "trackio" / "distill.db") as database:
        rows = [json.loads(row) for (row,) in database.execute("select metrics from metrics order by step")]
    assert [r["loss"] for r in rows if "loss" in r] == pytest.approx([r["loss"] for r in losses(tmp_path / "out")])
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 2


def test_eight_bit_adam(run):
    pytest.importorskip("bitsandbytes")
    outs = [run("--max_train_steps", 5, *flags) for flags in ((), ("--use_8bit_adam",))]
    ours, eight = ([r["loss"] for r in losses(out)] for out in outs)
    assert eight == pytest.approx(ours, rel=0.05) and eight != ours


def test_other_kinds_of_targets(folder, run, tmp_path):
    pipe = tiny.stable_diffusion()
    pipe.register_modules(scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=100))
    process = ld_pruner_hf.NoiseProcess.of(pipe.scheduler)
    assert process.prediction_type == "flow"
    for kind in ("v_prediction", "sample", "flow"):
        assert losses(run("--prediction_type", kind, "--feature_weight", 0))[0]["task"] > 0


@pytest.mark.parametrize(("teacher", "precision"), [("ddpm", "no"), ("ldm", "no"), ("ddpm", "bf16"), ("ldm", "bf16")])
def test_unconditional_pipelines(run, teacher, precision):
    out = run(
        *("--validation_steps", 2, "--num_validation_images", 1, "--mixed_precision", precision),
        teacher=teacher,
        student=("--plan", f"{teacher}.json"),
    )
    assert losses(out)[0]["feature"] > 0 and (out / "validation" / "step_000002.png").is_file()


def test_presets_are_students_by_name(run, tmp_path):
    with pytest.raises(ValueError, match="preset 'bk-sdm-small' is for U-Nets of Stable Diffusion 1 or 2"):
        run(student=("--plan", "bk-sdm-small"))
    pipe = DiffusionPipeline.from_pretrained(run(student=("--plan", "no-mid-block")))
    assert pipe.unet.mid_block is None and ld_pruner_hf.record_of(pipe.unet).how == "no-mid-block"


def test_recordings_teach_an_audio_pipeline(folder, run, tmp_path):
    """A folder of wav files, straight from the recorder."""
    soundfile, _ = pytest.importorskip("soundfile"), pytest.importorskip("librosa")
    (tmp_path / "wav").mkdir()
    for i in range(4):
        soundfile.write(tmp_path / "wav" / f"{i}.wav", np.sin(np.arange(4000) * (0.1 + 0.1 * i)), 8000)
    soundfile.write(tmp_path / "wav" / "short.wav", np.ones(50), 8000)
    pipe = tiny_audio()
    pipe.save_pretrained(folder / "audio")
    pipe.prune(1, num_inference_steps=1, seeds=1, kinds=["Attention"])
    pipe.save_pretrained(tmp_path / "audio-pruned")
    data = [
        "--train_data_dir",
        tmp_path / "wav",
        "--train_batch_size",
        2,
        "--max_train_steps",
        2,
        "--cache_dir",
        tmp_path,
    ]
    out = run("--cache_latents", teacher="audio", student=("--student", tmp_path / "audio-pruned"), data=data)
    assert len(losses(out)) == 2
    with pytest.raises(ValueError, match="has no `mel`"):
        run(teacher="ddpm", student=("--plan", "ddpm.json"), data=data)


def tiny_audio():
    """The U-Net of `tiny.ddpm` with one channel, and spectrograms of its size."""
    from diffusers import AudioDiffusionPipeline, DDIMScheduler, Mel, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(**{**tiny.UNCONDITIONAL_UNET, "in_channels": 1, "out_channels": 1, "sample_size": (8, 8)})
    mel = Mel(x_res=8, y_res=8, sample_rate=8000, n_fft=64, hop_length=32)
    return AudioDiffusionPipeline(vqvae=None, unet=unet, mel=mel, scheduler=DDIMScheduler(num_train_timesteps=100))


# ---- recipes -------------------------------------------------------------------------------------------------------

TINY = {  # recipe -> (teacher, plan) that are small and of the same kind
    "distill_uig": ("ldm", "ldm.json"),
    "distill_uag": ("ddpm", "ddpm.json"),
}


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_starts(folder, run, tmp_path, path):
    """With a tiny pipeline and tiny data in place of the recipe's; everything else is as it stands."""
    recipe = yaml.safe_load(path.read_text())
    kind = next((k for k in TINY if path.stem.startswith(k)), None)
    teacher, plan = TINY.get(kind, ("sd", "plan.json"))
    for name in ("teacher", "student", "plan", "prune", "scores", "dataset_name", "train_data_dir", "output_dir"):
        recipe.pop(name, None)
    recipe |= {
        "max_train_steps": 2,
        "train_batch_size": 2,
        "validation_inference_steps": 2,
        "resolution": 16 if teacher == "sd" else 8,
    }
    if teacher == "ldm":
        recipe["resolution"] = 16
    if recipe.get("mixed_precision") == "fp16":
        recipe["mixed_precision"] = "bf16"  # what the CPU can do
    if recipe.get("data_free"):
        recipe |= {"data_free": 4, "data_free_steps": 2}
        recipe.pop("data_free_prompts", None)
    else:
        recipe["train_data_dir"] = str(folder / "pictures")
        recipe.pop("caption_column", None)
        recipe["cache_dir"] = str(tmp_path / "cache")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    data = ["--config", tmp_path / "recipe.yaml"]
    out = run(teacher=teacher, student=("--plan", plan), data=data)
    assert len(losses(out)) == 2


def test_there_are_recipes_for_each_setting_of_the_papers():
    assert {p.stem for p in RECIPES} >= {
        "distill_emoji",
        "distill_t2i",
        "distill_uig",
        "distill_uag",
        "distill_bk_sdm",
    }
    for path in RECIPES:
        arguments = ["--config", str(path), "--output_dir", "unused"]
        assert options.make_parser("").parse_args([*options.flags_of(path, options.make_parser("")), *arguments])


# ---- called wrongly ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--plan", "plan.json"], "exactly one of --student, --plan and --prune"),
        (["--train_data_dir", "pictures"], "exactly one of --dataset_name"),
        (["--mixed_precision", "fp16"], "fp16 on the CPU"),
        (["--resolution", "17"], "--resolution: got 17, expected a multiple of 2"),
        (["--learning_rate", "0"], "--learning_rate: got 0"),
        (["--train_batch_size", "two"], "--train_batch_size"),
        (["--feature_loss", "cosine"], "--feature_loss"),
        (["--task_weight", "0", "--output_weight", "0", "--feature_weight", "0"], "all are 0"),
        (["--random_flip"], "--random_flip"),
        (["--report_to", "wandb"], "wandb is not installed"),
        (["--use_8bit_adam"], "bitsandbytes is not installed"),
        (["--config", "nowhere.yaml"], "nowhere.yaml does not exist"),
        (["--no_such_flag"], "--no_such_flag"),
    ],
)
def test_wrong_flags_are_named_before_anything_is_loaded(folder, run, capsys, monkeypatch, flags, message):
    monkeypatch.setattr(distill, "load_pipeline", lambda *_: pytest.fail("a pipeline was loaded"))
    for optional in ("wandb", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, optional, None)
    flags = [str(folder / f) if (folder / f).exists() else f for f in flags]
    with pytest.raises(SystemExit):
        run(*flags)
    assert message in capsys.readouterr().err


def test_configs_are_checked_and_the_command_line_wins(tmp_path, capsys):
    config = tmp_path / "config.yaml"
    common = [
        "--config",
        str(config),
        "--output_dir",
        str(tmp_path),
        "--data_free",
        "1",
        "--student",
        "s",
        "--teacher",
        "t",
    ]
    config.write_text("learning_rate: 1.0e-3\nuse_ema: true\nvalidation_prompts: [a b, c]\nmax_train_steps: 7\n")
    args = options.parse_args("", [*common, "--max_train_steps", "9"])
    assert (args.learning_rate, args.use_ema, args.validation_prompts, args.max_train_steps) == (
        1e-3,
        True,
        ["a b", "c"],
        9,
    )
    for text, message in (
        ("learningrate: 1", "is no flag"),
        ("use_ema: 3", "true or false"),
        ("a: [", "not readable"),
        ("- 1", "holds a list"),
    ):
        config.write_text(text)
        with pytest.raises(SystemExit):
            options.parse_args("", common)
        assert message in capsys.readouterr().err


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="--output_dir: cannot write"):
        options.check_writable(tmp_path / "file" / "out")
    with pytest.raises(ValueError, match="of room"):
        options.check_writable(tmp_path, needed=10**18)


def test_a_hub_that_takes_nothing_is_found_before_the_training(run, monkeypatch):
    monkeypatch.setattr(distill, "load_pipeline", lambda *_: pytest.fail("a pipeline was loaded"))
    with pytest.raises(ValueError, match="--push_to_hub: cannot make the repository me/model"):
        run("--push_to_hub", "--hub_model_id", "me/model")  # the tests run offline


def test_students_of_another_teacher_are_refused(folder, run):
    with pytest.raises(ValueError, match="UNet2DModel, the teacher a UNet2DConditionModel"):
        run(student=("--student", "ddpm"))
    with pytest.raises(ValueError, match="was made for"):
        run(student=("--plan", "ddpm.json"))


def test_pipelines_with_a_scheduler_for_each_stage_are_refused():
    with pytest.raises(ValueError, match=r"UnCLIPPipeline has 3 schedulers.*expected one"):
        models.noise_process(families.make("unclip")[0], SimpleNamespace(prediction_type=None))


def test_wrong_columns_and_taps_are_named(folder, run, tmp_path):
    data = ["--train_data_dir", folder / "pictures", "--max_train_steps", 1, "--cache_dir", tmp_path]
    with pytest.raises(ValueError, match=r"--caption_column.*'title'.*text"):
        run("--caption_column", "title", data=data)
    with pytest.raises(ValueError, match=r"no module 'down_blocks\.9'"):
        run("--feature_taps", "down_blocks.9")


# ---- ld-pruner distill ---------------------------------------------------------------------------------------------


def door(*flags):
    command = [sys.executable, "-m", "ld_pruner_hf", "distill", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_command_line_is_a_door_to_the_script(folder, tmp_path):
    flags = ["--teacher", folder / "sd", "--student", folder / "sd-pruned", *FAST]
    done = door(*flags, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "out")) == 2
    wrong = door(*flags)
    assert wrong.returncode == 2 and "--output_dir is missing" in wrong.stderr and "Traceback" not in wrong.stderr
    assert "--feature_taps" in door("--help").stdout


def test_an_installed_package_has_the_scripts(tmp_path):
    """As pip installs it: nothing of the source checkout beside the package."""
    root = TRAINING.parent
    copied = tmp_path / "source"
    for name in ("ld_pruner_hf", "training"):
        shutil.copytree(root / name, copied / name, ignore=shutil.ignore_patterns("__pycache__", "demo"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, copied / name)
    (copied / "ld_pruner_hf" / "demo").mkdir()
    (copied / "ld_pruner_hf" / "demo" / "__init__.py").write_text("")
    build = [
        sys.executable,
        "-c",
        "import setuptools.build_meta as b, sys; b.build_wheel(sys.argv[1])",
        tmp_path / "wheel",
    ]
    subprocess.run(list(map(str, build)), cwd=copied, check=True, capture_output=True, timeout=300)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    scripts = {f"ld_pruner_hf/training/{p.relative_to(TRAINING)}" for p in TRAINING.rglob("*") if p.suffix in SHIPPED}
    assert "ld_pruner_hf/training/recipes/distill_emoji.yaml" in scripts and scripts <= names
