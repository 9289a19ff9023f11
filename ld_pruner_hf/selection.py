"""Which operators to take: from scores to a set that does not overlap. No torch."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Container, Iterable, Sequence

import numpy as np

from .plan import is_inside
from .scores import OperatorScore, OperatorScores, additive

SAVINGS: dict[str, Callable[[OperatorScore], float]] = {
    "params": lambda row: row.params_removed,
    "macs": lambda row: row.macs_removed,
    "latency": lambda row: row.latency_share or 0.0,
    "memory": lambda row: row.params_removed,
}
"""unit -> what replacing the operator saves: parameters, MACs per sample and call, a share (0 to 1) of the call's time, or
memory, counted in parameters.

Not known before it is measured, and left out: the time of the stand-in itself, and what goes from the peak of the activations."""


def innermost(paths: list[str]) -> list[str]:
    """Paths with no other path inside them: as many operators as can be modified together."""
    around = {path[:i] for path in paths for i, letter in enumerate(path) if letter == "."}
    return [path for path in paths if path not in around]


def check_k(k: object, limit: int | None = None) -> None:
    """Raise ValueError if k is no whole number, not positive, or more than the `limit` that can be modified together."""
    upto = "or more" if limit is None else f"to {limit}"
    if isinstance(k, bool) or not isinstance(k, int):
        raise ValueError(f"k: got {k!r}, expected a whole number of operators, 1 {upto}")
    if k < 1 or (limit is not None and k > limit):
        many = "" if limit is None else f"; the candidates that do not lie inside each other are {limit}"
        raise ValueError(f"k: got {k}, expected 1 {upto}{many}")


def top_k(
    scores: OperatorScores, k: int, criterion: str | None = None, reachable: int | None = None
) -> list[OperatorScore]:
    """The k least important operators (LD-Pruner, section 2.4), none inside another.

    Operators compete up to the lowest score under which k of them do not nest, so none is taken while k less important ones
    are there. Among them the lowest scores go first. Taking a block makes those already taken inside it moot: they leave and
    only the block counts. A block is passed over if k could then no longer be reached.

    Args:
        criterion: formula; default: the one of the scores.
        reachable: pass over a block, too, if fewer than so many operators could then be taken out in all, later ones included.

    Returns:
        Exactly k rows, in the order of the model's modules.

    Raises:
        ValueError: k is not between 1 and the number of operators that can be modified together.
    """
    ranked = [row for row in scores.ranked(criterion) if row.error is None]
    everything = set(innermost([row.path for row in ranked]))
    check_k(k, len(everything))
    rows = ranked[: competing([row.path for row in ranked], k)]
    # How many can still be modified together, given what is chosen, and how many must be: here, and in all.
    limits = [(set(innermost([row.path for row in rows])), k), (everything, reachable or k)]
    reach = [len(leaves) for leaves, _ in limits]
    chosen: dict[str, OperatorScore] = {}
    for row in ranked:
        if len(chosen) == k:
            break
        if any(is_inside(row.path, path) for path in chosen):
            continue
        moot = [path for path in chosen if is_inside(path, row.path)]
        left = [
            n - _lost(leaves, row.path) + sum(_lost(leaves, path) for path in moot)
            for n, (leaves, _) in zip(reach, limits, strict=True)
        ]
        if any(n < needed for n, (_, needed) in zip(left, limits, strict=True)):
            continue
        reach = left
        chosen = {path: r for path, r in chosen.items() if path not in moot} | {row.path: row}
    order = {row.path: i for i, row in enumerate(scores.rows)}
    return sorted(chosen.values(), key=lambda row: order[row.path])


def competing(ranked: Sequence[str], k: int) -> int:
    """How long the shortest head of a ranking is in which k operators do not lie inside each other: these compete for k places."""
    free: set[str] = set()  # those with none of the head inside them
    for n, path in enumerate(ranked, 1):
        free = {other for other in free if not is_inside(path, other)}
        if not any(is_inside(other, path) for other in ranked[:n]):
            free.add(path)
        if len(free) == k:
            return n
    return len(ranked)


def _lost(leaves: set[str], path: str) -> int:
    """How many fewer operators can be modified together once the one at `path` is."""
    return max(0, sum(is_inside(leaf, path) for leaf in leaves) - 1)


def agreement(scores: OperatorScores, choose: Callable[[OperatorScores], Iterable[OperatorScore]]) -> float | None:
    """How sure a choice is: the share of its operators that both halves of the conditions choose, each by itself.

    Args:
        choose: `functools.partial(top_k, k=42)`, say.

    Returns:
        0 to 1; the choice by all conditions is likely to be surer. None where there are no halves (`OperatorScores.halves`).
    """
    halves = scores.halves()
    if halves is None:
        return None
    a, b = ({row.path for row in choose(half)} for half in halves)
    return len(a & b) / max(len(a), len(b))


# ---- budgets ---------------------------------------------------------------------------------------------------------


def _usable(
    scores: OperatorScores, unit: str, criterion: str | None
) -> tuple[list[OperatorScore], list[float], list[float]]:
    """(rows, savings, damages that add up) of the rows that save something; several rows of one path are its stand-ins."""
    if unit not in SAVINGS:
        raise ValueError(f"budget: got unit {unit!r}, expected one of {list(SAVINGS)}")
    if unit == "latency" and all(row.latency_share is None for row in scores):
        raise ValueError(
            "budget: the scores hold no latency (they were made on `meta`); score on a real device, or use macs"
        )
    criterion = criterion or scores.criterion
    rows = [r for r in scores if r.error is None and SAVINGS[unit](r) > 0 and math.isfinite(r.score(criterion))]
    return rows, [SAVINGS[unit](r) for r in rows], [additive(criterion, r.score(criterion)) for r in rows]


def ancestors(path: str, among: Container[str]) -> list[str]:
    """Those of `among` that enclose `path`, outermost first."""
    parts = path.split(".")
    return [p for p in (".".join(parts[:i]) for i in range(1, len(parts))) if p in among]


def _largest(rows: Sequence[OperatorScore], savings: Sequence[float], fixed: Iterable[int] = ()) -> float:
    """The largest saving of rows that do not nest; nothing is taken inside the rows `fixed`, but a block may replace them."""
    own: dict[str, float] = {}
    for row, saving in zip(rows, savings, strict=True):
        own[row.path] = max(own.get(row.path, 0.0), saving)
    held = {rows[i].path: savings[i] for i in fixed}
    inside = dict.fromkeys(own, 0.0)
    total = 0.0
    for path in sorted(own, key=lambda p: -p.count(".")):  # innermost first
        best = held[path] if path in held else max(own[path], inside[path])
        parents = ancestors(path, own)
        if parents:
            inside[parents[-1]] += best
        else:
            total += best
    return total


def largest_saving(scores: OperatorScores, unit: str) -> float:
    """The most that can be saved by replacing operators that do not lie inside each other; in units of `SAVINGS`."""
    rows, savings, _ = _usable(scores, unit, None)
    return _largest(rows, savings)


def _check_target(unit: str, target: float, largest: float) -> None:
    if isinstance(target, bool) or not isinstance(target, (int, float)) or not math.isfinite(target) or target <= 0:
        raise ValueError(f"budget: got {target!r} {unit} to save, expected a positive number")
    if target > largest:
        raise ValueError(
            f"budget: {_amount(unit, target)} cannot be saved; the largest reachable saving is {_amount(unit, largest)} "
            "(all scored operators that do not nest). Ask for less, or score more operators"
        )


def _amount(unit: str, value: float) -> str:
    if unit == "latency":
        return f"{100 * value:.2f}% of the latency"
    return f"{value:,.0f} {'parameters to save memory' if unit == 'memory' else unit}"


def _in_order(scores: OperatorScores, chosen: Iterable[OperatorScore]) -> list[OperatorScore]:
    order = {row.key: i for i, row in enumerate(scores.rows)}
    return sorted(chosen, key=lambda row: order[row.key])


def knapsack(scores: OperatorScores, unit: str, target: float, criterion: str | None = None) -> list[OperatorScore]:
    """The operators and stand-ins of least total damage that together save at least `target`; none inside another.

    A 0-1 knapsack (LAPTOP-Diff, section 3.2) with several stand-ins per operator and nested operators, solved exactly as
    an integer programme. The total is what `scores.combined` predicts: the sum of the scores, or of their squares where the
    criterion is a distance.

    Args:
        unit: "params", "macs" or "latency". target: what to save: parameters, MACs per sample and call, or a share of the time.
        criterion: formula; default: the one of the scores.

    Returns:
        Rows in the order of the model's modules.

    Raises:
        ValueError: unknown unit, or a target that cannot be reached (the message says what can).
        ImportError: scipy is not installed.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
    except ImportError as error:
        raise ImportError(
            "method 'knapsack' needs scipy: pip install 'ld_pruner_hf[select]', or use method='ratio'"
        ) from error
    rows, savings, damages = _usable(scores, unit, criterion)
    _check_target(unit, target, _largest(rows, savings))
    at: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        at.setdefault(row.path, []).append(i)
    innermost_paths = [p for p in at if not any(is_inside(q, p) for q in at)]
    chains = np.zeros((len(innermost_paths), len(rows)))  # along each line of nested operators at most one is taken
    for line, path in enumerate(innermost_paths):
        for p in (path, *ancestors(path, at)):
            chains[line, at[p]] = 1
    greedy = ratio(scores, unit, target, criterion)
    damage_of = dict(zip((row.key for row in rows), damages, strict=True))
    limit = math.fsum(damage_of[row.key] for row in greedy)  # what does more damage by itself is in no best set
    # Scaled so that the solver's absolute tolerances mean nothing: damage to 1e6, saving to 1.
    cost = np.minimum(damages, limit) * (1e6 / max(limit, 1e-300))
    weights = np.array(savings) / target
    margin = 0.0
    while margin < 1e-3:
        result = milp(
            cost, integrality=np.ones(len(rows)), bounds=Bounds(0, np.array(damages) <= limit), options={"mip_rel_gap": 0},
            constraints=[LinearConstraint(weights, 1 + margin, np.inf), LinearConstraint(chains, -np.inf, 1)],
        )  # fmt: skip
        if result.x is None:
            break
        chosen = [i for i, x in enumerate(result.x) if x > 0.5]
        if math.fsum(savings[i] for i in chosen) >= target:
            return _in_order(scores, [rows[i] for i in chosen])
        margin = max(2 * margin, 1e-6)  # the solver took a hair less than the target for enough
    return greedy  # the target is so close to the largest saving that only exact arithmetic reaches it


def ratio(
    scores: OperatorScores,
    unit: str,
    target: float,
    criterion: str | None = None,
    start: Sequence[OperatorScore] = (),
    damage: float = 0.0,
) -> list[OperatorScore]:
    """Operators and stand-ins taken one by one by least damage per unit saved, until `target` is saved; needs no solver.

    Taking a block makes those already taken inside it moot; its score and saving then count less theirs. What is not needed
    in the end is given back, highest score first. Other arguments, result and ValueError as for `knapsack`.

    Args:
        start: rows that are taken already, given which `scores` were measured (`score(given=...)`); they count for `target` and
            come first in the result, unless a block around them is taken.
        damage: what `start` does together, in units of the score; a row counts by how much it does above that.
    """
    rows, savings, damages = _usable(scores, unit, criterion)
    done = additive(criterion or scores.criterion, damage)
    rows, damages = [*rows, *start], [*(d - done for d in damages), *(0.0 for _ in start)]
    savings += [SAVINGS[unit](row) for row in start]
    _check_target(unit, target, _largest(rows, savings))
    inside: dict[str, set[str]] = {row.path: set() for row in rows}
    for path in inside:
        for p in ancestors(path, inside):
            inside[p].add(path)
    chosen = {row.path: len(rows) - len(start) + i for i, row in enumerate(start)}
    barred: set[int] = set()
    while math.fsum(savings[i] for i in chosen.values()) < target:
        best, best_moot, best_price = -1, [], math.inf
        covered = {q for p in chosen for q in inside[p]}
        for i, row in enumerate(rows):
            if i in barred or row.path in covered:
                continue
            moot = [p for p in (row.path, *inside[row.path]) if p in chosen]
            saved = savings[i] - math.fsum(savings[chosen[p]] for p in moot)
            price = (damages[i] - math.fsum(damages[chosen[p]] for p in moot)) / saved if saved > 0 else math.inf
            if price < best_price:
                best, best_moot, best_price = i, moot, price
        if best < 0:  # all is taken; only the rounding of a sum of shares is missing
            break
        kept = {p: i for p, i in chosen.items() if p not in best_moot} | {rows[best].path: best}
        if _largest(rows, savings, kept.values()) < target * (1 - 1e-12):  # with it the target would be out of reach
            barred.add(best)
            continue
        chosen = kept
    for path, i in sorted(chosen.items(), key=lambda item: -damages[item[1]]):
        if damages[i] > 0 and math.fsum(savings[j] for p, j in chosen.items() if p != path) >= target:
            del chosen[path]
    return [rows[i] for i in chosen.values()] if start else _in_order(scores, [rows[i] for i in chosen.values()])


def least_important(
    scores: OperatorScores, unit: str, target: float, criterion: str | None = None
) -> list[OperatorScore]:
    """The `top_k` that saves at least `target`, with no larger k than it takes: LD-Pruner's choice, whatever each one saves.

    Arguments, result and ValueError as for `knapsack`.
    """
    rows, savings, _ = _usable(scores, unit, criterion)
    _check_target(unit, target, _largest(rows, savings))
    limit = len(innermost([row.path for row in scores.ranked(criterion) if row.error is None]))

    def saved(k: int) -> float:
        return math.fsum(SAVINGS[unit](row) for row in top_k(scores, k, criterion))

    k = bisect.bisect_left(range(1, limit + 1), target, key=saved) + 1
    while k <= limit and saved(k) < target:  # one operator more may save less, where a block no longer counts as one
        k += 1
    if k > limit:
        raise ValueError(
            f"budget: {_amount(unit, target)} cannot be saved by the least important operators one by one; the largest saving "
            f"with all {limit} is {_amount(unit, saved(limit))}. Ask for less, or use method='knapsack'"
        )
    return top_k(scores, k, criterion)


METHODS = {"knapsack": knapsack, "ratio": ratio, "top-k": least_important}
"""How a budget is met in one go."""
