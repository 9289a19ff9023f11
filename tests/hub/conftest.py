"""The loopback Hub, one for the session, and clients that talk to it; everything else in the suite stays offline."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import tiny
from conftest import LOOPBACK
from huggingface_hub import constants
from huggingface_hub.utils import _http

from ld_pruner_hf.measurements import measured

from .server import WRITE, HubServer
from .store import Repo


@pytest.fixture(scope="session")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubServer]:
    with HubServer(tmp_path_factory.mktemp("hub"), LOOPBACK) as server:
        yield server


@pytest.fixture
def hub(_server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """The Hub, with no faults and an empty log; this process is online, has an empty cache and alice's write token."""
    _server.faults.rules.clear()
    _server.log.clear()
    for module in (constants, sys.modules.get("datasets.config")):
        if module is not None:
            monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", WRITE)
    assert _server.url == constants.ENDPOINT
    huggingface_hub.close_session()
    return _server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's pauses between retries take no time."""
    monkeypatch.setattr(_http, "time", types.SimpleNamespace(sleep=lambda _: None, time=time.time))


@pytest.fixture(scope="session")
def base(_server: HubServer) -> str:
    """`acme/base`: a tiny Stable Diffusion on the Hub, with a card that states its licence."""
    repo = _server.store.create("model", "acme/base", "alice")
    with tempfile.TemporaryDirectory() as folder:
        tiny.stable_diffusion().save_pretrained(folder)
        (Path(folder) / "README.md").write_text("---\nlicense: openrail++\n---\n# Base\n")
        _put(repo, Path(folder))
    return "acme/base"


def _put(repo: Repo, folder: Path) -> None:
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    values = [{"path": path, "content": content} for path, content in files.items()]
    repo.add_commit("main", [{"key": "file", "value": value} for value in values], "upload", "alice")


@pytest.fixture(scope="session")
def result(tmp_path_factory: pytest.TempPathFactory, scores: Any) -> Path:
    """A pruned pipeline as `ld-pruner prune acme/base 8` leaves it, with its scores; tests only read it."""
    folder = tmp_path_factory.mktemp("result") / "pruned"
    pipe = tiny.stable_diffusion()
    before = pipe.profile(prompt="red heart", repeats=2)
    plan = pipe.prune(8, scores=scores)
    after = pipe.profile(prompt="red heart", repeats=2)
    pipe.save_pretrained(folder)
    plan.save(folder / "pruning_plan.json")
    scores.save(folder / "scores.jsonl")
    call = {"prompt": "red heart", "guidance_scale": 7.5}
    measured("unet", before, after, call, "acme/base").save(folder / "measurements.json")
    return folder


@pytest.fixture(params=["xet", "lfs"])
def transport(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways in which the client uploads large files."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


@pytest.fixture
def fresh(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in a new process that is online: `fresh(script, *arguments, without_plugin=True)`."""

    def run(script: str, *arguments: Any, without_plugin: bool = False, **env: str) -> Any:
        hidden = 'import sys; sys.modules["ld_pruner_hf"] = None\n' if without_plugin else ""
        environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITE, **env}
        command = [sys.executable, "-c", hidden + script, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)

    return run
