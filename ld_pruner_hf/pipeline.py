"""score, prune and profile: plain functions, and the same as methods of every `DiffusionPipeline`."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from torch import nn

from .fitting import fit_stand_ins
from .latents import RecordedCall, find_denoiser, make_conditions, preserved, record_call
from .modeling import plan_of, prune_
from .operators import recorded, steps_argument_if_any
from .plan import Modification, PlanError, PruningPlan
from .presets import PRESETS, apply_preset_
from .profiling import Profile, count_macs, device_of, measure_latency, profile_call, run
from .scores import OperatorScore, OperatorScores, check_criterion
from .scoring import score_operators
from .selection import METHODS, SAVINGS, check_k, top_k
from .stock import StockRecord, stock_candidates, to_stock_
from .surgery import architecture_of, check_plan, count_params, refuse_wrapped

_LAST_SCORES = "_ld_pruner_scores"


def plan_from(rows: list[OperatorScore], scores: OperatorScores, params_before: int, **how: Any) -> PruningPlan:
    """A plan that applies the chosen rows."""
    modifications = tuple(
        Modification(r.path, r.kind, r.stand_in, r.params_removed, r.macs_removed, r.score(scores.criterion)) for r in rows
    )
    return PruningPlan(
        component=scores.component,
        model_class=scores.model_class,
        architecture=scores.architecture,
        modifications=modifications,
        params_before=params_before,
        how={"criterion": scores.criterion, "settings": scores.settings, **how},
    )


def score(pipe: DiffusionPipeline, conditions: Any = None, **kwargs: Any) -> OperatorScores:
    """Score the operators of the pipeline's denoiser; see `score_operators`. `prune` uses the result if given no other."""
    scores = score_operators(pipe, conditions, **kwargs)
    setattr(pipe, _LAST_SCORES, scores)
    return scores


def make_plan(
    pipe: DiffusionPipeline,
    k: int | None = None,
    *,
    params: float | None = None,
    macs: float | None = None,
    latency: float | None = None,
    method: str | None = None,
    scores: OperatorScores | str | os.PathLike | None = None,
    criterion: str | None = None,
    component: str | None = None,
    **score_kwargs: Any,
) -> PruningPlan:
    """Choose what to take out without touching the pipeline; see `prune` for arguments and errors."""
    budget = _check_goal(pipe, k, {"params": params, "macs": macs, "latency": latency}, method, component)
    if criterion is not None:
        check_criterion(criterion)
    scores = _find_scores(pipe, scores, component, score_kwargs)
    if criterion is not None:
        scores = scores.with_criterion(criterion)
    model = _component(pipe, scores.component)
    if budget is None:
        rows = top_k(scores, check_k(k, _upper_limit(pipe, component)))
        return plan_from(rows, scores, count_params(model), method="top-k", k=k)
    unit, share = budget
    method = method or "knapsack"
    total = {"params": lambda: count_params(model), "macs": lambda: _macs(pipe, scores.component, score_kwargs), "latency": lambda: 1.0}
    rows = METHODS[method](scores, unit, share * total[unit]())
    predicted = sum(SAVINGS[unit](row) for row in rows) / total[unit]()
    return plan_from(rows, scores, count_params(model), method=method, budget={unit: share}, predicted={unit: predicted})


def _check_goal(
    pipe: DiffusionPipeline, k: Any, budgets: dict[str, Any], method: str | None, component: str | None
) -> tuple[str, float] | None:
    """(unit, share) of the budget, or None for k operators; before any long work."""
    given = {unit: share for unit, share in budgets.items() if share is not None}
    if len(given) + (k is not None) != 1:
        got = [*(["k"] if k is not None else []), *given]
        raise ValueError(f"prune: got {got or 'no goal'}, expected one of a number of operators, params=, macs= or latency=")
    methods = tuple(METHODS) if given else ("top-k",)
    if method is not None and method not in methods:
        what = f"{next(iter(given))}=" if given else "a number of operators"
        raise ValueError(f"method: got {method!r}, expected one of {list(methods)} for {what}")
    if not given:
        check_k(k, _upper_limit(pipe, component))
        return None
    ((unit, share),) = given.items()
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"{unit}: got {share!r}, expected the share to take away, between 0 and 1 (0.3 for 30%)")
    return unit, float(share)


def _find_scores(
    pipe: DiffusionPipeline, scores: Any, component: str | None, score_kwargs: dict[str, Any]
) -> OperatorScores:
    """The scores given, loaded, last made, or made now; they must be of this pipeline's model."""
    if isinstance(scores, (str, os.PathLike)):
        scores = OperatorScores.load(scores)
    if scores is None:
        last = getattr(pipe, _LAST_SCORES, None)
        usable = last is not None and component in (None, last.component) and not score_kwargs and _fits(pipe, last)
        scores = last if usable else score(pipe, component=component, **score_kwargs)
    if not isinstance(scores, OperatorScores):
        raise ValueError(f"scores: got {type(scores).__name__}, expected OperatorScores or the path of a file of scores")
    if component is not None and component != scores.component:
        raise ValueError(f"component: got {component!r}, the scores are of {scores.component!r}")
    if not _fits(pipe, scores):
        model = _component(pipe, scores.component)
        raise PlanError(
            f"the scores are of another model: {scores.model_class} with architecture {scores.architecture}, this pipeline's "
            f"{scores.component} is {type(model).__name__} with {architecture_of(model)}; score this pipeline"
        )
    return scores


_SCORING_ONLY = ("criterion", "pooled", "include", "exclude", "kinds", "standins", "resume_from")


def _first_call(pipe: DiffusionPipeline, name: str, score_kwargs: dict[str, Any]) -> RecordedCall:
    """The first denoiser call of a run with the call arguments among `score_kwargs`. Run it inside `preserved(pipe)`."""
    known = (*_SCORING_ONLY, "conditions", "num_inference_steps", "seeds", "seed", "batch_size")
    call = {k: v for k, v in score_kwargs.items() if k not in known}
    first = make_conditions(pipe, score_kwargs.get("conditions"), call)[0]
    return record_call(pipe, name, {**steps_argument_if_any(pipe), **first})


def _macs(pipe: DiffusionPipeline, name: str, score_kwargs: dict[str, Any]) -> int:
    with preserved(pipe):
        return count_macs(_component(pipe, name), _first_call(pipe, name, score_kwargs))[0][""]


def prune(
    pipe: DiffusionPipeline,
    target: int | PruningPlan | str | os.PathLike | None = None,
    *,
    params: float | None = None,
    macs: float | None = None,
    latency: float | None = None,
    method: str | None = None,
    scores: OperatorScores | str | os.PathLike | None = None,
    criterion: str | None = None,
    component: str | None = None,
    fit: bool | str = False,
    **score_kwargs: Any,
) -> PruningPlan | StockRecord:
    """Take the least important operators out of the pipeline, in place.

    Args:
        target: how many operators to take out, exactly; or a `PruningPlan`, or the path of one; or the name of a hand-made
            plan ("bk-sdm-small"; see `ld_pruner_hf.PRESETS`).
        params, macs, latency: instead of `target`, the share to take away, at least: 0.3 for 30%. Parameters and MACs are
            exact; latency is predicted from each operator's share of the time, then measured, with a warning if it falls short.
        method: how a budget is met: "knapsack" (least total score; default) or "ratio" (score per unit saved, one by one).
        scores: scores to choose by, or their file; default: those of the last `score`, else the pipeline is scored first.
        criterion: formula to rank by; default: the one of the scores.
        component: which model; default: the one that denoises.
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
    goals: dict[str, Any] = {"params": params, "macs": macs, "latency": latency, "method": method}
    _check_together(target, goals, fit)
    if isinstance(target, str) and target in PRESETS:
        name = find_denoiser(pipe, component)
        record = apply_preset_(_component(pipe, name), target, name)
        _forget_scores(pipe)
        return record
    if isinstance(target, (str, os.PathLike)):
        target = _load_plan(target)
    if isinstance(target, PruningPlan):
        plan = target
        name = component or plan.component or find_denoiser(pipe)
        check_plan(_component(pipe, name), plan)
    else:
        plan = make_plan(pipe, target, **goals, scores=scores, criterion=criterion, component=component, **score_kwargs)
        name = plan.component
    return _apply_(pipe, name, plan, fit, latency, score_kwargs)


def _apply_(
    pipe: DiffusionPipeline, name: str, plan: PruningPlan, fit: bool | str, latency: float | None, score_kwargs: dict[str, Any]
) -> PruningPlan:
    """Fit, apply, measure, and make a stock model of it where that is possible."""
    fitted = None
    if fit:
        kwargs = {k: v for k, v in score_kwargs.items() if k not in _SCORING_ONLY}
        fitted = fit_stand_ins(pipe, replace(plan, component=name), affine=fit == "affine", **kwargs)
        plan = fitted.plan
    before = None if latency is None else _latency(pipe, name, score_kwargs)
    done = prune_(_component(pipe, name), plan)
    if fitted is not None:
        fitted.load_(_component(pipe, name))
    _forget_scores(pipe)
    if latency is not None and before is not None:
        done = _compare_latency(done, latency, before, _latency(pipe, name, score_kwargs))
    return replace(done, how={**done.how, "saved_as": _simplify_(pipe, name, done, score_kwargs)})


def _latency(pipe: DiffusionPipeline, name: str, score_kwargs: dict[str, Any]) -> float:
    """Median time of one denoiser call in ms, after warm-up."""
    model = _component(pipe, name)
    with preserved(pipe):
        call = _first_call(pipe, name, score_kwargs)
        return measure_latency(lambda: run(model, call), device_of(model))[0]


def _compare_latency(plan: PruningPlan, share: float, before: float, after: float) -> PruningPlan:
    """The plan with what was measured; a warning where that is more than 5 percentage points short of the budget."""
    gain = 1 - after / before
    if gain < share - 0.05:
        warnings.warn(
            f"{100 * share:.1f}% of the latency were to go, {100 * plan.how['predicted']['latency']:.1f}% were predicted, "
            f"{100 * gain:.1f}% went ({before:.1f} -> {after:.1f} ms): the device is busy, or its time is not spent in these "
            "operators; ask for more, or score again on the idle device",
            stacklevel=5,
        )
    measured = {"latency": round(gain, 4), "before_ms": round(before, 3), "after_ms": round(after, 3)}
    return replace(plan, how={**plan.how, "measured": measured})


def _check_together(target: Any, goals: dict[str, Any], fit: bool | str) -> None:
    if fit not in (False, True, "affine"):
        raise ValueError(f"fit: got {fit!r}, expected False, True or 'affine'")
    if isinstance(target, (str, os.PathLike, PruningPlan)):
        extra = [k for k, v in goals.items() if v is not None]
        if fit and isinstance(target, str) and target in PRESETS:
            extra.append("fit")
        if extra:
            raise ValueError(f"prune: {extra} cannot go together with a plan or preset; leave out one of them")


def _simplify_(pipe: DiffusionPipeline, name: str, plan: PruningPlan, score_kwargs: dict[str, Any]) -> str:
    """Make the pruned model a stock one if a stock config can express it; says which kind it became."""
    model: Any = _component(pipe, name)
    kind, record, why = type(model).__name__, None, ""
    has_config = isinstance(model, ConfigMixin)
    if has_config and any(True for _ in stock_candidates(model, plan_of(model) or plan)):
        try:
            with preserved(pipe):
                record = to_stock_(model, _first_call(pipe, name, score_kwargs), name)
        except ValueError as error:  # the pipeline cannot be called without the user's images, say
            why = f"; not tried as a stock config: {error}"
    if record is None:
        return f"{kind} with its plan in the config: import ld_pruner_hf before loading{why}"
    entries = ", ".join(f"{k}={v}" for k, v in record.config.items())
    return f"stock {kind} ({entries}): loads with plain diffusers"


def _forget_scores(pipe: DiffusionPipeline) -> None:
    """Scores are of the model as it was."""
    if hasattr(pipe, _LAST_SCORES):
        delattr(pipe, _LAST_SCORES)


def _load_plan(target: str | os.PathLike) -> PruningPlan:
    path = Path(target)
    if isinstance(target, str) and not path.exists() and path.suffix != ".json" and path.name == target:
        raise ValueError(f"target: got {target!r}, which is no file; expected a path of a plan or one of {list(PRESETS)}")
    return PruningPlan.load(path)


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


def _component(pipe: DiffusionPipeline, name: str) -> nn.Module:
    model = getattr(pipe, find_denoiser(pipe, name))
    refuse_wrapped(model)
    return model


def _fits(pipe: DiffusionPipeline, scores: OperatorScores) -> bool:
    return architecture_of(_component(pipe, scores.component)) == scores.architecture


def _upper_limit(pipe: DiffusionPipeline, component: str | None) -> int:
    """A quick bound for k, before any long work: the number of modules that hold no other."""
    model = _component(pipe, component or find_denoiser(pipe))
    return sum(1 for m in model.modules() if not any(True for _ in m.children()))


class LDPrunerMixin:
    """The methods that `import ld_pruner_hf` gives every `DiffusionPipeline`."""

    def score(self: Any, conditions: Any = None, **kwargs: Any) -> OperatorScores:
        return score(self, conditions, **kwargs)

    def prune(self: Any, target: int | PruningPlan | str | os.PathLike | None = None, **kwargs: Any) -> PruningPlan | StockRecord:
        return prune(self, target, **kwargs)

    def profile(self: Any, **kwargs: Any) -> Profile:
        return profile(self, **kwargs)

    score.__doc__, prune.__doc__, profile.__doc__ = score_operators.__doc__, prune.__doc__, profile.__doc__


def install() -> None:
    """Add the mixin's methods to `DiffusionPipeline`: subclasses, `from_pipe` and pickling need nothing further."""
    for name in ("score", "prune", "profile"):
        setattr(DiffusionPipeline, name, vars(LDPrunerMixin)[name])
