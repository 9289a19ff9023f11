"""A pruned model is a stock diffusers model whose config carries the plan: it saves, loads and copies like any other.

On disk, `config.json` of a pruned model has two entries of ours. `pruning_plan` is the plan. `quantization_config` names a
method that only this package knows: a diffusers without it refuses to load the folder, naming the remedy, instead of
filling the missing weights with random numbers. With this package imported, `from_config` builds the stock model and applies the
plan before the weights load, so every way of loading (low memory, sharded, variants, device maps, EMA) is diffusers' own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .plan import Modification, PlanError, PruningPlan, is_inside
from .replacements import StandIn
from .surgery import align_, apply_plan_, count_params, replace_for_good_

PLAN_KEY = "pruning_plan"
RECORD_KEY = "_pruned"
"""Entry of a stock config that says what was done. diffusers passes over private entries in silence and keeps them."""
GUARD_KEY = "quantization_config"
GUARD = {
    "quant_method": "ld_pruner_hf (a pruned model: `pip install ld_pruner_hf`, then `import ld_pruner_hf` before loading)"
}
GUARDED_KEY = "quantization_config"
"""Entry inside the guard of a model that was quantized after pruning: how."""

REMOTE_MODULE = "ld_pruner_hf_code"
"""Name of the module that `publish --remote-code` puts beside a pruned model's config; `model_index.json` names it."""


def plan_of(model: nn.Module) -> PruningPlan | None:
    """The plan that `model` was pruned by, or None for an unpruned model."""
    data = (
        getattr(model, "config", {}).get(PLAN_KEY)
        if isinstance(model, ConfigMixin)
        else getattr(model, PLAN_KEY, None)
    )
    return None if data is None else PruningPlan.from_dict(data, f"config of {type(model).__name__}")


def prune_(model: nn.Module, plan: PruningPlan) -> PruningPlan:
    """Apply `plan` to `model` in place and record it in the model's config, so that it is saved with the weights.

    A model that was pruned before keeps one record: the two plans merged.

    Returns:
        The plan as applied, with what it removed here.

    Raises:
        PlanError: the plan was made for another architecture, or was applied already; the model is then as it was.
    """
    earlier = plan_of(model)
    gone = sorted(set(plan.paths) & {m.path for m in (*earlier, *earlier.unused)}) if earlier else []
    if gone:
        raise PlanError(f"the plan takes out {gone[:3]}, which this {type(model).__name__} has lost already")
    plan = apply_plan_(model, plan)
    align_(model)
    _record(model, plan if earlier is None else _merged(earlier, plan))
    return plan


def _merged(earlier: PruningPlan, plan: PruningPlan) -> PruningPlan:
    """One plan for the unpruned model that does what `earlier` and then `plan` did."""
    kept = {m.path: m for m in earlier}
    new = []
    for m in plan:
        moot = [kept.pop(path) for path in list(kept) if is_inside(path, m.path)]
        moot += [old for old in earlier.unused if is_inside(old.path, m.path)]
        new.append(
            replace(
                m,
                params_removed=m.params_removed + sum(old.params_removed for old in moot),
                macs_removed=m.macs_removed + sum(old.macs_removed for old in moot),
            )
        )
    unused = [m for m in earlier.unused if not any(is_inside(m.path, n.path) for n in new)]
    return replace(
        earlier, modifications=(*kept.values(), *new), how={**earlier.how, **plan.how}, unused=(*unused, *plan.unused)
    )


def remove_unused_(model: nn.Module, unused: Sequence[Modification], done: PruningPlan) -> PruningPlan:
    """Take out of a pruned model what nothing uses any more, and add it to the plan in its config and to `done`, its last part."""
    plan = plan_of(model)
    assert plan is not None
    counted = replace_for_good_(model, unused)
    _record(model, plan.without_unused(counted))
    earlier = set(plan.paths) - set(done.paths)
    return done.without_unused(m for m in counted if m.path not in earlier)


def _record(model: nn.Module, plan: PruningPlan) -> None:
    if isinstance(model, ConfigMixin):
        model.register_to_config(**{PLAN_KEY: plan.to_dict(), GUARD_KEY: dict(GUARD)})
    else:
        setattr(model, PLAN_KEY, plan.to_dict())


def _is_guard(value: Any) -> bool:
    return isinstance(value, dict) and str(value.get("quant_method", "")).startswith("ld_pruner_hf")


# ---- hooks into diffusers --------------------------------------------------------------------------------------------


def _wrap_load_config(load_config: Callable[..., Any]) -> Any:
    """`load_config` that hides our guard from diffusers, but not a quantization in it: with this package present there is nothing to refuse.

    Nor is code from the Hub run where `model_index.json` names the module that `publish --remote-code` ships.
    """

    @functools.wraps(load_config)
    def wrapped(cls: type, *args: Any, **kwargs: Any) -> Any:
        result = load_config(cls, *args, **kwargs)
        config = result[0] if isinstance(result, tuple) else result
        if isinstance(config, dict):
            if _is_guard(config.get(GUARD_KEY)):
                guard = config.pop(GUARD_KEY)
                if GUARDED_KEY in guard:
                    config[GUARD_KEY] = guard[GUARDED_KEY]
            for name, value in config.items():
                if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == REMOTE_MODULE:
                    config[name] = ["diffusers", value[1]]
        return result

    return classmethod(wrapped)


def _wrap_from_config(from_config: Callable[..., Any]) -> Any:
    """`from_config` that applies the plan of the config, if it has one, to the model that it built."""

    @functools.wraps(from_config)
    def wrapped(cls: type, config: Any = None, *args: Any, **kwargs: Any) -> Any:
        data = None
        if isinstance(config, dict) and config.get(PLAN_KEY) is not None:
            data = config[PLAN_KEY]
            own = (PLAN_KEY, GUARD_KEY) if _is_guard(config.get(GUARD_KEY)) else (PLAN_KEY,)
            config = {k: v for k, v in config.items() if k not in own}
        result = from_config(cls, config, *args, **kwargs)
        model = result[0] if isinstance(result, tuple) else result
        if isinstance(model, nn.Module) and isinstance(model, ConfigMixin):
            data = data or model.config.get(PLAN_KEY)  # a path was passed: diffusers read the config itself
            if data is not None:
                plan = PruningPlan.from_dict(data, f"config of {type(model).__name__}")
                _record(model, apply_plan_(model, plan))
        return result

    return classmethod(wrapped)


def _wrap_from_pretrained(from_pretrained: Callable[..., Any]) -> Any:
    """`from_pretrained` that is strict for pruned models: a missing or misshapen weight is an error, never a random number."""

    @functools.wraps(from_pretrained)
    def wrapped(cls: type, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if PLAN_KEY in getattr(model, "config", {}):
            wrong = {k: list(v) for k in ("missing_keys", "mismatched_keys", "unexpected_keys") if (v := info.get(k))}
            if wrong:
                listed = ", ".join(f"{len(v)} {k} ({', '.join(map(str, v[:3]))})" for k, v in wrong.items())
                raise PlanError(
                    f"{pretrained_model_name_or_path}: the weights do not fit the plan in its config: {listed}; the folder is "
                    "incomplete or its config was edited, save or download the pruned model again"
                )
            align_(model)
            quantizer = getattr(model, "hf_quantizer", None)
            if quantizer is not None:
                model.register_to_config(
                    **{GUARD_KEY: {**GUARD, GUARDED_KEY: quantizer.quantization_config.to_dict()}}
                )
        return (model, info) if wants_info else model

    return classmethod(wrapped)


def _lost_projection(attention: nn.Module) -> bool:
    """Does a stand-in take the place of one of the projections that `fuse_qkv_projections` joins into one matrix?"""
    projections = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    return any(isinstance(attention._modules.get(name), StandIn) for name in projections)


def _wrap_fuse_projections(fuse_projections: Callable[..., None]) -> Callable[..., None]:
    """`fuse_projections` that leaves an attention which lost a projection as it is."""

    @functools.wraps(fuse_projections)
    def wrapped(self: Attention, *args: Any, **kwargs: Any) -> None:
        if not _lost_projection(self):
            fuse_projections(self, *args, **kwargs)

    return wrapped


def _wrap_set_processor(set_processor: Callable[..., None]) -> Callable[..., None]:
    """`set_processor` by which an attention that lost a projection gets no processor for fused ones."""

    @functools.wraps(set_processor)
    def wrapped(self: Attention, processor: Any) -> None:
        if not (type(processor).__name__.startswith("Fused") and _lost_projection(self)):
            set_processor(self, processor)

    return wrapped


def install() -> None:
    """Teach diffusers to load pruned models, and to fuse what they still can; done once, on `import ld_pruner_hf`."""
    if hasattr(ConfigMixin, "_by_ld_pruner_hf"):
        return
    ConfigMixin._by_ld_pruner_hf = True  # type: ignore[attr-defined]
    for owner, name, wrap in (
        (ConfigMixin, "load_config", _wrap_load_config),
        (ConfigMixin, "from_config", _wrap_from_config),
        (ModelMixin, "from_pretrained", _wrap_from_pretrained),
        (Attention, "fuse_projections", _wrap_fuse_projections),
        (Attention, "set_processor", _wrap_set_processor),
    ):
        method = vars(owner)[name]
        setattr(owner, name, wrap(getattr(method, "__func__", method)))
    AttentionModuleMixin._supports_qkv_fusion = property(lambda self: not _lost_projection(self))  # type: ignore[assignment]


def kept_share(model: nn.Module) -> float:
    """Parameters of a pruned model as a share of what it had before; 1.0 for an unpruned one."""
    plan = plan_of(model)
    before = 0 if plan is None else plan.params_before
    record = getattr(model, "config", {}).get(RECORD_KEY) if isinstance(model, ConfigMixin) else None
    while record:
        before, record = record["params_before"], record.get("earlier")
    return count_params(model) / before if before else 1.0
