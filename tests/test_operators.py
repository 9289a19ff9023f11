"""find_operators: what it offers, what it refuses and why, on public architectures and on a tiny one."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch
from configs import SD_V1, UNETS, meta_call, on_meta
from diffusers import UNet2DConditionModel
from torch import nn

from ld_pruner_hf import Modification, applied, find_operators, operators, profile
from ld_pruner_hf.latents import RecordedCall
from ld_pruner_hf.operators import as_list, check_filters, recorded, selected


def find(model: nn.Module, call, **kwargs):
    return find_operators(model, call, latency=False, progress=False, **kwargs)


def names(operator) -> list[str]:
    return [s.name for s in operator.stand_ins]


# ---- public architectures ------------------------------------------------------------------------------------------

SD_KINDS = {
    "ResnetBlock2D": 22,
    "Transformer2DModel": 16,
    "BasicTransformerBlock": 16,
    "Attention": 32,
    "FeedForward": 16,
    "GroupNorm": 61,
    "LayerNorm": 48,
}


@pytest.fixture(scope="module")
def sd_operators():
    return find(on_meta(UNet2DConditionModel, SD_V1), meta_call(SD_V1))


def test_stable_diffusion_has_all_operators(sd_operators):
    kinds = Counter(o.kind for o in sd_operators)
    assert {k: kinds[k] for k in SD_KINDS} == SD_KINDS


def test_stable_diffusion_operators_are_candidates_or_have_a_reason(sd_operators):
    assert all(o.is_candidate != bool(o.reason) for o in sd_operators)
    candidates = Counter(o.kind for o in sd_operators if o.is_candidate)
    assert {k: candidates[k] for k in SD_KINDS} == SD_KINDS
    refused = Counter(o.kind for o in sd_operators if not o.is_candidate)
    assert set(refused) == {"Timesteps", "Linear", "ModuleList", "Dropout", "UpBlock2D", "CrossAttnUpBlock2D"}


def test_stable_diffusion_offers_zero_where_an_output_is_added(sd_operators):
    """16 blocks x (2 attentions, feed-forward and its last linear, proj_out), 22 x (2 convs, time_emb_proj), 14 shortcuts."""
    zero = [o for o in sd_operators if "zero" in names(o)]
    assert len(zero) == 16 * (2 + 2 + 1) + 22 * 3 + 14
    assert Counter(o.kind for o in zero)["Attention"] == 32


def test_stable_diffusion_macs_are_the_published_ones():
    p = profile(on_meta(UNet2DConditionModel, SD_V1), meta_call(SD_V1))
    assert round(p.params / 1e6, 1) == 859.5
    assert round(p.macs_conv_linear / 1e9, 1) == 338.6
    assert p.macs > p.macs_conv_linear


def test_shapes_params_and_macs_of_stable_diffusion_operators(sd_operators):
    by_path = {o.path: o for o in sd_operators}
    conv = by_path["down_blocks.0.resnets.0.conv1"]
    assert conv.input_shapes == conv.output_shapes == ((1, 320, 64, 64),)
    assert conv.params == 320 * 320 * 9 + 320 and conv.macs == 320 * 320 * 9 * 64 * 64
    assert conv.parent == "down_blocks.0.resnets.0" and conv.calls == 1
    up = by_path["up_blocks.1.resnets.0"]
    assert up.input_shapes[0] == (1, 2560, 16, 16) and up.output_shapes == ((1, 1280, 16, 16),)
    assert names(up) == ["conv1x1"]
    assert names(by_path["down_blocks.0.downsamplers.0"]) == ["pool"]
    assert names(by_path["up_blocks.0.upsamplers.0"]) == ["upscale"]
    assert names(by_path["down_blocks.1"]) == ["pool+conv1x1"]
    assert names(by_path["down_blocks.3.resnets.0"]) == ["identity"]


@pytest.mark.parametrize("name", [n for n in UNETS if n != "sd-v1.4"])
def test_other_public_architectures(name):
    model_class, config, params = UNETS[name]
    model = on_meta(model_class, config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == params
    operators = find(model, meta_call(config))
    refused = {o.kind for o in operators if not o.is_candidate}
    resnets = [o for o in operators if o.kind == "ResnetBlock2D"]
    assert resnets and not refused & {"ResnetBlock2D", "Attention", "GroupNorm", "LayerNorm", "FeedForward", "Conv2d"}
    assert all(o.is_candidate != bool(o.reason) for o in operators)
    assert all("zero" in names(o) for o in operators if o.path.endswith((".proj_out", ".conv2", ".ff")))


# ---- one tiny model ------------------------------------------------------------------------------------------------


def test_every_module_is_listed_once_in_order(operators, unet):
    assert [o.path for o in operators] == [name for name, _ in unet.named_modules() if name]
    assert {o.path: o.params for o in operators} == {
        name: sum(p.numel() for p in m.parameters()) for name, m in unet.named_modules() if name
    }


def test_every_stand_in_runs_and_keeps_the_output_shape(operators, unet):
    """Also at an odd size and another batch than those that were watched."""
    calls = [tiny.unet_call(), tiny.unet_call((7, 9), batch=1)]
    originals = [tiny.output(unet, call) for call in calls]
    for o in operators:
        for spec in o.stand_ins:
            with applied(unet, [Modification(o.path, o.kind, spec)]):
                for call, original in zip(calls, originals, strict=True):
                    assert tiny.output(unet, call).shape == original.shape, (o.path, spec.name)
    assert torch.equal(tiny.output(unet, calls[0]), originals[0])


def test_zero_removes_a_residual_branch(operators, unet):
    """`x + attention(norm(x))` without attention is x: the stand-in for the attention must not add norm(x)."""
    attention = next(o for o in operators if o.path.endswith("transformer_blocks.0.attn1"))
    assert names(attention) == ["identity", "zero"]
    block = unet.get_submodule(attention.parent)
    x, context = torch.randn(1, 4, 32), torch.randn(1, 5, 32)
    with torch.no_grad():
        with applied(unet, [Modification(attention.path, attention.kind, attention.stand_ins[1])]):
            removed = block(x, encoder_hidden_states=context)
        block.attn1.to_out[0].weight.zero_()
        block.attn1.to_out[0].bias.zero_()
        assert torch.equal(removed, block(x, encoder_hidden_states=context))


def test_paper_stand_ins_have_no_zero(unet):
    found = find(unet, tiny.unet_call(), standins="paper")
    assert {n for o in found for n in names(o)} == {"identity", "conv1x1", "pool", "upscale"}
    with pytest.raises(ValueError, match="standins: got 'mine'"):
        find(unet, tiny.unet_call(), standins="mine")


def test_two_runs_find_the_same(operators):
    assert find(tiny.unet(), tiny.unet_call()) == operators


def test_a_pipeline_shows_the_same_operators_as_its_denoiser(pipe, operators):
    found = find_operators(pipe, progress=False)
    assert [(o.path, o.stand_ins, o.params) for o in found] == [(o.path, o.stand_ins, o.params) for o in operators]
    assert all(0 <= o.latency_share <= 1 for o in found if o.calls)


def test_reasons(operators):
    reasons = {o.path: o.reason for o in operators}
    assert "passes its input on" in reasons["mid_block.resnets.0.dropout"]
    assert "did not run" in reasons["down_blocks"]
    assert "no floating-point tensor" in reasons["time_proj"]
    assert "the model does not run without it (AttributeError" in reasons["up_blocks.0"]
    cross = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    assert reasons[cross] is None or "costs as much" in reasons[cross]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Linear(8, 8)
        self.wider = nn.Linear(8, 16)
        self.twice = nn.Linear(16, 16)
        self.unused = nn.Linear(3, 3)
        self.tokens = nn.AdaptiveAvgPool1d(2)

    def forward(self, x, scale=None):
        x = self.wider(self.same(x))
        return {"out": self.tokens(self.twice(self.twice(x)).transpose(1, 2))}


def test_a_model_that_is_no_diffusers_model():
    model = nn.Sequential(Block())
    found = {o.path: o for o in find(model, (torch.randn(2, 5, 8),))}
    assert names(found["0.same"]) == ["identity"]
    assert "costs as much" in found["0.wider"].reason
    assert found["0.twice"].calls == 2 and found["0.twice"].macs == 2 * 5 * 16 * 16
    assert "did not run" in found["0.unused"].reason
    assert "returns a dict" in found["0"].reason
    assert found["0.tokens"].reason


def test_a_shared_module_is_found_once_with_its_other_names():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    found = find(model, (torch.randn(2, 4),))
    assert [o.path for o in found] == ["0", "1"] and found[0].aliases == ("2",) and found[0].calls == 2


def test_a_pruned_model_shows_what_is_left(unet, operators):
    chosen = [o for o in operators if o.path in ("mid_block", "down_blocks.0.resnets.0.conv1")]
    with applied(unet, [Modification(o.path, o.kind, o.stand_ins[0]) for o in chosen]):
        left = find(unet, tiny.unet_call())
    assert not any(o.path.startswith("mid_block") or o.path == chosen[0].path or "adapters" in o.path for o in left)
    assert any(o.path == "down_blocks.0.resnets.0.conv2" and o.is_candidate for o in left)


def test_the_watched_model_is_left_alone():
    model = tiny.unet().train()
    before = [(n, id(m), m.training, dict(m._forward_hooks)) for n, m in model.named_modules()]
    call = tiny.unet_call()
    find(model, call)
    assert [(n, id(m), m.training, dict(m._forward_hooks)) for n, m in model.named_modules()] == before
    with pytest.raises(RuntimeError):
        find(model, {**call, "sample": torch.randn(2, 3, 8, 8)})
    assert [(n, id(m), m.training, dict(m._forward_hooks)) for n, m in model.named_modules()] == before


# ---- filters and bad input -----------------------------------------------------------------------------------------


def test_filters(unet):
    found = find(
        unet, tiny.unet_call(), include="mid_block", exclude=["*.attn2", "*.resnets"], kinds=["Conv2d", "Attention"]
    )
    assert [o.path for o in found] == [
        "mid_block.attentions.0.proj_in",
        "mid_block.attentions.0.transformer_blocks.0.attn1",
        "mid_block.attentions.0.proj_out",
    ]


def test_patterns_cover_what_lies_inside():
    assert selected("a.b.c", "X", ["a.b"], [], []) and selected("a.b", "X", ["a.*"], [], [])
    assert not selected("a.bc", "X", ["a.b"], [], []) and not selected("a.b", "X", [], ["a"], [])
    assert selected("a", "X", [], [], ["X"]) and not selected("a", "X", [], [], ["Y"])
    assert as_list(None) == [] and as_list("x") == ["x"] and as_list(("x", "y")) == ["x", "y"]


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_a_pattern_that_matches_nothing(unet, name):
    with pytest.raises(ValueError, match=rf"{name}: the pattern 'no_such.\*' matches no module; paths look like"):
        check_filters(unet, **{"include": None, "exclude": None, "kinds": None, name: ["mid_block", "no_such.*"]})


def test_an_unknown_kind(unet):
    with pytest.raises(ValueError, match=r"kinds: got 'Conv4d', this model has \["):
        check_filters(unet, None, None, ["Conv2d", "Conv4d"])


def test_example_inputs_in_every_form():
    x = torch.ones(1)
    assert recorded({"x": x}).kwargs == {"x": x} and recorded((x,)).args == (x,) and recorded([x]).args == (x,)
    both = recorded(((x,), {"y": 1}))
    assert both.args == (x,) and both.kwargs == {"y": 1}
    with pytest.raises(ValueError, match="example_inputs: got NoneType"):
        recorded(None)


def test_a_compiled_model_is_refused(unet):
    with pytest.raises(ValueError, match="unwrap it first"):
        find(torch.compile(unet), tiny.unet_call())


def test_what_a_run_on_meta_caches_is_forgotten():
    """As Z-Image's position embedder, a plain object, moves its table to where the first call is."""

    class Table:
        rows = None

        def __call__(self, x):
            if self.rows is None or self.rows.device != x.device:
                self.rows = torch.arange(4.0).to(x.device)
            return self.rows

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.table = nn.Linear(4, 4), Table()

        def forward(self, x):
            self.last = x
            return self.linear(x) + self.table(x)

    model, x = Model(), torch.randn(2, 4)
    expected = model(x)
    assert operators.on_meta(model, RecordedCall((x,), {}))().device.type == "meta"
    assert model.table.rows.device.type == "cpu" and model.last is x
    assert torch.equal(model(x), expected)
    fresh = Model()
    operators.on_meta(fresh, RecordedCall((x,), {}))()
    assert fresh.table.rows is None and not hasattr(fresh, "last")
