"""The script that trains the shipped pipelines: whitening, exact resuming, and a whole run on a handful of pictures."""

import importlib.util
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

SCRIPT = Path(__file__).parents[1] / "training" / "pretrain_tiny.py"
RECIPES = sorted((SCRIPT.parent / "recipes").glob("pretrain_*.yaml"))


@pytest.fixture(scope="module")
def pretrain():
    spec = importlib.util.spec_from_file_location("pretrain_tiny", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def parquet(tmp_path):
    """Eight plain-coloured pictures with captions, as a parquet file."""
    rows = []
    for i in range(8):
        picture = Image.fromarray(np.full((20, 20, 3), 30 * i, dtype=np.uint8))
        data = io.BytesIO()
        picture.save(data, "PNG")
        image = {"bytes": data.getvalue(), "path": None}
        speaker = ("george", "jackson", "theo")[i % 3]
        rows.append({"image": image, "caption": f"grey number {i}", "skip": i == 7, "speaker": speaker})
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


TINY_AUTOENCODER = {
    "block_out_channels": [8], "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"],
}  # fmt: skip
TINY_UNET = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 2}
TINY_BLOCKS = {
    "text-to-image": {
        "sample_size": 16, "cross_attention_dim": 8,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    },
    "unconditional-image": {
        "sample_size": 16,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    },
}  # fmt: skip
TINY_BLOCKS["unconditional-audio"] = TINY_BLOCKS["unconditional-image"] | {"sample_size": [16, 16]}


def small(recipe):
    """The recipe, made so small that a step takes milliseconds."""
    recipe |= {"resolution": 16, "train_batch_size": 2, "skip_column": "skip"}
    recipe["diffusion"] |= {"max_train_steps": 2}
    recipe["diffusion"]["unet"] = TINY_UNET | TINY_BLOCKS[recipe["task"]]
    autoencoder = recipe["autoencoder"]
    autoencoder |= {"max_train_steps": 2, "train_batch_size": 2}
    if "config" in autoencoder:
        channels = {k: v for k, v in autoencoder["config"].items() if k in ("in_channels", "out_channels")}
        autoencoder["config"] = TINY_AUTOENCODER | channels
    else:  # a shipped autoencoder, which shrinks by 4
        recipe["resolution"], recipe["diffusion"]["unet"]["sample_size"] = 32, 8
    if recipe["task"] == "text-to-image":
        recipe["diffusion"] |= {"tokenizer_vocab_size": 600}
        recipe["diffusion"]["text_encoder"] |= {"hidden_size": 8, "intermediate_size": 8, "projection_dim": 8}
        recipe["validation"] |= {"prompts": ["grey number 1", "grey number 2"]}
    else:
        recipe["validation"] |= {"samples": 2}
    if "mel" in recipe:
        recipe["mel"] |= {"x_res": 16, "y_res": 16, "n_iter": 2}
    recipe["validation"] |= {"num_inference_steps": 2}
    return recipe


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request, tmp_path):
    """Each shipped recipe in turn, made small: (its content, its file)."""
    content = small(yaml.safe_load(request.param.read_text()))
    if "mel" in content:
        pytest.importorskip("librosa")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return content, path


def test_whitening_normalises_latents_and_keeps_reconstructions(pretrain):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4, sample_size=16).eval()
    images = torch.randn(8, 3, 16, 16)
    with torch.no_grad():
        before = vae.decode(vae.encode(images).latent_dist.mean).sample
        spread = (
            vae.encode(images).latent_dist.std
            / vae.encode(images).latent_dist.mean.std(dim=(0, 2, 3))[None, :, None, None]
        )
    pretrain.whiten_(vae, images)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        after = vae.decode(posterior.mean).sample
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(posterior.mean.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(posterior.mean.std(dim=(0, 2, 3)), torch.ones(4), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(posterior.std, spread, rtol=1e-3, atol=1e-4)
    assert vae.config.scaling_factor == 1.0


class Interrupted(Exception):
    pass


def run_training(pretrain, out, stop_at=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 4))

    def loss_fn(step, generator):
        x = torch.randn(3, 4, generator=generator)
        return (model(x) - x).pow(2).mean()

    def on_checkpoint(averaged, step):
        if step == stop_at:
            raise Interrupted

    out.mkdir(exist_ok=True)
    averaged, summary = pretrain.train(
        {"model": model}, loss_fn, out=out, seed=3, config={"learning_rate": 1e-2, "max_train_steps": 8},
        max_minutes=float("inf"), checkpoint_minutes=0.0, on_checkpoint=on_checkpoint,
    )  # fmt: skip
    return averaged["model"].state_dict(), summary


def test_a_broken_run_goes_on_as_if_unbroken(pretrain, tmp_path):
    whole, summary = run_training(pretrain, tmp_path / "whole")
    with pytest.raises(Interrupted):
        run_training(pretrain, tmp_path / "broken", stop_at=5)
    resumed, _ = run_training(pretrain, tmp_path / "broken")
    assert summary["steps"] == 8
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_a_half_written_checkpoint_is_never_read(pretrain, tmp_path):
    checkpoint = pretrain.Checkpoint(tmp_path / "checkpoint")
    checkpoint.save({"a": torch.ones(2)}, step=1)
    aside = tmp_path / "checkpoint.new"  # what a kill in the middle of the next save leaves
    aside.mkdir()
    (aside / "state.safetensors").write_bytes(b"half")
    tensors, state = checkpoint.load()
    assert state == {"step": 1} and torch.equal(tensors["a"], torch.ones(2))
    checkpoint.save({"a": torch.zeros(2)}, step=2)
    assert checkpoint.load()[1] == {"step": 2}


CALLS = {
    "text-to-image": {"prompt": "grey number 3", "num_inference_steps": 2},
    "unconditional-image": {"num_inference_steps": 2},
    "unconditional-audio": {"steps": 2},
}


def test_whole_run_makes_a_stock_pipeline(pretrain, parquet, recipe, tmp_path):
    """Both stages of every shipped recipe, then again: the second run finds everything done and draws the same picture."""
    content, path = recipe
    out = tmp_path / "out"
    arguments = ["--recipe", str(path), "--train_data", str(parquet), "--output_dir", str(out)]
    arguments += ["--mixed_precision", "no" if content["task"] == "text-to-image" else "bf16"]
    pretrain.main(arguments)
    assert json.loads((out / "autoencoder" / "summary.json").read_text())["steps"] == 2
    assert json.loads((out / "denoiser" / "summary.json").read_text())["steps"] == 2
    side = content["resolution"]
    assert Image.open(out / "denoiser" / "samples_000002.png").size == (8 * side, side)

    def draw():
        pipe = DiffusionPipeline.from_pretrained(out / "pipeline")
        assert type(pipe) is pretrain.TASKS[content["task"]].pipeline_class
        return np.asarray(pipe(**CALLS[content["task"]], generator=torch.Generator().manual_seed(0)).images[0])

    first = draw()
    pretrain.main(arguments)
    assert np.array_equal(draw(), first)


def test_training_can_start_from_a_pipeline(pretrain, parquet, recipe, tmp_path):
    """`--init_from` takes its autoencoder as it is and trains its denoiser on."""
    content, path = recipe
    arguments = ["--recipe", str(path), "--train_data", str(parquet), "--output_dir"]
    pretrain.main([*arguments, str(tmp_path / "a")])
    pretrain.main([*arguments, str(tmp_path / "b"), "--init_from", str(tmp_path / "a" / "pipeline")])
    first, second = (DiffusionPipeline.from_pretrained(tmp_path / x / "pipeline") for x in "ab")
    autoencoder = pretrain.TASKS[content["task"]].autoencoder
    kept, trained = getattr(second, autoencoder).state_dict(), second.unet.state_dict()
    assert all(torch.equal(v, kept[k]) for k, v in getattr(first, autoencoder).state_dict().items())
    changed = [not torch.equal(v, trained[k]) for k, v in first.unet.state_dict().items()]
    assert any(changed) and not (tmp_path / "b" / "autoencoder" / "vae").exists()


def test_data_that_cannot_be_used_is_refused(pretrain, parquet, tmp_path):
    rows = pd.read_parquet(parquet)
    rows.drop(columns="caption").to_parquet(tmp_path / "no_caption.parquet")
    with pytest.raises(ValueError, match=r"no column \['caption'\]"):
        pretrain.load_rows(tmp_path / "no_caption.parquet", {}, ("image", "caption"))
    assert len(pretrain.load_rows(tmp_path / "no_caption.parquet", {})) == 8
    rows["skip"] = True
    rows.to_parquet(tmp_path / "all_skipped.parquet")
    with pytest.raises(ValueError, match="no rows"):
        pretrain.load_rows(tmp_path / "all_skipped.parquet", {"skip_column": "skip"})


def test_recipes_keep_the_rows_and_pictures_that_they_name(pretrain, parquet):
    rows = pretrain.load_rows(parquet, {"keep": {"speaker": ["george", "theo"]}})
    assert set(rows["speaker"]) == {"george", "theo"} and list(rows.index) == list(range(len(rows)))
    with pytest.raises(ValueError, match="no column 'voice'"):
        pretrain.load_rows(parquet, {"keep": {"voice": ["george"]}})
    images = torch.zeros(3, 3, 16, 16)
    images[0, :, :, ::2] = 1  # stripes
    images[1, :, 6:10, 6:10] = 1  # an object on a plain ground
    assert pretrain.plainest(images, 2).tolist() in ([1, 2], [2, 1])


def test_wrong_arguments_are_refused_before_any_work(pretrain, parquet, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    arguments = ["--recipe", str(recipe), "--train_data", str(parquet), "--output_dir", str(tmp_path / "out")]
    recipe.write_text(yaml.safe_dump({"task": "poetry", "seed": 0}))
    with pytest.raises(ValueError, match=r"recipe.yaml: task: got 'poetry', expected one of \['text-to-image', "):
        pretrain.main(arguments)
    recipe.write_text(yaml.safe_dump({"task": "unconditional-image", "seed": 0}))
    with pytest.raises(ValueError, match=r"--init_from: .* is no pipeline's folder"):
        pretrain.main([*arguments, "--init_from", str(tmp_path)])
    assert not (tmp_path / "out").exists()
