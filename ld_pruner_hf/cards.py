"""Model cards of pruned pipelines: metadata and text, from what was measured and nothing else."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import diffusers
from huggingface_hub import EvalResult, ModelCardData

from .evaluation.results import Evaluation, Measurement
from .loading import PLAN_FILE, is_repo_id
from .measurements import Measurements
from .plan import PruningPlan
from .report import block_of, blocks_in_order
from .stock import StockRecord

TAGS = ("diffusers", "ld-pruner", "pruned", "model-compression")
NOT_TRAINING = ("config", "output_dir", "cache_dir", "logging_dir", "report_to", "push_to_hub", "hub_model_id")
"""Flags of training/distill.py that say nothing about the training."""
PAPER = "https://arxiv.org/abs/2404.11936"
CITATION = """@article{castells2024ldpruner,
  title  = {LD-Pruner: Efficient Pruning of Latent Diffusion Models using Task-Agnostic Insights},
  author = {Castells, Thibault and Song, Hyoung-Kyu and Kim, Bo-Kyeong and Choi, Shinkook},
  journal = {arXiv preprint arXiv:2404.11936}, year = {2024}
}"""

_PATH = re.compile(r"(?<![\w:/.~-])(?:~|\.{1,2})?/(?:[^\s'\",;:()]*/)?([^\s'\",;:()/]+)/?")

_FILE = re.compile(r"\.(parquet|tar|zip|txt|jsonl?|csv)\b")


def without_paths(text: str) -> str:
    """The text with local paths cut to their last part; Hub ids and web addresses stay.

    >>> without_paths("ld-pruner prune /home/me/sd plans/a.json --output ~/out https://hf.co/a/b")
    'ld-pruner prune sd plans/a.json --output out https://hf.co/a/b'
    """
    return _PATH.sub(r"\1", text)


@dataclass(frozen=True)
class PrunedPart:
    """A model of the pipeline that was pruned: by a plan in its config, or into a stock model (`record`), or both in turn."""

    name: str
    model_class: str
    plan: PruningPlan | None
    record: StockRecord | None
    params_before: int

    @property
    def params(self) -> int:
        """Parameters that it has now."""
        if self.plan is not None:
            return self.plan.params_before - self.plan.params_removed
        return self.record.params_after if self.record else self.params_before

    @property
    def how(self) -> str:
        """In words: "20 operators", "bk-sdm-small"."""
        words = [self.record.how] if self.record and self.record.how != "plan" else []
        removed = len(self.plan) if self.plan else len(self.record.removed) if self.record else 0
        return " and ".join([*words, *([f"{removed} operators"] if removed else [])])


@dataclass(frozen=True)
class CardFacts:
    """Everything that a card says.

    Attributes:
        parts: the pruned models.
        licence: entries `license`, `license_name`, `license_link` of the metadata, as far as they are known.
        recipe: flags of the training after pruning. training: what its log says, in words.
        plan: the one in the file of its own. figures: file -> caption. sounds: pairs of files (label, original, pruned).
    """

    repo_id: str
    pipeline_class: str
    parts: Sequence[PrunedPart]
    licence: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None
    datasets: Sequence[str] = ()
    measurements: Measurements | None = None
    evaluation: Evaluation | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    training: str = ""
    figures: Mapping[str, str] = field(default_factory=dict)
    sounds: Sequence[tuple[str, str, str]] = ()
    remote_code: bool = False
    plan: PruningPlan | None = None
    has_scores: bool = False

    @property
    def is_stock(self) -> bool:
        return all(part.plan is None for part in self.parts)

    @property
    def is_trained(self) -> bool:
        return bool(self.recipe or self.training)


def task_of(pipeline_class: str) -> str | None:
    """The Hub's name of the pipeline's task; None where it has none.

    >>> task_of("StableDiffusionPipeline"), task_of("DDPMPipeline"), task_of("AudioDiffusionPipeline")
    ('text-to-image', 'unconditional-image-generation', 'audio-to-audio')
    """
    cls = getattr(diffusers, pipeline_class, None)
    if cls is None:
        return None
    parameters = inspect.signature(cls.__call__).parameters
    module = vars(sys.modules[cls.__module__])
    required = [name for name, p in parameters.items() if p.default is p.empty]
    takes_picture = "strength" in parameters or "image" in required or "mask_image" in parameters
    if "AudioPipelineOutput" in module:
        if "prompt" in parameters:
            return "text-to-audio"
        return "audio-to-audio" if {"audio", "audio_file", "raw_audio"} & set(parameters) else None
    if "VideoProcessor" in module:
        return (
            "video-to-video"
            if "video" in parameters
            else "image-to-video"
            if "image" in parameters
            else "text-to-video"
        )
    if takes_picture:
        return "image-to-image"
    return "text-to-image" if "prompt" in parameters else "unconditional-image-generation"


def plan_for(part: PrunedPart, plan: PruningPlan | None) -> PruningPlan | None:
    """What was taken out of this model: the plan in its config, or, of a stock model, the one in the file beside it."""
    return part.plan or (plan if plan is not None and plan.component in ("", part.name) else None)


def _labels(evaluation: Evaluation | None) -> list[str]:
    """Labels of the models that were evaluated: the published one is the last, the original, if it is there, the first."""
    return list(evaluation.models) if evaluation else []


def _dataset(measurement: Measurement) -> str:
    """The reference data, without folders."""
    text = without_paths(measurement.dataset or "")
    return re.sub(r"^\S*/", "", text) if _FILE.search(text) else text


# ---- metadata --------------------------------------------------------------------------------------------------------


def metadata(facts: CardFacts) -> ModelCardData:
    """The card's YAML block."""
    task = task_of(facts.pipeline_class)
    tags = [*TAGS, *(["distillation"] if facts.is_trained else []), *(["audio"] if task and "audio" in task else [])]
    results = [
        EvalResult(
            task_type=task or "other",
            dataset_type=_dataset(m) if is_repo_id(_dataset(m)) else "other",
            dataset_name=_dataset(m) or "not stated",
            metric_type=m.name.lower().replace(" ", "-"),
            metric_name=f"{m.name} ({m.extractor})",
            metric_value=float(m.value),
        )
        for m in (facts.evaluation.results if facts.evaluation else ())
        if m.extractor and m.model == _labels(facts.evaluation)[-1]
    ]
    entries: dict[str, Any] = dict(facts.licence)
    if facts.base_model:
        entries |= {"base_model": facts.base_model, "base_model_relation": "finetune"}
    return ModelCardData(
        library_name="diffusers", tags=tags, pipeline_tag=task, datasets=list(facts.datasets) or None,
        eval_results=results or None, model_name=facts.repo_id.partition("/")[2] if results else None, **entries,
    )  # fmt: skip


# ---- text ------------------------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1) -> str:
    """A Markdown table; columns after the first `text_columns` are numbers."""
    rule = ["---" if i < text_columns else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _millions(n: float) -> str:
    return f"{n / 1e6:.3f} M" if n < 1e7 else f"{n / 1e6:.1f} M"


def _change(before: float | None, after: float | None) -> str:
    return f" ({100 * (after / before - 1):+.1f}%)" if before and after is not None else ""


def _title(facts: CardFacts) -> str:
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "A pipeline"
    lines = []
    for part in facts.parts:
        after = part.params
        size = f"{_millions(part.params_before)} -> {_millions(after)} parameters{_change(part.params_before, after)}"
        lines.append(f"`{part.name}` ({part.model_class}): {part.how} taken out, {size}.")
    done = "pruned and trained again" if facts.is_trained else "pruned"
    return (
        f"# {facts.repo_id.partition('/')[2]}\n\n{base} (`{facts.pipeline_class}`), {done} with `ld_pruner_hf`, an implementation of "
        f"[LD-Pruner]({PAPER}).\n\n" + "\n".join(f"- {line}" for line in lines)
    )


def _loading(facts: CardFacts) -> str:
    plain = f'from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained("{facts.repo_id}")'
    if facts.is_stock:
        return f"## Load it\n\nA stock diffusers pipeline; nothing else is needed:\n\n```python\n{plain}\n```"
    text = (
        "## Load it\n\n```bash\npip install ld_pruner_hf\n```\n\n"
        f"```python\nimport ld_pruner_hf  # lets diffusers load pruned models\n{plain}\n```"
    )
    if facts.remote_code:
        flag = plain.replace('")', '", trust_remote_code=True)')
        return f"{text}\n\nOr without that package, by running the code that is in this repository:\n\n```python\n{flag}\n```"
    return f"{text}\n\nWithout the import, diffusers refuses to load the pruned model; it is never filled with random weights."


def _removed(part: PrunedPart, plan: PruningPlan | None) -> str:
    text = f"### `{part.name}`\n\n"
    if part.record is not None:
        source = f" Source: {part.record.source}." if part.record.source else ""
        rows = [[f"`{k}`", f"`{json.dumps(v)}`"] for k, v in part.record.config.items()]
        text += f"Made a stock model by {part.record.how}.{source} Entries of its config that changed:\n\n"
        text += table(["entry", "now"], rows, text_columns=2) + "\n\n"
    if plan is None:
        return text.rstrip()
    grouped = {b: [m for m in plan if block_of(m.path) == b] for b in blocks_in_order(plan.paths)}
    rows = []
    for block, inside in grouped.items():
        kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(m.kind for m in inside).most_common())
        stand_ins = ", ".join(f"{n} {name}" for name, n in Counter(m.stand_in.name for m in inside).most_common())
        params, macs = sum(m.params_removed for m in inside), sum(m.macs_removed for m in inside)
        rows.append([f"`{block}`", kinds, stand_ins, f"{params:,}", f"{macs:,}"])
    text += table(["block", "taken out", "in their place", "parameters", "MACs a sample"], rows, text_columns=3)
    listed = "\n".join(
        f"- `{m.path}`: {m.kind} -> {m.stand_in.name}" + ("" if m.score is None else f", score {m.score:.4g}")
        for m in plan
    )
    chosen = ", ".join(f"{k} {plan.how[k]}" for k in ("criterion", "method", "k", "budget") if k in plan.how)
    chosen = f"\n\nChosen by: {chosen}." if chosen else ""
    return f"{text}{chosen}\n\n<details><summary>All {len(plan)} operators</summary>\n\n{listed}\n\n</details>"


def _cost(m: Measurements) -> str:
    names = ["parameters", "MACs a sample", "latency of a call", "IQR", "peak memory"]

    def cells(p: Any, before: Any = None) -> list[str]:
        latency = "-" if p.latency_ms is None else f"{p.latency_ms:.2f} ms"
        iqr = "-" if p.latency_iqr_ms is None else f"{p.latency_iqr_ms:.2f} ms"
        memory = "-" if p.peak_memory_mb is None else f"{p.peak_memory_mb:.0f} MB"
        changes = [_change(before and getattr(before, k), getattr(p, k)) for k in ("params", "macs", "latency_ms")]
        values = [_millions(p.params), f"{p.macs / 1e9:.4f} G", latency]
        return [a + b for a, b in zip(values, changes, strict=True)] + [iqr, memory]

    rows = [["original", *cells(m.before)]] if m.before else []
    rows.append(["pruned", *cells(m.after, m.before)])
    call = ", ".join(f"{k}={v}" for k, v in m.call.items())
    return (
        f"## Cost of one call of `{m.component}`\n\n{table(['', *names], rows)}\n\nMedian of timed calls with "
        f"{m.after.batch_size} samples{f' ({call})' if call else ''}; peak memory is the whole process's on a CPU. "
        f"A difference in latency smaller than the IQR says nothing. Measured on {m.environment}."
    )


def _quality(facts: CardFacts) -> str:
    evaluation = facts.evaluation
    if evaluation is None or not evaluation.results:
        return "## Quality\n\nNo quality metric was measured."
    labels = _labels(evaluation)
    heads = {label: label for label in evaluation.columns()} | {labels[0]: "original", labels[-1]: "pruned"}
    rows = []
    for name, extractor in dict.fromkeys((m.name, m.extractor) for m in evaluation.results):
        found = {m.model: m for m in evaluation.results if (m.name, m.extractor) == (name, extractor)}
        one = next(iter(found.values()))
        values = [found[label].text() if label in found else "-" for label in heads]
        rows.append([name, *values, extractor or "-", str(one.n or "-"), _dataset(one) or "-"])
    text = table(["", *heads.values(), "extractor", "samples", "data"], rows)
    devices = "; ".join(dict.fromkeys(m.device for m in evaluation.results if m.device))
    processor = evaluation.environment.get("processor")
    notes = [f"Measured on {devices}{f' ({processor})' if processor else ''}."]
    notes += [f"Not measured: {s['name']} ({without_paths(s['reason'])})." for s in evaluation.skipped]
    notes += [f"{without_paths(note)}." for note in evaluation.notes]
    commands = list(dict.fromkeys(without_paths(m.command) for m in evaluation.results if m.command))
    ran = f"\n\n```bash\n{chr(10).join(commands)}\n```" if commands else ""
    return f"## Quality and cost, as evaluated\n\n{text}\n\n{' '.join(notes)}{ran}"


def _training(facts: CardFacts) -> str:
    if not facts.is_trained:
        return ""
    rows = [
        [f"`{k}`", f"`{without_paths(str(v))}`"]
        for k, v in facts.recipe.items()
        if k not in NOT_TRAINING and v not in (None, False, [], "")
    ]
    flags = "\n\n" + table(["flag", "value"], rows, text_columns=2) if rows else ""
    log = f"\n\n{facts.training}" if facts.training else ""
    return f"## Training after pruning\n\nBy `training/distill.py` of ld_pruner_hf.{log}{flags}"


def _limits(facts: CardFacts) -> str:
    base = f"`{facts.base_model}`" if facts.base_model else "the original pipeline"
    lines = [f"- What {base} cannot do or should not be used for holds for this model too."]
    if not facts.is_trained:
        lines.append("- No training after pruning is recorded.")
    if any(part.plan and "criterion" in part.plan.how for part in facts.parts):
        lines.append("- Operators were scored one at a time; what removals do together was not measured by the score.")
    if facts.measurements:
        lines.append("- Latency depends on the device; it was measured on the one named above only.")
    if not facts.licence:
        lines.append("- The licence of the original is not known here, so none is stated.")
    return "## Limits\n\n" + "\n".join(lines)


def _figures(facts: CardFacts) -> str:
    pictures = [f"![{caption}]({file})\n\n*{caption}*" for file, caption in facts.figures.items()]
    if facts.sounds:
        address = f"https://huggingface.co/{facts.repo_id}/resolve/main/"
        player = '<audio controls src="{}"></audio>'
        rows = [[label, *(player.format(address + file) for file in files)] for label, *files in facts.sounds]
        pictures.append(table(["", "original", "pruned"], rows, text_columns=3))
    return "\n\n".join(pictures)


def _files(facts: CardFacts) -> str:
    lines = []
    if facts.plan:
        lines.append(f'- `{PLAN_FILE}`: the plan; `pipe.prune("{facts.repo_id}")` applies it to a sibling fine-tune')
    if facts.has_scores:
        lines.append("- `scores.jsonl`: the scores of all operators; `ld_pruner_hf.OperatorScores.load` reads them")
    if facts.measurements:
        lines.append("- `measurements.json`: the costs above")
    return "## Files\n\n" + "\n".join(lines) if lines else ""


def pipeline_card(facts: CardFacts) -> str:
    """The whole README.md of a pruned pipeline."""
    removed = "## What was removed\n\n" + "\n\n".join(
        _removed(part, plan_for(part, facts.plan)) for part in facts.parts
    )
    sections = [
        _title(facts), _figures(facts), _loading(facts), removed, _cost(facts.measurements) if facts.measurements else "",
        _quality(facts), _training(facts), _limits(facts), _files(facts), f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]  # fmt: skip
    return f"---\n{metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(s for s in sections if s) + "\n"


def plan_card(repo_id: str, plan: PruningPlan, base_model: str | None = None) -> str:
    """The README.md of a repository that holds a plan alone."""
    base: dict[str, Any] = {"base_model": base_model, "base_model_relation": "finetune"} if base_model else {}
    data = ModelCardData(library_name="diffusers", tags=[*TAGS, "pruning-plan"], **base)
    part = PrunedPart(plan.component or "model", plan.model_class, plan, None, plan.params_before)
    share = f" of {_millions(plan.params_before)}" if plan.params_before else ""
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {repo_id.partition('/')[2]}\n\nA pruning plan for `ld_pruner_hf`: {len(plan)} operators of a "
        f"{plan.model_class} (architecture {plan.architecture}), {_millions(plan.params_removed)}{share} parameters. It holds no weights "
        f"and fits every fine-tune of that architecture.\n\n```python\nimport ld_pruner_hf\nfrom diffusers import DiffusionPipeline\n\n"
        f'pipe = DiffusionPipeline.from_pretrained("{base_model or "..."}")\npipe.prune("{repo_id}")\n```\n\n'
        f"## What it removes\n\n{_removed(part, plan)}\n\n## Citation\n\n```bibtex\n{CITATION}\n```\n"
    )
