"""Which operators to take: from scores to a set that does not overlap. No torch."""

from __future__ import annotations

from .plan import is_inside
from .scores import OperatorScore, OperatorScores


def innermost(rows: list[OperatorScore]) -> list[OperatorScore]:
    """Rows with no other row inside them: as many operators as can be modified together."""
    return [row for row in rows if not any(is_inside(other.path, row.path) for other in rows)]


def check_k(k: object, limit: int) -> int:
    """k as an int; ValueError if it is none, not positive, or more than can be modified together."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise ValueError(f"k: got {k!r}, expected a whole number of operators, 1 to {limit}")
    if not 1 <= k <= limit:
        raise ValueError(f"k: got {k}, expected 1 to {limit}: so many candidates do not lie inside each other")
    return k


def top_k(scores: OperatorScores, k: int, criterion: str | None = None) -> list[OperatorScore]:
    """The k least important operators (LD-Pruner, section 2.4), none inside another.

    Operators are taken from the lowest score up. Taking a block makes those already taken inside it moot: they leave and
    only the block counts. A block is passed over if so few operators would be left that k could no longer be reached.

    Returns:
        Exactly k rows, in the order of the model's modules.

    Raises:
        ValueError: k is not between 1 and the number of operators that can be modified together.
    """
    rows = [row for row in scores.ranked(criterion) if row.error is None]
    leaves = {row.path for row in innermost(rows)}
    check_k(k, len(leaves))
    chosen: dict[str, OperatorScore] = {}
    reach = len(leaves)  # as many as can still be modified together, given what is chosen
    for row in rows:
        if len(chosen) == k:
            break
        if any(is_inside(row.path, path) for path in chosen):
            continue
        lost = max(0, _count_inside(leaves, row.path) - 1)
        lost -= sum(max(0, _count_inside(leaves, path) - 1) for path in chosen if is_inside(path, row.path))
        if reach - lost < k:
            continue
        reach -= lost
        chosen = {path: r for path, r in chosen.items() if not is_inside(path, row.path)} | {row.path: row}
    order = {row.path: i for i, row in enumerate(scores.rows)}
    return sorted(chosen.values(), key=lambda row: order[row.path])


def _count_inside(paths: set[str], ancestor: str) -> int:
    return sum(is_inside(path, ancestor) for path in paths)
