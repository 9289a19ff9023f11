"""Sets of samples: what is read, what is passed over and counted, what is an error."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scipy.io import wavfile

from ld_pruner_hf.evaluation import open_samples, read_prompts, samples_of


def picture(size=(16, 16), seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def read(samples, sample_rate=None):
    return [value for _, batch in samples.batches(4, sample_rate) for value in batch]


def test_a_folder_of_pictures_in_order_with_broken_ones_counted(tmp_path):
    for i in range(6):
        picture(seed=i).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_bytes(b"no picture")
    (tmp_path / "2.png").write_bytes((tmp_path / "0.png").read_bytes()[:60])
    (tmp_path / "3.failed").write_text("not finite (NaN or infinite)")
    (tmp_path / "notes.txt").write_text("no sample")
    samples = open_samples(tmp_path)
    found = read(samples)
    assert len(samples) == 7 and len(found) == 4
    assert samples.skipped_text() == "2 unreadable, 1 not finite (NaN or infinite)"
    assert np.array_equal(found[0].permute(1, 2, 0), picture(seed=0)) and found[0].shape == (3, 16, 16)


def test_an_empty_folder_and_a_missing_one_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"holds no pictures; expected files \.png"):
        open_samples(tmp_path)
    with pytest.raises(ValueError, match="holds no sounds"):
        open_samples(tmp_path, "audio")
    with pytest.raises(ValueError, match="no such folder or parquet file"):
        open_samples(tmp_path / "nowhere")


def test_a_folder_without_one_readable_picture_is_an_error(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 1 samples can be used \\(1 unreadable\\)"):
        read(open_samples(tmp_path))


def test_mixed_sizes_need_a_resolution(tmp_path):
    picture((16, 16)).save(tmp_path / "a.png")
    picture((20, 30)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"different sizes \(16x16 and 30x20\); give one with resolution="):
        read(open_samples(tmp_path))
    assert {tuple(p.shape) for p in read(open_samples(tmp_path, resolution=8))} == {(3, 8, 8)}


def test_nan_pictures_are_counted():
    good = np.full((8, 8, 3), 0.5)
    bad = good.copy()
    bad[0, 0, 0] = np.nan
    samples = samples_of([good, bad, good])
    assert len(read(samples)) == 2 and samples.skipped == {"000001": "not finite (NaN or infinite)"}
    assert read(samples)[0][0, 0, 0] == 128
    with pytest.raises(ValueError, match="got an array of shape"):
        read(samples_of([np.zeros((2, 2, 5))]))


def test_sounds_are_mono_resampled_and_silence_is_counted(tmp_path):
    time = np.arange(8000) / 8000
    tone = np.sin(2 * np.pi * 440 * time)
    wavfile.write(tmp_path / "a.wav", 8000, (tone * 30000).astype(np.int16))
    wavfile.write(tmp_path / "b.wav", 16000, np.stack([tone, tone], 1).astype(np.float32))
    wavfile.write(tmp_path / "silent.wav", 8000, np.zeros(8000, np.int16))
    wavfile.write(tmp_path / "nan.wav", 8000, np.full(100, np.nan, np.float32))
    (tmp_path / "broken.wav").write_bytes(b"RIFFxxxx")
    samples = open_samples(tmp_path, "audio")
    found = read(samples, 8000)
    assert [len(w) for w in found] == [8000, 4000] and all(w.dtype == np.float32 for w in found)
    assert np.abs(found[0] - tone * 30000 / 32767).max() < 1e-3
    assert sorted(samples.skipped.values()) == ["not finite (NaN or infinite)", "silent", "unreadable"]


def test_only_silence_is_an_error():
    with pytest.raises(ValueError, match="2 silent"):
        read(samples_of([np.zeros(100), np.zeros(100)], sample_rate=8000))


def test_parquet_files(tmp_path):
    out = io.BytesIO()
    picture().save(out, "PNG")
    rows = [{"bytes": out.getvalue()}, {"bytes": b"broken"}]
    pq.write_table(pa.table({"image": rows, "caption": ["a", "b"]}), tmp_path / "t.parquet")
    samples = open_samples(tmp_path / "t.parquet")
    assert len(read(samples)) == 1 and samples.skipped_text() == "1 unreadable"
    assert read_prompts(tmp_path / "t.parquet") == ["a", "b"]
    with pytest.raises(ValueError, match="no column 'text'"):
        read_prompts(tmp_path / "t.parquet", "text")
    with pytest.raises(ValueError, match="no column audio"):
        open_samples(tmp_path / "t.parquet", "audio")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="not readable as parquet"):
        open_samples(tmp_path / "bad.parquet")


def test_prompts_of_a_text_file_and_of_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "p.txt").write_text("a cat\n\n  a dog \n")
    assert read_prompts(tmp_path / "p.txt") == ["a cat", "a dog"]
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"caption": ["x", None, "y"]}), tmp_path / "data" / "train.parquet")
    assert read_prompts(tmp_path / "data") == ["x", "y"]
    with pytest.raises(ValueError, match="no column 'text' with prompts"):
        read_prompts(tmp_path / "data", "text")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match="has no prompt"):
        read_prompts(tmp_path / "empty.txt")
