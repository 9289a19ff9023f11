"""ld-pruner publish."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..evaluation.results import Evaluation
from ..hub import full_id, publish, push_plan
from ..loading import load_plan
from ..publication import Evidence, copy_pipeline, prepare, prepare_plan, pruned_parts
from ..scores import OperatorScores
from .common import call_argument, file_of_prompts

NAME = "publish"
HELP = "push a pruned pipeline to the Hub with its plan, scores, figures and a model card; or a plan alone"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("result", metavar="RESULT", help="folder of a pruned pipeline, or the file of a plan")
    parser.add_argument("repo", metavar="REPO", help="user/name or org/name; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of changing the branch")
    parser.add_argument("--revision", metavar="BRANCH", help="push to this branch; default: main")
    parser.add_argument(
        "--dry-run", action="store_true", help="write what would be pushed to --output and print the card"
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="folder for --dry-run; default: RESULT-hub")
    parser.add_argument(
        "--remote-code", action="store_true", help="ship the code that lets it load with trust_remote_code=True where ld_pruner_hf "
        "is not installed",
    )  # fmt: skip
    parser.add_argument("--message", metavar="TEXT", help="message of the commit")
    card = parser.add_argument_group("card")
    card.add_argument("--base-model", metavar="ID", help="Hub id of the original; default: where it was loaded from")
    card.add_argument("--license", metavar="ID", help="such as apache-2.0; default: that of the original's card")
    card.add_argument(
        "--dataset", action="append", default=[], metavar="ID", help="Hub id of the data of a training after pruning"
    )
    card.add_argument(
        "--evaluation", metavar="FILE", help="results of `ld-pruner evaluate`; default: evaluation.json of RESULT"
    )
    card.add_argument("--scores", metavar="FILE", help="scores of all operators; default: scores.jsonl of RESULT")
    card.add_argument("--recipe", metavar="FILE", help="YAML or JSON file with the flags of a training after pruning")
    card.add_argument(
        "--original", metavar="PIPELINE", help="folder, Hub id or demo:emoji of the original: measured and drawn beside the result"
    )  # fmt: skip
    prompts = card.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", nargs="+", action="extend", metavar="P", help="prompts to draw with, at most 8")
    prompts.add_argument("--prompts", metavar="FILE", help="a text file with one prompt a line")
    card.add_argument("--num-inference-steps", type=int, metavar="N", help="denoising steps of the pictures")
    card.add_argument(
        "--call", type=call_argument, action="append", default=[], metavar="NAME=VALUE", help="any other argument of the "
        "pipeline's call; may be repeated",
    )  # fmt: skip


def _recipe(path: str | None) -> dict[str, Any] | None:
    """The flags in a YAML or JSON file."""
    if path is None:
        return None
    text = Path(path).read_text(encoding="utf-8")
    try:
        if path.endswith(".json"):
            data = json.loads(text)
        else:
            import yaml

            data = yaml.safe_load(text)
    except ImportError as error:
        raise ImportError("--recipe: YAML needs PyYAML: pip install 'ld_pruner_hf[train]'") from error
    except Exception as error:
        raise ValueError(f"--recipe: {path} is not readable ({error})") from error
    if not isinstance(data, dict):
        raise ValueError(f"--recipe: {path} holds a {type(data).__name__}, expected flags and their values")
    return data


def _empty(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"--output: {folder} is not empty; choose another folder")
    return folder


def run(args: argparse.Namespace) -> None:
    if args.output and not args.dry_run:
        raise ValueError("--output goes with --dry-run")
    if args.private and args.create_pr:
        raise ValueError("--private is for a new repository, --create-pr for one that is there; leave out one of them")
    result = Path(args.result)
    push = {"private": args.private or None, "create_pr": args.create_pr, "revision": args.revision}
    push |= {"commit_message": args.message} if args.message else {}
    output = Path(args.output or f"{result.with_suffix('')}-hub")
    if result.is_file():
        plan = load_plan(result)
        if args.dry_run:
            print(prepare_plan(plan, _empty(output), full_id(args.repo), args.base_model))
        else:
            print(_done(push_plan(plan, args.repo, base_model=args.base_model, **push)))
        return
    if not result.is_dir():
        raise ValueError(f"{result}: no such file or folder; expected a saved pruned pipeline, or a plan")
    if args.remote_code and all(part.plan is None for part in pruned_parts(result)):
        raise ValueError("--remote-code: this is a stock model, which loads everywhere without; leave the option out")
    evidence = Evidence(
        base_model=args.base_model, license=args.license, datasets=args.dataset, recipe=_recipe(args.recipe),
        evaluation=Evaluation.load(args.evaluation) if args.evaluation else None, original=args.original,
        scores=OperatorScores.load(args.scores) if args.scores else None,
        prompts=file_of_prompts(args.prompts) if args.prompts else args.prompt,
        call=dict(args.call) | ({"num_inference_steps": args.num_inference_steps} if args.num_inference_steps else {}),
    )  # fmt: skip
    if not args.dry_run:
        print(_done(publish(result, args.repo, evidence, remote_code=args.remote_code, **push)))
        return
    copy_pipeline(result, _empty(output))
    print(prepare(output, full_id(args.repo), evidence, source=result, remote_code=args.remote_code))
    print(f"nothing was pushed; {output} has all that would be")


def _done(commit: Any) -> str:
    return f"pushed: {commit.pr_url or commit.commit_url}"
