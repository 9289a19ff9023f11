"""ld-pruner app."""

from __future__ import annotations

import argparse

from ..app import launch, load_config

NAME = "app"
HELP = "open a page that draws with the original and the pruned pipeline side by side"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file that lists pipelines and limits; default: all demo pipelines"
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on; 0.0.0.0: all networks")
    parser.add_argument("--port", type=int, metavar="P", help="port; default: the first free one from 7860 on")
    parser.add_argument(
        "--device", default="auto", metavar="D", help="cpu, cuda, ...; auto takes the accelerator if any"
    )
    parser.add_argument("--open", action="store_true", help="open the page in the browser")


def run(args: argparse.Namespace) -> None:
    launch(load_config(args.config), args.device, args.host, args.port, open_browser=args.open)
