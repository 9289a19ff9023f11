"""Conditions, batches and final latents: from a user's words to the numbers that are compared, and no trace left."""

from __future__ import annotations

import copy
import random

import deprecated_families  # noqa: F401
import families
import numpy as np
import pytest
import recent_families  # noqa: F401
import tiny
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, LTXLatentUpsamplePipeline, StableDiffusionPAGPipeline

from ld_pruner_hf.latents import (
    default_prompts,
    final_latents,
    find_denoiser,
    find_denoisers,
    make_conditions,
    make_jobs,
    on_device,
    preserved,
    record_call,
    steps_argument,
)
from ld_pruner_hf.profiling import run


class Unusual(DiffusionPipeline):
    """Its denoiser has no usual name, it takes no generator and no number of steps."""

    def __init__(self, net, guide, scheduler) -> None:
        super().__init__()
        self.register_modules(net=net, guide=guide, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, strength: float = 1.0):
        self.scheduler.set_timesteps(2)
        x = torch.randn(1, 3, 8, 8)
        bias = self.guide(torch.ones(1, 2)).mean() * strength
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.net(x, t).sample + bias, t, x).prev_sample
        return x


def unusual() -> Unusual:
    torch.manual_seed(0)
    return tiny.quiet(Unusual(tiny.unconditional_unet(), torch.nn.Linear(2, 2), tiny.scheduler()))


# ---- the denoiser --------------------------------------------------------------------------------------------------


def test_denoiser_by_its_usual_name():
    assert find_denoiser(tiny.stable_diffusion()) == "unet"
    assert find_denoiser(tiny.dit()) == "transformer"


def test_denoiser_found_by_watching():
    """The module that ran last before the scheduler's step; another that ran before it is none."""
    pipe = unusual()
    with preserved(pipe):
        assert find_denoiser(pipe) == "net"


def test_unknown_component(pipe):
    with pytest.raises(
        ValueError, match=r"no component 'transformer' to prune; it has \['text_encoder', 'unet', 'vae'\]"
    ):
        find_denoiser(pipe, "transformer")
    with pytest.raises(ValueError, match="no component 'scheduler'"):
        find_denoiser(pipe, "scheduler")


def test_no_denoiser_in_the_pipeline(pipe):
    pipe.unet = None
    with pytest.raises(ValueError, match=r"no denoiser found.*\['text_encoder', 'vae'\]"):
        find_denoiser(pipe, prompt="red heart")
    with pytest.raises(ValueError, match="no denoiser found"):
        pipe.score("red heart")
    with pytest.raises(ValueError, match="no denoiser found"):
        pipe.prune(2)


def test_no_modules_at_all():
    class Empty(DiffusionPipeline):
        def __init__(self, scheduler) -> None:
            super().__init__()
            self.register_modules(scheduler=scheduler)

        def __call__(self):
            return None

    with pytest.raises(ValueError, match="no denoiser found among its components"):
        find_denoiser(Empty(tiny.scheduler()))


def test_pipelines_that_do_not_denoise():
    """An upsampler of latents; a text-to-image pipeline's safety checker, named as the component."""
    from diffusers.pipelines.ltx.modeling_latent_upsampler import LTXLatentUpsamplerModel
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    upsampler = LTXLatentUpsamplerModel(in_channels=8, mid_channels=32, num_blocks_per_stage=1)
    pipe = LTXLatentUpsamplePipeline(vae=families.make("ltx")[0].vae, latent_upsampler=upsampler)
    message = (
        r"LTXLatentUpsamplePipeline: no denoiser found among its components \['latent_upsampler', 'vae'\].*component="
    )
    for refused in (pipe.score, lambda: pipe.prune(2), lambda: pipe.prune(latency=0.2), pipe.profile):
        with pytest.raises(ValueError, match=message):
            refused()

    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = CLIPConfig(text_config=vision, vision_config=vision, projection_dim=8)
    pipe = tiny.stable_diffusion()
    pipe.register_modules(safety_checker=StableDiffusionSafetyChecker(config))
    for refused in (pipe.score, lambda *args, **kwargs: pipe.prune(2, *args, **kwargs)):
        with pytest.raises(ValueError, match="'safety_checker' neither denoises nor decodes"):
            refused(prompt="red heart", num_inference_steps=1, component="safety_checker")


# ---- conditions ----------------------------------------------------------------------------------------------------


def test_built_in_prompts():
    prompts = default_prompts()
    assert len(prompts) == len(set(prompts)) == 50 and all(p.strip() == p for p in prompts)


def test_conditions_in_every_form(pipe):
    assert make_conditions(pipe, "a") == [{"prompt": "a"}]
    assert make_conditions(pipe, ["a", {"prompt": "b", "height": 16}], {"height": 8}) == [
        {"height": 8, "prompt": "a"},
        {"height": 16, "prompt": "b"},
    ]
    assert [c["prompt"] for c in make_conditions(pipe)] == default_prompts()
    assert make_conditions(pipe, None, {"prompt": "x"}) == [{"prompt": "x"}]
    assert make_conditions(tiny.ddpm()) == [{}]


@pytest.mark.parametrize(
    ("conditions", "call", "message"),
    [
        ([], {}, "conditions: got an empty list"),
        ([3], {}, r"conditions\[0\]: got int"),
        ("a", {"colour": "red"}, r"StableDiffusionPipeline takes no argument \['colour'\]; its call takes \['prompt'"),
        ([{"promt": "a"}], {}, r"takes no argument \['promt'\]"),
        ("a", {"output_type": "np"}, "'output_type' is set by ld_pruner_hf"),
        ([{"prompt": "a", "latents": None}], {}, "'latents' is set by ld_pruner_hf"),
        ("a", {"generator": None}, "use seed= and seeds="),
    ],
)
def test_bad_conditions(pipe, conditions, call, message):
    with pytest.raises(ValueError, match=message):
        make_conditions(pipe, conditions, call)


def test_a_pipeline_of_the_users_own_may_take_any_argument():
    class Open(Unusual):
        def __call__(self, strength: float = 1.0, **kwargs):
            return super().__call__(strength)

    pipe = Open(tiny.unconditional_unet(), torch.nn.Linear(2, 2), tiny.scheduler())
    assert make_conditions(pipe, [{"colour": "red"}]) == [{"colour": "red"}]


def test_a_prompt_for_a_pipeline_without_prompts():
    with pytest.raises(ValueError, match=r"DDPMPipeline takes no argument \['prompt'\]"):
        make_conditions(tiny.ddpm(), "a cat")


def test_an_argument_that_the_call_needs_must_be_in_every_condition():
    with pytest.raises(ValueError, match=r"conditions\[0\]: DiTPipeline needs \['class_labels'\]"):
        make_conditions(tiny.dit())
    with pytest.raises(ValueError, match=r"conditions\[1\]: DiTPipeline needs \['class_labels'\]"):
        make_conditions(tiny.dit(), [{"class_labels": [1]}, {}])


@pytest.mark.parametrize("steps", [0, -1, 2.5, "3"])
def test_number_of_steps(pipe, steps):
    with pytest.raises(ValueError, match="num_inference_steps: got"):
        steps_argument(pipe, steps)
    assert steps_argument(pipe, 3) == {"num_inference_steps": 3} and steps_argument(pipe, None) == {}
    with pytest.raises(ValueError, match="takes no number of steps"):
        steps_argument(unusual(), 3)


# ---- batches -------------------------------------------------------------------------------------------------------


def pairs(jobs) -> list[tuple[int, int]]:
    return [pair for job in jobs for pair in zip(job.condition_ids, job.seeds, strict=True)]


ALL = [(i, s) for i in range(3) for s in (4, 5)]


def test_prompts_share_calls(pipe):
    conditions = make_conditions(pipe, tiny.PROMPTS, {"negative_prompt": "bad", "guidance_scale": 2.0})
    jobs = make_jobs(pipe, conditions, [4, 5], batch_size=4)
    assert [len(j.seeds) for j in jobs] == [4, 2] and pairs(jobs) == ALL
    assert jobs[0].call["prompt"] == ["red heart", "red heart", "cat face", "cat face"]
    assert jobs[0].call["negative_prompt"] == ["bad"] * 4 and jobs[0].call["guidance_scale"] == 2.0


def test_conditions_that_differ_in_more_than_the_prompt_run_one_by_one(pipe):
    conditions = make_conditions(pipe, [{"prompt": p, "guidance_scale": float(i)} for i, p in enumerate(tiny.PROMPTS)])
    jobs = make_jobs(pipe, conditions, [4, 5], batch_size=4)
    assert len(jobs) == 6 and pairs(jobs) == ALL


def test_an_unconditional_pipeline_takes_a_batch_size():
    jobs = make_jobs(tiny.ddpm(), [{}], [0, 1, 2], batch_size=2)
    assert [j.call for j in jobs] == [{"batch_size": 2}, {"batch_size": 1}]
    assert len(make_jobs(tiny.dit(), [{"class_labels": [1]}], [0, 1], batch_size=8)) == 2


# ---- final latents -------------------------------------------------------------------------------------------------


def test_latents_are_those_that_the_pipeline_would_decode(pipe):
    call = {"prompt": ["red heart", "pizza"], "num_inference_steps": 3}
    expected = pipe(**call, generator=[torch.Generator().manual_seed(s) for s in (7, 8)], output_type="latent").images
    with preserved(pipe):
        assert torch.equal(final_latents(pipe, call, [7, 8]), expected)


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.ldm])
def test_the_decoder_never_runs(make, monkeypatch):
    pipe = make()
    decoder = pipe.vae if hasattr(pipe, "vae") else pipe.vqvae

    def fail(*_, **__):
        raise AssertionError("decoded")

    monkeypatch.setattr(decoder, "decode", fail)
    call = {"prompt": "pizza"} if hasattr(pipe, "vae") else {}
    with preserved(pipe):
        assert final_latents(pipe, {**call, "num_inference_steps": 2}, [0]).shape[0] == 1
    assert vars(decoder)["decode"] is fail


def test_pixel_space_pipelines_end_by_themselves():
    pipe = tiny.ddim()
    with preserved(pipe):
        a = final_latents(pipe, {"num_inference_steps": 2, "batch_size": 2}, [3, 4])
    pictures = pipe(
        2, generator=[torch.Generator().manual_seed(s) for s in (3, 4)], num_inference_steps=2, output_type="np"
    ).images
    assert np.allclose((a / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), pictures, atol=1e-6)


def test_a_sample_depends_on_its_seed_and_not_on_its_batch(pipe):
    with preserved(pipe):
        both = final_latents(pipe, {"prompt": ["pizza"] * 2, "num_inference_steps": 2}, [7, 8])
        alone = final_latents(pipe, {"prompt": ["pizza"], "num_inference_steps": 2}, [8])
    assert torch.allclose(both[1], alone[0], atol=1e-5) and not torch.allclose(both[0], both[1], atol=1e-2)


def test_pipelines_without_a_generator_are_seeded_all_the_same():
    pipe = unusual()
    with preserved(pipe):
        a, b, c = (final_latents(pipe, {}, [s]) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_stopping_after_some_steps(pipe):
    with preserved(pipe):
        call = {"prompt": "pizza", "num_inference_steps": 5}
        assert not torch.equal(final_latents(pipe, call, [0], stop_after=2), final_latents(pipe, call, [0]))
        calls = []
        handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
        final_latents(pipe, call, [0], stop_after=2)
        handle.remove()
    assert len(calls) == 2


class Together(Unusual):
    """Denoises twice as much, in two parts, with a copy of its scheduler for the second one."""

    @torch.no_grad()
    def __call__(self, generator=None):
        self.scheduler.set_timesteps(2)
        other = copy.deepcopy(self.scheduler)
        self.parts = [torch.randn(1, 3, 8, 8, generator=generator) for _ in range(2)]
        for t in self.scheduler.timesteps:
            for i, scheduler in enumerate((self.scheduler, other)):
                self.parts[i] = scheduler.step(self.net(self.parts[i], t).sample, t, self.parts[i]).prev_sample


def test_what_schedulers_denoise_in_turns_belongs_together():
    """Pictures and sound; an operator that only one of them passes would seem to be of no use, if the other alone were compared."""
    base = unusual()
    pipe = tiny.quiet(Together(base.net, base.guide, base.scheduler))
    with preserved(pipe):
        latents = final_latents(pipe, {}, [0])
        assert torch.equal(latents, torch.cat([part.flatten(1) for part in pipe.parts], dim=1))
        assert final_latents(pipe, {}, [0], stop_after=1).shape == (1, 3, 8, 8)


class Unstepped(Unusual):
    """Uses its scheduler for the timesteps only."""

    @torch.no_grad()
    def __call__(self, generator=None):
        self.scheduler.set_timesteps(2)
        x = torch.randn(1, 3, 8, 8, generator=generator)
        for t in self.scheduler.timesteps:
            x = x - 0.5 * self.net(x, t).sample
        self.guide(torch.ones(1, 2))


def test_where_no_scheduler_steps_the_last_prediction_is_compared():
    base = unusual()
    pipe = tiny.quiet(Unstepped(base.net, base.guide, base.scheduler))
    outputs = []
    handle = pipe.net.register_forward_hook(lambda *a: outputs.append(a[-1].sample))
    with preserved(pipe):
        latents = final_latents(pipe, {}, [0])
    handle.remove()
    assert len(outputs) == 2 and torch.equal(latents, outputs[-1])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unclip", ["prior", "decoder", "super_res_first", "super_res_last"]),
        ("unclip_image_variation", ["decoder", "super_res_first", "super_res_last"]),
    ],
)
def test_pipelines_with_a_scheduler_for_each_stage(name, expected):
    pipe, call = families.make(name)
    with preserved(pipe):
        assert sorted(find_denoisers(pipe, **call)) == sorted(expected)
        assert final_latents(pipe, call, [0]).shape == (1, 3, 16, 16), "of the last stage"


def test_a_renderer_never_runs(monkeypatch):
    pipe, call = families.make("shap_e")

    def fail(*_, **__):
        raise AssertionError("rendered")

    monkeypatch.setattr(pipe.shap_e_renderer, "decode_to_image", fail)
    with preserved(pipe):
        assert final_latents(pipe, {**call, "num_inference_steps": 2}, [0]).shape == (1, 32, 16)


def test_a_pipeline_that_makes_no_step(pipe, monkeypatch):
    monkeypatch.setattr(type(pipe), "__call__", lambda self, prompt=None: None)
    with pytest.raises(RuntimeError, match="finished without a step of its scheduler DDIMScheduler"):
        final_latents(pipe, {"prompt": "x"}, [0])


def test_the_scheduler_class_is_whole_again(pipe):
    step = DDIMScheduler.step
    with preserved(pipe):
        final_latents(pipe, {"prompt": "pizza", "num_inference_steps": 2}, [0])
        with pytest.raises(TypeError):
            final_latents(pipe, {"prompt": "pizza", "num_inference_steps": "x"}, [0])
    assert DDIMScheduler.step is step


def test_a_pipeline_looks_once_for_its_device(pipe, monkeypatch):
    """It goes through all modules for it; another pipeline of the class is not told this one's."""
    other, asked = copy.copy(pipe), []

    def device(self) -> torch.device:
        asked.append(self)
        return torch.device("cpu" if self is pipe else "meta")

    monkeypatch.setattr(type(pipe), "_execution_device", property(device))
    with on_device(pipe, torch.device("cpu")):
        assert (pipe._execution_device.type, other._execution_device.type) == ("cpu", "meta")
    assert len(asked) == 1
    with preserved(pipe):
        final_latents(pipe, {"prompt": "a cat", "num_inference_steps": 2}, [0])
    assert len(asked) == 2, "the pipeline asks more than once in a call"
    assert pipe._execution_device.type == "cpu" and len(asked) == 3


# ---- no trace ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_preserved_puts_everything_back(pipe, error):
    pipe(prompt="pizza", num_inference_steps=4, output_type="latent")
    pipe.unet.train()
    pipe.vae.decoder.mid_block.train()
    before = tiny.snapshot(pipe)
    try:
        with preserved(pipe):
            assert not pipe.unet.training and not torch.is_grad_enabled()
            final_latents(pipe, {"prompt": "pizza", "num_inference_steps": 2}, [0])
            np.random.rand(3), random.random()
            pipe.scheduler.set_timesteps(7)
            pipe.something = 3
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert tiny.differences(before, tiny.snapshot(pipe)) == []


def test_attention_processors_are_put_back():
    """Perturbed-attention guidance sets its own, and would put the old ones back after decoding."""
    pipe = StableDiffusionPAGPipeline.from_pipe(tiny.stable_diffusion(), pag_applied_layers=["mid"])
    before = tiny.snapshot(pipe)
    with preserved(pipe):
        final_latents(pipe, {"prompt": "pizza", "num_inference_steps": 2}, [0])
        assert [k for k in tiny.differences(before, tiny.snapshot(pipe)) if k.endswith("processor")]
    assert tiny.differences(before, tiny.snapshot(pipe)) == []


def test_the_snapshot_sees_changes(pipe):
    """The other tests of this file are worth nothing if it does not."""
    before = tiny.snapshot(pipe)
    assert tiny.differences(before, tiny.snapshot(pipe)) == []
    pipe.scheduler.set_timesteps(3)
    pipe.unet.conv_in.bias.data[0] += 1
    pipe.unet.conv_out.register_forward_hook(lambda *_: None)
    pipe.vae.train()
    torch.rand(1)
    changed = tiny.differences(before, tiny.snapshot(pipe))
    for name in ("scheduler", "unet.conv_in.bias values", "unet.conv_out hooks", "vae.", "torch random state"):
        assert name in changed


# ---- recorded calls ------------------------------------------------------------------------------------------------


def test_recorded_call_is_the_first_one(pipe):
    with preserved(pipe):
        call = record_call(pipe, "unet", {"prompt": "pizza", "num_inference_steps": 2})
    assert call.batch_size == 2 and call.args[0].shape == (2, 4, 8, 8), "guidance doubles the batch"
    assert call.kwargs["encoder_hidden_states"].shape == (2, 16, 32)
    assert not pipe.unet._forward_pre_hooks


def test_recorded_call_of_the_decoder_gives_the_picture(pipe):
    call = {"prompt": "pizza", "num_inference_steps": 2}
    with preserved(pipe):
        decode = record_call(pipe, "vae", call)
        picture = run(pipe.vae, decode)[0]
        expected = pipe(**call, generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert decode.method == "decode" and decode.batch_size == 1
    torch.testing.assert_close((picture / 2 + 0.5).clamp(0, 1), expected)
    assert "forward" not in vars(pipe.vae) and "decode" not in vars(pipe.vae)


def test_a_component_that_neither_denoises_nor_decodes(pipe):
    pipe = copy.copy(pipe)
    pipe.idle = torch.nn.Linear(2, 2)
    with preserved(pipe), pytest.raises(ValueError, match="component 'idle' neither denoises nor decodes"):
        record_call(pipe, "idle", {"prompt": "pizza", "num_inference_steps": 2})
