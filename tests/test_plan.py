"""The nouns: what is valid, and that JSON gives back what went in."""

from __future__ import annotations

import json

import pytest

from ld_pruner_hf import Modification, Operator, OutputRule, PlanError, PruningPlan, StandInSpec
from ld_pruner_hf.plan import PLAN_VERSION, check_format, is_inside, read_json, write_atomically

CONV = OutputRule("hidden_states", 0, "adapt", (), 1, 32, 64, (-2, -2))
IDENTITY = OutputRule("sample", 1, "identity", (0, 1))


def modification(path: str, **changes) -> Modification:
    return Modification(path, "Conv2d", StandInSpec((CONV,)), **changes)


def plan(*paths: str, **changes) -> PruningPlan:
    modifications = tuple(modification(p, params_removed=10, macs_removed=20, score=0.5) for p in paths)
    return PruningPlan(
        "unet", "UNet2DConditionModel", "abc", modifications, **{"params_before": 100, "how": {"k": 2}, **changes}
    )


@pytest.mark.parametrize(
    ("factors", "channels", "name"),
    [
        ((), (4, 4), "identity"),
        ((), (4, 8), "conv1x1"),
        ((-2, -2), (4, 4), "pool"),
        ((2, 2), (4, 4), "upscale"),
        ((-2, 1), (4, 8), "pool+conv1x1"),
        ((2, 2), (8, 4), "conv1x1+upscale"),
    ],
)
def test_rule_names(factors, channels, name):
    assert OutputRule("x", 0, "adapt", (), 1, *channels, factors).name == name


def test_spec_name_joins_the_names_of_its_rules_once():
    assert StandInSpec((IDENTITY, IDENTITY), [0, 1]).name == "identity"
    assert StandInSpec((IDENTITY, CONV, CONV), [0, [1, 2]]).name == "pool+conv1x1"


def test_unknown_rule_is_refused():
    with pytest.raises(PlanError, match="'exec', expected one of"):
        OutputRule("x", 0, "exec")


@pytest.mark.parametrize("rule", [CONV, IDENTITY, OutputRule("x", 2, "zero", (), -1, 3, 5)])
def test_rule_round_trip(rule):
    assert OutputRule.from_dict(json.loads(json.dumps(rule.to_dict()))) == rule


def test_plan_round_trip_through_a_file(tmp_path):
    original = plan("down_blocks.0.conv", "mid_block")
    original.save(tmp_path / "deep" / "plan.json")
    assert PruningPlan.load(tmp_path / "deep" / "plan.json") == original
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["plan.json"], "a temporary file is left over"


def test_plan_adds_up_what_it_removes():
    p = plan("a", "b", "c")
    assert (p.params_removed, p.macs_removed, len(p), p.paths) == (30, 60, 3, ["a", "b", "c"])
    assert "3 operators of unet" in str(p) and "Conv2d -> pool+conv1x1" in str(p)


def test_plan_refuses_nested_and_repeated_operators():
    with pytest.raises(PlanError, match=r"'mid_block.resnets.0' lies inside 'mid_block'"):
        plan("mid_block", "mid_block.resnets.0")
    with pytest.raises(PlanError, match="listed more than once"):
        plan("a", "a")
    assert len(plan("block", "block1.conv")) == 2, "a common prefix is not nesting"


def test_is_inside_means_strictly_inside():
    assert is_inside("a.b.c", "a.b")
    assert not is_inside("a.b", "a.b")
    assert not is_inside("a.bc", "a.b")


@pytest.mark.parametrize("path", ["", "a..b", ".a", "a.__import__('os')", "../weights", 3, None])
def test_modification_paths_are_checked(path):
    data = modification("a").to_dict() | {"path": path}
    with pytest.raises(PlanError, match="expected a dotted module path"):
        Modification.from_dict(data)


@pytest.mark.parametrize("missing", ["path", "kind", "stand_in"])
def test_modification_with_a_missing_entry(missing):
    data = modification("a").to_dict()
    del data[missing]
    with pytest.raises(PlanError, match=missing):
        Modification.from_dict(data)


def test_damaged_plans_are_refused(tmp_path):
    path = tmp_path / "plan.json"
    with pytest.raises(PlanError, match="no such file"):
        PruningPlan.load(path)
    good = json.dumps(plan("a").to_dict())
    for text, message in [
        (good[:-40], "truncated or damaged"),
        ("[1]", "got format 'list'"),
        (json.dumps({"format": "other", "version": 1}), "got format 'other'"),
        (json.dumps({**json.loads(good), "version": PLAN_VERSION + 1}), "upgrade it"),
        (json.dumps({**json.loads(good), "modifications": 3}), "expected a list 'modifications'"),
        (json.dumps({**json.loads(good), "modifications": [{"path": "a", "kind": "b", "stand_in": 5}]}), "'rules'"),
    ]:
        path.write_text(text)
        with pytest.raises(PlanError, match=message):
            PruningPlan.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="not readable"):
        PruningPlan.load(path)


def test_check_format_and_read_json_return_the_data(tmp_path):
    data = {"format": "f", "version": 1, "x": 2}
    write_atomically(tmp_path / "f.json", json.dumps(data))
    assert read_json(tmp_path / "f.json", "f") == data == check_format(data, "f", "here")


def test_write_atomically_keeps_the_old_file_when_writing_fails(tmp_path):
    path = tmp_path / "f.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"


def test_operator_is_a_candidate_if_it_has_a_stand_in():
    operator = Operator("a", "Conv2d", "", 1, stand_ins=(StandInSpec((CONV,)),))
    assert operator.is_candidate and not Operator("a", "Conv2d", "", 1, reason="why").is_candidate
    assert json.loads(json.dumps(operator.to_dict()))["stand_ins"][0]["name"] == "pool+conv1x1"


def test_with_modifications_keeps_the_rest():
    changed = plan("a", "b").with_modifications([modification("c")], note="x")
    assert changed.paths == ["c"] and changed.how == {"k": 2, "note": "x"} and changed.architecture == "abc"
