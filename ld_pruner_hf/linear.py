"""First-order latent shifts of all operators at once, from backward passes along the original trajectory [ours].

Replacing an operator adds d = stand-in(x) - operator(x) to its output. To first order this moves the final latent by J d, and
r . (J d), for a random direction r, is the dot product of d with the gradient of r . latent at the operator's output: one
backward pass gives it for every operator and stand-in. Over random r, the mean of (r . (J d))^2 is || J d ||^2.

Autograd differentiates the pipeline's own arithmetic (guidance, scheduler), with the denoiser's outputs as its leaves. The
denoiser is differentiated call by call, from the last to the first. The moves that the single calls cause are taken to be
independent, so their squares are added: measured, this ranks as well as adding the moves. So every call and latent has a
random number of its own, and one direction is enough.

Little is kept for the backward pass: most modules run again when it reaches them (T. Chen et al., 2016), and only then with
their stand-ins; and no more rows of a batch go through at once than take the memory of the denoising run itself.

Most of what first order cannot see happens close by: a convolution before a norm can shrink without effect, until it is gone.
So for the sorts of operators where it matters, the module around the operator runs with the stand-in inside, and d is the
change of its output. That costs a small part of a denoiser call.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.checkpoint import checkpoint

from .latents import Job, RecordedCall, modules_of, patched, run_to_latents, scheduler_names
from .plan import Operator, StandInSpec
from .profiling import count_macs, frozen, peak_memory_of, run, weights_memory
from .replacements import StandIn
from .reuse import MEMORY_SHARE
from .surgery import get_operator
from .trajectory import Moment, evenly, output_tensor, part_of, rows_of

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
        gradients: for each of them (B', ...): of the final latents in a random direction, by its output.
        owners: for each of them (B', B): 1 where a row goes into a latent (guidance makes two rows a latent).
        row_memory: `backward_memory` of the model.
    """

    squares: torch.Tensor
    moments: list[Moment]
    around: dict[int, str]
    gradients: list[torch.Tensor]
    owners: list[torch.Tensor]
    row_memory: int


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
    seed: int,
    steps: int | None = None,
    around: LinearRun | float = 0.0,
    batch_size: int = 1,
) -> LinearRun:
    """Denoise with the unmodified model, then go back along the trajectory. Run it inside `preserved(pipe)`.

    Args:
        todo: what is replaced by what. seed: of the random direction.
        steps: scheduler steps in a run, after which it is stopped: what comes then may be nothing to differentiate.
        around: how many denoiser calls' worth of MACs may be spent, for each call, on running the modules around operators; or
            an earlier run that has chosen them.
        batch_size: the backward pass takes no more memory than the denoising of so many latents, if it can.

    Raises:
        ValueError: the pipeline's arithmetic cannot be differentiated.
    """
    with frozen(*modules_of(pipe).values()):
        graph = _differentiable_run(pipe, model, job, steps)
    direction = random_direction(graph.latents, seed)
    later: list[tuple[torch.Tensor, torch.Tensor]] = []
    calls = len(graph.calls)
    owners = [graph.owner(i) for i in range(calls)]
    gradients = [torch.zeros(0)] * calls
    squares = torch.zeros(len(todo), calls, len(graph.latents), dtype=torch.float64)
    watcher = _Watcher(model, todo)
    with frozen(model):
        if isinstance(around, LinearRun):
            chosen, row_memory = around.around, around.row_memory
        else:
            row_memory = backward_memory(model, graph.moments()[-1])
            chosen = (
                _where_first_order_fails(graph, watcher, todo, direction, around, not row_memory) if around else {}
            )
        denoising = graph.memory * batch_size / len(job.seeds)
        allowed = denoising + MEMORY_SHARE * (denoising + weights_memory([model]))
        at_once = max(1, int(allowed / row_memory)) if row_memory else max(map(len, graph.outputs))
        changes = [watcher.inside(n, chosen[n]) if n in chosen else watcher.own(n) for n in range(len(todo))]
        with watcher.watching(changes):
            for i in reversed(range(calls)):
                gradients[i] = graph.gradient(i, direction, later)
                products, inputs = watcher.backward(graph.calls[i], graph.inputs(i), gradients[i], at_once)
                later += inputs
                for n, product in products.items():
                    assert isinstance(n, int)
                    squares[n, i] = (product.cpu() @ owners[i]).square()
    squares[sorted(watcher.failed)] = float("nan")
    return LinearRun(squares, graph.moments(), chosen, gradients, owners, row_memory)


def random_direction(latents: torch.Tensor, seed: int) -> torch.Tensor:
    """Standard normal, in the shape of the latents.

    These are numpy's numbers: torch's from the same seed are the very noise that a latent starts from, and errors point along it.
    """
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(latents.shape)).to(latents)


def _where_first_order_fails(
    graph: _Graph, watcher: _Watcher, todo: Todo, direction: torch.Tensor, spend: float, whole: bool
) -> dict[int, str]:
    """Row -> the module around it, for sorts where samples show in the last call that first order is at fault.

    A few rows of the call are looked at; all of them if it must stay `whole`.
    """
    last = graph.moments()[-1]
    rows = evenly(range(len(last.output)), len(last.output) if whole else SAMPLED_ROWS)
    call = last.call if whole else rows_of(last, rows).call
    macs, _ = count_macs(watcher.model, last.call if whole else rows_of(last, rows[:1]).call)
    callers = {n: path for n, (o, _) in enumerate(todo) if (path := _around(watcher.model, o.path))}
    share = {n: macs.get(path, 0) / max(1, macs[""]) for n, path in callers.items()}
    sorts = [sort for every in sorts_of(todo) if (sort := [n for n in every if n in callers])]
    samples = [n for sort in sorts for n in evenly(sort, SAMPLES)]
    if not samples:
        return {}
    watched = [watcher.own(n) for n in samples] + [watcher.inside(n, callers[n], key=(n,)) for n in samples]
    with watcher.watching(watched):
        products = watcher.products(call, graph.gradient(len(graph.calls) - 1, direction)[rows])
    found = {key: product.square().sum().item() for key, product in products.items()}
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


# ---- the pipeline's own arithmetic -----------------------------------------------------------------------------------


@dataclass
class _Graph:
    """A run whose arithmetic outside the denoiser can be differentiated: `outputs` are leaves, `latents` the result.

    Attributes:
        memory: the most bytes that tensors took in a call of the denoiser, without its weights.
    """

    calls: list[RecordedCall] = field(default_factory=list)
    outputs: list[torch.Tensor] = field(default_factory=list)
    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    memory: int = 0

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
            outputs: list[Any] = []
            if not graph.calls:
                graph.memory = peak_memory_of(lambda: outputs.append(forward(*args, **kwargs)), [model])
                graph.memory -= weights_memory([model])
            else:
                with torch.no_grad():
                    outputs.append(forward(*args, **kwargs))
            (output,) = outputs
            sample = output_tensor(output)
            if sample is None:
                return output
            leaf = sample.detach().requires_grad_()
            graph.calls.append(RecordedCall(args, dict(kwargs)))
            graph.outputs.append(leaf)
            if isinstance(output, torch.Tensor):
                return leaf
            first = leaf if isinstance(output[0], torch.Tensor) else list(leaf)
            return type(output)(first) if isinstance(output, dict) else (first, *output[1:])

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
    """Watches modules: when a gradient arrives at a module's output, its dot product with the output's change is added up.

    Attributes:
        failed: keys of changes of which some module has no batch dimension, or whose tensors were overwritten.
    """

    def __init__(self, model: nn.Module, todo: Todo) -> None:
        like = next(model.parameters())
        self.model, self.todo = model, todo
        self.failed: set[Hashable] = set()
        self.segments = segments(model)
        made = {
            name: StandIn(spec).to(device=like.device, dtype=like.dtype).requires_grad_(False)
            for name, spec in {repr(spec): spec for _, spec in todo}.items()
        }
        self.stand_ins = [made[repr(spec)] for _, spec in todo]  # equal ones share their weights
        self._batch = 0
        self._products: dict[Hashable, torch.Tensor] = {}

    def own(self, n: int) -> tuple[Hashable, str, Change]:
        """The change of the operator's own output, with row n as its key."""
        return n, self.todo[n][0].path, lambda _, args, kwargs: self.stand_ins[n](*args, **kwargs)

    def inside(self, n: int, path: str, key: Hashable = None) -> tuple[Hashable, str, Change]:
        """The change of the output of the module at `path` with the stand-in in it."""
        operator, around = (get_operator(self.model, p) for p in (self.todo[n][0].path, path))
        places = [(m, name) for m in around.modules() for name, child in m._modules.items() if child is operator]

        def put(module: nn.Module) -> None:
            for parent, name in places:
                parent._modules[name] = module

        def change(module: nn.Module, args: Any, kwargs: Any) -> Any:
            put(self.stand_ins[n])
            try:
                return module(*args, **kwargs)
            finally:
                put(operator)

        return n if key is None else key, path, change

    @contextmanager
    def watching(self, changes: Sequence[tuple[Hashable, str, Change]]) -> Iterator[None]:
        """Inside, `products` and `backward` look at these."""
        by_path: dict[str, list[tuple[Hashable, Change]]] = {}
        for key, path, change in changes:
            by_path.setdefault(path, []).append((key, change))
        with ExitStack() as stack:
            for path, here in by_path.items():
                module = get_operator(self.model, path)
                stack.enter_context(patched(module, "forward", functools.partial(self._watched, module, here)))
            for module in self.segments:  # last, so that what is watched of them belongs to them
                stack.enter_context(patched(module, "forward", _recomputed))
            yield

    def backward(
        self, call: RecordedCall, inputs: Sequence[torch.Tensor], gradient: torch.Tensor, at_once: int
    ) -> tuple[dict[Hashable, torch.Tensor], list[tuple[torch.Tensor, torch.Tensor]]]:
        """`products` for all rows of the gradient, of which so many go through at once.

        Args:
            inputs: arguments whose gradients are wanted.

        Returns:
            key -> (B,), and the inputs with their gradients.
        """
        batch = len(gradient)
        found: dict[Hashable, torch.Tensor] = {}
        totals = [torch.zeros_like(t) for t in inputs]

        def go(rows: slice) -> None:
            leaves = {id(t): part_of(t, rows, batch).detach().requires_grad_() for t in inputs}
            part = call.mapped(lambda t: leaves[id(t)] if id(t) in leaves else part_of(t, rows, batch))
            for key, product in self.products(part, gradient[rows]).items():
                found.setdefault(key, product.new_zeros(batch))[rows] = product
            for t, total in zip(inputs, totals, strict=True):
                grad = leaves[id(t)].grad
                if grad is not None:
                    part_of(total, rows, batch).add_(grad)

        for first in range(0, batch, at_once):
            go(slice(first, first + at_once))
        return found, list(zip(inputs, totals, strict=True))

    def products(self, call: RecordedCall, gradient: torch.Tensor) -> dict[Hashable, torch.Tensor]:
        """One forward, one backward from the gradient (B, ...) of the output: key -> (B,). Leaves keep their gradients."""
        self._batch, self._products = len(gradient), {}
        with torch.enable_grad():
            output = output_tensor(run(self.model, call))
        torch.autograd.backward(output, gradient)
        return self._products

    def _watched(
        self, module: nn.Module, changes: Sequence[tuple[Hashable, Change]], forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        @functools.wraps(forward)
        def watched(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            if not torch.is_grad_enabled():
                return output
            if not isinstance(output, torch.Tensor):  # one may stand there twice: each place has its own gradient
                output = tree_map_only(torch.Tensor, lambda t: t.view_as(t), output)
            args, kwargs = tuple(map(_detached, args)), {name: _detached(a) for name, a in kwargs.items()}
            given = [t for t in _leaves([*args, *kwargs.values()]) if isinstance(t, torch.Tensor)]
            for place, old in enumerate(_leaves([output])):
                if old is not None:
                    old.requires_grad_()  # what depends on text or time only has none so far
                    old.register_hook(self._hook(module, changes, args, kwargs, given, place, old.detach()))
            return output

        return watched

    def _hook(
        self,
        module: nn.Module,
        changes: Sequence[tuple[Hashable, Change]],
        args: Any,
        kwargs: Any,
        given: Sequence[torch.Tensor],
        place: int,
        old: torch.Tensor,
    ) -> Callable[[torch.Tensor], None]:
        """For the output `old`, the one at that `place` among what the module returned for the `given` tensors."""
        versions = [t._version for t in (*given, old)]

        def hook(gradient: torch.Tensor) -> None:
            if len(gradient) % self._batch or versions != [t._version for t in (*given, old)]:
                self.failed.update(key for key, _ in changes)
                return
            g = gradient.float().reshape(self._batch, -1)
            unmoved = torch.linalg.vecdot(g, old.float().reshape(self._batch, -1))
            for key, change in changes:
                with torch.no_grad():
                    new = _leaves([change(module, args, kwargs)])[place]
                if new is None or new.shape != old.shape:  # in Kandinsky 6 a module is called with several shapes
                    self.failed.add(key)
                    continue
                moved = (torch.linalg.vecdot(g, new.float().reshape(self._batch, -1)) - unmoved).double()
                self._products[key] = self._products[key] + moved if key in self._products else moved

        return hook


def backward_memory(model: nn.Module, moment: Moment) -> int:
    """About how many bytes each row takes, without the weights: a forward and backward pass, and in it a module with a stand-in.

    Measured with one row. 0 where a call must stay whole: alone, the row fails (other arguments have several rows for it, one a
    frame) or gives another output than in the batch (attention goes across rows).
    """
    one = rows_of(moment, [0])
    outputs: list[torch.Tensor] = []
    try:
        forward = peak_memory_of(lambda: outputs.append(output_tensor(run(model, one.call))), [model])
    except Exception:
        return 0
    near = 1e-2 * one.output.abs().max().item()
    if outputs[0].shape != one.output.shape or not torch.allclose(outputs[0], one.output, rtol=0, atol=near):
        return 0
    # Not those of two dimensions: masks, of which models take sums of integers.
    call = one.call.mapped(lambda t: t.detach().requires_grad_() if t.is_floating_point() and t.ndim > 2 else t)
    watcher = _Watcher(model, [])
    with frozen(model), watcher.watching([]):
        peak = peak_memory_of(lambda: watcher.products(call, torch.ones_like(one.output)), [model])
    return peak + forward - 2 * weights_memory([model])


def segments(model: nn.Module) -> list[nn.Module]:
    """The modules that run again in the backward pass: the largest with no more leaves than the square root of the model's."""
    leaves: dict[nn.Module, int] = {}

    def count(module: nn.Module) -> int:
        leaves[module] = sum(map(count, module.children())) or 1
        return leaves[module]

    count(model)
    found: dict[nn.Module, None] = {}
    waiting = [model]
    while waiting:
        for child in waiting.pop().children():
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or leaves[child] ** 2 > leaves[model]:
                waiting.append(child)
            elif child._modules:
                found[child] = None
    return list(found)


def _with_gradient(value: Any) -> Any:
    """The same; a tensor that depends on nothing with a gradient, in Qwen-Image the embedded time, becomes a leaf."""
    if not isinstance(value, torch.Tensor) or value.requires_grad or not value.is_floating_point():
        return value
    return value.detach().requires_grad_()


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, that keeps its arguments alone for the backward pass, and runs again there."""

    @functools.wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves, inputs = tree_flatten((args, kwargs))
        if not any(map(_needs_grad, leaves)) or not all(map(_transparent, leaves)):
            return forward(*args, **kwargs)
        outputs: Any = None

        def flat(*leaves: Any) -> tuple[Any, ...]:
            nonlocal outputs
            args, kwargs = tree_unflatten(leaves, inputs)
            found, outputs = tree_flatten(forward(*args, **kwargs))
            if torch.is_grad_enabled():  # in the backward pass, where some output has to have a gradient
                found = [_with_gradient(x) for x in found]
            return tuple(found)

        found = checkpoint(flat, *leaves, use_reentrant=True, preserve_rng_state=False)
        return tree_unflatten(found, outputs) if all(map(_transparent, found)) else forward(*args, **kwargs)

    return recomputed


def _leaves(values: Sequence[Any]) -> list[Any]:
    """As `tree_leaves`, which is slow, for what is mostly tensors already."""
    return [leaf for v in values for leaf in ([v] if isinstance(v, torch.Tensor) else tree_leaves(v))]


def _detached(value: Any) -> Any:
    """Without what led to the tensors in it."""
    return (
        value.detach() if isinstance(value, torch.Tensor) else tree_map_only(torch.Tensor, torch.Tensor.detach, value)
    )


def _transparent(value: Any) -> bool:
    """Whether autograd sees the tensors in it."""
    return value is None or isinstance(value, (torch.Tensor, bool, int, float, str, torch.dtype, torch.device))
