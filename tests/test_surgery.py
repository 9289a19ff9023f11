"""Replacing modules: exact, under every name, and undone on any exit."""

from __future__ import annotations

import pytest
import tiny
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from peft import LoraConfig
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ld_pruner_hf import Modification, OutputRule, PlanError, PruningPlan, StandInSpec, applied, apply_plan_
from ld_pruner_hf.replacements import StandIn
from ld_pruner_hf.surgery import architecture_of, check_replaceable, count_params, refuse_wrapped, weights_of

IDENTITY = StandInSpec((OutputRule("input", 0, "identity"),))
CONV = StandInSpec((OutputRule("input", 0, "adapt", (), 1, 4, 6),))


class Shared(nn.Module):
    """One convolution under two names, and one that another module holds too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1)
        self.again = self.first
        self.inner = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.SiLU())

    def forward(self, x):
        return self.inner(self.again(self.first(x)))


def modification(path: str, spec: StandInSpec = IDENTITY) -> Modification:
    return Modification(path, "Conv2d", spec)


def plan_for(model: nn.Module, *modifications: Modification) -> PruningPlan:
    return PruningPlan("", type(model).__name__, architecture_of(model), modifications)


def modules(model: nn.Module) -> list[tuple[str, int]]:
    return [(name, id(m)) for name, m in model.named_modules(remove_duplicate=False)]


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_applied_is_undone_on_any_exit(error):
    model = Shared()
    before = modules(model)
    try:
        with applied(model, [modification("first"), modification("inner.0", CONV)]) as stand_ins:
            assert isinstance(model.first, StandIn) and model.inner[0] is stand_ins["inner.0"]
            assert model(torch.randn(1, 4, 5, 5)).shape == (1, 6, 5, 5)
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert modules(model) == before


def test_a_shared_module_is_replaced_under_every_name():
    model = Shared()
    with applied(model, [modification("first")]):
        assert model.first is model.again and isinstance(model.again, StandIn)
        x = torch.randn(1, 4, 5, 5)
        assert torch.equal(model(x), model.inner(x))
    assert isinstance(model.again, nn.Conv2d)


def test_an_unknown_path_changes_nothing():
    model = Shared()
    before = modules(model)
    with (
        pytest.raises(PlanError, match=r"Shared has no module 'second' .*another architecture"),
        applied(model, [modification("first"), modification("second")]),
    ):
        pass
    assert modules(model) == before


def test_stand_ins_follow_device_dtype_and_mode():
    model = Shared().to(torch.bfloat16).eval()
    with applied(model, [modification("inner.0", CONV)]) as stand_ins:
        assert {p.dtype for p in stand_ins["inner.0"].parameters()} == {torch.bfloat16}
        assert not stand_ins["inner.0"].training
    with applied(Shared().to("meta").train(), [modification("inner.0", CONV)]) as stand_ins:
        assert {p.device.type for p in stand_ins["inner.0"].parameters()} == {"meta"}
        assert stand_ins["inner.0"].training


def test_apply_plan_counts_what_it_removes():
    model = Shared()
    before = count_params(model)
    done = apply_plan_(model, plan_for(model, modification("first"), modification("inner.0", CONV)))
    conv, stand_in = 4 * 6 * 9 + 6, 4 * 6 + 6
    assert [m.params_removed for m in done] == [4 * 4 * 9 + 4, conv - stand_in]
    assert count_params(model) == before - done.params_removed and done.params_before == before


@pytest.mark.parametrize("case", ["empty", "architecture", "path"])
def test_a_plan_that_does_not_fit_leaves_the_model_alone(case):
    model = Shared()
    before = modules(model)
    plan = {
        "empty": plan_for(model),
        "architecture": plan_for(nn.Linear(2, 2), modification("first")),
        "path": plan_for(model, modification("first"), modification("nowhere")),
    }[case]
    expected = {
        "empty": "lists no modification",
        "architecture": "was made for Linear",
        "path": "has no module 'nowhere'",
    }[case]
    with pytest.raises(PlanError, match=expected):
        apply_plan_(model, plan)
    assert modules(model) == before


def test_wrapped_models_are_refused():
    compiled = torch.compile(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="unwrap it first"):
        refuse_wrapped(compiled)
    with pytest.raises(ValueError, match="unwrap it first"), applied(compiled, []):
        pass


class Packed(nn.Parameter):
    """Stands for the weights of bitsandbytes, GGUF, quanto and torchao: parameters of a class of their own."""


def packed(model: nn.Module) -> None:
    model.mid_block.resnets[0].conv1.weight = Packed(torch.zeros(8, 8))


def integers(model: nn.Module) -> None:
    model.conv_in.weight = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)


CHANGES = {
    "packed weights": (packed, r"UNet2DConditionModel.mid_block.resnets.0.conv1 has its weight as a Packed of torch.float32.*then quantize"),
    "integer weights": (integers, r"conv_in has its weight as a Parameter of torch.uint8.*load the model in float16 or bfloat16"),
    "group offload": (lambda m: apply_group_offloading(m, torch.device("cpu"), offload_type="leaf_level"), "group_offloading.*prune first"),
    "layerwise casting": (lambda m: apply_layerwise_casting(m, torch.float8_e4m3fn, torch.float32), "layerwise_casting.*prune first"),
    "sequential offload": (lambda m: cpu_offload(m, torch.device("cpu")), r"AlignDevicesHook.*pipe.remove_all_hooks\(\)"),
    "compiled in place": (lambda m: m.compile(), "UNet2DConditionModel is compiled.*then compile"),
    "compiled block": (lambda m: m.mid_block.compile(), "UNet2DConditionModel.mid_block is compiled"),
    "adapters": (lambda m: m.add_adapter(LoraConfig(r=2, target_modules=["to_q"])), r"has adapters \(default\).*unload or fuse"),
    "fused projections": (lambda m: m.fuse_qkv_projections(), "has fused projections.*then fuse_qkv_projections"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_models_whose_modules_cannot_be_replaced_are_refused(change, scores):
    pipe = tiny.stable_diffusion()
    plan = plan_for(pipe.unet, modification("conv_act"))
    make, message = CHANGES[change]
    make(pipe.unet)
    before = modules(pipe.unet)
    for refused in (
        lambda: pipe.score("red heart", num_inference_steps=1),
        lambda: pipe.prune(plan),
        lambda: pipe.prune(2, scores=scores),
        lambda: pipe.prune("bk-sdm-base"),
        lambda: apply_plan_(pipe.unet, plan),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    assert modules(pipe.unet) == before


def test_a_denoiser_inside_ddp_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        pipe = tiny.stable_diffusion()
        pipe.unet = DistributedDataParallel(pipe.unet)
        with pytest.raises(ValueError, match=r"got a DistributedDataParallel.*unwrap it first"):
            pipe.score("red heart", num_inference_steps=1)
        with pytest.raises(ValueError, match=r"got a DistributedDataParallel.*unwrap it first"):
            pipe.prune(2, prompt="red heart")
    finally:
        torch.distributed.destroy_process_group()


def test_plain_models_pass():
    for model in (tiny.unet(), tiny.unet().half().to("meta"), nn.Sequential(nn.Linear(2, 2), nn.ReLU())):
        check_replaceable(model)


def test_fingerprints():
    a, b = tiny.unet(0), tiny.unet(1)
    assert architecture_of(a) == architecture_of(b) == architecture_of(tiny.unet(0).half())
    assert architecture_of(a) != architecture_of(tiny.unet(layers_per_block=2))
    assert weights_of(a) == weights_of(tiny.unet(0)) != weights_of(b)
    with torch.no_grad():
        b.load_state_dict(a.state_dict())
        b.conv_in.bias += 1
    assert weights_of(a) != weights_of(b)
    with applied(a, [modification("conv_act")]):
        unchanged = architecture_of(a)
    assert unchanged == architecture_of(b), "operators without parameters are no part of the architecture"
