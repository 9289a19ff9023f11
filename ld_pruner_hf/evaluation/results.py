"""What an evaluation measured, as one JSON file and one table. No torch.

The file's format, for programs that read it (model cards, reports):

    {"format": "ld_pruner_hf.evaluation", "version": 1,
     "models": {"A": "demo:emoji", "B": "pruned"},           label -> pipeline as it was named
     "results": [
       {"model": "B",                                         the label; "B vs A" for what compares the two
        "name": "FID", "value": 12.3, "unit": "",             the number; lower is better unless `higher_is_better`
        "uncertainty": 0.4, "uncertainty_kind": "standard deviation over 100 subsets",     null where none is known
        "extractor": "ld_pruner_hf/image-small",              null for costs
        "n": 500,                                             samples (or timed calls) behind the number
        "device": "cpu, float32, 1 thread",
        "dataset": "data/test.parquet (1000 samples)",        the reference, or the prompts; null where there is none
        "command": "ld-pruner evaluate ...",
        "higher_is_better": false,                            null where neither holds
        "details": {}}],                                      whatever else belongs to the number
     "skipped": [{"name": "PickScore", "model": "B", "reason": "..."}],     asked for, but not measured, and why
     "notes": ["B: 3 of 500 samples left out: silent"],
     "environment": {"torch": "...", "diffusers": "...", "processor": "..."}}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from ..plan import FORMAT_VERSION, PlanError, read_json, write_atomically

EVALUATION_FORMAT = "ld_pruner_hf.evaluation"
RESULTS_FILE = "evaluation.json"


@dataclass(frozen=True)
class Measurement:
    """One number and everything that it depends on; the fields are those of the module's format."""

    model: str
    name: str
    value: float
    unit: str = ""
    uncertainty: float | None = None
    uncertainty_kind: str | None = None
    extractor: str | None = None
    n: int | None = None
    device: str = ""
    dataset: str | None = None
    command: str = ""
    higher_is_better: bool | None = False
    details: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """Value with uncertainty and unit, in as many digits as they deserve."""
        if float(self.value).is_integer() and abs(self.value) >= 1000:
            number = f"{self.value:,.0f}"
        else:
            number = f"{self.value:.4g}"
        spread = "" if self.uncertainty is None else f" ± {self.uncertainty:.2g}"
        return f"{number}{spread}{' ' + self.unit if self.unit else ''}"


@dataclass(frozen=True)
class Evaluation:
    """Everything that one evaluation measured."""

    models: dict[str, str]
    results: tuple[Measurement, ...]
    skipped: tuple[dict[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    environment: dict[str, Any] = field(default_factory=dict)

    def value(self, model: str, name: str) -> float:
        """The number of that name. KeyError if it was not measured."""
        return self.find(model, name).value

    def find(self, model: str, name: str) -> Measurement:
        for result in self.results:
            if (result.model, result.name) == (model, name):
                return result
        raise KeyError(f"{name} of {model}: not among {[(r.model, r.name) for r in self.results]}")

    def save(self, path: str | os.PathLike) -> None:
        data = {"format": EVALUATION_FORMAT, "version": FORMAT_VERSION, **asdict(self)}
        write_atomically(path, json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> Evaluation:
        """Read what `save` wrote. PlanError: missing, damaged, or of another format."""
        data = read_json(path, EVALUATION_FORMAT)
        known = Measurement.__dataclass_fields__
        try:
            results = tuple(Measurement(**{k: v for k, v in r.items() if k in known}) for r in data["results"])
            return cls(
                data["models"], results, tuple(data["skipped"]), tuple(data["notes"]), dict(data["environment"])
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise PlanError(f"{path}: not a complete evaluation ({error!r}); run it again") from error

    def rows(self) -> list[list[str]]:
        """A table's cells: what is measured, one column a model, the comparison of the two, extractor."""
        columns = self.columns()
        rows = []
        for name, extractor in dict.fromkeys((r.name, r.extractor) for r in self.results):
            found = {r.model: r.text() for r in self.results if (r.name, r.extractor) == (name, extractor)}
            rows.append([name, *(found.get(c, "") for c in columns), extractor or ""])
        return rows

    def columns(self) -> list[str]:
        """The models measured, in order, and the comparison if there is one."""
        return [*self.models, *dict.fromkeys(r.model for r in self.results if r.model not in self.models)]

    def __str__(self) -> str:
        lines = [f"{label}: {name}" for label, name in self.models.items()]
        lines += _aligned([["", *self.columns(), "extractor"], *self.rows()])
        for device in dict.fromkeys(r.device for r in self.results if r.device):
            lines.append(f"measured on {device}")
        lines += [f"not measured: {s['name']} of {s['model']}: {s['reason']}" for s in self.skipped]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)


def _aligned(rows: Iterable[list[str]]) -> list[str]:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
