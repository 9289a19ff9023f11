"""The benchmark of ways of choosing: what it measures, that it resumes, and what it writes."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import pytest
import tiny
import torch

from ld_pruner_hf import PruningPlan, applied, cli
from ld_pruner_hf.benchmark import (
    DEFAULT_WAYS,
    ONE_SHOT,
    Benchmark,
    BenchmarkSettings,
    Interval,
    Result,
    Way,
    best_of,
    save_results,
    table,
)
from ld_pruner_hf.curves import benchmark_figures
from ld_pruner_hf.latents import final_latents, preserved
from ld_pruner_hf.plan import PlanError
from ld_pruner_hf.report import figure_png

SETTINGS = BenchmarkSettings(
    ways=("latent-shift:knapsack", "random:ratio+fit", "no-mid-block"), unit="macs", goals=(0.2,), ks=(), conditions=["pizza"],
    num_inference_steps=2, seeds=2, kinds=("ResnetBlock2D", "FeedForward", "Attention"), test_conditions=["rocket", "pizza"],
    test_seeds=2, timing_rounds=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return tiny.stable_diffusion()


@pytest.fixture(scope="module")
def folder(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    Benchmark(pipe, folder, SETTINGS).run(progress=False)
    return folder


@pytest.fixture
def results(pipe, folder):
    return Benchmark(pipe, folder, SETTINGS).run(progress=False)


@pytest.mark.parametrize(
    ("text", "way"),
    [
        ("latent-shift:top-k", ("latent-shift", "top-k", False)),
        ("output-error:knapsack+fit", ("output-error", "knapsack", True)),
        ("latent-shift-mean:rounds+affine", ("latent-shift-mean", "rounds", "affine")),
        ("bk-sdm-small", ("", "", False)),
    ],
)
def test_ways(text, way):
    found = Way.parse(text)
    assert (found.criterion, found.method, found.fit) == way and found.name == text
    assert found.is_preset == (way[0] == "")


@pytest.mark.parametrize(
    "text", ["latent-shift", "latent-shift:best", "beauty:top-k", "bk-sdm-huge", "random:ratio+fits"]
)
def test_what_is_no_way(text):
    with pytest.raises(ValueError, match="got"):
        Way.parse(text)


def test_the_defaults_are_ways():
    assert all(Way.parse(text).name == text for text in DEFAULT_WAYS)


def test_an_interval_is_students():
    found = Interval.over([1.0, 2.0, 4.0])
    half = 4.302653 * math.sqrt(7 / 3 / 3)  # t of 0.975 with two degrees of freedom, standard error of the mean
    assert found.value == pytest.approx(7 / 3) and found.high - found.value == pytest.approx(half, rel=1e-5)
    assert found.value - found.low == pytest.approx(half, rel=1e-5)
    assert Interval.over([3.0]).high == math.inf


def test_every_candidate_is_measured(pipe, folder, results):
    assert [(r.way, r.unit, r.goal) for r in results] == [
        ("no-mid-block", "preset", 0.0), ("latent-shift:knapsack", "macs", 0.2), ("random:ratio+fit", "macs", 0.2)
    ]  # fmt: skip
    preset, ours, chance = results
    assert ours.macs >= 0.2 and chance.macs >= 0.2 and ours.operators > 0 and preset.operators == 0
    assert all(r.stage == ONE_SHOT and r.damage.low <= r.damage.value <= r.damage.high for r in results)
    assert all(r.speed_up.low <= r.speed_up.value <= r.speed_up.high and r.psnr.value > 0 for r in results)
    mid = sum(p.numel() for p in pipe.unet.mid_block.parameters()) / pipe.unet.num_parameters()
    assert preset.params == pytest.approx(mid)


def test_the_damage_is_the_relative_distance_of_the_latents(pipe, folder, results):
    plan = PruningPlan.load(folder / "plans" / "latent-shift-knapsack-macs-0.2.json")
    per_seed = []
    for seed in (1000, 1001):
        distances = []
        for prompt in ("rocket", "pizza"):
            call = {"prompt": prompt, "num_inference_steps": 2}
            with preserved(pipe):
                a = final_latents(pipe, call, [seed])
                with applied(pipe.unet, plan):
                    b = final_latents(pipe, call, [seed])
            distances.append(((b - a).norm() / a.norm()).item())
        per_seed.append(sum(distances) / 2)
    expected = Interval.over(per_seed)
    assert results[1].damage.value == pytest.approx(expected.value, rel=1e-3)
    assert results[1].damage.high == pytest.approx(expected.high, rel=1e-2)


def test_it_goes_on_where_it_was_interrupted(pipe, folder, tmp_path, monkeypatch):
    lines = (folder / "results.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "results.jsonl").write_text("".join(lines[:3]) + lines[3][:25])
    measured = []

    def record(self, outputs, way, unit, goal):
        measured.append((way.name, goal))
        return None, Result.from_dict(json.loads(lines[3]))

    monkeypatch.setattr(Benchmark, "_measure", record)
    results = Benchmark(pipe, tmp_path, SETTINGS).run(progress=False)
    assert measured == [("random:ratio+fit", 0.2)] and len(results) == 3
    assert (tmp_path / "results.jsonl").read_text().splitlines()[:3] == [line.rstrip() for line in lines[:3]]
    measured.clear()
    assert len(Benchmark(pipe, tmp_path, SETTINGS).run(progress=False)) == 3 and not measured


def test_results_of_other_settings_are_not_mixed(pipe, folder):
    with pytest.raises(PlanError, match="made by another run"):
        Benchmark(pipe, folder, replace(SETTINGS, num_inference_steps=3))
    assert Benchmark(pipe, folder, replace(SETTINGS, goals=(0.2, 0.3))).results, "more budgets may be added"


def test_a_candidate_is_measured_again_after_finetuning(pipe, tmp_path):
    trained = []

    def finetune(candidate, steps):
        trained.append(steps)
        with torch.no_grad():
            for p in candidate.unet.parameters():
                p.mul_(1.01)
        return candidate

    settings = replace(SETTINGS, ways=("no-mid-block",))
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    first, second = Benchmark(pipe, tmp_path, settings).run(finetune, 7, progress=False)
    assert trained == [7] and (first.stage, second.stage) == (ONE_SHOT, "after 7 steps")
    assert first.damage.value != second.damage.value and first.speed_up == second.speed_up
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items()), "the original stays as it is"
    assert len(Benchmark(pipe, tmp_path, settings).run(finetune, 7, progress=False)) == 2 and trained == [7]


def test_a_latency_budget_is_corrected_until_it_is_met(pipe, tmp_path, monkeypatch):
    """A device on which twice the predicted share goes: half must be asked for."""
    asked = []

    def prune(self, way, unit, goal):
        asked.append(goal)
        return goal, 1

    monkeypatch.setattr(Benchmark, "_prune", prune)
    monkeypatch.setattr(Benchmark, "_speed_up", lambda self, goal: Interval(1 / (1 - 1.5 * goal), 0, 9))
    _, _, speed = Benchmark(pipe, tmp_path, SETTINGS)._at_measured_latency(Way.parse("random:ratio"), 0.3)
    assert asked[0] == 0.3 and asked[1] == pytest.approx(0.15) and len(asked) == SETTINGS.calibrations
    assert abs(1 - 1 / speed.value - 0.3) == min(abs(1.5 * a - 0.3) for a in asked)


def test_a_budget_out_of_reach_is_left_out_and_said(pipe, tmp_path, capsys):
    settings = replace(SETTINGS, ways=("latent-shift:knapsack",), goals=(0.99,))
    assert Benchmark(pipe, tmp_path, settings).run() == []
    assert "largest reachable saving" in "".join(capsys.readouterr())


def test_table_csv_and_figures(results, tmp_path):
    save_results(tmp_path / "benchmark.csv", results)
    lines = list(csv.DictReader((tmp_path / "benchmark.csv").open()))
    assert [line["way"] for line in lines] == [r.way for r in results]
    assert float(lines[1]["damage_low"]) == pytest.approx(results[1].damage.low, rel=1e-4)
    best = best_of(results)["macs", 0.2, ONE_SHOT]
    text = table(results)
    assert f"| macs -20% | **{best}** |" in text and "| hand-made | no-mid-block |" in text
    broken = replace(results[1], damage=Interval(math.inf, math.inf, math.inf))
    by_k = [replace(r, unit="operators", goal=k) for r in results[1:] for k in (2, 4)]
    figures = benchmark_figures([*results, broken, *by_k])
    assert set(figures) == {"damage_against_speed_up", "psnr_against_speed_up", "damage_against_k"}
    assert all(figure_png(figure, dpi=50).startswith(b"\x89PNG") for figure in figures.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ways": ("latent-shift:best",)}, "way of choosing: got"),
        ({"unit": "beauty"}, "unit: got 'beauty'"),
        ({"goals": (1.2,)}, "goals: got 1.2"),
        ({"goals": (), "ways": ("random:ratio",)}, "nothing to compare"),
        ({"test_seeds": 1}, "test_seeds: got 1"),
        ({"calibrations": 0}, "calibrations: got 0"),
    ],
)
def test_settings_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(SETTINGS, **changes)


def test_the_command_writes_everything(tmp_path, capsys):
    flags = {"data_free": 2, "data_free_steps": 1, "train_batch_size": 2}
    (tmp_path / "kd.yaml").write_text(json.dumps(flags))
    options = [
        "--macs", "0.1", "--ways", "latent-shift:ratio", "--kinds", "FeedForward", "--prompt", "pizza", "--num-inference-steps", "1",
        "--seeds", "1", "--guidance-scale", "1", "--test-seeds", "2", "--after-kd", "1", "--kd-config", str(tmp_path / "kd.yaml"),
    ]  # fmt: skip
    assert cli.main(["benchmark", "demo:emoji", "-o", str(tmp_path), *options]) == 0
    out = capsys.readouterr().out
    assert (
        "| macs -10% | **latent-shift:ratio** | one-shot |" in out and (tmp_path / "benchmark.md").read_text() in out
    )
    names = {p.name for p in tmp_path.iterdir()}
    assert {
        "benchmark.csv",
        "damage_against_speed_up.png",
        "psnr_against_speed_up.png",
        "results.jsonl",
        "distilled",
    } <= names
    assert "damage_against_speed_up_after_1_steps.png" in names
