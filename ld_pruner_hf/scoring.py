"""score_operators: replace one operator at a time, denoise, and see how far the final latents move (LD-Pruner, section 2.3).

Other criteria are measured here too, by their own functions (`criteria`); rows, files and errors are the same for all.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm

from .batching import quickest_way
from .criteria import block_influence, magnitude, output_error, random_scores, taylor
from .effort import EFFORTS, ROWS_IN_A_CALL, Budget, estimate_moves
from .latents import (
    Condition,
    Job,
    decoder_call,
    encoders_remembered,
    final_latents,
    find_denoiser,
    make_conditions,
    make_jobs,
    patched,
    preserved,
    record_call,
    run_to_latents,
    schedulers_of,
    steps_argument,
)
from .linear import backward_memory
from .memory import freed_memory_kept
from .operators import check_filters, find_operators
from .plan import Modification, Operator, StandInSpec, is_inside
from .profiling import peak_memory, run, weights_memory
from .replacements import stand_in_cost
from .reuse import FirstStep
from .scores import LATENT_SHIFT, MEASURED_ALONE, OperatorScore, OperatorScores, RowFile, check_criterion
from .selection import agreement, check_k, innermost, top_k
from .surgery import applied, architecture_of, check_replaceable, weights_of
from .trajectory import Moment, calibration_set, evenly, output_tensor, record_run
from .twins import Key, find_twins

Measure = Callable[[Operator, StandInSpec], dict[str, Any]]


def latent_distances(original: torch.Tensor, modified: torch.Tensor) -> tuple[float, float]:
    """avg_dist and std_dist of two sets of latents (LD-Pruner, equations 1 to 6).

    Args:
        original, modified: (n, ...), n latents from the same n seeds.

    Returns:
        The L2 norms, over the flattened latent, of the difference of the means and of the population standard deviations.
    """
    a, b = original.double(), modified.double()
    avg = torch.linalg.vector_norm(a.mean(0) - b.mean(0))
    std = torch.linalg.vector_norm(a.std(0, correction=0) - b.std(0, correction=0))
    return avg.item(), std.item()


class LatentSets:
    """Final latents of all conditions and seeds, as the sets that the score compares.

    The text encoder and its like run once for all.

    Args:
        component: the model that is modified. jobs: the pipeline calls that make them. pooled: one set of all latents, instead of one set per condition.
    """

    def __init__(self, pipe: Any, component: str, jobs: Sequence[Job], conditions: int, pooled: bool) -> None:
        self.pipe, self.component, self.jobs, self.conditions, self.pooled = pipe, component, jobs, conditions, pooled
        self._encoded: dict[Any, Any] = {}

    def of_job(self, i: int) -> torch.Tensor:
        """What is compared of job `i`: (B, ...) float32 on the CPU."""
        with encoders_remembered(self.pipe, self.component, self._encoded):
            return final_latents(self.pipe, self.jobs[i].call, self.jobs[i].seeds)

    def first_step(self, i: int) -> torch.Tensor:
        """The same, up to the first scheduler step: as far as no modification can change what the model is called with."""
        with encoders_remembered(self.pipe, self.component, self._encoded):
            return final_latents(self.pipe, self.jobs[i].call, self.jobs[i].seeds, stop_after=1)

    def collect(self, on_job: Callable[[], None] | None = None) -> list[torch.Tensor]:
        """Run every job; one (n, ...) tensor per set.

        Raises:
            FloatingPointError: a latent is not finite.
        """
        sets: list[list[torch.Tensor]] = [[] for _ in range(1 if self.pooled else self.conditions)]
        for i, job in enumerate(self.jobs):
            latents = self.of_job(i)
            if not torch.isfinite(latents).all():
                raise FloatingPointError("the final latents are not finite (NaN or infinity)")
            if len(latents) == len(job.condition_ids):
                parts = list(latents)
            else:  # one call made several latents (num_images_per_prompt, video frames): they belong to its condition
                parts = [latents] if len(job.condition_ids) == 1 else list(latents.chunk(len(job.condition_ids)))
            for c, part in zip(job.condition_ids, parts, strict=True):
                sets[0 if self.pooled else c].append(part)
            if on_job:
                on_job()
        return [torch.stack(s) for s in sets]


class DecodedSets(LatentSets):
    """What the autoencoder `component` decodes from the final latents: pictures or spectrograms, as the model gives them.

    The latents are made once; only the decoder runs again.
    """

    def __init__(self, pipe: Any, component: str, jobs: Sequence[Job], conditions: int, pooled: bool) -> None:
        super().__init__(pipe, component, jobs, conditions, pooled)
        self.model: nn.Module = getattr(pipe, component)
        self.calls = [decoder_call(pipe, component, job.call, job.seeds) for job in jobs]

    def of_job(self, i: int) -> torch.Tensor:
        output = run(self.model, self.calls[i])
        return output_tensor(output).detach().to("cpu", torch.float32)

    def first_step(self, i: int) -> torch.Tensor:
        return self.of_job(i)


def output_sets(
    pipe: Any, component: str, conditions: Sequence[Condition], seeds: Sequence[int], batch_size: int, pooled: bool
) -> LatentSets:
    """The sets that the component is judged by: final latents for a denoiser, what it decodes for an autoencoder."""
    jobs = make_jobs(pipe, conditions, seeds, batch_size)
    if record_call(pipe, component, conditions[0]).method == "decode":
        return DecodedSets(pipe, component, jobs, len(conditions), pooled)
    return LatentSets(pipe, component, jobs, len(conditions), pooled)


def _modification(operator: Operator, spec: StandInSpec) -> Modification:
    return Modification(operator.path, operator.kind, spec)


def _costs(operator: Operator, spec: StandInSpec) -> tuple[int, int]:
    """(params, MACs) that replacing the operator takes away."""
    params, macs = stand_in_cost(spec, operator.output_shapes)
    return operator.params - params, operator.macs - macs * operator.calls


def is_free(operator: Operator, spec: StandInSpec) -> bool:
    """Whether the operator costs nothing that its stand-in does not: no parameters and no MACs."""
    return max(_costs(operator, spec)) <= 0


def _digest(value: Any) -> str:
    """A short, stable description of a condition for the file of scores; tensors and images by their content."""
    if isinstance(value, torch.Tensor):
        return (
            f"tensor {tuple(value.shape)} "
            + hashlib.sha256(value.detach().cpu().float().numpy().tobytes()).hexdigest()[:12]
        )
    if hasattr(value, "tobytes"):
        return f"{type(value).__name__} " + hashlib.sha256(value.tobytes()).hexdigest()[:12]
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_digest(v) for v in value) + "]"
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else f"<{type(value).__name__}>"


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config's entries as a file of scores holds them."""
    return {k: _digest(v) for k, v in sorted(config.items()) if not k.startswith("_")}


def score_operators(
    pipe: Any,
    conditions: Any = None,
    *,
    num_inference_steps: int | None = None,
    seeds: int = 2,
    criterion: str = "latent-shift",
    pooled: bool = False,
    component: str | None = None,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    kinds: str | Sequence[str] | None = None,
    standins: str = "all",
    seed: int = 0,
    batch_size: int | None = 8,
    calibration: int = 64,
    effort: str = "exact",
    k: int | None = None,
    skip_free: bool = False,
    given: Iterable[Modification] = (),
    resume_from: Any = None,
    on_cost: Callable[[ScoringCost], None] | None = None,
    **call_kwargs: Any,
) -> OperatorScores:
    """Score every operator of a pipeline's denoiser by how much its removal changes the final latents.

    For each operator and stand-in the whole denoising runs again from the same seeds; the latents are compared undecoded
    (LD-Pruner, sections 2.2 and 2.3). The operators of an autoencoder's decoder (`component="vae"`) are scored by the same
    formulae in the space of its outputs [ours]. The pipeline is left bit for bit as it was, whatever happens.

    Args:
        pipe: any `DiffusionPipeline`.
        conditions: None (50 built-in prompts where the pipeline takes a prompt, else one implicit condition), a prompt,
            prompts, or dicts of call arguments.
        num_inference_steps: denoising steps; default: the pipeline's own.
        seeds: latents per condition. With 1 and `pooled=False` the standard deviations are 0.
        criterion: what to rank by: "latent-shift" (avg_dist + std_dist), "-product", "-mean" or "-std": all four are kept in
            the result, change it later with `scores.with_criterion`. Or "output-error" (LAPTOP-Diff), "block-influence",
            "taylor", "magnitude" or "random" (see `criteria`), each measured alone.
        pooled: compare all latents as one set, instead of one set per condition summed up.
        component: which model to score; default: the one that denoises. `pipe.score` scores all that do, into one table with
            the component in front of each path.
        include, exclude, kinds: restrict the operators, as in `find_operators`.
        standins: "all" or "paper", as in `find_operators`.
        seed: the first seed.
        batch_size: latents per pipeline call, where the pipeline can batch them (guidance doubles it inside); None finds the
            quickest by trial, and whether the denoiser is quicker with its weights channels last. Scores depend on it no further than
            rounding goes.
        calibration: how many inputs of the denoiser (a latent at a step) output-error, block-influence and taylor look at;
            they are spread over conditions and steps of the original runs.
        effort: "exact" is the loop above; "balanced" and "fast" estimate the latent shifts for a 60th and a 450th of its
            denoiser inputs (see `effort` and docs/scoring.md). Estimates go by "latent-shift"; its parts are set equal, and
            stand for the two halves of the latents instead of the conditions.
        k: how many operators will be taken out, if that is known: estimates are then refined where that choice is made.
        skip_free: leave out stand-ins that take away neither parameters nor MACs (for activations, say): they cannot be chosen
            then, and save next to no time.
        given: modifications that are in place while each operator is scored; the distances are those of all together from
            the unmodified model. Operators at or inside them are left out; one around some of them takes their place.
        resume_from: path of a file that the rows are written to one by one. If it exists, only what is missing is measured.
            Processes of one launch (`accelerate launch`, `torchrun`) that are given the same path share the work.
        on_cost: called with what the run will cost, from a short measurement, before it starts.
        **call_kwargs: arguments for every pipeline call (height, guidance_scale, image, ...).

    Returns:
        `OperatorScores`; an operator whose modified run failed or gave NaN ranks last, with the reason in its row.

    Raises:
        ValueError: unknown component, kind, criterion or call argument, a pattern that matches nothing, no conditions.
        PlanError: `resume_from` holds the scores of another model or other settings, or is damaged.

    Example:
        >>> scores = score_operators(pipe, ["red heart", "cat face"], num_inference_steps=4)
        >>> plan = prune(pipe, 10, scores=scores)
    """
    check_criterion(criterion)
    if isinstance(seeds, bool) or not isinstance(seeds, int) or seeds < 1:
        raise ValueError(f"seeds: got {seeds!r}, expected how many latents to make per condition, 1 or more")
    for name, value in (("batch_size", 1 if batch_size is None else batch_size), ("calibration", calibration)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected 1 or more")
    given = tuple(given)
    _check_effort(effort, criterion, given)
    if k is not None:
        check_k(k)
    quiet = bool(getattr(pipe, "_progress_bar_config", {}).get("disable", False))
    call_kwargs |= steps_argument(pipe, num_inference_steps)
    conditions = make_conditions(pipe, conditions, call_kwargs)
    with preserved(pipe), freed_memory_kept(), ExitStack() as stack:
        component = find_denoiser(pipe, component, **conditions[0])
        model: nn.Module = getattr(pipe, component)
        check_replaceable(model)
        check_filters(model, include, exclude, kinds)
        schedulers = [{"class": type(s).__name__, **_plain(s.config)} for s in schedulers_of(pipe)]
        settings: dict[str, Any] = {
            "conditions": [{k: _digest(v) for k, v in c.items()} for c in conditions],
            "seeds": list(range(seed, seed + seeds)),
            "pooled": pooled,
            "standins": standins,
            "batch_size": batch_size,
            "scheduler": schedulers[0] if len(schedulers) == 1 else schedulers,
            "dtype": str(getattr(model, "dtype", "")),
            "device": str(getattr(model, "device", "")),
            **({"given": {m.path: m.stand_in.name for m in given}} if given else {}),
            **({"measured": criterion, "calibration": calibration} if criterion in MEASURED_ALONE else {}),
            **({"effort": effort} if effort != "exact" else {}),
            **({"skip_free": True} if skip_free else {}),
            **({"k": k} if effort != "exact" and k is not None else {}),
        }
        scores = OperatorScores(
            (), architecture_of(model), weights_of(model), type(model).__name__, component, settings, criterion
        )
        rows = RowFile(resume_from, scores.header(), *process())
        operators = find_operators(
            pipe, component=component, include=include, exclude=exclude, kinds=kinds, standins=standins,
            progress=not quiet, **conditions[0],
        )  # fmt: skip
        free = [o for o in operators if not any(o.path == m.path or is_inside(o.path, m.path) for m in given)]
        todo = [(o, spec) for o in free for spec in o.stand_ins if not (skip_free and is_free(o, spec))]
        if not todo:
            raise ValueError(
                f"none of {len(operators)} selected modules can be replaced; see find_operators for the reasons"
            )
        at_once = stack.enter_context(quickest_way(pipe, component, conditions, settings["seeds"], batch_size, quiet))
        run_of = {"conditions": conditions, "seeds": settings["seeds"], "batch_size": at_once}

        if on_cost is not None:
            on_cost(_cost(pipe, component, todo, run_of, criterion, effort, calibration))

        def start() -> tuple[Measure, Mapping[Key, Key]]:
            if effort != "exact":
                return _estimated(pipe, component, todo, run_of, pooled, effort, k, seed, quiet), {}
            if criterion not in LATENT_SHIFT:
                return _measured_alone(pipe, component, criterion, free, given, run_of, calibration, seed), {}
            one = output_sets(pipe, component, conditions[:1], settings["seeds"][:1], 1, pooled)
            with applied(model, given):
                twins = find_twins(model, todo, one.collect, functools.partial(one.first_step, 0))
            return _latent_shift(model, output_sets(pipe, component, **run_of, pooled=pooled), given, todo), twins

        scores = replace(scores, rows=tuple(_measure(todo, start, rows, quiet)))
    if not quiet:
        _print_agreement(scores, k)
    return scores


def _print_agreement(scores: OperatorScores, k: int | None) -> None:
    """How sure the choice of `k` operators, or of some usual numbers of them, is."""
    most = len(innermost([row.path for row in scores if row.error is None]))
    sure = {n: agreement(scores, functools.partial(top_k, k=n)) for n in ([k] if k else [10, 20, 30, 42]) if n <= most}
    found = ", ".join(f"{100 * share:.0f}% of {n}" for n, share in sure.items() if share is not None)
    if found:
        print(f"least important operators that two halves of the measurement agree on: {found}", file=sys.stderr)


def process() -> tuple[int, int]:
    """(rank, number of processes) of the launch that this process belongs to."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _check_effort(effort: str, criterion: str, given: Sequence[Modification]) -> None:
    if effort not in EFFORTS:
        raise ValueError(f"effort: got {effort!r}, expected one of {list(EFFORTS)}")
    if effort != "exact" and criterion not in LATENT_SHIFT:
        raise ValueError(f"effort: got {effort!r} with criterion {criterion!r}; only latent shifts are estimated")
    if effort != "exact" and given:
        raise ValueError(
            f"effort: got {effort!r}, what goes together with other removals is measured by effort='exact'"
        )


# ---- cost ------------------------------------------------------------------------------------------------------------


class _CostKnown(BaseException):
    """Ends a scoring run before it starts."""


@dataclass(frozen=True)
class ScoringCost:
    """What a scoring run takes, predicted from one denoising run.

    Attributes:
        operators, rows: to score; a row is an operator with one stand-in. effort: how.
        calls: of the denoiser. inputs: rows of their batches. seconds: on this device.
        memory: the most that tensors of the model hold at one time, weights included, in bytes.
    """

    operators: int
    rows: int
    effort: str
    calls: int
    inputs: int
    seconds: float
    memory: int

    def __str__(self) -> str:
        return (
            f"{self.operators} operators with {self.rows} stand-ins, effort {self.effort}: {self.inputs:,} denoiser inputs in "
            f"{self.calls:,} calls, about {_duration(self.seconds)} and {self.memory / 1e6:,.0f} MB"
        )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def score_cost(pipe: Any, conditions: Any = None, **how: Any) -> ScoringCost:
    """What `score_operators` with the same arguments would take; nothing is scored.

    Example:
        >>> print(score_cost(pipe, num_inference_steps=25))
        498 operators with 606 stand-ins, effort exact: ...
    """
    found: list[ScoringCost] = []

    def stop(cost: ScoringCost) -> None:
        found.append(cost)
        raise _CostKnown

    try:
        score_operators(pipe, conditions, on_cost=stop, **how)
    except _CostKnown:
        pass
    return found[0]


def _cost(
    pipe: Any,
    component: str,
    todo: Sequence[Any],
    run_of: dict[str, Any],
    criterion: str,
    effort: str,
    calibration: int,
) -> ScoringCost:
    """Measure one denoising run, or one decoding."""
    model: nn.Module = getattr(pipe, component)
    jobs = make_jobs(pipe, **run_of)
    start = time.perf_counter()
    moments, _ = record_run(pipe, model, jobs[0].call, jobs[0].seeds)
    seconds = time.perf_counter() - start
    if not moments:  # an autoencoder: its decoder runs once a latent
        call = decoder_call(pipe, component, jobs[0].call, jobs[0].seeds)
        start = time.perf_counter()
        moments = [Moment(call, output_tensor(run(model, call)))]
        seconds = time.perf_counter() - start
    each = sum(len(m.output) for m in moments) / len(jobs[0].seeds)
    latents = sum(len(job.seeds) for job in jobs)
    rows, whole = len(todo), (len(todo) + 1) * latents * each
    if criterion in ("magnitude", "random"):
        inputs = 0.0
    elif criterion in MEASURED_ALONE:
        inputs = min(whole, calibration * each / len(moments) * (rows if criterion == "output-error" else 2))
    else:
        inputs = whole / EFFORTS[effort]
    batch = sum(len(m.output) for m in moments) / len(moments)
    memory = peak_memory(model, moments[0].call)
    if effort != "exact":  # the backward pass takes no more than that, but for one row, which goes through in any case
        with _differentiating(pipe, effort):
            memory = max(memory, weights_memory([model]) + backward_memory(model, moments[0]))
    return ScoringCost(
        operators=len({operator.path for operator, _ in todo}),
        rows=rows,
        effort=effort,
        calls=math.ceil(inputs / batch),
        inputs=math.ceil(inputs),
        seconds=seconds * inputs / (each * len(jobs[0].seeds)),
        memory=memory,
    )


# ---- measurements ----------------------------------------------------------------------------------------------------


def _others(given: Sequence[Modification], operator: Operator) -> list[Modification]:
    """The given modifications that stay in place while the operator is replaced."""
    return [m for m in given if not is_inside(m.path, operator.path)]


def _latent_shift(
    model: nn.Module, sets: LatentSets, given: Sequence[Modification], todo: Sequence[tuple[Operator, StandInSpec]]
) -> Measure:
    originals = sets.collect()
    runs = [functools.partial(sets.first_step, i) for i in range(len(sets.jobs))]
    first_step = FirstStep(model, runs, [operator.path for operator, _ in todo])

    def measure(operator: Operator, spec: StandInSpec) -> dict[str, Any]:
        modifications = [*_others(given, operator), _modification(operator, spec)]
        with applied(model, modifications), first_step.reused([m.path for m in modifications]):
            modified = sets.collect()
        pairs = [latent_distances(a, b) for a, b in zip(originals, modified, strict=True)]
        return {"avg_dist": tuple(p[0] for p in pairs), "std_dist": tuple(p[1] for p in pairs)}

    return measure


def _one_run(pipe: Any, model: nn.Module, call: Condition, seed: int) -> tuple[int, int]:
    """(denoiser inputs, scheduler steps) that one latent takes. To count them, calls of equal shapes get the output of the first."""
    inputs, outputs = 0, dict[Any, Any]()

    def counting(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal inputs
            shapes = tuple(t.shape for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
            if shapes not in outputs:
                outputs[shapes] = forward(*args, **kwargs)
            inputs += len(output_tensor(outputs[shapes]))
            return outputs[shapes]

        return counted

    with patched(model, "forward", counting):
        steps = run_to_latents(pipe, call, [seed])[2]
    return inputs, steps


@contextmanager
def _differentiating(pipe: Any, effort: str) -> Iterator[None]:
    """Inside, an error of autograd's, or of a model that autograd is used on, is a ValueError that says what to do."""
    try:
        yield
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"effort: got {effort!r}, but {type(pipe).__name__} cannot be differentiated ({type(error).__name__}: {error}); "
            "use effort='exact'"
        ) from error


def _estimated(
    pipe: Any,
    component: str,
    todo: Sequence[tuple[Operator, StandInSpec]],
    run_of: dict[str, Any],
    pooled: bool,
    effort: str,
    k: int | None,
    seed: int,
    quiet: bool,
) -> Measure:
    """Estimates of all rows, from both halves of the latents where there are two."""
    if record_call(pipe, component, run_of["conditions"][0]).method == "decode":
        raise ValueError(f"effort: got {effort!r} for {component!r}, which decodes; use effort='exact'")
    model: nn.Module = getattr(pipe, component)
    conditions, seeds = run_of["conditions"], run_of["seeds"]
    inputs, steps = _one_run(pipe, model, conditions[0], seeds[0])
    budget = Budget.of(effort, len(todo), len(conditions) * len(seeds), inputs, k)
    chosen = evenly(conditions, budget.latents)
    per_condition = max(1, round(budget.latents / len(chosen)))
    jobs = make_jobs(pipe, chosen, seeds[:per_condition], min(run_of["batch_size"], ROWS_IN_A_CALL))
    bar = tqdm(total=budget.refined, desc="trajectory errors", unit="op", disable=quiet, leave=False)
    with bar, _differentiating(pipe, effort):
        moves = estimate_moves(pipe, model, jobs, todo, budget, seed, steps, k, run_of["batch_size"], bar.update)
    # Of n latents that move independently by m each: avg_dist = std_dist = m / sqrt(n).
    n = len(seeds) * (len(conditions) if pooled else 1)
    sets = 1 if pooled else len(conditions)
    shifts = (sets * moves / (math.sqrt(n) * len(moves))).T.tolist()
    by_row = {(o.path, s.name): tuple(parts) for (o, s), parts in zip(todo, shifts, strict=True)}

    def look_up(operator: Operator, spec: StandInSpec) -> dict[str, Any]:
        parts = by_row[operator.path, spec.name]
        if not all(map(math.isfinite, parts)):
            raise FloatingPointError("no finite estimate; score it with effort='exact'")
        return {"avg_dist": parts, "std_dist": parts if n > 1 else (0.0,) * len(parts)}

    return look_up


def _measured_alone(
    pipe: Any,
    component: str,
    criterion: str,
    operators: Sequence[Operator],
    given: Sequence[Modification],
    run_of: dict[str, Any],
    calibration: int,
    seed: int,
) -> Measure:
    """The measurement of a criterion that is none of the latent-shift ones."""
    model: nn.Module = getattr(pipe, component)
    operators = [o for o in operators if o.is_candidate]
    if criterion in ("magnitude", "random"):
        values = magnitude(model, operators) if criterion == "magnitude" else random_scores(operators, seed)
    else:
        moments = calibration_set(pipe, component, **run_of, size=calibration)
        if criterion == "output-error":

            def measure(operator: Operator, spec: StandInSpec) -> dict[str, Any]:
                modifications = [*_others(given, operator), _modification(operator, spec)]
                return {"output_error": output_error(model, moments, modifications)}

            return measure
        with applied(model, given):
            values = (taylor if criterion == "taylor" else block_influence)(model, moments, operators)
    return lambda operator, _: {MEASURED_ALONE[criterion]: values[operator.path]}


def _measure(
    todo: Sequence[tuple[Operator, StandInSpec]],
    start: Callable[[], tuple[Measure, Mapping[Key, Key]]],
    rows: RowFile,
    quiet: bool,
) -> list[OperatorScore]:
    """One row per (operator, stand-in), from the file where it has one.

    Args:
        start: called if any is missing: the measurement, and the rows that need none -> those that they equal.
    """
    by_key = {(o.path, s.name): (o, s) for o, s in todo}
    missing = [key for key in by_key if key not in rows.found]
    if missing:
        measure, twins = start()
        with tqdm(total=len(todo), initial=len(todo) - len(missing), desc="scoring", unit="op", disable=quiet) as bar:
            for key in rows.pending([key for key in missing if key not in twins]):
                bar.set_postfix_str(key[0][-40:], refresh=False)
                rows.append(_measure_one(*by_key[key], measure))
                bar.update()
            for key in [key for key in missing if key in twins]:
                rows.append(_like(rows.found[twins[key]], *by_key[key]))
                bar.update()
    rows.end(list(by_key))
    return [rows.found[key] for key in by_key]


def _measure_one(operator: Operator, spec: StandInSpec, measure: Measure) -> OperatorScore:
    start = time.perf_counter()
    values: dict[str, Any] = {}
    error = None
    try:
        values = measure(operator, spec)
    except torch.OutOfMemoryError:
        raise
    except Exception as reason:  # a broken modification is a finding about the operator; the run goes on
        error = f"{type(reason).__name__}: {reason}"[:300]
    params_removed, macs_removed = _costs(operator, spec)
    return OperatorScore(
        path=operator.path, kind=operator.kind, stand_in=spec, **values,
        params_removed=params_removed, macs_removed=macs_removed, latency_share=operator.latency_share,
        seconds=round(time.perf_counter() - start, 3), error=error,
    )  # fmt: skip


def _like(row: OperatorScore, operator: Operator, spec: StandInSpec) -> OperatorScore:
    """The row of an operator and a stand-in that do the same."""
    params_removed, macs_removed = _costs(operator, spec)
    return replace(
        row, path=operator.path, kind=operator.kind, stand_in=spec, params_removed=params_removed,
        macs_removed=macs_removed, latency_share=operator.latency_share, seconds=0.0,
    )  # fmt: skip


def check_joint(criterion: str) -> None:
    """Raise ValueError for a criterion that measures single operators only."""
    joint = [*LATENT_SHIFT, "output-error"]
    if check_criterion(criterion) not in joint:
        raise ValueError(
            f"criterion: got {criterion!r}; what several removals do together is measured by one of {joint}"
        )


@contextmanager
def damage_meter(
    pipe: Any,
    conditions: Any = None,
    *,
    num_inference_steps: int | None = None,
    seeds: int = 2,
    criterion: str = "latent-shift",
    pooled: bool = False,
    component: str | None = None,
    seed: int = 0,
    batch_size: int | None = 8,
    calibration: int = 64,
    **call_kwargs: Any,
) -> Iterator[Callable[[Iterable[Modification]], float]]:
    """Inside, a function that measures what several modifications do together; see `measure_damage` for the arguments."""
    check_joint(criterion)
    call_kwargs |= steps_argument(pipe, num_inference_steps)
    conditions = make_conditions(pipe, conditions, call_kwargs)
    with preserved(pipe), freed_memory_kept(), ExitStack() as stack:
        component = find_denoiser(pipe, component, **conditions[0])
        model: nn.Module = getattr(pipe, component)
        drawn = range(seed, seed + seeds)
        at_once = stack.enter_context(quickest_way(pipe, component, conditions, drawn, batch_size, quiet=True))
        run_of = {"conditions": conditions, "seeds": drawn, "batch_size": at_once}
        if criterion == "output-error":
            moments = calibration_set(pipe, component, **run_of, size=calibration)
        else:
            sets = output_sets(pipe, component, **run_of, pooled=pooled)
            originals = sets.collect()

        def measure(modifications: Iterable[Modification]) -> float:
            try:
                if criterion == "output-error":
                    return output_error(model, moments, modifications)
                with applied(model, modifications):
                    modified = sets.collect()
            except FloatingPointError:
                return math.inf
            combine = LATENT_SHIFT[criterion]
            return math.fsum(combine(*latent_distances(a, b)) for a, b in zip(originals, modified, strict=True))

        yield measure


def measure_damage(pipe: Any, modifications: Iterable[Modification], conditions: Any = None, **how: Any) -> float:
    """What several modifications do together: the score of `score_operators` for all of them at once.

    Args:
        modifications: a `PruningPlan`, or modifications that do not lie inside each other, of the pipeline as it is.
        conditions, how: as for `score_operators` (num_inference_steps, seeds, criterion, pooled, component, seed, batch_size,
            calibration, arguments of the pipeline's call). The criterion is a latent-shift one or "output-error".

    Returns:
        The damage, in units of the criterion; infinite where the outputs of the modified pipeline are not finite.

    Raises:
        ValueError: a criterion that measures single operators only, or unsuitable conditions.
    """
    with damage_meter(pipe, conditions, **how) as measure:
        return measure(modifications)
