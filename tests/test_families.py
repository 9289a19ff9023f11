"""One tiny pipeline of every family: scored, pruned by k and by blocks, run, saved and loaded again."""

from __future__ import annotations

import families
import pipelines_table
import pytest
import torch

import ld_pruner_hf
from ld_pruner_hf.latents import RecordedCall
from ld_pruner_hf.profiling import run

DENOISERS = {"wan_2_2": ("transformer", "transformer_2")}


@pytest.mark.parametrize(("name", "component"), [(n, c) for n in families.FAMILIES for c in DENOISERS.get(n, (None,))])
def test_family(name, component, tmp_path):
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
    assert "not tried as a stock config" in pipe.prune(plan).how["saved_as"]
    pipe, call = families.make("flux")
    assert pipe.prune(plan, **call).how["saved_as"].startswith("stock FluxTransformer2DModel (num_layers=1)")
