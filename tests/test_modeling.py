"""A pruned model saves, loads and copies like any other, and is never loaded with weights that are not its own."""

from __future__ import annotations

import copy
import functools
import json
import pickle

import pytest
import tiny
import torch
from diffusers import AutoModel, DiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ld_pruner_hf
from ld_pruner_hf import Modification, OutputRule, PlanError, PruningPlan, StandInSpec, plan_of
from ld_pruner_hf.modeling import GUARD_KEY, PLAN_KEY, kept_share, prune_
from ld_pruner_hf.replacements import StandIn
from ld_pruner_hf.surgery import architecture_of, count_params


@functools.cache
def all_operators() -> list[ld_pruner_hf.Operator]:
    return ld_pruner_hf.find_operators(tiny.unet(), tiny.unet_call(), latency=False, progress=False)


PATHS = [  # identity, zero, 1x1 convolution, pooling, upscaling
    ("mid_block", 0),
    ("down_blocks.0.attentions.0.transformer_blocks.0.attn1", 1),
    ("up_blocks.1.resnets.0", 0),
    ("down_blocks.0.downsamplers.0", 0),
    ("up_blocks.0.upsamplers.0", 0),
]
WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_plan(operators, chosen=PATHS, component="unet") -> PruningPlan:
    by_path = {o.path: o for o in operators}
    modifications = tuple(Modification(p, by_path[p].kind, by_path[p].stand_ins[i]) for p, i in chosen)
    return PruningPlan(
        component, "UNet2DConditionModel", architecture_of(tiny.unet()), modifications, how={"k": len(chosen)}
    )


@pytest.fixture
def pruned(unet, operators):
    """The tiny U-Net with one stand-in of each sort, whose convolution is not as it was made."""
    prune_(unet, make_plan(operators))
    torch.manual_seed(3)
    for module in unet.modules():
        if isinstance(module, StandIn):
            for p in module.parameters():
                torch.nn.init.normal_(p, std=0.1)
    return unet


@pytest.fixture
def folder(pruned, tmp_path):
    pruned.save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def same(a, b, call=None) -> bool:
    call = call or tiny.unet_call((7, 9))
    return torch.equal(tiny.output(a, call), tiny.output(b, call))


# ---- pruning -------------------------------------------------------------------------------------------------------


def test_the_plan_is_in_the_config(unet, operators):
    before = count_params(unet)
    done = prune_(unet, make_plan(operators))
    assert plan_of(unet) == done and done.paths == [p for p, _ in PATHS]
    assert count_params(unet) == before - done.params_removed and done.params_before == before
    assert kept_share(unet) == count_params(unet) / before < 1
    assert plan_of(tiny.unet()) is None and kept_share(tiny.unet()) == 1


def test_a_model_without_a_config_keeps_its_plan_too():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU())
    identity = Modification("0", "Linear", StandInSpec((OutputRule("input", 0, "identity"),)))
    done = prune_(model, PruningPlan("", "Sequential", architecture_of(model), (identity,)))
    assert plan_of(model) == done and plan_of(copy.deepcopy(model)) == done


def test_a_plan_of_another_architecture_changes_nothing(operators):
    other = tiny.unet(layers_per_block=2)
    config = dict(other.config)
    with pytest.raises(PlanError, match="was made for UNet2DConditionModel with architecture"):
        prune_(other, make_plan(operators))
    assert dict(other.config) == config and not any(isinstance(m, StandIn) for m in other.modules())


def test_pruning_again_keeps_one_plan_for_the_stock_model(unet, operators, tmp_path):
    """Operators taken out before, inside a block that goes now, count as removed with the block."""
    before = count_params(unet)
    prune_(
        unet, make_plan(operators, [("mid_block.resnets.0", 0), ("conv_act", 0), ("down_blocks.0.downsamplers.0", 0)])
    )
    found = ld_pruner_hf.find_operators(unet, tiny.unet_call(), latency=False, progress=False)
    block = next(o for o in found if o.path == "mid_block")
    second = PruningPlan(
        "unet",
        "UNet2DConditionModel",
        architecture_of(unet),
        (Modification("mid_block", block.kind, block.stand_ins[0]),),
    )
    prune_(unet, second)
    merged = plan_of(unet)
    assert sorted(merged.paths) == ["conv_act", "down_blocks.0.downsamplers.0", "mid_block"]
    assert merged.architecture == architecture_of(tiny.unet())
    assert merged.params_before == before and count_params(unet) == before - merged.params_removed
    unet.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert same(unet, loaded) and plan_of(loaded).params_removed == merged.params_removed


# ---- saving and loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low_memory", [True, False])
def test_round_trip(pruned, folder, low_memory):
    loaded = UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=low_memory)
    assert same(pruned, loaded)
    assert plan_of(loaded) == plan_of(pruned) and not loaded.training
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in pruned.named_parameters()}


def test_a_loaded_model_is_saved_as_it_was(folder, tmp_path):
    UNet2DConditionModel.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    old, new = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert {k: v for k, v in old.items() if k != "_name_or_path"} == {
        k: v for k, v in new.items() if k != "_name_or_path"
    }


def test_sharded(pruned, tmp_path):
    pruned.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for low_memory in (True, False):
        assert same(pruned, UNet2DConditionModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_memory))


def test_half_precision_variant(pruned, tmp_path):
    half = pruned.half()
    half.save_pretrained(tmp_path, variant="fp16")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    state = loaded.state_dict()
    assert state.keys() == half.state_dict().keys()
    assert all(v.dtype == torch.float16 and torch.equal(v, state[k]) for k, v in half.state_dict().items())
    assert (
        UNet2DConditionModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float32).dtype
        == torch.float32
    )


def test_subfolder_and_auto_model(pruned, folder):
    assert same(pruned, UNet2DConditionModel.from_pretrained(folder.parent, subfolder="unet"))
    assert same(pruned, AutoModel.from_pretrained(str(folder)))


def test_loading_info_is_returned_when_asked_for(folder):
    model, info = UNet2DConditionModel.from_pretrained(folder, output_loading_info=True)
    assert plan_of(model) and info["missing_keys"] == [] == info["unexpected_keys"]


@pytest.mark.parametrize("source", ["config", "folder", "dict"])
def test_from_config_builds_the_pruned_architecture(pruned, folder, source):
    config = {"config": pruned.config, "folder": str(folder), "dict": dict(UNet2DConditionModel.load_config(folder))}[
        source
    ]
    built = UNet2DConditionModel.from_config(config)
    assert architecture_of(built) == architecture_of(pruned) and plan_of(built) == plan_of(pruned)
    built.load_state_dict(pruned.state_dict())
    assert same(built, pruned)


def test_ema_model_round_trip(pruned, tmp_path):
    ema = EMAModel(pruned.parameters(), model_cls=UNet2DConditionModel, model_config=pruned.config)
    ema.save_pretrained(tmp_path)
    loaded = EMAModel.from_pretrained(tmp_path, UNet2DConditionModel)
    assert all(torch.equal(a, b) for a, b in zip(ema.shadow_params, loaded.shadow_params, strict=True))
    assert same(pruned, UNet2DConditionModel.from_pretrained(tmp_path))


def test_deepcopy_and_pickle(pruned):
    for clone in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert same(pruned, clone) and plan_of(clone) == plan_of(pruned)
        clone.conv_in.weight.data.zero_()
        assert not same(pruned, clone)


def test_an_unpruned_model_loads_as_ever(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    loaded, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert same(unet, loaded) and plan_of(loaded) is None and not info["missing_keys"]
    assert PLAN_KEY not in loaded.config and GUARD_KEY not in loaded.config


def test_installing_twice_wraps_once():
    before = UNet2DConditionModel.from_pretrained.__func__
    ld_pruner_hf.modeling.install()
    assert UNet2DConditionModel.from_pretrained.__func__ is before


# ---- never with weights that are not its own -----------------------------------------------------------------------


def damage(folder, what: str) -> None:
    weights, config = load_file(folder / WEIGHTS), json.loads((folder / "config.json").read_text())
    modifications = config[PLAN_KEY]["modifications"]
    if what == "a weight is missing":
        del weights["conv_in.weight"]
    elif what == "a stand-in's weight is missing":
        del weights["up_blocks.1.resnets.0.adapters.0.weight"]
    elif what == "a weight is too much":
        weights["mid_block.extra"] = torch.zeros(3)
    elif what == "a weight has another shape":
        weights["conv_in.weight"] = weights["conv_in.weight"][:, :3].contiguous()
    elif what == "the plan has one entry less":
        del modifications[0]
    elif what == "the plan has one entry more":
        modifications.append({**modifications[0], "path": "down_blocks.1.resnets.0"})
    elif what == "the plan's path is none":
        modifications[0]["path"] = "mid_block; import os"
    elif what == "the plan's rule is none":
        modifications[0]["stand_in"]["rules"][0]["rule"] = "eval"
    elif what == "the plan is of a newer version":
        config[PLAN_KEY]["version"] = 99
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES = {
    "a weight is missing": "do not fit the plan",
    "a stand-in's weight is missing": "do not fit the plan",
    "a weight is too much": "do not fit the plan",
    "a weight has another shape": "conv_in.weight|size mismatch",
    "the plan has one entry less": "do not fit the plan",
    "the plan has one entry more": "do not fit the plan",
    "the plan's path is none": "expected a dotted module path",
    "the plan's rule is none": "stand-in rule: got 'eval'",
    "the plan is of a newer version": "upgrade it",
}


@pytest.mark.parametrize("low_memory", [True, False])
@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_folders_are_refused(folder, what, low_memory):
    damage(folder, what)
    with pytest.raises((PlanError, ValueError, RuntimeError), match=DAMAGES[what]) as caught:
        UNet2DConditionModel.from_pretrained(folder, low_cpu_mem_usage=low_memory)
    assert what == "a weight has another shape" or caught.type is PlanError


WITHOUT_PLUGIN = """
import sys, warnings
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
assert "ld_pruner_hf" not in sys.modules
folder = sys.argv[1]
for load, where in ((DiffusionPipeline, folder), (StableDiffusionPipeline, folder), (UNet2DConditionModel, folder + "/unet")):
    for low_memory in (True, False):
        try:
            load.from_pretrained(where, low_cpu_mem_usage=low_memory)
        except Exception as error:
            assert "pip install ld_pruner_hf" in str(error) and "import ld_pruner_hf" in str(error), repr(error)
        else:
            sys.exit(f"{load.__name__} loaded a pruned model without the plug-in")
print("refused 6 times")
"""

FRESH = """
import sys, torch, ld_pruner_hf
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
torch.set_num_threads(1)
folder = sys.argv[1]
expected = load_file(folder + "/expected.safetensors")
pipe = DiffusionPipeline.from_pretrained(folder + "/pipe")
pipe.set_progress_bar_config(disable=True)
call = dict(num_inference_steps=3, output_type="latent")
latents = pipe(["red heart", "pizza"], generator=torch.Generator().manual_seed(5), **call).images
assert torch.equal(latents, expected["latents"]), (latents - expected["latents"]).abs().max()
unet = UNet2DConditionModel.from_pretrained(folder + "/pipe/unet")
assert all(torch.equal(v, unet.state_dict()[k]) for k, v in pipe.unet.state_dict().items())
assert ld_pruner_hf.plan_of(unet).paths == ld_pruner_hf.plan_of(pipe.unet).paths
print("equal, paths", len(ld_pruner_hf.plan_of(unet)))
"""


@pytest.fixture
def pruned_pipe(pipe, pruned):
    pipe.unet = pruned
    return pipe


def test_a_fresh_process_gives_equal_latents(pruned_pipe, python, tmp_path):
    generator = torch.Generator().manual_seed(5)
    latents = pruned_pipe(
        ["red heart", "pizza"], generator=generator, num_inference_steps=3, output_type="latent"
    ).images
    save_file({"latents": latents}, tmp_path / "expected.safetensors")
    pruned_pipe.save_pretrained(tmp_path / "pipe")
    assert python(FRESH, tmp_path).stdout.strip() == f"equal, paths {len(PATHS)}"


def test_without_the_plug_in_loading_fails_and_names_it(pruned_pipe, python, tmp_path):
    pruned_pipe.save_pretrained(tmp_path)
    assert "refused 6 times" in python(WITHOUT_PLUGIN, tmp_path).stdout


def test_a_damaged_pipeline_folder_is_refused_as_well(pruned_pipe, tmp_path):
    pruned_pipe.save_pretrained(tmp_path)
    damage(tmp_path / "unet", "a weight is missing")
    with pytest.raises(PlanError, match="do not fit the plan"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_weights_mapped_from_a_file_are_aligned(unet, operators, tmp_path):
    """At odd addresses kernels round differently: what is pruned, saved and loaded again must not depend on the file."""
    unet.save_pretrained(tmp_path / "stock")
    model = UNet2DConditionModel.from_pretrained(tmp_path / "stock")
    prune_(model, make_plan(operators, [("conv_act", 0)]))
    model.save_pretrained(tmp_path / "pruned")
    for m in (model, UNet2DConditionModel.from_pretrained(tmp_path / "pruned")):
        assert {p.data_ptr() % 64 for p in m.parameters()} == {0}


# ---- any subset ----------------------------------------------------------------------------------------------------


@settings(max_examples=20, derandomize=True, deadline=None)
@given(data=st.data())
def test_any_subset_of_candidates_runs_saves_and_loads(tmp_path_factory, data):
    operators = all_operators()
    candidates = [o for o in operators if o.is_candidate]
    order = data.draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=40, unique_by=lambda o: o.path))
    chosen: list[tuple[str, int]] = []
    for o in order:
        if not any(ld_pruner_hf.plan.is_inside(*pair) for p, _ in chosen for pair in ((o.path, p), (p, o.path))):
            chosen.append((o.path, data.draw(st.integers(0, len(o.stand_ins) - 1))))
    model = tiny.unet()
    before = count_params(model)
    done = prune_(model, make_plan(operators, chosen))
    assert len(done) == len(chosen) and count_params(model) == before - done.params_removed
    folder = tmp_path_factory.mktemp("subset")
    model.save_pretrained(folder)
    loaded = UNet2DConditionModel.from_pretrained(folder)
    for call in (tiny.unet_call(), tiny.unet_call((7, 9), batch=1)):
        out = tiny.output(model, call)
        assert out.shape == call["sample"].shape and torch.isfinite(out).all()
        assert same(model, loaded, call)
