"""What a modification cannot change is not computed again: outputs of the first denoising step are kept and given back [ours].

In the first step the denoiser is called with the same arguments whatever is modified. Until the modified operator begins, it
does what the unmodified model did: a module that had ended by then can return its old output. The results are the same bits.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves

from .latents import patched
from .plan import is_inside
from .profiling import device_of, peak_memory_of, synchronize

MEMORY_SHARE = 0.12
"""Scoring takes up to this share more memory than denoising: outputs are kept up to it."""


@dataclass
class Span:
    """One run of a module inside a call of the model.

    Attributes:
        path, parent: of the module, and of the one that called it ("" is the model). start, end: when, in events of the call.
        seconds: how long it took. size: bytes of its outputs.
    """

    path: str
    parent: str
    start: int
    end: int = 0
    seconds: float = 0.0
    size: int = 0


@dataclass
class _Kept:
    """A call of the unmodified model: its arguments, and outputs of modules with the versions that their tensors had."""

    arguments: tuple[list[Any], Any]
    outputs: dict[str, tuple[Any, tuple[int, ...]]] = field(default_factory=dict)

    def has(self, path: str) -> bool:
        """Whether the output is there and nothing has written into it since."""
        return path in self.outputs and versions(self.outputs[path][0]) == self.outputs[path][1]


class FirstStep:
    """Outputs of the unmodified model's modules in the calls that no modification of it can reach.

    Args:
        runs: each makes such calls of the model, and always the same; one for each batch that is scored.
        operators: paths of what will be replaced, once for each stand-in.
    """

    def __init__(self, model: nn.Module, runs: Sequence[Callable[[], Any]], operators: Iterable[str]) -> None:
        self.model, self.calls = model, list[_Kept]()
        budget = MEMORY_SHARE * peak_memory_of(runs[0], [model])
        self.spans = trace(model, runs[0])
        own = [path for path, module in model.named_modules() if has_own_processor(module)]
        keep = _worth_keeping(self.spans, Counter(operators), budget / len(runs), own)
        if keep:
            for run in runs:
                self._record(run, keep)

    def _record(self, run: Callable[[], Any], keep: set[str]) -> None:
        inside = False  # a ControlNet may share modules with the model, and run them by itself

        def begin(_: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal inside
            inside = True
            leaves, structure = tree_flatten((args, kwargs))
            copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in leaves]
            self.calls.append(_Kept((copies, structure)))

        def end(*_: Any) -> None:
            nonlocal inside
            inside = False

        def hold(path: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: Any, output: Any) -> None:
                if inside:
                    self.calls[-1].outputs[path] = output, versions(output)

            return hook

        handles = [
            self.model.register_forward_pre_hook(begin, with_kwargs=True),
            self.model.register_forward_hook(end),
        ]
        handles += [self.model.get_submodule(path).register_forward_hook(hold(path)) for path in keep]
        try:
            run()
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def reused(self, operators: Sequence[str]) -> Iterator[None]:
        """Inside, with these replaced, calls with the old arguments do not compute again what is kept from before them."""
        paths = ended_before(self.spans, operators)
        current: _Kept | None = None

        def find(_: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal current
            current = None
            if torch.is_grad_enabled():  # guidance by gradients needs the graph of this call
                return
            arguments = tree_flatten((args, kwargs))
            current = next((kept for kept in self.calls if _equal(kept.arguments, arguments)), None)

        def end(*_: Any) -> None:
            nonlocal current
            current = None

        def returning(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(forward)
            def returned(*args: Any, **kwargs: Any) -> Any:
                if current is not None and current.has(path):
                    return current.outputs[path][0]
                return forward(*args, **kwargs)

            return returned

        if not self.calls:
            yield
            return
        kept = [path for path in paths if path in self.calls[0].outputs]
        handles = [self.model.register_forward_pre_hook(find, with_kwargs=True), self.model.register_forward_hook(end)]
        with ExitStack() as stack:
            for handle in handles:
                stack.callback(handle.remove)
            for path in kept:
                module = self.model.get_submodule(path)
                stack.enter_context(patched(module, "forward", functools.partial(returning, path)))
            yield


def trace(model: nn.Module, run: Callable[[], Any]) -> dict[str, Span]:
    """The modules that ran once in the first call of the model that `run()` makes, by path, in the order of their start."""
    spans: dict[str, Span] = {}
    running: list[Span] = []
    runs: Counter[str] = Counter()
    calls = events = 0
    device = device_of(model)

    def before(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            nonlocal calls, events
            calls += not path
            events += 1
            runs[path] += calls == 1
            synchronize(device)
            span = Span(path, running[-1].path if running else "", events, seconds=-time.perf_counter())
            running.append(span)
            if calls == 1:
                spans.setdefault(path, span)

        return hook

    def after(_: nn.Module, args: Any, output: Any) -> None:
        nonlocal events
        events += 1
        synchronize(device)
        span = running.pop()
        span.end, span.seconds = events, span.seconds + time.perf_counter()
        span.size = sum(t.nbytes for t in tree_leaves(output) if isinstance(t, torch.Tensor))

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(path)))
        handles.append(module.register_forward_hook(after))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    # What runs more than once counts as running from its first start on, and gives nothing back.
    return {path: span for path, span in spans.items() if runs[path] == 1 or not path} | {
        path: Span(path, span.parent, span.start, 1 << 60) for path, span in spans.items() if path and runs[path] > 1
    }


def ended_before(spans: dict[str, Span], operators: Sequence[str]) -> list[str]:
    """The largest modules that ended before the first of the operators began, none inside another."""
    if any(operator not in spans for operator in operators):
        return []
    first = min((spans[operator] for operator in operators), key=lambda span: span.start)
    around, path, start = {""}, first.path, first.start
    while path:
        path = spans[path].parent
        around.add(path)
    return [s.path for s in spans.values() if s.path and s.parent in around and s.end < start]


def has_own_processor(module: nn.Module) -> bool:
    """Has the pipeline given this attention a processor of its own? It may be there for what it notes, as in pix2pix-zero."""
    processor = getattr(module, "processor", None)
    return processor is not None and ".pipelines." in type(processor).__module__


def _worth_keeping(
    spans: dict[str, Span], operators: Counter[str], budget: float, never: Sequence[str] = ()
) -> set[str]:
    """The modules whose outputs save the most time for their bytes, as many as the budget allows; none with one of `never` inside."""
    saved: Counter[str] = Counter()
    for operator, times in operators.items():
        for path in ended_before(spans, [operator]):
            if not any(path == p or is_inside(p, path) for p in never):
                saved[path] += times
    worth = {path: times * spans[path].seconds / max(1, spans[path].size) for path, times in saved.items()}
    chosen = set()
    for path in sorted(worth, key=lambda p: -worth[p]):
        if spans[path].size <= budget:
            budget -= spans[path].size
            chosen.add(path)
    return chosen


def versions(output: Any) -> tuple[int, ...]:
    """How often each tensor in it has been written into."""
    return tuple(t._version for t in tree_leaves(output) if isinstance(t, torch.Tensor))


def _equal(a: tuple[list[Any], Any], b: tuple[list[Any], Any]) -> bool:
    return a[1] == b[1] and len(a[0]) == len(b[0]) and all(map(same, a[0], b[0]))


def same(a: Any, b: Any) -> bool:
    """Equal tensors, bit for bit, on one device; of other objects the same one, or equal numbers or strings."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return a is b or (type(a) is type(b) and isinstance(a, (bool, int, float, str)) and a == b)
