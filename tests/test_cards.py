"""Cards for every kind of result: what they must and must not say; and the files that they are made from."""

from __future__ import annotations

import dataclasses
import json

import pytest
import tiny
from hub.cards import validate
from huggingface_hub import ModelCard

from ld_pruner_hf import Evidence, PlanError, Profile, PruningPlan
from ld_pruner_hf.cards import task_of, without_paths
from ld_pruner_hf.evaluation import Evaluation, Measurement
from ld_pruner_hf.measurements import Measurements, measured
from ld_pruner_hf.publication import prepare, pruned_parts, training_log

EVALUATION = Evaluation(
    {"A": "acme/base", "B": "/home/me/pruned"},
    (
        Measurement("A", "FID", 12.5, extractor="InceptionV3", n=500, device="cpu, 1 thread", dataset="org/coco-30k"),
        Measurement(
            "B", "FID", 13.25, uncertainty=0.5, extractor="InceptionV3", n=500, device="cpu, 1 thread", dataset="org/coco-30k",
            command="ld-pruner evaluate acme/base /home/me/pruned",
        ),
        Measurement("B vs A", "SSIM", 0.875, extractor="pixels", n=500, dataset="data/own/test.parquet (500 samples)"),
        Measurement("B", "parameters", 8_000_000, "", extractor=None),
    ),
    notes=("B: 3 of 500 samples left out: silent",),
    environment={"processor": "AMD EPYC"},
)  # fmt: skip
PROFILE = Profile(1000, 2_000_000_000, 1_900_000_000, 12.5, 0.5, 100.0, "cpu", "float32", 1, 2)


@pytest.fixture
def plugin_result(tmp_path, scores):
    pipe = tiny.stable_diffusion()
    plan = pipe.prune(6, scores=scores)
    pipe.save_pretrained(tmp_path / "result")
    plan.save(tmp_path / "result" / "pruning_plan.json")
    return tmp_path / "result"


def card_of(folder, evidence, **kwargs):
    text = prepare(folder, "me/small", evidence, **kwargs)
    assert validate(text) == ([], [])
    assert text == (folder / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "diffusers"
    return text, data


def test_plugin_result(plugin_result):
    text, data = card_of(plugin_result, Evidence(base_model="org/base", license="mit"))
    assert (data["base_model"], data["base_model_relation"], data["license"]) == ("org/base", "finetune", "mit")
    assert data["pipeline_tag"] == "text-to-image"
    assert "pruned" in data["tags"]
    assert "import ld_pruner_hf  # lets diffusers load pruned models" in text
    plan = PruningPlan.load(plugin_result / "pruning_plan.json")
    assert all(f"`{path}`" in text for path in plan.paths)
    part = pruned_parts(plugin_result)[0]
    counted = sum(p.numel() for p in tiny.unet().parameters())
    assert (part.params_before, part.params) == (counted, counted - plan.params_removed)
    assert (plugin_result / "figures" / "removed_by_block.png").is_file()
    assert "No quality metric was measured" in text
    assert "No training after pruning is recorded" in text
    assert "## Cost" not in text  # nothing was measured, so nothing is said


def test_stock_result_of_a_preset(tmp_path):
    pipe = tiny.stable_diffusion()
    pipe.prune("no-mid-block")
    pipe.save_pretrained(tmp_path)
    text, _ = card_of(tmp_path, Evidence())
    assert "nothing else is needed" in text
    assert "import ld_pruner_hf" not in text
    assert "`mid_block_type` | `null`" in text
    assert "BK-SDM" in text
    assert not (tmp_path / "pruning_plan.json").exists()


def test_stock_result_of_a_plan_lists_what_the_plan_took_out(tmp_path):
    pipe = tiny.stable_diffusion()
    scores = pipe.score(
        "pizza", num_inference_steps=1, guidance_scale=1.0, kinds="UNetMidBlock2DCrossAttn", standins="paper"
    )
    plan = pipe.prune(1, scores=scores)
    assert plan.how["saved_as"].startswith("stock")
    pipe.save_pretrained(tmp_path)
    plan.save(tmp_path / "pruning_plan.json")
    text, _ = card_of(tmp_path, Evidence())
    assert "nothing else is needed" in text
    assert "- `mid_block`: UNetMidBlock2DCrossAttn -> identity" in text
    assert (tmp_path / "figures" / "removed_by_block.png").is_file()


def test_finetuned_result(plugin_result):
    steps = "\n".join(f"{i},{2 - i / 100},0.1,0.2,0.3,1e-4,8.0" for i in range(1, 201))
    (plugin_result / "log.csv").write_text("step,loss,task,output,feature,lr,images_per_s\n" + steps + "\n")
    recipe = {
        "teacher": "/home/me/sd",
        "dataset_name": "org/pictures",
        "max_train_steps": 200,
        "use_ema": True,
        "streaming": False,
    }
    text, data = card_of(plugin_result, Evidence(recipe=recipe, evaluation=EVALUATION))
    assert "200 steps; mean loss 1.495 over the first 100, 0.495 over the last 100; 8 samples a second" in text
    assert data["datasets"] == ["org/pictures"]
    assert "distillation" in data["tags"]
    assert "| `max_train_steps` | `200` |" in text
    assert "streaming" not in text
    assert "/home/me" not in text
    assert "|  | original | pruned | B vs A | extractor | samples | data |" in text
    assert "| FID | 12.5 | 13.25 ± 0.5 | - | InceptionV3 | 500 | org/coco-30k |" in text
    assert "| SSIM | - | - | 0.875 | pixels | 500 | test.parquet (500 samples) |" in text
    assert "ld-pruner evaluate acme/base pruned" in text
    assert "Measured on cpu, 1 thread (AMD EPYC). B: 3 of 500 samples left out: silent." in text
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"] == {"type": "org/coco-30k", "name": "org/coco-30k"}
    assert result["metrics"] == [{"type": "fid", "value": 13.25, "name": "FID (InceptionV3)"}]
    assert result["task"]["type"] == "text-to-image"


def audio_pipeline():
    """A tiny pipeline of diffusers that makes sounds: 64x64 spectrograms, no autoencoder."""
    pytest.importorskip("librosa")
    from diffusers import AudioDiffusionPipeline, DDIMScheduler, Mel

    unet = tiny.UNet2DModel(
        **{**tiny.UNCONDITIONAL_UNET, "in_channels": 1, "out_channels": 1, "sample_size": (16, 16)}
    ).eval()
    mel = Mel(x_res=16, y_res=16, sample_rate=8000, n_fft=256, hop_length=64, n_iter=2)
    return tiny.quiet(
        AudioDiffusionPipeline(vqvae=None, unet=unet, mel=mel, scheduler=DDIMScheduler(num_train_timesteps=20))
    )


def test_audio_result_has_players(tmp_path):
    original, pipe = audio_pipeline(), audio_pipeline()
    scores = pipe.score(num_inference_steps=1, kinds=["ResnetBlock2D"], seeds=1)
    pipe.prune(2, scores=scores)
    pipe.save_pretrained(tmp_path)
    evidence = Evidence(original=original, call={"num_inference_steps": 1}, license="cc-by-sa-4.0")
    text, data = card_of(tmp_path, evidence, pipe=pipe)
    assert data["pipeline_tag"] == "audio-to-audio"
    assert "audio" in data["tags"]
    for i in range(4):
        for who in ("original", "pruned"):
            assert (tmp_path / "figures" / f"{who}_{i}.wav").read_bytes().startswith(b"RIFF")
            assert f'src="https://huggingface.co/me/small/resolve/main/figures/{who}_{i}.wav"' in text
    assert "![Original and pruned from the same noise" in text
    assert "## Cost of one call of `unet`" in text


def test_costs_come_with_what_they_were_measured_on(plugin_result):
    after = dataclasses.replace(PROFILE, params=600, latency_ms=10.0)
    measured("unet", PROFILE, after, {"prompt": "secret words", "guidance_scale": 7.5}, "org/base").save(
        plugin_result / "measurements.json"
    )
    text, data = card_of(plugin_result, Evidence(base_model=None))
    assert "| pruned | 0.001 M (-40.0%) | 2.0000 G (+0.0%) | 10.00 ms (-20.0%) | 0.50 ms | 100 MB |" in text
    assert "guidance_scale=7.5" in text
    assert "1 thread" in text
    assert "secret words" not in text + (plugin_result / "measurements.json").read_text()
    assert data["base_model"] == "org/base"


def test_an_unknown_licence_is_not_invented(plugin_result):
    text, data = card_of(plugin_result, Evidence())
    assert "license" not in data
    assert "base_model" not in data
    assert "so none is stated" in text


def test_the_licence_of_a_shipped_or_local_original_is_taken_over(plugin_result, tmp_path):
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "README.md").write_text(
        "---\nlicense: other\nlicense_name: special\nlicense_link: LICENSE.md\n---\n"
    )
    tiny.stable_diffusion().save_pretrained(tmp_path / "original")
    evidence = Evidence(original=str(tmp_path / "original"), prompts=["red heart"], call={"num_inference_steps": 1})
    _, data = card_of(plugin_result, evidence)
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "special", "LICENSE.md")


def test_a_local_path_is_no_base_model(plugin_result, tmp_path, monkeypatch):
    for wrong in ("/home/me/sd", "./sd", "sd", "a/b/c", "~/sd"):
        with pytest.raises(ValueError, match="expected a Hub id"):
            prepare(plugin_result, "me/small", Evidence(base_model=wrong))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sd").mkdir(parents=True)  # looks like an id, and is a folder
    index = json.loads((plugin_result / "model_index.json").read_text())
    (plugin_result / "model_index.json").write_text(json.dumps({**index, "_name_or_path": "models/sd"}))
    assert "base_model" not in card_of(plugin_result, Evidence())[1]


def test_what_lies_beside_the_result_is_used(plugin_result):
    EVALUATION.save(plugin_result / "evaluation.json")
    (plugin_result / "recipe.json").write_text('{"max_train_steps": 7}')
    text, data = card_of(plugin_result, Evidence())
    assert "13.25" in text
    assert "| `max_train_steps` | `7` |" in text
    assert data["model-index"][0]["name"] == "small"


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("StableDiffusionPipeline", "text-to-image"), ("StableDiffusionXLImg2ImgPipeline", "image-to-image"),
        ("StableDiffusionInpaintPipeline", "image-to-image"), ("LDMPipeline", "unconditional-image-generation"),
        ("StableAudioPipeline", "text-to-audio"), ("WanPipeline", "text-to-video"), ("NoSuchPipeline", None),
        ("StableVideoDiffusionPipeline", "image-to-video"), ("FluxPipeline", "text-to-image"),
    ],
)  # fmt: skip
def test_tasks(name, task):
    assert task_of(name) == task


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ld-pruner prune /home/me/sd --output ~/out", "ld-pruner prune sd --output out"),
        ("--plan ../plans/a.json --teacher=/data/x", "--plan a.json --teacher=x"),
        ("CompVis/stable-diffusion-v1-4 https://hf.co/a/b 1/2", "CompVis/stable-diffusion-v1-4 https://hf.co/a/b 1/2"),
    ],
)
def test_without_paths(text, expected):
    assert without_paths(text) == expected


def test_measurements_are_read_as_written(tmp_path):
    before = measured("unet", None, PROFILE, {"height": 64, "eta": 0.5, "flag": True, "image": object()})
    before.save(tmp_path / "m.json")
    assert Measurements.load(tmp_path / "m.json") == before
    assert before.call == {"height": 64, "eta": 0.5}
    data = json.loads((tmp_path / "m.json").read_text())
    del data["after"]["params"]
    (tmp_path / "m.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match="the file is damaged"):
        Measurements.load(tmp_path / "m.json")


def test_a_log_without_rows_says_nothing(tmp_path):
    assert training_log(tmp_path / "log.csv") == ""
    (tmp_path / "log.csv").write_text("step,loss\n")
    assert training_log(tmp_path / "log.csv") == ""
