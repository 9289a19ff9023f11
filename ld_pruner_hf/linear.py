"""First-order latent shifts of all operators at once, from backward passes along the original trajectory [ours].

Replacing an operator adds d = stand-in(x) - operator(x) to its output. To first order this moves the final latent by J d, and
r . (J d), for a random direction r, is the dot product of d with the gradient of r . latent at the operator's output: one
backward pass gives it for every operator and stand-in. Over random r, the mean of (r . (J d))^2 is || J d ||^2.

Autograd differentiates the pipeline's own arithmetic (guidance, scheduler), with the denoiser's outputs as its leaves. The
denoiser is differentiated call by call, from the last to the first, so that only one call's activations are in memory. The
moves that the single calls cause are taken to be independent, so their squares are added: measured, this ranks as well as
adding the moves, and needs far fewer directions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from .latents import Job, RecordedCall, patched, run_to_latents
from .plan import Operator, StandInSpec
from .profiling import run
from .replacements import StandIn
from .surgery import get_operator
from .trajectory import Moment, output_tensor

Todo = Sequence[tuple[Operator, StandInSpec]]


@dataclass(frozen=True)
class LinearRun:
    """What the backward passes along one pipeline call found.

    Attributes:
        squares: (rows, calls, B): by row of `todo`, denoiser call and latent, the squared length of the move of the final
            latent that replacing the operator in this call causes. NaN where it could not be had.
        moments: the denoiser's calls.
        gains: for each of them (B',): by how much a squared error of a row of its output grows on its way to the final latents.
        owners: for each of them (B', B): 1 where a row goes into a latent (guidance makes two rows a latent).
    """

    squares: torch.Tensor
    moments: list[Moment]
    gains: list[torch.Tensor]
    owners: list[torch.Tensor]


def linear_run(
    pipe: Any, model: nn.Module, job: Job, todo: Todo, probes: int, seed: int, steps: int | None = None
) -> LinearRun:
    """Denoise with the unmodified model, then go back along the trajectory. Run it inside `preserved(pipe)`.

    Args:
        todo: what is replaced by what. probes: how many random directions, drawn from `seed`.
        steps: scheduler steps in a run, after which it is stopped: what comes then may be nothing to differentiate.

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
    with _frozen(model), watcher.watching():
        for i in reversed(range(calls)):
            gradients = [graph.gradient(i, d, later[p]) for p, d in enumerate(directions)]
            gains[i] = torch.stack([g.float().flatten(1).square().mean(1) for g in gradients]).mean(0)
            inputs = graph.inputs(i)
            fresh = {id(t): t.detach().requires_grad_() for t in inputs}
            call = graph.calls[i].mapped(functools.partial(_renewed, fresh))
            watcher.batch = len(owners[i])
            with torch.enable_grad():
                output = output_tensor(run(model, call))
            for p, gradient in enumerate(gradients):
                watcher.products.clear()
                torch.autograd.backward(output, gradient, retain_graph=p + 1 < probes)
                for t in inputs:
                    leaf = fresh[id(t)]
                    if leaf.grad is not None:
                        later[p].append((t, leaf.grad))
                    leaf.grad = None
                for n, products in watcher.products.items():
                    squares[n, i] += (products.cpu() @ owners[i]).square() / probes
    squares[sorted(watcher.failed)] = float("nan")
    return LinearRun(squares, graph.moments(), gains, owners)


def _renewed(fresh: dict[int, torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    return fresh.get(id(tensor), tensor)


def _replaced(new: dict[int, torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    return new.get(id(tensor), tensor)


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
            f"{type(pipe).__name__} with {type(pipe.scheduler).__name__} cannot be differentiated; use effort='exact'"
        )
    graph.latents = latents
    return graph


# ---- the denoiser ----------------------------------------------------------------------------------------------------


class _Watcher:
    """Hooks on all operators: when a gradient arrives at an operator's output, its dot product with d is added up.

    Attributes:
        batch: rows in the call that is being differentiated. products: row of `todo` -> (batch,).
        failed: rows of `todo` whose operator has no batch dimension, or whose tensors were overwritten.
    """

    def __init__(self, model: nn.Module, todo: Todo) -> None:
        like = next(model.parameters())
        self.model, self.batch = model, 0
        self.products: dict[int, torch.Tensor] = {}
        self.failed: set[int] = set()
        self.stand_ins: dict[str, list[tuple[int, StandIn]]] = {}
        for n, (operator, spec) in enumerate(todo):
            stand_in = StandIn(spec).to(device=like.device, dtype=like.dtype).requires_grad_(False)
            self.stand_ins.setdefault(operator.path, []).append((n, stand_in))

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [
            get_operator(self.model, path).register_forward_hook(self._hook(path), with_kwargs=True)
            for path in self.stand_ins
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            if not torch.is_grad_enabled():
                return None
            if not isinstance(
                output, torch.Tensor
            ):  # one tensor may stand there twice: each place has its own gradient
                output = tree_map_only(torch.Tensor, lambda t: t.view_as(t), output)
            for n, stand_in in self.stand_ins[path]:
                with torch.no_grad():
                    cheap = tree_leaves(stand_in(*args, **kwargs))
                for new, old in zip(cheap, tree_leaves(output), strict=True):
                    if old is not None:
                        old.requires_grad_()  # what depends on text or time only has none so far
                        old.register_hook(self._add(n, new.detach(), old.detach()))
            return output

        return hook

    def _add(self, n: int, new: torch.Tensor, old: torch.Tensor) -> Callable[[torch.Tensor], None]:
        versions = new._version, old._version

        def hook(gradient: torch.Tensor) -> None:
            if len(gradient) % self.batch or versions != (new._version, old._version):
                self.failed.add(n)
                return
            g, a, b = (t.float().reshape(self.batch, -1) for t in (gradient, new, old))
            moved = (torch.linalg.vecdot(g, a) - torch.linalg.vecdot(g, b)).double()
            self.products[n] = self.products[n] + moved if n in self.products else moved

        return hook
