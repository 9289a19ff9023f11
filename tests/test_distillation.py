"""Feature taps found by watching, targets of every kind of process, and the losses."""

from __future__ import annotations

import copy
import weakref

import pytest
import tiny
import torch
import torch.utils.checkpoint
from diffusers import DDIMScheduler, DDPMScheduler, DiTTransformer2DModel, EDMEulerScheduler
from diffusers import FlowMatchEulerDiscreteScheduler as FlowMatch
from torch import nn

from ld_pruner_hf import DistillationLoss, FeatureTaps, NoiseProcess, apply_plan_, find_taps
from ld_pruner_hf.distillation import feature_error
from ld_pruner_hf.features import unwrap
from ld_pruner_hf.planning import plan_from
from ld_pruner_hf.surgery import count_params

CALL = tiny.unet_call()
STAGES = ["down_blocks.0", "down_blocks.1", "up_blocks.0", "up_blocks.1"]


def pruned(scores, *paths):
    """The tiny U-Net with the operators at `paths` replaced by the first stand-in that was scored."""
    model = tiny.unet()
    rows = [next(r for r in scores if r.path == path) for path in paths]
    apply_plan_(model, plan_from(rows, scores, count_params(model)))
    return model


def dit(layers):
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        sample_size=8, num_layers=layers, patch_size=2, attention_head_dim=4, num_attention_heads=2, in_channels=4,
        out_channels=4, num_embeds_ada_norm=10, norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    return model.eval()


DIT_CALL = {
    "hidden_states": torch.zeros(1, 4, 8, 8),
    "timestep": torch.tensor([1]),
    "class_labels": torch.tensor([0]),
}

# ---- taps ----------------------------------------------------------------------------------------------------------


def test_a_unet_is_compared_at_the_end_of_each_down_and_up_stage(unet):
    pairs = find_taps(unet, copy.deepcopy(unet), CALL)
    assert [p.teacher.path for p in pairs] == [p.student.path for p in pairs] == STAGES
    assert [p.teacher.shape for p in pairs] == [(2, 32, 4, 4), (2, 64, 4, 4), (2, 64, 8, 8), (2, 32, 8, 8)]


def test_stand_ins_are_taps_like_any_other_module(unet, scores):
    student = pruned(scores, "down_blocks.1", "up_blocks.0.resnets.0")
    assert type(student.down_blocks[1]).__name__ == "StandIn"
    pairs = find_taps(unet, student, CALL)
    assert [p.student.path for p in pairs] == STAGES
    with FeatureTaps(student, [p.student for p in pairs]) as taps:
        tiny.output(student, CALL)
        assert [tuple(f.shape) for f in taps.take()] == [p.student.shape for p in pairs]


def test_a_student_with_fewer_stages_is_paired_by_shape():
    three = {
        "block_out_channels": (16, 32, 32), "norm_num_groups": 8,
        "down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3,
    }  # fmt: skip
    two = {**three, **{k: v[:2] for k, v in three.items() if isinstance(v, tuple)}}
    pairs = find_taps(tiny.unet(**three), tiny.unet(**two), tiny.unet_call((16, 16)))
    names = [(p.teacher.path, p.student.path) for p in pairs]
    assert names == [
        ("down_blocks.0", "down_blocks.0"),
        ("up_blocks.1", "up_blocks.0"),
        ("up_blocks.2", "up_blocks.1"),
    ]


def test_a_transformer_is_compared_at_evenly_spaced_blocks():
    pairs = find_taps(dit(12), dit(12), DIT_CALL)
    assert [p.teacher.path for p in pairs] == [f"transformer_blocks.{i}" for i in (1, 3, 5, 7, 9, 11)]
    assert all(p.teacher == p.student for p in pairs)


def test_a_transformer_with_half_the_blocks_is_paired_at_equal_depth():
    pairs = find_taps(dit(8), dit(4), DIT_CALL)
    blocks = [(int(p.teacher.path.split(".")[1]), int(p.student.path.split(".")[1])) for p in pairs]
    assert blocks == [(1, 0), (3, 1), (5, 2), (7, 3)]


def test_a_list_of_paths_overrides_the_search(unet):
    pairs = find_taps(unet, copy.deepcopy(unet), CALL, paths=["mid_block", "down_blocks.1=mid_block.resnets.0"])
    assert [(p.teacher.path, p.student.path) for p in pairs] == [
        ("mid_block", "mid_block"),
        ("down_blocks.1", "mid_block.resnets.0"),
    ]


@pytest.mark.parametrize(
    ("paths", "message"),
    [(["down_blocks.7"], "no module 'down_blocks.7'"), (["down_blocks.0=up_blocks.1"], r"\(2, 32, 4, 4\).*differ")],
)
def test_taps_that_cannot_be_compared_are_refused(unet, paths, message):
    with pytest.raises(ValueError, match=message):
        find_taps(unet, copy.deepcopy(unet), CALL, paths=paths)


def test_a_student_of_another_output_is_refused(unet):
    with pytest.raises(ValueError, match=r"outputs have shapes \(2, 4, 8, 8\) and \(2, 3, 8, 8\)"):
        find_taps(unet, tiny.unet(out_channels=3), CALL)


def test_models_with_nothing_in_common_are_refused(unet):
    with pytest.raises(ValueError, match="feature_weight 0"):
        find_taps(unet, nn.Conv2d(4, 4, 1), CALL, student_call=(CALL["sample"],))


def test_watching_leaves_no_trace(unet):
    unet.train()
    unet.mid_block.eval()
    before = {n: (m.training, len(m._forward_hooks)) for n, m in unet.named_modules()}
    find_taps(unet, copy.deepcopy(unet), CALL)
    assert {n: (m.training, len(m._forward_hooks)) for n, m in unet.named_modules()} == before


class Wrapper(nn.Module):
    """Holds a model as DDP does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_taps_survive_wrapping(unet):
    student = Wrapper(copy.deepcopy(unet))
    assert unwrap(student) is student.module and unwrap(unet) is unet
    pairs = find_taps(unet, student, CALL)
    assert [p.student.path for p in pairs] == STAGES
    with FeatureTaps(student, [p.student for p in pairs]) as taps:
        tiny.output(student, CALL)
        assert len(list(taps.take())) == 4
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_wrappers_inside_the_model_are_left_out_of_its_paths(unet):
    class Inner(nn.Module):  # as FSDP and activation checkpointing wrap blocks
        def __init__(self, module):
            super().__init__()
            self._fsdp_wrapped_module = module
            for name in ("has_cross_attention", "resnets"):
                if hasattr(module, name):
                    object.__setattr__(self, name, getattr(module, name))

        def forward(self, *args, **kwargs):
            return self._fsdp_wrapped_module(*args, **kwargs)

    student = copy.deepcopy(unet)
    student.down_blocks[0] = Inner(student.down_blocks[0])
    assert [p.student.path for p in find_taps(unet, student, CALL)] == STAGES


def test_features_carry_gradients_and_are_taken_once(unet):
    pairs = find_taps(unet, unet, CALL)
    with FeatureTaps(unet, [p.student for p in pairs]) as taps:
        with pytest.raises(RuntimeError, match="did not run"):
            taps.take()
        unet(**CALL)
        features = list(taps.take())
        with pytest.raises(RuntimeError, match="did not run"):
            taps.take()
    features[0].sum().backward()
    assert unet.conv_in.weight.grad is not None and unet.conv_out.weight.grad is None


def test_the_loss_lets_go_of_the_teachers_features_one_by_one(unet):
    pairs, alive, counts = find_taps(unet, unet, CALL), [], []

    def counted(features):
        for feature in features:
            alive.append(weakref.ref(feature))
            counts.append(sum(f() is not None for f in alive))
            yield feature

    with FeatureTaps(unet, [p.teacher for p in pairs]) as taps:
        with torch.no_grad():
            unet(**CALL)
        features = [torch.randn(p.student.shape, requires_grad=True) for p in pairs]
        loss = DistillationLoss(task=0, output=0)(None, None, None, features, counted(taps.take()))["loss"]
    assert len(counts) == len(pairs) > 2 and max(counts) <= 2  # the one before it still has its name in the loop
    loss.backward()
    assert all(f.grad is not None for f in features)


def test_gradient_checkpointing_gives_equal_features_and_gradients():
    model = dit(2).train()
    paths = [p.student for p in find_taps(model, model, DIT_CALL)]
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        with FeatureTaps(model, paths) as taps, torch.utils.checkpoint.set_checkpoint_early_stop(False):
            torch.manual_seed(0)
            model(**DIT_CALL)
            sum(f.square().mean() for f in taps.take()).backward()
            assert not taps._features  # the blocks ran again in the backward pass
        gradients.append(model.pos_embed.proj.weight.grad.clone())
        model.zero_grad()
    torch.testing.assert_close(gradients[1], gradients[0])


# ---- targets -------------------------------------------------------------------------------------------------------

X, NOISE = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
INDEX = torch.tensor([0, 40, 99])


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_velocity_are_those_of_diffusers(zero_snr):
    settings = {"num_train_timesteps": 100, "rescale_betas_zero_snr": zero_snr, "prediction_type": "v_prediction"}
    reference = DDPMScheduler(**settings)
    process = NoiseProcess.of(DDIMScheduler(**settings))
    torch.testing.assert_close(process.add_noise(X, NOISE, INDEX), reference.add_noise(X, NOISE, INDEX))
    torch.testing.assert_close(process.target(X, NOISE, INDEX), reference.get_velocity(X, NOISE, INDEX))


def test_targets_of_the_other_kinds():
    for kind, expected in (("epsilon", NOISE), ("sample", X)):
        process = NoiseProcess.of(DDPMScheduler(num_train_timesteps=100, prediction_type=kind))
        assert process.target(X, NOISE, INDEX) is expected
    flow = NoiseProcess.of(FlowMatch(num_train_timesteps=100))
    torch.testing.assert_close(flow.target(X, NOISE, INDEX), NOISE - X)
    torch.testing.assert_close(flow.add_noise(X, NOISE, torch.tensor([99] * 3)), NOISE)  # the last step is pure noise


def test_flow_matching_has_the_sigmas_and_timesteps_of_the_scheduler():
    scheduler = FlowMatch(num_train_timesteps=100, shift=3.0)
    process = NoiseProcess.of(scheduler)
    torch.testing.assert_close(process.sigma.flip(0), scheduler.sigmas[:100].float())
    torch.testing.assert_close(process.timesteps.flip(0), scheduler.timesteps.float())


def test_timesteps_drawn_cover_the_range_and_depend_on_the_generator_alone():
    process = NoiseProcess.of(DDPMScheduler(num_train_timesteps=10))
    drawn = process.draw(1000, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(range(10))
    assert torch.equal(drawn, process.draw(1000, torch.Generator().manual_seed(0)))


def test_snr_weights_are_those_of_the_paper():
    process = NoiseProcess.of(DDPMScheduler(num_train_timesteps=100))
    snr = (process.alpha / process.sigma)[INDEX].square()
    torch.testing.assert_close(process.snr_weights(INDEX, 5.0), snr.clamp(max=5.0) / snr)
    v = NoiseProcess.of(DDPMScheduler(num_train_timesteps=100, prediction_type="v_prediction"))
    torch.testing.assert_close(v.snr_weights(INDEX, 5.0), snr.clamp(max=5.0) / (snr + 1))
    with pytest.raises(ValueError, match="flow"):
        NoiseProcess.of(FlowMatch()).snr_weights(INDEX, 5.0)


def test_a_scheduler_of_another_process_is_refused():
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        NoiseProcess.of(EDMEulerScheduler())


# ---- losses --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_weighted_sum_of_its_terms():
    s, target, t = (torch.full((2, 4, 2, 2), v) for v in (1.0, 3.0, 2.0))
    f_s, f_t = [torch.zeros(2, 5), torch.zeros(2, 3, 2)], [torch.full((2, 5), 2.0), torch.full((2, 3, 2), 3.0)]
    terms = DistillationLoss(task=0.5, output=2.0, feature=10.0)(s, target, t, f_s, f_t)
    got = {name: round(float(value), 5) for name, value in terms.items()}
    assert got == {"task": 4.0, "output": 1.0, "feature": 13.0, "loss": 134.0}


def test_normalised_features_do_not_depend_on_their_scale():
    torch.manual_seed(0)
    s, t = torch.randn(4, 6, 2), torch.randn(4, 6, 2)
    torch.testing.assert_close(feature_error(1000 * s, 1000 * t, "normalised"), feature_error(s, t, "normalised"))
    expected = (s - t).flatten(1).square().sum(1) / t.flatten(1).square().sum(1)
    torch.testing.assert_close(feature_error(s, t, "normalised"), expected)


@pytest.mark.parametrize("kind", ["mse", "normalised"])
def test_the_mean_over_half_batches_is_the_loss_of_the_batch(kind):
    torch.manual_seed(0)
    s, target, t, f_s, f_t = (torch.randn(4, 3, 2, 2) * torch.arange(1.0, 5.0)[:, None, None, None] for _ in range(5))
    loss = DistillationLoss(feature_loss=kind)
    whole = loss(s, target, t, [f_s], [f_t])["loss"]
    halves = [loss(s[i], target[i], t[i], [f_s[i]], [f_t[i]])["loss"] for i in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)


def test_no_gradient_reaches_the_teacher_and_unused_terms_are_left_out():
    t, f_t, s = (
        torch.ones(1, 2, requires_grad=True),
        torch.ones(1, 2, requires_grad=True),
        torch.zeros(1, 2, requires_grad=True),
    )
    loss = DistillationLoss(task=0)
    terms = loss(s, s.detach(), t, [s], [f_t])
    terms["loss"].backward()
    assert set(terms) == {"loss", "output", "feature"} and t.grad is None and f_t.grad is None and s.grad is not None
    assert not DistillationLoss(output=0, feature=0).needs_teacher


def test_variances_that_a_denoiser_predicts_too_are_left_out_of_the_task_loss():
    prediction = torch.cat([torch.ones(2, 4, 2, 2), torch.full((2, 4, 2, 2), 9.0)], dim=1)
    assert DistillationLoss(output=0, feature=0)(prediction, torch.zeros(2, 4, 2, 2))["task"] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": -1.0}, "task_weight"),
        ({"feature": float("nan")}, "feature_weight"),
        ({"task": 0, "output": 0, "feature": 0}, "all are 0"),
        ({"feature_loss": "cosine"}, "feature_loss"),
    ],
)
def test_settings_that_make_no_loss_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DistillationLoss(**settings)


def test_features_that_do_not_match_are_refused():
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="one each"):
        DistillationLoss()(x, x, x, [x], [])
    with pytest.raises(ValueError, match="features of student and teacher"):
        DistillationLoss()(x, x, x, [x], [torch.zeros(1, 3)])
    with pytest.raises(ValueError, match="teacher's prediction"):
        DistillationLoss()(x, x)
