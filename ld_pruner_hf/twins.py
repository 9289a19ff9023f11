"""Rows of a score table that make the model do the same, so that one measurement is enough for them [ours].

A residual block that becomes an identity, and its last convolution that becomes zero, are one and the same function. Such pairs
are found by trial: wherever a run takes the module around, its stand-in and the module with the other stand-in in it must return
the same bits; and so must one step of the whole model.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .latents import patched
from .plan import Modification, Operator, StandInSpec
from .reuse import has_own_processor, same, versions
from .selection import ancestors
from .surgery import applied, get_operator, make_stand_in, paths_of, replace_modules

Key = tuple[str, str]
"""Path and name of the stand-in."""
_Pair = tuple[Modification, Modification]


def find_twins(
    model: nn.Module, todo: Sequence[tuple[Operator, StandInSpec]], run: Callable[[], Any], step: Callable[[], Any]
) -> dict[Key, Key]:
    """The rows of `todo` that need no measurement of their own -> the rows that do the same.

    Args:
        run: runs the model on what it is judged by, or on a part of that. step: a part of it, and returns what comes out.
    """
    search = _Search(model, todo)
    if not search.pairs:
        return {}
    with search.looking(), torch.no_grad():
        run()
    rows = {_key(row): row for row in (Modification(o.path, o.kind, spec) for o, spec in todo)}

    @functools.cache
    def outcome(key: Key) -> Any:
        try:
            with applied(model, [rows[key]]), torch.no_grad():
                return step()
        except Exception:  # such a row ends with its error when its turn comes
            return None

    twins = search.twins()
    return {key: other for key, other in twins.items() if _same_tensors(outcome(key), outcome(other))}


class _Search:
    """Pairs of rows, one of a module and one of the module around, that have not been seen to differ.

    Attributes:
        pairs: path of the module around -> pairs (row of the module inside, row of the module around).
        same: those of them that were seen to do the same, and something else than the unmodified module.
    """

    def __init__(self, model: nn.Module, todo: Sequence[tuple[Operator, StandInSpec]]) -> None:
        self.model = model
        shared = {path for paths in paths_of(model).values() if len(paths) > 1 for path in paths}
        rows: dict[str, list[Modification]] = {}
        for operator, spec in todo:
            if operator.path not in shared:
                rows.setdefault(operator.path, []).append(Modification(operator.path, operator.kind, spec))
        self.pairs: dict[str, list[_Pair]] = {}
        for path, inner in rows.items():
            for around in ancestors(path, rows)[-1:]:  # the innermost
                if not any(map(has_own_processor, get_operator(model, around).modules())):
                    self.pairs.setdefault(around, []).extend((a, b) for a in inner for b in rows[around])
        self.same: set[tuple[Key, Key]] = set()
        self._running: Counter[str] = Counter()
        self._comparing = False

    def twins(self) -> dict[Key, Key]:
        left = [(_key(a), _key(b)) for pairs in self.pairs.values() for a, b in pairs]
        found = {a: b for a, b in left if (a, b) in self.same}
        for key, other in found.items():  # the module around may have a twin in its turn
            while other in found:
                other = found[other]
            found[key] = other
        return found

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Inside, whatever the model does is compared."""
        with ExitStack() as stack:
            for around, pairs in self.pairs.items():
                module = get_operator(self.model, around)
                stack.enter_context(patched(module, "forward", functools.partial(self._compared, around)))
                for path in {a.path for a, _ in pairs}:
                    hook = functools.partial(self._called, around, path)
                    stack.callback(get_operator(self.model, path).register_forward_pre_hook(hook).remove)
            yield

    def _called(self, around: str, path: str, *_: Any) -> None:
        """What is also called from elsewhere has no twin in the module around."""
        if not self._comparing and not self._running[around]:
            self.pairs[around] = [(a, b) for a, b in self.pairs[around] if a.path != path]

    def _compared(self, around: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def compared(*args: Any, **kwargs: Any) -> Any:
            if self._comparing or not self.pairs[around]:
                return forward(*args, **kwargs)
            given = _lists_copied((args, kwargs))
            before = versions(given)
            self._running[around] += 1
            try:
                output = forward(*args, **kwargs)
            finally:
                self._running[around] -= 1
            if versions(given) != before:  # there is nothing left to run it on again
                self.pairs[around] = []
            self._comparing = True
            try:
                self.pairs[around] = self._still_equal(around, forward, given, output)
            finally:
                self._comparing = False
            return output

        return compared

    def _still_equal(self, around: str, forward: Callable[..., Any], given: Any, unmodified: Any) -> list[_Pair]:
        """The pairs of the module around that do the same with what it is given."""
        module, found = get_operator(self.model, around), dict[Key, Any]()

        def result(row: Modification) -> Any:
            if _key(row) not in found:
                try:
                    found[_key(row)] = self._modified(module, forward, row, given)
                except Exception:  # such a row ends with its error when its turn comes
                    found[_key(row)] = None
            return found[_key(row)]

        equal = []
        for a, b in self.pairs[around]:
            if _same_tensors(result(a), result(b)):
                equal.append((a, b))
                if not _same_tensors(result(b), unmodified):
                    self.same.add((_key(a), _key(b)))
        return equal

    def _modified(self, module: nn.Module, forward: Callable[..., Any], row: Modification, given: Any) -> Any:
        """What the module returns with one operator, itself or one inside, replaced."""
        args, kwargs = _lists_copied(given)
        operator = get_operator(self.model, row.path)
        stand_in = make_stand_in(self.model, operator, row)
        if operator is module:
            return stand_in(*args, **kwargs)
        replace_modules(module, [(operator, stand_in)])
        try:
            return forward(*args, **kwargs)
        finally:
            replace_modules(module, [(stand_in, operator)])


def _key(row: Modification) -> Key:
    return row.path, row.stand_in.name


def _lists_copied(given: Any) -> Any:
    """Arguments with lists and dicts of their own: some models empty theirs."""
    return tree_map(lambda value: value, given)


def _same_tensors(a: Any, b: Any) -> bool:
    one, other = ([t for t in tree_leaves(output) if t is not None] for output in (a, b))
    return 0 < len(one) == len(other) and all(map(same, one, other))
