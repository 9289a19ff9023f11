"""LoRA made for the original pipeline, on pruned ones."""

from __future__ import annotations

import pytest
import tiny
import torch

import ld_pruner_hf
from ld_pruner_hf import load_lora, lora_fit
from ld_pruner_hf.lora import original_path

pytest.importorskip("peft")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(pipe, seed=0):
    """A LoRA with random weights in all attentions of the pipeline's denoiser."""
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=list(TARGETS)))
    torch.manual_seed(seed)
    for name, p in pipe.unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.3)


@pytest.fixture
def lora(tmp_path):
    """A folder with a LoRA of the tiny pipeline, with the metadata that training scripts write."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft import get_peft_model_state_dict

    pipe = tiny.stable_diffusion()
    add_lora(pipe)
    layers, metadata = get_peft_model_state_dict(pipe.unet), _collate_lora_metadata({"unet": pipe.unet})
    pipe.save_lora_weights(tmp_path / "lora", unet_lora_layers=layers, **metadata)
    return tmp_path / "lora"


def weight_with_lora(model, path):
    """The weight of a layer with its LoRA in it."""
    layer = model.get_submodule(path)
    delta = sum(layer.get_delta_weight(a) for a in layer.active_adapters) if hasattr(layer, "get_delta_weight") else 0
    return layer.weight.detach() + delta


def test_everything_fits_the_original(pipe, lora):
    fit = lora_fit(pipe, lora)
    assert (
        len(fit.fitting) == 4 * 2 * 4 and not fit.gone and not fit.misshapen
    )  # 4 attentions blocks of 2, 4 layers each
    assert all(old == new for old, new in fit.fitting.items())
    assert not getattr(pipe.unet, "peft_config", None)


def test_a_pruned_pipeline_takes_the_layers_that_it_still_has(pipe, lora):
    original = tiny.stable_diffusion()
    load_lora(original, lora)
    pipe.prune(1, num_inference_steps=1, seeds=1, kinds=["Attention"])
    (gone,) = [m.path for m in ld_pruner_hf.plan_of(pipe.unet)]
    before = tiny.picture(pipe, prompt="pizza", generator=torch.Generator().manual_seed(0))
    fit = load_lora(pipe, lora, adapter_name="style")
    assert set(fit.gone) == {f"{gone}.{t}" for t in TARGETS}
    assert len(fit.fitting) == 32 - 4 and "28 of 32" in str(fit) and f"gone: {gone}.to_q" in str(fit)
    for path in fit.fitting:
        expected = weight_with_lora(original.unet, path)
        torch.testing.assert_close(weight_with_lora(pipe.unet, path), expected)
        assert pipe.unet.get_submodule(path).scaling == {"style": 2.0}  # alpha 4, rank 2
    assert pipe.get_active_adapters() == ["style"]
    after = tiny.picture(pipe, prompt="pizza", generator=torch.Generator().manual_seed(0))
    assert (before != after).any()


def test_a_lora_follows_the_weights_into_blocks_that_are_numbered_anew():
    """BK-SDM's student takes the last pair of an up stage as its second, and Tiny's up stages are the teacher's next ones."""
    from peft import get_peft_model_state_dict

    original, small = ld_pruner_hf.demo.load("emoji"), ld_pruner_hf.demo.load("emoji")
    small.prune("bk-sdm-tiny")
    add_lora(original)
    state = {f"unet.{k}": v for k, v in get_peft_model_state_dict(original.unet).items()}
    fit = load_lora(small, state)
    moved = {old: new for old, new in fit.fitting.items() if old != new}
    assert "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q" in moved and fit.gone
    for old, new in fit.fitting.items():
        layers = original.unet.get_submodule(old), small.unet.get_submodule(new)
        assert torch.equal(layers[0].base_layer.weight, layers[1].base_layer.weight)
        torch.testing.assert_close(layers[0].get_delta_weight("default"), 2 * layers[1].get_delta_weight("default_0"))


def test_paths_before_blocks_left_their_lists():
    unet = ld_pruner_hf.demo.load("emoji").unet
    record = {"how": "plan", "removed": ["transformer_blocks.1", "transformer_blocks.3", "mid_block"]}
    unet.register_to_config(_pruned=record)
    before = {0: 0, 1: 2, 2: 4, 3: 5}
    for now, then in before.items():
        assert original_path(unet, f"transformer_blocks.{now}.attn.to_q") == f"transformer_blocks.{then}.attn.to_q"
    assert original_path(unet, "other.1.to_out.0") == "other.1.to_out.0"


def test_layers_of_another_shape_are_named(pipe, lora):
    other = tiny.stable_diffusion()
    other.register_modules(unet=tiny.unet(cross_attention_dim=48))
    fit = lora_fit(other, lora)
    assert fit.misshapen and all(".attn2." in path for path in fit.misshapen)
    assert "made for a weight" in str(fit)


def test_a_lora_that_fits_nowhere_and_pipelines_without_lora_are_errors(pipe, lora):
    state, _ = pipe.lora_state_dict(lora)
    with pytest.raises(ValueError, match="none of its layers fits"):
        load_lora(pipe, {k.replace("blocks", "lumps"): v for k, v in state.items()})
    assert "lora_state_dict" not in vars(pipe)
    with pytest.raises(ValueError, match="takes no LoRA"):
        lora_fit(tiny.ddpm(), lora)
