"""ld-pruner report: samples, figures and tables about one pipeline's pruning, as one page and as files."""

from __future__ import annotations

import csv
import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import __version__ as diffusers_version
from PIL import Image
from tqdm.auto import tqdm

from . import report
from .evaluation import Evaluation, Measurement
from .evaluation.generation import kind_of, sample_rate_of, wav_bytes
from .latents import call_parameters, preserved
from .plan import PruningPlan, write_atomically
from .scores import OperatorScores
from .surgery import applied
from .sweep import Sweep
from .sweep import figures as sweep_figures

Sound = tuple[Image.Image, bytes]
"""Spectrogram and wav file."""
Samples = dict[str, dict[str, list[Any]]]
"""criterion -> column ("original", "k = 20") -> pictures or sounds."""
Plans = dict[str, dict[int, PruningPlan]]
"""criterion -> k -> plan."""
Figures = dict[str, Callable[[str], Any]]
"""file name -> theme -> figure."""
SPECTROGRAM_HEIGHT, SPECTROGRAM_RANGE_DB = 128, 80.0


@dataclass(frozen=True)
class ReportContent:
    """What a report shows; what is empty has no section.

    Attributes:
        name: of the pipeline. labels: one a sample. how: one sentence on how the samples were drawn.
        training: name of a run -> rows of its log.csv. evaluations, sweep: read from their files.
    """

    name: str
    scores: OperatorScores
    plans: Plans
    samples: Samples
    labels: list[str]
    how: str
    sweep: Sweep | None = None
    evaluations: tuple[Evaluation, ...] = ()
    training: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)


# ---- samples ---------------------------------------------------------------------------------------------------------


def draw(pipe: Any, call: dict[str, Any], prompts: Sequence[str] | None, n: int) -> list[Any]:
    """n pictures, or n sounds with their spectrograms; the i-th from seed i whatever the model."""
    generators = [torch.Generator("cpu").manual_seed(i) for i in range(n)]
    batch = (
        {"prompt": list(prompts[:n])}
        if prompts
        else {"batch_size": n}
        if "batch_size" in call_parameters(pipe)
        else {}
    )
    if not batch and n > 1:
        return [sample for i in range(n) for sample in _draw_one(pipe, call, i)]
    with preserved(pipe):
        output = pipe(**{**call, **batch, "generator": generators if n > 1 else generators[0]})
    return _samples_of(pipe, output)


def _draw_one(pipe: Any, call: dict[str, Any], seed: int) -> list[Any]:
    with preserved(pipe):
        return _samples_of(pipe, pipe(**{**call, "generator": torch.Generator("cpu").manual_seed(seed)}))


def _samples_of(pipe: Any, output: Any) -> list[Any]:
    if kind_of(pipe) == "image":
        return list(output.images)
    rate = sample_rate_of(pipe)
    waves = [np.asarray(torch.as_tensor(np.asarray(a)).float()).squeeze() for a in output.audios]
    return [(spectrogram(wave), wav_bytes(wave, rate)) for wave in waves]


def spectrogram(wave: np.ndarray) -> Image.Image:
    """Short-time spectrum of a waveform (T,) or (channels, T) in decibel, low frequencies at the bottom, in viridis."""
    from matplotlib import colormaps

    mono = torch.as_tensor(np.asarray(wave, np.float32))
    mono = mono.mean(0) if mono.ndim == 2 else mono
    size = 2 * SPECTROGRAM_HEIGHT
    power = torch.stft(mono, size, size // 4, window=torch.hann_window(size), return_complex=True).abs()[:-1]
    decibel = 20 * power.clamp_min(1e-8).log10()
    level = ((decibel - decibel.max()) / SPECTROGRAM_RANGE_DB + 1).clamp(0, 1).flip(0)
    return Image.fromarray(colormaps["viridis"](level.numpy(), bytes=True)[..., :3])


def draw_all(pipe: Any, plans: Plans, call: dict[str, Any], prompts: Sequence[str] | None, n: int) -> Samples:
    """Samples of the original and of every plan. Plans that modify the same operators alike are drawn once."""
    drawn: dict[Any, list[Any]] = {}
    samples: Samples = {}
    with tqdm(total=1 + sum(map(len, plans.values())), desc="drawing", unit="set") as bar:
        original = draw(pipe, call, prompts, n)
        bar.update()
        for criterion, by_k in plans.items():
            samples[criterion] = {"original": original}
            for k, plan in by_k.items():
                key = tuple((m.path, m.stand_in.name) for m in plan)
                if key not in drawn:
                    with preserved(pipe), applied(getattr(pipe, plan.component), plan):
                        drawn[key] = draw(pipe, call, prompts, n)
                samples[criterion][f"k = {k}"] = drawn[key]
                bar.update()
    return samples


# ---- sections --------------------------------------------------------------------------------------------------------


def samples_html(columns: Mapping[str, Sequence[Any]], labels: Sequence[str]) -> str:
    """Pictures side by side; sounds as spectrograms with players."""
    first = next(iter(columns.values()))[0]
    return (report.sounds_html if isinstance(first, tuple) else report.pictures_html)(columns, labels)


def samples_section(samples: Samples, plans: Plans, default: str, labels: Sequence[str], how: str) -> str:
    """The default criterion's grid, and the other formulae folded away."""
    parts = [
        f'<p class="note">Criterion {html.escape(default)}. {html.escape(how)}</p>',
        samples_html(samples[default], labels),
    ]
    if len(samples) > 1:
        parts.append("<p>The other formulas of the paper, at the same k:</p>")
    for criterion, columns in samples.items():
        if criterion != default:
            same = [f"k = {k}" for k, plan in plans[criterion].items() if plan.paths == plans[default][k].paths]
            note = (
                f'<p class="note">Takes out the same operators as {default} at {", ".join(same)}.</p>' if same else ""
            )
            grid = samples_html(columns, labels)
            parts.append(f"<details><summary>{html.escape(criterion)}</summary>{note}{grid}</details>")
    return "".join(parts)


def extremes_html(scores: OperatorScores, n: int = 6) -> str:
    """Tables of the n least and the n most important operators."""
    ranked = [row for row in scores.ranked() if row.error is None]
    head = ["Operator and what replaces it", "Score"]

    def table(chosen: Sequence[Any]) -> str:
        rows = [[f"{row.path}\n{row.kind} → {row.stand_in.name}", f"{row.score():.3g}"] for row in chosen]
        return report.table_html(head, rows)

    return (
        f"<p>The {n} least important operators:</p>{table(ranked[:n])}"
        f"<p>The {n} most important ones:</p>{table(ranked[-n:])}"
    )


def operator_figures(scores: OperatorScores, plans: Mapping[int, PruningPlan]) -> Figures:
    """Importance of every operator by block; what each plan modifies, by type and by block."""
    labelled = {f"k = {k}": plan for k, plan in plans.items()}
    blocks = report.blocks_in_order(row.path for row in scores)
    return {
        "importance_by_block": lambda theme: report.importance_figure(scores, theme=theme),
        "modified_by_type": lambda theme: report.modified_figure(labelled, "kind", theme),
        "modified_by_block": lambda theme: report.modified_figure(labelled, "block", theme, blocks),
    }


def operator_sections(scores: OperatorScores, figures: Figures, how: str) -> list[tuple[str, str]]:
    """Sections about `operator_figures`."""
    caption = (
        "One mark an operator; blocks from the input (top) to the output, and inside a block likewise. Bars are medians. "
        f"Scores from {how}."
    )
    alt = "Importance of every operator by block of the denoiser"
    importance = report.figure_html(figures["importance_by_block"], alt, caption)
    by = {
        what: report.figure_html(figures[f"modified_by_{what}"], f"Modified operators by {what} for each k")
        for what in ("type", "block")
    }
    return [
        ("Which operators matter", importance + extremes_html(scores)),
        ("What was taken out, by type", by["type"]),
        ("What was taken out, by block", by["block"]),
    ]


def scoring_text(scores: OperatorScores) -> str:
    """How the scores were made, from their own settings."""
    s = scores.settings
    return (
        f"{len(s.get('conditions', ()))} condition(s) x {len(s.get('seeds', ()))} seeds, criterion {scores.criterion}"
    )


def sweep_section(result: Sweep) -> str:
    """Quality over k and against speed, the recommendation, and the table."""
    figures = sweep_figures(result)
    direction = "higher" if result.higher_is_better else "lower"
    rows = [
        [
            "original" if r.k == 0 else f"k = {r.k}", f"{r.quality:.4g}\n± {r.uncertainty:.2g}", f"{r.params_share:.1%}",
            f"{r.macs_share:.1%}", f"{r.speed_up:.2f}x\n{r.speed_up_low:.2f} to {r.speed_up_high:.2f}",
        ]
        for r in result.rows
    ]  # fmt: skip
    note = f"{result.metric} ({direction} is better) of {result.rows[0].n} samples, extractor {result.extractor}"
    note += f", against {result.dataset}" if result.dataset else ""
    return (
        f"<p><b>Recommended: {html.escape(result.reason)}.</b></p>"
        + report.figure_html(figures["quality_over_k"], f"{result.metric} over k")
        + report.figure_html(figures["quality_against_speed_up"], f"{result.metric} against speed-up")
        + report.table_html(["Model", result.metric, "Parameters", "MACs", "Speed-up"], rows)
        + f'<p class="note">{html.escape(note)}. Parameters and MACs left; ± is the standard deviation over bootstrap resamples '
        f"where the metric has no other. Measured on {html.escape(result.device)}.</p>"
    )


def _cell(result: Measurement, evaluation: Evaluation) -> str:
    """A number short enough for a phone, its uncertainty in small print."""
    size = next((p for p in ((1e9, " G"), (1e6, " M")) if not result.unit and abs(result.value) >= p[0]), (1.0, ""))
    small = "" if result.uncertainty is None else f"± {result.uncertainty:.2g}"
    small += "" if result.model in evaluation.models else f" {result.model}"
    unit = f" {result.unit}" if result.unit else ""
    return f"{result.value / size[0]:.4g}{size[1]}{unit}" + (f"\n{small.strip()}" if small else "")


def evaluation_section(evaluation: Evaluation) -> str:
    """The before/after table, with extractors and commands."""
    names = [f"{label}: {name}" for label, name in evaluation.models.items()]
    last = list(evaluation.models)[-1]
    rows = []
    for name, extractor in dict.fromkeys((r.name, r.extractor) for r in evaluation.results):
        found = [r for r in evaluation.results if (r.name, r.extractor) == (name, extractor)]
        compared = {r.model if r.model in evaluation.models else last: _cell(r, evaluation) for r in found}
        rows.append([f"{name}\n{extractor}" if extractor else name, *(compared.get(m, "") for m in evaluation.models)])
    devices = ", ".join(dict.fromkeys(r.device for r in evaluation.results if r.device))
    commands = "\n".join(dict.fromkeys(r.command for r in evaluation.results if r.command))
    notes = [
        *evaluation.notes,
        *(f"{s['name']} of {s['model']} not measured: {s['reason']}" for s in evaluation.skipped),
    ]
    return (
        f"<p>{html.escape('; '.join(names))}.</p>"
        + report.table_html(["", *evaluation.models], rows)
        + "".join(f'<p class="note">{html.escape(note)}</p>' for note in notes)
        + f'<p class="note">Measured on {html.escape(devices)}.</p>'
        + (f"<pre>{html.escape(commands)}</pre>" if commands else "")
    )


# ---- the page --------------------------------------------------------------------------------------------------------


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The rows of a log.csv of `training/distill.py`. ValueError if it has no step."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    try:
        log = [{k: float(v) for k, v in row.items() if v not in ("", None)} for row in rows]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: expected a table of numbers ({error})") from error
    if not log or not all("step" in row for row in log):
        raise ValueError(f"{path}: expected a training log with a column 'step'")
    return log


def write_report(folder: str | Path, content: ReportContent) -> Path:
    """Write index.html and every figure, grid, sound and table on it as a file of its own; returns the page's path."""
    folder = Path(folder)
    report.require_matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    scores, default = content.scores, content.scores.criterion
    figures = operator_figures(scores, content.plans[default])
    sections = [
        (
            "What is left of the samples",
            samples_section(content.samples, content.plans, default, content.labels, content.how),
        )
    ]
    if content.sweep:
        sections.append(("Quality against speed", sweep_section(content.sweep)))
        report.save_csv(folder / "sweep.csv", content.sweep.table())
    for evaluation in content.evaluations:
        sections.append((f"Before and after: {', '.join(evaluation.models.values())}", evaluation_section(evaluation)))
    if content.evaluations:
        report.save_csv(folder / "evaluation.csv", list(_evaluation_rows(content.evaluations)))
    if content.training:
        training: Figures = {"training": lambda theme: report.training_figure(content.training, theme)}
        sections.append(("Finetuning", report.figure_html(training["training"], "Loss terms over the steps")))
    sections += operator_sections(scores, figures, scoring_text(scores))
    every = {
        **figures,
        **(sweep_figures(content.sweep) if content.sweep else {}),
        **(training if content.training else {}),
    }
    for name, figure in every.items():
        (folder / f"{name}.png").write_bytes(report.figure_png(figure("light")))
    save_samples(folder, content.samples, content.labels)
    report.save_csv(folder / "operators.csv", scores.table())
    page = report.render_page(
        f"What can {content.name} do without?",
        "Every operator of the pipeline's denoiser was replaced, one at a time, by something cheaper, and the score says how far "
        "that moves the final latents. Then the k operators with the lowest scores were replaced together.",
        [], sections, f"Made by ld-pruner report. torch {torch.__version__}, diffusers {diffusers_version}.",
    )  # fmt: skip
    write_atomically(folder / "index.html", page)
    return folder / "index.html"


def _evaluation_rows(evaluations: Sequence[Evaluation]) -> Iterator[dict[str, Any]]:
    keys = ("name", "value", "unit", "uncertainty", "extractor", "n", "device", "dataset", "command")
    for evaluation in evaluations:
        for result in evaluation.results:
            yield {"model": evaluation.models.get(result.model, result.model)} | {k: getattr(result, k) for k in keys}


def save_samples(folder: Path, samples: Samples, labels: Sequence[str]) -> None:
    """A grid for each criterion as PNG; and the sounds as wav files, if they are sounds."""
    for criterion, columns in samples.items():
        pictures = {name: [s[0] if isinstance(s, tuple) else s for s in column] for name, column in columns.items()}
        report.picture_grid(pictures, labels).save(folder / f"grid_{criterion}.png")
        for name, column in columns.items():
            for i, sample in enumerate(column):
                if isinstance(sample, tuple):
                    (folder / "sounds").mkdir(exist_ok=True)
                    slug = f"{criterion}_{name}".replace(" = ", "").replace(" ", "_")
                    (folder / "sounds" / f"{slug}_{i}.wav").write_bytes(sample[1])
