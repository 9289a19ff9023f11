"""top_k: exactly k, never nested, lowest scores first."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scores import row, scores

from ld_pruner_hf import agreement, top_k
from ld_pruner_hf.plan import is_inside
from ld_pruner_hf.planning import Goal, _agreement
from ld_pruner_hf.selection import check_k, competing, innermost, least_important


def table(**values: float):
    """Scores of operators whose paths are the names with _ for a dot."""
    return scores(*(row(path.replace("_", "."), (value,), (0.0,)) for path, value in values.items()))


def paths(rows) -> list[str]:
    return [r.path for r in rows]


def test_lowest_scores_in_the_order_of_the_model():
    assert paths(top_k(table(a=3, b=1, c=2), 2)) == ["b", "c"]


def test_a_block_takes_the_place_of_what_lies_inside():
    s = table(x=4, x_a=1, x_b=9, y=5, z=6)
    assert paths(top_k(s, 1)) == ["x.a"]
    assert paths(top_k(s, 2)) == ["x", "y"], "the block makes x.a moot and counts once"


def test_a_block_is_passed_over_if_k_would_be_out_of_reach():
    s = table(x=1, x_a=2, x_b=3, y=4)
    assert paths(top_k(s, 1)) == ["x"]
    assert paths(top_k(s, 2)) == ["x.a", "x.b"], "both are less important than y"
    assert paths(top_k(s, 3)) == ["x.a", "x.b", "y"]


def test_agreement_of_two_halves_of_the_conditions():
    halves = {"a": (1, 1, 1, 1), "b": (2, 3, 2, 3), "c": (3, 2, 3, 2), "d": (4, 4, 4, 4)}
    s = scores(*(row(path, values, (0.0,) * 4) for path, values in halves.items()))
    assert [agreement(s, partial(top_k, k=k)) for k in (1, 2, 3)] == [1, 0.5, 1]
    failed = row("e", (), (), error="no")
    assert agreement(replace(s, rows=(*s.rows, failed)), partial(top_k, k=2)) == 0.5
    assert agreement(table(a=1, b=2), partial(top_k, k=1)) is None, "one value each: conditions pooled, or one alone"
    alone = replace(s, rows=tuple(replace(r, random=1.0) for r in s), criterion="random")
    assert agreement(alone, partial(top_k, k=1)) is None


def test_a_half_that_cannot_reach_the_goal_by_itself_leaves_the_agreement_open():
    rows = row("x", (1.0, 3.0), (0.0, 0.0)), row("x.a", (5.0, 1.0), (0.0, 0.0))
    s = scores(replace(rows[0], params_removed=10), replace(rows[1], params_removed=4))
    assert paths(least_important(s, "params", 8)) == ["x"]
    with pytest.raises(ValueError, match="cannot be saved"):
        agreement(s, lambda half: least_important(half, "params", 8))
    assert _agreement(s, Goal("params", 0.8, "top-k"), 10) is None
    assert _agreement(s, Goal("params", 0.4, "top-k"), 10) == 0


def test_innermost_and_the_head_that_competes():
    assert innermost(["x", "x.a", "x.a.b", "xa", "y"]) == ["x.a.b", "xa", "y"]
    ranked = ["x.a", "x", "x.b", "y", "z"]
    assert [competing(ranked, k) for k in (1, 2, 3, 4, 9)] == [1, 3, 4, 5, 5]


def test_criterion_changes_the_choice():
    s = scores(row("a", (1.0,), (9.0,)), row("b", (2.0,), (1.0,)))
    assert paths(top_k(s, 1)) == ["b"] and paths(top_k(s, 1, "latent-shift-mean")) == ["a"]


def test_failed_operators_are_never_chosen():
    s = scores(row("a", (), (), error="no"), row("b"))
    assert paths(top_k(s, 1)) == ["b"]
    with pytest.raises(ValueError, match="expected 1 to 1"):
        top_k(s, 2)


@pytest.mark.parametrize("k", [0, -1, True, 2.5, "3", None])
def test_k_that_is_no_positive_whole_number(k):
    with pytest.raises(ValueError, match=rf"k: got {k!r}, expected"):
        check_k(k)


def test_k_above_the_limit_says_how_many_there_are():
    with pytest.raises(ValueError, match=r"k: got 4, expected 1 to 3; .* are 3"):
        top_k(table(x=1, x_a=2, x_b=3, y=4), 4)


TREES = st.lists(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), min_size=1, max_size=25, unique=True
)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(tree=TREES, data=st.data())
def test_exactly_k_and_none_inside_another(tree, data):
    values = data.draw(st.lists(st.integers(0, 9), min_size=len(tree), max_size=len(tree)))
    s = scores(*(row(p, (float(v),), (0.0,)) for p, v in zip(tree, values, strict=True)))
    limit = len(innermost(tree))
    k = data.draw(st.integers(1, limit))
    chosen = paths(top_k(s, k))
    assert len(chosen) == len(set(chosen)) == k
    assert not any(is_inside(a, b) for a in chosen for b in chosen)
    with pytest.raises(ValueError, match=f"expected 1 to {limit}"):
        top_k(s, limit + 1)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_no_operator_is_taken_while_k_less_important_ones_are_there(data):
    """The highest score taken is the lowest possible: against all sets of k that do not nest."""
    names = data.draw(st.sets(st.sampled_from(["a", "b", "a.a", "a.b", "a.a.c", "a.a.d", "b.c", "c"]), min_size=1))
    values = {name: data.draw(st.floats(0, 100), label=name) for name in sorted(names)}
    k = data.draw(st.integers(1, len(innermost(sorted(names)))))
    chosen = top_k(scores(*(row(path, (value,), (0.0,)) for path, value in values.items())), k)
    possible = [
        max(values[path] for path in paths)
        for paths in itertools.combinations(values, k)
        if not any(is_inside(a, b) for a in paths for b in paths)
    ]
    assert len(chosen) == k and max(values[r.path] for r in chosen) == min(possible)


def saving(path: str, score: float, params: int):
    return row(path, (score,), (0.0,), params_removed=params)


def test_a_budget_is_met_by_the_least_important_operators():
    s = scores(saving("a", 1, 10), saving("b", 2, 1), saving("c", 3, 30), saving("d", 4, 50))
    assert paths(least_important(s, "params", 10)) == ["a"]
    assert paths(least_important(s, "params", 12)) == ["a", "b", "c"], "b saves little and goes first all the same"
    with pytest.raises(ValueError, match="largest reachable saving is 91 params"):
        least_important(s, "params", 92)


def test_a_budget_that_only_a_block_reaches():
    s = scores(saving("x", 1, 100), saving("x.a", 5, 1), saving("x.b", 6, 1), saving("y", 2, 3))
    assert paths(least_important(s, "params", 90)) == ["x"]
    s = scores(saving("x", 9, 100), saving("x.a", 1, 1), saving("x.b", 2, 1))
    with pytest.raises(
        ValueError, match=r"50 params cannot be saved by the least important operators.*with all 2 is 2 params"
    ):
        least_important(s, "params", 50)


def test_top_k_keeps_as_many_reachable_as_asked():
    s = table(x=1, x_a=2, x_b=3, y=4)
    assert paths(top_k(s, 1)) == ["x"]
    assert paths(top_k(s, 1, reachable=3)) == ["x.a"], "with the block, only two operators could go in all"
    assert paths(top_k(s, 1, reachable=2)) == ["x"]
