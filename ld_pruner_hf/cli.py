"""ld-pruner: score, prune and profile any diffusers pipeline from the command line; `ld-pruner demo` needs no download.

Exit codes: 0 done, 1 a bug or a failure of the machine (with its traceback), 2 something in the command to be put right
(one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from diffusers import DiffusionPipeline
from huggingface_hub.errors import HfHubHTTPError

from . import demo
from .demo.job import DemoSettings, run_demo
from .operators import STANDINS
from .pipeline import make_plan, profile, prune, score
from .plan import PLAN_FORMAT, PruningPlan
from .profiling import Profile
from .scores import CRITERIA, OperatorScores

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PLAN_FILE = "pruning_plan.json"
ROWS_FILE = "scores.jsonl"
_STAGING = ".ld-pruner-new"


# ---- loading and saving ----------------------------------------------------------------------------------------------


def pick_device(device: str) -> str:
    """The device by name; "auto" is the accelerator if there is one. ValueError for one that is not there."""
    accelerator = torch.accelerator.current_accelerator()  # None on a machine that has only a CPU
    if device == "auto":
        return "cpu" if accelerator is None else accelerator.type
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"--device: got {device!r}, expected for example 'auto', 'cpu' or 'cuda'") from error
    if kind not in ("cpu", accelerator.type if accelerator is not None else "cpu"):
        raise ValueError(f"--device: got {device!r}, but torch finds no such device here; use --device cpu")
    return device


def load_pipeline(name: str, dtype: str = "float32", device: str = "auto") -> Any:
    """Load a pipeline from a local folder, from the Hub, or one that ships with the package (`demo:emoji`).

    Raises:
        ValueError: unknown demo pipeline, dtype or device; a name that is neither a pipeline's folder nor found on the Hub.
    """
    if dtype not in DTYPES:
        raise ValueError(f"--dtype: got {dtype!r}, expected one of {list(DTYPES)}")
    device = pick_device(device)
    precision = {"dtype": DTYPES[dtype]}  # always: transformers would load its parts in the checkpoint's own dtype
    if name.startswith("demo:"):
        demo_pipe: Any = demo.load(name.removeprefix("demo:"), **precision)
        return demo_pipe.to(device)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "model_index.json").is_file():
            raise ValueError(f"{name}: the folder has no model_index.json, so it holds no diffusers pipeline")
        return DiffusionPipeline.from_pretrained(folder, **precision).to(device)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith("."):
        raise ValueError(
            f"{name}: no such folder; expected a pipeline's folder, a Hub id such as org/model, or demo:emoji"
        )
    try:
        pipe = DiffusionPipeline.from_pretrained(name, **precision)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(f"{name}: no local folder, and not loaded from the Hub either: {_one_line(error)}") from error
    return pipe.to(device)


def check_output(folder: Path, overwrite: bool) -> Path:
    """Make the folder for a pruned pipeline, before any long work.

    A file of scores in it is no obstacle: an interrupted run left it there and is resumed. With `overwrite`, a folder is
    only ever emptied if it holds a pipeline.

    Raises:
        ValueError: it has other content. OSError: it cannot be made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    content = sorted(p.name for p in folder.iterdir() if p.name not in (ROWS_FILE, _STAGING))
    if content and not overwrite:
        raise ValueError(
            f"{folder}: the output folder is not empty (it has {content[0]}); choose another, or pass --overwrite"
        )
    if content and "model_index.json" not in content:
        raise ValueError(
            f"{folder}: --overwrite replaces only a saved pipeline, and this folder has no model_index.json"
        )
    return folder


def save_into(pipe: Any, folder: Path, plan: PruningPlan) -> None:
    """Save pipeline and plan completely beside what the folder has, then put them in its place."""
    staging = folder / _STAGING
    shutil.rmtree(staging, ignore_errors=True)
    pipe.save_pretrained(staging)
    plan.save(staging / PLAN_FILE)
    for old in folder.iterdir():
        if old.name in (ROWS_FILE, _STAGING):
            continue
        if old.is_dir() and not old.is_symlink():
            shutil.rmtree(old)
        else:
            old.unlink()
    for new in staging.iterdir():
        os.replace(new, folder / new.name)
    staging.rmdir()


def _file_of_prompts(path: str) -> list[str]:
    prompts = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts: {path} has no line with a prompt")
    return prompts


def _call_argument(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected NAME=VALUE, for example height=512")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _call_arguments(args: argparse.Namespace) -> dict[str, Any]:
    call = dict(args.call)
    if args.guidance_scale is not None:
        call["guidance_scale"] = args.guidance_scale
    return call


# ---- commands --------------------------------------------------------------------------------------------------------


def _scoring_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `score` that the options ask for; a file of prompts is read here, before anything loads."""
    return {
        "conditions": _file_of_prompts(args.prompts) if args.prompts else args.prompt,
        "num_inference_steps": args.num_inference_steps,
        "seeds": args.seeds,
        "seed": args.seed,
        "pooled": args.pooled,
        "include": args.include,
        "exclude": args.exclude,
        "kinds": args.kinds,
        "standins": args.standins,
        "batch_size": args.batch_size,
        **_call_arguments(args),
    }


def _slug(pipeline: str) -> str:
    """A pipeline's name as part of a file name: the last part of a path or id."""
    return re.sub(
        r"[^A-Za-z0-9._-]+",
        "-",
        Path(pipeline).resolve().name if Path(pipeline).is_dir() else pipeline.rpartition("/")[2],
    )


def command_score(args: argparse.Namespace) -> None:
    folder = Path(args.output or _slug(args.pipeline) + "-scores")
    how = _scoring_arguments(args)
    criterion = args.criterion or next(iter(CRITERIA))
    pipe = load_pipeline(args.pipeline, args.dtype, args.device)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"rows go to {folder / ROWS_FILE}; if interrupted, run the same command again to go on", file=sys.stderr)
    scores = score(pipe, component=args.component, criterion=criterion, resume_from=folder / ROWS_FILE, **how)
    scores.to_csv(folder / "scores.csv")
    scores.to_json(folder / "scores.json")
    print(scores)
    print(f"\nwritten to {folder}: scores.jsonl, scores.csv, scores.json")


def _target(text: str) -> int | PruningPlan:
    """K or the path of a plan."""
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else PruningPlan.load(text)


def command_prune(args: argparse.Namespace) -> None:
    target = _target(args.target)
    if isinstance(target, PruningPlan) and (args.scores or args.criterion):
        raise ValueError(
            "--scores and --criterion choose operators; the plan already names them, leave these options out"
        )
    if Path(args.pipeline).is_dir() and Path(args.pipeline).resolve() == Path(args.output).resolve():
        raise ValueError(
            f"{args.output}: the output folder is the pipeline itself, which would be lost; choose another"
        )
    how = _scoring_arguments(args)
    given = OperatorScores.load(args.scores) if args.scores else None
    folder = check_output(Path(args.output), args.overwrite)
    pipe = load_pipeline(args.pipeline, args.dtype, args.device)
    if not isinstance(target, PruningPlan):
        scoring = {} if given else {**how, "resume_from": folder / ROWS_FILE}
        target = make_plan(pipe, target, scores=given, criterion=args.criterion, component=args.component, **scoring)
    call = {"prompt": how["conditions"][0]} if how["conditions"] else {}
    call |= _call_arguments(args)
    measuring = {"component": target.component or args.component, "repeats": args.repeats, **call}
    before = profile(pipe, **measuring)
    plan = prune(pipe, target, component=args.component)
    after = profile(pipe, **measuring)
    save_into(pipe, folder, plan)
    print(plan)
    print(f"\nbefore: {before}\nafter:  {after}\nsaved to {folder}; load it after `import ld_pruner_hf`")


def _operator_table(measured: Profile) -> str:
    width = max(map(len, measured.operators), default=8)
    lines = [f"{'operator':<{width}} {'params':>12} {'MACs':>16} {'time':>7}"]
    for path, cost in measured.operators.items():
        time = f"{100 * cost['latency_share']:>6.1f}%" if "latency_share" in cost else f"{'-':>7}"
        lines.append(f"{path:<{width}} {cost['params']:>12,} {cost['macs']:>16,} {time}")
    return "\n".join(lines)


def command_profile(args: argparse.Namespace) -> None:
    pipe = load_pipeline(args.pipeline, args.dtype, args.device)
    call = ({"prompt": args.prompt} if args.prompt else {}) | _call_arguments(args)
    measured = profile(pipe, component=args.component, per_operator=args.per_operator, repeats=args.repeats, **call)
    if args.json:
        print(json.dumps(measured.to_dict(), indent=1))
        return
    if args.per_operator:
        print(_operator_table(measured) + "\n")
    print(measured)


def command_demo(args: argparse.Namespace) -> None:
    settings = DemoSettings(
        ks=tuple(dict.fromkeys(args.k)), num_inference_steps=args.num_inference_steps, seeds=args.seeds,
        picture_steps=args.picture_steps, include=tuple(args.include or ()),
    )  # fmt: skip
    result = run_demo(args.output, settings, pick_device(args.device))
    print(f"\n{result.scores}\n")
    for name, measured in result.profiles.items():
        print(f"{name:<9} {measured}")
    print(f"\nopen {Path(args.output) / 'index.html'} in a browser")


def command_show(args: argparse.Namespace) -> None:
    path = Path(args.file)
    with path.open(encoding="utf-8", errors="replace") as file:
        beginning = file.read(200)
    if f'"{PLAN_FORMAT}"' in beginning:
        print(PruningPlan.load(path))
        return
    scores = OperatorScores.load(path)
    print(scores.with_criterion(args.criterion or scores.criterion))


# ---- arguments -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ld-pruner: error: {message} (see {self.prog} --help)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as written; defaults behind each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pipeline", metavar="PIPELINE", help="a pipeline's folder, a Hub id (org/model), or demo:emoji"
    )
    parser.add_argument("--component", metavar="C", help="which of its models; default: the one that denoises")
    parser.add_argument(
        "--guidance-scale", type=float, metavar="G", help="guidance of the calls; default: the pipeline's own"
    )
    parser.add_argument(
        "--call", type=_call_argument, action="append", default=[], metavar="NAME=VALUE", help="any other argument of the "
        "pipeline's call, for example height=512; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda, cuda:1, ...; auto takes the accelerator if any"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="precision of the weights")


def _add_scoring(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scoring")
    prompts = group.add_mutually_exclusive_group()
    prompts.add_argument(
        "--prompt", nargs="+", action="extend", metavar="P", help="prompts to score with; default: 50 built-in ones, where the "
        "pipeline takes a prompt",
    )  # fmt: skip
    prompts.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    group.add_argument(
        "--num-inference-steps", type=int, metavar="N", help="denoising steps; default: the pipeline's own"
    )
    group.add_argument("--seeds", type=int, default=2, metavar="N", help="latents per prompt")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="the first seed")
    group.add_argument(
        "--criterion", choices=list(CRITERIA), help=f"formula to rank by; default: {next(iter(CRITERIA))}"
    )
    group.add_argument("--pooled", action="store_true", help="compare all latents as one set, not one set per prompt")
    group.add_argument(
        "--include", nargs="+", action="extend", metavar="PAT", help='only these operators: "mid_block*" "*.attn1"'
    )
    group.add_argument("--exclude", nargs="+", action="extend", metavar="PAT", help="not these operators")
    group.add_argument(
        "--kinds", nargs="+", action="extend", metavar="CLASS", help="only operators of these classes: Attention"
    )
    group.add_argument(
        "--standins", choices=STANDINS, default="all", help="paper: without zeros for residual branches"
    )
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="latents per pipeline call")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ld-pruner", description=__doc__, formatter_class=_Help)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Any, help: str, description: str = "") -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=description or help, formatter_class=_Help)
        sub.set_defaults(run=run)
        return sub

    sub = command("score", command_score, "score every operator: how far does taking it out move the final latents?")
    _add_pipeline(sub)
    sub.add_argument(
        "-o", "--output", metavar="DIR", help="folder for scores.jsonl, .csv and .json; default: <pipeline>-scores"
    )
    _add_scoring(sub)

    sub = command("prune", command_prune, "take operators out and save the pipeline")
    _add_pipeline(sub)
    sub.add_argument("target", metavar="K|PLAN.json", help="how many operators to take out, or a pruning plan")
    sub.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="folder for the pruned pipeline and its plan"
    )
    sub.add_argument("--overwrite", action="store_true", help="replace a pipeline that is saved in DIR")
    sub.add_argument("--scores", metavar="FILE", help="scores to choose by; default: score first (resumed from DIR)")
    sub.add_argument("--repeats", type=int, default=10, metavar="N", help="timed calls before and after")
    _add_scoring(sub)

    sub = command("profile", command_profile, "measure parameters, MACs, latency and memory of one denoiser call")
    _add_pipeline(sub)
    sub.add_argument("--prompt", metavar="P", help="prompt of the call")
    sub.add_argument("--per-operator", action="store_true", help="also every module inside")
    sub.add_argument("--repeats", type=int, default=10, metavar="N", help="timed calls")
    sub.add_argument("--json", action="store_true", help="print JSON")

    default = DemoSettings()
    sub = command(
        "demo", command_demo, "score and prune the pipeline that ships with the package, and write a page about it"
    )
    sub.add_argument(
        "-o", "--output", default="demo-output", metavar="DIR", help="folder for the page and everything on it"
    )
    sub.add_argument(
        "--k", type=int, nargs="+", default=list(default.ks), metavar="K", help="how many operators to take out"
    )
    sub.add_argument(
        "--num-inference-steps", type=int, default=default.num_inference_steps, metavar="N", help="steps for scoring"
    )
    sub.add_argument("--seeds", type=int, default=default.seeds, metavar="N", help="latents per prompt for scoring")
    sub.add_argument(
        "--picture-steps", type=int, default=default.picture_steps, metavar="N", help="steps for the pictures"
    )
    sub.add_argument(
        "--include", nargs="+", action="extend", metavar="PAT", help="score only these operators; default: all"
    )
    sub.add_argument("--device", default="auto", metavar="D", help="cpu, cuda, ...; auto takes the accelerator if any")

    sub = command("show", command_show, "print a pruning plan or a file of scores")
    sub.add_argument("file", metavar="FILE", help="pruning_plan.json, scores.jsonl or scores.json")
    sub.add_argument(
        "--criterion", choices=list(CRITERIA), help="rank scores by this formula; default: the file's own"
    )
    return parser


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        args = build_parser().parse_args(argv)
    except SystemExit as stop:  # argparse exits by itself: 0 after --help, 2 after an error
        return int(stop.code or 0)
    try:
        args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (`| head`) has seen enough; nothing more may be written, at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(
            "ld-pruner: interrupted; rows scored so far are kept, the same command goes on from there", file=sys.stderr
        )
        return 130
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            traceback.print_exc()
        print(f"ld-pruner: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
