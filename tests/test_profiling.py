"""MACs counted by hand, parameters, and what a profile says."""

from __future__ import annotations

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import flex_attention

from ld_pruner_hf import Profile, profile
from ld_pruner_hf.latents import RecordedCall
from ld_pruner_hf.profiling import count_macs, latency_shares, measure_latency, peak_memory, profile_call

DEVICES = ["cpu", "meta"]


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8, bias=False), nn.Linear(6, 8)

    def forward(self, x, context):
        q = self.q(x).unflatten(-1, (2, 4)).transpose(1, 2)
        k = self.k(context).unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, k)


def macs(model: nn.Module, *args: torch.Tensor) -> tuple[dict[str, int], dict[str, int]]:
    return count_macs(model, RecordedCall(args, {}))


@pytest.mark.parametrize("device", DEVICES)
def test_convolution(device):
    model = nn.Conv2d(3, 5, 3, stride=2, padding=1, groups=1).to(device)
    total, conv_linear = macs(model, torch.randn(4, 3, 8, 6).to(device))
    assert total[""] == conv_linear[""] == 5 * 4 * 3 * 3 * 9, "for one sample of the four"


@pytest.mark.parametrize("device", DEVICES)
def test_grouped_convolution(device):
    model = nn.Conv2d(4, 8, 3, padding=1, groups=4).to(device)
    assert macs(model, torch.randn(2, 4, 5, 5).to(device))[0][""] == 8 * 25 * 1 * 9


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(device, bias):
    model = nn.Linear(7, 11, bias=bias).to(device)
    assert macs(model, torch.randn(2, 5, 7).to(device))[0][""] == 5 * 7 * 11


@pytest.mark.parametrize("device", DEVICES)
def test_attention_counts_in_the_total_alone(device):
    total, conv_linear = macs(Attend().to(device), torch.randn(2, 5, 8).to(device), torch.randn(2, 3, 6).to(device))
    projections = 5 * 8 * 8 + 3 * 6 * 8
    attention = 2 * (2 * 5 * 3 * 4)  # two heads, scores and values
    assert conv_linear[""] == projections
    assert total[""] == projections + attention
    assert total["q"] == 5 * 8 * 8 and total["k"] == 3 * 6 * 8


class FlexAttend(nn.Module):
    def forward(self, q, k, v):
        return flex_attention.flex_attention(q, k, v)


def test_flex_attention_is_counted_and_measured():
    q, k = torch.randn(1, 2, 16, 16), torch.randn(1, 2, 32, 16)
    total, conv_linear = macs(FlexAttend(), q, k, k)
    assert total[""] == 2 * 2 * 16 * 32 * 16 and conv_linear[""] == 0
    assert peak_memory(FlexAttend(), RecordedCall((q, k, k), {})) >= 0


class Slices(nn.Module):
    """Gives a layer part of a parameter: such a slice requires gradients under `no_grad`, too."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.layer = nn.Parameter(torch.randn(8, 4)), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.layer(self.queries[:5]) + x


def test_slices_of_parameters():
    model = Slices()
    model.layer.requires_grad_(False)
    assert macs(model, torch.zeros(1, 3))[0][""] == 5 * 4 * 3
    assert model.queries.requires_grad and not model.layer.weight.requires_grad


def test_cpu_and_meta_agree_on_a_unet(unet):
    call = tiny.unet_call()
    on_cpu = count_macs(unet, RecordedCall((), call))
    on_meta = count_macs(unet.to("meta"), RecordedCall((), {k: v.to("meta") for k, v in call.items()}))
    assert on_cpu == on_meta
    assert on_cpu[0]["mid_block"] < on_cpu[0][""] and on_cpu[1][""] < on_cpu[0][""]


def test_profile_of_a_bare_model(unet):
    p = profile(unet, tiny.unet_call(), repeats=2, per_operator=True)
    assert p.params == sum(x.numel() for x in unet.parameters())
    assert (p.batch_size, p.device, p.dtype) == (2, "cpu", "float32")
    assert p.latency_ms > 0 and 4e-6 * p.params < p.peak_memory_mb < 10
    block = p.operators["mid_block.resnets.0"]
    assert block["params"] == sum(x.numel() for x in unet.mid_block.resnets[0].parameters())
    assert 0 < block["latency_share"] < p.operators["mid_block"]["latency_share"] < 1
    parts = [v for k, v in p.operators.items() if k.count(".") == k.startswith(("down_blocks.", "up_blocks."))]
    assert sum(v["macs"] for v in parts) == p.macs
    assert "GMACs a sample" in str(p) and Profile(**p.to_dict()) == p


def test_profile_on_meta_measures_no_time(unet):
    p = profile(unet.to("meta"), {k: v.to("meta") for k, v in tiny.unet_call().items()}, per_operator=True)
    assert p.latency_ms is None and "not measured" in str(p)
    assert p.macs > 0 and "latency_share" not in p.operators["mid_block"]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_peak_memory_counts_weights_and_what_lives_at_one_time(device):
    narrow, wide, out = torch.nn.Linear(4, 8), torch.nn.Linear(8, 1000), torch.nn.Linear(1000, 2)
    model = torch.nn.Sequential(narrow, wide, torch.nn.ReLU(), out).to(device)
    call = RecordedCall((torch.zeros(3, 4, device=device),), {})
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert peak_memory(model, call) == weights + 4 * 3 * (1000 + 1000)  # input and output of the ReLU
    del model[2]
    assert peak_memory(model, call) == weights + 4 * 3 * (1000 + 8)


def test_peak_memory_falls_when_weights_go(unet):
    call = RecordedCall((), tiny.unet_call())
    before = peak_memory(unet, call)
    assert before == peak_memory(unet, call) > 4 * sum(p.numel() for p in unet.parameters())
    removed = sum(p.numel() for p in unet.mid_block.resnets[0].parameters())
    unet.mid_block.resnets[0] = torch.nn.Identity()
    unet.mid_block.resnets[0].forward = lambda x, *_: x
    assert before - peak_memory(unet, call) >= 4 * removed


def test_profile_leaves_no_hooks(unet):
    profile_call(unet, RecordedCall((), tiny.unet_call()), per_operator=True, repeats=2)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_latency_shares_leave_no_hooks_when_the_model_fails(unet):
    with pytest.raises(RuntimeError):
        latency_shares(unet, RecordedCall((), {**tiny.unet_call(), "sample": torch.randn(2, 3, 8, 8)}))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_latency_is_measured_after_the_warm_up():
    calls = []
    median, spread = measure_latency(lambda: calls.append(1), torch.device("cpu"), repeats=4, warmup=2)
    assert len(calls) == 6 and median >= 0 and spread >= 0
    assert measure_latency(lambda: None, torch.device("cpu"), repeats=1)[1] == 0


@pytest.mark.parametrize("inputs", [None, 3, "x"])
def test_a_bare_model_needs_example_inputs(unet, inputs):
    with pytest.raises(ValueError, match="example_inputs: got"):
        profile(unet, inputs)
