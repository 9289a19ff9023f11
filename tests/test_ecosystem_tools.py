"""What users put on top of a pruned model: export, quantization, and methods that the papers call orthogonal to pruning."""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    AutoModel,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FlowMatchLCMScheduler,
    LCMScheduler,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from pruned import Pruned

from ld_pruner_hf import plan_of
from ld_pruner_hf.modeling import GUARD_KEY


@pytest.fixture(params=["sd", "sd3"])
def pruned(request) -> Pruned:
    return Pruned(request.param)


# ---- export --------------------------------------------------------------------------------------------------------------------


def test_export(pruned):
    call = pruned.model_call
    exported = torch.export.export(pruned.model, call.args, call.kwargs)
    torch.testing.assert_close(exported.module()(*call.args, **call.kwargs)[0], pruned.output())


def test_onnx(pruned, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    call = pruned.model_call
    program = torch.onnx.export(pruned.model, call.args, kwargs=call.kwargs, dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    torch.testing.assert_close(program(*call.args, **call.kwargs)[0], pruned.output(), rtol=1e-4, atol=1e-4)


# ---- quantization --------------------------------------------------------------------------------------------------------------


def quantization(library: str):
    if library == "torchao":
        pytest.importorskip("torchao")
        from diffusers import TorchAoConfig
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    pytest.importorskip("optimum.quanto")
    from diffusers import QuantoConfig

    return QuantoConfig("int8")


WITHOUT_PLUGIN = """
import sys
from diffusers import AutoModel
for low_memory in (True, False):
    try:
        AutoModel.from_pretrained(sys.argv[1], low_cpu_mem_usage=low_memory)
    except ValueError as error:
        assert "pip install ld_pruner_hf" in str(error), repr(error)
    else:
        sys.exit("loaded without the plug-in")
print("refused")
"""


@pytest.mark.parametrize("library", ["torchao", "quanto"])
def test_quantized_while_loading_saved_and_loaded_again(pruned, library, tmp_path, python):
    pruned.model.save_pretrained(tmp_path / "pruned")
    kind = type(pruned.model)
    quantized = kind.from_pretrained(
        tmp_path / "pruned", quantization_config=quantization(library), torch_dtype=torch.float32
    )
    assert any(type(p) is not torch.nn.Parameter for p in quantized.parameters())
    assert plan_of(quantized) == plan_of(pruned.model)
    error = (pruned.output(quantized) - pruned.output()).abs().max()
    assert 0 < error < 0.05 * pruned.output().abs().max()
    quantized.save_pretrained(tmp_path / "quantized")
    for load in (kind, AutoModel):
        again = load.from_pretrained(str(tmp_path / "quantized"), torch_dtype=torch.float32)
        assert torch.equal(pruned.output(again), pruned.output(quantized)) and plan_of(again) == plan_of(quantized)
        assert again.config[GUARD_KEY]["quantization_config"]["quant_method"] == library
    assert "refused" in python(WITHOUT_PLUGIN, tmp_path / "quantized").stdout
    with pytest.raises(ValueError, match="quantized or distributed weights cannot be replaced"):
        pruned.pipe.register_modules(**{pruned.component: quantized})
        pruned.pipe.score(num_inference_steps=1, **pruned.call)


def test_quantized_in_place(pruned):
    torchao = pytest.importorskip("torchao")
    before = pruned.output()
    torchao.quantize_(pruned.model, torchao.quantization.Int8WeightOnlyConfig())
    error = (pruned.output() - before).abs().max()
    assert 0 < error < 0.05 * before.abs().max()


# ---- fewer steps, fewer tokens, caches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 4])
def test_few_step_schedulers(pruned, steps):
    kind = LCMScheduler if pruned.name == "sd" else FlowMatchLCMScheduler
    pruned.pipe.scheduler = kind.from_config(pruned.pipe.scheduler.config)
    calls = []
    pruned.model.register_forward_hook(lambda *_: calls.append(1))
    assert torch.isfinite(pruned.latents(steps)).all() and len(calls) == steps
    assert pruned.pipe.score(num_inference_steps=1, seeds=1, kinds=["FeedForward"], **pruned.call).rows


def test_token_merging():
    tomesd = pytest.importorskip("tomesd")
    pruned = Pruned("sd")
    before = pruned.output()
    seen = []
    attention = pruned.model.up_blocks[1].attentions[0].transformer_blocks[0].attn1
    attention.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    tomesd.apply_patch(pruned.model, ratio=0.5, max_downsample=8)
    merged = pruned.output()
    assert torch.isfinite(merged).all() and not torch.allclose(merged, before) and seen == [32]  # of 64 tokens
    tomesd.remove_patch(pruned.model)
    assert torch.equal(pruned.output(), before)


def attention_broadcast(pipe):
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: pipe._current_timestep,
    )  # fmt: skip


def faster_cache(pipe):
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 999),  # not in the first step
        attention_weight_callback=lambda _: 0.5, is_guidance_distilled=True, tensor_format="BCHW",
        current_timestep_callback=lambda: pipe._current_timestep,
    )  # fmt: skip


CACHES = {
    "first block": lambda _: FirstBlockCacheConfig(threshold=1e6),
    "attention broadcast": attention_broadcast,
    "faster cache": faster_cache,
    "taylor seer": lambda _: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
}


@pytest.mark.parametrize("cache", CACHES)
def test_caches_skip_what_is_left_of_the_model(cache):
    pruned = Pruned("flux")
    plain, calls = pruned.latents(4), []
    last = pruned.model.transformer_blocks[1].attn.to_q
    handle = last.register_forward_hook(lambda *_: calls.append(1))
    pruned.model.enable_cache(CACHES[cache](pruned.pipe))
    cached = pruned.latents(4)
    assert torch.isfinite(cached).all() and not torch.equal(cached, plain) and 0 < len(calls) < 4
    handle.remove()
    pruned.model.disable_cache()
    assert torch.equal(pruned.latents(4), plain)


def test_caches_of_whole_blocks_refuse_stand_ins_for_blocks():
    pruned = Pruned("flux", ("transformer_blocks.0", "transformer_blocks.1.ff_context"))
    with pytest.raises(ValueError, match=r"StandIn.*not registered"):
        pruned.model.enable_cache(FirstBlockCacheConfig(threshold=0.1))
