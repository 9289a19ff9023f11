"""Files of every format version that was ever written load, and prune. `formats/plan_v1.json` is from the first commit."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import tiny
import torch

import ld_pruner_hf
from ld_pruner_hf import OperatorScores, PlanError, PruningPlan
from ld_pruner_hf.plan import FORMAT_VERSION, PLAN_VERSION

FORMATS = Path(__file__).parent / "formats"
PLANS = [FORMATS / f"plan_v{i + 1}.json" for i in range(PLAN_VERSION)]
SCORES = [FORMATS / f"scores_v{FORMAT_VERSION}{suffix}" for suffix in (".jsonl", ".json")]


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_a_plan_of_each_version_prunes_and_is_written_as_it_was(file, pipe, tmp_path):
    stored = json.loads(file.read_text())
    plan = PruningPlan.load(file)
    assert file.stem == f"plan_v{stored['version']}" and plan.to_dict() == stored
    done = pipe.prune(str(file), prompt="red heart")
    assert done.paths == [m["path"] for m in stored["modifications"]]
    assert done.params_removed == plan.params_removed > 0
    pipe.unet.save_pretrained(tmp_path)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert torch.equal(tiny.output(again, tiny.unet_call()), tiny.output(pipe.unet, tiny.unet_call()))


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_a_plan_of_each_version_in_a_config_is_applied(file):
    plan = PruningPlan.load(file)
    config = {**tiny.unet().config, "pruning_plan": json.loads(file.read_text())}
    model = diffusers.UNet2DConditionModel.from_config(config)
    assert ld_pruner_hf.plan_of(model) == plan
    assert ld_pruner_hf.surgery.count_params(model) == plan.params_before - plan.params_removed


@pytest.mark.parametrize("file", SCORES, ids=lambda file: file.name)
def test_scores_of_each_version_choose(file, pipe):
    assert {row.kind for row in OperatorScores.load(file)} == {"Attention"}
    newest = PruningPlan.load(PLANS[-1])
    assert pipe.prune(2, scores=file, prompt="red heart").paths == newest.paths


def test_a_newer_version_is_refused(tmp_path):
    newer = json.loads(PLANS[-1].read_text()) | {"version": PLAN_VERSION + 1}
    (tmp_path / "plan.json").write_text(json.dumps(newer))
    with pytest.raises(PlanError, match=f"format version {PLAN_VERSION + 1}.*reads up to {PLAN_VERSION}; upgrade it"):
        PruningPlan.load(tmp_path / "plan.json")
