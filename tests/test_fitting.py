"""Fitted stand-ins: exact where the operator is linear, better than unfitted ones on a real pipeline."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ld_pruner_hf import (
    Modification,
    OutputRule,
    PlanError,
    PruningPlan,
    StandInSpec,
    demo,
    find_operators,
    fit_stand_ins,
)
from ld_pruner_hf.fitting import ChannelFit, LinearFit
from ld_pruner_hf.latents import RecordedCall, final_latents, preserved
from ld_pruner_hf.modeling import prune_


class Net(nn.Module):
    """One operator, so that its stand-in's output is the net's."""

    def __init__(self, operator: nn.Module) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.operator(x)


class Linear2d(nn.Module):
    """A 1x1 convolution, and pooling before or nearest upscaling behind it."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.conv, self.factor = nn.Conv2d(6, 4, 1), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.factor < 0:
            return self.conv(F.avg_pool2d(x, -self.factor))
        return F.interpolate(self.conv(x), scale_factor=float(self.factor), mode="nearest")


def plan_for(rule: OutputRule) -> PruningPlan:
    return PruningPlan("", "Net", "", (Modification("operator", "Op", StandInSpec((rule,))),))


def calls(*shape: int, n: int = 4) -> list[RecordedCall]:
    generator = torch.Generator().manual_seed(1)
    return [RecordedCall((torch.randn(*shape, generator=generator) + 1,), {}) for _ in range(n)]


@pytest.mark.parametrize("factor", [-2, 1, 2])
def test_a_linear_operator_is_recovered_exactly(factor):
    torch.manual_seed(0)
    model = Net(Linear2d(factor)).eval()
    data = calls(2, 6, 8, 8)
    rule = OutputRule("x", 0, "adapt", (), 1, 6, 4, (factor, factor) if factor != 1 else ())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fit = fit_stand_ins(model, plan_for(rule), calls=data, ridge=0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model is not changed"
    weights = fit.weights["operator"]
    torch.testing.assert_close(
        weights["adapters.0.weight"], model.operator.conv.weight[:, :, 0, 0].detach(), atol=1e-6, rtol=1e-6
    )
    torch.testing.assert_close(weights["adapters.0.bias"], model.operator.conv.bias.detach(), atol=1e-6, rtol=1e-6)
    assert fit.errors["operator"][0] > 0.1 and fit.errors["operator"][1] < 1e-10
    expected = model(*data[0].args)
    prune_(model, fit.plan)
    assert not torch.allclose(model(*data[0].args), expected)
    fit.load_(model)
    torch.testing.assert_close(model(*data[0].args), expected, atol=1e-5, rtol=1e-5)


def test_tokens():
    torch.manual_seed(0)
    model = Net(nn.Linear(6, 3)).eval()
    fit = fit_stand_ins(model, plan_for(OutputRule("x", 0, "adapt", (), 2, 6, 3)), calls=calls(2, 5, 6), ridge=0)
    torch.testing.assert_close(
        fit.weights["operator"]["adapters.0.weight"], model.operator.weight.detach(), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("rule", ["identity", "zero"])
def test_affine_maps_recover_scale_and_shift(rule):
    class Scale(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * torch.arange(1.0, 7.0).view(1, 6, 1, 1) - 3

    model, data = Net(Scale()), calls(2, 6, 4, 4)
    plan = plan_for(OutputRule("x", 0, rule, (), 1, 6, 6))
    assert fit_stand_ins(model, plan, calls=data).weights == {}, "only if asked for"
    fit = fit_stand_ins(model, plan, calls=data, affine=True, ridge=0)
    assert PruningPlan.from_dict(fit.plan.to_dict()).modifications == fit.plan.modifications
    expected = model(*data[0].args)
    prune_(model, fit.plan)
    fit.load_(model)
    torch.testing.assert_close(model(*data[0].args), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.operator.adapters["0"].weight.detach(), torch.arange(1.0, 7.0))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.sampled_from([0.0, 1e-3, 1.0]))
def test_the_solution_is_the_minimum_and_the_sums_give_its_error(seed, n, ridge):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, c, generator=generator, dtype=torch.float64) for c in (5, 3))
    start = torch.eye(3, 5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    fit = LinearFit(5, 3)
    for part in torch.arange(n).split(7):  # streamed in parts
        fit.add(x[part], y[part])
    weight, bias = fit.solve(ridge, *start)
    penalty = ridge * x.square().sum(0).mean()

    def loss(w: torch.Tensor, b: torch.Tensor) -> float:
        return ((y - x @ w.T - b).square().sum() + penalty * (w - start[0]).square().sum()).item()

    for _ in range(20):
        noise = [1e-2 * torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (weight, bias)]
        assert loss(weight, bias) <= loss(weight + noise[0], bias + noise[1]) + 1e-9
    direct = ((y - x @ weight.T - bias).square().sum() / y.square().sum()).item()
    assert fit.error(weight, bias) == pytest.approx(direct, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 40), st.sampled_from([0.0, 1e-3, 1.0]))
def test_channel_fits_are_minima(seed, n, ridge):
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    fit = ChannelFit(4)
    fit.add(x[:1], y[:1])
    fit.add(x[1:], y[1:])
    weight, bias = fit.solve(ridge, torch.ones(4), torch.zeros(4))
    penalty = ridge * x.square().sum(0).mean()

    def loss(w: torch.Tensor, b: torch.Tensor) -> float:
        return ((y - x * w - b).square().sum() + penalty * (w - 1).square().sum()).item()

    for _ in range(20):
        noise = [1e-2 * torch.randn(4, generator=generator, dtype=torch.float64) for _ in range(2)]
        assert loss(weight, bias) <= loss(weight + noise[0], bias + noise[1]) + 1e-9
    assert fit.error(weight, bias) == pytest.approx(
        ((y - x * weight - bias).square().sum() / y.square().sum()).item(), abs=1e-9
    )


def test_inputs_that_depend_on_each_other_and_dead_channels_do_no_harm():
    x = torch.randn(50, 2).repeat(1, 2)
    x = torch.cat([x, torch.zeros(50, 1)], dim=1)
    fit = LinearFit(5, 2)
    fit.add(x, x[:, :2] * 3)
    weight, bias = fit.solve(0.0, torch.zeros(2, 5), torch.zeros(2))
    assert torch.isfinite(weight).all() and weight.abs().max() < 10
    torch.testing.assert_close(x.double() @ weight.T + bias, x[:, :2].double() * 3, atol=1e-6, rtol=1e-6)
    dead = ChannelFit(2)
    dead.add(torch.zeros(9, 2), torch.full((9, 2), 2.0))
    weight, bias = dead.solve(0.0, torch.ones(2), torch.zeros(2))
    assert torch.isfinite(weight).all() and torch.equal(bias, torch.full((2,), 2.0, dtype=torch.float64))


def emoji():
    pipe = demo.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


CONVOLUTIONS = ["down_blocks.2.resnets.0", "up_blocks.1.resnets.0", "up_blocks.2.resnets.1"]
CALIBRATION = ["red heart", "evergreen tree", "grinning face", "crescent moon"]


def emoji_plan(paths: list[str]) -> PruningPlan:
    found = find_operators(emoji(), include=paths, trial=False, latency=False, progress=False)
    operators = {o.path: o for o in found}
    mods = tuple(Modification(p, operators[p].kind, operators[p].stand_ins[-1]) for p in paths)
    return PruningPlan("unet", "UNet2DConditionModel", "", mods)


def latents(pipe, prompts, seed=100) -> torch.Tensor:
    with preserved(pipe):
        return final_latents(
            pipe, {"prompt": prompts, "num_inference_steps": 5}, [seed + i for i in range(len(prompts))]
        )


def harm(plan: PruningPlan, prompts, fit=None) -> float:
    """How far the final latents move, on prompts and noise that no fit has seen."""
    pipe = emoji()
    original = latents(pipe, prompts)
    pipe.prune(plan if fit is None else fit.plan)
    if fit is not None:
        fit.load_(pipe.unet)
    return (latents(pipe, prompts) - original).norm().item()


def test_the_same_plan_does_less_harm_on_the_emoji_pipeline(tmp_path):
    prompts = ["cat face", "rocket", "pizza", "blue car"]
    pipe, plan = emoji(), emoji_plan(CONVOLUTIONS)
    weights = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    fit = fit_stand_ins(pipe, plan, CALIBRATION, num_inference_steps=5)
    assert all(torch.equal(v, weights[k]) for k, v in pipe.unet.state_dict().items())
    assert set(fit.weights) == set(CONVOLUTIONS)
    assert all(after < before for before, after in fit.errors.values()), str(fit)
    assert harm(plan, prompts, fit) < 0.7 * harm(plan, prompts)
    pipe.prune(fit.plan)
    fit.load_(pipe.unet)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again, prompts), latents(pipe, prompts))


def test_affine_maps_do_less_harm_than_identities_and_zeros_on_average():
    """Over random plans, not for each: one operator's closer output need not be the pipeline's."""
    prompts = ["cat face", "rocket"]
    pipe = emoji()
    found = find_operators(
        pipe, kinds=["Attention", "FeedForward", "ResnetBlock2D"], trial=False, latency=False, progress=False
    )
    candidates = [o.path for o in found if o.is_candidate and "conv1x1" not in o.stand_ins[-1].name]
    plain, fitted = 0.0, 0.0
    for seed in range(4):
        plan = emoji_plan(random.Random(seed).sample(candidates, 4))
        fit = fit_stand_ins(pipe, plan, CALIBRATION, num_inference_steps=5, affine=True)
        assert set(fit.weights) == set(plan.paths)
        plain, fitted = plain + harm(plan, prompts), fitted + harm(plan, prompts, fit)
    assert fitted < plain, (fitted, plain)


def test_errors():
    pipe, plan = emoji(), emoji_plan(CONVOLUTIONS)
    with pytest.raises(ValueError, match="ridge: got -1"):
        fit_stand_ins(pipe, plan, ridge=-1)
    with pytest.raises(ValueError, match="at least one RecordedCall"):
        fit_stand_ins(pipe.unet, plan)
    with pytest.raises(PlanError, match="has no module"):
        fit_stand_ins(Net(nn.Linear(2, 2)), plan, calls=calls(1, 2))
    fit = fit_stand_ins(pipe, plan, "red heart", num_inference_steps=1)
    with pytest.raises(ValueError, match=r"apply the fit's plan first"):
        fit.load_(pipe.unet)
