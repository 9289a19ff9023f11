"""find_operators: what can be taken out of a denoiser, found by watching one real call. No list of class names decides."""

from __future__ import annotations

import fnmatch
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from tqdm.auto import tqdm

from .latents import RecordedCall, calling, find_denoiser, make_conditions, preserved, record_call, steps_argument
from .plan import Modification, Operator, StandInSpec
from .profiling import count_macs, device_of, latency_shares, run, synchronize
from .replacements import stand_in_cost
from .surgery import applied, check_replaceable, count_params, paths_of
from .watching import Seen, watch_call

STANDINS = ("all", "paper")


def _cheaper(spec: StandInSpec, seen: Seen, macs: int) -> bool:
    """Does the stand-in save something? One that only passes tensors on does; a computing one must need fewer MACs."""
    _, stand_in_macs = stand_in_cost(spec, seen.output_shapes)
    if all(rule.rule != "adapt" for rule in spec.rules):
        return True
    return stand_in_macs * seen.calls < macs


@contextmanager
def plain_attributes_kept(model: nn.Module) -> Iterator[None]:
    """What modules, and plain objects that they hold, have cached inside the `with` block is forgotten: it may lie on `meta`."""
    owners: dict[int, dict[str, Any]] = {}
    for module in model.modules():
        owners[id(module)] = vars(module)
        for value in vars(module).values():
            if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, torch.Tensor, type)):
                owners[id(value)] = vars(value)
    before = [(attributes, dict(attributes)) for attributes in owners.values()]
    try:
        yield
    finally:
        for attributes, old in before:
            for name in attributes.keys() - old.keys():
                del attributes[name]
            attributes.update({name: value for name, value in old.items() if attributes.get(name) is not value})


def on_meta(model: nn.Module, call: RecordedCall) -> Callable[[], Any]:
    """A function that runs the model, as it then is, on the `meta` device: shapes only."""

    def to_meta(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        if isinstance(value, (tuple, list)):
            return type(value)(to_meta(v) for v in value)
        return {k: to_meta(v) for k, v in value.items()} if isinstance(value, dict) else value

    def weights(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)

    args, kwargs = to_meta(call.args), to_meta(call.kwargs)
    own = {id(t): weights(t) for t in (*model.parameters(), *model.buffers())}

    def go() -> Any:
        named = (*model.named_parameters(), *model.named_buffers())
        tensors = {n: own[id(t)] if id(t) in own else weights(t) for n, t in named}
        with calling(model, call.method), plain_attributes_kept(model):
            return torch.func.functional_call(model, tensors, *tree_map(lambda value: value, (args, kwargs)))

    return go


def _quickest_run(model: nn.Module, call: RecordedCall) -> Callable[[], Any]:
    """A function that runs the model for its errors: on `meta` where the model can and that is quicker."""

    def seconds(go: Callable[[], Any]) -> float:
        start = time.perf_counter()
        try:
            go()
        except Exception:
            return float("inf")
        synchronize(device_of(model))
        return time.perf_counter() - start

    def real() -> Any:
        return run(model, call)

    meta = on_meta(model, call)
    return meta if seconds(meta) < seconds(real) else real


def _failures(model: nn.Module, operators: Sequence[Operator], go: Callable[[], Any], bar: tqdm) -> dict[str, str]:
    """path -> why the model does not run without it. Operators are tried together, and halved where that fails."""
    if not operators:
        return {}
    try:
        with applied(model, [Modification(o.path, o.kind, o.stand_ins[0]) for o in operators]):
            go()
    except Exception as error:
        if len(operators) > 1:
            half = len(operators) // 2
            return _failures(model, operators[:half], go, bar) | _failures(model, operators[half:], go, bar)
        bar.update()
        message = (str(error).splitlines() or [""])[0][:120]
        return {operators[0].path: f"the model does not run without it ({type(error).__name__}: {message})"}
    bar.update(len(operators))
    return {}


def _drop_failing(model: nn.Module, call: RecordedCall, operators: list[Operator], progress: bool) -> list[Operator]:
    """Make no candidate of an operator without whose attributes its parent, say, cannot run."""
    candidates = [o for o in operators if o.is_candidate]
    failures: dict[str, str] = {}
    with (
        torch.no_grad(),
        tqdm(total=len(candidates), desc="trying stand-ins", disable=not progress, leave=False) as bar,
    ):
        go = _quickest_run(model, call)
        for depth in sorted({o.path.count(".") for o in candidates}):  # operators of one depth do not nest
            failures |= _failures(model, [o for o in candidates if o.path.count(".") == depth], go, bar)
    return [replace(o, stand_ins=(), reason=failures[o.path]) if o.path in failures else o for o in operators]


def selected(path: str, kind: str, include: Any, exclude: Any, kinds: Any) -> bool:
    """Does an operator pass the user's filters? Patterns are shell-style and match a path or a whole subtree."""

    def matches(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(path, p) or fnmatch.fnmatchcase(path, p + ".*") for p in patterns)

    return (not include or matches(include)) and not (exclude and matches(exclude)) and (not kinds or kind in kinds)


def as_list(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def check_filters(model: nn.Module, include: Any, exclude: Any, kinds: Any) -> tuple[list[str], list[str], list[str]]:
    """The filters as lists; ValueError for a pattern that matches no module and for a kind that the model does not have."""
    include, exclude, kinds = as_list(include), as_list(exclude), as_list(kinds)
    modules = {name: type(m).__name__ for name, m in model.named_modules() if name}
    for name, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(selected(path, kind, [pattern], None, None) for path, kind in modules.items()):
                raise ValueError(
                    f"{name}: the pattern {pattern!r} matches no module; paths look like {list(modules)[:3]}"
                )
    known = sorted(set(modules.values()))
    for kind in kinds:
        if kind not in known:
            raise ValueError(f"kinds: got {kind!r}, this model has {known}")
    return include, exclude, kinds


def recorded(example_inputs: Any) -> RecordedCall:
    """Example inputs as given by a user: a dict of keyword arguments, a tuple of positional ones, or (args, kwargs)."""
    if isinstance(example_inputs, RecordedCall):
        return example_inputs
    if isinstance(example_inputs, Mapping):
        return RecordedCall((), dict(example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        if (
            len(example_inputs) == 2
            and isinstance(example_inputs[0], (tuple, list))
            and isinstance(example_inputs[1], Mapping)
        ):
            return RecordedCall(tuple(example_inputs[0]), dict(example_inputs[1]))
        return RecordedCall(tuple(example_inputs), {})
    raise ValueError(
        f"example_inputs: got {type(example_inputs).__name__}, expected a dict of keyword arguments, a tuple of positional "
        "ones or (args, kwargs); a bare model needs them, a pipeline finds its own"
    )


def find_operators(
    pipe_or_model: Any,
    example_inputs: Any = None,
    *,
    component: str | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    kinds: str | Sequence[str] | None = None,
    standins: str = "all",
    trial: bool = True,
    latency: bool = True,
    progress: bool = True,
    **call_kwargs: Any,
) -> list[Operator]:
    """List every sub-module of the denoiser: what could replace it, or why nothing can.

    One real call is watched: a pipeline's own first denoising step, or the model on `example_inputs`. A module is a
    candidate if its output can be made more cheaply from its input (identity where shapes agree, else 1x1 convolution,
    average pooling, nearest upscaling or both; LD-Pruner section 2.2) and the model runs with that stand-in.

    Args:
        pipe_or_model: a pipeline, or a model (on any device, `meta` too).
        example_inputs: for a bare model, arguments of one call: a dict, a tuple, or (args, kwargs).
        component: which of the pipeline's models; default: the one that denoises.
        include, exclude: shell-style patterns of paths ("down_blocks.*", "*.attn1"); a pattern covers what lies inside.
        kinds: class names ("Conv2d", "ResnetBlock2D").
        standins: "all" also offers zero for operators whose output is added to something; "paper" does not.
        trial: run the model once with each stand-in (on `meta` where it can) and drop those with which it fails.
        latency: measure each operator's share of the call's time.
        **call_kwargs: arguments of the pipeline call that is watched.

    Returns:
        Operators in the order of `named_modules()`, filtered.

    Raises:
        ValueError: unknown component, kind, argument, or a pattern that matches nothing; a model that is wrapped, compiled,
            offloaded layer by layer, hooked, adapted or quantized.

    Example:
        >>> operators = find_operators(pipe)
        >>> [o.path for o in operators if o.kind == "Attention" and o.is_candidate][:1]
        ['down_blocks.0.attentions.0.transformer_blocks.0.attn1']
    """
    if standins not in STANDINS:
        raise ValueError(f"standins: got {standins!r}, expected one of {STANDINS}")
    if isinstance(pipe_or_model, nn.Module):
        model = pipe_or_model
        check_replaceable(model)
        filters = check_filters(model, include, exclude, kinds)
        call = recorded(example_inputs)
        training = [(m, m.training) for m in model.modules()]
        model.eval()
        try:
            return _find(model, call, filters, standins, trial, latency, progress)
        finally:
            for module, flag in training:
                module.training = flag
    with preserved(pipe_or_model):
        first = make_conditions(pipe_or_model, None, call_kwargs)[0] | call_kwargs
        first = {**first, **({} if "num_inference_steps" in first else steps_argument_if_any(pipe_or_model))}
        component = find_denoiser(pipe_or_model, component, **first)
        model = getattr(pipe_or_model, component)
        check_replaceable(model)
        filters = check_filters(model, include, exclude, kinds)
        call = record_call(pipe_or_model, component, first)
        return _find(model, call, filters, standins, trial, latency, progress)


def steps_argument_if_any(pipe: Any) -> dict[str, int]:
    """Two steps, where the pipeline takes a number of steps: the first denoiser call is the same."""
    try:
        return steps_argument(pipe, 2)
    except ValueError:
        return {}


def _find(
    model: nn.Module, call: RecordedCall, filters: Any, standins: str, trial: bool, latency: bool, progress: bool
) -> list[Operator]:
    seen = watch_call(model, call)
    macs, _ = count_macs(model, call)
    shares = latency_shares(model, call) if latency and device_of(model).type != "meta" else {}
    paths = paths_of(model)
    modules = dict(model.named_modules())
    operators = []
    for path, entry in seen.items():
        module = modules[path]
        if not selected(path, type(module).__name__, *filters):
            continue
        params, own_macs = count_params(module), macs.get(path, 0)
        specs = entry.specs
        reason = entry.reason if not specs or all(r.rule != "zero" for s in specs for r in s.rules) else None
        if reason is None:
            offered = [s for s in specs if standins == "all" or s.name != "zero"]
            specs = [s for s in offered if _cheaper(s, entry, own_macs)]
            if not specs:
                reason = f"no cheaper stand-in ({', '.join(s.name for s in offered) or 'only zero'} costs as much)"
        operators.append(
            Operator(
                path=path,
                kind=type(module).__name__,
                parent=path.rpartition(".")[0],
                calls=entry.calls,
                input_shapes=entry.input_shapes,
                output_shapes=entry.output_shapes,
                params=params,
                macs=own_macs,
                latency_share=shares.get(path),
                stand_ins=() if reason else tuple(specs),
                reason=reason,
                aliases=tuple(n for n in paths[id(module)] if n != path),
            )
        )
    return _drop_failing(model, call, operators, progress) if trial else operators
