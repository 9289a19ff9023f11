"""The nouns: what an operator is, what takes its place, and the plan that lists the replacements. JSON in, JSON out; no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

PLAN_FORMAT = "ld_pruner_hf.plan"
FORMAT_VERSION = 1
PLAN_VERSION = 2
"""Of plans that have operators in `unused`; others are written as version 1."""

RULES = ("identity", "zero", "adapt", "affine")

SEVERAL = "+"
"""Between the names of components, where scores or a plan are for several: "transformer+transformer_2"."""


class PlanError(ValueError):
    """A plan, or a file of scores, that cannot be used: it says where, what was got, what was expected, and the remedy."""


def write_atomically(path: str | os.PathLike, text: str) -> None:
    """Write `text` beside `path` and move it there, so that no reader ever sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.new")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def read_json(path: str | os.PathLike, expected_format: str) -> dict[str, Any]:
    """Read a JSON file of ours; a clear error for a missing, broken or foreign one."""
    path = Path(path)
    if not path.is_file():
        raise PlanError(f"{path}: no such file; expected a JSON file in the format {expected_format!r}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise PlanError(
            f"{path}: not readable as JSON ({error}); the file is truncated or damaged, make it anew"
        ) from error
    return check_format(data, expected_format, str(path))


def check_format(data: Any, expected_format: str, where: str) -> dict[str, Any]:
    """Check the `format` and `version` entries that every file of ours begins with."""
    if not isinstance(data, dict) or data.get("format") != expected_format:
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise PlanError(f"{where}: got format {got!r}, expected {expected_format!r}")
    newest = PLAN_VERSION if expected_format == PLAN_FORMAT else FORMAT_VERSION
    if not isinstance(data.get("version"), int) or data["version"] > newest:
        raise PlanError(
            f"{where}: format version {data.get('version')!r}, this ld_pruner_hf reads up to {newest}; upgrade it"
        )
    return data


def is_inside(path: str, ancestor: str) -> bool:
    """True if the module at `path` lies strictly inside the module at `ancestor`."""
    return path.startswith(ancestor + ".")


@dataclass(frozen=True)
class OutputRule:
    """How a stand-in makes one output tensor from one input tensor.

    Attributes:
        argument: name of the operator's argument that is read; a number for the i-th of its `*args`.
        position: where that argument stands when it is passed by position.
        index: which tensor inside the argument, for arguments that are (nested) tuples.
        rule: `identity` passes it on, `zero` returns zeros of the output's shape, `adapt` changes channels or size,
            `affine` scales and shifts each channel.
        channel_dim: dimension that holds channels.
        in_channels, out_channels: sizes of that dimension; equal where the rule keeps them.
        factors: per remaining dimension behind the batch, in order: 1 keeps the size, +n upscales n times, -n pools n to 1.
    """

    argument: str
    position: int
    rule: str
    index: tuple[int, ...] = ()
    channel_dim: int = 1
    in_channels: int = 0
    out_channels: int = 0
    factors: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise PlanError(f"stand-in rule: got {self.rule!r}, expected one of {RULES}")

    @property
    def changes_channels(self) -> bool:
        return self.in_channels != self.out_channels

    @property
    def changes_size(self) -> bool:
        return any(f != 1 for f in self.factors)

    @property
    def name(self) -> str:
        """`identity`, `zero`, `conv1x1`, `pool`, `upscale`, `pool+conv1x1` or `conv1x1+upscale`."""
        if self.rule != "adapt":
            return self.rule
        conv = ["conv1x1"] if self.changes_channels else []
        if any(f < 0 for f in self.factors):
            return "+".join(["pool", *conv])
        return "+".join([*conv, "upscale"] if self.changes_size else conv) or "identity"

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {"argument": self.argument, "position": self.position, "rule": self.rule}
        if self.index:
            data["index"] = list(self.index)
        if self.rule != "identity":
            data |= {"channel_dim": self.channel_dim, "in_channels": self.in_channels}
            data |= {"out_channels": self.out_channels, "factors": list(self.factors)}
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OutputRule:
        try:
            return cls(
                argument=str(data["argument"]),
                position=int(data["position"]),
                rule=data["rule"],
                index=tuple(int(i) for i in data.get("index", ())),
                channel_dim=int(data.get("channel_dim", 1)),
                in_channels=int(data.get("in_channels", 0)),
                out_channels=int(data.get("out_channels", 0)),
                factors=tuple(int(f) for f in data.get("factors", ())),
            )
        except (KeyError, TypeError) as error:
            raise PlanError(f"stand-in rule {data!r}: {error!r}; the plan is damaged, make it anew") from error


@dataclass(frozen=True)
class StandInSpec:
    """What takes an operator's place: one rule per output tensor, and the shape of the returned structure.

    Attributes:
        rules: one `OutputRule` per tensor that the operator returns.
        structure: how the operator returned them: an index into `rules`, None, or a (nested) list of those for a tuple.
    """

    rules: tuple[OutputRule, ...]
    structure: Any = 0

    @property
    def name(self) -> str:
        parts = dict.fromkeys(part for rule in self.rules for part in rule.name.split("+") if part != "identity")
        return "+".join(parts) or "identity"

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "rules": [r.to_dict() for r in self.rules], "structure": self.structure}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StandInSpec:
        if not isinstance(data, dict) or not isinstance(data.get("rules"), (list, tuple)):
            raise PlanError(f"stand-in {data!r}: expected an entry 'rules'; the plan is damaged, make it anew")
        return cls(rules=tuple(OutputRule.from_dict(r) for r in data["rules"]), structure=data.get("structure", 0))


@dataclass(frozen=True)
class Operator:
    """One sub-module of a denoiser, as one real call showed it.

    Attributes:
        path: its name in `model.named_modules()`; `aliases` are further names of the same module.
        kind: its class name; `parent`: path of the enclosing module ("" for the denoiser itself).
        calls: how often one denoiser call runs it.
        input_shapes, output_shapes: tensors of its first call, in order; (B, C, H, W) for feature maps, (B, N, C) for tokens.
        params: parameters, own and inside. macs: multiply-accumulates of one denoiser call for one sample.
        latency_share: part of the denoiser call's time spent in it, 0 to 1; None where it was not measured (`meta` device).
        stand_ins: what can replace it, in the order in which they are tried; empty if it is no candidate.
        reason: why it is no candidate, else None.
    """

    path: str
    kind: str
    parent: str
    calls: int
    input_shapes: tuple[tuple[int, ...], ...] = ()
    output_shapes: tuple[tuple[int, ...], ...] = ()
    params: int = 0
    macs: int = 0
    latency_share: float | None = None
    stand_ins: tuple[StandInSpec, ...] = ()
    reason: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def is_candidate(self) -> bool:
        return bool(self.stand_ins)

    def to_dict(self) -> dict[str, Any]:
        data = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return data | {"stand_ins": [s.to_dict() for s in self.stand_ins]}


@dataclass(frozen=True)
class Modification:
    """An operator's path and the stand-in that replaces it.

    `params_removed` and `macs_removed` (per sample and denoiser call) are what the operator had minus what the stand-in has.
    """

    path: str
    kind: str
    stand_in: StandInSpec
    params_removed: int = 0
    macs_removed: int = 0
    score: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "kind": self.kind,
            "stand_in": self.stand_in.to_dict(),
            "params_removed": self.params_removed,
            "macs_removed": self.macs_removed,
            "score": self.score,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Modification:
        try:
            path, kind, stand_in = data["path"], data["kind"], data["stand_in"]
        except (KeyError, TypeError) as error:
            raise PlanError(f"modification {data!r}: {error!r}; the plan is damaged, make it anew") from error
        if not isinstance(path, str) or not path or not all(re.fullmatch(r"[\w-]+", part) for part in path.split(".")):
            raise PlanError(
                f"modification: got path {path!r}, expected a dotted module path such as 'mid_block.attentions.0'"
            )
        return cls(
            path=path,
            kind=str(kind),
            stand_in=StandInSpec.from_dict(stand_in),
            params_removed=int(data.get("params_removed", 0)),
            macs_removed=int(data.get("macs_removed", 0)),
            score=data.get("score"),
        )


@dataclass(frozen=True)
class PlanDiff:
    """What distinguishes one plan from another: operators that only one of them replaces, or both, differently."""

    only_self: tuple[Modification, ...]
    only_other: tuple[Modification, ...]
    changed: tuple[tuple[Modification, Modification], ...]

    def __bool__(self) -> bool:
        return bool(self.only_self or self.only_other or self.changed)

    def __str__(self) -> str:
        lines = [f"- {m.path}  {m.kind} -> {m.stand_in.name}" for m in self.only_self]
        lines += [f"+ {m.path}  {m.kind} -> {m.stand_in.name}" for m in self.only_other]
        lines += [f"! {a.path}  {a.kind} -> {a.stand_in.name}, not {b.stand_in.name}" for a, b in self.changed]
        return "\n".join(lines) or "the same operators and stand-ins"


@dataclass(frozen=True)
class PruningPlan:
    """Which operators of one denoiser are replaced, and by what. A few kB of JSON that fits every sibling fine-tune.

    Attributes:
        component: the pipeline's name of the model ("unet", "transformer"; "" for a bare model).
        model_class: its class name. architecture: fingerprint of class, parameter names and shapes before pruning.
        modifications: in the order of the model's modules; none lies inside another.
        params_before: parameters of the model before pruning.
        how: free-form record of how the plan was made (criterion, k, settings).
        unused: what goes out besides because nothing uses its results any more, such as the norm before an attention that
            became zero. `prune` finds it; it changes no output, and does not count as an operator taken out.
    """

    component: str
    model_class: str
    architecture: str
    modifications: tuple[Modification, ...]
    params_before: int = 0
    how: dict[str, Any] = field(default_factory=dict)
    unused: tuple[Modification, ...] = ()

    def __post_init__(self) -> None:
        paths = [m.path for m in (*self.modifications, *self.unused)]
        if len(set(paths)) != len(paths):
            raise PlanError(f"plan: {sorted({p for p in paths if paths.count(p) > 1})} listed more than once")
        for path in paths:
            outer = [p for p in paths if is_inside(path, p)]
            if outer:
                raise PlanError(
                    f"plan: {path!r} lies inside {outer[0]!r}, which is replaced too; keep only one of them"
                )

    def __len__(self) -> int:
        return len(self.modifications)

    def __iter__(self) -> Iterator[Modification]:
        return iter(self.modifications)

    @property
    def paths(self) -> list[str]:
        return [m.path for m in self.modifications]

    @property
    def params_removed(self) -> int:
        return sum(m.params_removed for m in (*self.modifications, *self.unused))

    @property
    def macs_removed(self) -> int:
        return sum(m.macs_removed for m in self.modifications)

    def without_unused(self, unused: Iterable[Modification]) -> PruningPlan:
        """The plan that takes these out, too. What it replaces already, and nothing uses, gets the stand-in given here."""
        new = {m.path: m for m in unused}
        modifications = []
        for m in self.modifications:
            if (lighter := new.pop(m.path, None)) is not None:
                m = replace(m, stand_in=lighter.stand_in, params_removed=m.params_removed + lighter.params_removed)
            modifications.append(m)
        return replace(self, modifications=tuple(modifications), unused=(*self.unused, *new.values()))

    def by_component(self) -> dict[str, PruningPlan]:
        """component -> the plan for it alone. A plan for several components names the component in front of each path."""
        if SEVERAL not in self.component:
            return {self.component: self}

        def part(name: str, modifications: Iterable[Modification]) -> tuple[Modification, ...]:
            prefix = f"{name}."
            return tuple(
                replace(m, path=m.path.removeprefix(prefix)) for m in modifications if m.path.startswith(prefix)
            )

        plans = {
            n: PruningPlan(n, "", "", part(n, self), how=self.how, unused=part(n, self.unused))
            for n in self.component.split(SEVERAL)
        }
        return {name: plan for name, plan in plans.items() if len(plan)}

    def with_modifications(self, modifications: Iterable[Modification], **how: Any) -> PruningPlan:
        return replace(self, modifications=tuple(modifications), how={**self.how, **how})

    def _check_sibling(self, other: PruningPlan, verb: str) -> None:
        mine, theirs = (self.model_class, self.architecture), (other.model_class, other.architecture)
        if all(a == b or not a or not b for a, b in zip(mine, theirs, strict=True)):
            return
        raise PlanError(
            f"plans to {verb}: one is for {mine}, the other for {theirs}; expected the same class and architecture"
        )

    def merge(self, other: PruningPlan, prefer: str | None = None) -> PruningPlan:
        """One plan that does what both do: of nested operators only the outer ones are kept.

        Args:
            prefer: "self" or "other": whose stand-in is taken where both replace the same operator differently.

        Raises:
            PlanError: the plans are for different architectures, or differ at an operator and `prefer` is None.
        """
        self._check_sibling(other, "merge")
        if prefer not in (None, "self", "other"):
            raise PlanError(f"prefer: got {prefer!r}, expected 'self', 'other' or None")
        mine, theirs = {m.path: m for m in self}, {m.path: m for m in other}
        differ = [p for p in mine if p in theirs and mine[p].stand_in != theirs[p].stand_in]
        if differ and prefer is None:
            names = ", ".join(f"{p} ({mine[p].stand_in.name} or {theirs[p].stand_in.name})" for p in differ[:3])
            raise PlanError(
                f"plans to merge: {len(differ)} operators have two stand-ins: {names}; say prefer='self' or 'other'"
            )
        both = (
            {**mine, **theirs} if prefer == "other" else {**mine, **{p: m for p, m in theirs.items() if p not in mine}}
        )
        kept = (m for m in both.values() if not any(is_inside(m.path, p) for p in both))
        return replace(
            self, component=self.component or other.component, model_class=self.model_class or other.model_class,
            architecture=self.architecture or other.architecture, modifications=tuple(kept),
            params_before=self.params_before or other.params_before, how={"merged": [self.how, other.how]},
            unused=(),  # `prune` looks for them anew
        )  # fmt: skip

    def diff(self, other: PruningPlan) -> PlanDiff:
        """What distinguishes two plans for the same architecture; falsy if they do the same.

        Raises:
            PlanError: the plans are for different architectures.
        """
        self._check_sibling(other, "compare")
        mine, theirs = {m.path: m for m in self}, {m.path: m for m in other}
        return PlanDiff(
            only_self=tuple(m for m in self if m.path not in theirs),
            only_other=tuple(m for m in other if m.path not in mine),
            changed=tuple(
                (m, theirs[m.path]) for m in self if m.path in theirs and m.stand_in != theirs[m.path].stand_in
            ),
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": PLAN_FORMAT,
            "version": PLAN_VERSION if self.unused else FORMAT_VERSION,
            "component": self.component,
            "model_class": self.model_class,
            "architecture": self.architecture,
            "params_before": self.params_before,
            "how": self.how,
            "modifications": [m.to_dict() for m in self.modifications],
            **({"unused": [m.to_dict() for m in self.unused]} if self.unused else {}),
        }

    @classmethod
    def from_dict(cls, data: Any, where: str = "plan") -> PruningPlan:
        data = check_format(data, PLAN_FORMAT, where)
        if not isinstance(data.get("modifications"), (list, tuple)):
            raise PlanError(f"{where}: expected a list 'modifications'; the plan is damaged, make it anew")
        return cls(
            component=str(data.get("component", "")),
            model_class=str(data.get("model_class", "")),
            architecture=str(data.get("architecture", "")),
            modifications=tuple(Modification.from_dict(m) for m in data["modifications"]),
            params_before=int(data.get("params_before", 0)),
            how=dict(data.get("how", {})),
            unused=tuple(Modification.from_dict(m) for m in data.get("unused", ())),
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the plan as JSON."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> PruningPlan:
        """Read a plan that `save` wrote; `PlanError` if it is missing, damaged or from a newer version."""
        return cls.from_dict(read_json(path, PLAN_FORMAT), str(path))

    def __str__(self) -> str:
        lines = [
            f"{len(self)} operators of {self.component or self.model_class}, {self.params_removed / 1e6:.2f}M params removed"
        ]
        width = max((len(m.path) for m in self.modifications), default=0)
        for m in self.modifications:
            score = "" if m.score is None else f"  score {m.score:.4g}"
            lines.append(f"  {m.path:<{width}}  {m.kind} -> {m.stand_in.name}{score}")
        if self.unused:
            lines.append(
                f"and {len(self.unused)} that nothing uses any more: {', '.join(m.path for m in self.unused)}"
            )
        if "agreement" in self.how:
            lines.append(f"two halves of the scores agree on {self.how['agreement']:.0%} of them")
        if "saved_as" in self.how:
            lines.append(f"saved as a {self.how['saved_as']}")
        return "\n".join(lines)
