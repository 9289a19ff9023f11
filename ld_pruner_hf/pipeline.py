"""score, prune and profile: plain functions, and the same as methods of every `DiffusionPipeline`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.configuration_utils import ConfigMixin
from torch import nn

from .latents import find_denoiser, make_conditions, preserved, record_call
from .modeling import plan_of, prune_
from .operators import recorded, steps_argument_if_any
from .plan import Modification, PlanError, PruningPlan
from .presets import PRESETS, apply_preset_
from .profiling import Profile, profile_call
from .scores import OperatorScore, OperatorScores, check_criterion
from .scoring import score_operators
from .selection import check_k, top_k
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
    k: int,
    *,
    scores: OperatorScores | str | os.PathLike | None = None,
    criterion: str | None = None,
    component: str | None = None,
    **score_kwargs: Any,
) -> PruningPlan:
    """Choose the k least important operators without touching the pipeline; see `prune` for arguments and errors."""
    check_k(k, _upper_limit(pipe, component))
    if criterion is not None:
        check_criterion(criterion)
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
    model = _component(pipe, scores.component)
    if not _fits(pipe, scores):
        raise PlanError(
            f"the scores are of another model: {scores.model_class} with architecture {scores.architecture}, this pipeline's "
            f"{scores.component} is {type(model).__name__} with {architecture_of(model)}; score this pipeline"
        )
    if criterion is not None:
        scores = scores.with_criterion(criterion)
    return plan_from(top_k(scores, k), scores, count_params(model), method="top-k", k=k)


def prune(
    pipe: DiffusionPipeline,
    target: int | PruningPlan | str | os.PathLike,
    *,
    scores: OperatorScores | str | os.PathLike | None = None,
    criterion: str | None = None,
    component: str | None = None,
    **score_kwargs: Any,
) -> PruningPlan | StockRecord:
    """Take the least important operators out of the pipeline, in place.

    Args:
        target: how many operators to take out, exactly; or a `PruningPlan`, or the path of one; or the name of a hand-made
            plan ("bk-sdm-small"; see `ld_pruner_hf.PRESETS`).
        scores: scores to choose by, or their file; default: those of the last `score`, else the pipeline is scored first.
        criterion: formula to rank by; default: the one of the scores.
        component: which model; default: the one that denoises.
        **score_kwargs: arguments of `score_operators`, if the pipeline is to be scored.

    Returns:
        The plan as applied; `plan.how["saved_as"]` says what the model became. A plan that a stock config can express makes
        a stock diffusers model, which loads without this package; any other is kept in the model's config. For a hand-made
        plan a `StockRecord`. The model stays the same object in all cases, and `pipe.save_pretrained` keeps what was done.

    Raises:
        ValueError: k is no whole number, not positive, or more than can be taken out together; no such preset, or one for
            another architecture.
        PlanError: a plan or scores of another architecture, or a damaged file; the pipeline is then as it was.

    Example:
        >>> plan = pipe.prune(42)
        >>> pipe.save_pretrained("pruned")
    """
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
        plan = make_plan(pipe, target, scores=scores, criterion=criterion, component=component, **score_kwargs)
        name = plan.component
    applied_plan = prune_(_component(pipe, name), plan)
    _forget_scores(pipe)
    return replace(applied_plan, how={**applied_plan.how, "saved_as": _simplify_(pipe, name, applied_plan)})


def _simplify_(pipe: DiffusionPipeline, name: str, plan: PruningPlan) -> str:
    """Make the pruned model a stock one if a stock config can express it; says which kind it became."""
    model: Any = _component(pipe, name)
    kind, record, why = type(model).__name__, None, ""
    has_config = isinstance(model, ConfigMixin)
    if has_config and any(True for _ in stock_candidates(model, plan_of(model) or plan)):
        try:
            with preserved(pipe):
                call = {**steps_argument_if_any(pipe), **make_conditions(pipe, None, {})[0]}
                record = to_stock_(model, record_call(pipe, name, call), name)
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

    def prune(self: Any, target: int | PruningPlan | str | os.PathLike, **kwargs: Any) -> PruningPlan | StockRecord:
        return prune(self, target, **kwargs)

    def profile(self: Any, **kwargs: Any) -> Profile:
        return profile(self, **kwargs)

    score.__doc__, prune.__doc__, profile.__doc__ = score_operators.__doc__, prune.__doc__, profile.__doc__


def install() -> None:
    """Add the mixin's methods to `DiffusionPipeline`: subclasses, `from_pipe` and pickling need nothing further."""
    for name in ("score", "prune", "profile"):
        setattr(DiffusionPipeline, name, vars(LDPrunerMixin)[name])
