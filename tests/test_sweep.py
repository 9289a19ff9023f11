"""Quality over k: the cliff, the recommendation, and the sweep itself on a tiny pipeline."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from PIL import Image

from ld_pruner_hf import PlanError, cli, score
from ld_pruner_hf.evaluation import EvaluationSettings
from ld_pruner_hf.sweep import Sweep, SweepRow, find_cliff, recommend, sweep


def row(k, quality, uncertainty=0.1, speed=1.0) -> SweepRow:
    return SweepRow(k, quality, uncertainty, 1.0, 1.0, speed, speed - 0.01, speed + 0.01, 100)


FLAT_THEN_CLIFF = [row(0, 10.0), row(10, 10.2), row(20, 10.6), row(40, 60.0), row(80, 75.0)]


def test_the_cliff_is_the_steepest_fall_per_operator():
    assert find_cliff(FLAT_THEN_CLIFF) == (20, 40)
    assert find_cliff([row(0, 5.0), row(10, 25.0), row(100, 60.0)]) == (0, 10)


def test_noise_is_no_cliff():
    assert find_cliff([row(0, 10.0, 1.0), row(10, 11.0, 1.0), row(20, 9.5, 1.0)]) is None


def test_resamples_of_the_same_samples_are_compared_in_pairs():
    """What both rows share, good or bad luck with the samples, is no uncertainty of their difference."""
    luck = [9.0, 11.0, 10.5, 8.5, 12.0]
    rows = [
        SweepRow(k, 10.0 + k / 10, 1.5, 1, 1, 1, 1, 1, 50, tuple(x + k / 10 + 0.01 * i for i, x in enumerate(luck)))
        for k in (0, 10, 20)
    ]
    assert find_cliff(rows) is not None
    assert find_cliff([SweepRow(r.k, r.quality, r.uncertainty, 1, 1, 1, 1, 1, 50) for r in rows]) is None
    assert recommend(rows, None, 0.15, "FID")[0] == 10


def test_a_metric_that_falls_with_quality():
    rows = [row(0, 0.30, 0.001), row(10, 0.299, 0.001), row(20, 0.21, 0.001)]
    assert find_cliff(rows, higher_is_better=True) == (10, 20) and find_cliff(rows) is None
    assert recommend(rows, (10, 20), 0.1, "CLIP score", True)[0] == 10


def test_the_largest_k_before_the_cliff_is_recommended_with_its_reason():
    k, reason = recommend(FLAT_THEN_CLIFF, (20, 40), 0.1, "FID")
    assert k == 20 and "FID 10.6 (original 10)" in reason and "k = 40, has 60: it lies behind the cliff" in reason


def test_the_tolerance_stops_before_the_cliff():
    k, reason = recommend(FLAT_THEN_CLIFF, (20, 40), 0.03, "FID")
    assert k == 10 and "k = 20, has 10.6: more than 3% worse" in reason


def test_nothing_is_recommended_where_the_first_k_is_too_many():
    k, reason = recommend([row(0, 10.0), row(10, 50.0)], (0, 10), 0.1, "FID")
    assert k == 0 and "no operator should go" in reason


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(pipeline's folder, its scores' file, reference folder)."""
    root = tmp_path_factory.mktemp("sweep")
    pipe = tiny.ldm()
    pipe.save_pretrained(root / "pipe")
    score(pipe, num_inference_steps=1, seeds=1, include=["mid_block*"]).save(root / "scores.jsonl")
    (root / "reference").mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(root / "reference" / f"{i}.png")
    return root / "pipe", root / "scores.jsonl", root / "reference"


def command(made, out, *more):
    pipe, scores, reference = made
    return [
        "sweep", str(pipe), "--scores", str(scores), "--reference", str(reference), "-o", str(out), "--metric", "kid",
        "--extractor", "shipped", "-n", "20", "--num-inference-steps", "1", "--rounds", "5", "--device", "cpu", *more,
    ]  # fmt: skip


def test_a_sweep_measures_draws_and_goes_on(made, tmp_path, capsys):
    assert cli.main(command(made, tmp_path, "--k", "3", "1")) == 0
    out = capsys.readouterr().out
    result = Sweep.load(tmp_path / "sweep.json")
    assert [r.k for r in result.rows] == [0, 1, 3] and result.metric == "KID" and result.rows[0].speed_up == 1.0
    assert result.rows[2].params_share < result.rows[1].params_share <= 1.0
    assert all(r.speed_up_low <= r.speed_up <= r.speed_up_high for r in result.rows)
    assert result.recommended in (0, 1, 3) and result.reason in out and result.command.startswith("ld-pruner sweep")
    names = {f.name for f in tmp_path.iterdir()}
    assert {"sweep.csv", "quality_over_k.png", "quality_against_speed_up.png", "k0000", "k0003"} <= names

    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert cli.main(command(made, tmp_path, "--k", "1", "2", "3")) == 0  # only k = 2 is new
    again = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert again[:3] == rows and again[3]["k"] == 2
    assert [r.k for r in Sweep.load(tmp_path / "sweep.json").rows] == [0, 1, 2, 3]


def test_rows_of_other_settings_are_not_mixed(made, tmp_path, capsys):
    assert cli.main(command(made, tmp_path, "--k", "1")) == 0
    assert cli.main(command(made, tmp_path, "--k", "1", "--seed", "5")) == 2
    assert "made with other settings (seed)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--k", "0"], "k: got 0"), (["--k", "9999"], "k: got 9999"), (["--metric", "clip-score"], "needs --prompts")],
)
def test_errors_come_before_any_sample(made, tmp_path, capsys, more, message):
    assert cli.main(command(made, tmp_path / "out", *more)) == 2
    assert message in capsys.readouterr().err and not list(tmp_path.rglob("*.png"))


def test_a_damaged_file_is_refused(tmp_path):
    (tmp_path / "s.json").write_text('{"format": "ld_pruner_hf.sweep", "version": 1, "rows": []}')
    with pytest.raises(PlanError, match="not a complete sweep"):
        Sweep.load(tmp_path / "s.json")


def test_the_pipeline_is_as_before(made, tmp_path, monkeypatch):
    from ld_pruner_hf import OperatorScores
    from ld_pruner_hf import sweep as module

    pipe = tiny.ldm()
    monkeypatch.setattr(module, "prepare", lambda *_: pipe)
    before = tiny.snapshot(pipe)
    settings = EvaluationSettings(
        n=20, reference=str(made[2]), extractors={"*": "shipped"}, num_inference_steps=1, rounds=5, device="cpu"
    )
    sweep("pipe", OperatorScores.load(made[1]), tmp_path, [2], "kid", settings)
    assert tiny.differences(before, tiny.snapshot(pipe)) == []
