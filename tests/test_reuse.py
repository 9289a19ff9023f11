"""Reuse of the first denoising step: the same bits as without, from less work, in little memory."""

from __future__ import annotations

from collections import Counter

import deprecated_families  # noqa: F401
import families
import pytest
import tiny
import torch
from torch import nn

from ld_pruner_hf import reuse, scoring
from ld_pruner_hf.plan import Modification
from ld_pruner_hf.reuse import FirstStep, Span, ended_before, trace

HOW = {"conditions": tiny.PROMPTS[:2], "num_inference_steps": 2}
PARTS = ["conv_in", "down_blocks.0.resnets.0.conv*", "mid_block", "mid_block.attentions.0", "up_blocks.1.resnets*"]


class Two(nn.Module):
    """Calls `inner` of its own, one layer twice, and writes into what another layer returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x):
        y = self.first(x)
        h = self.inner(y)
        y += h
        return self.last(self.twice(self.twice(y)))


@pytest.fixture
def everything_kept(monkeypatch):
    monkeypatch.setattr(reuse, "MEMORY_SHARE", 100.0)


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.dit])
def test_scores_are_the_same_bits_and_take_less(make, everything_kept, monkeypatch):
    how = {**HOW, "include": PARTS}
    if make is tiny.dit:
        how = {"conditions": [{"class_labels": [1], "guidance_scale": 2.0}], "num_inference_steps": 2}
    pipe = make()
    ran = Counter()
    for module in pipe.components[scoring.find_denoiser(pipe)].modules():
        module.forward = counting(module.forward, ran)
    runs = []
    for keep in (100.0, 0.0):
        monkeypatch.setattr(reuse, "MEMORY_SHARE", keep)
        before = ran.total()
        runs.append([(r.key, r.avg_dist, r.std_dist, r.error) for r in pipe.score(**how)])
        runs.append(ran.total() - before)
    assert runs[0] == runs[2]
    assert runs[1] < 0.9 * runs[3], "of two steps, half the first need not run"


def counting(forward, ran):
    def counted(*args, **kwargs):
        ran["modules"] += 1
        return forward(*args, **kwargs)

    return counted


def test_what_is_given_counts_as_modified(pipe, everything_kept, monkeypatch):
    rows = pipe.score(include="down_blocks.0.resnets.0.conv1", **HOW)
    given = [Modification("down_blocks.0.resnets.0.conv1", "Conv2d", rows.rows[0].stand_in)]
    runs = []
    for keep in (100.0, 0.0):
        monkeypatch.setattr(reuse, "MEMORY_SHARE", keep)
        runs.append([r.avg_dist for r in pipe.score(include="mid_block.*norm*", given=given, **HOW)])
    assert runs[0] == runs[1]


def test_decoders_are_scored_from_kept_outputs_too(pipe, everything_kept, monkeypatch):
    how = {**HOW, "component": "vae", "kinds": "Conv2d"}
    kept = [r.avg_dist for r in pipe.score(**how)]
    monkeypatch.setattr(reuse, "MEMORY_SHARE", 0.0)
    assert kept == [r.avg_dist for r in pipe.score(**how)]


def first_step(model, x, operators=("last",)):
    with torch.no_grad():
        return FirstStep(model, [lambda: model(x)], operators)


def test_outputs_that_were_written_into_are_not_given_back(everything_kept):
    model, x = Two(), torch.randn(3, 4)
    expected = model(x)
    step = first_step(model, x)
    assert set(step.calls[0].outputs) == {"first", "inner"}, "what ran twice is not kept"
    with step.reused(["last"]):
        assert torch.equal(model(x), expected)
        assert not step.calls[0].has("first") and step.calls[0].has("inner")


@torch.no_grad()
def test_other_arguments_are_computed(everything_kept):
    model, x = Two(), torch.randn(3, 4)
    step = first_step(model, x)
    step.calls[0].outputs["inner"][0].zero_()
    step.calls[0].outputs["inner"] = step.calls[0].outputs["inner"][0], (1,)
    y = torch.randn(3, 4)
    expected = model(y)
    with step.reused(["last"]):
        assert torch.equal(model(y), expected)
    plain = model(x)
    with step.reused(["last"]):
        assert not torch.equal(model(x), plain), "the same arguments use what is kept"
    assert torch.equal(model(x), plain), "and after that nothing does"


def test_calls_that_record_gradients_are_computed(everything_kept):
    """Guidance by gradients differentiates through the call; what was kept is no part of its graph."""
    model, x = Two(), torch.randn(3, 4)
    step = first_step(model, x)
    step.calls[0].outputs["inner"] = step.calls[0].outputs["inner"][0].zero_(), (1,)
    plain = model(x)
    with step.reused(["last"]):
        assert torch.equal(model(x), plain)
        with torch.no_grad():
            assert not torch.equal(model(x), plain)


def test_attentions_whose_processor_the_pipeline_sets_run_each_time(everything_kept):
    """pix2pix-zero's notes the attention maps of each step, and asks for them later."""
    pipe, call = families.make("pix2pix_zero")
    scores = pipe.score(conditions=[call], num_inference_steps=2, seeds=1, kinds="Upsample2D")
    assert len(scores) and [row.error for row in scores] == [None] * len(scores)


def test_spans_of_one_call():
    model = Two()
    with torch.no_grad():
        spans = trace(model, lambda: [model(torch.zeros(2, 4)) for _ in range(2)])
    assert spans["inner.0"].parent == "inner" and spans["first"].parent == ""
    assert spans["first"].size == 2 * 4 * 4
    assert ended_before(spans, ["last"]) == ["first", "inner"]
    assert ended_before(spans, ["last", "inner.1"]) == ["first", "inner.0"]
    assert ended_before(spans, ["twice"]) == ["first", "inner"]
    assert ended_before(spans, ["last", "not there"]) == ended_before(spans, ["first"]) == []


def test_the_budget_goes_to_what_saves_most_for_its_bytes():
    spans = {
        "": Span("", "", 0, 9), "slow": Span("slow", "", 1, 2, seconds=4.0, size=10),
        "big": Span("big", "", 3, 4, seconds=5.0, size=100), "end": Span("end", "", 5, 6, seconds=1.0, size=1),
    }  # fmt: skip
    operators = Counter(["end"])
    assert reuse._worth_keeping(spans, operators, 99) == {"slow"}
    assert reuse._worth_keeping(spans, operators, 110) == {"slow", "big"}
    assert reuse._worth_keeping(spans, operators, 0) == set()


def test_little_memory_is_kept(pipe):
    scores_of = {}

    class Watched(FirstStep):
        def __init__(self, model, runs, operators):
            super().__init__(model, runs, operators)
            scores_of["kept"] = sum(
                t.nbytes for call in self.calls for output, _ in call.outputs.values()
                for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)
            )  # fmt: skip
            scores_of["peak"] = reuse.peak_memory_of(runs[0], [model])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "FirstStep", Watched)
        pipe.score(include=PARTS, **HOW)
    assert 0 < scores_of["kept"] <= reuse.MEMORY_SHARE * scores_of["peak"]
