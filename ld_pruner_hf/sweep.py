"""Quality and measured speed-up over k: where the cliff is, and how many operators to take out."""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from . import report
from .evaluation import (
    METRICS,
    EvaluationSettings,
    Judge,
    Measurement,
    generate,
    open_samples,
    speed_up,
    time_in_turns,
)
from .evaluation.generation import kind_of
from .evaluation.run import call_of, check_metrics, device_text, open_reference, prepare
from .latents import call_parameters, find_denoiser, only_one, preserved, record_call
from .loading import pick_device
from .modeling import prune_
from .plan import FORMAT_VERSION, SEVERAL, PlanError, PruningPlan, read_json, write_atomically
from .planning import make_plan
from .profiling import count_macs, device_of, run
from .scores import OperatorScores
from .surgery import applied, count_params

SWEEP_FORMAT = "ld_pruner_hf.sweep"
SWEEP_FILE = "sweep.json"
DEFAULT_KS = (10, 20, 30, 42, 80, 160)


@dataclass(frozen=True)
class SweepRow:
    """One k: quality with its uncertainty, what is left of parameters and MACs (shares), and how many times quicker a call is.

    Attributes:
        resamples: the quality of bootstrap resamples, the same samples at every k; empty where the metric has none.
    """

    k: int
    quality: float
    uncertainty: float
    params_share: float
    macs_share: float
    speed_up: float
    speed_up_low: float
    speed_up_high: float
    n: int
    resamples: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """All rows, the original (k = 0) first, and what follows from them.

    Attributes:
        metric, extractor, dataset, device, command, pipeline: what the numbers depend on.
        cliff: neighbouring k between which quality falls most steeply; None where it never falls beyond the noise.
        recommended, reason: how many operators to take out (0: none), and why.
    """

    pipeline: str
    metric: str
    extractor: str | None
    dataset: str | None
    higher_is_better: bool
    tolerance: float
    rows: tuple[SweepRow, ...]
    device: str
    command: str
    cliff: tuple[int, int] | None = None
    recommended: int = 0
    reason: str = ""

    def judged(self) -> Sweep:
        """With cliff and recommendation."""
        cliff = find_cliff(self.rows, self.higher_is_better)
        k, reason = recommend(self.rows, cliff, self.tolerance, self.metric, self.higher_is_better)
        return replace(self, cliff=cliff, recommended=k, reason=reason)

    def save(self, path: str | Path) -> None:
        data = {"format": SWEEP_FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        write_atomically(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Read what `save` wrote. PlanError: missing, damaged, or of another format."""
        data = read_json(path, SWEEP_FORMAT)
        try:
            known = {f.name: data[f.name] for f in fields(cls)}
            known["rows"] = tuple(map(_row, known["rows"]))
            known["cliff"] = None if known["cliff"] is None else tuple(known["cliff"])
            return cls(**known)
        except (KeyError, TypeError) as error:
            raise PlanError(f"{path}: not a complete sweep ({error!r}); run it again") from error

    def table(self) -> list[dict[str, Any]]:
        rows = [asdict(row) | {"metric": self.metric} for row in self.rows]
        return [{k: v for k, v in row.items() if k != "resamples"} for row in rows]

    def __str__(self) -> str:
        lines = [
            f"{'k':>5} {self.metric:>10} {'+-':>8} {'params':>7} {'MACs':>7} {'speed-up':>9} {'99% interval':>14}"
        ]
        for r in self.rows:
            mark = " <- recommended" if r.k == self.recommended else ""
            if self.cliff and r.k == self.cliff[1]:
                mark += " <- behind the cliff"
            lines.append(
                f"{r.k:>5} {r.quality:>10.4g} {r.uncertainty:>8.2g} {r.params_share:>7.1%} {r.macs_share:>7.1%} "
                f"{r.speed_up:>8.2f}x {r.speed_up_low:>6.2f} - {r.speed_up_high:.2f}{mark}"
            )
        return "\n".join([*lines, self.reason, f"{self.metric} with {self.extractor}; measured on {self.device}"])


def _row(data: dict[str, Any]) -> SweepRow:
    return SweepRow(**{**data, "resamples": tuple(data.get("resamples", ()))})


def _noise(a: SweepRow, b: SweepRow) -> float:
    """Twice the standard deviation of the difference of two rows: over pairs of resamples where both have them."""
    if a.resamples and len(a.resamples) == len(b.resamples) and a.n == b.n:
        return 2 * statistics.stdev(x - y for x, y in zip(a.resamples, b.resamples, strict=True))
    return 2 * math.hypot(a.uncertainty, b.uncertainty)


def _loss(row: SweepRow, original: SweepRow, higher_is_better: bool) -> float:
    """How much worse a row's quality is than the original's, in the metric's units."""
    return (original.quality - row.quality) if higher_is_better else (row.quality - original.quality)


def find_cliff(rows: Sequence[SweepRow], higher_is_better: bool = False) -> tuple[int, int] | None:
    """The neighbouring k between which quality falls most steeply per operator taken out.

    Falls of less than twice the standard deviation of the difference are none.
    """
    best, steepest = None, 0.0
    for a, b in itertools.pairwise(rows):
        fall = _loss(b, a, higher_is_better)
        if fall > _noise(a, b) and fall / (b.k - a.k) > steepest:
            best, steepest = (a.k, b.k), fall / (b.k - a.k)
    return best


def recommend(
    rows: Sequence[SweepRow],
    cliff: tuple[int, int] | None,
    tolerance: float,
    metric: str,
    higher_is_better: bool = False,
) -> tuple[int, str]:
    """The largest k before the cliff, up to which quality stays within `tolerance` (a share) of the original's; and why."""
    original = rows[0]
    allowed = tolerance * abs(original.quality)
    chosen, stopped = original, None
    for row in rows[1:]:
        if cliff and row.k > cliff[0]:
            stopped = (row, "it lies behind the cliff")
            break
        if _loss(row, original, higher_is_better) > max(allowed, _noise(row, original)):
            stopped = (row, f"more than {tolerance:.0%} worse")
            break
        chosen = row
    what = f"{metric} {chosen.quality:.4g} (original {original.quality:.4g})"
    if chosen is original:
        text = f"k = 0: no operator should go without finetuning, at the original's {metric} of {original.quality:.4g}"
    else:
        text = (
            f"k = {chosen.k}: {what}, within {tolerance:.0%} or the noise; {chosen.params_share:.0%} of the parameters are left, "
            f"{chosen.speed_up:.2f}x the speed ({chosen.speed_up_low:.2f} to {chosen.speed_up_high:.2f})"
        )
    if stopped:
        row, why = stopped
        text += f"; the next, k = {row.k}, has {row.quality:.4g}: {why}"
    return chosen.k, text


def sweep(
    pipeline: str,
    scores: OperatorScores,
    output: str | Path,
    ks: Sequence[int] = DEFAULT_KS,
    metric: str = "fid",
    settings: EvaluationSettings | None = None,
    criterion: str | None = None,
    tolerance: float = 0.1,
) -> Sweep:
    """Measure the pipeline with k of its least important operators taken out, for each k, and the original.

    Samples and finished rows are kept in `output`; an interrupted sweep goes on with them.

    Raises:
        ValueError: an impossible k, scores of several components, an unknown metric, or one without what it needs: before
            anything is generated.
        PlanError: scores of another model, or rows of other settings in `output`.
    """
    only_one(scores.component.split(SEVERAL), "sweep")
    settings, output = replace(settings or EvaluationSettings(), metrics=(metric,)), Path(output)
    check_metrics(settings, two=False)
    report.require_matplotlib()
    pipe = prepare(pipeline, settings)
    plans = {k: make_plan(pipe, k, scores=scores, criterion=criterion) for k in sorted(set(ks))}
    kind = kind_of(pipe)
    judge = Judge(settings, kind, (metric,))
    rows_file = _Rows(output / "rows.json", _header(scores, criterion, metric, settings))
    reference = open_reference(settings, kind, output, getattr(pipe, "mel", None))

    def measured(k: int, plan: PruningPlan | None) -> Measurement:
        folder = output / f"k{k:04d}"
        _generate(pipe, plan, folder, settings)
        return judge.measure(metric, f"k = {k}", open_samples(folder, kind).subset(settings.n), reference)

    original = measured(0, None)
    for k, plan in ((0, None), *plans.items()):
        if not rows_file.done(k):
            found = measured(k, plan) if k else original
            cost, resamples = _costs(pipe, plan, settings), tuple(found.details.get("bootstrap", ()))
            rows_file.add(
                SweepRow(k, found.value, found.uncertainty or 0.0, **cost, n=found.n or 0, resamples=resamples)
            )
    result = Sweep(
        pipeline, METRICS[metric].title, original.extractor, original.dataset, METRICS[metric].higher_is_better, tolerance,
        tuple(rows_file.rows[k] for k in (0, *plans)), device_text(pick_device(settings.device), settings.dtype),
        settings.command,
    ).judged()  # fmt: skip
    result.save(output / SWEEP_FILE)
    report.save_csv(output / "sweep.csv", result.table())
    for name, figure in figures(result).items():
        (output / f"{name}.png").write_bytes(report.figure_png(figure("light")))
    return result


def figures(result: Sweep) -> dict[str, Callable[[str], Any]]:
    """File name -> theme -> figure."""
    rows = result.table()
    return {
        "quality_over_k": lambda theme: report.quality_figure(
            rows, result.metric, result.cliff, result.recommended, theme
        ),
        "quality_against_speed_up": lambda theme: report.tradeoff_figure(rows, result.metric, theme),
    }


def _header(
    scores: OperatorScores, criterion: str | None, metric: str, settings: EvaluationSettings
) -> dict[str, Any]:
    """What rows must have in common to stand in one table."""
    same = ("n", "prompts", "reference", "reference_n", "num_inference_steps", "call", "seed", "scheduler", "resolution",
            "extractors", "dtype")  # fmt: skip
    header = {"weights": scores.weights, "criterion": criterion or scores.criterion, "metric": metric}
    return json.loads(json.dumps(header | {name: getattr(settings, name) for name in same}))


class _Rows:
    """The finished rows, in a file that is written anew after each."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path, self.header = path, header
        self.rows: dict[int, SweepRow] = {}
        if path.exists():
            data = read_json(path, SWEEP_FORMAT)
            differ = [k for k, v in header.items() if data.get("header", {}).get(k) != v]
            if differ:
                raise PlanError(f"{path}: made with other settings ({', '.join(differ)}); choose another folder")
            self.rows = {row["k"]: _row(row) for row in data["rows"]}

    def done(self, k: int) -> bool:
        return k in self.rows

    def add(self, row: SweepRow) -> None:
        self.rows[row.k] = row
        data = {"format": SWEEP_FORMAT, "version": FORMAT_VERSION, "header": self.header}
        write_atomically(
            self.path, json.dumps(data | {"rows": [asdict(r) for r in self.rows.values()]}, indent=1) + "\n"
        )


def _generate(pipe: Any, plan: PruningPlan | None, folder: Path, settings: EvaluationSettings) -> None:
    how: dict[str, Any] = {
        "prompts": settings.prompts, "call": call_of(pipe, settings), "seed": settings.seed,
        "batch_size": settings.batch_size, "resolution": settings.resolution,
    }  # fmt: skip
    if plan is None:
        generate(pipe, folder, settings.n, **how)
        return
    with preserved(pipe), applied(getattr(pipe, plan.component), plan):
        generate(pipe, folder, settings.n, **how)


def _costs(pipe: Any, plan: PruningPlan | None, settings: EvaluationSettings) -> dict[str, float]:
    """Shares of the original's parameters and MACs, and the speed-up of one denoiser call, measured in turns with it."""
    if plan is None:
        same = {"params_share": 1.0, "macs_share": 1.0}
        return same | {"speed_up": 1.0, "speed_up_low": 1.0, "speed_up_high": 1.0}
    call = call_of(pipe, settings)
    if settings.prompts and "prompt" in call_parameters(pipe):
        call["prompt"] = settings.prompts[0]
    name = find_denoiser(pipe, plan.component)
    original = getattr(pipe, name)
    with preserved(pipe):
        recorded = record_call(pipe, name, call)
        pruned = copy.deepcopy(original).eval()
        prune_(pruned, plan)
        models = {"original": original, "pruned": pruned}
        timings = time_in_turns(
            {label: lambda model=model: run(model, recorded) for label, model in models.items()},  # type: ignore[misc]
            device_of(original), settings.rounds,
        )  # fmt: skip
        gain = speed_up(timings["original"], timings["pruned"])
        macs = [count_macs(model, recorded)[0][""] for model in models.values()]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {
        "params_share": count_params(pruned) / count_params(original), "macs_share": macs[1] / macs[0],
        "speed_up": gain.value, "speed_up_low": gain.low, "speed_up_high": gain.high,
    }  # fmt: skip
