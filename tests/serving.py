"""A page of ours in a process of its own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class AppServer:
    """A running page: its address, the folder that it may write to, the one that it was started in, and what it printed."""

    url: str
    process: subprocess.Popen[bytes]
    temp: Path
    cwd: Path
    log: Path


@contextmanager
def serving(arguments: Sequence[str], cwd: Path, folder: Path, **env: str) -> Iterator[AppServer]:
    """Run Python with these arguments until the page answers; its files and what it prints go to `folder`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temp, log = folder / "temp", folder / "log"
    env = {**_environment(), "GRADIO_SERVER_PORT": str(port), "GRADIO_TEMP_DIR": str(temp), **env}
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=env, stdout=out, stderr=out)
    try:
        until = time.monotonic() + 400
        while "the page is at" not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.2)
        yield AppServer(f"http://127.0.0.1:{port}", process, temp, cwd, log)
    finally:
        process.terminate()
        process.wait(30)


def _environment() -> Mapping[str, str]:
    return {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
