"""ld-pruner profile."""

from __future__ import annotations

import argparse
import json

from ..loading import load_pipeline
from ..pipeline import profile
from ..profiling import Profile
from .common import add_pipeline, call_arguments

NAME = "profile"
HELP = "measure parameters, MACs, latency and memory of one denoiser call"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pipeline(parser)
    parser.add_argument("--prompt", metavar="P", help="prompt of the call")
    parser.add_argument("--per-operator", action="store_true", help="also every module inside")
    parser.add_argument("--repeats", type=int, default=10, metavar="N", help="timed calls")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _operator_table(measured: Profile) -> str:
    width = max(map(len, measured.operators), default=8)
    lines = [f"{'operator':<{width}} {'params':>12} {'MACs':>16} {'time':>7}"]
    for path, cost in measured.operators.items():
        time = f"{100 * cost['latency_share']:>6.1f}%" if "latency_share" in cost else f"{'-':>7}"
        lines.append(f"{path:<{width}} {cost['params']:>12,} {cost['macs']:>16,} {time}")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> None:
    pipe = load_pipeline(args.pipeline, args.dtype, args.device)
    call = ({"prompt": args.prompt} if args.prompt else {}) | call_arguments(args)
    measured = profile(pipe, component=args.component, per_operator=args.per_operator, repeats=args.repeats, **call)
    if args.json:
        print(json.dumps(measured.to_dict(), indent=1))
        return
    if args.per_operator:
        print(_operator_table(measured) + "\n")
    print(measured)
