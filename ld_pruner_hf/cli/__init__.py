"""ld-pruner: score, prune and profile any diffusers pipeline from the command line; `ld-pruner demo` needs no download.

Exit codes: 0 done, 1 a bug or a failure of the machine (with its traceback), 2 something in the command to be put right
(one line on stderr), 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from ..loading import one_line
from . import demo, distill, profile, prune, score, show

COMMANDS = (score, prune, distill, profile, demo, show)


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
        print(f"ld-pruner: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0
