"""Put stand-ins into a model: `applied` for a while, `apply_plan_` for good. Exact, and undone on any exit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .plan import Modification, PlanError, PruningPlan
from .replacements import StandIn


def count_params(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once."""
    return sum(p.numel() for p in model.parameters())


def architecture_of(model: nn.Module) -> str:
    """Fingerprint of class, parameter names and shapes: equal for sibling fine-tunes, whatever dtype or device."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, p in sorted(model.named_parameters(remove_duplicate=False)):
        digest.update(f"{name}{tuple(p.shape)}".encode())
    return digest.hexdigest()[:16]


def weights_of(model: nn.Module) -> str:
    """Fingerprint of the weights, from a few values of every parameter."""
    digest = hashlib.sha256(architecture_of(model).encode())
    for name, p in sorted(model.named_parameters()):
        if not p.is_meta:
            digest.update(name.encode())
            digest.update(p.detach().flatten()[:: max(1, p.numel() // 16)].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse_wrapped(model: nn.Module) -> None:
    """Raise ValueError for a model inside DDP, FSDP or torch.compile: replacing modules there would have no effect."""
    if hasattr(model, "_orig_mod") or type(model).__name__ in ("DistributedDataParallel", "FullyShardedDataParallel"):
        raise ValueError(
            f"got a {type(model).__name__}, expected the bare model; unwrap it first (accelerator.unwrap_model(model), "
            "or model._orig_mod of a compiled one), prune, then wrap again"
        )


def check_replaceable(model: nn.Module) -> None:
    """Raise ValueError for a model, wrapped or not, in which replacing modules would break something or have no effect.

    Those are parts that `compile()` compiled, hooks of diffusers (group offload, caches, layerwise casting), hooks of accelerate inside
    the model (sequential offload, device maps; whole-model offload does no harm), adapters, fused projections, and weights that are no
    plain floating-point parameters (quantized by whatever library, or distributed).
    """
    refuse_wrapped(model)
    for path, module in model.named_modules():
        why = _obstacle(module, is_inside=bool(path))
        if why:
            raise ValueError(f"{type(model).__name__}{'.' * bool(path)}{path} {why}")


def _obstacle(module: Any, is_inside: bool) -> str:
    """Why nothing can be replaced while a module is like this, and the remedy; "" for a plain module."""
    adapters, registry = getattr(module, "peft_config", None), getattr(module, "_diffusers_hook", None)
    if adapters:
        return (
            f"has adapters ({', '.join(adapters)}), expected none: unload or fuse adapters first (pipe.fuse_lora(), "
            "pipe.unload_lora_weights())"
        )
    if registry is not None and registry.hooks:
        return (
            f"has hooks ({', '.join(registry.hooks)}), expected none: prune first, then enable group offload, caching or layerwise "
            "casting (disable_cache() ends caching; for the others load the model anew)"
        )
    if is_inside and hasattr(module, "_hf_hook"):
        return (
            f"has a {type(module._hf_hook).__name__}, which offloads its weights or puts them on a device of their own, expected none: "
            "call pipe.remove_all_hooks() or load without a device map, prune, then offload (pipe.enable_model_cpu_offload() may stay on)"
        )
    if module._compiled_call_impl is not None:
        return "is compiled, expected a plain module: load the model anew, prune, then compile"
    if getattr(module, "fused_projections", False):
        return "has fused projections, expected separate ones: load the model anew, prune, then fuse_qkv_projections()"
    for name, p in module.named_parameters(recurse=False):
        if type(p) is not nn.Parameter or not p.is_floating_point():
            return (
                f"has its {name} as a {type(p).__name__} of {p.dtype}, expected a plain floating-point parameter: quantized or "
                "distributed weights cannot be replaced; load the model in float16 or bfloat16, prune, then quantize"
            )
    return ""


def paths_of(model: nn.Module) -> dict[int, list[str]]:
    """id(module) -> all names under which the model holds it."""
    paths: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(name)
    return paths


def get_operator(model: nn.Module, path: str) -> nn.Module:
    try:
        return model.get_submodule(path)
    except AttributeError as error:
        raise PlanError(
            f"{type(model).__name__} has no module {path!r} ({error}); the plan belongs to another architecture"
        ) from error


def make_stand_in(model: nn.Module, operator: nn.Module, modification: Modification) -> StandIn:
    """A stand-in on the operator's device and in its dtype (the model's, where the operator has no parameters)."""
    like = next(operator.parameters(), None)
    if like is None:
        like = next(model.parameters(), None)
    stand_in = StandIn(modification.stand_in)
    if like is not None:
        stand_in.to(device=like.device, dtype=like.dtype if like.is_floating_point() else None)
    return stand_in.train(operator.training)


def replace_modules(model: nn.Module, new: Iterable[tuple[nn.Module, nn.Module]]) -> None:
    """Put `new` modules where the old ones are, under every name that the model holds them by."""
    swaps = {id(old): fresh for old, fresh in new}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in swaps:
                parent._modules[name] = swaps[id(child)]


@contextmanager
def applied(model: nn.Module, modifications: Iterable[Modification] | PruningPlan) -> Iterator[dict[str, StandIn]]:
    """Replace operators by their stand-ins inside the `with` block; the same objects are back after any exit.

    Yields:
        path -> stand-in.

    Raises:
        PlanError: a path that the model does not have. ValueError: a model wrapped by DDP, FSDP or torch.compile.
    """
    refuse_wrapped(model)
    operators = {m.path: get_operator(model, m.path) for m in modifications}
    stand_ins = {m.path: make_stand_in(model, operators[m.path], m) for m in modifications}
    replace_modules(model, [(operators[p], stand_ins[p]) for p in operators])
    try:
        yield stand_ins
    finally:
        replace_modules(model, [(stand_ins[p], operators[p]) for p in operators])


def align_(model: nn.Module) -> None:
    """Move weights on the CPU that lie at odd addresses, as those mapped from a file do.

    Some kernels round differently there; without this a model that is saved and loaded again is not equal to the last bit.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()


def check_plan(model: nn.Module, plan: PruningPlan) -> None:
    """Raise PlanError if the plan is empty or was made for another architecture."""
    if not len(plan):
        raise PlanError("the plan lists no modification; make one with pipe.prune(k) or read a complete file")
    got = architecture_of(model)
    if plan.architecture and plan.architecture != got:
        raise PlanError(
            f"the plan was made for {plan.model_class} with architecture {plan.architecture}, this {type(model).__name__} "
            f"has {got}; score this model and prune it by its own scores"
        )


def apply_plan_(model: nn.Module, plan: PruningPlan) -> PruningPlan:
    """Replace the plan's operators in `model` for good and record the plan in the model's config.

    Returns:
        The plan with the counts of what was removed here.

    Raises:
        PlanError: the plan fits another architecture; the model is then as it was. ValueError: see `check_replaceable`.
    """
    check_replaceable(model)
    check_plan(model, plan)
    before = count_params(model)
    counted = replace_for_good_(model, (*plan, *plan.unused))
    n = len(plan)
    return replace(plan, modifications=counted[:n], unused=counted[n:], params_before=before)


def replace_for_good_(model: nn.Module, modifications: Iterable[Modification]) -> tuple[Modification, ...]:
    """Replace these operators; returns the modifications with the counts of what was removed.

    Raises:
        PlanError: a path that the model does not have; the model is then as it was.
    """
    swaps, counted = [], []
    for m in modifications:
        operator = get_operator(model, m.path)
        stand_in = make_stand_in(model, operator, m)
        swaps.append((operator, stand_in))
        counted.append(replace(m, params_removed=count_params(operator) - count_params(stand_in)))
    replace_modules(model, swaps)
    return tuple(counted)
