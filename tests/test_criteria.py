"""Criteria other than the paper's: each against its definition computed another way."""

from __future__ import annotations

import pytest
import tiny
import torch

from ld_pruner_hf import OperatorScores, PlanError, make_plan
from ld_pruner_hf.latents import preserved
from ld_pruner_hf.replacements import StandIn
from ld_pruner_hf.scores import MEASURED_ALONE
from ld_pruner_hf.surgery import get_operator
from ld_pruner_hf.trajectory import calibration_set, evenly, output_tensor, record_run

PART = {"num_inference_steps": 3, "include": "mid_block", "seeds": 1}


def by_row(scores: OperatorScores, criterion: str) -> dict[tuple[str, str], float]:
    return {r.key: r.score(criterion) for r in scores}


def moments_of(pipe, prompts=("pizza", "red heart"), size=4):
    conditions = [{"prompt": p, "num_inference_steps": 3} for p in prompts]
    with preserved(pipe):
        return calibration_set(pipe, "unet", conditions, [0], 8, size)


def call(pipe, moment):
    with torch.no_grad():
        return output_tensor(pipe.unet(*moment.call.args, **moment.call.kwargs))


@pytest.mark.parametrize("criterion", MEASURED_ALONE)
def test_each_criterion_scores_every_row_and_leaves_no_trace(pipe, tmp_path, criterion):
    before = tiny.snapshot(pipe)
    path = tmp_path / "scores.jsonl"
    scores = pipe.score(["pizza", "red heart"], criterion=criterion, calibration=4, resume_from=path, **PART)
    assert tiny.differences(before, tiny.snapshot(pipe)) == []
    assert scores.criterion == criterion and scores.criteria == (criterion,)
    assert OperatorScores.load(path) == scores
    assert len(scores.ranked()) > 10 and all(0 <= r.score(criterion) < float("inf") for r in scores)
    assert len(set(by_row(scores, criterion).values())) > 5
    again = pipe.score(["pizza", "red heart"], criterion=criterion, calibration=4, **PART)
    assert by_row(again, criterion) == by_row(scores, criterion)
    with pytest.raises(PlanError, match="made by another run"):
        pipe.score(["pizza", "red heart"], resume_from=path, **PART)


def test_a_plan_by_a_criterion_scores_for_it(pipe):
    plan = pipe.prune(3, criterion="magnitude", conditions="pizza", **PART)
    assert plan.how["criterion"] == "magnitude" and len(plan) == 3


def test_scores_of_another_criterion_are_made_anew(pipe):
    pipe.score("pizza", criterion="random", **PART)
    assert pipe.prune(2).how["criterion"] == "random"
    pipe = tiny.stable_diffusion()
    pipe.score("pizza", criterion="random", **PART)
    assert make_plan(pipe, 2, criterion="magnitude", conditions="pizza", **PART).how["criterion"] == "magnitude"


def test_output_error_by_hand(pipe):
    rows = pipe.score(["pizza", "red heart"], criterion="output-error", calibration=4, kinds="Attention", **PART).rows
    moments = moments_of(pipe)
    for row in rows:
        operator = get_operator(pipe.unet, row.path)
        parent, _, name = row.path.rpartition(".")
        setattr(get_operator(pipe.unet, parent), name, StandIn(row.stand_in))
        errors = [(call(pipe, m) - m.output).square().flatten(1).sum(1) for m in moments]
        setattr(get_operator(pipe.unet, parent), name, operator)
        assert row.output_error == pytest.approx(torch.cat(errors).mean().item(), rel=1e-4)
    assert {r.stand_in.name for r in rows} == {"identity", "zero"} and rows[0].output_error > 0


def test_output_error_of_what_does_nothing_is_zero(pipe):
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv2.weight.zero_()
        pipe.unet.mid_block.resnets[0].conv2.bias.zero_()
    scores = pipe.score("pizza", criterion="output-error", **{**PART, "include": "mid_block.resnets.0.conv2"})
    assert by_row(scores, "output-error")["mid_block.resnets.0.conv2", "zero"] == 0.0


def test_block_influence_by_hand(pipe):
    scores = pipe.score(["pizza", "red heart"], criterion="block-influence", calibration=4, **PART)
    path, moments, seen = "mid_block.resnets.0", moments_of(pipe), []
    handle = pipe.unet.get_submodule(path).register_forward_hook(
        lambda module, args, output: seen.append(1 - torch.cosine_similarity(args[0].flatten(1), output.flatten(1)))
    )
    for m in moments:
        call(pipe, m)
    handle.remove()
    assert by_row(scores, "block-influence")[path, "identity"] == pytest.approx(
        torch.cat(seen).mean().item(), rel=1e-4
    )


def test_block_influence_of_an_identity_is_zero_and_of_a_changed_shape_is_that_of_its_stand_in(pipe):
    scores = pipe.score("pizza", criterion="block-influence", num_inference_steps=1, include="up_blocks.0.resnets.0")
    adapted = [r for r in scores if r.stand_in.name == "conv1x1"]
    assert adapted and all(0 < r.block_influence < 2 for r in adapted)
    with torch.no_grad():
        block = pipe.unet.mid_block.resnets[0]
        block.conv2.weight.zero_()
        block.conv2.bias.zero_()
    scores = pipe.score("pizza", criterion="block-influence", num_inference_steps=1, include="mid_block.resnets.0")
    assert by_row(scores, "block-influence")["mid_block.resnets.0", "identity"] == pytest.approx(0, abs=1e-6)


def test_taylor_is_the_derivative_along_the_weights(pipe):
    """d/ds of the loss with the operator's weights times s, at s = 1, by finite differences in float64."""
    path = "mid_block.attentions.0.transformer_blocks.0.attn1"
    scores = pipe.score(["pizza", "red heart"], criterion="taylor", calibration=4, **PART)
    moments = moments_of(pipe)
    unet, operator = pipe.unet.double(), get_operator(pipe.unet, path)

    def double(value):
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    def loss(scale):
        with torch.no_grad():
            for p in operator.parameters():
                p.mul_(scale)
            total = 0.0
            for m in moments:
                args, kwargs = map(double, m.call.args), {k: double(v) for k, v in m.call.kwargs.items()}
                total += output_tensor(unet(*args, **kwargs)).square().sum().item() / 2
            for p in operator.parameters():
                p.div_(scale)
        return total / sum(len(m.output) for m in moments)

    expected = abs(loss(1.001) - loss(0.999)) / 0.002
    assert by_row(scores, "taylor")[path, "identity"] == pytest.approx(expected, rel=1e-3)


def test_taylor_keeps_flags_and_gradients(pipe):
    pipe.unet.conv_in.requires_grad_(False)
    pipe.unet.conv_out.weight.grad = torch.ones_like(pipe.unet.conv_out.weight)
    pipe.score("pizza", criterion="taylor", **PART)
    assert not pipe.unet.conv_in.weight.requires_grad and pipe.unet.conv_out.weight.requires_grad
    assert pipe.unet.conv_out.weight.grad.eq(1).all() and pipe.unet.conv_in.weight.grad is None


def test_magnitude_is_the_mean_of_the_weights_that_go(pipe):
    values = by_row(pipe.score("pizza", criterion="magnitude", **PART), "magnitude")
    conv = pipe.unet.mid_block.resnets[0].conv1
    weights = torch.cat([conv.weight.flatten(), conv.bias]).abs().mean().item()
    assert values["mid_block.resnets.0.conv1", "identity"] == pytest.approx(weights, rel=1e-5)
    assert values["mid_block.resnets.0.nonlinearity", "identity"] == 0.0


def test_random_depends_on_the_seed_and_not_on_what_else_is_scored(pipe):
    all_of = by_row(pipe.score("pizza", criterion="random", **PART), "random")
    few = by_row(pipe.score("pizza", criterion="random", kinds="Attention", **PART), "random")
    assert few and all(all_of[key] == value for key, value in few.items())
    other = by_row(pipe.score("pizza", criterion="random", seed=1, **PART), "random")
    assert all(other[key] != all_of[key] for key in all_of)


def test_calibration_bounds_the_calls(pipe):
    for size in (1, 4, 64):
        moments = moments_of(pipe, tiny.PROMPTS, size)
        inputs = sum(len(m.output) for m in moments) // 2  # two a latent under guidance
        assert 1 <= inputs <= size + 2, (size, inputs)
    assert inputs == 9  # three prompts at three steps: all there are


def test_moments_are_the_calls_of_the_original_run(pipe):
    with preserved(pipe):
        moments, latents = record_run(pipe, pipe.unet, {"prompt": "pizza", "num_inference_steps": 3}, [0])
    assert len(moments) == 3 and latents.shape == (1, 4, 8, 8)
    assert all(torch.equal(call(pipe, m), m.output) for m in moments)


def test_evenly_takes_both_ends():
    assert evenly(range(10), 4) == [0, 3, 6, 9] and evenly(range(3), 5) == [0, 1, 2] and evenly(range(5), 1) == [0]


def test_the_decoder_has_output_errors_too(pipe):
    scores = pipe.score(
        "pizza", component="vae", criterion="output-error", num_inference_steps=2, include="decoder.mid_block"
    )
    assert scores.component == "vae" and any(r.output_error > 0 for r in scores)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_bad_calibration(pipe, value):
    with pytest.raises(ValueError, match="calibration: got"):
        pipe.score("pizza", criterion="taylor", calibration=value)
