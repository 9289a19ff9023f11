"""A pruned U-Net and a pruned MMDiT behave like any diffusers model: saved, copied, trained, adapted, offloaded, compiled."""

from __future__ import annotations

import copy
import pickle

import families
import pytest
import torch
from diffusers import AutoModel, AutoPipelineForImage2Image
from diffusers.hooks import apply_group_offloading
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

import ld_pruner_hf
from ld_pruner_hf import Modification, PruningPlan, plan_of
from ld_pruner_hf.latents import preserved, record_call
from ld_pruner_hf.operators import steps_argument_if_any
from ld_pruner_hf.profiling import run
from ld_pruner_hf.surgery import architecture_of

PATHS = {
    "sd": ["mid_block.attentions.0", "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "up_blocks.1.resnets.0"],
    "sd3": ["transformer_blocks.0.attn", "transformer_blocks.1.ff", "transformer_blocks.0.norm2"],
}


class Pruned:
    """A pruned tiny pipeline with its denoiser and the arguments of one call of it."""

    def __init__(self, name: str) -> None:
        self.pipe, self.call = families.make(name)
        operators = {
            o.path: o for o in ld_pruner_hf.find_operators(self.pipe, latency=False, progress=False, **self.call)
        }
        self.component = "unet" if name == "sd" else "transformer"
        chosen = [Modification(p, operators[p].kind, operators[p].stand_ins[0]) for p in PATHS[name]]
        plan = PruningPlan(self.component, type(self.model).__name__, architecture_of(self.model), tuple(chosen))
        self.pipe.prune(plan, **self.call)
        with preserved(self.pipe):
            self.model_call = record_call(self.pipe, self.component, {**self.call, **steps_argument_if_any(self.pipe)})

    @property
    def model(self):
        return getattr(self.pipe, self.component)

    @torch.no_grad()
    def output(self, model=None) -> torch.Tensor:
        return run(self.model if model is None else model, self.model_call)[0]

    def same(self, model) -> bool:
        return torch.equal(self.output(), self.output(model))


@pytest.fixture(params=PATHS)
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


def test_lora_is_trained_saved_loaded_and_fused(pruned):
    before = pruned.output()
    targets = ["to_q", "to_k"]
    pruned.model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    run(pruned.model, pruned.model_call)[0].square().mean().backward()
    trained = {n for n, p in pruned.model.named_parameters() if p.requires_grad}
    assert trained and all(p.grad is not None for p in pruned.model.parameters() if p.requires_grad)
    assert not any(n.startswith(PATHS["sd3" if pruned.component == "transformer" else "sd"][0] + ".") for n in trained)
    adapted = pruned.output()
    assert not torch.equal(before, adapted)
    assert len(get_peft_model_state_dict(pruned.model)) == len(trained)
    pruned.model.fuse_lora()
    torch.testing.assert_close(pruned.output(), adapted, rtol=1e-3, atol=1e-4)


def test_group_offload(pruned):
    before = pruned.output()
    cpu = torch.device("cpu")
    apply_group_offloading(pruned.model, onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
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


WITHOUT_PLUGIN = """
import sys
import torch
from diffusers import AutoModel, DiffusionPipeline, SD3Transformer2DModel
from safetensors.torch import load_file
assert "ld_pruner_hf" not in sys.modules
folder = sys.argv[1]
model = folder + "/transformer"
refused = 0
for load, where in ((DiffusionPipeline, folder), (SD3Transformer2DModel, model), (AutoModel, model)):
    for low_memory in (True, False):
        try:
            load.from_pretrained(where, low_cpu_mem_usage=low_memory)
        except Exception as error:
            assert "pip install ld_pruner_hf" in str(error), repr(error)
            refused += 1
built = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(model))
try:
    built.load_state_dict(load_file(model + "/diffusion_pytorch_model.safetensors"))
except RuntimeError as error:
    assert "Missing key" in str(error)
    refused += 1
print("refused", refused)
"""


def test_an_mmdit_is_refused_without_the_plug_in(python, tmp_path):
    Pruned("sd3").pipe.save_pretrained(tmp_path)
    assert python(WITHOUT_PLUGIN, tmp_path).stdout.strip().endswith("refused 7")


def test_compiled_models_have_no_graph_breaks():
    pruned = Pruned("sd3")
    compiled = torch.compile(pruned.model, backend="eager", fullgraph=True)
    torch.testing.assert_close(pruned.output(compiled), pruned.output())
    with pytest.raises(ValueError, match="unwrap it first"):
        ld_pruner_hf.find_operators(compiled, pruned.model_call)
