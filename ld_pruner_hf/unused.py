"""Operators whose results nothing uses any more once others are taken out: the norm before an attention that became zero.

They are found by data flow, not by class: in a backward pass through one call no gradient path leads to their outputs. Taking
them out as well changes no bit of the output, and saves their weights and their time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from .latents import RecordedCall
from .operators import on_meta
from .plan import Modification, StandInSpec, is_inside
from .profiling import run
from .replacements import StandIn
from .surgery import applied, count_params
from .watching import watch_call

SMALL = 2e10
"""Parameters times input values below which a real backward pass is quicker than one on `meta`, where many are Python."""


def _floats(value: Any) -> list[torch.Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def unread_modules(model: nn.Module, call: RecordedCall) -> set[str]:
    """Paths of the modules that run in the call and on whose outputs none of the model's outputs depends.

    The model runs on the `meta` device, without memory, or as it is: in a small call at once, which is quicker, else only if `meta`
    fails. Empty if it cannot be differentiated.
    """

    def tracked() -> RecordedCall:
        return call.mapped(lambda t: t.detach().requires_grad_().clone() if t.is_floating_point() else t)

    runs: list[Callable[[], Any]] = [lambda: on_meta(model, tracked())(), lambda: run(model, tracked())]
    values = max((t.numel() for t in _floats((call.args, call.kwargs))), default=1)
    if count_params(model) * values < SMALL:
        runs.reverse()
    for go in runs:
        try:
            return _unread(model, go)
        except (
            Exception
        ):  # memory; values are read, which `meta` tensors do not have; quantized weights; writes in place
            continue
    return set()


def _unread(model: nn.Module, go: Callable[[], Any]) -> set[str]:
    outputs: dict[str, list[torch.Tensor]] = {}

    def keep(path: str) -> Callable[..., None]:
        return lambda _, args, output: outputs.setdefault(path, []).extend(_floats(output))

    handles = [module.register_forward_hook(keep(path)) for path, module in model.named_modules() if path]
    try:
        with torch.enable_grad():
            result = go()
    finally:
        for handle in handles:
            handle.remove()
    found = [(path, t) for path, ts in outputs.items() for t in ts]
    unknown = {path for path, t in found if not t.requires_grad}  # of constants nothing can be said
    found = [(path, t) for path, t in found if t.requires_grad]
    ends = [t for t in _floats(result) if t.requires_grad]
    gradients = torch.autograd.grad(ends, [t for _, t in found], [torch.ones_like(t) for t in ends], allow_unused=True)
    read = {path for (path, _), gradient in zip(found, gradients, strict=True) if gradient is not None}
    return {path for path, _ in found} - read - unknown


def find_unused(model: nn.Module, call: RecordedCall, before: set[str]) -> list[Modification]:
    """What else can go out of a pruned model with the output of the call the same to the last bit: the outermost modules in
    which nothing was replaced, and stand-ins with weights.

    Args:
        before: `unread_modules` of the model before it was pruned; these stay, other calls may use them.
    """
    unread = unread_modules(model, call) - before
    if not unread:
        return []
    seen = watch_call(model, call)
    found: list[Modification] = []
    for path, module in model.named_modules():
        if path not in unread or any(is_inside(path, m.path) for m in found):
            continue
        if isinstance(module, StandIn):
            specs = [module.spec] if count_params(module) else []
        else:
            is_whole = path in seen and not any(isinstance(inner, StandIn) for inner in module.modules())
            specs = list(seen[path].specs) if is_whole else []
        if not specs:
            continue
        spec = specs[0]
        rules = tuple(rule if rule.rule == "identity" else replace(rule, rule="zero") for rule in spec.rules)
        found.append(Modification(path, type(module).__name__, StandInSpec(rules, spec.structure)))
    return found if found and _changes_nothing(model, call, found) else []


def _changes_nothing(model: nn.Module, call: RecordedCall, modifications: list[Modification]) -> bool:
    expected = _floats(run(model, call))
    with applied(model, modifications):
        got = _floats(run(model, call))
    return len(got) == len(expected) and all(map(torch.equal, got, expected))
