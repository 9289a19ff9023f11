"""What every module of a model takes and gives in one real call, and which stand-in could do the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from .latents import RecordedCall
from .plan import OutputRule, StandInSpec, is_inside
from .profiling import run
from .replacements import StandIn, channel_dim

PASSES_ON = "passes its input on unchanged (nothing to remove)"


@dataclass(frozen=True)
class _Leaf:
    """One tensor of a module's arguments."""

    argument: str
    position: int
    index: tuple[int, ...]
    tensor: torch.Tensor


@dataclass
class Seen:
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
            try:
                self._follow(func, [self._key(a) for a in args if isinstance(a, torch.Tensor)], result)
            except NotImplementedError:  # inside torch.vmap, tensors have no storage
                pass
        return result

    def _follow(self, func: Any, keys: Sequence[int], result: Any) -> None:
        paths = {p for key in keys if key not in self.consumed for p in self.producers.get(key, ())}
        if func not in self._ADD:
            self.producers[self._key(result)] = paths
        elif len(keys) > 1:
            for path in paths:
                self.on_added(path)


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


def _stand_in_for(
    module: nn.Module, inputs: list[_Leaf], tensors: list[torch.Tensor], structure: Any
) -> StandInSpec | str:
    """The paper's stand-in for this call: identity where the shapes agree, else 1x1 convolution, pooling, upscaling or both."""
    leaves = [leaf for leaf in inputs if leaf.tensor.ndim]
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


def _zero_spec(
    module: nn.Module, inputs: list[_Leaf], tensors: list[torch.Tensor], structure: Any
) -> StandInSpec | None:
    """A stand-in that returns zeros, for an operator with one output."""
    if len(tensors) != 1:
        return None
    (tensor,) = tensors
    alike = [leaf for leaf in inputs if leaf.tensor.ndim == tensor.ndim]
    rule = _adapt(module, alike[0], tensor.shape) if alike else "none"
    return None if isinstance(rule, str) else StandInSpec((replace(rule, rule="zero"),), structure)


def watch_call(model: nn.Module, call: RecordedCall) -> dict[str, Seen]:
    """Run the model once with hooks everywhere; what every module took and gave."""
    seen: dict[str, Seen] = {name: Seen() for name, _ in model.named_modules() if name}
    modules = dict(model.named_modules())
    additions = _Additions(lambda path: setattr(seen[path], "is_added", True))
    zeros: dict[str, StandInSpec | None] = {}

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            entry = seen[path]
            with torch._C.DisableTorchFunction():
                inputs, found = _input_leaves(module, args, kwargs), _output_leaves(output)
                tensors, structure = ([], None) if isinstance(found, str) else found
                spec = found if isinstance(found, str) else _stand_in_for(module, inputs, tensors, structure)
                if not entry.calls:
                    entry.input_shapes = tuple(tuple(leaf.tensor.shape) for leaf in inputs)
                    entry.output_shapes = tuple(tuple(t.shape) for t in tensors)
                    zeros[path] = _zero_spec(module, inputs, tensors, structure)
                additions.ran(path, [leaf.tensor for leaf in inputs], tensors)
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
