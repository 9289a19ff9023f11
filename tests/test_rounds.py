"""Scoring given what is taken already, joint damage, and choosing in rounds."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import tiny
import torch

from ld_pruner_hf import OperatorScores, applied, measure_damage, score_operators, top_k
from ld_pruner_hf.latents import make_conditions, preserved
from ld_pruner_hf.plan import Modification, is_inside
from ld_pruner_hf.scoring import latent_distances, output_sets

SETTINGS = {"conditions": ["pizza", "rocket"], "num_inference_steps": 2, "seeds": 2}
KINDS = ["ResnetBlock2D", "Attention", "FeedForward", "Conv2d"]


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion()


@pytest.fixture(scope="module")
def scores(pipe):
    return score_operators(pipe, kinds=KINDS, **SETTINGS)


def modification(scores: OperatorScores, path: str) -> Modification:
    row = next(r for r in scores.ranked() if r.path == path)
    return Modification(row.path, row.kind, row.stand_in)


def test_the_damage_of_one_modification_is_its_score(pipe, scores):
    for row in scores.ranked()[:3]:
        damage = measure_damage(pipe, [Modification(row.path, row.kind, row.stand_in)], **SETTINGS)
        assert damage == pytest.approx(row.score(), rel=1e-5)


def test_scores_given_others_are_the_damage_of_all_together(pipe, scores):
    inner, other = "mid_block.resnets.0.conv1", "down_blocks.0.resnets.0.conv2"
    given = [modification(scores, inner), modification(scores, other)]
    again = score_operators(pipe, include=["mid_block*", "down_blocks.0*"], kinds=KINDS, given=given, **SETTINGS)
    paths = {row.path for row in again}
    assert not {inner, other} & paths and "mid_block.resnets.0" in paths
    assert again.settings["given"] == {m.path: m.stand_in.name for m in given}
    beside = next(r for r in again if r.path == "mid_block.resnets.1")
    together = [*given, Modification(beside.path, beside.kind, beside.stand_in)]
    assert beside.score() == pytest.approx(measure_damage(pipe, together, **SETTINGS), rel=1e-5)
    around = next(r for r in again if r.path == "mid_block.resnets.0")  # takes the place of the convolution inside
    together = [given[1], Modification(around.path, around.kind, around.stand_in)]
    assert around.score() == pytest.approx(measure_damage(pipe, together, **SETTINGS), rel=1e-5)


def test_damage_that_is_not_finite_is_infinite(pipe, scores, monkeypatch):
    row = scores.ranked()[0]
    calls = []

    def broken(self, i):
        calls.append(i)
        return torch.full((4, 4, 8, 8), math.nan if len(calls) > 1 else 1.0)

    monkeypatch.setattr("ld_pruner_hf.scoring.LatentSets.of_job", broken)
    assert measure_damage(pipe, [Modification(row.path, row.kind, row.stand_in)], **SETTINGS) == math.inf


def test_rounds_take_exactly_k_and_see_what_they_do_together(monkeypatch):
    pipe = tiny.stable_diffusion()
    scored = []

    @functools.wraps(score_operators)
    def counted(*args, **kwargs):
        scored.append(len(tuple(kwargs.get("given", ()))))
        return score_operators(*args, **kwargs)

    monkeypatch.setattr("ld_pruner_hf.planning.score_operators", counted)
    plan = pipe.prune(7, method="rounds", rounds=3, kinds=KINDS, **SETTINGS)
    assert len(plan) == 7 and scored == [0, 2, 5]
    assert plan.how["method"] == "rounds" and plan.how["rounds"] == 3 and plan.how["k"] == 7


def test_rounds_meet_a_budget_and_resume_each_round(tmp_path):
    file = tmp_path / "scores.jsonl"
    plans = []
    for _ in range(2):
        pipe = tiny.stable_diffusion()
        before = pipe.unet.num_parameters()
        how = {"method": "rounds", "rounds": 2, "kinds": KINDS, "resume_from": file, **SETTINGS}
        plans.append(pipe.prune(params=0.4, **how))
        assert pipe.unet.num_parameters() <= 0.6 * before
        names = sorted(p.name for p in tmp_path.iterdir())
        assert names == ["scores-round2.jsonl", "scores.jsonl"]
    assert not plans[0].diff(plans[1]) and plans[0].how["predicted"]["params"] >= 0.4


def test_a_budget_in_rounds_may_replace_operators_by_the_block_around_them():
    pipe = tiny.stable_diffusion()
    plan = pipe.prune(params=0.85, method="rounds", rounds=4, **SETTINGS)
    assert plan.how["measured"]["params"] >= 0.85
    assert not any(is_inside(a, b) for a in plan.paths for b in plan.paths)


def test_top_k_keeps_later_rounds_possible(scores):
    """A block that is least important is passed over where the operators inside it are needed to reach the number."""
    rows = {r.path: r for r in scores.ranked()}
    inside = [p for p in rows if is_inside(p, "mid_block.resnets.0")]
    block = [r for r in scores if r.path == "mid_block.resnets.0"]
    cheap = replace(scores, rows=(*(r for r in scores if r.path in inside), *block))
    assert len(inside) > 1
    ranked_first = min(cheap, key=lambda r: r.score()).path
    assert {r.path for r in top_k(cheap, 1)} == {ranked_first}
    (kept,) = top_k(cheap, 1, reachable=len(inside))
    assert kept.path in inside


# ---- the decoder -----------------------------------------------------------------------------------------------------


def test_the_decoder_is_scored_by_its_outputs(pipe):
    found = score_operators(pipe, component="vae", kinds=["ResnetBlock2D", "Attention"], **SETTINGS)
    assert found.component == "vae" and all(r.path.startswith("decoder.") for r in found)
    row = found.ranked()[0]
    sets = []
    for modifications in ([], [Modification(row.path, row.kind, row.stand_in)]):
        sets.append([])
        for prompt in SETTINGS["conditions"]:
            call = {"num_inference_steps": 2, "output_type": "latent"}
            latents = [pipe(prompt, generator=torch.Generator().manual_seed(s), **call).images for s in (0, 1)]
            with torch.no_grad(), applied(pipe.vae, modifications):
                sets[-1].append(pipe.vae.decode(torch.cat(latents) / pipe.vae.config.scaling_factor).sample)
    assert row.score() == pytest.approx(sum(sum(latent_distances(a, b)) for a, b in zip(*sets, strict=True)), rel=1e-4)


def test_the_decoder_runs_again_and_the_denoiser_does_not(pipe, monkeypatch):
    calls = []
    handle = pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        with preserved(pipe):
            sets = output_sets(
                pipe, "vae", make_conditions(pipe, "pizza", {"num_inference_steps": 2}), [0, 1], 8, False
            )
            made = len(calls)
            first, second = sets.collect(), sets.collect()
    finally:
        handle.remove()
    assert made and len(calls) == made and torch.equal(first[0], second[0]) and first[0].shape[0] == 2


def test_a_pruned_decoder_saves_and_loads(tmp_path):
    pipe = tiny.stable_diffusion()
    unet = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    plan = pipe.prune(2, component="vae", **SETTINGS)
    assert plan.component == "vae" and len(plan) == 2
    assert all(torch.equal(v, unet[k]) for k, v in pipe.unet.state_dict().items())
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path)
    draw = [
        p("pizza", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for p in (pipe, again)
    ]
    assert (draw[0] == draw[1]).all() and again.vae.num_parameters() == pipe.vae.num_parameters()
