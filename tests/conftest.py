"""Fixtures of the whole suite. Everything runs offline, on the CPU, on one thread: tiny models are faster so, and results repeat."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

# Clients of the Hub read its address once, on import, so the place where tests/hub starts one is chosen here.
os.environ.update({
    "HF_ENDPOINT": "http://127.0.0.1:" + str((LOOPBACK := socket.create_server(("127.0.0.1", 0))).getsockname()[1]),
    "HF_HUB_OFFLINE": "1", "HF_HOME": tempfile.mkdtemp(), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "",
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "2", "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
})  # fmt: skip

import diffusers
import pytest
import tiny
import torch

import ld_pruner_hf

torch.set_num_threads(1)
diffusers.utils.logging.set_verbosity_error()
diffusers.utils.logging.disable_progress_bar()


@pytest.fixture
def pipe() -> diffusers.StableDiffusionPipeline:
    """A new tiny text-to-image pipeline with random weights."""
    return tiny.stable_diffusion()


@pytest.fixture
def unet() -> diffusers.UNet2DConditionModel:
    """The denoiser of `pipe`, alone."""
    return tiny.unet()


@pytest.fixture(scope="session")
def operators() -> list[ld_pruner_hf.Operator]:
    """All operators of `unet`."""
    return ld_pruner_hf.find_operators(tiny.unet(), tiny.unet_call(), latency=False, progress=False)


@pytest.fixture(scope="session")
def scores() -> ld_pruner_hf.OperatorScores:
    """Scores of all operators of `pipe`, from the cheapest possible run."""
    return tiny.stable_diffusion().score("red heart", num_inference_steps=1, guidance_scale=1.0)


@pytest.fixture(scope="session")
def demo_pipe() -> Any:
    """The shipped emoji pipeline; tests must leave it as it is."""
    return tiny.quiet(ld_pruner_hf.demo.load("emoji"))


@pytest.fixture
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script in a fresh process: `python(script, *arguments)`."""

    def run(script: str, *arguments: Any, check: bool = True) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if check and done.returncode:
            raise AssertionError(f"the script failed:\n{done.stdout}\n{done.stderr}")
        return done

    return run
