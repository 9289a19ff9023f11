"""ld-pruner evaluate."""

from __future__ import annotations

import argparse
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

from ..evaluation import METRICS, EvaluationSettings, evaluate, read_prompts
from ..evaluation.results import RESULTS_FILE
from .common import add_call, call_arguments, slug

NAME = "evaluate"
HELP = "measure quality and cost of a pipeline, or of two on the same seeds (original first)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "pipelines", nargs="+", metavar="PIPELINE", help="one or two: a pipeline's folder, a Hub id, demo:emoji; or a folder of "
        "samples made before",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="DIR", help="samples and evaluation.json; default: <last>-evaluation"
    )
    add_samples(parser)
    parser.add_argument(
        "--protocol", metavar="P", help=f"take over a protocol of the literature ({', '.join(protocol_names())}) or a yaml "
        "file; options given here win",
    )  # fmt: skip
    parser.add_argument(
        "--metrics", nargs="+", choices=list(METRICS), metavar="M", help=f"of: {' '.join(METRICS)}; default: those for which "
        "there is what they need",
    )  # fmt: skip
    parser.add_argument(
        "--scheduler", metavar="CLASS", help="draw with another scheduler of diffusers, for example PNDMScheduler"
    )
    parser.add_argument("--no-costs", action="store_true", help="quality alone: no MACs, latency, memory")
    add_call(parser)


def add_samples(parser: argparse.ArgumentParser) -> None:
    """Options of everything that draws samples and measures them."""
    parser.add_argument("-n", type=int, metavar="N", help="samples of each; default: one a prompt, else 500")
    parser.add_argument(
        "--prompts",
        metavar="P",
        help="a file with one prompt a line; or a column of a parquet file or data set (ID:SPLIT)",
    )
    parser.add_argument("--prompt-column", default="caption", metavar="C", help="that column")
    parser.add_argument(
        "--reference", metavar="PATH", help="real samples: a folder of pictures or wav files, or a parquet file"
    )
    parser.add_argument("--reference-n", type=int, metavar="N", help="use at most so many of them")
    parser.add_argument(
        "--extractor", action="append", default=[], metavar="[M=]E", help="for all metrics or for one: shipped, inception, "
        "clip:MODEL, dino:MODEL, clap:MODEL, lpips:alex; auto takes the literature's, and the shipped one where that is not to be had",
    )  # fmt: skip
    parser.add_argument("--num-inference-steps", type=int, metavar="N", help="denoising steps")
    parser.add_argument("--resolution", type=int, metavar="PX", help="compare pictures at this size")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="sample i takes the noise of S + i")
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="samples per pipeline call")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="timed rounds")


def protocol_names() -> list[str]:
    folder = resources.files("ld_pruner_hf").joinpath("evaluation/protocols")
    return sorted(f.name.removesuffix(".yaml") for f in folder.iterdir() if f.name.endswith(".yaml"))


def read_protocol(name: str) -> dict[str, Any]:
    """The settings of a shipped protocol or of a yaml file.

    Raises:
        ValueError: no such protocol, or an entry that is no setting. ImportError: pyyaml is not installed.
    """
    try:
        import yaml
    except ImportError as error:
        raise ImportError('protocols need pyyaml: pip install "ld_pruner_hf[eval]"') from error
    if name in protocol_names():
        text = resources.files("ld_pruner_hf").joinpath(f"evaluation/protocols/{name}.yaml").read_text("utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise ValueError(f"--protocol: got {name!r}, expected one of {protocol_names()} or a yaml file")
    settings = yaml.safe_load(text) or {}
    known = {f.name for f in fields(EvaluationSettings)} | {"guidance_scale"}
    if not isinstance(settings, dict) or (unknown := sorted(set(settings) - known)):
        what = f"unknown entries {unknown}" if isinstance(settings, dict) else "no list of settings"
        raise ValueError(f"--protocol {name}: {what}; known are {sorted(known)}")
    if "guidance_scale" in settings:
        settings["call"] = {**settings.get("call", {}), "guidance_scale": settings.pop("guidance_scale")}
    return settings | ({"metrics": tuple(settings["metrics"])} if "metrics" in settings else {})


def extractors_of(options: list[str]) -> dict[str, str]:
    """["fid=inception", "shipped"] -> {"fid": "inception", "*": "shipped"}."""
    result: dict[str, str] = {}
    for option in options:
        metric, equals, extractor = option.partition("=")
        if equals and metric not in METRICS:
            raise ValueError(
                f"--extractor: got {option!r}, expected EXTRACTOR or METRIC=EXTRACTOR, of {list(METRICS)}"
            )
        result |= {metric: extractor} if equals else {"*": option}
    return result


def sample_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the options of `add_samples` and `add_call` ask for; what was not given is left out."""
    prompts = tuple(read_prompts(args.prompts, args.prompt_column)) if args.prompts else None
    given = {
        "n": args.n, "prompts": prompts, "reference": args.reference, "reference_n": args.reference_n,
        "extractors": extractors_of(args.extractor) or None, "num_inference_steps": args.num_inference_steps,
        "call": call_arguments(args) or None, "resolution": args.resolution,
    }  # fmt: skip
    always = {
        "seed": args.seed, "batch_size": args.batch_size, "rounds": args.rounds, "dtype": args.dtype,
        "device": args.device, "command": args.command_line,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None} | always


def run(args: argparse.Namespace) -> None:
    settings = read_protocol(args.protocol) if args.protocol else {}
    given = sample_settings(args)
    if "call" in settings and "call" in given:
        given["call"] = settings["call"] | given["call"]
    settings |= given
    if args.metrics:
        settings["metrics"] = tuple(args.metrics)
    if args.scheduler:
        settings["scheduler"] = args.scheduler
    if "n" not in settings and settings.get("prompts"):
        settings["n"] = len(settings["prompts"])
    output = Path(args.output or slug(args.pipelines[-1]) + "-evaluation")
    result = evaluate(args.pipelines, output, EvaluationSettings(**settings, costs=not args.no_costs))
    if result is not None:
        print(f"{result}\n\nwritten to {output / RESULTS_FILE}; samples are beside it")
