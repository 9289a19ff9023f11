"""Scores: exact, repeatable, resumable after a kill, and without a trace on the pipeline."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline

from ld_pruner_hf import OperatorScores, PlanError, make_plan, score_cost, scoring
from ld_pruner_hf.latents import make_jobs, preserved
from ld_pruner_hf.operators import find_operators
from ld_pruner_hf.replacements import StandIn
from ld_pruner_hf.scores import LATENT_SHIFT
from ld_pruner_hf.scoring import LatentSets, latent_distances, score_operators

QUICK = {"num_inference_steps": 2, "include": "mid_block", "kinds": ["Attention", "ResnetBlock2D", "LayerNorm"]}


def numbers(scores: OperatorScores) -> list:
    """All that a run measures, without its times."""
    return [(r.path, r.stand_in, r.avg_dist, r.std_dist, r.params_removed, r.macs_removed, r.error) for r in scores]


def count_measured(monkeypatch) -> list[str]:
    """The list grows by the path of every operator that is measured."""
    measured: list[str] = []
    original = scoring._measure_one

    def counted(operator, *args):
        measured.append(operator.path)
        return original(operator, *args)

    monkeypatch.setattr(scoring, "_measure_one", counted)
    return measured


def forbid_calls(monkeypatch, pipe) -> None:
    """Any denoising from here on is an error."""

    def fail(*_, **__):
        raise AssertionError("the pipeline ran before the input was checked")

    monkeypatch.setattr(pipe.unet, "forward", fail)


# ---- the score -----------------------------------------------------------------------------------------------------


def test_what_saves_nothing_can_be_skipped(pipe):
    how = {"conditions": "pizza", "num_inference_steps": 1, "include": "mid_block.resnets.0", "criterion": "magnitude"}
    everything, rest = (pipe.score(skip_free=skip, **how) for skip in (False, True))
    free = {r.key for r in everything if r.params_removed <= 0 and r.macs_removed <= 0}
    assert ("mid_block.resnets.0.nonlinearity", "identity") in free
    assert {r.key for r in rest} == {r.key for r in everything} - free and rest.settings["skip_free"] is True
    with pytest.raises(ValueError, match=r"expected 1 to \d+"):
        make_plan(pipe, len(free) + len(rest), skip_free=True, **how)


def test_distances_by_hand():
    a = torch.tensor([[1.0, 2.0], [3.0, 6.0]])  # mean (2, 4), std (1, 2)
    b = torch.tensor([[2.0, 8.0], [6.0, 8.0]])  # mean (4, 8), std (2, 0)
    avg, std = latent_distances(a, b)
    assert avg == pytest.approx((2**2 + 4**2) ** 0.5) and std == pytest.approx((1**2 + 2**2) ** 0.5)


def test_distances_of_pictures_are_over_the_flattened_latent():
    a, b = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    assert latent_distances(a, b) == pytest.approx(latent_distances(a.flatten(1), b.flatten(1)))
    assert latent_distances(a, a.clone()) == (0.0, 0.0)


def test_one_latent_has_no_standard_deviation():
    assert latent_distances(torch.randn(1, 4), torch.randn(1, 4))[1] == 0.0


@pytest.mark.parametrize("pooled", [False, True])
def test_an_unmodified_model_scores_exactly_zero(pipe, monkeypatch, pooled):
    """With the replacement left out, every latent must come out bit for bit as before, whatever was measured in between."""
    before = score_operators(pipe, tiny.PROMPTS, pooled=pooled, **QUICK)
    assert all(r.score() > 0 for r in before)
    monkeypatch.setattr(scoring, "applied", lambda model, modifications: torch.no_grad())
    scores = score_operators(pipe, tiny.PROMPTS, pooled=pooled, batch_size=4, **QUICK)
    assert len(scores) == len(before)
    assert {(r.avg_dist, r.std_dist) for r in scores} == {((0.0,) * (1 if pooled else 3),) * 2}
    assert {r.score(criterion) for r in scores for criterion in LATENT_SHIFT} == {0.0}


def test_an_identity_stand_in_for_what_does_nothing_scores_zero(pipe):
    """A real replacement, by a stand-in that computes the same."""
    with torch.no_grad():
        pipe.unet.mid_block.resnets[0].conv2.weight.zero_()
        pipe.unet.mid_block.resnets[0].conv2.bias.zero_()
    scores = score_operators(pipe, "pizza", num_inference_steps=2, include="mid_block.resnets.0.conv2")
    assert {r.stand_in.name: r.score() for r in scores}["zero"] == 0.0
    assert {r.stand_in.name: r.score() for r in scores}["identity"] > 0.0


def test_two_runs_with_the_same_seed_are_identical():
    a, b = (tiny.stable_diffusion().score(["pizza", "red heart"], **QUICK) for _ in range(2))
    assert numbers(a) == numbers(b)
    other = tiny.stable_diffusion().score(["pizza", "red heart"], seed=5, **QUICK)
    assert numbers(other) != numbers(a)


def test_scores_do_not_depend_on_the_callers_random_state(pipe):
    a = pipe.score("pizza", **QUICK)
    torch.manual_seed(99), np.random.seed(99), random.seed(99)
    assert numbers(pipe.score("pizza", **QUICK)) == numbers(a)


def test_scores_are_those_of_the_latents(pipe):
    """One row by hand: the pipeline's own latents, with and without the operator."""
    scores = score_operators(
        pipe, ["pizza", "cat face"], num_inference_steps=2, seeds=2, seed=3, include="mid_block", kinds="Attention"
    )
    row = scores.rows[0]

    def latents(prompt):
        generator = [torch.Generator().manual_seed(s) for s in (3, 4)]
        return pipe([prompt] * 2, num_inference_steps=2, generator=generator, output_type="latent").images

    originals = [latents(p) for p in ("pizza", "cat face")]
    operator = pipe.unet.get_submodule(row.path)
    parent, _, name = row.path.rpartition(".")
    setattr(pipe.unet.get_submodule(parent), name, StandIn(row.stand_in))
    pairs = [latent_distances(a, latents(p)) for a, p in zip(originals, ("pizza", "cat face"), strict=True)]
    setattr(pipe.unet.get_submodule(parent), name, operator)
    assert row.avg_dist == pytest.approx([p[0] for p in pairs], rel=1e-3)
    assert row.std_dist == pytest.approx([p[1] for p in pairs], rel=1e-3)
    assert row.score() == pytest.approx(sum(map(sum, pairs)), rel=1e-3)


def test_pooled_compares_one_set(pipe):
    rows = pipe.score(tiny.PROMPTS, pooled=True, **QUICK).rows
    assert all(len(r.avg_dist) == len(r.std_dist) == 1 for r in rows)
    assert all(len(r.avg_dist) == 3 for r in pipe.score(tiny.PROMPTS, **QUICK))


def test_latents_go_to_the_set_of_their_condition(pipe):
    conditions = [{"prompt": p, "num_inference_steps": 1} for p in tiny.PROMPTS]
    with preserved(pipe):
        sets = [LatentSets(pipe, "unet", make_jobs(pipe, conditions, [0, 1], n), 3, False).collect() for n in (1, 4)]
    assert [s.shape for s in sets[0]] == [(2, 4, 8, 8)] * 3
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*sets, strict=True))


def test_several_pictures_per_prompt_belong_to_their_prompt(pipe):
    scores = pipe.score(["pizza", "cat face"], num_images_per_prompt=2, seeds=1, **QUICK)
    assert all(len(r.avg_dist) == 2 and r.error is None for r in scores)


def test_rows_say_what_is_removed(pipe):
    operators = {o.path: o for o in find_operators(pipe, progress=False)}
    for r in pipe.score("pizza", **QUICK):
        assert r.params_removed == operators[r.path].params > 0
        assert r.macs_removed == operators[r.path].macs


# ---- an operator that fails ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("failure", "reason"), [("nan", "not finite"), ("error", "RuntimeError: broken stand-in")])
def test_a_failing_operator_ranks_last_and_the_run_goes_on(pipe, monkeypatch, failure, reason):
    forward = StandIn.forward
    bad = "mid_block.attentions.0.transformer_blocks.0.norm2"
    normal = pipe.unet.get_submodule(bad)

    def broken(self, *args, **kwargs):
        if pipe.unet.get_submodule(bad) is not self or not scoring_runs:
            return forward(self, *args, **kwargs)
        if failure == "error":
            raise RuntimeError("broken stand-in")
        return forward(self, *args, **kwargs) * float("nan")

    scoring_runs: list[bool] = []
    collect = LatentSets.collect
    monkeypatch.setattr(LatentSets, "collect", lambda self: (scoring_runs.append(True), collect(self))[1])
    monkeypatch.setattr(StandIn, "forward", broken)
    scores = pipe.score("pizza", **QUICK)
    failed = [r for r in scores if r.error]
    assert [r.path for r in failed] == [bad] and reason in failed[0].error
    assert scores.ranked()[-1].path == bad and scores.ranked()[-1].score() == float("inf")
    assert all(np.isfinite(r.score()) for r in scores if r.path != bad) and len(scores) > 5
    assert pipe.unet.get_submodule(bad) is normal


def test_an_original_that_is_not_finite_is_an_error(pipe):
    pipe.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        pipe.score("pizza", **QUICK)


# ---- no trace ------------------------------------------------------------------------------------------------------


def prepared():
    """A pipeline in a state that a careless run would lose, and the caller's random numbers."""
    pipe = tiny.stable_diffusion()
    pipe("pizza", num_inference_steps=4)
    pipe.unet.train()
    pipe.unet.mid_block.eval()
    pipe.unet.conv_in.requires_grad_(False)
    pipe.unet.conv_act.register_forward_hook(lambda *_: None)
    torch.manual_seed(11), np.random.seed(12), random.seed(13)
    return pipe


@pytest.fixture(scope="module")
def untouched_picture():
    return tiny.picture(prepared(), prompt="pizza")


def interrupt_after(monkeypatch, calls: int, action) -> None:
    """Let `action` happen inside the so-manieth collection of latents, while an operator is replaced."""
    collect = LatentSets.collect
    count = []

    def collecting(self):
        count.append(1)
        if len(count) == calls:
            assert any(isinstance(m, StandIn) for m in self.pipe.unet.modules())
            collect(self)
            action()
        return collect(self)

    monkeypatch.setattr(LatentSets, "collect", collecting)


def fail() -> None:
    raise torch.OutOfMemoryError("no memory left")


def interrupt() -> None:
    raise KeyboardInterrupt


def press_control_c() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("how", ["finished", "failed", "interrupted", "signal"])
def test_the_pipeline_is_left_as_it_was(monkeypatch, how, untouched_picture):
    pipe = prepared()
    before = tiny.snapshot(pipe)
    if how == "finished":
        pipe.score("pizza", **QUICK)
    elif how == "failed":
        interrupt_after(monkeypatch, 4, fail)
        with pytest.raises(torch.OutOfMemoryError):
            pipe.score("pizza", **QUICK)
    else:
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt_after(monkeypatch, 4, press_control_c if how == "signal" else interrupt)
        try:
            with pytest.raises(KeyboardInterrupt):
                pipe.score("pizza", **QUICK)
        finally:
            signal.signal(signal.SIGINT, handler)
    assert tiny.differences(before, tiny.snapshot(pipe)) == []
    assert np.array_equal(tiny.picture(pipe, prompt="pizza"), untouched_picture)


def test_a_component_other_than_the_denoiser(pipe):
    before = tiny.snapshot(pipe)
    scores = pipe.score("pizza", component="text_encoder", num_inference_steps=1, kinds="Linear")
    assert scores.component == "text_encoder" and len(scores) > 2 and any(r.score() > 0 for r in scores)
    assert tiny.differences(before, tiny.snapshot(pipe)) == []


# ---- resuming ------------------------------------------------------------------------------------------------------


def test_only_what_is_missing_is_measured(pipe, tmp_path, monkeypatch):
    path = tmp_path / "scores.jsonl"
    whole = pipe.score("pizza", resume_from=path, **QUICK)
    assert OperatorScores.load(path) == whole
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:40])
    measured = count_measured(monkeypatch)
    again = pipe.score("pizza", resume_from=path, **QUICK)
    assert len(measured) == len(whole) - 3 and measured == [r.path for r in whole.rows[3:]]
    assert numbers(again) == numbers(whole) == numbers(OperatorScores.load(path))
    measured.clear()
    forbidden = []
    monkeypatch.setattr(LatentSets, "collect", lambda self: forbidden.append(1))
    assert pipe.score("pizza", resume_from=path, **QUICK) == again
    assert not measured and not forbidden, "a finished run denoises nothing"


def test_rows_are_on_the_disk_one_by_one(pipe, tmp_path, monkeypatch):
    path = tmp_path / "scores.jsonl"
    seen = []
    original = scoring._measure_one

    def looking(*args):
        seen.append(len(path.read_text().splitlines()))
        return original(*args)

    monkeypatch.setattr(scoring, "_measure_one", looking)
    scores = pipe.score("pizza", resume_from=path, **QUICK)
    assert seen == list(range(1, len(scores) + 1))


def test_failed_rows_are_kept(pipe, tmp_path, monkeypatch):
    path = tmp_path / "scores.jsonl"
    whole = pipe.score("pizza", resume_from=path, **QUICK)
    lines = path.read_text().splitlines()
    row = json.loads(lines[1]) | {"error": "RuntimeError: no", "avg_dist": [], "std_dist": []}
    path.write_text("\n".join([lines[0], json.dumps(row), *lines[2:]]) + "\n")
    measured = count_measured(monkeypatch)
    again = pipe.score("pizza", resume_from=path, **QUICK)
    assert not measured and again.rows[0].error == "RuntimeError: no" and numbers(again)[1:] == numbers(whole)[1:]


def change_weights(pipe, call):
    pipe.unet.conv_in.bias.data += 1


def change_scheduler(pipe, call):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (change_weights, "weights"),
        (change_scheduler, "prediction_type"),
        (lambda pipe, call: call.update(num_inference_steps=3), "num_inference_steps"),
        (lambda pipe, call: call.update(conditions="cat face"), "cat face"),
        (lambda pipe, call: call.update(seed=1), "seeds"),
        (lambda pipe, call: call.update(seeds=3), "seeds"),
        (lambda pipe, call: call.update(pooled=True), "pooled"),
        (lambda pipe, call: setattr(pipe, "unet", tiny.unet(layers_per_block=2)), "architecture"),
    ],
)
def test_a_file_of_another_run_is_refused_before_any_work(pipe, tmp_path, monkeypatch, change, named):
    path = tmp_path / "scores.jsonl"
    call = {"conditions": "pizza", "resume_from": path, "num_inference_steps": 1, "include": "conv_act"}
    pipe.score(**call)
    content = path.read_bytes()
    change(pipe, call)
    forbid_calls(monkeypatch, pipe)
    with pytest.raises(PlanError, match=f"made by another run .*{named}"):
        pipe.score(**call)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "message"), [("{", "no complete first line"), ("{}\n", "got format None"), ("x\n", "line 1")]
)
def test_a_damaged_file_is_refused_before_any_work(pipe, tmp_path, monkeypatch, content, message):
    path = tmp_path / "scores.jsonl"
    path.write_text(content)
    forbid_calls(monkeypatch, pipe)
    with pytest.raises(PlanError, match=message):
        pipe.score("pizza", resume_from=path, **QUICK)
    assert path.read_text() == content


KILLED = """
import sys, time, torch
from diffusers import DiffusionPipeline
from ld_pruner_hf import scores
torch.set_num_threads(1)
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
append = scores.RowFile.append
written = []

def stopping(self, row):
    append(self, row)
    written.append(row)
    if len(written) == 5:  # stands still in the middle of the run, with rows on the disk, until it is killed
        time.sleep(600)

scores.RowFile.append = stopping
pipe.score("pizza", resume_from=sys.argv[2], num_inference_steps=2, include="mid_block",
           kinds=["Attention", "ResnetBlock2D", "LayerNorm"])
"""


def test_a_killed_run_goes_on_where_it_was(pipe, tmp_path, monkeypatch):
    pipe.save_pretrained(tmp_path / "pipe")
    path = tmp_path / "scores.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "pipe"), str(path)], stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 240
        while not path.exists() or path.read_bytes().count(b"\n") < 6:
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline, "the run wrote no rows"
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
        process.stderr.close()
    with pytest.raises(PlanError, match="breaks off after 5 rows"):
        OperatorScores.load(path)
    pipe = tiny.quiet(DiffusionPipeline.from_pretrained(tmp_path / "pipe"))
    whole = pipe.score("pizza", **QUICK)
    measured = count_measured(monkeypatch)
    resumed = pipe.score("pizza", resume_from=path, **QUICK)
    assert measured == [r.path for r in whole.rows[5:]] and measured
    assert numbers(resumed) == numbers(whole)


# ---- cost ----------------------------------------------------------------------------------------------------------


def test_the_text_encoder_runs_once_for_all_operators(pipe, monkeypatch):
    calls = []
    forward = pipe.text_encoder.forward
    monkeypatch.setattr(pipe.text_encoder, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    few = len(pipe.score("pizza", **{**QUICK, "kinds": "Attention"}))
    calls_for_few = len(calls)
    many = len(pipe.score("pizza", **QUICK))
    assert many > 2 * few and len(calls) == 2 * calls_for_few, "as often, whatever the number of operators"


def test_an_encoder_that_is_scored_itself_is_not_remembered(pipe):
    scores = pipe.score("pizza", component="text_encoder", num_inference_steps=1, kinds="LayerNorm")
    assert len({r.score() for r in scores if not r.error}) > 1


def test_the_cost_is_told_before_anything_is_scored(pipe, monkeypatch):
    measured = count_measured(monkeypatch)
    call = {**QUICK, "conditions": ["pizza", "red heart"], "seeds": 2}
    cost = score_cost(pipe, **call)
    assert not measured
    told = []
    scores = pipe.score(on_cost=told.append, **call)
    rows = len(scores)
    assert (cost.operators, cost.rows) == (told[0].operators, told[0].rows) == (len(scores.ranked()), rows)
    assert cost.inputs == (rows + 1) * 2 * 2 * 2 * 2, "prompts x seeds x steps x guidance, and the original"
    assert cost.calls == (rows + 1) * 2 and cost.seconds > 0 and cost.memory > 1000
    text = str(cost)
    assert f"{cost.operators} operators with {rows} stand-ins, effort exact" in text and "MB" in text


def test_the_predicted_time_is_about_what_it_takes(pipe):
    call = {**QUICK, "conditions": "pizza", "num_inference_steps": 8}
    told = []
    scores = pipe.score(on_cost=told.append, **call)
    assert 0.2 < sum(r.seconds for r in scores) / told[0].seconds < 5


@pytest.mark.parametrize(
    ("how", "compare"),
    [
        ({"effort": "fast"}, lambda cheap, whole: cheap.inputs * 500 <= whole.inputs + 500),
        ({"criterion": "magnitude"}, lambda cheap, whole: cheap.inputs == 0),
        ({"criterion": "taylor", "calibration": 2}, lambda cheap, whole: 0 < cheap.inputs < whole.inputs / 10),
    ],
)
def test_the_cost_of_other_ways(pipe, how, compare):
    call = {**QUICK, "conditions": tiny.PROMPTS}
    assert compare(score_cost(pipe, **call, **how), score_cost(pipe, **call))


def test_the_cost_of_a_decoder(pipe):
    cost = score_cost(pipe, "pizza", component="vae", num_inference_steps=1, include="decoder.mid_block", seeds=2)
    assert cost.inputs == (cost.rows + 1) * 2


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"criterion": "fid"}, "criterion: got 'fid', expected one of"),
        ({"seeds": 0}, "seeds: got 0"),
        ({"seeds": True}, "seeds: got True"),
        ({"seeds": [1, 2]}, r"seeds: got \[1, 2\]"),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({"conditions": []}, "conditions: got an empty list"),
        ({"colour": "red"}, r"takes no argument \['colour'\]"),
        ({"component": "transformer"}, "no component 'transformer'"),
        ({"kinds": "Conv4d"}, "kinds: got 'Conv4d'"),
        ({"include": "nothing.*"}, r"include: the pattern 'nothing.\*' matches no module"),
        ({"exclude": ["nothing"]}, "exclude: the pattern 'nothing' matches no module"),
        ({"standins": "best"}, "standins: got 'best'"),
    ],
)
def test_bad_input_is_an_error_before_any_work(pipe, monkeypatch, call, message):
    forbid_calls(monkeypatch, pipe)
    with pytest.raises(ValueError, match=message):
        score_operators(pipe, **{"conditions": "pizza", **call})


def test_nothing_left_to_score(pipe):
    with pytest.raises(ValueError, match="none of 1 selected modules can be replaced"):
        pipe.score("pizza", include="time_proj", num_inference_steps=1)


def test_progress_is_quiet_when_asked(pipe, capsys, monkeypatch):
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    pipe.score("pizza", **QUICK)
    assert capsys.readouterr().err == ""


def test_rows_of_the_same_operator_with_two_stand_ins(pipe):
    rows = [r for r in pipe.score("pizza", **QUICK) if r.kind == "Attention"]
    assert {r.stand_in.name for r in rows} == {"identity", "zero"} and len({r.key for r in rows}) == len(rows)
