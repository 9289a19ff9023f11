"""Score, prune, save and reload every pipeline class that can be built tiny; `python tests/pipelines_table.py` writes docs/pipelines.md.

Besides the families of `families.py`, every class of diffusers that takes the components of one of them is tried. What was
done is kept in `--state`; a killed run goes on there.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import deprecated_families  # noqa: F401
import diffusers
import families
import more_families  # noqa: F401
import recent_families  # noqa: F401
import torch
import variant_families  # noqa: F401
import video_families  # noqa: F401

import ld_pruner_hf
from ld_pruner_hf import Modification, PruningPlan
from ld_pruner_hf.latents import final_latents, preserved
from ld_pruner_hf.operators import steps_argument_if_any
from ld_pruner_hf.plan import is_inside
from ld_pruner_hf.planning import denoisers_of
from ld_pruner_hf.surgery import architecture_of, count_params

KS = (1, 3)
SCORED = 5
"""Operators that are scored per pipeline; the smallest ones, spread over the denoiser."""
BATCH = 120
"""Folders that one fresh process loads."""
SECONDS = 60
"""Of CPU time for one pipeline, then it is given up."""
SLOW = "even the tiny one takes more than a minute"
UNLOADED, UNTRIED = "was not loaded again yet", "not tried yet"
BLIP = "fails in diffusers itself: its Q-Former calls `get_head_mask`, which transformers 5 does not have"
INVERT = "its call needs what its `invert` left in the pipeline, which is not saved"
TOKENS = "denoises tokens with a language model of transformers; plans are kept in the configs of diffusers' models"
XS = "prunes and runs, but unpruned, too, diffusers loads it with other outputs"
REASONS = {
    "BlipDiffusionControlNetPipeline": BLIP,
    "BlipDiffusionPipeline": BLIP,
    "Cosmos2_5_TransferPipeline": "its ControlNet needs torchvision, which is not installed here",
    "DiffusionGemmaPipeline": TOKENS,
    "EasyAnimateControlPipeline": "fails in diffusers itself: its `encode_prompt` does not take `text_encoder_index`",
    "KarrasVePipeline": "prunes and runs, but diffusers cannot load the scheduler that it saves",
    "LEditsPPPipelineStableDiffusion": INVERT,
    "LEditsPPPipelineStableDiffusionXL": INVERT,
    "LLaDA2Pipeline": TOKENS,
    "LTX2DFRTemporalRefinePipeline": "needs the `latents` of a pass before, and scoring sets the noise itself",
    "LTX2VideoDiffusionDecodePipeline": "denoises inside of `diffusion_decoder.decode`, without a step of its scheduler",
    "OmniGenPipeline": "its processor needs torchvision, which is not installed here",
    "SpectrogramDiffusionPipeline": "needs note_seq, which brings 23 further packages (IPython, Bokeh), not installed here",
    "StableDiffusionControlNetXSPipeline": XS,
    "StableDiffusionOnnxPipeline": "runs in ONNX Runtime, so it has no torch modules",
    "StableDiffusionXLControlNetXSPipeline": XS,
    "VersatileDiffusionDualGuidedPipeline": (
        "fails in diffusers itself: `DualTransformer2DModel.forward` does not take `encoder_attention_mask`"
    ),
    "VersatileDiffusionPipeline": "has no call of its own: each of its methods makes one of the three other pipelines",
    "VersatileDiffusionTextToImagePipeline": (f"{XS}: its constructor swaps blocks of its two U-Nets, each time anew"),
}
"""What is known about classes that do not run."""
PACKAGES = {"opencv": "cv2"}
"""Names under which packages are imported, where they are others."""


@dataclass
class Row:
    """What was done with one pipeline class.

    Attributes:
        denoiser: class of the pruned component. operators, candidates: how many there are, and how many can be replaced.
        ks: how many were taken out, by score. blocks: how many outermost operators were taken out together.
        folders: where the pruned pipelines lie. reason: why it does not work; None if it does.
    """

    pipeline: str
    denoiser: str = ""
    component: str = ""
    operators: int = 0
    candidates: int = 0
    ks: list[int] = field(default_factory=list)
    blocks: int = 0
    folders: list[str] = field(default_factory=list)
    reason: str | None = None


def latents(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    with preserved(pipe):
        return final_latents(pipe, {**call, **steps_argument_if_any(pipe)}, [0])


def steps_of(pipe: Any) -> int | None:
    return 2 if steps_argument_if_any(pipe) else None


def spread(items: list[Any], n: int) -> list[Any]:
    return [items[i * len(items) // n] for i in range(min(n, len(items)))]


def prune_and_save(build: Callable[[], families.Built], folder: Path, component: str | None = None) -> Row:
    """Score a few operators, prune by k and by blocks, run each and save it with the latents that it gives.

    Raises:
        AssertionError: pruning did not do what the plan says.
    """
    pipe, call = build()
    component = component or denoisers_of(pipe, None, {"conditions": [call], "num_inference_steps": steps_of(pipe)})[0]
    row = Row(type(pipe).__name__)
    original = latents(pipe, call)
    operators = ld_pruner_hf.find_operators(pipe, component=component, latency=False, progress=False, **call)
    candidates = [o for o in operators if o.is_candidate]
    row.operators, row.candidates = len(operators), len(candidates)
    inner = [o for o in candidates if not any(is_inside(other.path, o.path) for other in candidates)]
    scores = pipe.score(
        conditions=[call], component=component, include=[o.path for o in spread(inner, SCORED)], seeds=1,
        num_inference_steps=steps_of(pipe),
    )  # fmt: skip
    row.component, row.denoiser = scores.component, scores.model_class
    errors = [r.error for r in scores.rows if r.error is not None]
    assert len(scores.rows) - len(errors) >= min(max(KS), len(scores.rows)), errors
    outer = [o for o in candidates if "." in o.path and not any(is_inside(o.path, other.path) for other in candidates)]
    blocks = tuple(Modification(o.path, o.kind, o.stand_ins[0]) for o in spread(outer, 2))
    model = getattr(pipe, scores.component)
    plan = PruningPlan(scores.component, scores.model_class, architecture_of(model), blocks)
    targets: list[Any] = [*[k for k in KS if k <= len({r.path for r in scores.rows})], *([plan] if blocks else [])]
    for i, target in enumerate(targets):
        pipe, call = build()
        before = count_params(getattr(pipe, scores.component))
        given = {"scores": scores} if isinstance(target, int) else {}
        done = pipe.prune(target, **given, component=component, conditions=[call])
        assert len(done) == (target if isinstance(target, int) else len(blocks))
        assert count_params(getattr(pipe, scores.component)) == before - done.params_removed
        after = latents(pipe, call)
        assert after.shape == original.shape and torch.isfinite(after).all()
        pipe.save_pretrained(folder / str(i))
        torch.save({"latents": after, "call": call}, folder / f"{i}.pt")
        row.folders.append(str(folder / str(i)))
        if isinstance(target, int):
            row.ks.append(target)
        else:
            row.blocks = len(blocks)
    return row


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for rounding: weights that diffusers maps from a file may lie at addresses where kernels round differently."""
    return torch.allclose(a, b, rtol=1e-3, atol=1e-3 * b.abs().max().item())


def load(folder: str) -> Any:
    """The pipeline that is saved in `folder`; what diffusers cannot load by the name that it saves itself is put in afterwards."""
    index = json.loads((Path(folder) / "model_index.json").read_text())
    kind = getattr(diffusers, index["_class_name"])
    entries = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2}  # library, class
    nameless = [k for k, (library, name) in entries.items() if library == "diffusers" and not hasattr(diffusers, name)]
    absent = [k for k, v in entries.items() if v[0] is None]  # asked for by name
    pipe = kind.from_pretrained(folder, **dict.fromkeys([*absent, *nameless]))
    types = kind._get_signature_types()
    pipe.register_modules(**{k: types[k][0].from_pretrained(folder, subfolder=k) for k in nameless})
    return families.tiny.quiet(kind.from_pipe(pipe) if nameless else pipe)  # anew, for pipelines that hold others


def reload(folders: list[str]) -> dict[str, str | None]:
    """folder -> None if the pipeline there gives the stored latents again, else what is wrong. For a fresh process."""
    found: dict[str, str | None] = {}
    for folder in folders:
        expected = torch.load(f"{folder}.pt", weights_only=False)
        try:
            got = latents(load(folder), expected["call"])
            found[folder] = None if same(got, expected["latents"]) else "other latents after reloading"
        except Exception as error:
            found[folder] = f"reload: {explain(error)}"
    return found


def reload_in_fresh_process(folders: list[str]) -> dict[str, str | None]:
    command = [sys.executable, __file__, "--reload"]
    done = subprocess.run(command, input=json.dumps(folders), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def explain(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:140]}"


# ---- every class -----------------------------------------------------------------------------------------------------

EXTRAS: dict[str, Callable[[], Any]] = {
    "image": families.picture,
    "mask_image": families.mask,
    "control_image": families.picture,
    "strength": lambda: 1.0,
    "video": lambda: [families.picture()] * 5,
    "padding_mask_crop": lambda: None,
    "prompt": lambda: None,  # embeddings stand for it
    "_auto_resize": lambda: False,
    "max_area": lambda: 256,
    "height": lambda: 32,
    "width": lambda: 32,
    "processing_resolution": lambda: 0,
}
"""Arguments that a family's own call does not have."""


OTHERS = ("DiffusionPipeline", "AutoPipeline", "Flax", "Onnx")


def pipeline_classes() -> dict[str, Any]:
    """All pipeline classes that diffusers exports, those included that stand for one whose packages are missing."""
    found = {}
    for name in sorted(n for n in dir(diffusers) if "Pipeline" in n and not n.startswith(OTHERS)):
        kind = getattr(diffusers, name)
        if inspect.isclass(kind) and (hasattr(kind, "_backends") or issubclass(kind, diffusers.DiffusionPipeline)):
            found[name] = kind
    return found


def why_not(kind: Any, known: set[str]) -> str:
    """Why nothing tiny of this class is built, from what its constructor takes.

    Args:
        known: names of the component classes that tiny ones are built of.
    """
    if hasattr(kind, "_backends"):
        lacking = [name for name in kind._backends if find_spec(PACKAGES.get(name, name)) is None]
        return f"needs {', '.join(lacking)}, not installed here"
    components = inspect.signature(kind.__init__).parameters
    if not any("scheduler" in name for name in components):
        return "has no scheduler, so nothing denoises"
    types = [[t for t in v if inspect.isclass(t)] for v in kind._get_signature_types().values()]
    models = [[t.__name__ for t in kinds if issubclass(t, torch.nn.Module)] for kinds in types]
    new = [names[0] for names in models if names and not known & set(names) and hasattr(diffusers, names[0])]
    return f"no tiny {', '.join(dict.fromkeys(new))} here" if new else "no tiny one here"


def takes(kind: Any, components: dict[str, Any]) -> bool:
    """Can the class be made of these components, each of the type that it names?"""
    needed, _ = kind._get_signature_keys(kind)
    types = kind._get_signature_types()
    if not set(needed) - {"self"} <= components.keys():
        return False
    present = {k: v for k, v in components.items() if v is not None}
    if any(isinstance(v, torch.nn.Module) and k not in types for k, v in present.items() if k != "image_encoder"):
        return False
    return all(
        any(inspect.isclass(t) and isinstance(v, t) for t in types[k])
        for k, v in present.items()
        if isinstance(v, torch.nn.Module) and k in types
    )


def variants(name: str, done: set[str]) -> Iterator[tuple[str, Callable[[], families.Built]]]:
    """Other classes that the components of a family make, with a call of what they take."""
    pipe, _ = families.make(name)
    for label, kind in pipeline_classes().items():
        if label in done or hasattr(kind, "_backends") or not takes(kind, pipe.components):
            continue

        def build(kind: Any = kind) -> families.Built:
            base, call = families.make(name)
            names = set(inspect.signature(kind.__init__).parameters)
            new = kind(**{k: v for k, v in base.components.items() if k in names})
            parameters = inspect.signature(kind.__call__).parameters
            extras = {k: make() for k, make in EXTRAS.items() if k in parameters and k not in call}
            return families.tiny.quiet(new), {k: v for k, v in {**call, **extras}.items() if k in parameters}

        yield label, build


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Inside, TimeoutError is raised after so many seconds of this process's CPU time."""

    def stop(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def attempt(label: str, build: Callable[[], families.Built], folder: Path, component: str | None = None) -> Row:
    try:
        with limited(SECONDS):
            pipe, call = build()
            label = type(pipe).__name__
            latents(pipe, call)
    except Exception as error:
        reason = SLOW if isinstance(error, TimeoutError) else f"the tiny one does not run unpruned ({explain(error)})"
        return Row(label, reason=reason)
    try:
        with limited(SECONDS):
            return prune_and_save(build, folder, component)
    except TimeoutError:
        return Row(label, reason=SLOW)
    except Exception as error:
        traceback.print_exc()
        return Row(label, reason=explain(error))


class State:
    """What a run has done so far: rows, and what loading their folders in a fresh process gave, each in a file that grows."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.rows_file, self.reloads_file = folder, folder / "rows.jsonl", folder / "reloads.jsonl"

    def _read(self, file: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def rows(self) -> dict[str, Row]:
        """key -> row, with what is wrong after loading in a fresh process."""
        wrong = {k: v for d in self._read(self.reloads_file) for k, v in d.items()}
        rows = {d["key"]: Row(**d["row"]) for d in self._read(self.rows_file)}
        for row in rows.values():
            row.reason = row.reason or next((w for f in row.folders if (w := wrong.get(f, UNLOADED))), None)
        return rows

    def add(self, key: str, row: Row) -> None:
        with self.rows_file.open("a") as file:
            file.write(json.dumps({"key": key, "row": asdict(row)}) + "\n")
        self.reload(at_least=BATCH)

    def reload(self, at_least: int = 1) -> None:
        """Load what was not loaded yet, if it is as many folders, in one fresh process: importing takes longer than loading."""
        done = {k for d in self._read(self.reloads_file) for k in d}
        todo = [f for row in self.rows().values() for f in row.folders if f not in done]
        if len(todo) >= at_least:
            with self.reloads_file.open("a") as file:
                file.write(json.dumps(reload_in_fresh_process(todo)) + "\n")


def run(state: State) -> None:
    """Do what the state lacks: first the families, then every class that their components make."""
    rows, names = state.rows(), [*families.FAMILIES, *families.MORE]
    for name in names:
        for component in families.SEVERAL.get(name, (None,)):
            key = f"{name}:{component}" if component else name
            if key not in rows:
                folder = state.folder / key.replace(":", "-")
                state.add(key, attempt(name, lambda name=name: families.make(name), folder, component))
    tried = {key for key in state.rows() if "/" in key}
    for name in names:
        done = {row.pipeline for row in state.rows().values() if row.reason in (None, UNLOADED, SLOW)}
        for label, build in variants(name, done):
            if f"{name}/{label}" not in tried:
                state.add(f"{name}/{label}", attempt(label, build, state.folder / name / label))
    state.reload()


def markdown(rows: list[Row]) -> str:
    classes = pipeline_classes()
    worked = [r for r in rows if r.reason is None]
    names = {r.pipeline for r in worked}
    reasons = {r.pipeline: str(r.reason) for r in reversed(rows) if r.reason is not None and r.pipeline not in names}
    made = [families.make(name)[0].components for name in (*families.FAMILIES, *families.MORE)]
    parts = [part for components in made for part in components.values()]
    known = {kind.__name__ for part in parts for kind in type(part).__mro__} - {"object", "Module"}
    for name, kind in classes.items():
        if name not in names and name not in reasons:
            can = not hasattr(kind, "_backends") and any(takes(kind, components) for components in made)
            reasons[name] = UNTRIED if can else why_not(kind, known)
    reasons |= {name: reason for name, reason in REASONS.items() if name in reasons}
    unfinished = {UNLOADED, UNTRIED} & set(reasons.values())
    lines = [
        "# Pipelines",
        "",
        f"Made by `python tests/pipelines_table.py` with diffusers {diffusers.__version__}, torch {torch.__version__}, one CPU "
        f"thread, Python {platform.python_version()}. Every pipeline here has tiny random weights. Some of its operators were "
        "scored over two steps; it was pruned by k, and two of its outermost operators were taken out at once; each result was "
        "run, saved and loaded in a fresh process, where the final latents have to be the same up to rounding.",
        "",
        f"**{len(names)} of the {len(classes)} pipeline classes that diffusers exports do all of this.** Below are the others, with "
        "the reason.",
        "",
        *(
            ["The run was stopped before its end; running the script again goes on where it stopped.", ""]
            * bool(unfinished)
        ),
        "| Pipeline | Denoiser | Modules | Candidates | k | Blocks |",
        "|---|---|--:|--:|---|--:|",
    ]
    for _, r in sorted({(r.pipeline, r.component): r for r in reversed(worked)}.items()):
        ks = ", ".join(map(str, r.ks))
        lines.append(
            f"| {r.pipeline} | {r.component}: {r.denoiser} | {r.operators} | {r.candidates} | {ks} | {r.blocks} |"
        )
    lines += ["", "## Not pruned here", "", "| Pipeline | Reason |", "|---|---|"]
    lines += [f"| {name} | {reason.replace('|', '/')} |" for name, reason in sorted(reasons.items())]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/pipelines.md"))
    parser.add_argument("--state", type=Path, default=Path("build/pipelines"), help="folder of what is done already")
    parser.add_argument(
        "--reload", action="store_true", help="read folders from stdin and say which give other latents"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    if options.reload:
        print(json.dumps(reload(json.load(sys.stdin))))
        return
    state = State(options.state.resolve())
    run(state)
    options.output.write_text(markdown(list(state.rows().values())), encoding="utf-8")


if __name__ == "__main__":
    main()
