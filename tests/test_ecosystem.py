"""A pruned U-Net and a pruned MMDiT behave like any diffusers model: saved, copied, trained, adapted, steered, offloaded, compiled."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import families
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import (
    AutoModel,
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    ControlNetModel,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
)
from diffusers.hooks import apply_group_offloading
from diffusers.models.attention_processor import AttnProcessor, JointAttnProcessor2_0
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pruned import PATHS, Pruned

import ld_pruner_hf
from ld_pruner_hf import Modification, PruningPlan, plan_of
from ld_pruner_hf.profiling import run
from ld_pruner_hf.surgery import architecture_of


@pytest.fixture(params=["sd", "sd3"])
def pruned(request) -> Pruned:
    return Pruned(request.param)


@pytest.mark.parametrize(
    "options", [{"low_cpu_mem_usage": True}, {"low_cpu_mem_usage": False}, {"device_map": "cpu"}], ids=str
)
def test_shards(pruned, tmp_path, options):
    pruned.model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for kind in (type(pruned.model), AutoModel):
        loaded = kind.from_pretrained(str(tmp_path), **options)
        assert pruned.same(loaded) and plan_of(loaded).paths == plan_of(pruned.model).paths


def test_half_precision_variant(pruned, tmp_path):
    pruned.model.half().save_pretrained(tmp_path, variant="fp16")
    state = type(pruned.model).from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16).state_dict()
    assert state.keys() == pruned.model.state_dict().keys()
    for name, value in pruned.model.state_dict().items():
        assert state[name].dtype == torch.float16 and torch.equal(value, state[name])


def test_copies(pruned):
    assert pruned.same(copy.deepcopy(pruned.model))
    assert pruned.same(pickle.loads(pickle.dumps(pruned.model)))


def test_ema(pruned, tmp_path):
    ema = EMAModel(pruned.model.parameters(), model_cls=type(pruned.model), model_config=pruned.model.config)
    ema.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, type(pruned.model))
    assert all(map(torch.equal, ema.shadow_params, loaded.shadow_params))
    assert pruned.same(type(pruned.model).from_pretrained(tmp_path))


def test_image_to_image_shares_the_pruned_model(pruned):
    other = families.tiny.quiet(AutoPipelineForImage2Image.from_pipe(pruned.pipe))
    assert getattr(other, pruned.component) is pruned.model
    size = {} if pruned.component == "unet" else families.SIZE
    call = {k: v for k, v in pruned.call.items() if k not in families.SIZE}
    made = other(image=families.picture(), strength=1.0, num_inference_steps=2, output_type="np", **call, **size)
    assert made.images.shape == (1, 16, 16, 3)


def test_inpainting_shares_the_pruned_model(pruned):
    other = families.tiny.quiet(AutoPipelineForInpainting.from_pipe(pruned.pipe))
    assert getattr(other, pruned.component) is pruned.model
    if pruned.name == "sd":  # that of SD3 demands 16 latent channels, pruned or not
        pictures = {"image": families.picture(), "mask_image": families.mask()}
        made = other(**pictures, **pruned.call, strength=1.0, num_inference_steps=2, output_type="np", **families.SIZE)
        assert made.images.shape == (1, 16, 16, 3)


def test_gradient_checkpointing_gives_the_same_gradients(pruned):
    def gradients() -> dict[str, torch.Tensor]:
        pruned.model.zero_grad()
        run(pruned.model.train(), pruned.model_call)[0].square().mean().backward()
        return {n: p.grad.clone() for n, p in pruned.model.named_parameters() if p.grad is not None}

    plain = gradients()
    pruned.model.enable_gradient_checkpointing()
    again = gradients()
    assert plain and plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


def test_lora_is_trained_saved_loaded_and_fused(pruned, tmp_path):
    before = pruned.output()
    pruned.model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    run(pruned.model, pruned.model_call)[0].square().mean().backward()
    trained = {n: p for n, p in pruned.model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in trained.values())
    assert not any(n.startswith(PATHS[pruned.name][0] + ".") for n in trained)
    adapted = pruned.output()
    assert not torch.equal(before, adapted)
    layers = get_peft_model_state_dict(pruned.model)
    assert len(layers) == len(trained)
    pruned.pipe.save_lora_weights(tmp_path, **{f"{pruned.component}_lora_layers": layers})
    again = Pruned(pruned.name)
    again.pipe.load_lora_weights(tmp_path)
    torch.testing.assert_close(again.output(), adapted)
    again.model.fuse_lora()
    torch.testing.assert_close(again.output(), adapted, rtol=1e-3, atol=1e-4)
    again.pipe.unload_lora_weights()
    torch.testing.assert_close(again.output(), adapted, rtol=1e-3, atol=1e-4)


def test_a_lora_of_the_original_with_a_report_of_what_no_longer_fits(pruned, tmp_path):
    original, _ = families.make(pruned.name)
    model = getattr(original, pruned.component)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    layers = get_peft_model_state_dict(model)
    original.save_lora_weights(tmp_path, **{f"{pruned.component}_lora_layers": layers})
    before = pruned.output()
    fit = ld_pruner_hf.load_lora(pruned.pipe, tmp_path)
    assert fit.gone and all(any(path.startswith(f"{lost}.") for lost in PATHS[pruned.name]) for path in fit.gone)
    assert len(fit.gone) + len(fit.fitting) == len(layers) // 2 and not fit.misshapen
    assert not torch.equal(pruned.output(), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_another_dtype(pruned, dtype):
    before = pruned.output()
    call = pruned.model_call.mapped(lambda t: t.to(dtype) if t.is_floating_point() and t.ndim > 1 else t)
    with torch.no_grad():
        after = run(pruned.model.to(dtype), call)[0]
    assert after.dtype == dtype
    torch.testing.assert_close(after.float(), before, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("offload_type", ["leaf_level", "block_level"])
def test_group_offload(pruned, offload_type):
    before = pruned.output()
    cpu = torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    apply_group_offloading(pruned.model, cpu, cpu, offload_type=offload_type, **blocks)
    assert torch.equal(pruned.output(), before)


def test_model_offload(pruned):
    """Scored, pruned further and run while accelerate moves the whole model, as `pipe.enable_model_cpu_offload()` has it do."""
    before = pruned.output()
    _, hook = cpu_offload_with_hook(pruned.model, torch.device("cpu"))
    assert torch.equal(pruned.output(), before)
    hook.offload()
    scores = pruned.pipe.score(num_inference_steps=1, seeds=1, kinds=["FeedForward"], **pruned.call)
    pruned.pipe.prune(1, scores=scores, **pruned.call)
    assert hasattr(pruned.model, "_hf_hook") and len(plan_of(pruned.model)) == len(PATHS[pruned.name]) + 1
    assert not torch.equal(pruned.output(), before)


def test_sequential_offload(pruned):
    """Every layer's weights are on `meta` but for the moment of its call."""
    before = pruned.output()
    cpu_offload(pruned.model, torch.device("cpu"))
    assert any(p.is_meta for p in pruned.model.parameters())
    assert torch.equal(pruned.output(), before)


def test_pruning_again(pruned, tmp_path):
    """The plan on disk is the two plans as one for the stock model."""
    operators = ld_pruner_hf.find_operators(pruned.pipe, latency=False, progress=False, **pruned.call)
    norm = next(o for o in operators if o.is_candidate and "Norm" in o.kind)
    model = pruned.model
    plan = PruningPlan(
        pruned.component,
        type(model).__name__,
        architecture_of(model),
        (Modification(norm.path, norm.kind, norm.stand_ins[0]),),
    )
    earlier = plan_of(model).paths
    pruned.pipe.prune(plan, **pruned.call)
    assert sorted(plan_of(model).paths) == sorted([*earlier, norm.path])
    model.save_pretrained(tmp_path)
    assert pruned.same(type(model).from_pretrained(tmp_path))


# ---- attention ----------------------------------------------------------------------------------------------------------------

FUSED = {
    "sd": ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k", "mid_block.attentions.0"),
    "sd3": ("transformer_blocks.0.attn.to_v", "transformer_blocks.0.attn.add_q_proj"),
    "flux": ("transformer_blocks.0.attn.to_k", "single_transformer_blocks.0.attn.to_q"),
}


@pytest.mark.parametrize("name", FUSED)
def test_projections_are_fused_where_all_of_them_are_left(name):
    pruned = Pruned(name, FUSED[name])
    before = pruned.output()
    if name == "sd":
        pruned.pipe.fuse_qkv_projections(vae=False)
    else:
        pruned.model.fuse_qkv_projections()
    fused = {p for p, m in pruned.model.named_modules() if hasattr(m, "to_qkv") or hasattr(m, "to_kv")}
    lost = {path.rpartition(".")[0] for path in FUSED[name] if not path.endswith("attentions.0")}
    attentions = {p.removesuffix(".processor") for p in pruned.model.attn_processors}
    assert lost < attentions and fused == attentions - lost
    torch.testing.assert_close(pruned.output(), before)
    pruned.model.unfuse_qkv_projections()
    assert torch.equal(pruned.output(), before)


def test_attention_processors_and_slicing(pruned):
    before, processors = pruned.output(), pruned.model.attn_processors
    assert not any(name.startswith(f"{path}.") for name in processors for path in PATHS[pruned.name])
    pruned.model.set_attn_processor(AttnProcessor() if pruned.name == "sd" else JointAttnProcessor2_0())
    torch.testing.assert_close(pruned.output(), before)
    pruned.model.set_attn_processor(dict(processors))
    assert pruned.model.attn_processors == processors and torch.equal(pruned.output(), before)
    if pruned.name == "sd":  # transformers have no slicing, pruned or not
        pruned.model.set_attention_slice("max")
        torch.testing.assert_close(pruned.output(), before)


def ip_adapter(model, width: int) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of an IP-Adapter for the unpruned `model`, in the original's format, with one picture embedding of 16 values."""
    torch.manual_seed(0)
    tokens = {"proj.weight": torch.randn(4 * width, 16), "proj.bias": torch.randn(4 * width)}
    layers = {}
    joint = hasattr(model, "transformer_blocks")
    names = [n for n in model.attn_processors if n.startswith("transformer_blocks.") or "attn2" in n]
    for i, name in enumerate(names):
        attention = model.get_submodule(name.removesuffix(".processor"))
        for side in ("k", "v"):
            key = f"{i if joint else 2 * i + 1}.to_{side}_ip"
            layers[f"{key}.weight"] = torch.randn(attention.to_q.out_features, width)
            if joint:
                layers[f"{key}.bias"] = torch.randn(attention.to_q.out_features)
    return {
        "image_proj": {**tokens, "norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)},
        "ip_adapter": layers,
    }


IP_ADAPTED = {
    "sd": ("down_blocks.0.attentions.0.transformer_blocks.0.attn2", "up_blocks.1.resnets.0"),
    "flux": ("transformer_blocks.0.attn", "transformer_blocks.1.ff_context"),
}


@pytest.mark.parametrize("low_memory", [True, False])
@pytest.mark.parametrize("name", IP_ADAPTED)
def test_ip_adapter_weights_go_to_the_attentions_they_were_made_for(name, low_memory):
    pruned, (original, _) = Pruned(name, IP_ADAPTED[name]), families.make(name)
    original = getattr(original, pruned.component)
    weights = ip_adapter(original, 32)
    for model in (original, pruned.model):
        model._load_ip_adapter_weights([weights], low_cpu_mem_usage=low_memory)
    expected = dict(original.named_parameters())
    found = {n: p for n, p in pruned.model.named_parameters() if "_ip." in n}
    assert found and len(found) < sum("_ip." in n for n in expected)
    assert all(torch.equal(p, expected[n]) for n, p in found.items())
    picture = [torch.randn(1, 1, 16)]
    others = {"sd": {"guidance_scale": 1.0}, "flux": {"negative_ip_adapter_image_embeds": picture}}[name]
    call = {"ip_adapter_image_embeds": picture, **others}
    with_it = pruned.latents(**call)
    pruned.pipe.set_ip_adapter_scale(0.0)
    without = pruned.latents(**call)
    assert torch.isfinite(with_it).all() and not torch.equal(with_it, without)
    pruned.pipe.unload_ip_adapter()
    torch.testing.assert_close(pruned.latents(guidance_scale=call.get("guidance_scale", 3.5)), without)


def test_an_ip_adapter_is_refused_where_the_positions_are_lost():
    pipe = ld_pruner_hf.demo.load("emoji")
    weights = ip_adapter(pipe.unet, pipe.unet.config.cross_attention_dim)
    pipe.prune("bk-sdm-base")
    with pytest.raises(ValueError, match="by their position in the original"):
        pipe.unet._load_ip_adapter_weights([weights])


# ---- ControlNet and T2I-Adapter ----------------------------------------------------------------------------------------------


def controlled(pipe, component: str):
    if component == "controlnet":
        original = families.make("sd")[0].unet
        net = ControlNetModel.from_unet(original, conditioning_embedding_out_channels=(16, 32)).eval()
        families.wake(SimpleNamespace(components={"controlnet": net}))  # it starts with zeros
        pipe = StableDiffusionControlNetPipeline(**pipe.components, controlnet=net)
        return families.tiny.quiet(pipe), "controlnet_conditioning_scale"
    torch.manual_seed(0)
    adapter = T2IAdapter(in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=2).eval()
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    return families.tiny.quiet(StableDiffusionAdapterPipeline(**parts, adapter=adapter)), "adapter_conditioning_scale"


@pytest.mark.parametrize("component", ["controlnet", "adapter"])
def test_residuals_of_control_models_fit(component):
    pruned = Pruned("sd", (*PATHS["sd"], "down_blocks.0.downsamplers.0", "down_blocks.1.resnets.0"))
    plain = pruned.latents()
    pipe, scale = controlled(pruned.pipe, component)
    assert pipe.unet is pruned.model
    pruned.pipe, pruned.call = pipe, {**pruned.call, "image": families.picture()}
    steered, not_steered = pruned.latents(**{scale: 1.0}), pruned.latents(**{scale: 0.0})
    torch.testing.assert_close(not_steered, plain)
    assert torch.isfinite(steered).all() and not torch.allclose(steered, plain)


def test_a_controlnet_is_made_from_the_original(pruned):
    """A ControlNet copies the U-Net's first half, which the pruned model no longer has as it was: an error, not random weights."""
    if pruned.name == "sd":
        with pytest.raises(RuntimeError, match="Missing key"):
            ControlNetModel.from_unet(pruned.model, conditioning_embedding_out_channels=(16, 32))


# ---- one file -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_memory", [True, False])
def test_a_single_file_with_the_folder_of_its_config(pruned, tmp_path, low_memory):
    pruned.model.save_pretrained(tmp_path)
    file = str(tmp_path / "diffusion_pytorch_model.safetensors")
    loaded = type(pruned.model).from_single_file(file, config=str(tmp_path), low_cpu_mem_usage=low_memory)
    assert pruned.same(loaded) and plan_of(loaded) == plan_of(pruned.model)


# ---- without the plug-in ------------------------------------------------------------------------------------------------------

WITHOUT_PLUGIN = """
import sys
import diffusers
import torch
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file
assert "ld_pruner_hf" not in sys.modules
folder, kind, stock = sys.argv[1], getattr(diffusers, sys.argv[2]), sys.argv[4]
where = f"{folder}/{sys.argv[3]}"
file = where + "/diffusion_pytorch_model.safetensors"
refused = []

def refuses(what, message, load):
    try:
        load()
    except Exception as error:
        assert message in str(error), (what, repr(error))
        refused.append(what)
    else:
        sys.exit(what + " loaded a pruned model without the plug-in")

for low_memory in (True, False):
    options = {"low_cpu_mem_usage": low_memory}
    told = "pip install ld_pruner_hf"
    refuses("pipeline", told, lambda: DiffusionPipeline.from_pretrained(folder, **options))
    refuses("component", told, lambda: kind.from_pretrained(where, **options))
    refuses("AutoModel", told, lambda: AutoModel.from_pretrained(where, **options))
    for config in (where, stock):
        refuses("single file", "", lambda: kind.from_single_file(file, config=config, **options))
built = kind.from_config(kind.load_config(where))
refuses("by hand", "Missing key", lambda: built.load_state_dict(load_file(file)))
unpruned = kind.from_config(kind.load_config(stock))
assert [p.shape for p in built.parameters()] == [p.shape for p in unpruned.parameters()]
print(len(refused), "refused")
"""


def test_without_the_plug_in_nothing_loads_with_weights_that_are_not_its_own(pruned, python, tmp_path):
    """`from_config` alone builds the unpruned model with new weights, as it always does; the weights then do not fit."""
    stock = getattr(families.make(pruned.name)[0], pruned.component)
    stock.save_pretrained(tmp_path / "stock")
    pruned.pipe.save_pretrained(tmp_path / "pruned")
    arguments = tmp_path / "pruned", type(pruned.model).__name__, pruned.component, tmp_path / "stock"
    assert python(WITHOUT_PLUGIN, *arguments).stdout.strip().endswith("11 refused")


@pytest.mark.parametrize("name", ["sd", "sd3"])
def test_compiled_models_have_no_graph_breaks(name):
    pruned = Pruned(name)
    compiled = torch.compile(pruned.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(pruned.output(compiled), pruned.output())
    with pytest.raises(ValueError, match="unwrap it first"):
        ld_pruner_hf.find_operators(compiled, pruned.model_call)
