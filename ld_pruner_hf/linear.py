"""First-order latent shifts of all operators at once, from backward passes along the original trajectory [ours].

Replacing an operator adds d = stand-in(x) - operator(x) to its output. To first order this moves the final latent by J d, and
r . (J d), for a random direction r, is the dot product of d with the gradient of r . latent at the operator's output: one
backward pass gives it for every operator and stand-in. Over random r, the mean of (r . (J d))^2 is || J d ||^2.

Autograd differentiates the pipeline's own arithmetic (guidance, scheduler), with the denoiser's outputs as its leaves. The
denoiser is differentiated call by call, from the last to the first, so that only one call's activations are in memory. The
moves that the single calls cause are taken to be independent, so their squares are added: measured, this ranks as well as
adding the moves, and needs far fewer directions.

Most of what first order cannot see happens close by: a convolution before a norm can shrink without effect, until it is gone.
So for the sorts of operators where it matters, the module around the operator runs with the stand-in inside, and d is the
change of its output. That costs a small part of a denoiser call.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .latents import Job, RecordedCall, patched, run_to_latents, scheduler_names
from .plan import Operator, StandInSpec
from .profiling import count_macs, run
from .replacements import StandIn
from .surgery import get_operator, replace_modules
from .trajectory import Moment, evenly, output_tensor, rows_of

Todo = Sequence[tuple[Operator, StandInSpec]]
Change = Callable[[nn.Module, Any, Any], Any]
"""What a module would return with a stand-in in it, from the module, its arguments and its keyword arguments."""

SAMPLES, SAMPLED_ROWS = 2, 2
"""How many operators of a sort, on how many rows of a batch, show whether first order is good enough for it."""
FAULT = 1.15
"""The least factor between first order and the real change of the module around that is worth running it."""


@dataclass(frozen=True)
class LinearRun:
    """What the backward passes along one pipeline call found.

    Attributes:
        squares: (rows, calls, B): by row of `todo`, denoiser call and latent, the squared length of the move of the final
            latent that replacing the operator in this call causes. NaN where it could not be had.
        moments: the denoiser's calls.
        around: row of `todo` -> the module whose real change was looked at instead of the operator's own.
        gains: for each of them (B',): by how much a squared error of a row of its output grows on its way to the final latents.
        owners: for each of them (B', B): 1 where a row goes into a latent (guidance makes two rows a latent).
    """

    squares: torch.Tensor
    moments: list[Moment]
    around: dict[int, str]
    gains: list[torch.Tensor]
    owners: list[torch.Tensor]


def sorts_of(todo: Todo) -> list[list[int]]:
    """Rows that first order treats alike: same class, same name in its block, same stand-in."""
    sorts: dict[tuple[str, str, str], list[int]] = {}
    for n, (operator, spec) in enumerate(todo):
        name = next((part for part in reversed(operator.path.split(".")) if not part.isdigit()), "")
        sorts.setdefault((operator.kind, name, spec.name), []).append(n)
    return list(sorts.values())


def linear_run(
    pipe: Any,
    model: nn.Module,
    job: Job,
    todo: Todo,
    probes: int,
    seed: int,
    steps: int | None = None,
    around: dict[int, str] | float = 0.0,
) -> LinearRun:
    """Denoise with the unmodified model, then go back along the trajectory. Run it inside `preserved(pipe)`.

    Args:
        todo: what is replaced by what. probes: how many random directions, drawn from `seed`.
        steps: scheduler steps in a run, after which it is stopped: what comes then may be nothing to differentiate.
        around: `LinearRun.around` of an earlier run; or how many denoiser calls' worth of MACs may be spent, for each call, on
            running the modules around operators: those are then chosen here.

    Raises:
        ValueError: the pipeline's arithmetic cannot be differentiated.
    """
    graph = _differentiable_run(pipe, model, job, steps)
    generator = torch.Generator().manual_seed(seed)
    directions = [torch.randn(graph.latents.shape, generator=generator).to(graph.latents) for _ in range(probes)]
    later: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in directions]
    calls = len(graph.calls)
    owners = [graph.owner(i) for i in range(calls)]
    gains = [torch.zeros(0)] * calls
    squares = torch.zeros(len(todo), calls, len(graph.latents), dtype=torch.float64)
    watcher = _Watcher(model, todo)
    with _frozen(model):
        if not isinstance(around, dict):
            around = _where_first_order_fails(graph, watcher, todo, directions, around) if around else {}
        with watcher.watching(
            [watcher.inside(n, around[n]) if n in around else watcher.own(n) for n in range(len(todo))]
        ):
            for i in reversed(range(calls)):
                gradients = [graph.gradient(i, d, later[p]) for p, d in enumerate(directions)]
                gains[i] = torch.stack([g.float().flatten(1).square().mean(1) for g in gradients]).mean(0)
                inputs = graph.inputs(i)
                fresh = {id(t): t.detach().requires_grad_() for t in inputs}
                call = graph.calls[i].mapped(functools.partial(_renewed, fresh))
                for p, products in enumerate(watcher.products(call, gradients)):
                    for t in inputs:
                        leaf = fresh[id(t)]
                        if leaf.grad is not None:
                            later[p].append((t, leaf.grad))
                        leaf.grad = None
                    for n, product in products.items():
                        assert isinstance(n, int)
                        squares[n, i] += (product.cpu() @ owners[i]).square() / probes
    squares[sorted(watcher.failed)] = float("nan")
    return LinearRun(squares, graph.moments(), around, gains, owners)


def _where_first_order_fails(
    graph: _Graph, watcher: _Watcher, todo: Todo, directions: Sequence[torch.Tensor], spend: float
) -> dict[int, str]:
    """Row -> the module around it, for sorts where samples show in the last call that first order is at fault."""
    last = graph.moments()[-1]
    rows = evenly(range(len(last.output)), SAMPLED_ROWS)
    call = rows_of(last, rows).call
    with torch.no_grad():
        macs, _ = count_macs(watcher.model, call)
    callers = {n: path for n, (o, _) in enumerate(todo) if (path := _around(watcher.model, o.path))}
    share = {n: macs.get(path, 0) / max(1, macs[""]) for n, path in callers.items()}
    sorts = [sort for every in sorts_of(todo) if (sort := [n for n in every if n in callers])]
    samples = [n for sort in sorts for n in evenly(sort, SAMPLES)]
    watched = [watcher.own(n) for n in samples] + [watcher.inside(n, callers[n], key=(n,)) for n in samples]
    gradients = [graph.gradient(len(graph.calls) - 1, d)[rows] for d in directions]
    found: dict[Hashable, float] = {}
    with watcher.watching(watched):
        for products in watcher.products(call, gradients):
            for key, product in products.items():
                found[key] = found.get(key, 0.0) + product.square().sum().item()
    watcher.failed.clear()

    def fault(sort: list[int]) -> float:
        """How far real changes are from first order: the mean over samples of | log ratio |."""
        ratios = [found.get((n,), 0.0) / found[n] for n in evenly(sort, SAMPLES) if found.get(n)]
        return sum(abs(math.log(r)) / 2 if r > 0 else 0.0 for r in ratios) / max(1, len(ratios))

    chosen: dict[int, str] = {}
    cost = [sum(share[n] for n in sort) for sort in sorts]
    for i in sorted(range(len(sorts)), key=lambda i: -fault(sorts[i]) * len(sorts[i]) / max(cost[i], 1e-9)):
        if fault(sorts[i]) > math.log(FAULT) and cost[i] <= spend:
            spend -= cost[i]
            chosen |= {n: callers[n] for n in sorts[i]}
    return chosen


def _around(model: nn.Module, path: str) -> str:
    """The module that the one at `path` belongs to; "" for the model itself."""
    path = path.rpartition(".")[0]
    while isinstance(get_operator(model, path), (nn.ModuleList, nn.ModuleDict)):
        path = path.rpartition(".")[0]
    return path


def _renewed(fresh: dict[int, torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    return fresh.get(id(tensor), tensor)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Inside, the weights need no gradients."""
    wanting = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in wanting:
            p.requires_grad_(False)
        yield
    finally:
        for p in wanting:
            p.requires_grad_(True)


# ---- the pipeline's own arithmetic -----------------------------------------------------------------------------------


@dataclass
class _Graph:
    """A run whose arithmetic outside the denoiser can be differentiated: `outputs` are leaves, `latents` the result."""

    calls: list[RecordedCall] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))

    def inputs(self, i: int) -> list[torch.Tensor]:
        """The arguments of call `i` that depend on earlier outputs."""
        found = {id(t): t for t in tree_leaves((self.calls[i].args, self.calls[i].kwargs)) if _needs_grad(t)}
        return list(found.values())

    def gradient(
        self, i: int, direction: torch.Tensor, later: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()
    ) -> torch.Tensor:
        """d (direction . latents) / d (output i); `later` are the inputs of later calls, with their gradients."""
        ends, starts = [self.latents, *(t for t, _ in later)], [direction, *(g for _, g in later)]
        (found,) = torch.autograd.grad(ends, self.outputs[i], starts, retain_graph=True, allow_unused=True)
        return torch.zeros_like(self.outputs[i]) if found is None else found

    def owner(self, i: int) -> torch.Tensor:
        """(B', B): 1 where a row of output `i` goes into a latent."""
        columns = []
        for b in range(len(self.latents)):
            one = torch.zeros_like(self.latents)
            one[b] = 1
            columns.append(self.gradient(i, one).flatten(1).abs().sum(1) > 0)
        return torch.stack(columns, dim=1).double().cpu()

    def moments(self) -> list[Moment]:
        calls = [call.mapped(torch.Tensor.detach) for call in self.calls]
        return [Moment(c, o.detach()) for c, o in zip(calls, self.outputs, strict=True)]


def _needs_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _differentiable_run(pipe: Any, model: nn.Module, job: Job, steps: int | None) -> _Graph:
    graph = _Graph()

    def recording(forward: Callable[..., Any]) -> Callable[..., Any]:
        def recorded(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                output = forward(*args, **kwargs)
            leaf = output_tensor(output).detach().requires_grad_()
            graph.calls.append(RecordedCall(args, dict(kwargs)))
            graph.outputs.append(leaf)
            if isinstance(output, torch.Tensor):
                return leaf
            return type(output)(leaf) if isinstance(output, dict) else (leaf, *output[1:])

        return recorded

    unwrapped = patched(type(pipe), "__call__", inspect.unwrap)  # without its torch.no_grad()
    with unwrapped, patched(model, "forward", recording), torch.enable_grad():
        latents = run_to_latents(pipe, job.call, job.seeds, steps)[0]
    if not latents.requires_grad:
        raise ValueError(
            f"{type(pipe).__name__} with {scheduler_names(pipe)} cannot be differentiated; use effort='exact'"
        )
    graph.latents = latents
    return graph


# ---- the denoiser ----------------------------------------------------------------------------------------------------


class _Watcher:
    """Hooks on modules: when a gradient arrives at a module's output, its dot product with the output's change is added up.

    Attributes:
        failed: keys of changes of which some module has no batch dimension, or whose tensors were overwritten.
    """

    def __init__(self, model: nn.Module, todo: Todo) -> None:
        like = next(model.parameters())
        self.model, self.todo = model, todo
        self.failed: set[Hashable] = set()
        self.stand_ins = [
            StandIn(spec).to(device=like.device, dtype=like.dtype).requires_grad_(False) for _, spec in todo
        ]
        self._batch = 0
        self._products: dict[Hashable, torch.Tensor] = {}

    def own(self, n: int) -> tuple[Hashable, str, Change]:
        """The change of the operator's own output, with row n as its key."""
        return n, self.todo[n][0].path, lambda _, args, kwargs: self.stand_ins[n](*args, **kwargs)

    def inside(self, n: int, path: str, key: Hashable = None) -> tuple[Hashable, str, Change]:
        """The change of the output of the module at `path` with the stand-in in it."""
        operator = get_operator(self.model, self.todo[n][0].path)

        def change(module: nn.Module, args: Any, kwargs: Any) -> Any:
            replace_modules(module, [(operator, self.stand_ins[n])])
            try:
                return module(*args, **kwargs)
            finally:
                replace_modules(module, [(self.stand_ins[n], operator)])

        return n if key is None else key, path, change

    @contextmanager
    def watching(self, changes: Sequence[tuple[Hashable, str, Change]]) -> Iterator[None]:
        """Inside, `products` looks at these."""
        by_path: dict[str, list[tuple[Hashable, Change]]] = {}
        for key, path, change in changes:
            by_path.setdefault(path, []).append((key, change))
        handles = [
            get_operator(self.model, path).register_forward_hook(self._hook(here), with_kwargs=True)
            for path, here in by_path.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def products(
        self, call: RecordedCall, gradients: Sequence[torch.Tensor]
    ) -> Iterator[dict[Hashable, torch.Tensor]]:
        """One forward, then a backward for each gradient (B, ...) of the output: key -> (B,). Leaves keep their gradients."""
        self._batch = len(gradients[0])
        with torch.enable_grad():
            output = output_tensor(run(self.model, call))
        for p, gradient in enumerate(gradients):
            self._products = {}
            torch.autograd.backward(output, gradient, retain_graph=p + 1 < len(gradients))
            yield self._products

    def _hook(self, changes: Sequence[tuple[Hashable, Change]]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            if not isinstance(
                output, torch.Tensor
            ):  # one tensor may stand there twice: each place has its own gradient
                output = tree_map_only(torch.Tensor, lambda t: t.view_as(t), output)
            for key, change in changes:
                with torch.no_grad():
                    changed = tree_leaves(change(module, args, kwargs))
                for new, old in zip(changed, tree_leaves(output), strict=True):
                    if old is not None:
                        old.requires_grad_()  # what depends on text or time only has none so far
                        old.register_hook(self._add(key, new.detach(), old.detach()))
            return output

        return hook

    def _add(self, key: Hashable, new: torch.Tensor, old: torch.Tensor) -> Callable[[torch.Tensor], None]:
        versions = new._version, old._version

        def hook(gradient: torch.Tensor) -> None:
            if len(gradient) % self._batch or versions != (new._version, old._version):
                self.failed.add(key)
                return
            g, a, b = (t.float().reshape(self._batch, -1) for t in (gradient, new, old))
            moved = (torch.linalg.vecdot(g, a) - torch.linalg.vecdot(g, b)).double()
            self._products[key] = self._products[key] + moved if key in self._products else moved

        return hook
