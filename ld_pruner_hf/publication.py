"""The folder that is published: a pruned pipeline with its plan, scores, figures and model card, or a plan alone."""

from __future__ import annotations

import csv
import json
import os
import shutil
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, get_token
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image

from . import demo
from .cards import CardFacts, PrunedPart, pipeline_card, plan_card, plan_for
from .evaluation.generation import generate
from .evaluation.results import RESULTS_FILE, Evaluation
from .latents import call_parameters, default_prompts, steps_argument
from .loading import PLAN_FILE, is_repo_id, load_pipeline
from .measurements import MEASUREMENTS_FILE, Measurements, measured
from .modeling import PLAN_KEY, RECORD_KEY
from .pipeline import profile
from .plan import PlanError, PruningPlan, write_atomically
from .remote_code import add_remote_code
from .report import figure_png, importance_figure, modified_figure, picture_grid
from .scores import OperatorScores
from .stock import StockRecord

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


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError for what is no id of a repository."""
    if not is_repo_id(repo_id):
        raise ValueError(f"repository: got {repo_id!r}, expected user/name or org/name")


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
    folder: Path, pipe: Any, component: str, evidence: Evidence
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
    return measured(component, before, after, call), captions, players


def _licence(evidence: Evidence, base_model: str | None, token: str | None) -> dict[str, str]:
    """The licence as stated, or that of the original's card: on the Hub, or in its folder. Empty if there is none."""
    if evidence.license:
        return {"license": evidence.license}
    original = evidence.original if isinstance(evidence.original, (str, os.PathLike)) else None
    folder = Path(original).expanduser() if original else None
    if original and str(original).startswith("demo:"):
        folder = demo.path(str(original).removeprefix("demo:"))
    card = folder / CARD_FILE if folder and (folder / CARD_FILE).is_file() else base_model
    if card is None:
        return {}
    try:
        data = ModelCard.load(card, token=token, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError):  # no card; or no Hub to be reached, as in a dry run
        return {}
    keys = ("license", "license_name", "license_link")
    return {k: data[k] for k in keys if isinstance(data.get(k), str)}


def _base_model(folder: Path, evidence: Evidence, token: str | None) -> str | None:
    """Hub id of the original: as stated, as measured, the teacher, or what the pipeline was loaded from, if the Hub has it.

    Raises:
        ValueError: the stated one is no Hub id, or not on the Hub.
    """
    stated = evidence.base_model
    if stated is not None and not is_repo_id(stated):
        raise ValueError(f"base_model: got {stated!r}, expected a Hub id such as org/model, never a local path")
    known = stated or (evidence.measurements.base_model if evidence.measurements else None)
    index = _read(folder / "model_index.json")
    guesses = (evidence.original, (evidence.recipe or {}).get("teacher"), index.get("_name_or_path"))
    names = [str(g) for g in guesses if isinstance(g, (str, os.PathLike))]
    name = known or next((n for n in names if is_repo_id(n) and not Path(n).exists()), None)
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


def _beside(folder: Path, evidence: Evidence) -> Evidence:
    """The evidence, with what it lacks and lies beside a result: measurements, scores, an evaluation, a recipe."""
    found: dict[str, Any] = {}
    readers: dict[str, tuple[str, Callable[[Path], Any]]] = {
        "measurements": (MEASUREMENTS_FILE, Measurements.load),
        "scores": (SCORES_FILE, OperatorScores.load),
        "evaluation": (RESULTS_FILE, Evaluation.load),
        "recipe": (RECIPE_FILE, _read),
    }
    for name, (file, read) in readers.items():
        if getattr(evidence, name) is None and (folder / file).is_file():
            found[name] = read(folder / file)
    return replace(evidence, **found)


def _datasets(evidence: Evidence) -> list[str]:
    """Hub ids of the data of the training, as stated or in the recipe."""
    named = str((evidence.recipe or {}).get("dataset_name") or "")
    return list(evidence.datasets) or ([named] if is_repo_id(named) and not Path(named).exists() else [])


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
        source: the folder of a result, if `folder` is a copy of the pipeline alone; what it lacks may lie there.
        pipe: the pruned pipeline, if it is loaded; it is loaded, if the original is to be measured and drawn beside it.

    Raises:
        ValueError: not a pruned pipeline, a base model that is none, or a file that would publish local paths.
    """
    check_repo_id(repo_id)
    source = source or folder
    parts, evidence = pruned_parts(folder), _beside(source, evidence)
    base_model = _base_model(folder, evidence, token)
    licence = _licence(evidence, base_model, token)
    forget_origin(folder)
    captions: dict[str, str] = {}
    sounds: list[tuple[str, str, str]] = []
    if evidence.original is not None:
        pipe = pipe if pipe is not None else load_pipeline(str(source))
        measurements, captions, sounds = _compare(folder, pipe, parts[0].name, evidence)
        evidence = replace(evidence, measurements=measurements)
    plan = next((part.plan for part in parts if part.plan), None)
    if plan is None and (source / PLAN_FILE).is_file():
        plan = PruningPlan.load(source / PLAN_FILE)
    captions |= _figures(folder, parts, plan, evidence.scores)
    if remote_code:
        add_remote_code(folder, [part.name for part in parts if part.plan is not None])
    facts = CardFacts(
        repo_id, str(_read(folder / "model_index.json")["_class_name"]), parts, licence, base_model, _datasets(evidence),
        evidence.measurements, evidence.evaluation, evidence.recipe or {}, training_log(source / "log.csv"), captions, sounds,
        remote_code and any(part.plan for part in parts), plan, evidence.scores is not None,
    )  # fmt: skip
    card = pipeline_card(facts)
    _write_files(folder, card, plan, evidence, base_model)
    check_private(folder, token or get_token())
    return card


def _write_files(
    folder: Path, card: str, plan: PruningPlan | None, evidence: Evidence, base_model: str | None
) -> None:
    """Card, plan, scores and measurements, without what is the user's own."""
    write_atomically(folder / CARD_FILE, card)
    if plan is not None:
        plan.save(folder / PLAN_FILE)
    if evidence.scores is not None:
        settings = evidence.scores.settings
        counted = {**settings, "conditions": len(settings.get("conditions", ()))}
        replace(evidence.scores, settings=counted).save(folder / SCORES_FILE)
    if evidence.measurements is not None:
        replace(evidence.measurements, base_model=base_model).save(folder / MEASUREMENTS_FILE)


def prepare_plan(
    plan: PruningPlan, folder: Path, repo_id: str, base_model: str | None = None, token: str | None = None
) -> str:
    """Write what `push_plan` uploads; returns the card's text."""
    check_repo_id(repo_id)
    if base_model is not None and not is_repo_id(base_model):
        raise ValueError(f"base_model: got {base_model!r}, expected a Hub id such as org/model, never a local path")
    card = plan_card(repo_id, plan, base_model)
    plan.save(folder / PLAN_FILE)
    write_atomically(folder / CARD_FILE, card)
    check_private(folder, token or get_token())
    return card
