"""make_plan: from a pipeline's scores and a goal (k, or a budget) to a plan; nothing is pruned yet."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from .latents import (
    RecordedCall,
    find_denoisers,
    make_conditions,
    only_one,
    preserved,
    record_call,
    steps_argument,
)
from .operators import find_operators, steps_argument_if_any
from .plan import SEVERAL, PlanError, PruningPlan, is_inside
from .profiling import count_macs, peak_memory
from .scores import CRITERIA, OperatorScore, OperatorScores, check_criterion
from .scoring import check_joint, is_free, measure_damage, process, score_operators
from .selection import METHODS, SAVINGS, agreement, check_k, innermost, ratio, top_k
from .surgery import architecture_of, check_replaceable, count_params, weights_of

LAST_SCORES = "_ld_pruner_scores"
LAST_CONDITION = "_ld_pruner_condition"
"""The first condition of the last `score`: where `prune` is given none, one call with it says what nothing uses any more."""
OPERATORS_ONLY = ("include", "exclude", "kinds", "standins", "effort", "k", "skip_free", "resume_from", "on_cost")
"""Arguments of `score` that say which operators to score, and how to go on with it."""
SCORING_ONLY = ("criterion", "pooled", "calibration", *OPERATORS_ONLY)
"""Arguments of `score` that concern neither the conditions nor the pipeline's call."""


def plan_from(rows: list[OperatorScore], scores: OperatorScores, params_before: int, **how: Any) -> PruningPlan:
    """A plan that applies the chosen rows. It goes into published configs, so it counts the conditions but does not quote them."""
    settings = {**scores.settings, "conditions": len(scores.settings.get("conditions", ()))}
    settings.pop("scheduler", None)
    return PruningPlan(
        component=scores.component,
        model_class=scores.model_class,
        architecture=scores.architecture,
        modifications=tuple(row.modification(scores.criterion) for row in rows),
        params_before=params_before,
        how={"criterion": scores.criterion, "settings": settings, **how},
    )


def score(
    pipe: DiffusionPipeline, conditions: Any = None, *, component: str | None = None, **kwargs: Any
) -> OperatorScores:
    """Score the operators of the pipeline's denoiser; see `score_operators`. `prune` uses the result if given no other.

    Where several components denoise (Wan 2.2's two transformers), all of them are scored, into one table that names the
    component in front of each path.
    """
    names = denoisers_of(pipe, component, {**kwargs, "conditions": conditions})
    if len(names) == 1:
        scores = score_operators(pipe, conditions, component=names[0], **kwargs)
    else:
        scores = _score_several(pipe, names, conditions, **kwargs)
    setattr(pipe, LAST_SCORES, scores)
    setattr(pipe, LAST_CONDITION, make_conditions(pipe, conditions, _call_arguments(kwargs))[0])
    return scores


def denoisers_of(pipe: DiffusionPipeline, component: str | None, score_kwargs: Mapping[str, Any]) -> list[str]:
    """The components that `score` with these arguments scores; see `find_denoisers`."""
    if component is not None:
        return find_denoisers(pipe, component)
    call = make_conditions(pipe, score_kwargs.get("conditions"), _call_arguments(score_kwargs))[0]
    with preserved(pipe):
        return find_denoisers(pipe, **steps_argument(pipe, score_kwargs.get("num_inference_steps")), **call)


def _score_several(pipe: DiffusionPipeline, names: Sequence[str], conditions: Any, **kwargs: Any) -> OperatorScores:
    """Each component by itself, with a file of its own to resume from; then all rows in one table, and one file."""
    path = kwargs.pop("resume_from", None)
    parts = {}
    for name in names:
        own = None if path is None else Path(path).with_stem(f"{Path(path).stem}-{name}")
        parts[name] = score_operators(pipe, conditions, component=name, resume_from=own, **kwargs)
    joint = component_of(pipe, SEVERAL.join(names))
    scores = replace(
        parts[names[0]],
        rows=tuple(replace(row, path=f"{name}.{row.path}") for name in names for row in parts[name]),
        architecture=architecture_of(joint), weights=weights_of(joint), component=SEVERAL.join(names),
        model_class=SEVERAL.join(part.model_class for part in parts.values()),
    )  # fmt: skip
    if path is not None and not process()[0]:
        scores.save(path)
    return scores


@dataclass(frozen=True)
class Goal:
    """What a plan is to reach.

    Attributes:
        unit: "operators", or what a budget counts: one of `SAVINGS`.
        amount: how many operators, or the share of the unit to take away (0 to 1).
        method: how they are chosen: "top-k", one of `METHODS`, or "rounds".
        rounds: how often is scored and chosen: 1, or more for "rounds".
    """

    unit: str
    amount: float
    method: str
    rounds: int = 1

    @classmethod
    def of(cls, k: Any, goals: Mapping[str, Any]) -> Goal:
        """Check what a user asked for, before any long work.

        Args:
            k: how many operators, or None. goals: the share of each of `SAVINGS`, or None; `method`; `rounds`.

        Raises:
            ValueError: not exactly one of k and the budgets, or a value that makes no sense.
        """
        method, rounds = goals["method"], goals["rounds"]
        given = {unit: goals[unit] for unit in SAVINGS if goals[unit] is not None}
        if len(given) + (k is not None) != 1:
            got = [*(["k"] if k is not None else []), *given]
            raise ValueError(
                f"prune: got {got or 'no goal'}, expected one of a number of operators, {', '.join(f'{u}=' for u in SAVINGS)}"
            )
        methods = [*METHODS, "rounds"] if given else ["top-k", "rounds"]
        if method not in [None, *methods]:
            what = f"{next(iter(given))}=" if given else "a number of operators"
            raise ValueError(f"method: got {method!r}, expected one of {methods} for {what}")
        if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 2:
            raise ValueError(f"rounds: got {rounds!r}, expected how often to score and choose, 2 or more")
        method, rounds = method or methods[0], rounds if method == "rounds" else 1
        if not given:
            check_k(k)
            return cls("operators", k, method, min(rounds, k))
        ((unit, share),) = given.items()
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            raise ValueError(f"{unit}: got {share!r}, expected the share to take away, between 0 and 1 (0.3 for 30%)")
        return cls(unit, float(share), method, rounds)


def make_plan(
    pipe: DiffusionPipeline,
    k: int | None = None,
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
    **score_kwargs: Any,
) -> PruningPlan:
    """Choose what to take out without touching the pipeline; see `prune` for arguments and errors."""
    goals = {"params": params, "macs": macs, "latency": latency, "memory": memory}
    goal = Goal.of(k, {**goals, "method": method, "rounds": rounds})
    if criterion is not None:
        check_criterion(criterion)
    if goal.rounds > 1:
        check_joint(criterion or CRITERIA[0])
        if score_kwargs.get("effort", "exact") != "exact":
            raise ValueError(
                f"effort: got {score_kwargs['effort']!r}; method 'rounds' measures removals together, with effort='exact'"
            )
        if scores is not None:
            raise ValueError(
                "scores: method 'rounds' scores anew in each round; leave them out, and pass the arguments of score instead"
            )
    scores = _find_scores(pipe, goal, scores, component, criterion, score_kwargs)
    if criterion is not None:
        scores = scores.with_criterion(criterion)
    model = component_of(pipe, scores.component)
    total = _total(pipe, model, scores.component, goal.unit, score_kwargs)
    rows = _choose(scores, goal, total)
    for n in range(2, goal.rounds + 1):
        rows = _next_round(pipe, scores, goal, total, n, rows, score_kwargs)
    order = {row.path: i for i, row in enumerate(scores)}
    plan = plan_from(sorted(rows, key=lambda row: order[row.path]), scores, count_params(model), method=goal.method)
    if goal.rounds > 1:
        plan.how["rounds"] = goal.rounds
    elif (sure := _agreement(scores, goal, total)) is not None:
        plan.how["agreement"] = round(sure, 4)
    if goal.unit == "operators":
        plan.how["k"] = k
    else:
        saved = sum(SAVINGS[goal.unit](row) for row in rows)
        plan.how.update(budget={goal.unit: goal.amount}, predicted={goal.unit: saved / total})
    return plan


def _agreement(scores: OperatorScores, goal: Goal, total: float) -> float | None:
    """How sure the choice is; None where there are no halves, or one of them has fewer rows that can be used than the goal needs."""
    try:
        return agreement(scores, lambda half: _choose(half, goal, total))
    except ValueError:
        return None


def _next_round(
    pipe: DiffusionPipeline,
    scores: OperatorScores,
    goal: Goal,
    total: float,
    n: int,
    rows: Sequence[OperatorScore],
    score_kwargs: Mapping[str, Any],
) -> list[OperatorScore]:
    """Score again given what the rounds before took, and choose."""
    given = [row.modification(scores.criterion) for row in rows]
    how = {**score_kwargs, "component": scores.component, "criterion": scores.criterion}
    if how.get("resume_from") is not None:
        path = Path(how["resume_from"])
        how["resume_from"] = path.with_stem(f"{path.stem}-round{n}")
    again = score_operators(pipe, given=given, **how)
    together = {key: value for key, value in how.items() if key not in OPERATORS_ONLY}
    return _choose(again, goal, total, n, rows, measure_damage(pipe, given, **together))


def _choose(
    scores: OperatorScores,
    goal: Goal,
    total: float,
    n: int = 0,
    start: Sequence[OperatorScore] = (),
    damage: float = 0.0,
) -> list[OperatorScore]:
    """What the goal takes; with rounds, what it has taken after the n-th of them (1 if 0), given what `start` took before."""
    part = max(n, 1) / goal.rounds
    if goal.unit != "operators":
        target = goal.amount * total * part
        if goal.method == "rounds":
            return ratio(scores, goal.unit, target, start=start, damage=damage)
        return METHODS[goal.method](scores, goal.unit, target)
    taken = [row.path for row in start]
    apart = [
        r for r in scores if not any(is_inside(p, r.path) for p in taken)
    ]  # `scores` have none at or inside `taken`
    k, reachable = round(goal.amount * part), int(goal.amount)
    more = top_k(replace(scores, rows=tuple(apart)), k - len(taken), reachable=reachable - len(taken))
    return [*start, *more]


def _total(pipe: DiffusionPipeline, model: nn.Module, name: str, unit: str, score_kwargs: dict[str, Any]) -> float:
    """All that the model has of what a budget counts, in units of `SAVINGS`."""
    if unit in ("operators", "latency"):
        return 1.0
    if unit == "params":
        return count_params(model)
    with preserved(pipe):
        call = first_call(pipe, name, score_kwargs)
        if unit == "macs":
            return count_macs(model, call)[0][""]
        weights = sum(p.nbytes for p in model.parameters())
        return peak_memory(model, call) * count_params(model) / weights


def _find_scores(
    pipe: DiffusionPipeline,
    goal: Goal,
    scores: Any,
    component: str | None,
    criterion: str | None,
    score_kwargs: dict[str, Any],
) -> OperatorScores:
    """The scores given, loaded, last made (for a single round), or made now; they must be of this pipeline's model."""
    if isinstance(scores, (str, os.PathLike)):
        scores = OperatorScores.load(scores)
    if scores is None:
        last: OperatorScores | None = (
            getattr(pipe, LAST_SCORES, None) if goal.rounds == 1 and not score_kwargs else None
        )
        if last is not None and component in (None, last.component) and _fits(pipe, last):
            scores = last if criterion is None or criterion in last.criteria else None
    if scores is None:
        names = denoisers_of(pipe, component, score_kwargs)
        component = SEVERAL.join(names)
        _check_several(goal, component)
        if goal.unit == "operators":
            _check_reachable(pipe, int(goal.amount), names, score_kwargs)
        how = {**score_kwargs, **({"criterion": criterion} if criterion else {})}
        if goal.unit == "operators" and goal.rounds == 1 and SEVERAL not in component:
            how["k"] = int(goal.amount)
        scores = score(pipe, component=component, **how)
    if not isinstance(scores, OperatorScores):
        raise ValueError(
            f"scores: got {type(scores).__name__}, expected OperatorScores or the path of a file of scores"
        )
    if component is not None and component != scores.component:
        raise ValueError(f"component: got {component!r}, the scores are of {scores.component!r}")
    _check_several(goal, scores.component)
    if not _fits(pipe, scores):
        model = component_of(pipe, scores.component)
        raise PlanError(
            f"the scores are of another model: {scores.model_class} with architecture {scores.architecture}, this pipeline's "
            f"{scores.component} is {type(model).__name__} with {architecture_of(model)}; score this pipeline"
        )
    return scores


def first_call(pipe: DiffusionPipeline, name: str, score_kwargs: dict[str, Any]) -> RecordedCall:
    """The first denoiser call of a run with the call arguments among `score_kwargs`, or those of the last `score` where there
    are none. Run it inside `preserved(pipe)`."""
    conditions, given = score_kwargs.get("conditions"), _call_arguments(score_kwargs)
    if conditions is None and not given:
        conditions = getattr(pipe, LAST_CONDITION, None)
    first = make_conditions(pipe, conditions, given)[0]
    return record_call(pipe, name, {**steps_argument_if_any(pipe), **first})


def component_of(pipe: DiffusionPipeline, name: str) -> nn.Module:
    """The component of that name; a `ModuleDict` of them for several."""
    models = {n: getattr(pipe, n) for n in find_denoisers(pipe, name)}
    for model in models.values():
        check_replaceable(model)
    return models[name] if name in models else nn.ModuleDict(models)


def _fits(pipe: DiffusionPipeline, scores: OperatorScores) -> bool:
    return architecture_of(component_of(pipe, scores.component)) == scores.architecture


def _check_several(goal: Goal, component: str) -> None:
    """Raise ValueError for a goal that is measured in the calls of one component, where several are to be pruned together."""
    if goal.unit != "operators" or goal.rounds > 1:
        only_one(component.split(SEVERAL), "prune by a budget or in rounds")


def _check_reachable(pipe: DiffusionPipeline, k: int, names: Sequence[str], score_kwargs: dict[str, Any]) -> None:
    """Raise ValueError before the long scoring if fewer than k operators can be taken out together."""
    filters = {
        name: score_kwargs[name] for name in ("include", "exclude", "kinds", "standins") if name in score_kwargs
    }
    call = make_conditions(pipe, score_kwargs.get("conditions"), _call_arguments(score_kwargs))[0]
    reachable = 0
    for name in names:
        operators = find_operators(pipe, component=name, trial=False, latency=False, progress=False, **filters, **call)
        offered = [
            o.path
            for o in operators
            if any(not (score_kwargs.get("skip_free") and is_free(o, s)) for s in o.stand_ins)
        ]
        reachable += len(innermost(offered))
    check_k(k, reachable)


def _call_arguments(score_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `score`'s arguments that go on to the pipeline's call."""
    own = inspect.signature(score_operators).parameters
    return {name: value for name, value in score_kwargs.items() if name not in own}
