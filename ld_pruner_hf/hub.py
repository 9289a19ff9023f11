"""Publish: one commit with a pruned pipeline, its plan, scores, figures and a model card; or a plan alone.

Nothing is written into the folder that is published, and the repository changes only by the last request, the commit. So a
failed upload leaves both as they were, and the same command again sends only what is missing.
"""

from __future__ import annotations

import csv
import functools
import inspect
import json
import os
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, get_token
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from PIL import Image
from torch import nn

from .cards import CardFacts, PrunedPart, pipeline_card, plan_card, plan_for
from .evaluation.generation import generate
from .evaluation.results import RESULTS_FILE, Evaluation
from .latents import call_parameters, default_prompts, steps_argument
from .loading import PLAN_FILE, is_repo_id, load_pipeline, one_line
from .measurements import MEASUREMENTS_FILE, Measurements, measured
from .modeling import PLAN_KEY, RECORD_KEY, plan_of
from .pipeline import profile
from .plan import PlanError, PruningPlan, write_atomically
from .remote_code import add_remote_code
from .report import figure_png, importance_figure, modified_figure, picture_grid
from .scores import OperatorScores
from .stock import StockRecord, record_of

CARD_FILE, SCORES_FILE, RECIPE_FILE = "README.md", "scores.jsonl", "recipe.json"
FIGURES = "figures"


@dataclass(frozen=True)
class Evidence:
    """What a card says beyond what the pipeline's own files show. All of it was measured, or is stated by the user.

    Attributes:
        base_model: Hub id of the original; default: the one that the pipeline was loaded from.
        license: the Hub's identifier of a licence; default: that of the original's card.
        datasets: Hub ids of the data used for training after pruning; default: the recipe's.
        evaluation: of the published pipeline, the last of its models; the original may be the first. Default: `evaluation.json`
            beside the pipeline.
        recipe: flags of the training after pruning; default: `recipe.json` beside the pipeline.
        scores: of all operators; conditions are counted in the published file, not quoted. Default: `scores.jsonl` beside it.
        measurements: default: those that `ld-pruner prune` left beside the pipeline.
        original: the pipeline before pruning, or its name: it is measured and drawn beside the pruned one.
        prompts, call: what to draw and measure with: at most 8 prompts, and further arguments of the pipeline's call.
    """

    base_model: str | None = None
    license: str | None = None
    datasets: Sequence[str] = ()
    evaluation: Evaluation | None = None
    recipe: Mapping[str, Any] | None = None
    scores: OperatorScores | None = None
    measurements: Measurements | None = None
    original: Any = None
    prompts: Sequence[str] | None = None
    call: Mapping[str, Any] = field(default_factory=dict)


# ---- what the folder says --------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise PlanError(f"{path}: got {type(data).__name__}, expected a JSON object")
    return data


def pruned_parts(folder: Path) -> list[PrunedPart]:
    """The pruned models of a saved pipeline, from the configs on disk.

    Raises:
        ValueError: no pipeline's folder, or nothing in it was pruned.
    """
    if not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder}: has no model_index.json, so it holds no diffusers pipeline; save one there first")
    parts = []
    for name, value in _read(folder / "model_index.json").items():
        config_file = folder / name / "config.json"
        if not isinstance(value, list) or not config_file.is_file():
            continue
        config = _read(config_file)
        plan, record = config.get(PLAN_KEY), config.get(RECORD_KEY)
        if plan is None and record is None:
            continue
        before, earlier = (plan or {}).get("params_before", 0), record
        while earlier:
            before, earlier = earlier["params_before"], earlier.get("earlier")
        parts.append(
            PrunedPart(
                name,
                str(value[1]),
                None if plan is None else PruningPlan.from_dict(plan, str(config_file)),
                None if record is None else StockRecord.from_dict(record),
                before,
            )
        )
    if not parts:
        raise ValueError(
            f"{folder}: none of its models was pruned; prune one first (`ld-pruner prune`, pipe.prune), or publish it with "
            "diffusers' own push_to_hub"
        )
    return parts


def training_log(path: Path) -> str:
    """What `log.csv` of training/distill.py says, in a sentence; "" if there is none."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or "loss" not in rows[0]:
        return ""
    losses = [float(row["loss"]) for row in rows]
    n = min(100, len(losses))
    first, last = statistics.fmean(losses[:n]), statistics.fmean(losses[-n:])
    speed = statistics.median(float(row["images_per_s"]) for row in rows)
    return (
        f"{len(rows)} steps; mean loss {first:.4g} over the first {n}, {last:.4g} over the last {n}; "
        f"{speed:.3g} samples a second (median)."
    )


# ---- the folder that is published ------------------------------------------------------------------------------------


def _copy(source: str, target: str) -> None:
    """A hard link where that works: weights are large, and no file is ever changed in place."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def copy_pipeline(source: Path, folder: Path) -> None:
    """Copy a saved pipeline, without what else lies beside it (checkpoints, logs, scores)."""
    folder.mkdir(parents=True, exist_ok=True)
    _copy(str(source / "model_index.json"), str(folder / "model_index.json"))
    for name, value in _read(source / "model_index.json").items():
        if isinstance(value, list) and (source / name).is_dir():
            shutil.copytree(source / name, folder / name, copy_function=_copy)


def forget_origin(folder: Path) -> None:
    """Remove the places that models were loaded from, which diffusers and transformers write into every config."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cleaned(v) for k, v in value.items() if k not in ("_name_or_path", "name_or_path")}
        return value

    for path in (folder / "model_index.json", *folder.glob("*/*config.json")):
        data = _read(path)
        if cleaned(data) != data:
            write_atomically(path, json.dumps(cleaned(data), indent=2) + "\n")


def check_private(folder: Path, token: str | None) -> None:
    """Raise ValueError if a text file that is to be published quotes this machine's folders or the token."""
    secrets = {"the home folder": f"{Path.home()}/", "this folder": f"{Path.cwd()}/", "the access token": token or ""}
    texts = [CARD_FILE, PLAN_FILE, SCORES_FILE, MEASUREMENTS_FILE, "model_index.json"]
    for path in [*(folder / name for name in texts), *folder.glob("*/*config.json")]:
        content = path.read_text(encoding="utf-8") if path.is_file() else ""
        found = [what for what, secret in secrets.items() if len(secret) > 1 and secret in content]
        if found:
            raise ValueError(
                f"{path.relative_to(folder)} would publish {found[0]}; remove it from there and try again"
            )


def _figures(
    folder: Path, parts: Sequence[PrunedPart], plan: PruningPlan | None, scores: OperatorScores | None
) -> dict[str, str]:
    """Draw what was removed, and the importance of all operators; file -> caption."""
    drawn: dict[str, tuple[Callable[[], Any], str]] = {}
    found = {part.name: plan_for(part, plan) for part in parts}
    plans = {name: plan for name, plan in found.items() if plan is not None}
    if plans:
        drawn["removed_by_block.png"] = lambda: modified_figure(plans, "block"), "Operators taken out, by block"
    if scores is not None:
        caption = f"Importance of every operator by block ({scores.criterion}); bars are medians"
        drawn["importance_by_block.png"] = lambda: importance_figure(scores), caption
    captions = {}
    for name, (draw, caption) in drawn.items():
        try:
            png = figure_png(draw())
        except ImportError as error:
            warnings.warn(f"published without figures: {error}", stacklevel=2)
            return {}
        (folder / FIGURES).mkdir(exist_ok=True)
        (folder / FIGURES / name).write_bytes(png)
        captions[f"{FIGURES}/{name}"] = caption
    return captions


def _draw(
    folder: Path, pipes: Mapping[str, Any], prompts: Sequence[str] | None, call: Mapping[str, Any]
) -> tuple[dict[str, str], list[tuple[str, str, str]]]:
    """Draw with each pipeline from the same noise: pictures as one grid (file -> caption), sounds (label, files)."""
    n = len(prompts) if prompts else 4
    labels = list(prompts) if prompts else [f"seed {i}" for i in range(n)]
    (folder / FIGURES).mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as aside:
        drawn = {
            name: generate(pipe, Path(aside) / name, n, prompts=prompts, call=dict(call), batch_size=1)
            for name, pipe in pipes.items()
        }
        pictures = {name: [Image.open(p).copy() for p in sorted(d.glob("*.png"))] for name, d in drawn.items()}
        sounds = {name: sorted(d.glob("*.wav")) for name, d in drawn.items()}
        for name in drawn:
            if max(len(pictures[name]), len(sounds[name])) < n:
                raise ValueError(f"the {name} pipeline drew NaN; nothing to show beside the other")
        captions, players = {}, []
        if all(pictures.values()):
            scale = max(1, 128 // next(iter(pictures.values()))[0].width)
            picture_grid(pictures, labels, scale).save(folder / FIGURES / "before_after.png")
            how = ", ".join([f"seeds 0 to {n - 1}", "not selected", *(f"{k}={v}" for k, v in call.items())])
            captions[f"{FIGURES}/before_after.png"] = f"Original and pruned from the same noise; {how}"
        for i, (label, *files) in enumerate(zip(labels, *sounds.values(), strict=all(sounds.values()))):
            names = [f"{FIGURES}/{name}_{i}.wav" for name in pipes]
            for source, name in zip(files, names, strict=True):
                shutil.copy2(source, folder / name)
            players.append((label, names[0], names[1]))
    return captions, players


def _compare(
    folder: Path, pipe: Any, component: str, evidence: Evidence, base_model: str | None
) -> tuple[Measurements, dict[str, str], list[tuple[str, str, str]]]:
    """Measure and draw the original and the pruned pipeline."""
    original, prompts, call = evidence.original, evidence.prompts, dict(evidence.call)
    if isinstance(original, (str, os.PathLike)):
        original = load_pipeline(str(original), device=str(pipe.device))
    call |= steps_argument(pipe, call.pop("num_inference_steps", None))
    if "prompt" in call_parameters(pipe):
        prompts = list(prompts or default_prompts()[:4])[:8]
    elif prompts:
        raise ValueError(f"prompts: {type(pipe).__name__} takes none; leave them out")
    measuring = {**call, **({"prompt": prompts[0]} if prompts else {})}
    before, after = (profile(p, component=component, **measuring) for p in (original, pipe))
    captions, players = _draw(folder, {"original": original, "pruned": pipe}, prompts, call)
    return measured(component, before, after, call, base_model), captions, players


def _licence(evidence: Evidence, base_model: str | None, token: str | None) -> dict[str, str]:
    """The licence as stated, or that of the original's card: on the Hub, or in its folder. Empty if there is none."""
    if evidence.license:
        return {"license": evidence.license}
    original = evidence.original if isinstance(evidence.original, (str, os.PathLike)) else None
    folder = Path(original).expanduser() if original else None
    if original and str(original).startswith("demo:"):
        from .demo import path

        folder = path(str(original).removeprefix("demo:"))
    card = folder / CARD_FILE if folder and (folder / CARD_FILE).is_file() else base_model
    if card is None:
        return {}
    try:
        data = ModelCard.load(card, token=token, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):  # no card; or no Hub to be reached, as in a dry run
        return {}
    keys = ("license", "license_name", "license_link")
    return {k: data[k] for k in keys if isinstance(data.get(k), str)}


def _base_model(
    folder: Path, evidence: Evidence, measurements: Measurements | None, recipe: Mapping[str, Any], token: str | None
) -> str | None:
    """Hub id of the original: as stated, as measured, the teacher, or what the pipeline was loaded from, if the Hub has it.

    Raises:
        ValueError: the stated one is no Hub id, or not on the Hub.
    """
    stated = evidence.base_model
    if stated is not None and not is_repo_id(stated):
        raise ValueError(f"base_model: got {stated!r}, expected a Hub id such as org/model, never a local path")
    known = stated or (measurements.base_model if measurements else None)
    remembered = (recipe.get("teacher"), _read(folder / "model_index.json").get("_name_or_path"))
    name = known or next((n for n in map(str, remembered) if is_repo_id(n) and not Path(n).exists()), None)
    if name is None:
        return None
    try:
        HfApi(token=token).model_info(name)
    except RepositoryNotFoundError as error:
        if stated:
            raise ValueError(
                f"base_model: the Hub has no {name} that you may see; check the name and your access"
            ) from error
        return None
    except Exception:  # no Hub to be reached; publishing will say so
        return known
    return name


def prepare(
    folder: Path,
    repo_id: str,
    evidence: Evidence,
    *,
    source: Path | None = None,
    pipe: Any = None,
    remote_code: bool = False,
    token: str | None = None,
) -> str:
    """Complete a saved pipeline in `folder`, which may be changed, with all that is published; returns the card's text.

    Args:
        source: where a file that `folder` has not may be: the folder of a result, with log.csv and scores.
        pipe: the pruned pipeline, if it is loaded; needed to measure and draw, and loaded for that if it is not.

    Raises:
        ValueError: not a pruned pipeline, a base model that is none, or a file that would publish local paths.
    """
    if not is_repo_id(repo_id):
        raise ValueError(f"repository: got {repo_id!r}, expected user/name or org/name")
    source = source or folder
    parts = pruned_parts(folder)
    measurements = evidence.measurements
    if measurements is None and (source / MEASUREMENTS_FILE).is_file():
        measurements = Measurements.load(source / MEASUREMENTS_FILE)
    recipe = dict(evidence.recipe or {})
    if not recipe and (source / RECIPE_FILE).is_file():
        recipe = _read(source / RECIPE_FILE)
    base_model = _base_model(folder, evidence, measurements, recipe, token)
    licence = _licence(evidence, base_model, token)
    forget_origin(folder)
    captions: dict[str, str] = {}
    sounds: list[tuple[str, str, str]] = []
    if evidence.original is not None:
        pipe = pipe if pipe is not None else load_pipeline(str(source))
        measurements, captions, sounds = _compare(folder, pipe, parts[0].name, evidence, base_model)
    scores = evidence.scores
    if scores is None and (source / SCORES_FILE).is_file():
        scores = OperatorScores.load(source / SCORES_FILE)
    if scores is not None:
        counted = {**scores.settings, "conditions": len(scores.settings.get("conditions", ()))}
        replace(scores, settings=counted).save(folder / SCORES_FILE)
    if measurements is not None:
        measurements = replace(measurements, base_model=base_model)
        measurements.save(folder / MEASUREMENTS_FILE)
    plan = next((part.plan for part in parts if part.plan), None)
    if plan is None and (source / PLAN_FILE).is_file():
        plan = PruningPlan.load(source / PLAN_FILE)
    if plan is not None:
        plan.save(folder / PLAN_FILE)
    captions |= _figures(folder, parts, plan, scores)
    if remote_code:
        add_remote_code(folder, [part.name for part in parts if part.plan is not None])
    evaluation = evidence.evaluation
    if evaluation is None and (source / RESULTS_FILE).is_file():
        evaluation = Evaluation.load(source / RESULTS_FILE)
    named = str(recipe.get("dataset_name") or "")
    datasets = list(evidence.datasets) or ([named] if is_repo_id(named) and not Path(named).exists() else [])
    facts = CardFacts(
        repo_id, str(_read(folder / "model_index.json")["_class_name"]), parts, licence, base_model, datasets,
        measurements, evaluation, recipe, training_log(source / "log.csv"), captions, sounds,
        remote_code and any(part.plan for part in parts), plan, scores is not None,
    )  # fmt: skip
    card = pipeline_card(facts)
    write_atomically(folder / CARD_FILE, card)
    check_private(folder, token or get_token())
    return card


# ---- the commit ------------------------------------------------------------------------------------------------------


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn what clients of the Hub raise into errors that say what to do."""
    try:
        yield
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{repo_id}: no such repository that your token may see; check the name, and log in with `hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise ValueError(
                f"{repo_id}: the Hub does not know the access token, or there is none; log in with `hf auth login`"
            ) from error
        if status == 403:
            raise ValueError(
                f"{repo_id}: the token may not write there; use a token with write access, or --create-pr"
            ) from error
        raise ConnectionError(f"{repo_id}: the Hub answered: {one_line(error)}; {_RERUN}") from error
    except ValueError:
        raise
    except Exception as error:  # httpx and hf_xet have no common base
        raise ConnectionError(
            f"{repo_id}: the upload broke off ({type(error).__name__}: {one_line(error)}); {_RERUN}"
        ) from error


_RERUN = "the local result is as it was; the same command again sends only what is missing"


def check_card(path: Path) -> None:
    """Ask the Hub whether it accepts the card's metadata; ValueError that says what is wrong."""
    try:
        ModelCard.load(path).validate()
    except ValueError as error:
        try:
            wrong = "; ".join(entry["message"] for entry in json.loads(str(error))["errors"])
        except (ValueError, KeyError, TypeError):
            wrong = one_line(error)
        raise ValueError(f"{path.name}: the Hub does not accept its metadata: {wrong}") from error


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Upload a prepared folder in one commit; files of an earlier version of the same parts go with it.

    Args:
        private: make a new repository private. create_pr: open a pull request instead of changing the branch.
        revision: the branch; made if it is missing.

    Raises:
        ValueError: a token that is wrong, missing or may only read; no such repository for a pull request; a public
            repository where a private one is asked for; metadata that the Hub does not accept.
        ConnectionError: the Hub failed or the connection broke; nothing was committed unless its answer was lost.
    """
    api = HfApi(token=token)
    with _explained(repo_id):
        check_card(folder / CARD_FILE)
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise ValueError(f"{repo_id}: --private, but the repository is there and public; choose another name")
        if revision and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        parts = {name.partition("/")[0] for name in files if "/" in name}
        gone = [
            name
            for name in api.list_repo_files(repo_id, revision=revision)
            if name not in files and "/" in name and name.partition("/")[0] in parts
        ]
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, folder / name) for name in files),
                *(CommitOperationDelete(name) for name in gone),
            ],
            commit_message=commit_message or "Upload a pruned pipeline with ld_pruner_hf",
            revision=revision,
            create_pr=create_pr,
        )


def full_id(repo_id: str, token: str | None = None) -> str:
    """`name` as `user/name` of the token's user; a full id as it is."""
    if "/" in repo_id:
        return repo_id
    with _explained(repo_id):
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def publish(
    result: Any,
    repo_id: str,
    evidence: Evidence | None = None,
    *,
    remote_code: bool = False,
    save: Mapping[str, Any] | None = None,
    **push: Any,
) -> CommitInfo:
    """Publish a pruned pipeline on the Hub, with its plan, scores, figures and a model card, in one commit.

    Args:
        result: a pruned pipeline, or the folder that it was saved to (by `save_pretrained`, `ld-pruner prune` or
            training/distill.py).
        evidence: what the card says beyond the pipeline's own files.
        remote_code: ship the code that lets it load with `trust_remote_code=True` where this package is not installed.
        save: arguments of `save_pretrained`, if `result` is a pipeline. **push: `private`, `create_pr`, `revision`, `token`, `commit_message`, as in `push_folder`.

    Raises:
        ValueError, ConnectionError: as `prepare` and `push_folder`.

    Example:
        >>> publish("sd-pruned", "me/sd-pruned", Evidence(base_model="CompVis/stable-diffusion-v1-4"))
    """
    token = push.get("token")
    repo_id = full_id(repo_id, token)
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / "pipeline"
        if isinstance(result, (str, os.PathLike)):
            source, pipe = Path(result), None
            pruned_parts(source)
            copy_pipeline(source, folder)
        else:
            source, pipe = None, result
            result.save_pretrained(folder, **(save or {}))
        prepare(
            folder, repo_id, evidence or Evidence(), source=source, pipe=pipe, remote_code=remote_code, token=token
        )
        return push_folder(folder, repo_id, **push)


def push_plan(plan: PruningPlan, repo_id: str, *, base_model: str | None = None, **push: Any) -> CommitInfo:
    """Publish a plan alone, a few kB: `pipe.prune(repo_id)` then applies it to any pipeline of that architecture.

    Args:
        base_model: Hub id of the model that the plan was made from. **push: as in `push_folder`.
    """
    repo_id = full_id(repo_id, push.get("token"))
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        prepare_plan(plan, folder, repo_id, base_model, push.get("token"))
        return push_folder(folder, repo_id, **{"commit_message": "Upload a pruning plan with ld_pruner_hf", **push})


def prepare_plan(
    plan: PruningPlan, folder: Path, repo_id: str, base_model: str | None = None, token: str | None = None
) -> str:
    """Write what `push_plan` uploads; returns the card's text."""
    if not is_repo_id(repo_id):
        raise ValueError(f"repository: got {repo_id!r}, expected user/name or org/name")
    if base_model is not None and not is_repo_id(base_model):
        raise ValueError(f"base_model: got {base_model!r}, expected a Hub id such as org/model, never a local path")
    card = plan_card(repo_id, plan, base_model)
    plan.save(folder / PLAN_FILE)
    write_atomically(folder / CARD_FILE, card)
    check_private(folder, token or get_token())
    return card


# ---- push_to_hub of pipelines ----------------------------------------------------------------------------------------


def is_pruned(pipe: Any) -> bool:
    """Was a model of this pipeline pruned, by a plan or into a stock model?"""
    models = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    return any(plan_of(m) is not None or record_of(m) is not None for m in models)


_OWN = {"remote_code", "revision", *Evidence.__dataclass_fields__}


def _wrap_push_to_hub(push_to_hub: Callable[..., Any]) -> Callable[..., Any]:
    """`push_to_hub` that publishes a pruned pipeline with plan and card; all of diffusers' arguments keep their meaning."""
    signature = inspect.signature(push_to_hub)

    @functools.wraps(push_to_hub)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = {k: kwargs[k] for k in _OWN & kwargs.keys()}
        given = signature.bind(self, *args, **{k: v for k, v in kwargs.items() if k not in own}).arguments
        if given.get("subfolder") or not is_pruned(self):
            return push_to_hub(self, *args, **kwargs)
        keys = ("commit_message", "private", "token", "create_pr")
        push = {k: given[k] for k in keys if k in given} | {k: own.pop(k) for k in ("revision",) if k in own}
        save: dict[str, Any] = {k: given[k] for k in ("safe_serialization", "variant") if k in given}
        remote_code = own.pop("remote_code", False)
        return publish(self, given["repo_id"], Evidence(**own), remote_code=remote_code, save=save, **push)

    wrapped.__doc__ = f"""{push_to_hub.__doc__}
        A pruned pipeline is published with its plan and a model card; see `ld_pruner_hf.publish`, whose further arguments
        (`remote_code`, `revision`, and the fields of `ld_pruner_hf.Evidence`) are taken by name.
        """
    return wrapped


def _wrap_save_pretrained(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """`save_pretrained(push_to_hub=True)` that publishes a pruned pipeline as `push_to_hub` does, and no README.md of yours is lost."""
    signature = inspect.signature(save_pretrained)

    @functools.wraps(save_pretrained)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        if not bound.arguments.get("push_to_hub") or not is_pruned(self):
            return save_pretrained(self, *args, **kwargs)
        push = bound.arguments.pop("kwargs", {})
        del bound.arguments["push_to_hub"]
        save_pretrained(*bound.args, **bound.kwargs)
        folder = bound.arguments["save_directory"]
        repo_id = push.pop("repo_id", Path(folder).name)
        evidence = Evidence(**{k: push.pop(k) for k in Evidence.__dataclass_fields__ if k in push})
        publish(folder, repo_id, evidence, **push)

    return wrapped


def install() -> None:
    """Make `push_to_hub` and `save_pretrained(push_to_hub=True)` of pruned pipelines publish them as `publish` does."""
    for name, wrap in (("push_to_hub", _wrap_push_to_hub), ("save_pretrained", _wrap_save_pretrained)):
        method = getattr(DiffusionPipeline, name)
        if not getattr(method, "_by_ld_pruner_hf", False):
            wrapped = wrap(method)
            wrapped._by_ld_pruner_hf = True  # type: ignore[attr-defined]
            setattr(DiffusionPipeline, name, wrapped)
