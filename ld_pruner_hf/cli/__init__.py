"""ld-pruner: score, prune, profile and publish any diffusers pipeline from the command line; `ld-pruner demo` needs no download.

Exit codes: 0 done, 1 a bug or a failure of the machine (with its traceback), 2 something in the command to be put right
(one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from ..loading import one_line
from ..memory import freed_memory_kept
from . import additivity, app, benchmark, demo, distill, evaluate, profile, prune, publish, report, score, show, sweep

COMMANDS = (
    score, prune, distill, profile, evaluate, sweep, benchmark, additivity, report, publish, app, demo, show,
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"ld-pruner: error: {message} (see {self.prog} --help)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Descriptions as written; defaults behind each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ld-pruner", description=__doc__, formatter_class=_Help)
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND", parser_class=_Parser)
    for command in COMMANDS:
        options = getattr(command, "PARSER", {})
        sub = commands.add_parser(
            command.NAME, help=command.HELP, description=command.HELP, formatter_class=_Help, **options
        )
        command.add_arguments(sub)
        sub.set_defaults(run=command.run)
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Like `parse_args`, but an optional positional argument (`target`) may also come after options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    args.command_line = shlex.join(["ld-pruner", *(sys.argv[1:] if argv is None else argv)])
    if len(rest) == 1 and not rest[0].startswith("-") and getattr(args, "target", "") is None:
        args.target, rest = rest[0], []
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _warn(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    print(
        f"ld-pruner: {'warning' if issubclass(category, UserWarning) else category.__name__}: {message}",
        file=sys.stderr,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        args = _parse(argv)
    except SystemExit as stop:  # argparse exits by itself: 0 after --help, 2 after an error
        return int(stop.code or 0)
    try:
        with warnings.catch_warnings(), freed_memory_kept():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _warn
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
        print(f"ld-pruner: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0
