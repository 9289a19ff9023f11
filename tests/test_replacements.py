"""Stand-ins: the shapes and values that they return, and that they take what the operator took."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ld_pruner_hf import OutputRule, StandInSpec
from ld_pruner_hf.replacements import Adapter, StandIn, stand_in_cost


def adapt(channels=(4, 4), factors=(), dim=1, rule="adapt") -> OutputRule:
    return OutputRule("x", 0, rule, (), dim, *channels, factors)


def run(rule: OutputRule, *args, **kwargs):
    return StandIn(StandInSpec((rule,)))(*args, **kwargs)


@pytest.mark.parametrize("make", [lambda: OutputRule("x", 0, "identity"), adapt])
def test_identity_returns_its_input(make):
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(run(make(), x), x)


def test_an_identity_runs_no_tensor_operation():
    operations = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(function)
            return function(*args, **(kwargs or {}))

    x, stand_in = torch.randn(2, 4), StandIn(StandInSpec((OutputRule("x", 0, "identity"),)))
    with Noted():
        assert stand_in(x) is x and stand_in(x=x) is x
        assert not operations and not stand_in.state_dict()
        run(adapt(factors=(2, 2)), torch.randn(2, 4, 5, 5))
    assert operations  # the mode sees those of other stand-ins


def test_its_tensors_are_freed_at_once():
    """No reference cycle: on a GPU, what waits for the garbage collector is memory that is missing."""
    made = weakref.ref(run(adapt(factors=(2, 2)), torch.randn(2, 4, 5, 5)))
    assert made() is None


@pytest.mark.parametrize(("size", "pooled"), [((8, 8), (4, 4)), ((7, 5), (4, 3)), ((1, 2), (1, 1))])
def test_pooling_averages_and_rounds_up(size, pooled):
    x = torch.randn(2, 4, *size)
    y = run(adapt(factors=(-2, -2)), x)
    assert y.shape == (2, 4, *pooled)
    assert torch.allclose(y[:, :, 0, 0], x[:, :, :2, :2].mean(dim=(2, 3)))
    assert torch.allclose(y[:, :, -1, -1], x[:, :, 2 * (pooled[0] - 1) :, 2 * (pooled[1] - 1) :].mean(dim=(2, 3)))


def test_upscaling_repeats_the_nearest_value():
    x = torch.randn(2, 4, 3, 5)
    assert torch.equal(run(adapt(factors=(2, 2)), x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


@pytest.mark.parametrize("rule", ["adapt", "zero"])
@pytest.mark.parametrize("call", ["position", "keyword"])
def test_upscaling_to_the_size_that_the_caller_asks_for(rule, call):
    """diffusers passes `upsample_size` where the down-sampling had rounded up."""
    args, kwargs = (((7, 5),), {}) if call == "position" else ((), {"upsample_size": torch.Size((7, 5))})
    assert run(adapt(factors=(2, 2), rule=rule), torch.randn(2, 4, 4, 3), *args, **kwargs).shape == (2, 4, 7, 5)


def test_pooling_ignores_a_size_argument():
    assert run(adapt(factors=(-2, -2)), torch.randn(2, 4, 7, 7), (9, 9)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("channels", [(4, 6), (6, 4)])
@pytest.mark.parametrize(
    ("shape", "dim"), [((2, -1, 5, 5), 1), ((2, 7, -1), 2), ((2, -1), 1), ((2, -1, 9), 1), ((2, -1, 2, 3, 3), 1)]
)
def test_conv1x1_starts_by_passing_channels_on(channels, shape, dim):
    x = torch.randn(tuple(channels[0] if s == -1 else s for s in shape))
    y = run(adapt(channels, dim=dim), x)
    both = min(channels)
    assert y.shape == tuple(channels[1] if s == -1 else s for s in shape)
    assert torch.equal(y.narrow(dim, 0, both), x.narrow(dim, 0, both))
    assert not y.narrow(dim, both, channels[1] - both).any()


@pytest.mark.parametrize(("shape", "dim"), [((2, 4, 5, 5), 1), ((2, 7, 4), 2), ((2, 4, 9), 1), ((2, 4, 2, 3, 3), 1)])
def test_conv1x1_mixes_channels_as_a_convolution_does(shape, dim):
    adapter = Adapter(adapt((4, 3), dim=dim))
    torch.nn.init.normal_(adapter.weight)
    torch.nn.init.normal_(adapter.bias)
    x = torch.randn(shape)
    expected = F.linear(x.movedim(dim, -1), adapter.weight, adapter.bias).movedim(-1, dim)
    assert torch.allclose(adapter(x), expected, atol=1e-6)


def test_pool_and_convolution_together():
    assert run(adapt((4, 6), (-2, -2)), torch.randn(2, 4, 7, 8)).shape == (2, 6, 4, 4)
    assert run(adapt((6, 4), (2, 2)), torch.randn(2, 6, 4, 3)).shape == (2, 4, 8, 6)
    assert run(adapt((4, 6), (2, 2)), torch.randn(2, 4, 4, 3), (7, 5)).shape == (2, 6, 7, 5)


@pytest.mark.parametrize(
    ("shape", "factors", "expected"),
    [((2, 5), (-2,), (2, 6, 3)), ((3, 4, 5), (1, -2, -2), (2, 6, 3, 2, 3)), ((3, 4, 5), (1, 2, 2), (2, 6, 3, 8, 10))],
)
def test_one_and_three_dimensions(shape, factors, expected):
    x = torch.randn(2, 4, *shape[-len(factors) :])
    for rule in ("adapt", "zero"):
        assert run(adapt((4, 6), factors, rule=rule), x).shape == expected


@pytest.mark.parametrize(
    ("channels", "factors", "dim", "shape", "expected"),
    [
        ((4, 4), (), 1, (2, 4, 5, 5), (2, 4, 5, 5)),
        ((4, 6), (-2, -2), 1, (2, 4, 7, 8), (2, 6, 4, 4)),
        ((4, 6), (2, 2), 1, (2, 4, 3, 3), (2, 6, 6, 6)),
        ((4, 6), (), 2, (2, 9, 4), (2, 9, 6)),
    ],
)
def test_zero_has_the_shape_of_the_output(channels, factors, dim, shape, expected):
    x = torch.randn(shape, dtype=torch.float64)
    y = run(adapt(channels, factors, dim, "zero"), x)
    assert y.shape == expected and not y.any() and y.dtype == x.dtype
    assert not list(StandIn(StandInSpec((adapt(channels, factors, dim, "zero"),))).parameters())


def test_structure_is_rebuilt():
    rules = (OutputRule("a", 0, "identity"), OutputRule("b", 1, "identity"))
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert StandIn(StandInSpec(rules[:1], [0]))(a)[0] is a, "transformers are called with return_dict=False and [0]"
    out = StandIn(StandInSpec(rules, [1, None, [0, 0]]))(a, b)
    assert type(out) is tuple and out[0] is b and out[1] is None and out[2][0] is a


def test_arguments_are_found_by_name_position_and_inside_tuples():
    rule = OutputRule("hidden_states", 1, "identity", (0, 1))
    x = torch.randn(2, 3)
    nested = ((None, x), None)
    assert run(rule, "other", nested) is x
    assert run(rule, "other", hidden_states=nested, temb=None, return_dict=False) is x


def test_no_random_numbers_are_drawn():
    before = torch.get_rng_state()
    StandIn(StandInSpec((adapt((4, 9)),)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("rule", "shape", "expected"),
    [
        (OutputRule("x", 0, "identity"), (2, 4, 8, 8), (0, 0)),
        (adapt((4, 6), rule="zero"), (2, 6, 8, 8), (0, 0)),
        (adapt(factors=(-2, -2)), (2, 4, 4, 4), (0, 0)),
        (adapt((4, 6)), (2, 6, 8, 8), (4 * 6 + 6, 6 * 64 * 4)),
        (adapt((4, 6), (-2, -2)), (2, 6, 4, 4), (4 * 6 + 6, 6 * 16 * 4)),
        (adapt((4, 6), (2, 2)), (2, 6, 8, 8), (4 * 6 + 6, 6 * 16 * 4)),
        (adapt((4, 6), dim=2), (2, 10, 6), (4 * 6 + 6, 10 * 6 * 4)),
    ],
)
def test_cost_is_that_of_one_sample(rule, shape, expected):
    assert stand_in_cost(StandInSpec((rule,)), [shape]) == expected
    assert sum(p.numel() for p in StandIn(StandInSpec((rule,))).parameters()) == expected[0]


def test_gradients_reach_the_convolution():
    stand_in = StandIn(StandInSpec((adapt((4, 6)),)))
    stand_in(torch.randn(2, 4, 5, 5)).sum().backward()
    assert all(p.grad is not None for p in stand_in.parameters())
