"""pipe.prune(params=0.3) and its like, on the shipped pipeline: budgets are met by what is measured afterwards."""

from __future__ import annotations

import warnings

import pytest
import torch

from ld_pruner_hf import demo, score_operators
from ld_pruner_hf.latents import final_latents, preserved, record_call
from ld_pruner_hf.profiling import count_macs, peak_memory

KINDS = ["ResnetBlock2D", "Transformer2DModel", "UNetMidBlock2DCrossAttn", "FeedForward"]
SETTINGS = {"conditions": ["red heart", "rocket"], "num_inference_steps": 1, "seeds": 1}


def emoji():
    pipe = demo.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def scores():
    return score_operators(emoji(), kinds=KINDS, **SETTINGS)


def macs_of(pipe) -> int:
    with preserved(pipe):
        return count_macs(pipe.unet, record_call(pipe, "unet", {"prompt": "red heart", "num_inference_steps": 2}))[0][
            ""
        ]


@pytest.mark.parametrize("method", ["knapsack", "ratio", "top-k"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_params_are_met_exactly(scores, method, share):
    pipe = emoji()
    before = pipe.unet.num_parameters()
    plan = pipe.prune(params=share, method=method, scores=scores)
    after = pipe.unet.num_parameters()
    assert after <= (1 - share) * before
    assert plan.params_removed == before - after
    chosen = sum(m.params_removed for m in plan)  # without what nothing uses any more
    assert chosen == round(plan.how["predicted"]["params"] * before) <= plan.params_removed
    assert plan.how["budget"] == {"params": share} and plan.how["method"] == method
    assert torch.isfinite(draw(pipe)).all()


def draw(pipe) -> torch.Tensor:
    with preserved(pipe):
        return final_latents(pipe, {"prompt": "red heart", "num_inference_steps": 2}, [0])


def test_macs_are_met_as_measured(scores):
    pipe = emoji()
    before = macs_of(pipe)
    plan = pipe.prune(macs=0.35, scores=scores)
    assert macs_of(pipe) <= 0.65 * before
    assert macs_of(pipe) == pytest.approx((1 - plan.how["predicted"]["macs"]) * before, rel=1e-3)


def timed(monkeypatch, *measured):
    """Let profiles report these (median, quartile distance) in ms, one after the other."""
    results = iter(measured)
    monkeypatch.setattr("ld_pruner_hf.profiling.measure_latency", lambda fn, *_: (fn(), next(results))[1])


def test_latency_is_predicted_from_shares_and_measured(scores, monkeypatch):
    timed(monkeypatch, (100.0, 1.0), (78.0, 2.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plan = emoji().prune(latency=0.2, scores=scores)
    shares = {o.path: o.latency_share for o in scores}
    assert sum(shares[p] for p in plan.paths) == pytest.approx(plan.how["predicted"]["latency"])
    assert plan.how["predicted"]["latency"] >= 0.2
    measured = plan.how["measured"]
    assert (measured["latency"], measured["before_ms"], measured["after_ms"], measured["iqr_ms"]) == (0.22, 100, 78, 2)


def test_a_missed_latency_is_said(scores, monkeypatch):
    timed(monkeypatch, (100.0, 1.0), (86.0, 1.0))
    with pytest.warns(UserWarning, match=r"20\.0% of the latency were to go.*14\.0% went.*100\.0 -> 86\.0 ms"):
        emoji().prune(latency=0.2, scores=scores)


@pytest.mark.parametrize(("after", "warned"), [(98.5, True), (97.0, False)])
def test_params_that_go_and_bring_no_time_are_said(scores, monkeypatch, after, warned):
    timed(monkeypatch, (100.0, 2.0), (after, 1.0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        emoji().prune(params=0.05, scores=scores)
    said = [str(w.message) for w in caught if "but no time" in str(w.message)]
    assert len(said) == warned and all(
        "of the parameters went" in text and "quartiles 2.0 ms" in text for text in said
    )


def test_memory_is_met_as_measured(scores):
    pipe = emoji()
    plan = pipe.prune(memory=0.3, scores=scores, prompt="red heart", num_inference_steps=2)
    with preserved(pipe):
        call = record_call(pipe, "unet", {"prompt": "red heart", "num_inference_steps": 2})
        after = peak_memory(pipe.unet, call)
        before = peak_memory(emoji().unet, call)
    assert plan.how["predicted"]["memory"] >= 0.3
    assert after <= 0.7 * before and plan.how["measured"]["memory"] == pytest.approx(1 - after / before, abs=1e-3)


def test_latency_really_falls(scores):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the machine may be busy with other work
        plan = emoji().prune(latency=0.5, scores=scores)
    assert plan.how["measured"]["latency"] > 0.15


def test_the_knapsack_is_no_worse_than_the_greedy_choice(scores):
    def damage(method: str) -> float:
        return sum(m.score for m in emoji().prune(macs=0.4, method=method, scores=scores))

    assert damage("knapsack") <= damage("ratio") + 1e-9


def test_fit_lowers_the_damage_of_the_same_budget(scores):
    moved = {}
    original = draw(emoji())
    for fit in (False, True, "affine"):
        pipe = emoji()
        plan = pipe.prune(params=0.3, scores=scores, fit=fit, **(SETTINGS if fit else {}))
        assert ("affine" in {part for m in plan for part in m.stand_in.name.split("+")}) == (fit == "affine")
        moved[fit] = (draw(pipe) - original).norm().item()
    assert moved[True] <= moved[False] and moved["affine"] != moved[False]


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "no goal, expected one of"),
        ((3,), {"params": 0.3}, r"got \['k', 'params'\]"),
        ((), {"params": 0.3, "macs": 0.3}, r"got \['params', 'macs'\]"),
        ((), {"params": 30}, "params: got 30, expected the share to take away"),
        ((), {"latency": 0}, "latency: got 0"),
        ((), {"macs": True}, "macs: got True"),
        (
            (),
            {"params": 0.3, "method": "best"},
            r"got 'best', expected one of \['knapsack', 'ratio', 'top-k', 'rounds'\] for params=",
        ),
        ((3,), {"method": "rounds", "rounds": 1}, "rounds: got 1, expected"),
        ((3,), {"method": "rounds"}, "'rounds' scores anew in each round; leave them out"),
        ((3,), {"method": "knapsack"}, r"expected one of \['top-k', 'rounds'\] for a number of operators"),
        (("bk-sdm-base",), {"params": 0.3}, "cannot go together with a plan or preset"),
        (("bk-sdm-base",), {"fit": True}, "cannot go together"),
        ((3,), {"fit": "all"}, "fit: got 'all'"),
        ((), {"params": 0.99}, r"params cannot be saved; the largest reachable saving is [\d,]+ params"),
    ],
)
def test_goals_that_cannot_be(scores, args, kwargs, message):
    pipe = emoji()
    before = pipe.unet.num_parameters()
    with pytest.raises(ValueError, match=message):
        pipe.prune(*args, **kwargs, scores=scores)
    assert pipe.unet.num_parameters() == before


def test_scores_are_made_if_there_are_none():
    pipe = emoji()
    plan = pipe.prune(params=0.05, kinds=["UNetMidBlock2DCrossAttn"], **SETTINGS)
    assert plan.paths == ["mid_block"]
    assert "mid_block_type=None" in plan.how["saved_as"]


def test_a_given_plan_can_be_fitted(scores):
    pipe = emoji()
    plan = pipe.prune(params=0.3, scores=scores)
    again = emoji()
    assert not plan.diff(again.prune(plan, fit=True, **SETTINGS))
    different = [k for k, v in again.unet.state_dict().items() if not torch.equal(v, pipe.unet.state_dict()[k])]
    assert different and all(".adapters." in k for k in different)
