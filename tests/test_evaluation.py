"""Evaluation from samples to the result file: generation, cost, quality, and the command, on tiny pipelines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import deprecated_families  # noqa: F401
import families
import numpy as np
import pytest
import tiny
import torch
from diffusers import AudioDiffusionPipeline, DDIMScheduler, Mel, UNet2DModel
from PIL import Image, ImageDraw, ImageFilter
from scipy.io import wavfile

from ld_pruner_hf import PlanError, cli, find_operators, make_plan
from ld_pruner_hf.evaluation import (
    Evaluation,
    EvaluationSettings,
    evaluate,
    frechet_distance,
    generate,
    make_extractor,
    samples_of,
    speed_up,
    time_in_turns,
    time_pipelines,
)
from ld_pruner_hf.evaluation.generation import find_sample_rate, kind_of, spectrograms_to_sounds, wav_bytes
from ld_pruner_hf.evaluation.run import prepare
from ld_pruner_hf.evaluation.speed import macs_per_image, one_sample

STEPS = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(a tiny unconditional pipeline's folder, the same pruned)."""
    root = tmp_path_factory.mktemp("pipelines")
    pipe = tiny.ldm()
    pipe.save_pretrained(root / "original")
    pipe.prune(make_plan(pipe, 3, num_inference_steps=1, seeds=1, kinds=["Conv2d"], include=["mid_block*"]))
    pipe.save_pretrained(root / "pruned")
    return root / "original", root / "pruned"


def files(folder):
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


# ---- generation ------------------------------------------------------------------------------------------------------


def test_a_sample_depends_on_its_number_alone(tmp_path):
    pipe = tiny.ldm()
    whole = files(generate(pipe, tmp_path / "whole", 5, call=STEPS, batch_size=5))
    assert list(whole) == [*(f"{i:06d}.png" for i in range(5)), "generation.json"]
    parts = tmp_path / "parts"
    for rank in (1, 0):
        generate(pipe, parts, 5, call=STEPS, batch_size=2, rank=rank, processes=2)
    for name, data in whole.items():  # batches round differently in the last bit
        if name.endswith(".png"):
            a, b = (np.asarray(Image.open(f / name), int) for f in (tmp_path / "whole", parts))
            assert np.abs(a - b).max() <= 1
        else:
            assert (parts / name).read_bytes() == data
    assert len(set(whole.values())) == 6


def test_generation_goes_on_where_it_was_interrupted(tmp_path):
    pipe = tiny.ldm()
    generate(pipe, tmp_path, 4, call=STEPS)
    kept = (tmp_path / "000001.png").stat().st_mtime_ns
    (tmp_path / "000002.png").unlink()
    generate(pipe, tmp_path, 5, call=STEPS)
    assert (tmp_path / "000001.png").stat().st_mtime_ns == kept
    assert (tmp_path / "000002.png").exists() and (tmp_path / "000004.png").exists()


def test_samples_of_other_settings_are_not_mixed(tmp_path):
    pipe = tiny.ldm()
    generate(pipe, tmp_path, 1, call=STEPS)
    with pytest.raises(ValueError, match=r"holds samples of another run \(seed: 0 there, 1 now\)"):
        generate(pipe, tmp_path, 2, call=STEPS, seed=1)
    pipe.unet.conv_in.weight.data *= 2
    with pytest.raises(ValueError, match="weights"):
        generate(pipe, tmp_path, 2, call=STEPS)


def test_prompts_go_round_and_are_needed(tmp_path):
    pipe = tiny.stable_diffusion()
    with pytest.raises(ValueError, match="takes prompts"):
        generate(pipe, tmp_path, 1)
    generate(pipe, tmp_path, 3, prompts=["red heart", "pizza"], call={**STEPS, "guidance_scale": 1.0})
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_nan_pictures_are_noted_and_not_drawn_again(tmp_path):
    pipe = tiny.ldm()
    pipe.unet.conv_out.bias.data[0] = float("nan")
    generate(pipe, tmp_path, 2, call=STEPS)
    assert {f.name: f.read_text() for f in tmp_path.glob("*.failed")} == dict.fromkeys(
        ["000000.failed", "000001.failed"], "not finite (NaN or infinite)"
    )
    before = files(tmp_path)
    generate(pipe, tmp_path, 2, call=STEPS)
    assert files(tmp_path) == before


class ToneMel(Mel):
    """A `Mel` whose inversion is cheap: a tone as loud as the picture is bright."""

    def image_to_audio(self, image):
        level = np.asarray(image, float).mean() / 255
        return (level * np.sin(np.arange(4000) * (0.2 + level))).astype(np.float32)


def audio_pipeline() -> AudioDiffusionPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(**{**tiny.UNCONDITIONAL_UNET, "in_channels": 1, "out_channels": 1}).eval()
    mel = ToneMel(x_res=8, y_res=8, sample_rate=8000, n_fft=512, hop_length=128)
    return tiny.quiet(AudioDiffusionPipeline(vqvae=None, unet=unet, mel=mel, scheduler=DDIMScheduler()))


def test_sounds_and_their_spectrograms(tmp_path):
    generate(audio_pipeline(), tmp_path, 3, call={"steps": 2}, batch_size=2)
    assert sorted(f.suffix for f in tmp_path.iterdir()) == [".json", *[".png"] * 3, *[".wav"] * 3]
    rate, wave = wavfile.read(tmp_path / "000002.wav")
    assert rate == 8000 and wave.dtype == np.int16 and len(wave) == 4000


def test_spectrograms_become_sound_once(tmp_path):
    mel = audio_pipeline().mel
    png = tmp_path / "mel.png"
    Image.new("L", (8, 8), 100).save(png)
    folder = spectrograms_to_sounds([png.read_bytes()] * 2, mel, tmp_path / "out")
    before = files(folder)
    mel.image_to_audio = None
    assert files(spectrograms_to_sounds([png.read_bytes()] * 2, mel, tmp_path / "out")) == before and len(before) == 2


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_a_model_against_itself_is_as_quick_as_itself():
    pipe = tiny.ldm()
    timings = time_pipelines({"A": pipe, "B": pipe}, STEPS, rounds=30)
    gain = speed_up(timings["A"], timings["B"])
    assert gain.low <= 1.0 <= gain.high, gain


def test_twice_the_work_takes_twice_the_time():
    x = torch.randn(300, 300)

    def work(times):
        def run():
            for _ in range(times):
                torch.mm(x, x)

        return run

    timings = time_in_turns({"A": work(20), "B": work(10)}, torch.device("cpu"), rounds=25)
    gain = speed_up(timings["A"], timings["B"])
    assert 1.5 < gain.value < 2.7 and gain.low > 1 and gain.uncertainty >= gain.high - gain.value
    with pytest.raises(ValueError, match="needs at least 5"):
        time_in_turns({"A": work(1)}, torch.device("cpu"), rounds=2)


def test_macs_per_image_are_the_steps_and_the_decoder():
    pipe = tiny.ldm()
    macs = [macs_per_image(pipe, {"num_inference_steps": n}) for n in (1, 2, 3)]
    assert macs[2] - macs[1] == macs[1] - macs[0] > 0
    one_call = pipe.profile(repeats=2, num_inference_steps=1).macs
    assert macs[1] - macs[0] == one_call and macs[0] > one_call
    assert "generator" in one_sample(pipe, {})


# ---- extractors ------------------------------------------------------------------------------------------------------


def drawings(n: int, shapes=("circle", "square", "line"), seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    pictures = []
    for i in range(n):
        picture = Image.new("RGB", (64, 64), tuple(rng.integers(180, 256, 3)))
        draw = ImageDraw.Draw(picture)
        (x, y), r, colour = rng.integers(16, 48, 2), rng.integers(6, 16), tuple(rng.integers(0, 180, 3))
        box = [int(x - r), int(y - r), int(x + r), int(y + r)]
        shape = shapes[i % len(shapes)]
        if shape == "circle":
            draw.ellipse(box, fill=colour)
        elif shape == "square":
            draw.rectangle(box, fill=colour)
        else:
            draw.line(box, fill=colour, width=4)
        pictures.append(picture)
    return pictures


def noisy(pictures, amount: float):
    rng = np.random.default_rng(1)
    return [np.clip(np.asarray(p) / 255 + rng.normal(0, amount, (64, 64, 3)), 0, 1) for p in pictures]


def blurred(pictures, radius: float):
    return [np.asarray(p.filter(ImageFilter.GaussianBlur(radius))) for p in pictures]


@pytest.fixture(scope="module")
def image_features():
    extractor = make_extractor("shipped")

    def features(pictures):
        samples = samples_of([np.asarray(p) for p in pictures])
        return torch.cat([extractor(batch)[0] for _, batch in samples.batches(64)])

    return features


def test_more_noise_more_blur_and_fewer_classes_raise_fid(image_features):
    real = image_features(drawings(300))
    others = drawings(300, seed=1)
    base = frechet_distance(real, image_features(others))
    for worse in (
        [noisy(others, a) for a in (0.1, 0.2, 0.4)],
        [blurred(others, r) for r in (2, 4, 8)],
        [drawings(300, shapes, 1) for shapes in (("circle", "square"), ("circle",))],
    ):
        values = [base, *(frechet_distance(real, image_features(w)) for w in worse)]
        assert values == sorted(values) and values[-1] > 2 * base, values


def test_the_shipped_audio_extractor_hears_noise(tmp_path):
    extractor = make_extractor("shipped", "audio")
    rng = np.random.default_rng(0)

    def chirps(noise, n=160):
        time = np.arange(8000) / 8000
        return [
            (np.sin(2 * np.pi * (f + 400 * time) * time) * np.exp(-4 * time) + noise * rng.normal(size=8000)).astype(np.float32)
            for f in rng.uniform(200, 1500, n)
        ]  # fmt: skip

    sets = {a: torch.cat([extractor(chirps(a, 80))[0] for _ in range(2)]) for a in (0.0, 0.003, 0.03, 0.3)}
    again = extractor(chirps(0.0))[0]
    values = [frechet_distance(sets[0.0], x) for x in (again, sets[0.003], sets[0.03], sets[0.3])]
    assert values == sorted(values) and values[-1] > 5 * values[0], values
    assert extractor([np.ones(100, np.float32), np.ones(9000, np.float32)])[0].shape == (2, 128)


def test_the_shipped_weights_are_small_and_safe():
    from importlib import resources

    folder = resources.files("ld_pruner_hf").joinpath("evaluation/weights")
    sizes = {f.name: len(f.read_bytes()) for f in folder.iterdir()}
    assert sum(sizes.values()) < 5e6 and {"images.safetensors", "audio.safetensors", "README.md"} <= set(sizes)
    assert {name.rpartition(".")[2] for name in sizes} <= {"safetensors", "md", "txt"}


def test_standard_extractors_load_from_a_folder(tmp_path):
    """CLIP, DINO and CLAP through the same code as from the Hub, with tiny random weights."""
    from transformers import (
        ClapAudioConfig,
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        ClapTextConfig,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    batch = torch.randint(0, 256, (3, 3, 40, 40), dtype=torch.uint8)
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**tower, "vocab_size": len(tiny.tokenizer()), "max_position_embeddings": 16}
    text |= {f"{k}_token_id": getattr(tiny.tokenizer(), f"{k}_token_id") for k in ("bos", "eos", "pad")}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 16})
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    size = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size).save_pretrained(tmp_path / "clip")
    tiny.tokenizer().save_pretrained(tmp_path / "clip")
    clip = make_extractor(f"clip:{tmp_path / 'clip'}")
    pictures, texts = clip.embed_images(batch), clip.embed_texts(["red heart", "pizza"])
    assert pictures.shape[0] == 3 and texts.shape == (2, pictures.shape[1]) and clip(batch)[1] is None
    assert torch.allclose(pictures.norm(dim=-1), torch.ones(3)) and clip.name == f"clip:{tmp_path / 'clip'}"
    pixels = CLIPImageProcessor.from_pretrained(tmp_path / "clip")(
        [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in batch], return_tensors="pt"
    )
    expected = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    with torch.no_grad():
        logits = expected(pixel_values=pixels.pixel_values, **tiny.tokenizer()(
            ["red heart", "pizza"], padding="max_length", max_length=16, return_tensors="pt")).logits_per_image  # fmt: skip
    assert torch.allclose(clip.scale * pictures @ texts.T, logits, atol=1e-3)

    ViTModel(ViTConfig(**tower, image_size=32, patch_size=16)).save_pretrained(tmp_path / "dino")
    ViTImageProcessor(size=size).save_pretrained(tmp_path / "dino")
    assert make_extractor(f"dino:{tmp_path / 'dino'}")(batch)[0].shape == (3, 32)

    audio = ClapAudioConfig(
        hidden_size=16, patch_embeds_hidden_size=8, depths=[1, 1], num_attention_heads=[2, 2], num_mel_bins=16,
        spec_size=64, patch_stride=[4, 4], patch_size=4, window_size=4, num_hidden_layers=2, projection_dim=16,
    )  # fmt: skip
    text = ClapTextConfig(**tower, vocab_size=99, projection_dim=16)
    ClapModel(ClapConfig(text_config=text.to_dict(), audio_config=audio.to_dict(), projection_dim=16)).save_pretrained(
        tmp_path / "clap"
    )
    ClapFeatureExtractor(feature_size=16, sampling_rate=8000, max_length_s=1, truncation="rand_trunc").save_pretrained(
        tmp_path / "clap"
    )
    clap = make_extractor(f"clap:{tmp_path / 'clap'}", "audio")
    assert clap.sample_rate == 8000 and clap([np.ones(8000, np.float32)] * 2)[0].shape == (2, 16)


@pytest.mark.parametrize("spec", ["nothing", "clip", "clip:", "resnet:x"])
def test_unknown_extractors(spec):
    with pytest.raises(ValueError, match="extractor: got"):
        make_extractor(spec)


# ---- the whole -------------------------------------------------------------------------------------------------------


def reference_folder(tmp_path, n=140):
    folder = tmp_path / "reference"
    folder.mkdir()
    for i, picture in enumerate(drawings(n)):
        picture.resize((16, 16)).save(folder / f"{i:03d}.png")
    return folder


def run_cli(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_evaluate_compares_two_pipelines(saved, tmp_path, capsys):
    original, pruned = saved
    reference = reference_folder(tmp_path)
    (reference / "broken.png").write_bytes(b"x")
    argv = (
        "evaluate", original, pruned, "-o", tmp_path / "out", "-n", 140, "--reference", reference, "--extractor", "shipped",
        "--num-inference-steps", 1, "--batch-size", 70, "--rounds", 5, "--device", "cpu",
    )  # fmt: skip
    code, out, err = run_cli(capsys, *argv)
    assert code == 0, err
    result = Evaluation.load(tmp_path / "out" / "evaluation.json")
    names = {(r.model, r.name) for r in result.results}
    assert {("A", "FID"), ("B", "FID"), ("A", "KID"), ("B", "IS"), ("B", "CMMD"), ("B vs A", "LPIPS"), ("B vs A", "SSIM"),
            ("A", "MACs per image"), ("B", "peak memory of a generation"), ("B vs A", "speed-up of a denoiser call")} <= names  # fmt: skip
    assert result.value("A", "params of the denoiser") > result.value("B", "params of the denoiser")
    assert result.value("A", "MACs per image") > result.value("B", "MACs per image")
    assert result.value("A", "peak memory of a generation") > 0 and result.value("A", "size on disk") > 0
    fid = result.find("B", "FID")
    assert fid.extractor == "ld_pruner_hf/image-small" and fid.n == 140 and fid.dataset == f"{reference} (140 samples)"
    assert fid.command.startswith("ld-pruner evaluate ") and "thread" in fid.device and not fid.higher_is_better
    assert 0 < result.value("B vs A", "SSIM") < 1 and result.value("B vs A", "LPIPS") > 0
    assert result.notes == ("reference: 1 of 141 samples left out: 1 unreadable",)
    assert "FID" in out and "ld_pruner_hf/image-small" in out and "1 unreadable" in out
    data = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert data["format"] == "ld_pruner_hf.evaluation" and data["models"] == {"A": str(original), "B": str(pruned)}

    times = [f.stat().st_mtime_ns for f in sorted((tmp_path / "out" / "A").iterdir())]
    assert run_cli(capsys, *argv, "--no-costs", "--metrics", "fid")[0] == 0  # resumed: nothing is drawn again
    assert times == [f.stat().st_mtime_ns for f in sorted((tmp_path / "out" / "A").iterdir())]
    again = Evaluation.load(tmp_path / "out" / "evaluation.json")
    assert again.value("B", "FID") == fid.value and len(again.results) == 2


def test_processes_share_the_samples(saved, tmp_path):
    """As under `accelerate launch` on several GPUs; on CPUs, accelerate starts one process, so torchrun does here."""
    argv = [
        "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "ld_pruner_hf", "evaluate", str(saved[0]),
        "-o", str(tmp_path), "-n", "24", "--metrics", "is", "--extractor", "shipped", "--num-inference-steps", "1", "--no-costs",
        "--device", "cpu",
    ]  # fmt: skip
    env = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"} | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(cli.__file__).parents[2]),
    }
    done = subprocess.run([sys.executable, *argv], env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "A").glob("*.png"))) == 24 and done.stdout.count("written to") == 1
    assert done.stderr.count("12/12") >= 2  # each drew its half
    assert Evaluation.load(tmp_path / "evaluation.json").find("A", "IS").n == 24


def test_evaluate_sound(tmp_path):
    generate(audio_pipeline(), tmp_path / "A", 130, call={"steps": 1}, batch_size=65)
    reference = tmp_path / "reference"
    reference.mkdir()
    rng = np.random.default_rng(0)
    for i in range(135):
        (reference / f"{i}.wav").write_bytes(wav_bytes(np.sin(np.arange(6000) * rng.uniform(0.1, 1)), 8000))
    (reference / "silent.wav").write_bytes(wav_bytes(np.zeros(100), 8000))
    settings = EvaluationSettings(n=200, reference=str(reference), extractors={"*": "shipped"}, device="cpu")
    result = evaluate([str(tmp_path / "A")], tmp_path / "out", settings)
    assert [r.name for r in result.results] == ["FAD"] and result.value("A", "FAD") > 0
    assert result.results[0].extractor == "ld_pruner_hf/audio-small" and result.notes[0].endswith("1 silent")


def test_prompts_are_scored(tmp_path):
    tiny.stable_diffusion().save_pretrained(tmp_path / "sd")
    settings = EvaluationSettings(
        n=4, prompts=("red heart", "pizza"), metrics=("clip-score", "pickscore"), call={"guidance_scale": 1.0},
        extractors={"clip-score": "shipped", "pickscore": "clip:nowhere/nothing"}, num_inference_steps=1, costs=False,
        device="cpu",
    )  # fmt: skip
    result = evaluate([str(tmp_path / "sd")], tmp_path / "out", settings)
    score = result.find("A", "CLIP score")
    assert 0 <= score.value <= 1 and score.n == 4 and score.dataset == "2 prompts"
    assert [s["name"] for s in result.skipped] == ["PickScore"] and "PickScore of A" in str(result)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a", "b", "c"], "got 3, expected one or two"),
        (["{pipe}", "--metrics", "fid"], "fid needs --reference"),
        (["{pipe}", "--metrics", "ssim"], "ssim needs two pipelines"),
        (["{pipe}", "--metrics", "clip-score"], "clip-score needs --prompts"),
        (["{pipe}", "--extractor", "fud=shipped"], "expected EXTRACTOR or METRIC=EXTRACTOR"),
        (["{pipe}", "--protocol", "imagenet"], "expected one of \\['celeba-hq', 'coco-30k', 'dreambooth', 'fad'\\]"),
        (["{pipe}", "--scheduler", "Nothing"], "expected a scheduler of diffusers"),
        (["{pipe}", "-n", "0"], "expected at least 1 sample"),
        (["{empty}"], "holds no pictures"),
    ],
)
def test_errors_are_one_line(saved, tmp_path, capsys, argv, message):
    empty = tmp_path / "empty"
    empty.mkdir()
    argv = [a.format(pipe=saved[0], empty=empty) for a in argv]
    code, _, err = run_cli(capsys, "evaluate", *argv, "-o", tmp_path / "out")
    assert code == 2 and err.count("ld-pruner: error: ") == 1
    import re

    assert re.search(message, err), err


def test_too_few_samples_are_told_and_the_rest_is_measured(saved, tmp_path):
    reference = reference_folder(tmp_path, 30)
    settings = EvaluationSettings(
        n=20, reference=str(reference), metrics=("fid", "kid"), extractors={"*": "shipped"}, num_inference_steps=1,
        costs=False, device="cpu",
    )  # fmt: skip
    result = evaluate([str(saved[0])], tmp_path / "out", settings)
    assert [r.name for r in result.results] == ["KID"]
    assert "got 30 and 20 samples, needs at least 129" in result.skipped[0]["reason"]


def test_protocols_are_settings(tmp_path, capsys, saved):
    from ld_pruner_hf.cli.evaluate import protocol_names, read_protocol

    for name in protocol_names():
        EvaluationSettings(**read_protocol(name))
    coco = read_protocol("coco-30k")
    assert (coco["n"], coco["num_inference_steps"], coco["scheduler"], coco["resolution"]) == (
        30000,
        25,
        "PNDMScheduler",
        256,
    )
    assert coco["call"] == {"guidance_scale": 7.5}
    (tmp_path / "p.yaml").write_text("n: 3\ncolour: red\n")
    assert run_cli(capsys, "evaluate", saved[0], "--protocol", tmp_path / "p.yaml")[0] == 2


def test_another_scheduler_for_a_pipeline_with_several_is_refused(monkeypatch):
    monkeypatch.setattr("ld_pruner_hf.evaluation.run.load_pipeline", lambda *_: families.make("unclip")[0])
    with pytest.raises(ValueError, match="unclip has several, UnCLIPScheduler"):
        prepare("unclip", EvaluationSettings(scheduler="DDIMScheduler"))


def test_a_damaged_result_is_refused(tmp_path):
    (tmp_path / "e.json").write_text('{"format": "ld_pruner_hf.evaluation", "version": 1}')
    with pytest.raises(PlanError, match="not a complete evaluation"):
        Evaluation.load(tmp_path / "e.json")


def test_evaluating_leaves_a_pipeline_as_it_was(tmp_path):
    pipe = tiny.ldm()
    before = tiny.snapshot(pipe)
    generate(pipe, tmp_path, 2, call=STEPS)
    time_pipelines({"A": pipe}, STEPS, rounds=5)
    assert tiny.differences(before, tiny.snapshot(pipe)) == []
    assert find_operators(pipe, latency=False, progress=False)


def test_sound_is_known_by_its_sample_rate():
    song = SimpleNamespace(vae=SimpleNamespace(config=SimpleNamespace(sampling_rate=44100)))  # ACE-Step's
    assert kind_of(song) == "audio" and find_sample_rate(song) == 44100
    pictures = SimpleNamespace(vae=SimpleNamespace(config=SimpleNamespace(scaling_factor=0.18)))
    assert kind_of(pictures) == "image" and find_sample_rate(pictures) is None
