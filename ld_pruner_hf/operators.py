"""find_operators: what can be taken out of a denoiser, found by watching one real call. No list of class names decides."""

from __future__ import annotations

import fnmatch
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from .latents import RecordedCall, calling, find_denoiser, make_conditions, preserved, record_call, steps_argument
from .plan import Modification, Operator, OutputRule, StandInSpec, is_inside
from .profiling import count_macs, device_of, latency_shares, run, synchronize
from .replacements import StandIn, channel_dim, stand_in_cost
from .surgery import applied, count_params, paths_of, refuse_wrapped

STANDINS = ("all", "paper")
PASSES_ON = "passes its input on unchanged (nothing to remove)"


# ---- watching one call -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Leaf:
    """One tensor of a module's arguments."""

    argument: str
    position: int
    index: tuple[int, ...]
    tensor: torch.Tensor


@dataclass
class _Seen:
    """What the hooks saw of one module."""

    calls: int = 0
    input_shapes: tuple[tuple[int, ...], ...] = ()
    output_shapes: tuple[tuple[int, ...], ...] = ()
    specs: list[StandInSpec] = field(default_factory=list)
    reason: str | None = None
    is_added: bool = False


def _argument_names(module: nn.Module) -> list[str]:
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]


def _input_leaves(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[_Leaf]:
    """All floating-point tensors among the arguments, those of inner tuples behind the outer ones."""
    names = _argument_names(module)
    leaves: list[_Leaf] = []

    def walk(value: Any, name: str, position: int, index: tuple[int, ...]) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            leaves.append(_Leaf(name, position, index, value))
        elif isinstance(value, (tuple, list)):
            for i, v in enumerate(value):
                walk(v, name, position, (*index, i))

    for i, value in enumerate(args):
        walk(value, names[i] if i < len(names) else str(i), i, ())
    for name, value in kwargs.items():
        walk(value, name, names.index(name) if name in names else len(names), ())
    return sorted(leaves, key=lambda leaf: len(leaf.index))


def _output_leaves(output: Any) -> tuple[list[torch.Tensor], Any] | str:
    """(tensors, structure) of a module's output, or why no stand-in can return the like."""
    tensors: list[torch.Tensor] = []

    def walk(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
            return len(tensors) - 1
        if type(value) in (tuple, list):
            return [walk(v) for v in value]
        if value is None:
            return None
        raise TypeError(type(value).__name__)

    try:
        structure = walk(output)
    except TypeError as error:
        return f"returns a {error}, which a stand-in cannot rebuild"
    return (tensors, structure) if tensors else "returns no tensor"


class _Additions(TorchFunctionMode):
    """Notes which modules' outputs end up in an addition: there, zero is what removes the branch (METHODS, LD-Pruner 1)."""

    _ADD = frozenset(
        {torch.add, *(getattr(torch.Tensor, n) for n in ("add", "add_", "__add__", "__radd__", "__iadd__"))}
    )
    _SCALE = frozenset(
        {torch.mul, torch.div, *(getattr(torch.Tensor, n) for n in ("mul", "__mul__", "__rmul__", "__truediv__"))}
    )
    _MOVE = frozenset(
        {
            *(getattr(torch.Tensor, n) for n in ("contiguous", "reshape", "to", "flatten", "clone")),
            *(torch.permute, torch.reshape, torch.transpose),
        }
    )

    def __init__(self, on_added: Callable[[str], None]) -> None:
        super().__init__()
        self.on_added = on_added
        self.producers: dict[int, set[str]] = {}  # storage -> modules whose output it holds
        self.consumed: set[int] = set()  # storages that a module has read: a trunk, not the end of a branch
        # Weak references keep addresses unique: that of a freed tensor is not given to a new one.
        self.known: dict[int, StorageWeakRef] = {}

    def _key(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.known[storage._cdata] = StorageWeakRef(storage)
        return storage._cdata

    def ran(self, path: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        read, made = {self._key(t) for t in inputs}, {self._key(t) for t in outputs}
        self.consumed |= read - made
        for key in made:  # a storage that the module only hands on keeps its earlier producers
            earlier = {p for p in self.producers.get(key, ()) if key in read or is_inside(p, path)}
            if not earlier:
                self.consumed.discard(key)
            self.producers[key] = earlier | {path}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self._ADD or func in self._SCALE or func in self._MOVE:
            keys = [self._key(a) for a in args if isinstance(a, torch.Tensor)]
            paths = {p for key in keys if key not in self.consumed for p in self.producers.get(key, ())}
            if func not in self._ADD:
                self.producers[self._key(result)] = paths
            elif len(keys) > 1:
                for path in paths:
                    self.on_added(path)
        return result


def _closest(leaves: list[_Leaf], output: torch.Tensor) -> _Leaf:
    """Of several inputs shaped like the output, the one that it resembles most (cosine); the first on `meta`."""
    if len(leaves) == 1 or output.is_meta:
        return leaves[0]
    flat = output.detach().flatten().float()
    return max(
        leaves,
        key=lambda leaf: abs(torch.cosine_similarity(leaf.tensor.detach().flatten().float(), flat, dim=0).item()),
    )


def _adapt(module: nn.Module, source: _Leaf, shape: Sequence[int]) -> OutputRule | str:
    """The rule that turns the source's shape into `shape`, or why there is none."""
    have = source.tensor.shape
    if len(have) != len(shape) or not shape or have[0] != shape[0]:
        return f"output {tuple(shape)} has other dimensions than its input {tuple(have)}"
    dim = channel_dim(module, len(shape))
    factors: list[int] = []
    if dim == 1:
        for a, b in zip(have[2:], shape[2:], strict=True):
            factor = max(1, round(b / a)) if b >= a else -max(1, round(a / b))
            if factor < 0 and -(-a // -factor) != b:
                return f"size {a} -> {b} is no pooling by a whole number"
            factors.append(1 if factor == -1 else factor)
        if len(factors) > 3:
            return f"output {tuple(shape)} has more than three sizes behind its channels"
    elif any(a != b for a, b in zip(have[1:-1], shape[1:-1], strict=True)):
        return f"tokens {tuple(have)} -> {tuple(shape)} change in number"
    if any(f < 0 for f in factors) and any(f > 1 for f in factors):
        return f"sizes {tuple(have)} -> {tuple(shape)} grow and shrink at once"
    return OutputRule(
        source.argument, source.position, "adapt", source.index, dim, have[dim], shape[dim],
        tuple(factors) if any(f != 1 for f in factors) else (),
    )  # fmt: skip


def _stand_in_for(module: nn.Module, args: Any, kwargs: Any, output: Any) -> StandInSpec | str:
    """The paper's stand-in for this call: identity where the shapes agree, else 1x1 convolution, pooling, upscaling or both."""
    leaves = [leaf for leaf in _input_leaves(module, args, kwargs) if leaf.tensor.ndim]
    found = _output_leaves(output)
    if isinstance(found, str):
        return found
    tensors, structure = found
    if not leaves:
        return "takes no floating-point tensor"
    if not any(True for _ in module.parameters()) and any(t is leaf.tensor for t in tensors for leaf in leaves):
        return PASSES_ON
    rules: list[OutputRule] = []
    for t in tensors:
        same = [leaf for leaf in leaves if leaf.tensor.shape == t.shape]
        if same:
            source = _closest(same, t)
            rules.append(OutputRule(source.argument, source.position, "identity", source.index))
            continue
        alike = [leaf for leaf in leaves if leaf.tensor.ndim == t.ndim]
        rule = (
            _adapt(module, alike[0], t.shape)
            if alike
            else f"no input has {t.ndim} dimensions, as output {tuple(t.shape)} has"
        )
        if isinstance(rule, str):
            return rule
        rules.append(rule)
    return StandInSpec(tuple(rules), structure)


def _zero_spec(module: nn.Module, args: Any, kwargs: Any, output: Any) -> StandInSpec | None:
    """A stand-in that returns zeros, for an operator with one output."""
    found = _output_leaves(output)
    if isinstance(found, str) or len(found[0]) != 1:
        return None
    (tensor,), structure = found
    alike = [leaf for leaf in _input_leaves(module, args, kwargs) if leaf.tensor.ndim == tensor.ndim]
    rule = _adapt(module, alike[0], tensor.shape) if alike else "none"
    return None if isinstance(rule, str) else StandInSpec((replace(rule, rule="zero"),), structure)


def _watch(model: nn.Module, call: RecordedCall) -> dict[str, _Seen]:
    """Run the model once with hooks everywhere; what every module took and gave."""
    seen: dict[str, _Seen] = {name: _Seen() for name, _ in model.named_modules() if name}
    modules = dict(model.named_modules())
    additions = _Additions(lambda path: setattr(seen[path], "is_added", True))
    zeros: dict[str, StandInSpec | None] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entry = seen[path]
            with torch._C.DisableTorchFunction():
                spec = _stand_in_for(module, args, kwargs, output)
                if not entry.calls:
                    entry.input_shapes = tuple(tuple(x.tensor.shape) for x in _input_leaves(module, args, kwargs))
                    found = _output_leaves(output)
                    entry.output_shapes = () if isinstance(found, str) else tuple(tuple(t.shape) for t in found[0])
                    zeros[path] = _zero_spec(module, args, kwargs, output)
                found = _output_leaves(output)
                inputs = [leaf.tensor for leaf in _input_leaves(module, args, kwargs)]
                additions.ran(path, inputs, [] if isinstance(found, str) else found[0])
            entry.calls += 1
            if isinstance(spec, str):
                entry.reason = entry.reason or spec
            elif entry.specs and spec != entry.specs[0]:
                entry.reason = entry.reason or "called several times with different shapes"
            else:
                entry.specs = [spec]

        return hook

    inside_stand_in = {
        f"{n}.{m}" for n, s in modules.items() if isinstance(s, StandIn) for m, _ in s.named_modules() if m
    }
    for path in list(seen):
        if path in inside_stand_in or isinstance(modules[path], StandIn):
            del seen[path]
    handles = [modules[path].register_forward_hook(watch(path), with_kwargs=True) for path in seen]
    try:
        with torch.no_grad(), additions:
            run(model, call)
    finally:
        for handle in handles:
            handle.remove()
    for path, entry in seen.items():
        if not entry.calls:
            entry.reason = "did not run in the observed call"
        elif entry.is_added and entry.reason != PASSES_ON and (zero := zeros.get(path)) is not None:
            entry.specs.append(zero)
    return seen


# ---- from what was seen to operators ---------------------------------------------------------------------------------


def _cheaper(spec: StandInSpec, seen: _Seen, macs: int) -> bool:
    """Does the stand-in save something? One that only passes tensors on does; a computing one must need fewer MACs."""
    _, stand_in_macs = stand_in_cost(spec, seen.output_shapes)
    if all(rule.rule != "adapt" for rule in spec.rules):
        return True
    return stand_in_macs * seen.calls < macs


def _on_meta(model: nn.Module, call: RecordedCall) -> Callable[[], Any]:
    """A function that runs the model, as it then is, on the `meta` device: shapes only."""

    def to_meta(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.to("meta")
        if isinstance(value, (tuple, list)):
            return type(value)(to_meta(v) for v in value)
        return {k: to_meta(v) for k, v in value.items()} if isinstance(value, dict) else value

    args, kwargs = to_meta(call.args), to_meta(call.kwargs)
    own = {id(t): t.detach().to("meta") for t in (*model.parameters(), *model.buffers())}

    def go() -> Any:
        named = (*model.named_parameters(), *model.named_buffers())
        tensors = {n: own[id(t)] if id(t) in own else t.detach().to("meta") for n, t in named}
        with calling(model, call.method):
            return torch.func.functional_call(model, tensors, args, kwargs)

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

    meta = _on_meta(model, call)
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
        ValueError: unknown component, kind, argument, or a pattern that matches nothing.

    Example:
        >>> operators = find_operators(pipe)
        >>> [o.path for o in operators if o.kind == "Attention" and o.is_candidate][:1]
        ['down_blocks.0.attentions.0.transformer_blocks.0.attn1']
    """
    if standins not in STANDINS:
        raise ValueError(f"standins: got {standins!r}, expected one of {STANDINS}")
    if isinstance(pipe_or_model, nn.Module):
        model = pipe_or_model
        refuse_wrapped(model)
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
        refuse_wrapped(model)
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
    seen = _watch(model, call)
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
