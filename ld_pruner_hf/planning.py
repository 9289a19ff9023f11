"""make_plan: from a pipeline's scores and a goal (k, or a budget) to a plan; nothing is pruned yet."""

from __future__ import annotations

import inspect
import os
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from .latents import RecordedCall, find_denoiser, make_conditions, preserved, record_call
from .operators import find_operators, steps_argument_if_any
from .plan import Modification, PlanError, PruningPlan
from .profiling import count_macs
from .scores import OperatorScore, OperatorScores, check_criterion
from .scoring import score_operators
from .selection import METHODS, SAVINGS, check_k, innermost, top_k
from .surgery import architecture_of, count_params, refuse_wrapped

LAST_SCORES = "_ld_pruner_scores"
SCORING_ONLY = ("criterion", "pooled", "include", "exclude", "kinds", "standins", "resume_from")
"""Arguments of `score` that concern neither the conditions nor the pipeline's call."""


def plan_from(rows: list[OperatorScore], scores: OperatorScores, params_before: int, **how: Any) -> PruningPlan:
    """A plan that applies the chosen rows. It goes into published configs, so it counts the conditions but does not quote them."""
    settings = {**scores.settings, "conditions": len(scores.settings.get("conditions", ()))}
    settings.pop("scheduler", None)
    modifications = tuple(
        Modification(r.path, r.kind, r.stand_in, r.params_removed, r.macs_removed, r.score(scores.criterion))
        for r in rows
    )
    return PruningPlan(
        component=scores.component,
        model_class=scores.model_class,
        architecture=scores.architecture,
        modifications=modifications,
        params_before=params_before,
        how={"criterion": scores.criterion, "settings": settings, **how},
    )


def score(pipe: DiffusionPipeline, conditions: Any = None, **kwargs: Any) -> OperatorScores:
    """Score the operators of the pipeline's denoiser; see `score_operators`. `prune` uses the result if given no other."""
    scores = score_operators(pipe, conditions, **kwargs)
    setattr(pipe, LAST_SCORES, scores)
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
    unit, goal = _check_goal(k, {"params": params, "macs": macs, "latency": latency}, method)
    if criterion is not None:
        check_criterion(criterion)
    scores = _find_scores(pipe, k, scores, component, score_kwargs)
    if criterion is not None:
        scores = scores.with_criterion(criterion)
    model = component_of(pipe, scores.component)
    if unit == "operators":
        return plan_from(top_k(scores, int(goal)), scores, count_params(model), method="top-k", k=k)
    method = method or "knapsack"
    total = {
        "params": lambda: count_params(model),
        "macs": lambda: _macs(pipe, scores.component, score_kwargs),
        "latency": lambda: 1.0,
    }
    rows = METHODS[method](scores, unit, goal * total[unit]())
    predicted = sum(SAVINGS[unit](row) for row in rows) / total[unit]()
    return plan_from(
        rows, scores, count_params(model), method=method, budget={unit: goal}, predicted={unit: predicted}
    )


def _check_goal(k: Any, budgets: dict[str, Any], method: str | None) -> tuple[str, float]:
    """(unit, share) of the budget, or ("operators", k); before any long work."""
    given = {unit: share for unit, share in budgets.items() if share is not None}
    if len(given) + (k is not None) != 1:
        got = [*(["k"] if k is not None else []), *given]
        raise ValueError(
            f"prune: got {got or 'no goal'}, expected one of a number of operators, params=, macs= or latency="
        )
    methods = tuple(METHODS) if given else ("top-k",)
    if method is not None and method not in methods:
        what = f"{next(iter(given))}=" if given else "a number of operators"
        raise ValueError(f"method: got {method!r}, expected one of {list(methods)} for {what}")
    if not given:
        check_k(k)
        return "operators", k
    ((unit, share),) = given.items()
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
        raise ValueError(f"{unit}: got {share!r}, expected the share to take away, between 0 and 1 (0.3 for 30%)")
    return unit, float(share)


def _find_scores(
    pipe: DiffusionPipeline, k: int | None, scores: Any, component: str | None, score_kwargs: dict[str, Any]
) -> OperatorScores:
    """The scores given, loaded, last made, or made now; they must be of this pipeline's model."""
    if isinstance(scores, (str, os.PathLike)):
        scores = OperatorScores.load(scores)
    if scores is None:
        last = getattr(pipe, LAST_SCORES, None)
        usable = last is not None and component in (None, last.component) and not score_kwargs and _fits(pipe, last)
        if not usable and k is not None:
            _check_reachable(pipe, k, component, score_kwargs)
        scores = last if usable else score(pipe, component=component, **score_kwargs)
    if not isinstance(scores, OperatorScores):
        raise ValueError(
            f"scores: got {type(scores).__name__}, expected OperatorScores or the path of a file of scores"
        )
    if component is not None and component != scores.component:
        raise ValueError(f"component: got {component!r}, the scores are of {scores.component!r}")
    if not _fits(pipe, scores):
        model = component_of(pipe, scores.component)
        raise PlanError(
            f"the scores are of another model: {scores.model_class} with architecture {scores.architecture}, this pipeline's "
            f"{scores.component} is {type(model).__name__} with {architecture_of(model)}; score this pipeline"
        )
    return scores


def first_call(pipe: DiffusionPipeline, name: str, score_kwargs: dict[str, Any]) -> RecordedCall:
    """The first denoiser call of a run with the call arguments among `score_kwargs`. Run it inside `preserved(pipe)`."""
    first = make_conditions(pipe, score_kwargs.get("conditions"), _call_arguments(score_kwargs))[0]
    return record_call(pipe, name, {**steps_argument_if_any(pipe), **first})


def _macs(pipe: DiffusionPipeline, name: str, score_kwargs: dict[str, Any]) -> int:
    with preserved(pipe):
        return count_macs(component_of(pipe, name), first_call(pipe, name, score_kwargs))[0][""]


def component_of(pipe: DiffusionPipeline, name: str) -> nn.Module:
    model = getattr(pipe, find_denoiser(pipe, name))
    refuse_wrapped(model)
    return model


def _fits(pipe: DiffusionPipeline, scores: OperatorScores) -> bool:
    return architecture_of(component_of(pipe, scores.component)) == scores.architecture


def _check_reachable(pipe: DiffusionPipeline, k: int, component: str | None, score_kwargs: dict[str, Any]) -> None:
    """Raise ValueError before the long scoring if fewer than k operators can be taken out together."""
    filters = {
        name: score_kwargs[name] for name in ("include", "exclude", "kinds", "standins") if name in score_kwargs
    }
    call = make_conditions(pipe, score_kwargs.get("conditions"), _call_arguments(score_kwargs))[0]
    operators = find_operators(
        pipe, component=component, trial=False, latency=False, progress=False, **filters, **call
    )
    candidates = [o.path for o in operators if o.is_candidate]
    check_k(k, len(innermost(candidates)))


def _call_arguments(score_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `score`'s arguments that go on to the pipeline's call."""
    own = inspect.signature(score_operators).parameters
    return {name: value for name, value in score_kwargs.items() if name not in own}
