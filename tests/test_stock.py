"""Plans that a stock config can express become stock models; others keep their plan."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)

from ld_pruner_hf import Modification, PruningPlan, demo, find_operators, plan_of, record_of, to_stock_
from ld_pruner_hf.latents import RecordedCall
from ld_pruner_hf.modeling import kept_share, prune_

G = torch.Generator().manual_seed(0)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=G)


def dit():
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=4, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10, norm_type="ada_norm_zero",
    )  # fmt: skip
    return model, {
        "hidden_states": rand(2, 4, 8, 8),
        "timestep": torch.tensor([3, 4]),
        "class_labels": torch.tensor([1, 2]),
    }


def pixart():
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=4, sample_size=8, patch_size=2,
        cross_attention_dim=16, caption_channels=12,
    )  # fmt: skip
    added = {"resolution": None, "aspect_ratio": None}
    return model, {
        "hidden_states": rand(2, 4, 8, 8), "encoder_hidden_states": rand(2, 5, 12), "timestep": torch.tensor([3, 4]),
        "added_cond_kwargs": added,
    }  # fmt: skip


def sd3():
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=5, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        dual_attention_layers=(0, 2), qk_norm="rms_norm",
    )  # fmt: skip
    return model, {
        "hidden_states": rand(2, 4, 8, 8), "encoder_hidden_states": rand(2, 5, 32), "pooled_projections": rand(2, 64),
        "timestep": torch.tensor([3, 4]),
    }  # fmt: skip


def flux():
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=3, num_single_layers=4, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return model, {
        "hidden_states": rand(2, 16, 4), "encoder_hidden_states": rand(2, 5, 32), "pooled_projections": rand(2, 32),
        "timestep": torch.tensor([0.3, 0.4]), "img_ids": rand(16, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


def chroma():
    model = ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    return model, {
        "hidden_states": rand(1, 16, 4), "encoder_hidden_states": rand(1, 5, 32), "timestep": torch.tensor([0.5]),
        "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip


def sdxl():
    model = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=2, norm_num_groups=4, attention_head_dim=(2, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 3), cross_attention_dim=12, use_linear_projection=True,
    )  # fmt: skip
    return model, {"sample": rand(2, 4, 8, 8), "timestep": torch.tensor(3), "encoder_hidden_states": rand(2, 5, 12)}


def pruned(make, paths: list[str]):
    """(model pruned by identities at `paths`, its inputs, the output then)."""
    torch.manual_seed(0)
    model, inputs = make()
    for p in model.parameters():  # adaLN-zero hides the blocks of a fresh model
        torch.nn.init.normal_(p, std=0.1)
    model.eval()
    operators = {
        o.path: o for o in find_operators(model, inputs, include=paths, trial=False, latency=False, progress=False)
    }
    plan = PruningPlan(
        "transformer", type(model).__name__, "",
        tuple(Modification(p, operators[p].kind, next(s for s in operators[p].stand_ins if s.name == "identity")) for p in paths),
    )  # fmt: skip
    prune_(model, plan)
    return model, inputs, output(model, inputs)


def output(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.mark.parametrize(
    ("make", "paths", "config"),
    [
        (dit, ["transformer_blocks.1", "transformer_blocks.2"], {"num_layers": 2}),
        (pixart, ["transformer_blocks.0", "transformer_blocks.3"], {"num_layers": 2}),
        (sd3, ["transformer_blocks.1"], {"num_layers": 4, "dual_attention_layers": [0, 1]}),
        (flux, ["transformer_blocks.1", "single_transformer_blocks.0"], {"num_layers": 2, "num_single_layers": 3}),
        (sdxl, ["mid_block"], {"mid_block_type": None}),
        (
            sdxl, ["up_blocks.0.attentions.1.transformer_blocks.0", "up_blocks.0.attentions.1.transformer_blocks.2"],
            {"transformer_layers_per_block": [1, 3], "reverse_transformer_layers_per_block": [[3, 1, 3], 1]},
        ),
        (
            sdxl, ["mid_block", "down_blocks.1.attentions.0.transformer_blocks.1"],
            {"mid_block_type": None, "transformer_layers_per_block": [1, [2, 3]], "reverse_transformer_layers_per_block": [3, 1]},
        ),
    ],
)  # fmt: skip
def test_whole_blocks_become_a_stock_model(make, paths, config, tmp_path):
    model, inputs, expected = pruned(make, paths)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    untouched = {
        k: v for k, v in model.config.items() if k not in config and not k.startswith(("_", "pruning", "quant"))
    }
    record = to_stock_(model, RecordedCall((), inputs))
    assert record is not None and record.config == config and record.removed == tuple(paths)
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if k in config} == config
    assert {k: model.config[k] for k in untouched} == untouched
    assert torch.equal(output(model, inputs), expected), "same output, to the last bit"
    assert sorted(map(torch.Tensor.sum, model.state_dict().values())) == sorted(map(torch.Tensor.sum, before.values()))
    assert plan_of(model) is None and record_of(model) == record and kept_share(model) < 1
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(output(again, inputs), expected)
    program = f"""
import sys, diffusers
model, info = diffusers.{type(model).__name__}.from_pretrained({str(tmp_path)!r}, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"] and "ld_pruner_hf" not in sys.modules
assert model.num_parameters() == {record.params_after}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("make", "paths"),
    [
        (dit, ["transformer_blocks.1.attn1"]),  # a part of a block
        (sdxl, ["down_blocks.0.resnets.1"]),  # its skip connection stays
        (sdxl, ["mid_block", "down_blocks.0.resnets.1"]),
        (sd3, ["transformer_blocks.0.attn2"]),
    ],
)
def test_other_plans_stay_plans(make, paths):
    model, inputs, expected = pruned(make, paths)
    assert to_stock_(model, RecordedCall((), inputs)) is None
    assert plan_of(model).paths == paths
    assert torch.equal(output(model, inputs), expected)


def test_a_table_that_counts_the_blocks_stays_whole():
    """Chroma's modulation comes from a table over all blocks, which is not saved: a model of fewer blocks makes another one."""
    blocks = [f"{kind}transformer_blocks.{i}" for kind in ("", "single_") for i in range(2)]
    model, inputs, expected = pruned(chroma, blocks)
    assert to_stock_(model, RecordedCall((), inputs)) is None
    assert plan_of(model) is not None and torch.equal(output(model, inputs), expected)


def test_the_mid_block_shares_its_depth_with_the_last_stage():
    """diffusers gives the mid block the depth of the last stage's first attention: a plan that parts them is no stock config."""
    model, inputs, expected = pruned(sdxl, ["down_blocks.1.attentions.0.transformer_blocks.1"])
    assert to_stock_(model, RecordedCall((), inputs)) is None
    assert plan_of(model) is not None and torch.equal(output(model, inputs), expected)


def test_a_block_with_special_weights_at_its_place_stays_a_plan():
    """The last SD3 block has no second stream; a model without it has no stock config."""
    model, inputs, expected = pruned(sd3, ["transformer_blocks.4"]) if _last_is_identity() else (None, None, None)
    if model is None:
        pytest.skip("the last block offers no identity")
    assert to_stock_(model, RecordedCall((), inputs)) is None
    assert torch.equal(output(model, inputs), expected)


def _last_is_identity() -> bool:
    model, inputs = sd3()
    found = find_operators(
        model.eval(), inputs, include="transformer_blocks.4", trial=False, latency=False, progress=False
    )
    return any(s.name == "identity" for o in found if o.path == "transformer_blocks.4" for s in o.stand_ins)


def test_another_output_undoes_everything(monkeypatch):
    model, inputs, expected = pruned(dit, ["transformer_blocks.1"])
    entries, keys = dict(model.config), list(model.state_dict())
    monkeypatch.setattr("ld_pruner_hf.stock._tensors", lambda _: [torch.rand(3)])  # never twice the same
    assert to_stock_(model, RecordedCall((), inputs)) is None
    assert dict(model.config) == entries and list(model.state_dict()) == keys
    assert torch.equal(output(model, inputs), expected)


def test_pipelines_say_what_the_model_became(tmp_path):
    pipe = demo.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    operators = {
        o.path: o for o in find_operators(pipe, include="mid_block", trial=False, latency=False, progress=False)
    }

    def plan(path: str) -> PruningPlan:
        spec = next(s for s in operators[path].stand_ins if s.name == "identity")
        return PruningPlan("unet", "UNet2DConditionModel", "", (Modification(path, operators[path].kind, spec),))

    part = pipe.prune(plan("mid_block.attentions.0"))
    assert "import ld_pruner_hf" in part.how["saved_as"] and "import ld_pruner_hf" in str(part)
    pipe = demo.load("emoji")
    pipe.set_progress_bar_config(disable=True)
    unet, whole = pipe.unet, pipe.prune(plan("mid_block"))
    assert "mid_block_type=None" in whole.how["saved_as"] and "plain diffusers" in str(whole)
    assert pipe.unet is unet and unet.mid_block is None and not unet.training
    hand_made = demo.load("emoji")
    hand_made.prune("no-mid-block")
    assert hand_made.unet.config.mid_block_type is None
    assert {k: v.sum() for k, v in hand_made.unet.state_dict().items()} == {
        k: v.sum() for k, v in unet.state_dict().items()
    }
