"""Rows that do the same are measured once, and only those."""

from __future__ import annotations

import functools

import pytest
import tiny
import torch
from torch import nn

from ld_pruner_hf import OperatorScores, scoring
from ld_pruner_hf.latents import make_conditions, preserved, steps_argument
from ld_pruner_hf.plan import Operator, OutputRule, StandInSpec
from ld_pruner_hf.twins import find_twins

ZERO, IDENTITY = (StandInSpec((OutputRule("0", 0, rule),)) for rule in ("zero", "identity"))
HOW = {"conditions": tiny.PROMPTS[:2], "num_inference_steps": 2}


class Residual(nn.Module):
    """x + last(first(x)); what `gate` returns is added, and what `before` does to x comes first."""

    def __init__(self, gate=None, before=None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.gate, self.before = gate, before

    def forward(self, x):
        x = self.before(x) if self.before else x
        x = x + self.last(self.first(x))
        return x + self.gate() if self.gate else x


class Model(nn.Module):
    def __init__(self, *blocks) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.elsewhere = False

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x + self.blocks[0].last(x) if self.elsewhere else x


def rows_of(model):
    """Linear layers that become zero, residual blocks that become identities."""
    kinds = {nn.Linear: ZERO, Residual: IDENTITY}
    rows = []
    for path, module in model.named_modules():
        if type(module) in kinds:
            operator = Operator(path, type(module).__name__, "", 1, stand_ins=(kinds[type(module)],))
            rows.append((operator, operator.stand_ins[0]))
    return rows


def twins_of(model, calls=2):
    inputs = torch.randn(calls, 3, 4, generator=torch.Generator().manual_seed(0))
    return find_twins(model, rows_of(model), lambda: [model(x) for x in inputs], lambda: model(inputs[0]))


def test_a_residual_block_and_its_last_layer_are_twins():
    assert twins_of(Model(Residual(), Residual())) == {
        (f"blocks.{i}.last", "zero"): (f"blocks.{i}", "identity") for i in range(2)
    }


def test_twins_of_twins_lead_to_the_outermost():
    model = Model(Residual())
    model.blocks[0] = nn.Sequential(Residual())
    outer = Operator("blocks.0", "Sequential", "", 1, stand_ins=(IDENTITY,))
    rows = [*rows_of(model), (outer, IDENTITY)]
    x = torch.randn(3, 4)
    found = find_twins(model, rows, lambda: model(x), lambda: model(x))
    assert found == {(f"blocks.0.0{n}", s): ("blocks.0", "identity") for n, s in (("", "identity"), (".last", "zero"))}


def test_nothing_runs_where_no_module_lies_in_another():
    model = Model(Residual())
    rows = [row for row in rows_of(model) if row[0].kind == "Linear"]
    assert find_twins(model, rows, lambda: pytest.fail("ran"), lambda: pytest.fail("ran")) == {}


def test_what_differs_in_a_later_call_is_no_twin():
    time = [0.0]
    model = Model(Residual(gate=lambda: time[0]))
    x = torch.randn(3, 4)

    def run(times):
        for time[0] in times:
            model(x)

    found = [
        find_twins(model, rows_of(model), functools.partial(run, t), lambda: model(x * 0)) for t in ([0.0], [0.0, 1.0])
    ]
    assert [len(twins) for twins in found] == [1, 0]


def test_what_is_called_from_elsewhere_is_no_twin():
    model = Model(Residual(), Residual())
    model.elsewhere = True
    assert twins_of(model) == {("blocks.1.last", "zero"): ("blocks.1", "identity")}
    model = Model(Residual(), Residual())
    model.blocks[1].last = model.blocks[0].last
    assert twins_of(model) == {}


def test_a_module_that_overwrites_its_input_is_left_alone():
    assert twins_of(Model(Residual(before=lambda x: x.mul_(2)))) == {}


def test_the_whole_model_has_the_last_word():
    class Looking(Model):
        def forward(self, x):
            return self.blocks[0](x) * (1 if type(self.blocks[0]) is Residual else 2)

    assert twins_of(Looking(Residual())) == {}


def test_without_an_effect_there_is_no_saying():
    model = Model(Residual())
    nn.init.zeros_(model.blocks[0].last.weight)
    nn.init.zeros_(model.blocks[0].last.bias)
    assert twins_of(model) == {}


@pytest.mark.parametrize("make", [tiny.stable_diffusion, tiny.dit])
def test_twins_would_have_the_same_scores(make, monkeypatch):
    pipe = make()
    how = HOW if make is not tiny.dit else {"conditions": [{"class_labels": [1]}], "num_inference_steps": 2}
    found = []
    monkeypatch.setattr(scoring, "find_twins", lambda *args: found.append(find_twins(*args)) or found[-1])
    scores = {row.key: row for row in pipe.score(**how)}
    monkeypatch.setattr(scoring, "find_twins", lambda *_: {})
    everything = {row.key: row for row in pipe.score(**how)}
    assert list(scores) == list(everything) and found[0]
    for key, row in everything.items():
        assert scores[key].score() == pytest.approx(row.score(), rel=1e-4)
        assert (scores[key].params_removed, scores[key].macs_removed) == (row.params_removed, row.macs_removed)
    assert all(scores[key].avg_dist == scores[other].avg_dist for key, other in found[0].items())
    assert {key for key, row in scores.items() if not row.seconds} == set(found[0])


def test_twins_are_measured_once_and_resume(pipe, tmp_path, monkeypatch):
    measured = []
    one = scoring._measure_one
    monkeypatch.setattr(scoring, "_measure_one", lambda o, *rest: measured.append(o.path) or one(o, *rest))
    how = {**HOW, "include": "mid_block.resnets.1", "resume_from": tmp_path / "s.jsonl"}
    scores = pipe.score(**how)
    assert len(measured) == len(scores) - 1 and measured.count("mid_block.resnets.1.conv2") == 1, "as an identity only"
    assert OperatorScores.load(how["resume_from"]).rows == scores.rows
    lines = how["resume_from"].read_text().splitlines()
    how["resume_from"].write_text("\n".join(line for line in lines if '"seconds": 0.0,' not in line) + "\n")
    again = pipe.score(**how)
    assert [(r.key, r.avg_dist) for r in again] == [(r.key, r.avg_dist) for r in scores]
    assert len(measured) == len(scores) - 1


def test_other_criteria_measure_every_row(pipe, monkeypatch):
    monkeypatch.setattr(scoring, "find_twins", lambda *_: pytest.fail("looked for"))
    scores = pipe.score(criterion="output-error", calibration=2, include="mid_block*", **HOW)
    assert len(scores) and all(row.error is None and row.output_error >= 0 for row in scores)


def test_they_are_found_beside_what_is_given(pipe):
    conditions = make_conditions(pipe, tiny.PROMPTS[:1], steps_argument(pipe, 2))
    with preserved(pipe):
        one = scoring.output_sets(pipe, "unet", conditions, [0], 1, False)
        operators = scoring.find_operators(pipe, include="mid_block*", progress=False, **conditions[0])
        todo = [(o, spec) for o in operators for spec in o.stand_ins]
        found = find_twins(pipe.unet, todo, one.collect, functools.partial(one.first_step, 0))
    assert found["mid_block.resnets.1.conv2", "zero"] == ("mid_block.resnets.1", "identity")
