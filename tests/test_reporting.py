"""The report: one page with everything on it, and a file for each figure, grid, table and sound."""

from __future__ import annotations

import html
import re

import numpy as np
import pytest
import tiny
from PIL import Image
from test_evaluation import audio_pipeline

from ld_pruner_hf import cli, report, score
from ld_pruner_hf.evaluation import Evaluation, Measurement
from ld_pruner_hf.pipeline import make_plan
from ld_pruner_hf.reporting import ReportContent, draw, draw_all, read_log, spectrogram, write_report
from ld_pruner_hf.sweep import Sweep, SweepRow

LOG = "step,loss,task,output,feature,lr,images_per_s\n1,2.0,1.0,0.5,,0.1,3\n2,1.0,0.5,0.2,,0.1,3\n"


def a_sweep() -> Sweep:
    rows = [
        SweepRow(k, q, 0.5, 1 - k / 100, 1.0, 1 + k / 100, 1.0, 1.2, 50) for k, q in ((0, 10.0), (2, 10.5), (4, 40.0))
    ]
    return Sweep(
        "p", "FID", "some/extractor", "ref (9 samples)", False, 0.1, tuple(rows), "cpu", "ld-pruner sweep"
    ).judged()


def an_evaluation() -> Evaluation:
    results = (
        Measurement("A", "FID", 12.345, uncertainty=0.5, extractor="some/extractor", n=50, device="a cpu", command="ld-pruner evaluate x"),
        Measurement("B", "FID", 23.456, extractor="some/extractor", n=50, device="a cpu"),
    )  # fmt: skip
    skipped = ({"name": "DINO", "model": "B", "reason": "no network"},)
    return Evaluation({"A": "original", "B": "<pruned>"}, results, skipped, ("3 silent",))


def check_page(page: str) -> None:
    """Self-contained: no script, nothing from the network."""
    links = re.findall(r'(?:src|srcset|href)="([^"]{0,30})', page)
    assert links and all(link.startswith(("data:image/png;base64,", "data:audio/wav;base64,")) for link in links)
    assert "<script" not in page and "://" not in page and "prefers-color-scheme: dark" in page


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    pipe = tiny.ldm()
    pipe.save_pretrained(root / "pipe")
    score(pipe, num_inference_steps=1, seeds=1, include=["mid_block*"]).save(root / "scores.jsonl")
    a_sweep().save(root / "sweep.json")
    an_evaluation().save(root / "evaluation.json")
    (root / "run1").mkdir()
    (root / "run1" / "log.csv").write_text(LOG)
    return root


def test_the_command_writes_page_and_files(made, tmp_path, capsys):
    argv = [
        "report", made / "pipe", "--scores", made / "scores.jsonl", "-o", tmp_path, "--k", 1, 3, "--samples", 2, "--sweep", made,
        "--evaluation", made / "evaluation.json", "--training-log", made / "run1" / "log.csv", "--num-inference-steps", 1,
        "--device", "cpu",
    ]  # fmt: skip
    assert cli.main([str(a) for a in argv]) == 0, capsys.readouterr().err
    page = (tmp_path / "index.html").read_text()
    check_page(page)
    for text in ("Quality against speed", "Before and after: original, &lt;pruned&gt;", "Finetuning", "Which operators matter",
                 "by block", "k = 3", "latent-shift-mean", "23.46", "some/extractor", "DINO of B not measured: no network",
                 "Recommended: k = 2"):  # fmt: skip
        assert text in page, text
    names = {f.name for f in tmp_path.iterdir()}
    assert names >= {
        "importance_by_block.png", "modified_by_type.png", "modified_by_block.png", "quality_over_k.png",
        "quality_against_speed_up.png", "training.png", "operators.csv", "sweep.csv", "evaluation.csv",
        "grid_latent-shift.png", "grid_latent-shift-std.png",
    }  # fmt: skip
    assert "12.345" in (tmp_path / "evaluation.csv").read_text()


def test_sections_without_content_are_left_out(made, tmp_path):
    argv = ["report", made / "pipe", "--scores", made / "scores.jsonl", "-o", tmp_path, "--k", 2, "--samples", 1,
            "--num-inference-steps", 1, "--criteria", "latent-shift", "--device", "cpu"]  # fmt: skip
    assert cli.main([str(a) for a in argv]) == 0
    page = (tmp_path / "index.html").read_text()
    assert "Finetuning" not in page and "Before and after" not in page and "Quality against" not in page
    assert not (tmp_path / "sweep.csv").exists()


def test_samples_are_of_the_prompts_that_were_scored(tmp_path):
    pipe = tiny.stable_diffusion()
    pipe.save_pretrained(tmp_path / "pipe")
    prompts = ["red heart", "it's a cat face"]
    score(pipe, prompts, num_inference_steps=1, seeds=1, include=["mid_block*"]).save(tmp_path / "scores.jsonl")
    argv = ["report", tmp_path / "pipe", "--scores", tmp_path / "scores.jsonl", "-o", tmp_path / "out", "--k", 1,
            "--num-inference-steps", 1, "--criteria", "latent-shift", "--device", "cpu"]  # fmt: skip
    assert cli.main([str(a) for a in argv]) == 0
    page = html.unescape((tmp_path / "out" / "index.html").read_text())
    assert all(prompt in page for prompt in prompts) and "lighthouse" not in page


def test_sounds_have_players_and_spectrograms(tmp_path):
    pipe = audio_pipeline()
    scores = score(pipe, num_inference_steps=1, seeds=1, include=["mid_block*"])
    plans = {"latent-shift": {1: make_plan(pipe, 1, scores=scores)}}
    before = tiny.snapshot(pipe)
    samples = draw_all(pipe, plans, {"steps": 1}, None, 2)
    assert tiny.differences(before, tiny.snapshot(pipe)) == []
    write_report(tmp_path, ReportContent("sounds", scores, plans, samples, ["seed 0", "seed 1"], "How."))
    page = (tmp_path / "index.html").read_text()
    check_page(page)
    assert page.count("<audio controls") == 4 and 'alt="spectrogram of seed 1, k = 1"' in page
    assert len(list((tmp_path / "sounds").glob("*.wav"))) == 4


def test_a_spectrogram_shows_the_tone():
    picture = np.asarray(spectrogram(np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000)).convert("L"), int)
    assert picture.shape[0] == 128 and abs(picture.mean(1).argmax() - (127 - 1000 / 8000 * 128)) <= 2


def test_samples_do_not_depend_on_how_many_are_drawn():
    pipe = tiny.ldm()
    one, three = (draw(pipe, {"num_inference_steps": 1}, None, n) for n in (1, 3))
    assert np.abs(np.asarray(one[0], int) - np.asarray(three[0], int)).max() <= 1
    assert isinstance(one[0], Image.Image) and len(three) == 3


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_of_curves(theme):
    rows = a_sweep().table()
    for figure in (
        report.quality_figure(rows, "FID", (2, 4), 2, theme),
        report.quality_figure(rows, "FID", None, 0, theme),
        report.tradeoff_figure(rows, "FID", theme),
        report.training_figure({"a": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}], "b": [{"step": 1, "loss": 3.0}]}, theme),
    ):  # fmt: skip
        assert report.figure_png(figure, dpi=40).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="at least one loss term"):
        report.training_figure({"a": [{"step": 1, "lr": 2.0}]})


def test_the_training_figure_shows_each_term_and_run():
    rows = [{"step": i, "loss": 2.0 / i, "output": 1.0 / i, "lr": 0.1} for i in range(1, 5)]
    figure = report.training_figure({"a": rows, "b": rows})
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "output"]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]


def test_logs(tmp_path):
    (tmp_path / "log.csv").write_text(LOG)
    assert read_log(tmp_path / "log.csv")[1] == {
        "step": 2,
        "loss": 1,
        "task": 0.5,
        "output": 0.2,
        "lr": 0.1,
        "images_per_s": 3,
    }
    (tmp_path / "log.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="with a column 'step'"):
        read_log(tmp_path / "log.csv")
    (tmp_path / "log.csv").write_text("step\nx\n")
    with pytest.raises(ValueError, match="table of numbers"):
        read_log(tmp_path / "log.csv")
