"""Which way of choosing does the least damage at the same measured speed? One table over criteria, methods and budgets."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .evaluation.speed import speed_up, time_in_turns
from .latents import Condition, denoise, make_conditions, make_jobs, only_one, preserved, steps_argument
from .pipeline import prune
from .plan import PlanError, PruningPlan, write_atomically
from .planning import SCORING_ONLY, component_of, denoisers_of, first_call
from .presets import PRESETS
from .profiling import count_macs, device_of, run
from .scores import CRITERIA, LATENT_SHIFT, OperatorScores, check_criterion
from .scoring import score_operators
from .selection import METHODS, SAVINGS
from .surgery import count_params
from .trajectory import output_tensor

ONE_SHOT = "one-shot"
RESULTS_FORMAT = "ld_pruner_hf.benchmark"
CLOSE = 0.01  # a measured latency this near to its budget needs no further correction
_WAY = re.compile(r"(?P<criterion>[a-z-]+):(?P<method>[a-z-]+)(?P<fit>\+fit|\+affine)?")


@dataclass(frozen=True)
class Way:
    """One way of choosing operators: `CRITERION:METHOD`, with `+fit` or `+affine` for fitted stand-ins; or a preset's name."""

    name: str
    criterion: str = ""
    method: str = ""
    fit: bool | str = False

    @classmethod
    def parse(cls, text: str) -> Way:
        """Raises ValueError for what is none."""
        if text in PRESETS:
            return cls(text)
        match = _WAY.fullmatch(text)
        methods = (*METHODS, "rounds")
        if match is None or match["method"] not in methods:
            raise ValueError(
                f"way of choosing: got {text!r}, expected CRITERION:METHOD or CRITERION:METHOD+fit (methods: {list(methods)}), or a "
                f"preset ({', '.join(PRESETS)})"
            )
        check_criterion(match["criterion"])
        fit: bool | str = "affine" if match["fit"] == "+affine" else bool(match["fit"])
        return cls(text, match["criterion"], match["method"], fit)

    @property
    def is_preset(self) -> bool:
        return not self.criterion


DEFAULT_WAYS = (
    *(f"{criterion}:top-k" for criterion in LATENT_SHIFT),
    *(f"{criterion}:knapsack" for criterion in ("latent-shift", *(c for c in CRITERIA if c not in LATENT_SHIFT))),
    "latent-shift:ratio", "latent-shift:knapsack+fit", "latent-shift:rounds", "latent-shift:rounds+fit",
)  # fmt: skip
"""The paper's choice in its four forms, every criterion under the same budget, and ours."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds (or a median over rounds, for speed) and its confidence interval."""

    value: float
    low: float
    high: float

    @classmethod
    def over(cls, values: Sequence[float]) -> Interval:
        """Mean and 95% interval of Student's t; an infinite one from a single value."""
        n, mean = len(values), sum(values) / len(values)
        if n < 2 or not math.isfinite(mean):
            return cls(mean, -math.inf if n < 2 else mean, math.inf)
        from scipy.stats import t

        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1) / n)
        half = float(t.ppf(0.975, n - 1)) * spread
        return cls(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Result:
    """One candidate, measured.

    Attributes:
        way: how it was chosen. unit, goal: the budget ("operators" and k, or a share), "preset" and 0 for a preset.
        stage: "one-shot", or "after N steps" of distillation.
        operators: how many were replaced. params, macs: the shares that are gone.
        speed_up: original time / time of one denoiser call, the models in turns; 99% interval over rounds.
        damage: ||latents - original's|| / ||original's||, mean over conditions; 95% interval over seeds.
        psnr: of the decoded outputs against the original's, in dB; 95% interval over seeds. None where nothing is decoded.
    """

    way: str
    unit: str
    goal: float
    stage: str
    operators: int
    params: float
    macs: float
    speed_up: Interval
    damage: Interval
    psnr: Interval | None

    @property
    def key(self) -> tuple[str, str, float, str]:
        return self.way, self.unit, self.goal, self.stage

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        intervals = {k: Interval(**data[k]) if data[k] else None for k in ("speed_up", "damage", "psnr")}
        return cls(**{**data, **intervals})


@dataclass(frozen=True)
class BenchmarkSettings:
    """What is compared, and how it is measured.

    Attributes:
        ways: see `Way`. unit: what budgets count: one of `SAVINGS`. goals: the shares to take away. ks: numbers of operators,
            for the ways whose method is "top-k" or "rounds".
        conditions, num_inference_steps, seeds, call: the runs that operators are scored by; as in `score_operators`.
        include, exclude, kinds: restrict the operators.
        rounds: of the method "rounds".
        test_conditions, test_seeds, test_seed: the runs that candidates are measured by; other seeds than those of the scores,
            and, where given, other conditions.
        test_steps: their denoising steps; default: as for scoring.
        calibrations: under a latency budget, how often the predicted share is corrected so that the measured one fits.
        timing_rounds: how often original and candidate are timed in turns.
    """

    ways: tuple[str, ...] = DEFAULT_WAYS
    unit: str = "latency"
    goals: tuple[float, ...] = (0.1, 0.2, 0.3)
    ks: tuple[int, ...] = ()
    conditions: Any = None
    num_inference_steps: int | None = None
    seeds: int = 2
    call: dict[str, Any] = field(default_factory=dict)
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] | None = None
    kinds: tuple[str, ...] | None = None
    rounds: int = 4
    batch_size: int = 8
    component: str | None = None
    test_conditions: Any = None
    test_seeds: int = 6
    test_seed: int = 1000
    test_steps: int | None = None
    calibrations: int = 5
    timing_rounds: int = 25

    def __post_init__(self) -> None:
        for way in self.ways:
            Way.parse(way)
        if self.unit not in SAVINGS:
            raise ValueError(f"unit: got {self.unit!r}, expected one of {list(SAVINGS)}")
        for goal in self.goals:
            if not 0 < goal < 1:
                raise ValueError(f"goals: got {goal!r}, expected shares to take away, between 0 and 1")
        if not self.goals and not self.ks and not any(Way.parse(way).is_preset for way in self.ways):
            raise ValueError("nothing to compare: give budgets, numbers of operators or presets")
        if self.test_seeds < 2:
            raise ValueError(f"test_seeds: got {self.test_seeds}, expected 2 or more: intervals are over seeds")
        if self.calibrations < 1:
            raise ValueError(f"calibrations: got {self.calibrations}, expected 1 or more: every candidate is measured")

    def candidates(self) -> list[tuple[Way, str, float]]:
        """(way, unit, goal) of everything to measure: those of one budget together."""
        ways = [Way.parse(way) for way in self.ways]
        found = [(way, "preset", 0.0) for way in ways if way.is_preset]
        found += [(way, self.unit, goal) for goal in self.goals for way in ways if not way.is_preset]
        found += [(way, "operators", k) for k in self.ks for way in ways if way.method in ("top-k", "rounds")]
        return found


Finetune = Callable[[Any, int], Any]
"""(pruned pipeline, steps) -> the finetuned pipeline."""


class _Outputs:
    """What a pipeline makes of the test conditions and seeds, against what the original made."""

    def __init__(self, pipe: Any, settings: BenchmarkSettings) -> None:
        steps = settings.test_steps or settings.num_inference_steps
        call = {**settings.call, **steps_argument(pipe, steps)}
        given = settings.conditions if settings.test_conditions is None else settings.test_conditions
        self.conditions: list[Condition] = make_conditions(pipe, given, call)
        self.seeds = range(settings.test_seed, settings.test_seed + settings.test_seeds)
        self.batch_size = settings.batch_size
        self.original = self._run(pipe)

    def _run(self, pipe: Any) -> dict[int, list[tuple[torch.Tensor, torch.Tensor | None]]]:
        """seed -> (final latents, decoded output) of every condition."""
        made: dict[int, list[tuple[torch.Tensor, torch.Tensor | None]]] = {seed: [] for seed in self.seeds}
        with preserved(pipe):
            for job in make_jobs(pipe, self.conditions, self.seeds, self.batch_size):
                latents, decodes = denoise(pipe, job.call, job.seeds)
                decoded = [output_tensor(run(getattr(pipe, name), c)).float().cpu() for name, c in decodes.items()]
                parts = latents.chunk(len(job.seeds))
                pictures = decoded[0].chunk(len(job.seeds)) if decoded else [None] * len(job.seeds)
                for seed, part, picture in zip(job.seeds, parts, pictures, strict=True):
                    made[seed].append((part, picture))
        return made

    def compare(self, pipe: Any) -> tuple[Interval, Interval | None]:
        """(damage, PSNR) of the pipeline."""
        damages, psnrs = [], []
        for seed, runs in self._run(pipe).items():
            pairs = list(zip(self.original[seed], runs, strict=True))
            damages.append(_mean((((b[0] - a[0]).norm() / a[0].norm()).item()) for a, b in pairs))
            if pairs[0][0][1] is not None:
                psnrs.append(_mean(_psnr(a[1], b[1]) for a, b in pairs))  # type: ignore[arg-type]
        return Interval.over(damages), Interval.over(psnrs) if psnrs else None


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)


def _psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """dB, of outputs clamped to [-1, 1] as pipelines show them; capped at 100 where they are equal."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().mean().item()
    return 100.0 if error < 4e-10 else 10 * math.log10(4 / error)


class Benchmark:
    """Everything measured so far, in a folder: run again, it goes on where it was interrupted.

    Args:
        pipe: the original, unpruned pipeline; it stays as it is.
        folder: scores, plans and results.jsonl go there.

    Raises:
        ValueError: several components denoise, and the settings name none of them.
        PlanError: the folder holds results of another model or other settings.
    """

    def __init__(self, pipe: Any, folder: str | Path, settings: BenchmarkSettings) -> None:
        self.pipe, self.folder, self.settings = pipe, Path(folder), settings
        self.name = only_one(denoisers_of(pipe, settings.component, self._scoring()), "benchmark")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results = self._open()

    # ---- the file ----------------------------------------------------------------------------------------------------

    @property
    def _file(self) -> Path:
        return self.folder / "results.jsonl"

    def _header(self) -> dict[str, Any]:
        free = ("ways", "goals", "ks", "unit")  # more of these may be asked for later
        how = {f.name: getattr(self.settings, f.name) for f in fields(self.settings) if f.name not in free}
        header = {"format": RESULTS_FORMAT, "pipeline": type(self.pipe).__name__, "settings": how}
        return json.loads(json.dumps(header, default=str))

    def _open(self) -> dict[tuple[str, str, float, str], Result]:
        if not self._file.exists():
            write_atomically(self._file, json.dumps(self._header()) + "\n")
            return {}
        head, *lines = self._file.read_text(encoding="utf-8").splitlines()
        if json.loads(head) != self._header():
            raise PlanError(f"{self._file}: made by another run (other settings or pipeline); use another folder")
        found = []
        for line in lines:
            try:
                found.append(Result.from_dict(json.loads(line)))
            except json.JSONDecodeError:  # cut off by a kill
                break
        write_atomically(self._file, "".join(json.dumps(row) + "\n" for row in (self._header(), *map(asdict, found))))
        return {result.key: result for result in found}

    def _keep(self, result: Result) -> None:
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        self.results[result.key] = result

    # ---- one candidate -----------------------------------------------------------------------------------------------

    def _scoring(self) -> dict[str, Any]:
        s = self.settings
        return {
            "conditions": s.conditions, "num_inference_steps": s.num_inference_steps, "seeds": s.seeds, "include": s.include,
            "exclude": s.exclude, "kinds": s.kinds, "batch_size": s.batch_size, **s.call,
        }  # fmt: skip

    def scores(self, criterion: str) -> OperatorScores:
        """The scores by a criterion, measured once; the latent-shift ones together."""
        measured = CRITERIA[0] if criterion in LATENT_SHIFT else criterion
        file = self.folder / f"scores-{measured}.jsonl"
        how = {**self._scoring(), "component": self.name, "criterion": measured}
        return score_operators(self.pipe, resume_from=file, **how).with_criterion(criterion)

    def _candidate(self) -> Any:
        """A pipeline with a denoiser of its own, everything else shared with the original."""
        pipe = copy.copy(self.pipe)
        setattr(pipe, self.name, copy.deepcopy(getattr(self.pipe, self.name)))
        return pipe

    def _prune(self, way: Way, unit: str, goal: float) -> tuple[Any, int]:
        """(pruned pipeline, number of operators that were replaced)."""
        pipe, how = self._candidate(), self._scoring()
        if way.is_preset:
            prune(pipe, way.name, component=self.name)
            return pipe, 0
        if way.method == "rounds":
            how |= {"criterion": way.criterion, "rounds": self.settings.rounds}
            how["resume_from"] = self._first_round(way.criterion, f"{unit}-{goal:g}")
        else:
            how = {name: value for name, value in how.items() if name not in SCORING_ONLY}
            how["scores"] = self.scores(way.criterion)
        amount: dict[str, Any] = {"target": int(goal)} if unit == "operators" else {unit: goal}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a missed latency: the table has what was measured
            plan = prune(pipe, method=way.method, fit=way.fit, component=self.name, **amount, **how)
        assert isinstance(plan, PruningPlan)
        plan.save(self.folder / "plans" / f"{way.name.replace(':', '-')}-{unit}-{goal:g}.json")
        return pipe, len(plan)

    def _first_round(self, criterion: str, goal: str) -> Path:
        """A file of scores for each budget: the first round's are those of all, the later ones go beside it."""
        self.scores(criterion)
        file = self.folder / "rounds" / f"{criterion}-{goal}.jsonl"
        file.parent.mkdir(exist_ok=True)
        shutil.copyfile(self.folder / f"scores-{criterion}.jsonl", file)
        return file

    def _speed_up(self, pipe: Any) -> Interval:
        original, model = component_of(self.pipe, self.name), component_of(pipe, self.name)
        with preserved(self.pipe):
            call = first_call(self.pipe, self.name, self._scoring())
            model.eval()
            calls = {"original": lambda: run(original, call), "pruned": lambda: run(model, call)}
            times = time_in_turns(calls, device_of(original), self.settings.timing_rounds)
        found = speed_up(times["original"], times["pruned"])
        return Interval(found.value, found.low, found.high)

    def _at_measured_latency(self, way: Way, goal: float) -> tuple[Any, int, Interval]:
        """The candidate whose measured latency comes closest to the goal, of a few whose predicted one is corrected."""
        best: tuple[Any, int, Interval] | None = None
        ask, missed = goal, math.inf
        for _ in range(self.settings.calibrations):
            pipe, operators = self._prune(way, "latency", ask)
            speed = self._speed_up(pipe)
            error = goal - (1 - 1 / speed.value)
            if abs(error) < missed:
                best, missed = (pipe, operators, speed), abs(error)
            if abs(error) <= CLOSE:
                break
            ask = min(0.95, max(0.005, ask + error))
        assert best is not None
        return best

    def _measure(self, outputs: _Outputs, way: Way, unit: str, goal: float) -> tuple[Any, Result]:
        if unit == "latency" and not way.is_preset:
            pipe, operators, speed = self._at_measured_latency(way, goal)
        else:
            pipe, operators = self._prune(way, unit, goal)
            speed = self._speed_up(pipe)
        model, original = component_of(pipe, self.name), component_of(self.pipe, self.name)
        with preserved(self.pipe):
            call = first_call(self.pipe, self.name, self._scoring())
            macs = 1 - count_macs(model, call)[0][""] / count_macs(original, call)[0][""]
        damage, psnr = outputs.compare(pipe)
        params = 1 - count_params(model) / count_params(original)
        return pipe, Result(way.name, unit, goal, ONE_SHOT, operators, params, macs, speed, damage, psnr)

    # ---- all of them -------------------------------------------------------------------------------------------------

    def run(self, finetune: Finetune | None = None, steps: int = 0, progress: bool = True) -> list[Result]:
        """Measure what is missing; the results of all candidates of these settings, in their order.

        Args:
            finetune: trains a pruned pipeline, so that every candidate is measured again after as many `steps`.
            progress: show a bar, and say which candidates cannot be made (a budget that their method does not reach).
        """
        done: list[Result] = []
        outputs: _Outputs | None = None
        stages = [ONE_SHOT, *([f"after {steps} steps"] if finetune else [])]
        with tqdm(self.settings.candidates(), desc="benchmark", unit="candidate", disable=not progress) as bar:
            for way, unit, goal in bar:
                bar.set_postfix_str(f"{way.name} {unit} {goal:g}")
                if any((way.name, unit, goal, stage) not in self.results for stage in stages):
                    outputs = outputs or _Outputs(self.pipe, self.settings)
                    try:
                        pipe, result = self._measure(outputs, way, unit, goal)
                    except ValueError as error:
                        bar.write(f"{way.name}, {unit} {goal:g}: left out, {error}")
                        continue
                    if result.key not in self.results:
                        self._keep(result)
                    if finetune is not None:
                        damage, psnr = outputs.compare(finetune(pipe, steps))
                        self._keep(replace(result, stage=stages[-1], damage=damage, psnr=psnr))
                done += [self.results[way.name, unit, goal, stage] for stage in stages]
        return done


def best_of(results: Iterable[Result]) -> dict[tuple[str, float, str], str]:
    """(unit, goal, stage) -> the way with the least damage under it."""
    best: dict[tuple[str, float, str], Result] = {}
    for r in results:
        key = (r.unit, r.goal, r.stage)
        if key not in best or r.damage.value < best[key].damage.value:
            best[key] = r
    return {key: r.way for key, r in best.items()}


def save_results(path: str | Path, results: Sequence[Result]) -> None:
    """A CSV with one line a result; intervals in columns of their own."""
    rows = []
    for r in results:
        row: dict[str, Any] = {f.name: getattr(r, f.name) for f in fields(r)}
        for name in ("speed_up", "damage", "psnr"):
            interval = row.pop(name)
            for part in ("value", "low", "high"):
                column = name if part == "value" else f"{name}_{part}"
                row[column] = "" if interval is None else f"{getattr(interval, part):.6g}"
        rows.append(row)
    out = io.StringIO()
    writer = csv.DictWriter(out, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, out.getvalue())


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table: by budget, least damage first."""
    best = best_of(results)
    lines = [
        "| budget | chosen by | stage | params | MACs | speed-up (99% interval) | damage (95% interval) | PSNR, dB |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    order = {key: i for i, key in enumerate(dict.fromkeys((r.unit, r.goal) for r in results))}
    for r in sorted(results, key=lambda r: (order[r.unit, r.goal], r.stage != ONE_SHOT, r.damage.value)):
        budget = {"preset": "hand-made", "operators": f"k = {r.goal:g}"}.get(r.unit, f"{r.unit} -{100 * r.goal:g}%")
        name = f"**{r.way}**" if best[r.unit, r.goal, r.stage] == r.way and r.unit != "preset" else r.way
        psnr = "" if r.psnr is None else f"{r.psnr.value:.1f}"
        lines.append(
            f"| {budget} | {name} | {r.stage} | -{100 * r.params:.1f}% | -{100 * r.macs:.1f}% | "
            f"{r.speed_up.value:.2f} ({r.speed_up.low:.2f} to {r.speed_up.high:.2f}) | "
            f"{r.damage.value:.3f} ({r.damage.low:.3f} to {r.damage.high:.3f}) | {psnr} |"
        )
    return "\n".join(lines)
