"""Fixtures of the whole suite. Everything runs offline, on the CPU, on one thread: tiny models are faster so, and results repeat."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
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
from serving import AppServer, serving

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


@pytest.fixture(scope="session")
def app_config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What a page offers in the tests: a pipeline that draws prompts, with two further versions, one without prompts, and sounds."""
    from ld_pruner_hf.app import load_config

    folder = tmp_path_factory.mktemp("app")
    pipe = tiny.stable_diffusion()
    pipe.save_pretrained(folder / "pipe")
    pipe.score("red heart", num_inference_steps=1, guidance_scale=1.0, include=["*.conv1", "*.conv2"]).save(
        folder / "scores.jsonl"
    )
    ld_pruner_hf.make_plan(pipe, 2, scores=folder / "scores.jsonl").save(folder / "plan.json")
    pipe.prune(4, scores=folder / "scores.jsonl")
    with torch.no_grad():
        pipe.unet.conv_out.bias += 0.1  # what finetuning may have changed
    pipe.save_pretrained(folder / "tuned")
    faces = tiny.ldm()
    faces.save_pretrained(folder / "faces")
    faces.score(num_inference_steps=1, include=["mid_block.resnets.*.conv1"]).save(folder / "faces" / "scores.jsonl")
    sounds = tiny.audio_diffusion()
    sounds.save_pretrained(folder / "sounds")
    sounds.score(num_inference_steps=1, include=["*.conv1"]).save(folder / "sounds" / "scores.jsonl")
    (folder / "app.yaml").write_text(
        """
        models:
          - pipeline: pipe
            title: Tiny
            scores: scores.jsonl
            versions: [{title: by hand, plan: plan.json}, {title: tuned, pipeline: tuned}]
            steps: 2
            guidance: 2
            k: 3
            examples: [red heart, cat face]
          - {pipeline: faces, title: Faces, steps: 2}
          - {pipeline: sounds, title: Tones, steps: 2, k: 2}
        """
    )
    return load_config(folder / "app.yaml")


@pytest.fixture(scope="session")
def app_server(app_config: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AppServer]:
    """`ld-pruner app` in a process of its own, with a token in its environment that must not get out."""
    config = Path(app_config.models[0].pipeline).parent / "app.yaml"
    cwd, root = tmp_path_factory.mktemp("cwd"), str(Path(__file__).parent.parent)
    arguments = ["-m", "ld_pruner_hf", "app", "--config", str(config)]
    with serving(
        arguments, cwd, tmp_path_factory.mktemp("server"), HF_TOKEN="hf_SecretOfTheTests", PYTHONPATH=root
    ) as server:
        yield server


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
