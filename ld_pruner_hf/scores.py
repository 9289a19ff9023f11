"""What scoring found: one row per operator and stand-in, in a file that grows row by row and survives a kill."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .plan import FORMAT_VERSION, Modification, PlanError, StandInSpec, check_format, read_json, write_atomically

SCORES_FORMAT = "ld_pruner_hf.scores"
DOCUMENT_FORMAT = "ld_pruner_hf.scores_document"
END = "end_of_run"

LATENT_SHIFT: dict[str, Callable[[float, float], float]] = {
    "latent-shift": lambda avg, std: avg + std,  # LD-Pruner, equation 7
    "latent-shift-product": lambda avg, std: avg * std,
    "latent-shift-mean": lambda avg, std: avg,
    "latent-shift-std": lambda avg, std: std,
}
"""criterion -> score of one condition from avg_dist and std_dist. They are measured together."""

MEASURED_ALONE = {
    "output-error": "output_error",  # LAPTOP-Diff, one-shot surrogate
    "block-influence": "block_influence",
    "taylor": "taylor",
    "magnitude": "magnitude",
    "random": "random",
}
"""criterion -> field of `OperatorScore` that is the score. Each has a measurement of its own (module `criteria`)."""

CRITERIA = (*LATENT_SHIFT, *MEASURED_ALONE)
"""What operators can be ranked by; see docs/scoring.md."""


NORMS = ("latent-shift", "latent-shift-mean", "latent-shift-std")
"""Criteria that are distances. What several operators do adds up in their squares, as independent disturbances do [ours]."""


def additive(criterion: str, score: float) -> float:
    """What adds up over operators: the score, or its square where the criterion is a distance."""
    return score * score if criterion in NORMS else score


def combined(criterion: str, scores: Iterable[float]) -> float:
    """What several operators do together, as far as single scores tell; in units of the score."""
    total = math.fsum(additive(criterion, score) for score in scores)
    return math.sqrt(total) if criterion in NORMS else total


def check_criterion(criterion: str) -> str:
    if criterion not in CRITERIA:
        raise ValueError(f"criterion: got {criterion!r}, expected one of {list(CRITERIA)}")
    return criterion


def measured_with(criterion: str) -> tuple[str, ...]:
    """The criteria that a measurement for this one gives: itself, and those measured together with it."""
    return tuple(LATENT_SHIFT) if check_criterion(criterion) in LATENT_SHIFT else (criterion,)


@dataclass(frozen=True)
class OperatorScore:
    """The damage of replacing one operator by one stand-in.

    Attributes:
        path, kind: the operator. stand_in: what replaced it.
        avg_dist, std_dist: one value per condition (one in all, where conditions are pooled): the distances of the mean and
            of the standard deviation of the final latents (LD-Pruner, equations 1 and 2). Empty if not measured.
        output_error, block_influence, taylor, magnitude, random: the scores by these criteria; None if not measured.
        params_removed, macs_removed: operator minus stand-in; MACs per sample and denoiser call.
        latency_share: part of the denoiser's time spent in the operator; None if not measured.
        seconds: how long this row took to measure.
        error: why there is no score, else None.
    """

    path: str
    kind: str
    stand_in: StandInSpec
    avg_dist: tuple[float, ...] = ()
    std_dist: tuple[float, ...] = ()
    output_error: float | None = None
    block_influence: float | None = None
    taylor: float | None = None
    magnitude: float | None = None
    random: float | None = None
    params_removed: int = 0
    macs_removed: int = 0
    latency_share: float | None = None
    seconds: float = 0.0
    error: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.path, self.stand_in.name

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria that were measured; all of them for a failed row, which ranks last by each."""
        if self.error is not None:
            return CRITERIA
        latent_shift = tuple(LATENT_SHIFT) if self.avg_dist else ()
        return (*latent_shift, *(c for c, field in MEASURED_ALONE.items() if getattr(self, field) is not None))

    def score(self, criterion: str = "latent-shift") -> float:
        """By the latent-shift criteria the sum over conditions; infinite where the modified model failed, so that it ranks last.

        Raises:
            ValueError: an unknown criterion, or one that was not measured.
        """
        if check_criterion(criterion) not in self.criteria:
            raise ValueError(_not_measured(criterion, self.criteria))
        if self.error is not None:
            return math.inf
        if criterion in MEASURED_ALONE:
            return getattr(self, MEASURED_ALONE[criterion])
        combine = LATENT_SHIFT[criterion]
        return math.fsum(combine(a, s) for a, s in zip(self.avg_dist, self.std_dist, strict=True))

    def modification(self, criterion: str = "latent-shift") -> Modification:
        """What a plan says of replacing this operator; its score is by that criterion, ValueError as for `score`."""
        return Modification(
            self.path, self.kind, self.stand_in, self.params_removed, self.macs_removed, self.score(criterion)
        )

    def to_dict(self) -> dict[str, Any]:
        data = {k: getattr(self, k) for k in self.__dataclass_fields__}
        return data | {"stand_in": self.stand_in.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> OperatorScore:
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        try:
            known["stand_in"] = StandInSpec.from_dict(known["stand_in"])
            known["avg_dist"], known["std_dist"] = tuple(known["avg_dist"]), tuple(known["std_dist"])
            return cls(**known)
        except (KeyError, TypeError) as error:
            raise PlanError(f"score row {data!r}: {error!r}") from error


def _not_measured(criterion: str, measured: tuple[str, ...]) -> str:
    return f"criterion: got {criterion!r}, these scores hold {list(measured)}; score with criterion={criterion!r} to have it"


@dataclass(frozen=True)
class OperatorScores:
    """All rows of one scoring run and what they were measured with.

    Attributes:
        rows: in the order of the model's modules.
        architecture, weights: fingerprints of the scored model. model_class, component: which one it was.
        settings: everything that the numbers depend on (conditions, seeds, steps, ...).
        criterion: what the rows are ranked by; see `criteria` for what they can be ranked by.
    """

    rows: tuple[OperatorScore, ...]
    architecture: str
    weights: str
    model_class: str
    component: str
    settings: dict[str, Any]
    criterion: str = "latent-shift"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[OperatorScore]:
        return iter(self.rows)

    @property
    def criteria(self) -> tuple[str, ...]:
        """The criteria that every row was measured for."""
        return tuple(c for c in CRITERIA if all(c in row.criteria for row in self.rows))

    def _check(self, criterion: str | None) -> str:
        criterion = check_criterion(criterion or self.criterion)
        if criterion not in self.criteria:
            raise ValueError(_not_measured(criterion, self.criteria))
        return criterion

    def ranked(self, criterion: str | None = None) -> list[OperatorScore]:
        """One row per operator, with its best stand-in, least important first; failed ones last.

        Raises:
            ValueError: a criterion that was not measured.
        """
        criterion = self._check(criterion)
        best: dict[str, OperatorScore] = {}
        for row in self.rows:
            if row.path not in best or row.score(criterion) < best[row.path].score(criterion):
                best[row.path] = row
        return sorted(best.values(), key=lambda row: row.score(criterion))

    def with_criterion(self, criterion: str) -> OperatorScores:
        """The same rows, ranked by another criterion.

        Raises:
            ValueError: a criterion that was not measured.
        """
        return replace(self, criterion=self._check(criterion))

    def halves(self) -> tuple[OperatorScores, OperatorScores] | None:
        """The same rows scored with every second condition, and with the others; None where they were not scored one by one.

        Estimates (`effort`) have the two halves of their latents in place of conditions.
        """
        if self.criterion not in LATENT_SHIFT or any(len(r.avg_dist) < 2 for r in self.rows if r.error is None):
            return None

        def half(i: int) -> OperatorScores:
            rows = (replace(r, avg_dist=r.avg_dist[i::2], std_dist=r.std_dist[i::2]) for r in self.rows)
            return replace(self, rows=tuple(rows))

        return half(0), half(1)

    def header(self) -> dict[str, Any]:
        return {
            "format": SCORES_FORMAT,
            "version": FORMAT_VERSION,
            "architecture": self.architecture,
            "weights": self.weights,
            "model_class": self.model_class,
            "component": self.component,
            "settings": self.settings,
            "criterion": self.criterion,
        }

    def save(self, path: str | os.PathLike) -> None:
        """Write all rows as JSON lines, the header first: the format that `pipe.score(resume_from=...)` writes."""
        lines = [json.dumps(line) for line in (self.header(), *(row.to_dict() for row in self.rows), {END: True})]
        write_atomically(path, "\n".join(lines) + "\n")

    def to_json(self, path: str | os.PathLike) -> None:
        """Write everything as one JSON document, for other programs; `load` reads it too."""
        document = self.header() | {"format": DOCUMENT_FORMAT, "rows": [row.to_dict() for row in self.rows]}
        write_atomically(path, json.dumps(document, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> OperatorScores:
        """Read a file of scores, written row by row, by `save` or by `to_json`.

        Raises:
            PlanError: missing, damaged, of another format, or broken off inside a line.
        """
        if _is_document(path):
            header = read_json(path, DOCUMENT_FORMAT)
            rows = _rows(header.get("rows"), str(path))
        else:
            file = read_rows(path)
            header, rows = file.header, file.rows
            if not file.complete:
                raise PlanError(
                    f"{path}: breaks off after {len(rows)} rows; finish it with pipe.score(resume_from={str(path)!r})"
                )
        keys = ("architecture", "weights", "model_class", "component", "settings", "criterion")
        try:
            return cls(tuple(rows), **{k: header[k] for k in keys})
        except KeyError as error:
            raise PlanError(f"{path}: has no {error}; it is no complete file of scores, score again") from error

    def table(self, criterion: str | None = None) -> list[dict[str, Any]]:
        """Plain rows, least important operator first, one per operator and stand-in."""
        criterion, criteria = self._check(criterion), self.criteria
        result = []
        for rank, row in enumerate(sorted(self.rows, key=lambda r: r.score(criterion)), 1):
            entry: dict[str, Any] = {"rank": rank, "path": row.path, "kind": row.kind, "stand_in": row.stand_in.name}
            entry |= {name: None if row.error else row.score(name) for name in criteria}
            entry |= {"params_removed": row.params_removed, "macs_removed": row.macs_removed}
            result.append(entry | {"latency_share": row.latency_share, "error": row.error})
        return result

    def to_csv(self, path: str | os.PathLike) -> None:
        """Write `table()` as comma-separated values."""
        table = self.table()
        out = io.StringIO()
        writer = csv.DictWriter(out, fieldnames=list(table[0]) if table else ["rank"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)
        write_atomically(path, out.getvalue())

    def __str__(self) -> str:
        ranked = self.ranked()
        failed = sum(row.error is not None for row in ranked)
        shown = ranked if len(ranked) <= 20 else [*ranked[:12], None, *ranked[-5:]]
        width = max((len(row.path) for row in shown if row), default=4)
        lines = [
            f"{len(ranked)} operators of {self.component or self.model_class}, {failed} failed; {self.criterion}, low = unimportant"
        ]
        lines.append(f"  {'operator':<{width}}  {'kind':<22} {'stand-in':<13} {'score':>10} {'params':>9} {'MACs':>8}")
        for row in shown:
            if row is None:
                lines.append(f"  ... {len(ranked) - 17} more")
                continue
            score = "failed" if row.error else f"{row.score(self.criterion):.4g}"
            saved = f"{row.params_removed / 1e6:>8.3f}M {row.macs_removed / 1e9:>7.3f}G"
            lines.append(f"  {row.path:<{width}}  {row.kind:<22} {row.stand_in.name:<13} {score:>10} {saved}")
        return "\n".join(lines)


def _is_document(path: str | os.PathLike) -> bool:
    """Is the file one JSON document (`to_json`), and not lines of JSON?"""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and data.get("format") == DOCUMENT_FORMAT


def _rows(data: Any, where: str) -> list[OperatorScore]:
    if not isinstance(data, list) or not all(isinstance(row, dict) for row in data):
        raise PlanError(f"{where}: expected a list 'rows' of objects; the file is damaged, score again")
    return [OperatorScore.from_dict(row) for row in data]


@dataclass(frozen=True)
class ScoreFile:
    """What a file of score rows holds: `good_bytes` end with its last whole line, `complete` says that a run ended there."""

    header: dict[str, Any]
    rows: list[OperatorScore]
    good_bytes: int
    complete: bool


def read_rows(path: str | os.PathLike) -> ScoreFile:
    """Read a file of score rows; a last line without its end was cut off by a kill and is left out."""
    path = Path(path)
    if not path.is_file():
        raise PlanError(f"{path}: no such file of scores; make one with pipe.score(resume_from=...)")
    data = path.read_bytes()
    good = data.rfind(b"\n") + 1
    lines = data[:good].splitlines()
    if not lines:
        raise PlanError(f"{path}: the file has no complete first line; delete it and score again")
    parsed = []
    for number, line in enumerate(lines, 1):
        try:
            parsed.append(json.loads(line))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(
                f"{path}, line {number}: not readable as JSON ({error}); the file is damaged, score again"
            ) from error
        if not isinstance(parsed[-1], dict):
            raise PlanError(f"{path}, line {number}: got {type(parsed[-1]).__name__}, expected an object; score again")
    header = check_format(parsed[0], SCORES_FORMAT, str(path))
    rows = []
    for number, row in enumerate(parsed[1:], 2):
        if END in row:
            continue
        try:
            rows.append(OperatorScore.from_dict(row))
        except PlanError as error:
            raise PlanError(f"{path}, line {number}: {error}; the file is damaged, score again") from error
    return ScoreFile(header, rows, good, complete=good == len(data) and END in parsed[-1])


class RowFile:
    """A file of scores that is written row by row; each row is on the disk before the next is measured.

    Several processes may fill one file: each writes rows to a part of its own (`scores.jsonl.part3`), reads those of the
    others, and takes over what is left when no part has grown for long. Whoever has seen every row writes the whole file.

    Args:
        path: of the file, or None to keep the rows in memory. header: what the rows were measured with.
        rank, processes: which of how many processes this is.

    Raises:
        PlanError: the file or a part is damaged, or made by another run.
    """

    PATIENCE = 5.0, 20.0
    """Parts count as abandoned when none has grown for the longest time that a row took, times the first; at least the second, in s."""

    def __init__(
        self, path: str | os.PathLike | None, header: dict[str, Any], rank: int = 0, processes: int = 1
    ) -> None:
        self.path = None if path is None else Path(path)
        self.header = header
        self.rank, self.processes = (rank, processes) if path is not None else (0, 1)
        self.found: dict[tuple[str, str], OperatorScore] = {}
        self._longest = 0.0
        self._complete = False
        if self.path is None:
            return
        self._own = self._part(rank) if self.processes > 1 else self.path
        if self.path.exists() and self.path.stat().st_size:
            self._complete = self._read(self.path).complete
        self._read_parts()
        if self._own.exists() and self._own.stat().st_size:
            good = self._read(self._own).good_bytes
            with open(self._own, "r+b") as file:
                file.truncate(good)
        elif not self._complete:
            write_atomically(self._own, json.dumps(header) + "\n")

    def _part(self, rank: int) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.name}.part{rank}")

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.part*")) if self.path is not None else []

    def _read(self, path: Path) -> ScoreFile:
        """Take the rows of a file of the same run."""
        old = read_rows(path)
        ignored = ("criterion",)
        header = self.header
        differ = [k for k in header if k not in ignored and json.loads(json.dumps(header[k])) != old.header.get(k)]
        if differ:
            what = "; ".join(
                f"{k}: file has {_short(old.header.get(k), header[k])}, this run {_short(header[k], old.header.get(k))}"
                for k in differ
            )
            raise PlanError(f"{path}: made by another run ({what}); pass the same model and settings, or another file")
        for row in old.rows:
            self.found.setdefault(row.key, row)
        return old

    def _read_parts(self) -> None:
        for part in self._parts():
            try:
                self._read(part)
            except (PlanError, FileNotFoundError):
                if part.exists():  # else another process has just written the whole file
                    raise
        if self.processes > 1 and self.path is not None and self.path.exists():
            self._read(self.path)

    def pending(self, keys: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """What this process is to measure of `keys`, one by one; it ends when all of them are found, here or elsewhere."""
        yield from keys[self.rank :: self.processes]
        waiting_since = time.time()
        while self.processes > 1:
            self._read_parts()
            left = [key for key in keys if key not in self.found]
            if not left:
                return
            grown = max([waiting_since, *(part.stat().st_mtime for part in self._parts() if part.exists())])
            if time.time() - grown > max(self.PATIENCE[0] * self._longest, self.PATIENCE[1]):
                yield left[self.rank * len(left) // self.processes]
            else:
                time.sleep(0.2)

    def append(self, row: OperatorScore) -> None:
        self._write(row.to_dict())
        self.found[row.key] = row
        self._longest = max(self._longest, row.seconds)
        self._complete = False

    def end(self, keys: Sequence[tuple[str, str]] = ()) -> None:
        """Note that the run is complete, so that `OperatorScores.load` takes the file; its rows are then in the order of `keys`."""
        if self.path is None or self._complete:
            return
        keys = keys or list(self.found)
        if self._parts() or (self.processes == 1 and list(self.found) != list(keys)):
            rows = [self.found[key].to_dict() for key in keys]
            write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in (self.header, *rows, {END: True})))
            for part in self._parts():
                part.unlink(missing_ok=True)
        elif self.processes == 1:
            self._write({END: True})
        self._complete = True

    def _write(self, line: dict[str, Any]) -> None:
        if self.path is None or (self.processes > 1 and not self._own.exists()):  # the whole file is there already
            return
        with open(self._own, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _differing(value: Any, other: Any) -> Any:
    if isinstance(value, dict) and isinstance(other, dict):
        return {k: _differing(v, other.get(k)) for k, v in value.items() if other.get(k) != v}
    return value


def _short(value: Any, other: Any) -> str:
    """A value for an error message; of two dicts only what differs."""
    text = repr(_differing(value, other))
    return text if len(text) <= 120 else text[:117] + "..."
