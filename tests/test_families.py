"""One tiny pipeline of every family: scored, pruned by k and by blocks, run, saved and loaded again."""

from __future__ import annotations

from dataclasses import replace

import deprecated_families  # noqa: F401
import families
import more_families  # noqa: F401
import pipelines_table
import pytest
import recent_families  # noqa: F401
import torch
import variant_families  # noqa: F401
import video_families  # noqa: F401

import ld_pruner_hf
from ld_pruner_hf import cli
from ld_pruner_hf.benchmark import Benchmark, BenchmarkSettings
from ld_pruner_hf.latents import RecordedCall, make_conditions
from ld_pruner_hf.profiling import run

NAMES = [*families.FAMILIES, "ace_step", "kandinsky_combined", "flux2", "z_image"]
RECENT = [
    "anyflow_far",
    "bria_fibo2",
    "cosmos3_omni",
    "dreamlite",
    "ideogram4",
    "kandinsky6",
    "qwen_image_21",
    "rfd4_proteina",
]
RECENT += ["sana_wm", "shap_e", "unclip_image_variation", "unidiffuser", "vq_diffusion"]
"""Some of them came with the pinned release of diffusers."""


@pytest.mark.parametrize(
    ("name", "component"), [(n, c) for n in (*NAMES, *RECENT) for c in families.SEVERAL.get(n, (None,))]
)
def test_family(name, component, tmp_path):
    try:
        families.make(name)
    except AttributeError as error:
        if name in RECENT and "module diffusers has no attribute" in str(error):
            pytest.skip(str(error))
        raise
    row = pipelines_table.prune_and_save(lambda: families.make(name), tmp_path, component)
    assert row.ks == list(pipelines_table.KS) and row.blocks and row.candidates >= 20
    assert component in (None, row.component)
    assert pipelines_table.reload(row.folders) == dict.fromkeys(row.folders)


def test_equal_latents_in_a_fresh_process(tmp_path):
    rows = [
        pipelines_table.prune_and_save(lambda n=n: families.make(n), tmp_path / n) for n in ("ddpm", "sd3", "flux")
    ]
    folders = [f for row in rows for f in row.folders]
    assert pipelines_table.reload_in_fresh_process(folders) == dict.fromkeys(folders)


def test_joint_attention_has_a_stand_in_with_two_outputs():
    pipe, call = families.make("sd3")
    operators = {o.path: o for o in ld_pruner_hf.find_operators(pipe, latency=False, progress=False, **call)}
    block, attention = operators["transformer_blocks.0"], operators["transformer_blocks.0.attn"]
    for o in (block, attention):
        assert o.is_candidate and len(o.output_shapes) == 2
        assert {r.argument for r in o.stand_ins[0].rules} == {"hidden_states", "encoder_hidden_states"}


def test_a_recorded_call_can_run_again():
    """U-Nets empty the list of T2I-Adapter features that they are given."""

    class Popping(torch.nn.Module):
        def forward(self, x, features):
            return x + features.pop(0)

    call = RecordedCall((torch.ones(2),), {"features": [torch.ones(2)]})
    assert torch.equal(run(Popping(), call), run(Popping(), call)) and len(call.kwargs["features"]) == 1


def test_a_plan_is_applied_though_the_pipeline_cannot_be_called_without_its_embeddings():
    pipe, call = families.make("flux")
    operators = ld_pruner_hf.find_operators(pipe, latency=False, progress=False, **call)
    block = next(o for o in operators if o.path == "transformer_blocks.0")
    model = pipe.transformer
    plan = ld_pruner_hf.PruningPlan(
        "transformer",
        type(model).__name__,
        ld_pruner_hf.surgery.architecture_of(model),
        (ld_pruner_hf.Modification(block.path, block.kind, block.stand_ins[0]),),
    )
    assert "neither tried as a stock config" in pipe.prune(plan).how["saved_as"]
    pipe, call = families.make("flux")
    assert pipe.prune(plan, **call).how["saved_as"].startswith("stock FluxTransformer2DModel (num_layers=1)")


@pytest.mark.parametrize(
    ("name", "lacking"), [("sd_inpaint", "mask_image"), ("sd_controlnet", "image"), ("sd3", "pooled_prompt_embeds"), ("svd", "image")]
)  # fmt: skip
def test_without_conditions_the_error_lists_the_arguments_that_are_needed(name, lacking):
    pipe, _ = families.make(name)
    with pytest.raises(ValueError, match=rf"{type(pipe).__name__}.*{lacking}.*pass .*conditions=\[{{...}}, ...\]"):
        pipe.score()


def test_two_denoisers_are_scored_and_pruned_together(tmp_path):
    pipe, call = families.make("wan_2_2")
    attentions = {"kinds": "WanAttention", "num_inference_steps": 2, "seeds": 1}
    scores = pipe.score(conditions=[call], resume_from=tmp_path / "scores.jsonl", **attentions)
    assert scores.component == "transformer+transformer_2"
    assert len(scores) == 16 and {row.path.partition(".")[0] for row in scores} == {"transformer", "transformer_2"}
    assert ld_pruner_hf.OperatorScores.load(tmp_path / "scores.jsonl") == scores
    alone = families.make("wan_2_2")[0].score(conditions=[call], component="transformer_2", **attentions)
    assert [r.score() for r in scores][8:] == [r.score() for r in alone]

    plan = pipe.prune(7)
    lowest = [row.path for row in scores.ranked()[:7]]
    assert sorted(plan.paths) == sorted(lowest)
    for name in ("transformer", "transformer_2"):
        mine = sorted(p.removeprefix(f"{name}.") for p in lowest if p.startswith(f"{name}."))
        assert sorted(ld_pruner_hf.plan_of(getattr(pipe, name)).paths) == mine
    plan.save(tmp_path / "plan.json")
    other, _ = families.make("wan_2_2")
    assert other.prune(str(tmp_path / "plan.json"), **call).params_removed == plan.params_removed
    assert torch.equal(pipelines_table.latents(other, call), pipelines_table.latents(pipe, call))
    with pytest.raises(ValueError, match="denoise together"):
        families.make("wan_2_2")[0].prune(macs=0.1, conditions=[call], **attentions)


@pytest.mark.parametrize("command", ["sweep", "additivity"])
def test_scores_of_two_denoisers_are_refused_before_anything_is_loaded(command, tmp_path, capsys):
    two = ld_pruner_hf.OperatorScores((), "", "", "A+A", "transformer+transformer_2", {}, "latent-shift")
    two.save(tmp_path / "scores.json")
    argv = [command, "no-such-pipeline", "--scores", str(tmp_path / "scores.json"), "-o", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert f"{command}: got transformer and transformer_2" in error and "--component transformer" in error
    assert "Traceback" not in error and not (tmp_path / "out").exists()


def test_a_benchmark_takes_one_of_two_denoisers(tmp_path):
    pipe, call = families.make("wan_2_2")
    settings = BenchmarkSettings(conditions=[call], num_inference_steps=2)
    with pytest.raises(ValueError, match=r"benchmark: got transformer and transformer_2.*--component transformer "):
        Benchmark(pipe, tmp_path / "out", settings)
    assert not (tmp_path / "out").exists()
    assert Benchmark(pipe, tmp_path / "out", replace(settings, component="transformer_2")).name == "transformer_2"


def test_prior_and_decoder_are_found():
    pipe, call = families.make("kandinsky_combined")
    kinds = {"kinds": "Attention", "num_inference_steps": 1, "seeds": 1}
    assert set(pipe.score(conditions=[call], **kinds).component.split("+")) == {"unet", "prior_prior"}


def test_embeddings_of_several_encoders_stand_for_a_prompt():
    pipe, call = families.make("hidream")
    assert "prompt_embeds_t5" in call and make_conditions(pipe, None, call) == [call]


def test_guidance_by_gradients_is_scored():
    pipe, call = families.make("attend_and_excite")
    scores = pipe.score(conditions=[call], num_inference_steps=2, seeds=1, kinds="ResnetBlock2D")
    assert len(scores) and [row.error for row in scores] == [None] * len(scores)


def test_modules_that_a_controlnet_shares_and_runs():
    pipe, call = families.make("z_image_controlnet")
    assert pipe.controlnet.t_embedder is pipe.transformer.t_embedder
    scores = pipe.score(conditions=[call], num_inference_steps=2, seeds=1, include="layers.*.feed_forward")
    assert len(scores) and [row.error for row in scores] == [None] * len(scores)


def test_changes_in_place_are_no_obstacle():
    """CogVideoX writes into its rotary embeddings."""
    pipe, call = families.make("cogvideox_image_to_video")
    scores = pipe.score(conditions=[call], num_inference_steps=1, seeds=1, include="transformer_blocks.1.ff*")
    assert len(pipe.prune(1, scores=scores, conditions=[call], num_inference_steps=1)) == 1


def test_helpers_of_the_denoiser_are_no_denoisers():
    pipe, call = families.make("sd_controlnet")
    assert pipe.score(conditions=[call], num_inference_steps=1, seeds=1, kinds="Downsample2D").component == "unet"


def test_a_pipeline_that_takes_one_prompt_only():
    pipe, call = families.make("dreamlite")
    with pytest.raises(ValueError, match="has to be of type `str`"):
        pipe(**{**call, "prompt": [call["prompt"]]})
    scores = pipe.score(**call, seeds=2, num_inference_steps=1, kinds="Upsample2D")
    assert len(scores) and [row.error for row in scores] == [None] * len(scores)


def test_embeddings_that_a_hook_takes_out_of_the_text_encoder():
    """JoyImage's: an encoder whose outputs were remembered would not call it."""
    pipe, call = families.make("joy_image_edit_plus")
    scores = pipe.score(conditions=[call], seeds=2, num_inference_steps=1, kinds="JoyImageEditPlusAttention")
    assert [row.error for row in scores] == [None] * len(scores)
