"""Plans as small files: merged, compared, and applied to sibling fine-tunes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ld_pruner_hf import Modification, OutputRule, PlanError, PruningPlan, StandInSpec, demo, find_operators, plan_of
from ld_pruner_hf.surgery import architecture_of

IDENTITY = StandInSpec((OutputRule("x", 0, "identity"),))
ZERO = StandInSpec((OutputRule("x", 0, "zero"),))


def plan(*paths: str, spec: StandInSpec = IDENTITY, architecture: str = "abc") -> PruningPlan:
    return PruningPlan(
        "unet", "UNet", architecture, tuple(Modification(p, "Block", spec) for p in paths), 100, {"k": len(paths)}
    )


def test_merge_keeps_outer_operators_and_each_once():
    merged = plan("a.b", "c").merge(plan("a", "c", "d.e"))
    assert merged.paths == ["c", "a", "d.e"]
    assert (merged.component, merged.architecture, merged.params_before) == ("unet", "abc", 100)
    assert merged.how == {"merged": [{"k": 2}, {"k": 3}]}
    assert PruningPlan.from_dict(merged.to_dict()) == merged
    assert set(plan("a", "c").merge(plan("a.b", "c.d.e")).paths) == {"a", "c"}


def test_merge_with_two_stand_ins_asks_which():
    one, two = plan("a", "b"), plan("a", spec=ZERO)
    with pytest.raises(PlanError, match=r"a \(identity or zero\).*prefer='self' or 'other'"):
        one.merge(two)
    assert [m.stand_in for m in one.merge(two, prefer="self")] == [IDENTITY, IDENTITY]
    assert [m.stand_in for m in one.merge(two, prefer="other")] == [ZERO, IDENTITY]
    with pytest.raises(PlanError, match="prefer: got 'mine'"):
        one.merge(two, prefer="mine")


def test_merge_is_associative_in_what_it_does():
    a, b, c = plan("a", "b.c"), plan("b"), plan("b.d", "e")
    assert not a.merge(b).merge(c).diff(a.merge(b.merge(c)))


def test_diff():
    one, two = plan("a", "b", "c"), plan("a", "b", spec=ZERO).merge(plan("d"))
    diff = one.diff(two)
    assert [m.path for m in diff.only_self] == ["c"] and [m.path for m in diff.only_other] == ["d"]
    assert [(x.stand_in.name, y.stand_in.name) for x, y in diff.changed] == [("identity", "zero")] * 2
    assert str(diff).splitlines()[0] == "- c  Block -> identity" and "! a  Block -> identity, not zero" in str(diff)
    assert diff and not one.diff(replace(one, how={})) and "the same" in str(one.diff(one))


@pytest.mark.parametrize("verb", ["merge", "diff"])
def test_plans_of_other_architectures_do_not_mix(verb):
    with pytest.raises(PlanError, match=r"\('UNet', 'abc'\).*\('UNet', 'xyz'\)"):
        getattr(plan("a"), verb)(plan("a", architecture="xyz"))
    getattr(plan("a"), verb)(plan("b", architecture=""))  # written by hand, without a fingerprint


def emoji():
    pipe = demo.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_plan_file_fits_a_sibling_fine_tune_in_another_dtype(tmp_path):
    pipe = emoji()
    found = find_operators(
        pipe, include=["mid_block.attentions.0", "up_blocks.0.resnets.1"], trial=False, latency=False, progress=False
    )
    picked = [o for o in found if o.path in ("mid_block.attentions.0", "up_blocks.0.resnets.1")]
    mods = tuple(Modification(o.path, o.kind, o.stand_ins[0]) for o in picked)
    done = pipe.prune(PruningPlan("unet", "UNet2DConditionModel", architecture_of(pipe.unet), mods))
    done.save(tmp_path / "plan.json")
    sibling = emoji()
    sibling.unet.to(torch.bfloat16)
    with torch.no_grad():
        for p in sibling.unet.parameters():
            p.mul_(1.01)
    again = sibling.prune(str(tmp_path / "plan.json"))
    assert not done.diff(again) and again.params_removed == done.params_removed > 0
    assert plan_of(sibling.unet).paths == [o.path for o in picked]
    assert sibling.unet.num_parameters() == pipe.unet.num_parameters()
    assert {p.dtype for p in sibling.unet.parameters()} == {torch.bfloat16}
    smaller = emoji()
    smaller.prune("bk-sdm-base")
    with pytest.raises(PlanError, match="architecture"):
        smaller.prune(tmp_path / "plan.json")
