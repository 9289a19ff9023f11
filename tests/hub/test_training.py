"""`--push_to_hub` of the training scripts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import tiny
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from PIL import Image

import ld_pruner_hf

pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

import distill
import dreambooth


@pytest.fixture(autouse=True)
def one_process():
    for state in (AcceleratorState, GradientState):
        state._reset_state(*([True] if state is AcceleratorState else []))
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("training")
    pipe = tiny.stable_diffusion()
    pipe.save_pretrained(root / "sd")
    pipe.prune(1, num_inference_steps=1, seeds=1, kinds=["Attention"])
    pipe.save_pretrained(root / "sd-pruned")
    (root / "subject").mkdir()
    Image.new("RGB", (16, 16), "red").save(root / "subject" / "0.png")
    return root


def test_a_distilled_pipeline_is_published_with_its_recipe(hub, folder, tmp_path):
    flags = ["--teacher", folder / "sd", "--student", folder / "sd-pruned", "--data_free", 2, "--data_free_steps", 1]
    flags += ["--train_batch_size", 2, "--max_train_steps", 1, "--output_dir", tmp_path / "out"]
    distill.main([str(f) for f in (*flags, "--push_to_hub", "--hub_model_id", "alice/distilled")])
    files = hub.store.repo("model", "alice/distilled").files()
    assert {"README.md", "model_index.json", "unet/config.json"} <= set(files)
    assert not any(name.startswith(("checkpoint", "latents")) for name in files)
    pipe = DiffusionPipeline.from_pretrained("alice/distilled")
    assert len(ld_pruner_hf.plan_of(pipe.unet)) == 1


def test_a_lora_is_pushed_alone(hub, folder, tmp_path):
    pytest.importorskip("peft")
    flags = ["--pretrained_model_name_or_path", folder / "sd-pruned", "--instance_data_dir", folder / "subject"]
    flags += [
        "--instance_prompt",
        "red sks heart",
        "--train_batch_size",
        1,
        "--max_train_steps",
        1,
        "--train_lora_rank",
        2,
    ]
    flags += ["--output_dir", tmp_path / "out", "--push_to_hub", "--hub_model_id", "alice/lora"]
    dreambooth.main([str(f) for f in flags])
    assert "pytorch_lora_weights.safetensors" in hub.store.repo("model", "alice/lora").files()
    pipe = DiffusionPipeline.from_pretrained(folder / "sd-pruned")
    pipe.load_lora_weights("alice/lora", weight_name="pytorch_lora_weights.safetensors")
    assert pipe.unet.peft_config
