"""Budgets: the knapsack against brute force and an independent dynamic programme; the greedy choice; both never nest."""

from __future__ import annotations

import builtins
import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ld_pruner_hf.plan import OutputRule, StandInSpec, is_inside
from ld_pruner_hf.scores import OperatorScore, OperatorScores
from ld_pruner_hf.selection import METHODS, knapsack, largest_saving, ratio

SPECS = {
    "identity": StandInSpec((OutputRule("x", 0, "identity"),)),
    "zero": StandInSpec((OutputRule("x", 0, "zero", out_channels=4, in_channels=4),)),
}


def make_scores(items: list[tuple[str, str, int, float]]) -> OperatorScores:
    """(path, stand-in, parameters saved, damage)."""
    rows = tuple(
        OperatorScore(p, "Block", SPECS[s], (damage,), (0.0,), params_removed=saving) for p, s, saving, damage in items
    )
    return OperatorScores(rows, "a", "w", "Model", "unet", {})


def damage(rows) -> float:
    """What adds up: latent shifts are distances, whose squares do."""
    return math.fsum(r.score() ** 2 for r in rows)


def saving(rows) -> int:
    return sum(r.params_removed for r in rows)


def nest(rows) -> bool:
    paths = [r.path for r in rows]
    return len(set(paths)) != len(paths) or any(is_inside(p, q) for p in paths for q in paths)


def brute_force(scores: OperatorScores, target: int) -> float:
    """Least damage over all sets; infinite if none is large enough."""
    best = math.inf
    for n in range(len(scores) + 1):
        for rows in itertools.combinations(scores.rows, n):
            if saving(rows) >= target and not nest(rows):
                best = min(best, damage(rows))
    return best


def dynamic_programme(scores: OperatorScores, target: int) -> float:
    """Least damage by a tree knapsack: per module a table saving (capped at target) -> least damage, merged upwards."""
    paths = {".".join(r.path.split(".")[: i + 1]) for r in scores for i in range(r.path.count(".") + 1)}

    def merge(a: list[float], b: list[float]) -> list[float]:
        out = [math.inf] * (target + 1)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                if x + y < out[min(target, i + j)]:
                    out[min(target, i + j)] = x + y
        return out

    def table(path: str | None) -> list[float]:
        out = [0.0] + [math.inf] * target
        for child in sorted(p for p in paths if (p.rpartition(".")[0] or None) == path):
            out = merge(out, table(child))
        for row in scores:
            if row.path == path and row.params_removed > 0:
                at = min(target, row.params_removed)
                out[at] = min(out[at], row.score() ** 2)
        return out

    return table(None)[target]


NAMES = st.sampled_from(["a", "b", "c"])
PATHS = st.lists(NAMES, min_size=1, max_size=3).map(".".join)
ITEMS = st.tuples(PATHS, st.sampled_from(list(SPECS)), st.integers(-2, 20), st.integers(0, 30).map(lambda n: n / 8))


def unique(items):
    return list({(p, s): (p, s, n, d) for p, s, n, d in items}.values())


@settings(max_examples=150, deadline=None)
@given(st.lists(ITEMS, min_size=1, max_size=9).map(unique), st.integers(1, 60))
def test_knapsack_equals_brute_force(items, target):
    scores = make_scores(items)
    best = brute_force(scores, target)
    if best == math.inf:
        with pytest.raises(ValueError, match="largest reachable saving is"):
            knapsack(scores, "params", target)
        assert largest_saving(scores, "params") < target
        return
    rows = knapsack(scores, "params", target)
    assert not nest(rows) and saving(rows) >= target
    assert damage(rows) == pytest.approx(best, abs=1e-9)
    greedy = ratio(scores, "params", target)
    assert not nest(greedy) and saving(greedy) >= target and damage(greedy) >= best - 1e-9
    assert largest_saving(scores, "params") >= target


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_knapsack_equals_a_dynamic_programme_on_larger_trees(seed):
    rng = random.Random(seed)
    items = {}
    for _ in range(50):
        path = ".".join(str(rng.randrange(5)) for _ in range(rng.randint(1, 4)))
        spec = rng.choice(list(SPECS))
        items[path, spec] = (path, spec, rng.randint(1, 20), rng.random() * 10 ** rng.randint(-2, 2))
    scores = make_scores(list(items.values()))
    target = max(1, int(largest_saving(scores, "params") * rng.random()))
    rows = knapsack(scores, "params", target)
    assert not nest(rows) and saving(rows) >= target
    assert damage(rows) == pytest.approx(dynamic_programme(scores, target), rel=1e-9, abs=1e-9)
    greedy = ratio(scores, "params", target)
    assert not nest(greedy) and saving(greedy) >= target and damage(greedy) >= damage(rows) - 1e-9


def test_realistic_sizes_meet_the_budget_to_the_last_parameter():
    """Savings of real size (to 1e8), scores over ten orders of magnitude, targets that are exact sums."""
    rng = random.Random(0)
    items = [
        (f"{i}.{j}", "identity", rng.randrange(1, 10**8), 10 ** rng.uniform(-6, 4))
        for i in range(20)
        for j in range(6)
    ]
    items += [
        (f"{i}", "identity", sum(n for p, _, n, _ in items if p.startswith(f"{i}.")), 10 ** rng.uniform(0, 4))
        for i in range(20)
    ]
    scores = make_scores(items)
    for share in (0.01, 0.3, 0.7, 0.99):
        target = round(share * largest_saving(scores, "params"))
        rows = knapsack(scores, "params", target)
        assert saving(rows) >= target and not nest(rows)
        assert saving(knapsack(scores, "params", saving(rows))) >= saving(rows)
        assert damage(ratio(scores, "params", target)) >= damage(rows) * (1 - 1e-9)


@pytest.mark.parametrize("method", ["knapsack", "ratio"])
def test_all_of_it_and_the_best_stand_in(method):
    scores = make_scores([
        ("a", "identity", 5, 4.0), ("a", "zero", 5, 1.0), ("b", "identity", 3, 1.0), ("b.c", "identity", 2, 0.1), ("b.d", "zero", 2, 0.2),
    ])  # fmt: skip
    assert largest_saving(scores, "params") == 9
    assert [r.key for r in METHODS[method](scores, "params", 9)] == [
        ("a", "zero"),
        ("b.c", "identity"),
        ("b.d", "zero"),
    ]
    assert [r.key for r in METHODS[method](scores, "params", 5)] == [("a", "zero")]
    with pytest.raises(ValueError, match=r"10 params cannot be saved; the largest reachable saving is 9 params"):
        METHODS[method](scores, "params", 10)


def test_ratio_takes_a_block_for_its_parts():
    scores = make_scores(
        [
            ("b", "identity", 10, 1.0),
            ("b.c", "identity", 2, 0.1),
            ("b.d", "identity", 2, 0.1),
            ("e", "identity", 1, 9.0),
        ]
    )
    assert [r.path for r in ratio(scores, "params", 4)] == ["b.c", "b.d"]
    assert [r.path for r in ratio(scores, "params", 5)] == ["b"]


@pytest.mark.parametrize("method", ["knapsack", "ratio"])
def test_failed_and_useless_rows_are_never_taken(method):
    scores = make_scores([("a", "identity", 5, 1.0), ("b", "identity", 0, 0.0), ("c", "identity", -3, 0.0)])
    failed = OperatorScore("d", "Block", SPECS["identity"], params_removed=50, error="RuntimeError")
    scores = OperatorScores((*scores.rows, failed), "a", "w", "Model", "unet", {})
    assert [r.path for r in METHODS[method](scores, "params", 5)] == ["a"]
    with pytest.raises(ValueError, match="largest reachable saving is 5 params"):
        METHODS[method](scores, "params", 6)


@pytest.mark.parametrize("method", ["knapsack", "ratio"])
@pytest.mark.parametrize("target", [0, -1, float("nan"), float("inf"), True, "many"])
def test_targets_that_are_none(method, target):
    with pytest.raises(ValueError, match="expected a positive number"):
        METHODS[method](make_scores([("a", "identity", 5, 1.0)]), "params", target)


def test_latency_needs_latency():
    scores = make_scores([("a", "identity", 5, 1.0)])
    with pytest.raises(ValueError, match="hold no latency"):
        knapsack(scores, "latency", 0.1)
    with pytest.raises(ValueError, match=r"unit 'seconds', expected one of \['params', 'macs', 'latency', 'memory'\]"):
        knapsack(scores, "seconds", 0.1)
    timed = OperatorScore("a", "Block", SPECS["identity"], (1.0,), (0.0,), latency_share=0.2)
    scores = OperatorScores((timed,), "a", "w", "Model", "unet", {})
    assert knapsack(scores, "latency", 0.2) == [timed] == ratio(scores, "latency", 0.15)
    with pytest.raises(ValueError, match=r"30\.00% of the latency cannot be saved; .* is 20\.00%"):
        knapsack(scores, "latency", 0.3)


@pytest.mark.parametrize("method", ["knapsack", "ratio"])
@pytest.mark.parametrize("seed", range(5))
def test_the_largest_saving_is_reachable_in_spite_of_rounding(method, seed):
    rng = random.Random(seed)
    rows = tuple(
        OperatorScore(
            f"{i % 4}.{i}", "Block", SPECS["identity"], (rng.random(),), (0.0,), latency_share=rng.random() / 40
        )
        for i in range(40)
    )
    scores = OperatorScores(rows, "a", "w", "Model", "unet", {})
    assert METHODS[method](scores, "latency", largest_saving(scores, "latency")) == list(rows)


def test_without_scipy_the_extra_is_named(monkeypatch):
    real = builtins.__import__

    def no_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_scipy)
    with pytest.raises(ImportError, match=r"ld_pruner_hf\[select\]"):
        knapsack(make_scores([("a", "identity", 5, 1.0)]), "params", 5)
    assert len(ratio(make_scores([("a", "identity", 5, 1.0)]), "params", 5)) == 1
