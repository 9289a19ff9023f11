"""Criteria other than the paper's: LAPTOP-style output error, and baselines that claims can be tested against.

All but the first measure every operator in one pass. An operator without parameters has magnitude and Taylor 0: by weights
alone, taking it out costs nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from .plan import Modification, Operator
from .profiling import run
from .replacements import StandIn
from .surgery import applied, get_operator
from .trajectory import Moment, output_tensor

Values = dict[str, float]


def output_error(model: nn.Module, moments: Sequence[Moment], modifications: Iterable[Modification]) -> float:
    """E || eps - eps' ||^2 of the model's output on the original trajectory (LAPTOP-Diff, arXiv 2404.11098); per sample.

    Raises:
        FloatingPointError: an output of the modified model is not finite.
    """
    total, samples = 0.0, 0
    with applied(model, modifications):
        for moment in moments:
            difference = output_tensor(run(model, moment.call)).double() - moment.output.double()
            total += difference.square().sum().item()
            samples += len(difference)
    if not torch.isfinite(torch.tensor(total)):
        raise FloatingPointError("the output is not finite (NaN or infinity)")
    return total / samples


def block_influence(model: nn.Module, moments: Sequence[Moment], operators: Sequence[Operator]) -> Values:
    """1 - cosine of what an operator takes and returns, averaged over samples and calls (ShortGPT, arXiv 2403.03853).

    Where the shapes differ, what the paper's stand-in makes of the input is compared [ours]; 1 where there is only zero.
    """
    sums = {o.path: 0.0 for o in operators}
    samples = dict.fromkeys(sums, 0)

    def watch(path: str, stand_in: StandIn) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            cheap, made = _first(stand_in(*args, **kwargs)), _first(output)
            cosine = torch.cosine_similarity(
                cheap.reshape(len(cheap), -1).float(), made.reshape(len(made), -1).float()
            )
            sums[path] += (1 - cosine).sum().item()
            samples[path] += len(cosine)

        return hook

    handles = []
    for o in operators:
        spec = next((s for s in o.stand_ins if s.name != "zero"), o.stand_ins[0])
        operator = get_operator(model, o.path)
        like = next(model.parameters())
        stand_in = StandIn(spec).to(device=like.device, dtype=like.dtype)
        handles.append(operator.register_forward_hook(watch(o.path, stand_in), with_kwargs=True))
    try:
        for moment in moments:
            run(model, moment.call)
    finally:
        for handle in handles:
            handle.remove()
    return {path: sums[path] / samples[path] if samples[path] else 0.0 for path in sums}


def _first(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else _first(output[0])


def taylor(model: nn.Module, moments: Sequence[Moment], operators: Sequence[Operator]) -> Values:
    """| sum g w | over the weights of an operator: the first-order change of a loss when they become 0 (arXiv 1906.10771).

    There is no data here, so the loss is half the mean squared norm of the model's output on the original trajectory [ours].
    """
    parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    wanted = {n: p.requires_grad for n, p in parameters.items()}
    change = dict.fromkeys(parameters, 0.0)
    samples = sum(len(m.output) for m in moments)
    try:
        for p in parameters.values():
            p.requires_grad_(True)
        for moment in moments:
            with torch.enable_grad():
                loss = output_tensor(run(model, moment.call)).float().square().sum() / (2 * samples)
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for (name, p), g in zip(parameters.items(), gradients, strict=True):
                change[name] += 0.0 if g is None else (g.double() * p.detach().double()).sum().item()
    finally:
        for n, p in parameters.items():
            p.requires_grad_(wanted[n])
    return {o.path: abs(sum(v for n, v in change.items() if n.startswith(o.path + "."))) for o in operators}


def magnitude(model: nn.Module, operators: Sequence[Operator]) -> Values:
    """Mean |w| of the weights that go with an operator."""
    result = {}
    for o in operators:
        own = list(get_operator(model, o.path).parameters())
        count = sum(p.numel() for p in own)
        result[o.path] = sum(p.detach().abs().sum(dtype=torch.float64).item() for p in own) / count if count else 0.0
    return result


def random_scores(operators: Sequence[Operator], seed: int) -> Values:
    """Uniform between 0 and 1; depends on the seed and the operator's path only."""
    return {o.path: random.Random(f"{seed} {o.path}").random() for o in operators}
