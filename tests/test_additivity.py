"""Sums of single scores against what sets of operators do together."""

from __future__ import annotations

import csv
import math

import pytest
import tiny

from ld_pruner_hf import cli, measure_additivity, measure_damage, score_operators
from ld_pruner_hf.additivity import Additivity, JointDamage
from ld_pruner_hf.plan import Modification, is_inside

SETTINGS = {"conditions": ["pizza"], "num_inference_steps": 2, "seeds": 2}


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion()


@pytest.fixture(scope="module")
def scores(pipe):
    return score_operators(pipe, kinds=["ResnetBlock2D", "Attention", "FeedForward"], **SETTINGS)


def test_sets_are_predicted_and_measured(pipe, scores):
    found = measure_additivity(pipe, scores, sizes=(2, 4), sets=2, among=1.0, progress=False, **SETTINGS)
    assert [s.size for s in found.sets] == [2, 2, 4, 4] and found.criterion == "latent-shift"
    rows = {r.path: r for r in scores.ranked()}
    one = found.sets[2]
    assert len(set(one.paths)) == 4 and not any(is_inside(a, b) for a in one.paths for b in one.paths)
    single = [rows[p].score() for p in one.paths]
    assert one.total == pytest.approx(sum(single)) and one.predicted == pytest.approx(math.hypot(*single))
    together = [Modification(p, rows[p].kind, rows[p].stand_in) for p in one.paths]
    assert one.measured == pytest.approx(measure_damage(pipe, together, **SETTINGS), rel=1e-5)
    again = measure_additivity(pipe, scores, sizes=(2, 4), sets=2, among=1.0, progress=False, **SETTINGS)
    assert [s.paths for s in again.sets] == [s.paths for s in found.sets]


def test_other_conditions_than_those_of_the_scores_are_noticed(pipe, scores):
    with pytest.raises(ValueError, match="pass the conditions, steps and seeds that the scores were made with"):
        measure_additivity(pipe, scores, sizes=(2,), sets=1, progress=False, **{**SETTINGS, "seeds": 3})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"sizes": (500,)}, "sizes: got 500"), ({"among": 0}, "among: got 0"), ({"among": 1.5}, "among: got 1.5")],
)
def test_sets_that_cannot_be(pipe, scores, arguments, message):
    with pytest.raises(ValueError, match=message):
        measure_additivity(pipe, scores, **arguments, **SETTINGS)


def test_numbers_and_table(tmp_path):
    perfect = Additivity("latent-shift", tuple(JointDamage(2, x, x * x, ("a", "b"), 2 * x) for x in (1.0, 2.0, 3.0)))
    assert perfect.rank_correlation == pytest.approx(1) and perfect.rank_correlations == {2: pytest.approx(1)}
    reverse = Additivity("latent-shift", tuple(JointDamage(n, n, -n, (), n) for n in (1, 2, 3)))
    assert reverse.rank_correlation == pytest.approx(-1) and reverse.rank_correlations == {}
    assert math.isnan(Additivity("x", (JointDamage(1, 1, 2, (), 1), JointDamage(1, 1, 3, (), 1))).rank_correlation)
    assert "rank correlation of predicted and measured latent-shift over all: 1.000" in str(perfect)
    perfect.to_csv(tmp_path / "additivity.csv")
    lines = list(csv.DictReader((tmp_path / "additivity.csv").open()))
    assert len(lines) == 3 and lines[2] == {
        "size": "2",
        "predicted": "3.0",
        "measured": "9.0",
        "total": "6.0",
        "paths": "a b",
    }


def test_the_command_writes_table_and_figure(tmp_path, capsys):
    how = [
        "--prompt",
        "pizza",
        "--num-inference-steps",
        "1",
        "--seeds",
        "1",
        "--guidance-scale",
        "1",
        "--kinds",
        "FeedForward",
    ]
    assert cli.main(["score", "demo:emoji", "-o", str(tmp_path), *how]) == 0
    sets = ["--sizes", "2", "3", "--sets", "3", "--among", "1"]
    options = ["--scores", str(tmp_path / "scores.jsonl"), "-o", str(tmp_path), *sets, *how]
    assert cli.main(["additivity", "demo:emoji", *options]) == 0
    out = capsys.readouterr().out
    assert "rank correlation of predicted and measured latent-shift over all" in out
    assert (tmp_path / "additivity.txt").read_text() in out
    assert len((tmp_path / "additivity.csv").read_text().splitlines()) == 7
    assert (tmp_path / "additivity.png").read_bytes().startswith(b"\x89PNG")
