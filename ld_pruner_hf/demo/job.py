"""The demo as one job: score a shipped pipeline, prune it at several k, draw with every criterion, and write one page."""

from __future__ import annotations

import html
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from .. import report, reporting
from ..latents import final_latents, find_denoiser, preserved, steps_argument
from ..measurements import environment_of
from ..pipeline import make_plan, profile, prune, score
from ..plan import PruningPlan, write_atomically
from ..profiling import Profile
from ..scores import OperatorScores
from ..selection import check_k
from . import PROMPTS, load

Pictures = reporting.Samples
KS = {"emoji": (10, 20, 30, 42, 80, 160), "clothing": (5, 10, 20, 30, 42, 80), "digits": (5, 10, 20, 30, 42, 80)}
"""How many operators to take out of each: up to about half of its candidates."""


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs with; the defaults take a few minutes on two CPU cores.

    Attributes:
        name: which shipped pipeline. ks: how many operators to take out.
        score_prompts, seeds, num_inference_steps: scoring; without guidance, which halves its cost. A pipeline without prompts
            gets as many latents from that many more seeds.
        pictures, picture_steps, guidance_scale: the pictures or sounds: how many, denoising steps, classifier-free guidance.
        rounds, repeats: rounds in which latency is measured, and timed denoiser calls in each. include: patterns of operators to score; all if empty.
    """

    name: str = "emoji"
    ks: tuple[int, ...] = KS["emoji"]
    score_prompts: int = 3
    seeds: int = 2
    num_inference_steps: int = 3
    pictures: int = 6
    picture_steps: int = 15
    guidance_scale: float = 3.0
    rounds: int = 3
    repeats: int = 10
    include: tuple[str, ...] = ()

    @property
    def k_to_save(self) -> int:
        """The k whose pipeline is saved and loaded again."""
        return 20 if 20 in self.ks else self.ks[0]

    @property
    def prompts(self) -> list[str] | None:
        """What the pipeline can be asked for; None if it is unconditional."""
        return PROMPTS.get(self.name)

    @property
    def labels(self) -> list[str]:
        """A name for each picture or sound."""
        return self.prompts[: self.pictures] if self.prompts else [f"seed {i}" for i in range(self.pictures)]


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured; `equal_after_reload`: whether saving and loading changed no bit of the final latents."""

    settings: DemoSettings
    scores: OperatorScores
    plans: dict[str, dict[int, PruningPlan]]
    pictures: Pictures
    profiles: dict[str, Profile]
    equal_after_reload: bool
    device: str


def run_demo(folder: str | Path, settings: DemoSettings | None = None, device: str = "cpu") -> DemoResult:
    """Run the whole demo and write its files into `folder`; a second run takes the scores that are already there.

    Raises:
        ValueError: unknown pipeline, impossible k. PlanError: the folder holds scores of other settings.
        ImportError: matplotlib is not installed.
    """
    settings, folder = settings or DemoSettings(), Path(folder)
    report.require_matplotlib()
    stage = _Stages()
    stage(f"loading demo:{settings.name}")
    pipe = _load(settings.name, device)
    denoiser = getattr(pipe, find_denoiser(pipe))
    for k in settings.ks:
        check_k(k, sum(1 for m in denoiser.modules() if not list(m.children())))
    folder.mkdir(parents=True, exist_ok=True)
    stage(f"scoring the operators of its denoiser; rows go to {folder / 'scores.jsonl'}")
    scores = score_demo(pipe, folder, settings)
    plans = {c: {k: make_plan(pipe, k, scores=scores, criterion=c) for k in settings.ks} for c in scores.criteria}
    stage(f"drawing {len(settings.labels)} samples with every criterion and k")
    call = picture_options(pipe, settings)
    pictures = reporting.draw_all(pipe, plans, call, settings.prompts, len(settings.labels))
    stage("pruning for good, measuring, saving, loading again")
    profiles, equal = _prune_and_measure(plans[scores.criterion], folder, settings, device)
    result = DemoResult(settings, scores, plans, pictures, profiles, equal, device)
    stage("writing figures and the page")
    _write(folder, result)
    stage(f"done: {folder / 'index.html'}")
    return result


class _Stages:
    """Prints one line when a stage begins, with the time since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    def __call__(self, text: str) -> None:
        print(f"[{time.perf_counter() - self.start:5.0f} s] {text}", flush=True)


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """No bars for loading inside: the pipelines are small and the demo has bars of its own."""
    loggers = [log for log in (diffusers_logging, transformers_logging) if log.is_progress_bar_enabled()]
    for log in loggers:
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log in loggers:
            log.enable_progress_bar()


def _load(name: str, device: str) -> Any:
    with _quiet_loading():
        pipe: Any = load(name)
    pipe.to(device)
    pipe.set_progress_bar_config(leave=False)
    return pipe


def score_demo(pipe: Any, folder: Path, settings: DemoSettings) -> OperatorScores:
    """Score with the demo's short setting: all latents in one batch, no guidance."""
    call: dict[str, Any] = {"guidance_scale": 1.0} if settings.prompts else {}
    batch = settings.score_prompts * settings.seeds
    scores = score(
        pipe, settings.prompts and settings.prompts[: settings.score_prompts],
        num_inference_steps=settings.num_inference_steps, seeds=settings.seeds if settings.prompts else batch,
        batch_size=batch, include=list(settings.include), resume_from=folder / "scores.jsonl", **call,
    )  # fmt: skip
    scores.to_csv(folder / "scores.csv")
    scores.to_json(folder / "scores.json")
    return scores


def picture_options(pipe: Any, settings: DemoSettings) -> dict[str, Any]:
    """The pipeline's arguments for the demo's samples, apart from prompts and seeds."""
    guidance = {"guidance_scale": settings.guidance_scale} if settings.prompts else {}
    return steps_argument(pipe, settings.picture_steps) | guidance


def _prune_and_measure(
    plans: dict[int, PruningPlan], folder: Path, settings: DemoSettings, device: str
) -> tuple[dict[str, Profile], bool]:
    """(column -> profile, did saving and loading keep every bit). Each k starts from a fresh pipeline."""
    models = {"original": _load(settings.name, device)}
    for k, plan in plans.items():
        pruned = models[f"k = {k}"] = _load(settings.name, device)
        prune(pruned, plan).save(folder / f"plan_k{k}.json")
    saved = models[f"k = {settings.k_to_save}"]
    saved.save_pretrained(folder / "pruned")
    with _quiet_loading():
        again: Any = DiffusionPipeline.from_pretrained(folder / "pruned")
    equal = torch.equal(_latents(saved, settings), _latents(again.to(device), settings))
    return _measure_in_turn(models, settings), equal


def _measure_in_turn(models: dict[str, Any], settings: DemoSettings) -> dict[str, Profile]:
    """The profile of each model from its quickest round. The models take turns, so that a busy moment hits no model alone."""
    call: dict[str, Any] = {}
    if settings.prompts:
        call = {"prompt": settings.prompts[0], "guidance_scale": settings.guidance_scale}
    best: dict[str, Profile] = {}
    with tqdm(total=settings.rounds * len(models), desc="measuring", unit="model") as bar:
        for _ in range(settings.rounds):
            for name, pipe in models.items():
                measured = profile(pipe, repeats=settings.repeats, **call)
                if name not in best or (measured.latency_ms or 0.0) < (best[name].latency_ms or 0.0):
                    best[name] = measured
                bar.update()
    return best


def _latents(pipe: Any, settings: DemoSettings) -> torch.Tensor:
    n = len(settings.labels)
    batch = {"prompt": settings.labels} if settings.prompts else {"batch_size": n}
    with preserved(pipe):
        return final_latents(pipe, picture_options(pipe, settings) | batch, range(n))


# ---- what is written -------------------------------------------------------------------------------------------------


def _write(folder: Path, result: DemoResult) -> None:
    """Figures, grids, tables, README.md and index.html."""
    labels = result.settings.labels
    reporting.save_samples(folder, result.pictures, labels)
    figures = reporting.operator_figures(result.scores, result.plans[result.scores.criterion])
    for name, figure in figures.items():
        (folder / f"{name}.png").write_bytes(report.figure_png(figure("light")))
    report.save_csv(folder / "costs.csv", report.cost_rows(result.profiles))
    write_atomically(folder / "README.md", _readme(result))
    write_atomically(folder / "index.html", _page(result, figures, labels))


def _scoring_text(result: DemoResult) -> str:
    s = result.settings
    if s.prompts:
        prompts = s.prompts[: s.score_prompts]
        latents, guidance = f"{len(prompts)} prompts ({', '.join(prompts)}) x {s.seeds} seeds", "no guidance, "
    else:
        latents, guidance = f"{s.score_prompts * s.seeds} seeds", ""
    return f"{latents}, {s.num_inference_steps} denoising steps, {guidance}criterion {result.scores.criterion}"


def _share(value: float | None) -> str:
    return "" if value is None else f"\n{100 * (value - 1):+.1f} %".replace("-", "−")


def _cost_cells(result: DemoResult) -> list[list[str]]:
    rows = []
    for i, row in enumerate(report.cost_rows(result.profiles)):
        shares = ["", "", ""] if i == 0 else [_share(row[c]) for c in ("params_share", "macs_share", "latency_share")]
        rows.append(
            [
                row["model"],
                f"{row['params'] / 1e6:.2f} M{shares[0]}",
                f"{row['macs'] / 1e9:.3f} G{shares[1]}",
                f"{row['latency_ms']:.1f} ms{shares[2]}",
                f"{row['latency_iqr_ms']:.1f} ms",
            ]
        )
    return rows


def _facts(result: DemoResult) -> list[tuple[str, str]]:
    rows = result.scores.rows
    k = result.settings.k_to_save
    costs = {row["model"]: row for row in report.cost_rows(result.profiles)}[f"k = {k}"]
    minutes = sum(row.seconds for row in rows) / 60
    return [
        (str(len({row.path for row in rows})), "operators that can be taken out, scored one at a time"),
        (f"{minutes:.1f} min", f"to score them with {len(rows)} stand-ins"),
        (_share(costs["params_share"]).strip(), f"parameters of the denoiser when {k} operators are taken out"),
        (_share(costs["macs_share"]).strip(), "multiply-accumulates (MACs) of the denoiser, likewise"),
    ]


def _page(result: DemoResult, figures: dict[str, Any], labels: Sequence[str]) -> str:
    s, p = result.settings, result.profiles["original"]
    samples = f"{p.batch_size} samples (one picture under guidance)" if s.prompts else f"batch size {p.batch_size}"
    note = (
        f'<p class="note">One denoiser call with {samples}: the median of {s.repeats} calls '
        f"in the quickest of {s.rounds} rounds, in which the models took turns. IQR is the distance of the quartiles in that round; "
        f"a difference in latency that is smaller says nothing. MACs are for one sample. {html.escape(environment_of(result.profiles['original']))}.</p>"
    )
    guidance = f", guidance {s.guidance_scale:g}" if s.prompts else ""
    drawn = (
        f"{s.picture_steps} denoising steps{guidance}, the same noise along each line. Nothing was trained "
        "after pruning."
    )
    head = ["Model", "Parameters", "MACs", "Latency", "IQR"]
    argument = f'"{labels[0]}"' if s.prompts else ""
    kept = "equal, bit for bit, to" if result.equal_after_reload else "NOT equal to"
    saved = (
        f"<p>The pipeline with k = {s.k_to_save} is in <code>pruned/</code>. It was loaded again from there, and its final latents for "
        f"the {len(labels)} samples above are <b>{kept}</b> those of the pipeline that was saved.</p>"
        f"<pre>import ld_pruner_hf\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("pruned")\npipe({argument}).images[0]</pre>'
    )
    settings = [[k.replace("_", " "), str(v)] for k, v in asdict(s).items() if v not in (None, ())]
    sections = [
        (
            "What is left of the samples",
            reporting.samples_section(result.pictures, result.plans, result.scores.criterion, labels, drawn),
        ),
        ("What pruning saves", report.table_html(head, _cost_cells(result)) + note),
        *reporting.operator_sections(result.scores, figures, _scoring_text(result)),
        ("Saved and loaded again", saved),
        ("Settings", report.table_html(["Setting", "Value"], settings, text_columns=2)),
    ]  # fmt: skip
    lead = (
        f"Every operator of the demo pipeline “{s.name}” was replaced, one at a time, by something cheaper, and the score says how far "
        "that moves the final latents, before any decoding. Then the k operators with the lowest scores were replaced together. Read "
        "the samples from left to right: as long as a column looks like the first, those operators were not needed."
    )
    return report.render_page(
        "What can this pipeline do without?",
        lead,
        _facts(result),
        sections,
        f"Made by ld-pruner demo. {environment_of(result.profiles['original'])}.",
    )


def _readme(result: DemoResult) -> str:
    """A short text with the numbers and what each file is."""
    lines = [
        f"# ld-pruner demo: {result.settings.name}",
        "",
        f"Scoring: {_scoring_text(result)}.",
        f"Measured on {environment_of(result.profiles['original'])}.",
        "",
    ]
    lines += ["| model | parameters | MACs a sample | latency | IQR |", "|---|---|---|---|---|"]
    lines += [
        "| " + " | ".join(c.replace("\n", " (") + (")" if "\n" in c else "") for c in row) + " |"
        for row in _cost_cells(result)
    ]
    state = "equal" if result.equal_after_reload else "NOT equal"
    lines += [
        "",
        f"Final latents of `pruned/` (k = {result.settings.k_to_save}) after loading again: {state} bit for bit.",
        "",
    ]
    files = {
        "index.html": "everything on one page, no network needed",
        "scores.jsonl, scores.json, scores.csv": "the scores: row by row as measured (resumable), as one document, ranked",
        "importance_by_block.png": "importance of every operator by block",
        "modified_by_type.png, modified_by_block.png": "what each k takes out",
        "grid_<criterion>.png": "samples (spectrograms of sounds, which are in sounds/): the original and each k",
        "costs.csv": "parameters, MACs and latency",
        "plan_k<k>.json": 'pruning plans; `pipe.prune("plan_k20.json")` applies one',
        "pruned/": "a pruned pipeline for `DiffusionPipeline.from_pretrained`, after `import ld_pruner_hf`",
    }
    return "\n".join(lines + [f"- `{name}`: {what}" for name, what in files.items()]) + "\n"
