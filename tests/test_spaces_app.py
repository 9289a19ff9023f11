"""The Space starts from its own folder and the package beside it, as the Hub runs it."""

from __future__ import annotations

import re
import shutil
import tomllib
from pathlib import Path

from gradio_client import Client
from huggingface_hub import metadata_load
from serving import serving

from ld_pruner_hf.app import AppConfig, load_config

ROOT = Path(__file__).parent.parent
SPACE = ROOT / "spaces_app"


def test_its_config_offers_the_demo_pipelines_within_the_default_limits():
    assert load_config(SPACE / "app.yaml") == AppConfig()


def test_its_commented_example_is_valid(tmp_path):
    lines = (SPACE / "app.yaml").read_text().splitlines()
    example = [line.removeprefix("#") for line in lines if re.match(r"# (- |  )", line)]
    (tmp_path / "app.yaml").write_text("models:\n" + "\n".join(example))
    (entry,) = load_config(tmp_path / "app.yaml").models
    assert (
        entry.title == "Stable Diffusion 1.4"
        and len(entry.versions) == 2
        and entry.call == {"height": 512, "width": 512}
    )


def test_its_requirements_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["app"]
    listed = (SPACE / "requirements.txt").read_text().split()
    assert listed == [r for r in needed if not r.startswith("gradio")]  # the header's sdk_version is gradio


def test_its_header_says_what_the_hub_needs():
    header = metadata_load(SPACE / "README.md")
    assert header["sdk"] == "gradio" and (SPACE / header["app_file"]).is_file()
    assert f"gradio=={header['sdk_version']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert {header["colorFrom"], header["colorTo"]} <= {
        "red",
        "yellow",
        "green",
        "blue",
        "indigo",
        "purple",
        "pink",
        "gray",
    }
    assert len(header["short_description"]) <= 60


def test_it_starts_with_no_download_and_answers(tmp_path):
    space = tmp_path / "space"
    shutil.copytree(SPACE, space)
    shutil.copytree(ROOT / "ld_pruner_hf", space / "ld_pruner_hf", ignore=shutil.ignore_patterns("__pycache__"))
    with serving(["app.py"], space, tmp_path) as server:
        client = Client(server.url, verbose=False, download_files=tmp_path / "files", analytics_enabled=False)
        result = client.predict(prompt="red heart", k=80, steps=1, api_name="/compare")
    assert [c["name"] for c in result["columns"]] == ["Original", "k = 80"]
