"""Training data by position: shuffling, resuming, broken rows, columns, and latents on disk."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from argparse import Namespace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

pytest.importorskip("datasets")
pd = pytest.importorskip("pandas")
sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from accelerate import Accelerator  # noqa: E402
from data import DataError, Images, MelPictures, Stream, Table, load_rows, to_pixels  # noqa: E402
from inputs import DenoiserInputs, Encoder, check_resolution  # noqa: E402
from sources import CachedLatents, EncodedImages, build_cache, encode_rows, sample_teacher  # noqa: E402

COUNT = 10


def png(i, size=(16, 16), mode="RGB"):
    """A picture whose grey says its number."""
    data = io.BytesIO()
    Image.new("RGB", size, (20 * i, 20 * i, 20 * i)).convert(mode).save(data, "PNG")
    return data.getvalue()


def write_tars(folder):
    numbers = iter(range(COUNT))
    for t in range(2):
        with tarfile.open(folder / f"{t:05d}.tar", "w") as tar:
            for i in [next(numbers) for _ in range(COUNT // 2)]:
                for suffix, data in (("png", png(i)), ("txt", f"number {i}".encode())):
                    info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def write_folder(folder):
    for i in range(COUNT):
        (folder / f"{i}.png").write_bytes(png(i))
    rows = [json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}) for i in range(COUNT)]
    (folder / "metadata.jsonl").write_text("\n".join(rows))


def write_parquet(folder, rows=None):
    rows = rows or [{"image": {"bytes": png(i), "path": None}, "text": f"number {i}"} for i in range(COUNT)]
    pd.DataFrame(rows).to_parquet(folder / "train.parquet")


@pytest.fixture
def arguments(tmp_path):
    """The flags that `load_rows` reads; `folder` is where the data lies."""

    def make(**changes):
        defaults = {
            "dataset_name": None, "dataset_config_name": None, "train_data_dir": tmp_path / "data", "image_column": None,
            "audio_column": None,
            "caption_column": None, "max_train_samples": None, "streaming": False, "shuffle_buffer": 4, "seed": 0,
            "cache_dir": str(tmp_path / "cache"),
        }  # fmt: skip
        return Namespace(**{**defaults, **changes})

    (tmp_path / "data").mkdir()
    make.folder = tmp_path / "data"
    return make


def loaded(args, **settings):
    rows, image, caption = load_rows(args, needs_caption=True)
    return Images(rows, image, caption, **{"resolution": 16, "seed": args.seed, **settings})


def numbers_at(images, positions):
    pixels, captions = images.batch(positions)
    seen = [round(float((x.mean() + 1) * 127.5) / 20) for x in pixels]
    assert captions is None or captions == [f"number {i}" for i in seen]  # picture and caption belong together
    return seen


# ---- order ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_parquet, write_folder, write_tars])
def test_every_kind_of_data_gives_each_row_once_a_pass(arguments, write):
    write(arguments.folder)
    images = loaded(arguments())
    assert isinstance(images.rows, Stream if write is write_tars else Table)
    first, second = numbers_at(images, range(COUNT)), numbers_at(images, range(COUNT, 2 * COUNT))
    assert sorted(first) == sorted(second) == list(range(COUNT))
    assert first != second and first != sorted(first)
    assert numbers_at(loaded(arguments()), range(COUNT)) == first
    assert numbers_at(loaded(arguments(seed=1)), range(COUNT)) != first


@pytest.mark.parametrize("write", [write_parquet, write_tars])
def test_batches_and_processes_see_the_same_sequence(arguments, write):
    write(arguments.folder)
    whole = numbers_at(loaded(arguments()), range(16))
    first, second = loaded(arguments(), workers=2), loaded(arguments())  # two processes with batches of two
    for start in range(0, 16, 4):
        assert numbers_at(first, [start, start + 1]) == whole[start : start + 2]
        assert numbers_at(second, [start + 2, start + 3]) == whole[start + 2 : start + 4]


@pytest.mark.parametrize("stop", [3, 4, 9, 10, 17, 24])
def test_a_stream_resumes_where_it_was(arguments, stop):
    write_tars(arguments.folder)
    unbroken = loaded(arguments())
    whole = [numbers_at(unbroken, [p])[0] for p in range(30)]
    broken = loaded(arguments())
    numbers_at(broken, range(stop))
    state = json.loads(json.dumps(broken.rows.state()))
    resumed = loaded(arguments())
    resumed.rows.restore(state)
    assert [numbers_at(resumed, [p])[0] for p in range(stop, 30)] == whole[stop:]


def test_a_stream_does_not_go_back(arguments):
    write_tars(arguments.folder)
    images = loaded(arguments())
    numbers_at(images, [9])
    with pytest.raises(ValueError, match="only goes on"):
        images.batch([0])


def test_max_train_samples(arguments):
    write_parquet(arguments.folder)
    images = loaded(arguments(max_train_samples=3))
    assert len(images.rows.rows) == 3 and len(set(numbers_at(images, range(3)))) == 3


# ---- what cannot be used -------------------------------------------------------------------------------------------


def test_broken_pictures_and_missing_captions_are_passed_over_and_counted(arguments):
    rows = [{"image": {"bytes": png(i), "path": None}, "text": f"number {i}"} for i in range(COUNT)]
    rows[2]["image"]["bytes"] = b"not a picture"
    rows[5]["image"]["bytes"] = png(5)[:40]
    rows[7]["text"] = None
    rows[8]["text"] = "  "
    write_parquet(arguments.folder, rows)
    images = loaded(arguments())
    assert set(numbers_at(images, range(COUNT))) <= set(range(COUNT)) - {2, 5, 7, 8}
    assert set(images.skipped) == {"broken images", "missing captions"} and min(images.skipped.values()) >= 2


def test_a_broken_row_has_the_same_substitute_in_every_batch(arguments):
    rows = [{"image": {"bytes": png(i) if i % 2 else b"", "path": None}, "text": f"number {i}"} for i in range(COUNT)]
    write_parquet(arguments.folder, rows)
    whole = numbers_at(loaded(arguments()), range(COUNT))
    assert [numbers_at(loaded(arguments()), [p])[0] for p in range(COUNT)] == whole


@pytest.mark.parametrize("write", ["parquet", "tar"])
def test_data_with_nothing_usable_is_an_error(arguments, write):
    if write == "parquet":
        write_parquet(arguments.folder, [{"image": {"bytes": b"x", "path": None}, "text": "a"}] * 3)
    else:
        write_tars(arguments.folder)
    images = loaded(arguments())
    if write == "tar":
        images.column = "nothing"
    with pytest.raises(DataError, match="no usable row"):
        images.batch([0])


def test_empty_or_missing_folders_are_errors(arguments):
    with pytest.raises(DataError, match="is empty"):
        load_rows(arguments(), needs_caption=True)
    with pytest.raises(DataError, match="does not exist"):
        load_rows(arguments(train_data_dir=arguments.folder / "nowhere"), needs_caption=True)
    with pytest.raises(DataError, match="empty"):
        Table([], seed=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_column": "photo"}, "--image_column.*'photo'.*image"),
        ({"caption_column": "title"}, "--caption_column.*'title'"),
    ],
)
def test_columns_that_are_not_there_are_named(arguments, changes, message):
    write_parquet(arguments.folder)
    with pytest.raises(DataError, match=message):
        load_rows(arguments(**changes), needs_caption=True)


def test_unconditional_pipelines_need_no_captions(arguments):
    write_parquet(arguments.folder, [{"image": {"bytes": png(i), "path": None}} for i in range(COUNT)])
    with pytest.raises(DataError, match="--caption_column"):
        load_rows(arguments(), needs_caption=True)
    rows, image, caption = load_rows(arguments(), needs_caption=False)
    assert caption is None and Images(rows, image, caption, resolution=8).batch([0])[1] is None


# ---- pictures ------------------------------------------------------------------------------------------------------


def test_spectrograms_have_one_channel(arguments):
    write_parquet(arguments.folder, [{"image": {"bytes": png(i, mode="L"), "path": None}} for i in range(COUNT)])
    rows, image, _ = load_rows(arguments(), needs_caption=False)
    images = Images(rows, image, None, resolution=16, channels=1)
    assert images.batch(range(3))[0].shape == (3, 1, 16, 16)
    with pytest.raises(DataError, match="channels"):
        Images(rows, image, None, resolution=16, channels=7)


def ramp():
    return Image.fromarray(np.tile(np.arange(0, 240, 10, dtype=np.uint8), (8, 1)))  # 24 wide, 8 high


def test_crops():
    centre = to_pixels(ramp(), 8)
    assert ((centre[0, 0] + 1) * 127.5).round().tolist() == [80, 90, 100, 110, 120, 130, 140, 150]
    lefts = {
        float(to_pixels(ramp(), 8, center_crop=False, generator=torch.Generator().manual_seed(i))[0, 0, 0])
        for i in range(50)
    }
    assert len(lefts) > 8
    again = [to_pixels(ramp(), 8, False, True, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*again)


def test_flips():
    rows = [to_pixels(ramp(), 8, True, True, torch.Generator().manual_seed(i))[0, 0] for i in range(20)]
    assert {bool(row[0] < row[-1]) for row in rows} == {True, False}
    assert all(torch.equal(row.sort().values, rows[0].sort().values) for row in rows)


def test_one_of_several_captions_is_drawn():
    rows = Table([{"image": png(1), "text": ["one", "uno"]}], seed=0)
    captions = Images(rows, "image", "text", resolution=8).batch(range(20))[1]
    assert set(captions) == {"one", "uno"}


# ---- the denoiser's inputs -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_conditions_are_what_the_pipeline_passes(pipe):
    inputs = DenoiserInputs(pipe, "unet")
    conditions = inputs.encode(["red heart", "pizza"], 2)
    expected = pipe.encode_prompt(["red heart", "pizza"], "cpu", 1, False)[0]
    assert list(conditions) == ["/encoder_hidden_states"] and inputs.sample_shape == (4, 8, 8)
    torch.testing.assert_close(conditions["/encoder_hidden_states"], expected)
    noisy, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 70])
    call = inputs.call(noisy, t, conditions, torch.float32)
    torch.testing.assert_close(pipe.unet(**call.kwargs)[0], pipe.unet(noisy, t, expected).sample)


def test_pipelines_without_prompt_or_with_labels():
    assert DenoiserInputs(tiny.ddpm(), "unet").argument is None
    labels = DenoiserInputs(tiny.dit(), "transformer")
    conditions = labels.encode([3, 5], 2)
    assert labels.argument == "class_labels" and [v.tolist() for v in conditions.values()] == [[3, 5]]


def test_time_told_from_0_to_1_is_scaled(pipe, monkeypatch):
    forward = type(pipe.unet).forward
    call = type(pipe.unet).__call__

    def told_less(self, sample, timestep, *args, **kwargs):  # as a pipeline that divides by 1000 does
        return call(self, sample, timestep / 1000, *args, **kwargs)

    monkeypatch.setattr(type(pipe.unet), "__call__", told_less)
    inputs = DenoiserInputs(pipe, "unet")
    assert forward is type(pipe.unet).forward and inputs.time_scale == pytest.approx(1e-3)
    told = inputs.call(torch.randn(1, 4, 8, 8), torch.tensor([70]), {}, torch.float32).kwargs["timestep"]
    torch.testing.assert_close(told, torch.tensor([0.07]))


def test_resolutions_that_the_vae_cannot_take(pipe):
    check_resolution(pipe, 18)
    with pytest.raises(DataError, match="--resolution: got 17, expected a multiple of 2"):
        check_resolution(pipe, 17)


# ---- recordings ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mel():
    """Spectrograms of 32 x 16 pixels: 32 x 64 samples, a quarter of a second."""
    pytest.importorskip("librosa")
    from diffusers import Mel

    return Mel(x_res=32, y_res=16, sample_rate=8000, n_fft=128, hop_length=64, top_db=60)


def tone(seconds, hertz=440.0, rate=8000):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)


def write_recordings(folder):
    """Usable ones of 0.26 s (another sample rate, two channels) and 1 s; too short, silent, broken."""
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(folder / "a.wav", np.stack([tone(0.26, rate=16000)] * 2, axis=1), 16000)
    soundfile.write(folder / "b.wav", np.concatenate([tone(0.5), tone(0.5, 1500)]), 8000)
    soundfile.write(folder / "c.wav", tone(0.05), 8000)
    soundfile.write(folder / "d.wav", np.zeros(4000), 8000)
    (folder / "e.wav").write_bytes(b"RIFF and no more")


def test_recordings_become_the_pipelines_own_spectrograms(arguments, mel):
    write_recordings(arguments.folder)
    rows, column, caption = load_rows(arguments(), needs_caption=False)
    assert (len(rows.rows), column, caption) == (5, "audio", None)
    images = Images(rows, column, None, resolution=16, channels=1, center_crop=True, open_cell=MelPictures(mel))
    assert images.batch(range(10))[0].shape == (10, 1, 16, 16)
    assert set(images.skipped) == {"short audio", "silent audio", "broken audio"}
    mel.load_audio(str(arguments.folder / "a.wav"))
    ours = np.asarray(MelPictures(mel)(str(arguments.folder / "a.wav"), "L"), dtype=float)
    assert np.abs(ours - np.asarray(mel.audio_slice_to_image(0), dtype=float)).mean() < 2  # of 255; resampled twice


def test_slices_of_a_long_recording_are_drawn(arguments, mel):
    write_recordings(arguments.folder)
    read = MelPictures(mel)
    slices = {
        read(str(arguments.folder / "b.wav"), "L", torch.Generator().manual_seed(i)).tobytes() for i in range(20)
    }
    assert len(slices) == 3  # 8000 samples hold three of 2047


def test_a_column_of_recordings_in_parquet(arguments, mel):
    write_recordings(arguments.folder)
    cells = [{"bytes": (arguments.folder / f"{n}.wav").read_bytes(), "path": None} for n in "ab"]
    for file in arguments.folder.glob("*.wav"):
        file.unlink()
    write_parquet(arguments.folder, [{"sound": cell, "image": None} for cell in cells])
    rows, column, _ = load_rows(arguments(audio_column="sound"), needs_caption=False)
    images = Images(rows, column, None, resolution=16, channels=1, open_cell=MelPictures(mel))
    assert images.batch(range(4))[0].shape == (4, 1, 16, 16) and not images.skipped


# ---- latents on disk -----------------------------------------------------------------------------------------------


def test_cached_latents_are_those_of_the_pictures(arguments, pipe, tmp_path):
    rows = [{"image": {"bytes": png(i), "path": None}, "text": f"number {i}"} for i in range(5)]
    rows[3]["image"]["bytes"] = b"broken"
    write_parquet(arguments.folder, rows)
    images = loaded(arguments(), center_crop=True)
    inputs = DenoiserInputs(pipe, "unet", 16)
    encoder = Encoder(pipe, inputs)
    produce = encode_rows(images, encoder, inputs, torch.float32)
    folder = build_cache(tmp_path / "latents", {"a": 1}, produce, range(5), 2, Accelerator(cpu=True), "test")
    source = CachedLatents(folder, seed=0)
    assert len(source.index) == 4 and images.skipped == {"broken images": 1}
    fetched = source.fetch(range(4))
    order = [[0, 1, 2, 4][i] for i in source._order(0)]
    with torch.no_grad():
        expected = encoder(torch.stack([images.read(rows[i], None)[0] for i in order]))
        prompts = inputs.encode([f"number {i}" for i in order], 4)["/encoder_hidden_states"]
    torch.testing.assert_close(fetched["mean"], expected[0])
    torch.testing.assert_close(fetched["std"], expected[1])
    latents, conditions = source.batch(range(4), fetched)
    torch.testing.assert_close(conditions["/encoder_hidden_states"], prompts, rtol=1e-4, atol=1e-5)
    assert not torch.equal(latents, fetched["mean"])  # drawn from the posterior, anew each epoch
    assert torch.equal(latents, source.batch(range(4), fetched)[0])


def test_tars_are_cached_in_one_pass(arguments, pipe, tmp_path):
    write_tars(arguments.folder)
    images, inputs = loaded(arguments(), center_crop=True), DenoiserInputs(pipe, "unet", 16)
    made, produce = [], encode_rows(images, Encoder(pipe, inputs), inputs, torch.float32)

    def counted(start, rows):
        made.append(start)
        return produce(start, rows)

    folders = [
        build_cache(tmp_path / "latents", {}, counted, images.rows.in_order(), 4, Accelerator(cpu=True), "test")
        for _ in range(2)
    ]
    assert folders[0] == folders[1] and made == [0, 4, 8]
    source = CachedLatents(folders[0], seed=0)
    assert len(source.index) == COUNT
    with torch.no_grad():
        expected = Encoder(pipe, inputs)(
            torch.stack([to_pixels(Image.open(io.BytesIO(png(i))).convert("RGB"), 16) for i in range(COUNT)])
        )[0]
    torch.testing.assert_close(source.fetch(range(COUNT))["mean"], expected[source._order(0)], rtol=1e-3, atol=1e-4)


def test_a_cache_is_kept_by_its_settings(arguments, pipe, tmp_path):
    inputs, made = DenoiserInputs(pipe, "unet"), []

    def produce(start, numbers):
        made.append(numbers)
        return sample_teacher(inputs, ["pizza", "red heart"], 2, 1.0, torch.float32)(start, numbers)

    accelerator = Accelerator(cpu=True)
    folders = [
        build_cache(tmp_path, settings, produce, range(3), 2, accelerator, "test")
        for settings in ({"a": 1}, {"a": 1}, {"a": 2})
    ]
    assert folders[0] == folders[1] != folders[2] and made == [[0, 1], [2]] * 2
    (folders[0] / "000000002.safetensors").unlink()  # a run that was broken off
    (folders[0] / "complete").unlink()
    build_cache(tmp_path, {"a": 1}, produce, range(3), 2, accelerator, "test")
    assert made[4:] == [[2]]


def test_teachers_samples_do_not_depend_on_their_grouping(pipe, tmp_path):
    produce = sample_teacher(DenoiserInputs(pipe, "unet"), ["pizza", "red heart"], 2, 1.0, torch.float32)
    together, alone = produce(0, [0, 1, 2]), produce(2, [2])
    torch.testing.assert_close(together["mean"][2:], alone["mean"], rtol=1e-4, atol=1e-5)
    for a, b in pairwise(together["mean"]):
        assert not torch.allclose(a, b)


def test_pictures_encode_as_the_pipeline_decodes(arguments, pipe):
    write_parquet(arguments.folder)
    inputs = DenoiserInputs(pipe, "unet", 16)
    source = EncodedImages(loaded(arguments()), Encoder(pipe, inputs), inputs, seed=0)
    with torch.no_grad():
        pixels, captions = source.fetch(range(2))
        latents, _ = source.batch(range(2), (pixels, captions))
        posterior = pipe.vae.encode(pixels).latent_dist
    scaled = (latents / pipe.vae.config.scaling_factor - posterior.mean) / posterior.std
    assert scaled.abs().max() < 6 and scaled.std() == pytest.approx(1.0, abs=0.3)
    wrong = Encoder(pipe, DenoiserInputs(pipe, "unet", 32))
    with pytest.raises(DataError, match="--resolution"):
        wrong(pixels)
