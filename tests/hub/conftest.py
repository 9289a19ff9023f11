"""The loopback Hub, one for the session, and clients that talk to it; everything else in the suite stays offline."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from conftest import LOOPBACK
from huggingface_hub import constants

from .server import WRITE, HubServer


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
