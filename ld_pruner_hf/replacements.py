"""The stand-ins: what runs in an operator's place (METHODS: LD-Pruner section 2.2). A closed list, built from data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .plan import OutputRule, StandInSpec


def channel_dim(module: nn.Module, ndim: int) -> int:
    """Where channels are: dimension 1 of feature maps, the last of tokens; 1-D convolutions make (B, C, L) of three."""
    if ndim >= 4 or (ndim == 3 and any(p.ndim == 3 for p in module.parameters())):
        return 1
    return ndim - 1


def pick_argument(rule: OutputRule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The input tensor that a rule reads, however the caller passed it."""
    value = kwargs[rule.argument] if rule.argument in kwargs else args[rule.position]
    for i in rule.index:
        value = value[i]
    return value


def target_size(args: Sequence[Any], kwargs: Mapping[str, Any], ndim: int) -> tuple[int, ...] | None:
    """The output size that the caller asks for, if one of the arguments is a size (diffusers passes one for odd sizes)."""
    for value in [*args, *kwargs.values()]:
        if isinstance(value, (tuple, list)) and len(value) == ndim and all(type(v) is int for v in value):
            return tuple(value)
    return None


class Adapter(nn.Module):
    """Changes channels by a 1x1 convolution and size by average pooling or nearest upscaling; (B, C, *) or (B, N, C).

    The convolution starts as a partial identity: output channel i passes input channel i on, further ones are 0. After a
    concatenation with a skip connection, as in a U-Net's up blocks, this passes the main branch on. It needs no random numbers.
    """

    def __init__(self, rule: OutputRule) -> None:
        super().__init__()
        self.rule = rule
        if rule.changes_channels:
            self.weight = nn.Parameter(torch.empty(rule.out_channels, rule.in_channels))
            self.bias = nn.Parameter(torch.empty(rule.out_channels))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.zero_()
            self.weight.fill_diagonal_(1.0)
            self.bias.zero_()

    def _mix_channels(self, x: torch.Tensor) -> torch.Tensor:
        if self.rule.channel_dim in (-1, x.ndim - 1):
            return F.linear(x, self.weight, self.bias)
        if x.ndim == 4:
            return F.conv2d(x, self.weight[:, :, None, None], self.bias)
        return F.linear(x.movedim(self.rule.channel_dim, -1), self.weight, self.bias).movedim(
            -1, self.rule.channel_dim
        )

    def shrink(self, x: torch.Tensor) -> torch.Tensor:
        """The input as the convolution sees it: pooled, where the operator makes its output smaller."""
        factors = self.rule.factors
        if any(f < 0 for f in factors):
            pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[len(factors)]
            x = pool(x, kernel_size=tuple(-f if f < 0 else 1 for f in factors), ceil_mode=True)
        return x

    def forward(self, x: torch.Tensor, size: tuple[int, ...] | None = None) -> torch.Tensor:
        factors = self.rule.factors
        x = self.shrink(x)
        if self.rule.changes_channels:
            x = self._mix_channels(x)
        if any(f > 1 for f in factors):
            size = size or tuple(s * max(f, 1) for s, f in zip(x.shape[2:], factors, strict=True))
            x = F.interpolate(x, size=size, mode="nearest")
        return x

    def macs(self, elements: int) -> int:
        """Multiply-accumulates to make an output of `elements` values."""
        return elements * self.rule.in_channels if self.rule.changes_channels else 0

    def extra_repr(self) -> str:
        return f"{self.rule.name}, {self.rule.in_channels} -> {self.rule.out_channels}, factors={self.rule.factors}"


class Affine(nn.Module):
    """Scales and shifts each channel; starts as the identity. What `fitting` makes of identities and zeros."""

    def __init__(self, rule: OutputRule) -> None:
        super().__init__()
        self.rule = rule
        self.weight = nn.Parameter(torch.ones(rule.out_channels))
        self.bias = nn.Parameter(torch.zeros(rule.out_channels))

    def forward(self, x: torch.Tensor, size: tuple[int, ...] | None = None) -> torch.Tensor:
        shape = [1] * x.ndim
        shape[self.rule.channel_dim] = -1
        return x * self.weight.view(shape) + self.bias.view(shape)


_LEARNED: dict[str, type[Adapter] | type[Affine]] = {"adapt": Adapter, "affine": Affine}


def zeros_like_output(rule: OutputRule, x: torch.Tensor, size: tuple[int, ...] | None) -> torch.Tensor:
    """Zeros of the shape that the operator would have returned."""
    shape = list(x.shape)
    shape[rule.channel_dim] = rule.out_channels or shape[rule.channel_dim]
    for i, f in enumerate(rule.factors):
        shape[2 + i] = -(-shape[2 + i] // -f) if f < 0 else shape[2 + i] * f
    if size is not None and any(f > 1 for f in rule.factors):
        shape[2:] = size
    return x.new_zeros(shape)


class StandIn(nn.Module):
    """Runs in an operator's place, with the operator's own call signature and return structure.

    Args:
        spec: one rule per output tensor; see `StandInSpec`.
    """

    def __init__(self, spec: StandInSpec) -> None:
        super().__init__()
        self.spec = spec
        self.adapters = nn.ModuleDict(
            {str(i): _LEARNED[r.rule](r) for i, r in enumerate(spec.rules) if r.rule in _LEARNED}
        )

    def _output(self, i: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
        rule = self.spec.rules[i]
        x = pick_argument(rule, args, kwargs)
        if rule.rule == "identity":
            return x
        size = target_size(args, kwargs, len(rule.factors)) if rule.factors else None
        if rule.rule == "zero":
            return zeros_like_output(rule, x, size)
        return self.adapters[str(i)](x, size)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._build(self.spec.structure, args, kwargs)

    def _build(self, structure: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if structure is None:
            return None
        if isinstance(structure, int):
            return self._output(structure, args, kwargs)
        return tuple(self._build(s, args, kwargs) for s in structure)

    def extra_repr(self) -> str:
        return self.spec.name


def stand_in_cost(spec: StandInSpec, output_shapes: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(params, MACs per sample and call) of a stand-in whose outputs have these shapes; batch is the first dimension."""
    params = macs = 0
    for rule, shape in zip(spec.rules, output_shapes, strict=True):
        if rule.rule == "affine":
            params += 2 * rule.out_channels
        if rule.rule == "adapt" and rule.changes_channels:
            params += rule.in_channels * rule.out_channels + rule.out_channels
            elements = 1
            for size in shape[1:]:
                elements *= size
            for f in rule.factors:  # the convolution runs on the smaller side of an upscaling
                elements //= max(f, 1)
            macs += elements * rule.in_channels
    return params, macs
