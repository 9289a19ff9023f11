"""Which operators to take: from scores to a set that does not overlap. No torch."""

from __future__ import annotations

from .plan import is_inside
from .scores import OperatorScore, OperatorScores


def innermost(paths: list[str]) -> list[str]:
    """Paths with no other path inside them: as many operators as can be modified together."""
    return [path for path in paths if not any(is_inside(other, path) for other in paths)]


def check_k(k: object, limit: int | None = None) -> None:
    """Raise ValueError if k is no whole number, not positive, or more than the `limit` that can be modified together."""
    upto = "or more" if limit is None else f"to {limit}"
    if isinstance(k, bool) or not isinstance(k, int):
        raise ValueError(f"k: got {k!r}, expected a whole number of operators, 1 {upto}")
    if k < 1 or (limit is not None and k > limit):
        many = "" if limit is None else f"; the candidates that do not lie inside each other are {limit}"
        raise ValueError(f"k: got {k}, expected 1 {upto}{many}")


def top_k(scores: OperatorScores, k: int, criterion: str | None = None) -> list[OperatorScore]:
    """The k least important operators (LD-Pruner, section 2.4), none inside another.

    Operators compete up to the lowest score under which k of them do not nest, so none is taken while k less important ones
    are there. Among them the lowest scores go first. Taking a block makes those already taken inside it moot: they leave and
    only the block counts. A block is passed over if k could then no longer be reached.

    Returns:
        Exactly k rows, in the order of the model's modules.

    Raises:
        ValueError: k is not between 1 and the number of operators that can be modified together.
    """
    ranked = [row for row in scores.ranked(criterion) if row.error is None]
    check_k(k, len(innermost([row.path for row in ranked])))
    rows = _competing(ranked, k)
    leaves = set(innermost([row.path for row in rows]))
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


def _competing(ranked: list[OperatorScore], k: int) -> list[OperatorScore]:
    """The shortest head of the ranking in which k operators do not lie inside each other."""
    free: set[str] = set()  # those with none of the head inside them
    for n, row in enumerate(ranked, 1):
        free = {path for path in free if not is_inside(row.path, path)}
        if not any(is_inside(other.path, row.path) for other in ranked[:n]):
            free.add(row.path)
        if len(free) == k:
            return ranked[:n]
    return ranked


def _count_inside(paths: set[str], ancestor: str) -> int:
    return sum(is_inside(path, ancestor) for path in paths)
