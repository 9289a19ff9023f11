"""score, prune and profile on pipelines: exactly k, in place, and back from the disk."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from ld_pruner_hf import LDPrunerMixin, Modification, PlanError, PruningPlan, make_plan, plan_of, scoring
from ld_pruner_hf.plan import is_inside
from ld_pruner_hf.replacements import StandIn
from ld_pruner_hf.selection import innermost
from ld_pruner_hf.surgery import count_params

LIMIT = "the limit of the tiny pipeline"


@pytest.fixture
def limit(scores) -> int:
    """How many operators of `pipe` can be taken out together."""
    return len(innermost([r.path for r in scores.ranked()]))


def forbid_calls(monkeypatch, pipe) -> None:
    """Any denoising from here on is an error."""

    def fail(*_, **__):
        raise AssertionError("the pipeline ran before the input was checked")

    monkeypatch.setattr(pipe.unet, "forward", fail)


def forbid_scoring(monkeypatch) -> None:
    """Watching one call is allowed, measuring operators is not."""

    def fail(*_, **__):
        raise AssertionError("operators were measured before the input was checked")

    monkeypatch.setattr(scoring, "_measure", fail)


def stand_ins(model) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, StandIn)]


def latents(pipe, call=None) -> torch.Tensor:
    """What the pipeline makes of fixed noise: latents, or pictures where it has none."""
    call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(5), **(call or {})}
    if isinstance(pipe, StableDiffusionPipeline):
        return pipe("red heart", output_type="latent", **call).images
    return torch.from_numpy(pipe(output_type="np", **call).images)


# ---- exactly k -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7, 30, LIMIT])
def test_prune_takes_out_exactly_k(pipe, scores, limit, k):
    k = limit if k == LIMIT else k
    before = count_params(pipe.unet)
    plan = pipe.prune(k, scores=scores)
    assert len(plan) == k
    assert sorted(stand_ins(pipe.unet)) == sorted([*plan.paths, *(m.path for m in plan.unused)])
    assert not any(is_inside(a, b) for a in plan.paths for b in plan.paths)
    assert count_params(pipe.unet) == before - plan.params_removed and plan.params_before == before
    assert plan_of(pipe.unet).modifications == plan.modifications
    assert torch.isfinite(latents(pipe)).all()


def test_the_least_important_ones_go(pipe, scores):
    plan = pipe.prune(1, scores=scores)
    best = scores.ranked()[0]
    assert plan.paths == [best.path]
    (modification,) = plan
    assert modification.stand_in == best.stand_in and modification.score == best.score()
    assert plan.how["k"] == 1 and plan.how["criterion"] == "latent-shift" and plan.how["method"] == "top-k"


def test_criterion_changes_what_is_taken(scores):
    opposed = replace(scores, rows=tuple(replace(r, std_dist=(1 / r.avg_dist[0],)) for r in scores))
    plans = {c: make_plan(tiny.stable_diffusion(), 10, scores=opposed, criterion=c) for c in scores.criteria}
    assert all(plan.how["criterion"] == c for c, plan in plans.items())
    assert not set(plans["latent-shift-mean"].paths) & set(plans["latent-shift-std"].paths)


def test_the_plan_quotes_no_prompts(pipe, scores):
    """It goes into published configs."""
    pipe.prune(3, scores=scores)
    assert "red heart" not in str(pipe.unet.config) and plan_of(pipe.unet).how["settings"]["conditions"] == 1


def test_prune_scores_first_if_there_are_no_scores(pipe):
    plan = pipe.prune(2, conditions="pizza", num_inference_steps=1, include="mid_block.attentions")
    assert len(plan) == 2 and all(p.startswith("mid_block.attentions") for p in plan.paths)


def test_prune_uses_the_last_scores(pipe, monkeypatch):
    scores = pipe.score("pizza", num_inference_steps=1, include="mid_block")
    forbid_scoring(monkeypatch)
    assert pipe.prune(2).paths == make_plan(tiny.stable_diffusion(), 2, scores=scores).paths
    with pytest.raises(AssertionError, match="measured"):
        pipe.prune(2)  # the pruned model has no scores


def test_scores_from_before_pruning_are_not_used_again(pipe, monkeypatch):
    """Taking out an activation leaves the architecture's fingerprint as it is."""
    pipe.score("pizza", num_inference_steps=1, include="conv_act")
    pipe.prune(1)
    forbid_scoring(monkeypatch)
    with pytest.raises(AssertionError, match="measured"):
        pipe.prune(1)


def test_scores_of_a_replaced_component_are_not_used(pipe, monkeypatch):
    pipe.score("pizza", num_inference_steps=1, include="conv_act")
    pipe.unet = tiny.unet(layers_per_block=2)
    forbid_scoring(monkeypatch)
    with pytest.raises(AssertionError, match="measured"):
        pipe.prune(1)


def test_make_plan_leaves_the_pipeline_alone(pipe, scores):
    before = tiny.snapshot(pipe)
    plan = make_plan(pipe, 5, scores=scores)
    assert len(plan) == 5 and tiny.differences(before, tiny.snapshot(pipe)) == []


def test_prune_again(pipe, scores):
    first = pipe.prune(3, scores=scores)
    before = count_params(pipe.unet)
    second = pipe.prune(2, conditions="pizza", num_inference_steps=1, include="up_blocks.1")
    assert count_params(pipe.unet) == before - second.params_removed
    merged = plan_of(pipe.unet)
    assert merged.params_removed == first.params_removed + second.params_removed
    assert len(merged) == len(stand_ins(pipe.unet))


# ---- plans and scores from files -----------------------------------------------------------------------------------


def test_a_plan_prunes_a_sibling_from_an_object_or_a_file(scores, tmp_path):
    a, b, c = (tiny.stable_diffusion() for _ in range(3))
    plan = a.prune(10, scores=scores)
    plan.save(tmp_path / "plan.json")
    assert b.prune(PruningPlan.load(tmp_path / "plan.json")) == plan
    assert c.prune(tmp_path / "plan.json").paths == plan.paths
    assert torch.equal(latents(a), latents(b)) and torch.equal(latents(a), latents(c))


def test_scores_from_a_file(pipe, scores, tmp_path):
    scores.save(tmp_path / "scores.jsonl")
    assert (
        pipe.prune(4, scores=tmp_path / "scores.jsonl").paths
        == make_plan(tiny.stable_diffusion(), 4, scores=scores).paths
    )


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, -3, True, False, 2.5, 3.0])
def test_k_that_is_no_positive_whole_number(pipe, monkeypatch, k):
    forbid_calls(monkeypatch, pipe)
    with pytest.raises(ValueError, match=f"k: got {k}, expected"):
        pipe.prune(k)


def test_k_as_text_is_no_number(pipe, monkeypatch):
    forbid_calls(monkeypatch, pipe)
    with pytest.raises(
        ValueError, match="target: got '3', expected a whole number of operators, a PruningPlan or the file"
    ):
        pipe.prune("3")
    with pytest.raises(ValueError, match="got no goal, expected one of a number of operators, params="):
        pipe.prune()


def test_k_above_the_limit_says_how_many_before_scoring(pipe, scores, limit, monkeypatch):
    forbid_scoring(monkeypatch)
    for given in ({"scores": scores}, {"conditions": "pizza"}):
        with pytest.raises(ValueError, match=rf"k: got {limit + 1}, expected 1 to {limit}; .* are {limit}"):
            pipe.prune(limit + 1, **given)
    with pytest.raises(ValueError, match="expected 1 to 2"):
        pipe.prune(3, conditions="pizza", include=["conv_in", "conv_out"])
    assert not stand_ins(pipe.unet)


def test_scores_of_another_model(pipe, scores, monkeypatch, tmp_path):
    pipe.unet = tiny.unet(layers_per_block=2)
    scores.save(tmp_path / "scores.jsonl")
    forbid_calls(monkeypatch, pipe)
    for other in (scores, tmp_path / "scores.jsonl"):
        with pytest.raises(
            PlanError, match=r"scores are of another model: UNet2DConditionModel with architecture .*; score this"
        ):
            pipe.prune(2, scores=other)
    with pytest.raises(ValueError, match="component: got 'vae', the scores are of 'unet'"):
        pipe.prune(2, scores=scores, component="vae")
    with pytest.raises(ValueError, match="scores: got list"):
        pipe.prune(2, scores=[1])


def test_a_plan_of_another_architecture(pipe, scores, tmp_path):
    plan = tiny.stable_diffusion().prune(3, scores=scores)
    pipe.unet = tiny.unet(layers_per_block=2)
    with pytest.raises(PlanError, match="the plan was made for UNet2DConditionModel with architecture"):
        pipe.prune(plan)
    with pytest.raises(ValueError, match="no component 'transformer'"):
        pipe.prune(plan, component="transformer")
    assert not stand_ins(pipe.unet) and plan_of(pipe.unet) is None


def test_an_empty_plan(pipe, scores):
    plan = make_plan(pipe, 1, scores=scores).with_modifications([])
    with pytest.raises(PlanError, match="lists no modification"):
        pipe.prune(plan)


def test_a_plan_twice_is_an_error(pipe, scores):
    plan = pipe.prune(5, scores=scores)
    with pytest.raises(PlanError, match="was made for UNet2DConditionModel"):
        pipe.prune(plan)
    only_activation = make_plan(tiny.stable_diffusion(), 5, scores=scores).with_modifications(
        [Modification(r.path, r.kind, r.stand_in) for r in scores if r.path == "conv_act"]
    )
    other = tiny.stable_diffusion()
    other.prune(only_activation)
    replaced = other.unet.conv_act
    with pytest.raises(PlanError, match=r"takes out \['conv_act'\], which this UNet2DConditionModel has lost already"):
        other.prune(only_activation)
    assert other.unet.conv_act is replaced


@pytest.mark.parametrize(("cut", "message"), [(-9, "breaks off"), (30, "no complete first line")])
def test_broken_off_scores_file(pipe, scores, monkeypatch, tmp_path, cut, message):
    path = tmp_path / "scores.jsonl"
    scores.save(path)
    path.write_bytes(path.read_bytes()[:cut])
    forbid_calls(monkeypatch, pipe)
    with pytest.raises(PlanError, match=message):
        pipe.prune(2, scores=path)
    with pytest.raises(PlanError, match="no such file of scores"):
        pipe.prune(2, scores=tmp_path / "nowhere.jsonl")


def test_damaged_plan_file(pipe, monkeypatch, tmp_path):
    forbid_calls(monkeypatch, pipe)
    (tmp_path / "plan.json").write_text('{"format": "ld_pruner_hf.plan", "version": 1, "modif')
    with pytest.raises(PlanError, match="truncated or damaged"):
        pipe.prune(tmp_path / "plan.json")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"criterion": "fid"}, "criterion: got 'fid'"),
        ({"component": "unett"}, "no component 'unett'"),
        ({"kinds": "Conv4d"}, "kinds: got 'Conv4d'"),
        ({"include": "x.*"}, "matches no module"),
        ({"conditions": []}, "conditions: got an empty list"),
        ({"colour": "red"}, r"takes no argument \['colour'\]"),
    ],
)
def test_bad_arguments_of_prune(pipe, monkeypatch, call, message):
    forbid_calls(monkeypatch, pipe)
    with pytest.raises(ValueError, match=message):
        pipe.prune(2, **call)


def test_a_compiled_denoiser_is_refused(pipe, monkeypatch):
    pipe.unet = torch.compile(pipe.unet)
    forbid_scoring(monkeypatch)
    for use in (lambda: pipe.prune(2), lambda: pipe.score("pizza")):
        with pytest.raises(ValueError, match="unwrap it first"):
            use()


# ---- every kind of pipeline ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "call"),
    [(tiny.ldm, {}), (tiny.ddpm, {}), (tiny.ddim, {}), (tiny.dit, {"class_labels": [3]}), (tiny.stable_diffusion, {})],
    ids=["ldm", "ddpm", "ddim", "dit", "stable-diffusion"],
)
def test_score_prune_save_reload(make, call, tmp_path):
    pipe = make()
    conditions = "pizza" if make is tiny.stable_diffusion else None
    before = tiny.snapshot(pipe)
    scores = pipe.score(conditions, num_inference_steps=1, kinds=["Attention", "Conv2d", "Linear", "SiLU"], **call)
    assert tiny.differences(before, tiny.snapshot(pipe)) == []
    assert not any(r.error for r in scores) and sum(r.score() > 0 for r in scores) > 0.8 * len(scores)
    denoiser = getattr(pipe, scores.component)
    params = count_params(denoiser)
    plan = pipe.prune(6)
    assert len(stand_ins(denoiser)) == 6 + len(plan.unused) and count_params(denoiser) == params - plan.params_removed
    pipe.save_pretrained(tmp_path)
    loaded = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path))
    assert type(loaded) is type(pipe) and plan_of(getattr(loaded, scores.component)).paths == plan.paths
    assert torch.equal(latents(pipe, call), latents(loaded, call))


def test_methods_are_on_every_pipeline(pipe):
    for name in ("score", "prune", "profile"):
        assert getattr(DiffusionPipeline, name) is vars(LDPrunerMixin)[name]
        assert "Raises:" in getattr(DiffusionPipeline, name).__doc__ or name == "profile"
    assert "peak memory" in DiffusionPipeline.profile.__doc__ and "in place" in DiffusionPipeline.prune.__doc__
    assert not hasattr(DiffusionPipeline, "_ld_pruner_scores")


def test_from_pipe_keeps_the_pruned_denoiser(pipe, scores):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe.prune(5, scores=scores)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet and plan_of(other.unet) is not None and callable(other.prune)


def test_a_pipeline_loaded_and_saved_again_stays_pruned(pipe, scores, tmp_path):
    plan = pipe.prune(5, scores=scores)
    pipe.save_pretrained(tmp_path / "a")
    loaded = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path / "a"))
    loaded.save_pretrained(tmp_path / "b")
    again = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path / "b"))
    assert plan_of(again.unet).paths == plan.paths and torch.equal(latents(pipe), latents(again))


# ---- profile -------------------------------------------------------------------------------------------------------


def test_profile_of_a_pipeline_before_and_after(pipe, scores):
    before = tiny.snapshot(pipe)
    a = pipe.profile(prompt="pizza", repeats=2)
    assert tiny.differences(before, tiny.snapshot(pipe)) == []
    assert a.params == count_params(pipe.unet) and a.batch_size == 2 and a.operators == {}
    plan = pipe.prune(20, scores=scores)
    b = pipe.profile(prompt="pizza", repeats=2)
    assert b.params == a.params - plan.params_removed and b.macs == a.macs - plan.macs_removed


def test_profile_takes_call_arguments(pipe):
    small, large = (pipe.profile(prompt="pizza", height=s, width=s, repeats=1).macs for s in (16, 32))
    assert large > 3 * small
    with pytest.raises(ValueError, match="takes no argument"):
        pipe.profile(colour="red")
    assert pipe.profile(prompt="pizza", guidance_scale=1.0, repeats=1).batch_size == 1
