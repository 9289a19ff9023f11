"""What the page may load and do, read from a YAML file and checked before anything is loaded. No torch, no gradio."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from .. import demo

SCORES_FILE = "scores.jsonl"
ALL_DEMOS = "demo:*"

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """Bounds on what one visitor may ask for.

    Attributes:
        prompt: characters. steps: denoising steps. pictures: pictures of each version in one request. waiting: requests in the
            queue; one more is turned away. cached: pruned denoisers that are kept ready, of each pipeline.
        gpu_seconds: time that a request asks for on ZeroGPU hardware.
    """

    prompt: int = 300
    steps: int = 50
    pictures: int = 4
    waiting: int = 40
    cached: int = 8
    gpu_seconds: int = 60

    def __post_init__(self) -> None:
        for entry in fields(self):
            if getattr(self, entry.name) < 1:
                raise ValueError(f"limits, {entry.name}: got {getattr(self, entry.name)}, expected 1 or more")


@dataclass(frozen=True)
class Version:
    """A further version of a pipeline to compare with: a pruning plan for it, or a pipeline whose denoiser is taken.

    Attributes:
        title: what the page calls it. plan: file of a plan. pipeline: folder, Hub id or demo:NAME, as for `ModelEntry`; if its
            denoiser is a pruned one, the page also shows the original with the same plan, not finetuned.
    """

    title: str
    plan: str | None = None
    pipeline: str | None = None

    def __post_init__(self) -> None:
        if (self.plan is None) == (self.pipeline is None):
            raise ValueError(f"version {self.title!r}: expected either a plan or a pipeline")


@dataclass(frozen=True)
class ModelEntry:
    """A pipeline that the page offers.

    Attributes:
        pipeline: folder, Hub id or demo:NAME. title: what the page calls it; default: its name.
        scores: file made by `ld-pruner score`; default: `scores.jsonl` in the pipeline's folder. Without one, only `versions` are offered.
        versions: further versions to compare with.
        dtype: precision of the weights. steps, guidance, k: what the page starts with. examples: prompts to click on.
        call: fixed arguments of the pipeline's call, for example {height: 512, width: 512}.
    """

    pipeline: str
    title: str = ""
    scores: str | None = None
    versions: tuple[Version, ...] = ()
    dtype: str = "float32"
    steps: int = 20
    guidance: float | None = None
    k: int = 40
    examples: tuple[str, ...] = ()
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.title or self.pipeline


def _demo_entries() -> tuple[ModelEntry, ...]:
    """Every pipeline that ships with the package and its scores, those with prompts first; settings of `ld-pruner demo`."""
    scored = [name for name in demo.names() if (demo.path(name) / SCORES_FILE).is_file()]
    return tuple(
        ModelEntry(
            f"demo:{name}", title=f"{name.capitalize()} (demo)", steps=15, guidance=3.0, k=80,
            examples=tuple(demo.PROMPTS.get(name, ())),
        )
        for name in sorted(scored, key=lambda name: name not in demo.PROMPTS)
    )  # fmt: skip


@dataclass(frozen=True)
class AppConfig:
    """Everything that the page may load, and its limits."""

    models: tuple[ModelEntry, ...] = field(default_factory=_demo_entries)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        names = [entry.name for entry in self.models]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"models: got {names}, expected at least one, each with a title of its own")
        for entry in self.models:
            if not 1 <= entry.steps <= self.limits.steps:
                raise ValueError(f"models, {entry.name}, steps: got {entry.steps}, expected 1 to {self.limits.steps}")


def load_config(path: str | os.PathLike | None = None) -> AppConfig:
    """Read the YAML file of the page; without one, every demo pipeline is offered. Paths in it are relative to its folder.

    Raises:
        ValueError: unknown or missing entry, wrong type, damaged file. OSError: no such file. ImportError: no pyyaml.
    """
    if path is None:
        return AppConfig()
    try:
        import yaml
    except ImportError as error:
        raise ImportError("reading a config needs pyyaml: pip install 'ld_pruner_hf[app]'") from error
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        return _read(data or {}, path.parent)
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _read(data: Any, folder: Path) -> AppConfig:
    _check_keys(data, ("models", "limits"), "the file")
    models: list[ModelEntry] = []
    for i, entry in enumerate(_list(data.get("models", [{"pipeline": ALL_DEMOS}]), "models")):
        where = f"models[{i}]"
        if isinstance(entry, Mapping) and entry.get("pipeline") == ALL_DEMOS:
            _check_keys(entry, ("pipeline",), where)
            models += _demo_entries()
        else:
            models.append(_model(entry, where, folder))
    return AppConfig(tuple(models), _make(Limits, data.get("limits", {}), "limits"))


def _model(data: Any, where: str, folder: Path) -> ModelEntry:
    _check_keys(data, [f.name for f in fields(ModelEntry)], where)
    versions = tuple(
        _make(Version, v, f"{where}, versions[{i}]")
        for i, v in enumerate(_list(data.get("versions", []), f"{where}, versions"))
    )
    examples = tuple(str(e) for e in _list(data.get("examples", []), f"{where}, examples"))
    entry = _make(ModelEntry, {**data, "versions": versions, "examples": examples}, where)
    return replace(
        entry, pipeline=_local(entry.pipeline, folder), scores=entry.scores and str(folder / entry.scores),
        versions=tuple(
            replace(v, plan=v.plan and str(folder / v.plan), pipeline=v.pipeline and _local(v.pipeline, folder))
            for v in versions
        ),
    )  # fmt: skip


def _local(pipeline: str, folder: Path) -> str:
    """The path of a pipeline's folder beside the config, else the name as it is."""
    return str(folder / pipeline) if (folder / pipeline).is_dir() else pipeline


def _make(kind: type[T], data: Any, where: str) -> T:
    """A dataclass from a mapping; every entry must have the type of its field."""
    _check_keys(data, [f.name for f in fields(kind)], where)  # type: ignore[arg-type]
    hints = get_type_hints(kind)
    for name, value in data.items():
        allowed = _types(hints[name])
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            names = " or ".join(t.__name__ for t in allowed if t is not type(None))
            raise ValueError(f"{where}, {name}: got {value!r}, expected {names}")
    try:
        return kind(**data)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def _types(hint: Any) -> tuple[type, ...]:
    """The classes that a value of this type may have; a whole number is a float, too."""
    parts = hint.__args__ if type(hint).__name__ in ("UnionType", "Union") else (hint,)
    types = tuple(getattr(p, "__origin__", p) for p in parts)
    return (*types, int) if float in types else types


def _check_keys(data: Any, known: Any, where: str) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{where}: got {type(data).__name__}, expected entries 'name: value'")
    unknown = [k for k in data if k not in known]
    if unknown:
        raise ValueError(f"{where}: got unknown entries {unknown}, expected some of {list(known)}")


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise ValueError(f"{where}: got {type(data).__name__}, expected a list")
    return data
