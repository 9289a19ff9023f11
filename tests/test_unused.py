"""What nothing uses once operators are out goes out too, and no bit of the output changes."""

from __future__ import annotations

from typing import Any

import families
import pipelines_table
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline

import ld_pruner_hf
from ld_pruner_hf import Modification, PruningPlan, unused
from ld_pruner_hf.surgery import applied, architecture_of, count_params
from ld_pruner_hf.unused import unread_modules


def plan_of_zeros(pipe: Any, call: dict[str, Any], component: str, *paths: str) -> PruningPlan:
    """A plan that makes these operators zero, or the identity where nothing is added to their outputs."""
    operators = ld_pruner_hf.find_operators(pipe, latency=False, progress=False, trial=False, **call)
    model = getattr(pipe, component)
    zeros = {o.path: (o.kind, o.stand_ins[-1]) for o in operators if o.is_candidate}
    modifications = tuple(Modification(path, *zeros[path]) for path in paths)
    return PruningPlan(component, type(model).__name__, architecture_of(model), modifications)


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
ZEROS = {
    "sd": ("unet", [f"{BLOCK}.attn2", f"{BLOCK}.ff"], {f"{BLOCK}.norm2": 64, f"{BLOCK}.norm3": 64}),
    "sd3": ("transformer", ["transformer_blocks.0.ff_context"], {"transformer_blocks.0.norm2_context": 0}),
    "pixart": ("transformer", [f"transformer_blocks.{i}.attn2" for i in (0, 1)], {"caption_projection": 1392}),
}


@pytest.mark.parametrize("family", ZEROS)
def test_what_fed_only_removed_operators_goes_too(family, tmp_path):
    component, paths, expected_unused = ZEROS[family]
    pipe, call = families.make(family)
    model = getattr(pipe, component)
    plan = plan_of_zeros(pipe, call, component, *paths)
    before = count_params(model)
    with applied(model, plan):
        expected = pipelines_table.latents(pipe, call)
    done = pipe.prune(plan, **call)
    assert done.paths == paths and {m.path: m.params_removed for m in done.unused} == expected_unused
    assert not [key for key in model.state_dict() if any(key.startswith(f"{path}.") for path in expected_unused)]
    assert count_params(model) == before - done.params_removed
    assert torch.equal(pipelines_table.latents(pipe, call), expected)
    pipe.save_pretrained(tmp_path)
    assert pipelines_table.same(pipelines_table.latents(pipelines_table.load(str(tmp_path)), call), expected)
    done.save(tmp_path / "plan.json")
    other, _ = families.make(family)
    assert other.prune(str(tmp_path / "plan.json"), **call).unused == done.unused
    assert torch.equal(pipelines_table.latents(other, call), expected)


def test_a_stand_in_that_nothing_reads_loses_its_weights(pipe, tmp_path):
    """A feed-forward whose last layer is zero: the 1x1 convolution in place of its first layer has no effect."""
    call = {"prompt": "red heart"}
    first, last = f"{BLOCK}.ff.net.0", f"{BLOCK}.ff.net.2"
    plan = plan_of_zeros(pipe, call, "unet", first, last)
    assert [m.stand_in.name for m in plan] == ["conv1x1", "zero"]
    before = count_params(pipe.unet)
    with applied(pipe.unet, plan):
        expected = pipelines_table.latents(pipe, call)
    done = pipe.prune(plan, **call)
    assert [(m.path, m.stand_in.name) for m in done] == [(first, "zero"), (last, "zero")]
    assert [m.path for m in done.unused] == [f"{BLOCK}.norm3"] and ld_pruner_hf.plan_of(pipe.unet).paths == done.paths
    assert not [key for key in pipe.unet.state_dict() if key.startswith((first, last))]
    assert count_params(pipe.unet) == before - done.params_removed
    assert torch.equal(pipelines_table.latents(pipe, call), expected)
    pipe.save_pretrained(tmp_path)
    again = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert torch.equal(pipelines_table.latents(again, call), expected)


def test_nothing_is_unused_where_all_is_read(pipe):
    call = {"prompt": "red heart"}
    plan = plan_of_zeros(pipe, call, "unet", "mid_block.attentions.0")
    assert not pipe.prune(plan, **call).unused


def test_outputs_that_nothing_reads():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.shape_only, self.inner = (torch.nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.read(x) + torch.zeros_like(self.shape_only(self.inner(x)))

    assert unread_modules(Net(), ld_pruner_hf.operators.recorded({"x": torch.ones(2, 4)})) == {"shape_only", "inner"}


@pytest.mark.parametrize("small", [0, float("inf")], ids=["meta", "real"])
def test_what_computes_on_constants_is_found_on_meta_too(small, monkeypatch):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.constant = torch.nn.Linear(4, 4)

        def forward(self, x):
            return x + torch.zeros_like(self.constant(torch.zeros(4, device=x.device)))

    monkeypatch.setattr(unused, "SMALL", small)
    assert unused.unread_modules(Net(), ld_pruner_hf.operators.recorded({"x": torch.ones(2, 4)})) == {"constant"}


def test_pruned_again(pipe):
    """What was unused is no operator any more, and goes with a block around it."""
    call = {"prompt": "red heart"}
    before = count_params(pipe.unet)
    pipe.prune(plan_of_zeros(pipe, call, "unet", f"{BLOCK}.attn2"), **call)
    assert f"{BLOCK}.norm2" not in {o.path for o in ld_pruner_hf.find_operators(pipe, latency=False, **call)}
    again = plan_of_zeros(pipe, call, "unet", BLOCK.partition(".transformer_blocks")[0])
    pipe.prune(again, **call)
    whole = ld_pruner_hf.plan_of(pipe.unet)
    assert whole is not None and not whole.unused and len(whole) == 1
    assert count_params(pipe.unet) == before - whole.params_removed


def test_a_fitted_zero_reads_its_input(pipe):
    call = {"prompt": "red heart"}
    plan = plan_of_zeros(pipe, call, "unet", f"{BLOCK}.attn2")
    assert not pipe.prune(plan, fit="affine", num_inference_steps=1, **call).unused
    assert isinstance(pipe.unet.get_submodule(f"{BLOCK}.norm2"), torch.nn.LayerNorm)


def test_saved_pipelines_with_unused_operators_load(pipe, tmp_path):
    call = {"prompt": "red heart"}
    pipe.prune(plan_of_zeros(pipe, call, "unet", f"{BLOCK}.attn1"), **call)
    pipe.save_pretrained(tmp_path)
    again = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert ld_pruner_hf.plan_of(again.unet) == ld_pruner_hf.plan_of(pipe.unet)
    assert torch.equal(pipelines_table.latents(again, call), pipelines_table.latents(pipe, call))
