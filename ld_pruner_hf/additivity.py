"""Do single scores add up? The damage predicted for sets of operators against what they really do together."""

from __future__ import annotations

import csv
import io
import os
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from .latents import only_one
from .plan import SEVERAL, is_inside, write_atomically
from .scores import NORMS, OperatorScore, OperatorScores, combined
from .scoring import damage_meter


@dataclass(frozen=True)
class JointDamage:
    """One set of operators.

    Attributes:
        predicted: what their scores say that they do together (`scores.combined`). measured: what they do.
        total: the plain sum of the scores. All in units of the score.
    """

    size: int
    predicted: float
    measured: float
    paths: tuple[str, ...]
    total: float

    @property
    def ratio(self) -> float:
        return self.measured / self.predicted if self.predicted else float("nan")


@dataclass(frozen=True)
class Additivity:
    """Predicted against measured damage over random sets (LAPTOP-Diff, section 3.2, tests its criterion so).

    Attributes:
        sets: one entry a set. criterion: what is added up.
        rank_correlation: Spearman's, over all sets: 1 if the sums order the sets as the measurements do.
        rank_correlations: the same among the sets of one size, for sizes with three sets or more: it does not profit from
            larger sets doing more damage.
    """

    criterion: str
    sets: tuple[JointDamage, ...]

    @property
    def rank_correlation(self) -> float:
        return _spearman(self.sets)

    @property
    def rank_correlations(self) -> dict[int, float]:
        by_size = self._by_size()
        return {size: _spearman(sets) for size, sets in by_size.items() if len(sets) > 2}

    def _by_size(self) -> dict[int, list[JointDamage]]:
        groups: dict[int, list[JointDamage]] = {}
        for one in self.sets:
            groups.setdefault(one.size, []).append(one)
        return groups

    def to_csv(self, path: str | os.PathLike) -> None:
        """One line a set: size, predicted, measured, plain sum, and the paths, separated by blanks."""
        out = io.StringIO()
        writer = csv.DictWriter(out, ["size", "predicted", "measured", "total", "paths"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(one) | {"paths": " ".join(one.paths)} for one in self.sets)
        write_atomically(path, out.getvalue())

    def __str__(self) -> str:
        how = "root of the sum of squares" if self.criterion in NORMS else "sum of scores"
        lines = [
            f"predicted: {how}",
            "size  sets  measured / predicted (median, lowest, highest)  measured / sum  rank correlation",
        ]
        correlations = self.rank_correlations
        for size, sets in self._by_size().items():
            ratios = [one.ratio for one in sets]
            middle, low, high = statistics.median(ratios), min(ratios), max(ratios)
            rho = f"{correlations[size]:.3f}" if size in correlations else "-"
            plain = statistics.median(one.measured / one.total if one.total else float("nan") for one in sets)
            lines.append(
                f"{size:>4}  {len(sets):>4}  {middle:>20.3f}  {low:>10.3f}  {high:>10.3f}  {plain:>14.3f}  {rho:>16}"
            )
        lines.append(
            f"rank correlation of predicted and measured {self.criterion} over all: {self.rank_correlation:.3f}"
        )
        return "\n".join(lines)


def _spearman(sets: Sequence[JointDamage]) -> float:
    def ranks(values: Iterable[float]) -> np.ndarray:
        _, inverse, counts = np.unique(list(values), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # ties share their mean rank

    a, b = ranks(s.predicted for s in sets), ranks(s.measured for s in sets)
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def random_set(rows: Sequence[OperatorScore], size: int, draw: random.Random) -> list[OperatorScore] | None:
    """`size` rows that do not lie inside each other, or None if a hundred shuffles hold no such set."""
    for _ in range(100):
        chosen: list[OperatorScore] = []
        for row in draw.sample(rows, len(rows)):
            if not any(is_inside(row.path, c.path) or is_inside(c.path, row.path) for c in chosen):
                chosen.append(row)
            if len(chosen) == size:
                return chosen
    return None


def measure_additivity(
    pipe: Any,
    scores: OperatorScores,
    conditions: Any = None,
    *,
    sizes: Sequence[int] = (2, 4, 8, 16, 32),
    sets: int = 6,
    among: float = 0.5,
    draw_seed: int = 0,
    progress: bool = True,
    **how: Any,
) -> Additivity:
    """Take random sets of operators out together and compare what they do with what their scores predict.

    Args:
        scores: of this pipeline. conditions, how: as they were for `score_operators` when the scores were made.
        sizes: how many operators a set has. sets: how many sets of each size.
        among: the least important share of the operators that the sets are drawn from: those that pruning would take.
        draw_seed: of the choice of the sets.

    Raises:
        ValueError: a size that no set reaches, `among` outside (0, 1], scores of several components, or scores that the given
            conditions do not reproduce.
    """
    only_one(scores.component.split(SEVERAL), "additivity")
    if not 0 < among <= 1:
        raise ValueError(f"among: got {among!r}, expected a share of the operators, above 0 and up to 1")
    rows = [row for row in scores.ranked() if row.error is None]
    rows = rows[: max(1, round(among * len(rows)))]
    draw = random.Random(draw_seed)
    drawn: list[list[OperatorScore]] = []
    for size in sizes:
        for _ in range(sets):
            one = random_set(rows, size, draw)
            if one is None:
                raise ValueError(
                    f"sizes: got {size}, but {len(rows)} operators hold no set of so many that do not nest; ask for less, or "
                    "raise among="
                )
            drawn.append(one)
    found: list[JointDamage] = []
    how.setdefault("component", scores.component)
    with damage_meter(pipe, conditions, criterion=scores.criterion, **how) as measure:
        _check_reproduced(rows[0], measure([rows[0].modification(scores.criterion)]), scores.criterion)
        for one in tqdm(drawn, desc="joint damage", unit="set", disable=not progress):
            single = [row.score(scores.criterion) for row in one]
            predicted, paths = combined(scores.criterion, single), tuple(row.path for row in one)
            measured = measure([row.modification(scores.criterion) for row in one])
            found.append(JointDamage(len(one), predicted, measured, paths, sum(single)))
    return Additivity(scores.criterion, tuple(found))


def _check_reproduced(row: OperatorScore, measured: float, criterion: str) -> None:
    expected = row.score(criterion)
    if abs(measured - expected) > 1e-2 * max(abs(expected), 1e-6):
        raise ValueError(
            f"conditions: with these, {row.path} scores {measured:.6g}, in the scores it has {expected:.6g}; pass the conditions, "
            "steps and seeds that the scores were made with"
        )
