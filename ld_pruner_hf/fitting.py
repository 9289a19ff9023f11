"""Fitted stand-ins: their weights in closed form, from activations of real denoising runs, before any finetuning [ours].

A 1x1 convolution is a linear map, so the one that comes closest to the operator is a least-squares solution. It needs only
sums over the activations (X^T X and X^T Y), which are added up as they pass by; no activation is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .batching import quickest_batch_size
from .latents import RecordedCall, final_latents, find_denoiser, make_conditions, make_jobs, preserved, steps_argument
from .plan import Modification, OutputRule, PruningPlan, StandInSpec
from .profiling import run
from .replacements import Adapter, channel_dim, pick_argument
from .surgery import check_plan, check_replaceable, get_operator

_POOLS: dict[int, Callable[..., torch.Tensor]] = {
    1: F.adaptive_avg_pool1d,
    2: F.adaptive_avg_pool2d,
    3: F.adaptive_avg_pool3d,
}


class LinearFit:
    """Ridge least squares Y = X W^T + b, from sums in float64.

    Args:
        inputs, outputs: channels of X (N, inputs) and Y (N, outputs).
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device | str = "cpu") -> None:
        self.xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64, device=device)
        self.xy = torch.zeros(inputs + 1, outputs, dtype=torch.float64, device=device)
        self.yy = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = x.to(self.xx), y.to(self.xx)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)  # the last input is 1: its weight is the bias
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += y.square().sum()

    def solve(self, ridge: float, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(W, b) that minimise ||Y - X W^T - b||^2 + penalty ||W - weight||^2; the start (`weight`, `bias`) where there is no data.

        `ridge` is the penalty relative to the mean square of an input channel; the bias is free.
        """
        start = torch.cat([weight.T, bias[None]]).to(self.xx)
        penalty = ridge * self.xx.diagonal()[:-1].mean()
        diagonal = torch.cat([penalty.expand(len(self.xx) - 1), penalty.new_zeros(1)])
        # A correction to the start: none where the start is exact, of least norm where channels depend on each other.
        rest, matrix = self.xy - self.xx @ start, self.xx + torch.diag(diagonal)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if failed or factor.diagonal().min() < 1e-6 * factor.diagonal().max():
            correction = torch.linalg.pinv(matrix, hermitian=True, rtol=1e-12) @ rest
        else:
            correction = torch.cholesky_solve(rest, factor)
        found = start + correction
        return found[:-1].T, found[-1]

    def error(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """||Y - X W^T - b||^2 / ||Y||^2."""
        w = torch.cat([weight.T, bias[None]]).to(self.xx)
        residual = self.yy - 2 * (w * self.xy).sum() + (w * (self.xx @ w)).sum()
        return max(0.0, (residual / self.yy).item()) if self.yy > 0 else 0.0


class ChannelFit:
    """Ridge least squares y = w x + b for each channel, from sums in float64. Arguments and methods as `LinearFit`."""

    def __init__(self, channels: int, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(6, channels, dtype=torch.float64, device=device)  # 1, x, y, x^2, xy, y^2

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = x.to(self.sums), y.to(self.sums)
        self.sums += torch.stack([v.sum(0) for v in (torch.ones_like(x), x, y, x * x, x * y, y * y)])

    def solve(self, ridge: float, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n, x, y, xx, xy, _ = self.sums
        n = n.clamp(min=1)
        start = weight.to(x)
        spread = xx - x * x / n  # sum of squares around the mean
        penalty = ridge * xx.mean()
        free = spread + penalty > 1e-14 * xx.mean()
        rest = (xy - x * y / n) - start * spread
        found = start + torch.where(
            free, rest / (spread + penalty).where(free, torch.ones_like(spread)), torch.zeros_like(rest)
        )
        return found, (y - found * x) / n

    def error(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        n, x, y, xx, xy, yy = self.sums
        w, b = weight.to(x), bias.to(x)
        residual = yy + w * w * xx + n * b * b - 2 * w * xy - 2 * b * y + 2 * w * b * x
        return max(0.0, (residual.sum() / yy.sum()).item()) if yy.sum() > 0 else 0.0


@dataclass(frozen=True)
class Fit:
    """Fitted stand-ins.

    Attributes:
        plan: the plan; with `affine`, its identities and zeros have become per-channel affine maps.
        weights: path -> state dict of the stand-in there, for those with something to fit.
        errors: path -> (before, after): ||operator - stand-in||^2 / ||operator||^2 of their outputs on the calibration data.
    """

    plan: PruningPlan
    weights: dict[str, dict[str, torch.Tensor]]
    errors: dict[str, tuple[float, float]]

    def load_(self, model: nn.Module) -> None:
        """Write the weights into the stand-ins of `model`, to which `plan` has been applied; dtype and device stay its own."""
        with torch.no_grad():
            for path, state in self.weights.items():
                own = dict(get_operator(model, path).named_parameters())
                for name, value in state.items():
                    if name not in own or own[name].shape != value.shape:
                        raise ValueError(
                            f"{path}: no stand-in with weights {name} {tuple(value.shape)}; apply the fit's plan first"
                        )
                    own[name].copy_(value)

    def __str__(self) -> str:
        width = max(map(len, self.errors), default=0)
        return (
            "\n".join(f"{p:<{width}}  error {a:.4f} -> {b:.4f}" for p, (a, b) in self.errors.items())
            or "nothing to fit"
        )


def _flat(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    return [t for v in output for t in _flat(v)] if isinstance(output, (tuple, list)) else []


def _channels_last(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.movedim(dim, -1).flatten(0, -2)


class _Watcher:
    """Adds up what one output of one operator needs for its fit."""

    def __init__(self, rule: OutputRule, index: int, affine: bool) -> None:
        self.rule, self.index, self.affine = rule, index, affine
        self.adapter = Adapter(rule) if rule.rule == "adapt" else None
        self.fit: LinearFit | ChannelFit | None = None
        self.affine_rule: OutputRule | None = None

    def see(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        x, y = pick_argument(self.rule, args, kwargs).detach(), _flat(output)[self.index].detach()
        device = torch.device("cpu") if x.device.type == "mps" else x.device  # no float64 there
        if self.adapter is not None and self.rule.changes_channels:
            x, dim = self.adapter.shrink(x), self.rule.channel_dim
            if x.shape[2:] != y.shape[2:] and dim == 1:  # nearest upscaling: the mean of what one value is copied to
                y = _POOLS[x.ndim - 2](y, x.shape[2:])
            self.fit = self.fit or LinearFit(self.rule.in_channels, self.rule.out_channels, device)
            self.fit.add(_channels_last(x, dim), _channels_last(y, dim))
        elif self.affine and self.adapter is None and x.shape == y.shape:
            dim = channel_dim(module, x.ndim)
            self.affine_rule = replace(
                self.rule, rule="affine", channel_dim=dim, in_channels=x.shape[dim], out_channels=x.shape[dim]
            )
            self.fit = self.fit or ChannelFit(x.shape[dim], device)
            self.fit.add(_channels_last(x, dim), _channels_last(y, dim))

    def start(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight and bias of the stand-in that is not fitted."""
        if self.adapter is not None:
            return self.adapter.weight.detach(), self.adapter.bias.detach()
        channels = self.affine_rule.out_channels if self.affine_rule else 0
        return torch.full((channels,), float(self.rule.rule == "identity")), torch.zeros(channels)


def _watched(
    model: nn.Module, plan: PruningPlan, affine: bool, forward: Callable[[], None]
) -> dict[str, list[_Watcher]]:
    """Run `forward` with hooks on the plan's operators, which are still in place."""
    watchers = {m.path: [_Watcher(r, i, affine) for i, r in enumerate(m.stand_in.rules)] for m in plan}

    def hook(path: str) -> Callable[..., None]:
        def see(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            for watcher in watchers[path]:
                watcher.see(module, args, kwargs, output)

        return see

    handles = [get_operator(model, p).register_forward_hook(hook(p), with_kwargs=True) for p in watchers]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return watchers


def _solve(plan: PruningPlan, watchers: Mapping[str, list[_Watcher]], ridge: float) -> Fit:
    modifications: list[Modification] = []
    weights: dict[str, dict[str, torch.Tensor]] = {}
    errors: dict[str, tuple[float, float]] = {}
    for m in plan:
        state: dict[str, torch.Tensor] = {}
        rules, before, after = list(m.stand_in.rules), [], []
        for w in watchers[m.path]:
            if w.fit is None:
                continue
            start = w.start()
            found = w.fit.solve(ridge, *start)
            before.append(w.fit.error(*start))
            after.append(w.fit.error(*found))
            rules[w.index] = w.affine_rule or w.rule
            state |= {
                f"adapters.{w.index}.{n}": v.float().cpu() for n, v in zip(("weight", "bias"), found, strict=True)
            }
        if state:
            weights[m.path] = state
            errors[m.path] = sum(before) / len(before), sum(after) / len(after)
        modifications.append(replace(m, stand_in=StandInSpec(tuple(rules), m.stand_in.structure)))
    return Fit(plan.with_modifications(modifications, fit={"ridge": ridge}), weights, errors)


def fit_stand_ins(
    pipe_or_model: Any,
    plan: PruningPlan,
    conditions: Any = None,
    *,
    calls: Iterable[RecordedCall] | None = None,
    affine: bool = False,
    ridge: float = 1e-4,
    num_inference_steps: int | None = None,
    seeds: int = 1,
    seed: int = 0,
    batch_size: int | None = 8,
    **call_kwargs: Any,
) -> Fit:
    """Weights for a plan's stand-ins in closed form, so that each comes closest to its operator; the model is not changed.

    The unpruned denoiser runs; for each operator the ridge least-squares solution is found between what the stand-in will
    read and what the operator returned, over all positions, steps and conditions.

    Args:
        pipe_or_model: an unpruned pipeline, or a model with `calls`.
        plan: what will be replaced.
        conditions, num_inference_steps, seeds, seed, batch_size, call_kwargs: the denoising runs, as in `score_operators`.
        calls: for a bare model, the calls to run.
        affine: also put a per-channel affine map where the plan has an identity or a zero of unchanged shape. It helps on
            average, not in every plan: measure. Such a plan can no longer become a stock config.
        ridge: penalty towards the unfitted stand-in, relative to the mean square of an input channel.

    Returns:
        The plan, its weights and the error of each stand-in before and after. Apply with `fit.plan`, then `fit.load_(model)`.

    Raises:
        PlanError: the plan is for another architecture. ValueError: `ridge` is negative, or unsuitable conditions.

    Example:
        >>> fit = fit_stand_ins(pipe, plan, num_inference_steps=10)
        >>> pipe.prune(fit.plan); fit.load_(pipe.unet)
    """
    if not ridge >= 0:
        raise ValueError(f"ridge: got {ridge!r}, expected 0 or more")
    if isinstance(pipe_or_model, nn.Module):
        model, recorded_calls = pipe_or_model, list(calls or ())
        if not recorded_calls:
            raise ValueError(
                "calls: got none, expected at least one RecordedCall for a bare model; a pipeline makes its own"
            )
        check_replaceable(model)
        check_plan(model, plan)

        def run_calls() -> None:
            for call in recorded_calls:
                run(model, call)

        return _solve(plan, _watched(model, plan, affine, run_calls), ridge)
    pipe = pipe_or_model
    quiet = bool(getattr(pipe, "_progress_bar_config", {}).get("disable", False))
    call_kwargs |= steps_argument(pipe, num_inference_steps)
    made = make_conditions(pipe, conditions, call_kwargs)
    with preserved(pipe):
        model = getattr(pipe, find_denoiser(pipe, plan.component or None, **made[0]))
        check_replaceable(model)
        check_plan(model, plan)
        own = range(seed, seed + seeds)
        jobs = make_jobs(pipe, made, own, batch_size or quickest_batch_size(pipe, made, own, quiet))

        def denoise() -> None:
            for job in tqdm(jobs, desc="fitting", unit="run", disable=quiet):
                final_latents(pipe, job.call, job.seeds)

        return _solve(plan, _watched(model, plan, affine, denoise), ridge)
