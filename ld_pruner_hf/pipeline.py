"""score, prune and profile: plain functions, and the same as methods of every `DiffusionPipeline`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

from diffusers import DiffusionPipeline
from torch import nn

from .fitting import fit_stand_ins
from .latents import RecordedCall, find_denoiser, make_conditions, preserved, record_call
from .loading import load_plan
from .modeling import prune_, remove_unused_
from .operators import recorded, steps_argument_if_any
from .plan import SEVERAL, PlanError, PruningPlan
from .planning import LAST_SCORES, SCORING_ONLY, Goal, component_of, first_call, make_plan, score
from .presets import PRESETS, apply_preset_
from .profiling import Profile, profile_call
from .scores import OperatorScores
from .scoring import score_operators
from .stock import StockRecord, to_stock_
from .surgery import architecture_of, check_plan, count_params
from .unused import find_unused, unread_modules

_NAMES = {"params": "parameters", "macs": "MACs", "latency": "latency", "memory": "peak memory"}


@overload
def prune(pipe: DiffusionPipeline, target: int | PruningPlan | None = None, **kwargs: Any) -> PruningPlan: ...


@overload
def prune(pipe: DiffusionPipeline, target: str | os.PathLike, **kwargs: Any) -> PruningPlan | StockRecord: ...


def prune(
    pipe: DiffusionPipeline,
    target: int | PruningPlan | str | os.PathLike | None = None,
    *,
    params: float | None = None,
    macs: float | None = None,
    latency: float | None = None,
    memory: float | None = None,
    method: str | None = None,
    rounds: int = 4,
    scores: OperatorScores | str | os.PathLike | None = None,
    criterion: str | None = None,
    component: str | None = None,
    fit: bool | str = False,
    **score_kwargs: Any,
) -> PruningPlan | StockRecord:
    """Take the least important operators out of the pipeline, in place.

    Args:
        target: how many operators to take out, exactly; or a `PruningPlan`, the path of one, or a Hub id ("user/plan"); or
            the name of a hand-made plan ("bk-sdm-small"; see `ld_pruner_hf.PRESETS`).
        params, macs, latency, memory: instead of `target`, the share to take away, at least: 0.3 for 30%. Parameters and MACs
            are exact. Latency is predicted from each operator's share of the time, memory (weights and the peak of the
            activations) from the weights; all four are measured before and after, with a warning where the goal is missed, or
            where parameters or MACs go and no time does.
        method: for a number of operators "top-k" (the default); for a budget "knapsack" (least total score; the default), "ratio"
            (score per unit saved, one by one) or "top-k" (the least important ones, as many as it takes). For both "rounds": take
            a part, score the rest given that, and so on; it costs as many scorings, and sees what operators do together.
        rounds: how many, with that method.
        scores: scores to choose by, or their file; default: those of the last `score`, else the pipeline is scored first.
        criterion: formula to rank by; default: the one of the scores.
        component: which model; default: the one that denoises, or all that do. Then k operators go out of all of them
            together, and the plan's paths begin with the component; budgets and rounds are for one at a time.
        fit: fit the stand-ins in closed form (`fit_stand_ins`): True the 1x1 convolutions, "affine" identities and zeros too.
        **score_kwargs: arguments of `score_operators`, if the pipeline is to be scored; of the runs for `fit`, too.

    Returns:
        The plan as applied; `plan.how["saved_as"]` says what the model became. A plan that a stock config can express makes
        a stock diffusers model, which loads without this package; any other is kept in the model's config. For a hand-made
        plan a `StockRecord`. The model stays the same object in all cases, and `pipe.save_pretrained` keeps what was done.

    Raises:
        ValueError: k is no whole number, not positive, or more than can be taken out together; no such preset, or one for
            another architecture; a budget that cannot be met (the message says what can).
        PlanError: a plan or scores of another architecture, or a damaged file; the pipeline is then as it was.

    Example:
        >>> plan = pipe.prune(42)
        >>> pipe.save_pretrained("pruned")
    """
    goals: dict[str, Any] = {
        "params": params, "macs": macs, "latency": latency, "memory": memory, "method": method, "rounds": rounds,
    }  # fmt: skip
    check_goals(target, goals, fit)
    if isinstance(target, str) and target in PRESETS:
        name = find_denoiser(pipe, component)
        record = apply_preset_(component_of(pipe, name), target, name)
        _forget_scores(pipe)
        return record
    if isinstance(target, (str, os.PathLike)):
        target = _load_plan(target)
    if isinstance(target, PruningPlan):
        plan = target
        name = component or plan.component or find_denoiser(pipe)
        check_plan(component_of(pipe, name), plan)
    else:
        plan = make_plan(
            pipe, target, **goals, scores=scores, criterion=criterion, component=component, **score_kwargs
        )
        name = plan.component
    return _apply_(pipe, name, plan, fit, score_kwargs, measure="budget" in plan.how and plan is not target)


def _apply_(
    pipe: DiffusionPipeline, name: str, plan: PruningPlan, fit: bool | str, score_kwargs: dict[str, Any], measure: bool
) -> PruningPlan:
    """Fit, apply, measure, and make a stock model of it where that is possible."""
    if SEVERAL in name:
        return _apply_to_several_(pipe, name, plan, fit, score_kwargs)
    model, fitted = component_of(pipe, name), None
    call, why = _first_call_if_any(pipe, name, score_kwargs)
    if measure and call is None:
        raise ValueError(why)
    if fit:
        kwargs = {k: v for k, v in score_kwargs.items() if k not in SCORING_ONLY}
        fitted = fit_stand_ins(pipe, replace(plan, component=name), affine=fit == "affine", **kwargs)
        plan = replace(fitted.plan, unused=())  # what reads from a fitted zero is in use
    with preserved(pipe):
        before = profile_call(model, call) if measure and call is not None else None
        unread = unread_modules(model, call) if call is not None else set()
    done = prune_(model, plan)
    if fitted is not None:
        fitted.load_(model)
    _forget_scores(pipe)
    if call is None:
        untried = f"{_saved_as(model, None)}; neither tried as a stock config nor searched for unused operators: {why}"
        return replace(done, how={**done.how, "saved_as": untried})
    with preserved(pipe):
        record = to_stock_(model, call, name)
        if record is None and (unused := find_unused(model, call, unread)):
            done = remove_unused_(model, unused, done)
        if before is not None:
            done = _compare(done, before, profile_call(model, call))
    return replace(done, how={**done.how, "saved_as": _saved_as(model, record)})


def _first_call_if_any(
    pipe: DiffusionPipeline, name: str, score_kwargs: dict[str, Any]
) -> tuple[RecordedCall | None, str]:
    """The first call of the component; or None and why, where the pipeline needs images or embeddings that were not given, say."""
    try:
        with preserved(pipe):
            return first_call(pipe, name, score_kwargs), ""
    except ValueError as error:
        return None, str(error)


def _apply_to_several_(
    pipe: DiffusionPipeline, name: str, plan: PruningPlan, fit: bool | str, score_kwargs: dict[str, Any]
) -> PruningPlan:
    """Each component's part, one after the other."""
    before = count_params(component_of(pipe, name))
    parts = {}
    for one, part in plan.by_component().items():
        model = component_of(pipe, one)
        part = replace(part, model_class=type(model).__name__, architecture=architecture_of(model))
        parts[one] = _apply_(pipe, one, part, fit, score_kwargs, measure=False)
    done = tuple(replace(m, path=f"{one}.{m.path}") for one, part in parts.items() for m in part)
    unused = tuple(replace(m, path=f"{one}.{m.path}") for one, part in parts.items() for m in part.unused)
    saved_as = "; ".join(f"{one}: {part.how['saved_as']}" for one, part in parts.items())
    how = {**plan.how, "saved_as": saved_as}
    return replace(plan, modifications=done, unused=unused, params_before=before, how=how)


def _compare(plan: PruningPlan, before: Profile, after: Profile) -> PruningPlan:
    """The plan with what was measured; a warning where a budget was missed, or cost quality and brought no time."""
    ((unit, share),) = plan.how["budget"].items()
    gains = {
        "params": 1 - after.params / before.params,
        "macs": 1 - after.macs / before.macs,
        "memory": 1 - after.peak_memory_mb / before.peak_memory_mb,
    }
    measured: dict[str, float] = {}
    times = ""
    if before.latency_ms is not None and after.latency_ms is not None:
        gains["latency"] = 1 - after.latency_ms / before.latency_ms
        spread = max(before.latency_iqr_ms or 0.0, after.latency_iqr_ms or 0.0)
        measured = {
            "before_ms": round(before.latency_ms, 3), "after_ms": round(after.latency_ms, 3), "iqr_ms": round(spread, 3),
        }  # fmt: skip
        times = f"({before.latency_ms:.1f} -> {after.latency_ms:.1f} ms a call, quartiles {spread:.1f} ms apart)"
        if unit in ("params", "macs") and before.latency_ms - after.latency_ms <= spread:
            warnings.warn(
                f"{gains[unit]:.1%} of the {_NAMES[unit]} went, but no time {times}; to make the model faster, prune by latency=",
                stacklevel=5,
            )
    tolerance = 0.05 if unit in ("latency", "memory") else 1e-6
    if unit in gains and gains[unit] < share - tolerance:
        warnings.warn(
            f"{share:.1%} of the {_NAMES[unit]} were to go, {plan.how['predicted'][unit]:.1%} were predicted, {gains[unit]:.1%} went "
            f"{times if unit == 'latency' else ''}: ask for more"
            + (", or score again on an idle device: a busy one measures badly" if unit == "latency" else ""),
            stacklevel=5,
        )
    measured = {**{name: round(gain, 4) for name, gain in gains.items()}, **measured}
    return replace(plan, how={**plan.how, "measured": measured})


def check_goals(target: Any, goals: Mapping[str, Any], fit: bool | str = False) -> None:
    """Raise ValueError if these arguments of `prune` make no sense together; nothing is loaded or computed for it."""
    if fit not in (False, True, "affine"):
        raise ValueError(f"fit: got {fit!r}, expected False, True or 'affine'")
    if not isinstance(target, (str, os.PathLike, PruningPlan)):
        Goal.of(target, goals)
        return
    extra = [name for name, value in goals.items() if value is not None and name != "rounds"]
    if fit and isinstance(target, str) and target in PRESETS:
        extra.append("fit")
    if extra:
        raise ValueError(f"prune: {extra} cannot go together with a plan or preset; leave out one of them")


def _saved_as(model: nn.Module, record: StockRecord | None) -> str:
    """Which kind of model it became."""
    if record is None:
        return f"{type(model).__name__} with its plan in the config: import ld_pruner_hf before loading"
    entries = ", ".join(f"{k}={v}" for k, v in record.config.items())
    return f"stock {type(model).__name__} ({entries}): loads with plain diffusers"


def _forget_scores(pipe: DiffusionPipeline) -> None:
    """Scores are of the model as it was."""
    if hasattr(pipe, LAST_SCORES):
        delattr(pipe, LAST_SCORES)


def _load_plan(target: str | os.PathLike) -> PruningPlan:
    try:
        return load_plan(target)
    except PlanError:
        if Path(target).exists():
            raise
        expected = "a whole number of operators, a PruningPlan or the file or Hub id of one"
        raise ValueError(
            f"target: got {target!r}, expected {expected}, or the name of a hand-made plan ({', '.join(PRESETS)})"
        ) from None


def profile(
    pipe_or_model: Any,
    example_inputs: Any = None,
    *,
    component: str | None = None,
    per_operator: bool = False,
    repeats: int = 10,
    **call_kwargs: Any,
) -> Profile:
    """Parameters, MACs, latency and peak memory of one denoiser call; see `Profile`.

    Args:
        pipe_or_model: a pipeline (the arguments of its first real denoiser call are used) or a model with `example_inputs`.
        component: which of the pipeline's models; default: the one that denoises.
        per_operator: also measure every module inside.
        repeats: timed calls, after 3 for warm-up.
        **call_kwargs: arguments of the pipeline call (prompt, height, ...).
    """
    if isinstance(pipe_or_model, nn.Module):
        return profile_call(pipe_or_model, recorded(example_inputs), per_operator=per_operator, repeats=repeats)
    with preserved(pipe_or_model):
        call = make_conditions(pipe_or_model, None, call_kwargs)[0]
        call = {**steps_argument_if_any(pipe_or_model), **call}
        name = find_denoiser(pipe_or_model, component, **call)
        denoiser_call = record_call(pipe_or_model, name, call)
        model = getattr(pipe_or_model, name)
        return profile_call(model, denoiser_call, per_operator=per_operator, repeats=repeats)


class LDPrunerMixin:
    """The methods that `import ld_pruner_hf` gives every `DiffusionPipeline`."""

    def score(self: Any, conditions: Any = None, **kwargs: Any) -> OperatorScores:
        return score(self, conditions, **kwargs)

    def prune(
        self: Any, target: int | PruningPlan | str | os.PathLike | None = None, **kwargs: Any
    ) -> PruningPlan | StockRecord:
        return prune(self, target, **kwargs)

    def profile(self: Any, **kwargs: Any) -> Profile:
        return profile(self, **kwargs)


for _function, _documented in ((score, score_operators), (prune, prune), (profile, profile)):
    vars(LDPrunerMixin)[_function.__name__].__doc__ = _documented.__doc__


def install() -> None:
    """Add the mixin's methods to `DiffusionPipeline`: subclasses, `from_pipe` and pickling need nothing further."""
    for name in ("score", "prune", "profile"):
        setattr(DiffusionPipeline, name, vars(LDPrunerMixin)[name])
