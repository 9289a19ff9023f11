"""The rest of the package with pipelines and data sets that come from the Hub by their id."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
import tiny
from accelerate.state import AcceleratorState, GradientState
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from PIL import Image

import ld_pruner_hf
from ld_pruner_hf import Evidence, publish

from . import cards

datasets = pytest.importorskip("datasets")
sys.path.insert(0, str(Path(__file__).parents[2] / "training"))

import distill  # noqa: E402


@pytest.fixture
def pictures(hub, tmp_path) -> str:
    """`alice/pictures`: four captioned pictures, pushed with huggingface_hub."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 255 - 60 * i)).save(folder / f"{i}.png")
    captions = [f'{{"file_name": "{i}.png", "text": "number {i}"}}' for i in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(captions))
    HfApi().create_repo("alice/pictures", repo_type="dataset", exist_ok=True)
    HfApi().upload_folder(repo_id="alice/pictures", repo_type="dataset", folder_path=folder)
    return "alice/pictures"


def test_a_data_set_by_its_id(pictures, tmp_path):
    rows = datasets.load_dataset(pictures, split="train", cache_dir=str(tmp_path / "data"))
    assert sorted(rows["text"]) == [f"number {i}" for i in range(4)]
    assert rows[0]["image"].size == (16, 16)


def test_distill_from_the_hub_to_the_hub(hub, base, result, pictures, tmp_path):
    """Teacher and data by their ids; the finetuned pipeline is pushed from the output folder, with what lies there."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    out = tmp_path / "distilled"
    distill.main([
        "--teacher", base, "--plan", str(result / "pruning_plan.json"), "--dataset_name", pictures, "--cache_dir", str(tmp_path / "data"),
        "--max_train_steps", "2", "--train_batch_size", "2", "--output_dir", str(out),
        "--push_to_hub", "--hub_model_id", "alice/distilled",
    ])  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    with open(out / "log.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 2
    card = hub.store.repo("model", "alice/distilled").read("README.md").decode()
    assert cards.validate(card) == ([], [])
    data = cards.metadata(card)
    assert (data["base_model"], data["license"]) == (base, "openrail++")
    assert "distillation" in data["tags"]
    assert data["datasets"] == [pictures]
    assert "| `max_train_steps` | `2` |" in card
    assert "output_dir" not in card
    assert "2 steps; mean loss" in card
    assert str(tmp_path) not in card
    pipe = DiffusionPipeline.from_pretrained("alice/distilled")
    assert len(ld_pruner_hf.plan_of(pipe.unet)) == 8
    assert tiny.picture(tiny.quiet(pipe), prompt="pizza").shape == (16, 16, 3)


def test_evidence_names_only_hub_ids_as_data(hub, base, result):
    publish(result, "alice/local-data", Evidence(recipe={"dataset_name": "/home/me/pictures", "max_train_steps": 3}))
    data = cards.metadata(hub.store.repo("model", "alice/local-data").read("README.md").decode())
    assert "datasets" not in data
