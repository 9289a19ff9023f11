"""Hand-made plans: sizes as published, weights key by key, and results that plain diffusers loads."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DConditionModel

from ld_pruner_hf import PRESETS, apply_preset_, demo, record_of
from ld_pruner_hf.presets import teacher_key

SD1 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD2 = {
    "sample_size": 96, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
}  # fmt: skip
SDXL = {
    "sample_size": 128, "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048, "use_linear_projection": True,
    "addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
SMALL_SD = {
    "sample_size": 16, "cross_attention_dim": 24, "attention_head_dim": 4, "block_out_channels": [16, 32, 48, 48],
    "norm_num_groups": 8,
}  # fmt: skip
SMALL_SDXL = SDXL | {
    "sample_size": 16, "block_out_channels": [8, 16, 32], "attention_head_dim": [1, 2, 4], "cross_attention_dim": 12,
    "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 32, "norm_num_groups": 4,
}  # fmt: skip
SD_PRESETS = ["no-mid-block", "bk-sdm-base", "bk-sdm-small", "bk-sdm-tiny"]
SDXL_PRESETS = ["no-mid-block", "koala-1b", "koala-700m", "ssd-1b", "segmind-vega"]


def make(config: dict, seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**config).eval()


def call(unet: UNet2DConditionModel, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, size, size, generator=generator)
    text = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    added = {}
    if unet.config.addition_embed_type:
        added = {"text_embeds": torch.randn(2, 8, generator=generator), "time_ids": torch.ones(2, 6)}
    with torch.no_grad():
        return unet(sample.to(unet.dtype), 7, text.to(unet.dtype), added_cond_kwargs=added).sample


@pytest.mark.parametrize(
    ("config", "name", "before", "after"),
    [
        (SD1, "no-mid-block", 859_520_964, 762_482_884),  # METHODS: 859.5M -> 762.5M
        (SD1, "bk-sdm-base", 859_520_964, 579_384_964),  # 579.4M
        (SD1, "bk-sdm-small", 859_520_964, 482_346_884),  # 482.3M
        (SD1, "bk-sdm-tiny", 859_520_964, 323_384_964),  # 323.4M
        (SD2, "no-mid-block", 865_910_724, 768_217_284),
        (SD2, "bk-sdm-base", 865_910_724, 583_480_964),
        (SD2, "bk-sdm-small", 865_910_724, 485_787_524),
        (SD2, "bk-sdm-tiny", 865_910_724, 326_825_604),
        (SDXL, "koala-1b", 2_567_463_684, 1_161_184_324),  # published: 1.16B
        (SDXL, "koala-700m", 2_567_463_684, 782_822_724),  # 0.78B
        (SDXL, "ssd-1b", 2_567_463_684, 1_331_334_404),  # 1.3B
        (SDXL, "segmind-vega", 2_567_463_684, 745_225_604),  # 0.74B
    ],
)
def test_published_sizes(config, name, before, after):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    record = apply_preset_(unet, name)
    assert (record.params_before, record.params_after) == (before, after)
    assert sum(p.numel() for p in unet.parameters()) == after
    assert all(p.is_meta for p in unet.parameters())


def expected_teacher_key(name: str, key: str) -> str:
    """METHODS (BK-SDM, weight inheritance), written out anew: block by block, not by the package's rule."""
    parts = key.split(".")
    if parts[0] == "up_blocks":
        if parts[2] in ("resnets", "attentions") and name in (
            "bk-sdm-base",
            "bk-sdm-small",
            "bk-sdm-tiny",
            "koala-1b",
            "koala-700m",
        ):
            parts[3] = {"0": "0", "1": "2"}[parts[3]]
        if name == "bk-sdm-tiny":
            parts[1] = {"0": "1", "1": "2", "2": "3"}[parts[1]]
    return ".".join(parts)


@pytest.mark.parametrize(
    ("config", "name"), [(SMALL_SD, n) for n in SD_PRESETS] + [(SMALL_SDXL, n) for n in SDXL_PRESETS]
)  # fmt: skip
def test_weights_are_the_teachers_key_by_key(config, name):
    unet = make(config)
    teacher = {k: v.clone() for k, v in unet.state_dict().items()}
    record = apply_preset_(unet, name)
    student = unet.state_dict()
    assert record.narrowed == ()
    assert 0 < len(student) < len(teacher)
    for key, value in student.items():
        assert torch.equal(value, teacher[expected_teacher_key(name, key)]), key
    # A stock model of the same config takes these weights, all of them, and computes the same.
    fresh = UNet2DConditionModel.from_config(dict(unet.config)).eval()
    fresh.load_state_dict(student, strict=True)
    assert torch.equal(call(unet), call(fresh))
    assert unet.num_upsamplers == fresh.num_upsamplers
    assert [b.resolution_idx for b in unet.up_blocks] == [b.resolution_idx for b in fresh.up_blocks]


def test_tiny_takes_up_samplers_and_last_resnets_of_the_next_block():
    preset = PRESETS["bk-sdm-tiny"]
    assert teacher_key(preset, "up_blocks.1.upsamplers.0.conv.weight") == "up_blocks.2.upsamplers.0.conv.weight"
    assert teacher_key(preset, "up_blocks.2.attentions.1.norm.weight") == "up_blocks.3.attentions.2.norm.weight"
    assert teacher_key(preset, "down_blocks.2.resnets.0.conv1.weight") == "down_blocks.2.resnets.0.conv1.weight"
    unet = make(SMALL_SD)
    apply_preset_(unet, "bk-sdm-tiny")
    assert unet.down_blocks[-1].downsamplers is None and len(unet.down_blocks) == len(unet.up_blocks) == 3


def test_odd_sizes_run_after_tiny():
    unet = make(SMALL_SD)
    apply_preset_(unet, "bk-sdm-tiny")
    assert call(unet, size=18).shape == (2, 4, 18, 18)


@pytest.mark.parametrize("name", SD_PRESETS)
def test_emoji_pipeline_draws_saves_and_loads_in_plain_diffusers(name, tmp_path):
    pipe = demo.load("emoji", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    unet, before = pipe.unet, pipe.unet.num_parameters()
    record = pipe.prune(name)
    assert pipe.unet is unet, "every reference to the U-Net sees the change"
    assert type(unet) is UNet2DConditionModel and unet.num_parameters() == record.params_after < before
    assert record.component == "unet" and record_of(unet) == record
    image = pipe(
        "red heart", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np"
    ).images
    pipe.save_pretrained(tmp_path)
    np.save(tmp_path / "image.npy", image)
    program = f"""
import sys, numpy, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r})
assert type(pipe.unet).__name__ == "UNet2DConditionModel" and not any(p.is_meta for p in pipe.unet.parameters())
pipe.set_progress_bar_config(disable=True)
image = pipe("red heart", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
assert numpy.array_equal(image, numpy.load({str(tmp_path / "image.npy")!r}))
assert "ld_pruner_hf" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "not expected" not in done.stderr, "the note in the config is loaded in silence"
    saved = json.loads((tmp_path / "unet" / "config.json").read_text())
    assert saved["_pruned"]["how"] == name and "pruning_plan" not in saved and "quantization_config" not in saved
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert record_of(again.unet) == record


def test_a_wider_innermost_stage_is_narrowed_and_said():
    pipe = demo.load("emoji")
    teacher = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    record = pipe.prune("bk-sdm-tiny")
    resnet = "up_blocks.0.resnets.0."
    assert set(record.narrowed) == {
        resnet + k for k in ("norm1.weight", "norm1.bias", "conv1.weight", "conv_shortcut.weight")
    }
    kept = [*range(96), *range(128, 224)]  # 128 channels of the removed stage become 96; the skip connection's 96 stay
    for key, value in pipe.unet.state_dict().items():
        source = teacher[expected_teacher_key("bk-sdm-tiny", key)]
        if key in record.narrowed:
            source = source[kept] if source.ndim == 1 else source[:, kept]
        assert torch.equal(value, source), key


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtype_training_flags_hooks_and_processors_are_kept(dtype):
    unet = make(SMALL_SD).to(dtype)
    unet.enable_gradient_checkpointing()
    unet.train()
    seen: list[str] = []
    unet.up_blocks[1].resnets[2].register_forward_hook(lambda *_: seen.append("resnet"))
    processor = unet.up_blocks[1].attentions[2].transformer_blocks[0].attn1.processor
    head = unet.conv_out
    apply_preset_(unet, "bk-sdm-small")
    assert {p.dtype for p in unet.parameters()} == {dtype}
    assert all(m.training for m in unet.modules()) and unet.is_gradient_checkpointing
    assert unet.conv_out is head
    assert unet.up_blocks[1].attentions[1].transformer_blocks[0].attn1.processor is processor
    call(unet.eval())
    assert seen == ["resnet"]


def test_the_smaller_model_trains():
    unet = make(SMALL_SD).train()
    apply_preset_(unet, "bk-sdm-tiny")
    out = unet(torch.randn(1, 4, 16, 16), 3, torch.randn(1, 5, 24)).sample
    out.square().mean().backward()
    assert all(p.grad is not None for p in unet.parameters())


def test_values_that_were_defaults_do_not_come_back():
    # diffusers notes which entries were left at their defaults and drops those again in from_config.
    unet = UNet2DConditionModel.from_config(dict(SMALL_SD))
    assert "mid_block_type" in unet.config["_use_default_values"]
    apply_preset_(unet, "bk-sdm-small")
    again = UNet2DConditionModel.from_config(unet.config)
    assert again.mid_block is None and again.num_parameters() == unet.num_parameters()


def test_unknown_names_list_the_presets():
    pipe = demo.load("emoji")
    with pytest.raises(ValueError, match=r"bk-sdm-medium.*bk-sdm-base.*bk-sdm-small.*koala-700m"):
        pipe.prune("bk-sdm-medium")
    with pytest.raises(ValueError, match=r"bk-sdm-base.*bk-sdm-small"):
        apply_preset_(pipe.unet, "nothing")
    with pytest.raises(ValueError, match=r"got .plan\.json., expected"):
        pipe.prune("plan.json")


@pytest.mark.parametrize(
    ("config", "name", "message"),
    [
        (SMALL_SDXL, "bk-sdm-base", "Stable Diffusion 1 or 2.*block types.*expected"),
        (SMALL_SD, "koala-1b", "Stable Diffusion XL.*expected"),
        (SMALL_SDXL | {"transformer_layers_per_block": [1, 2, 4]}, "ssd-1b", r"\[2, 4\], expected \[2, 10\]"),
        (
            SMALL_SD | {"layers_per_block": 1},
            "bk-sdm-base",
            r"layers_per_block is \[1, 1, 1, 1\], expected \[2, 2, 2, 2\]",
        ),
        (SMALL_SD | {"mid_block_type": None}, "no-mid-block", "mid_block_type is None, expected a mid block"),
        (SMALL_SD | {"block_out_channels": [16, 32, 64, 48]}, "bk-sdm-tiny", "no narrower"),
    ],
)
def test_another_architecture_is_refused_and_left_alone(config, name, message):
    unet = make(config)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    entries = dict(unet.config)
    with pytest.raises(ValueError, match=message):
        apply_preset_(unet, name)
    assert dict(unet.config) == entries and before.keys() == unet.state_dict().keys()


def test_other_models_and_pruned_ones_are_refused():
    with pytest.raises(ValueError, match="got a DiTTransformer2DModel, expected a UNet2DConditionModel"):
        apply_preset_(
            DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=4, num_layers=1, sample_size=4),
            "bk-sdm-base",
        )
    unet = make(SMALL_SD)
    apply_preset_(unet, "bk-sdm-base")
    with pytest.raises(ValueError, match="layers_per_block"):
        apply_preset_(unet, "bk-sdm-small")
    assert apply_preset_(unet, "no-mid-block").params_before == record_of(unet).params_before
    assert unet.config["_pruned"]["earlier"]["how"] == "bk-sdm-base"


def test_a_model_with_adapters_is_refused_and_left_alone():
    peft = pytest.importorskip("peft")
    unet = make(SMALL_SD)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    keys = list(unet.state_dict())
    with pytest.raises(ValueError, match="unload or fuse adapters first"):
        apply_preset_(unet, "bk-sdm-base")
    assert list(unet.state_dict()) == keys and unet.config.layers_per_block == 2


def test_freeu_finds_its_stages():
    """FreeU looks at `resolution_idx`, which counts from the innermost up block that is left."""
    unet = make(SMALL_SD)
    apply_preset_(unet, "bk-sdm-tiny")
    plain = call(unet)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert unet.up_blocks[0].b1 == 1.2 and not torch.equal(call(unet), plain)
    unet.disable_freeu()
    assert torch.equal(call(unet), plain)
