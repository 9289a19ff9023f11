"""Sets of pictures or sounds to measure: a folder, a parquet file, or arrays. What cannot be used is passed over and counted."""

from __future__ import annotations

import io
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SOUNDS = (".wav",)
FAILED = ".failed"  # a sample that its pipeline could not make; the file says why
SILENCE = 1e-4  # peak amplitude below which a sound counts as silent (-80 dB)


class Unusable(Exception):
    """One sample that cannot be measured; the message is what it is counted under."""


class Samples:
    """Pictures or sounds with a key each, read when asked for.

    Attributes:
        where: what to call the set in messages. kind: "image" or "audio".
        resolution: pictures are cropped to their middle square and resized to this many pixels a side; None leaves them.
        skipped: key -> why the sample was left out; filled while the set is read.
    """

    def __init__(
        self, where: str, kind: str, items: Sequence[tuple[str, Callable[[], Any]]], resolution: int | None = None
    ) -> None:
        if not items:
            what = "pictures" if kind == "image" else "sounds"
            suffixes = PICTURES if kind == "image" else SOUNDS
            raise ValueError(
                f"{where}: holds no {what}; expected files {' '.join(suffixes)} or rows of a parquet file"
            )
        self.where, self.kind, self.items, self.resolution = where, kind, list(items), resolution
        self.skipped: dict[str, str] = {}
        self._size: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def keys(self) -> list[str]:
        return [key for key, _ in self.items]

    def subset(self, n: int) -> Samples:
        """The first n."""
        return Samples(self.where, self.kind, self.items[:n], self.resolution)

    def batches(self, size: int, sample_rate: int | None = None) -> Iterator[tuple[list[str], Any]]:
        """(keys, batch): pictures as uint8 tensors (B, 3, H, W), sounds as lists of float32 arrays at `sample_rate`.

        Raises:
            ValueError: pictures of different sizes and no `resolution`; not one usable sample.
        """
        keys: list[str] = []
        batch: list[Any] = []
        usable = 0
        for key, load in self.items:
            try:
                value = self._picture(load()) if self.kind == "image" else _sound(load(), sample_rate)
            except Unusable as error:
                self.skipped[key] = str(error)
                continue
            usable += 1
            keys.append(key)
            batch.append(value)
            if len(batch) == size:
                yield keys, self._collate(batch)
                keys, batch = [], []
        if batch:
            yield keys, self._collate(batch)
        if not usable:
            raise ValueError(f"{self.where}: none of its {len(self)} samples can be used ({self.skipped_text()})")

    def skipped_text(self) -> str:
        """For example "2 unreadable, 1 silent"; empty if nothing was left out."""
        return ", ".join(f"{n} {why}" for why, n in Counter(self.skipped.values()).items())

    def _collate(self, batch: list[Any]) -> Any:
        return torch.stack(batch) if self.kind == "image" else batch

    def _picture(self, picture: Image.Image | np.ndarray) -> torch.Tensor:
        if isinstance(picture, np.ndarray):
            picture = picture_of(picture)
        if self.resolution is not None:
            picture = middle_square(picture, self.resolution)
        if self._size is None:
            self._size = picture.size
        if picture.size != self._size:
            raise ValueError(
                f"{self.where}: pictures of different sizes ({self._size[0]}x{self._size[1]} and {picture.width}x"
                f"{picture.height}); give one with resolution= (--resolution)"
            )
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


def middle_square(picture: Image.Image, side: int) -> Image.Image:
    """The middle square of a picture, resized with antialiasing."""
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    square = picture.convert("RGB").crop((left, top, left + short, top + short))
    return square if short == side else square.resize((side, side), Image.Resampling.BICUBIC)


def picture_of(array: np.ndarray) -> Image.Image:
    """A picture from (H, W), (H, W, 1) or (H, W, 3): uint8, or floats in 0 ... 1.

    Raises:
        Unusable: NaN or infinite values. ValueError: another shape.
    """
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] != 3):
        raise ValueError(f"picture: got an array of shape {array.shape}, expected (H, W), (H, W, 1) or (H, W, 3)")
    if array.dtype != np.uint8:
        if not np.isfinite(array).all():
            raise Unusable("not finite (NaN or infinite)")
        array = (array.clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(array).convert("RGB")


def _sound(sound: tuple[int, np.ndarray], sample_rate: int | None) -> np.ndarray:
    """Mono float32 in -1 ... 1 at `sample_rate`."""
    rate, wave = sound
    if wave.dtype.kind == "i":
        wave = wave / np.iinfo(wave.dtype).max
    elif wave.dtype.kind == "u":  # 8-bit files
        wave = wave / 127.5 - 1
    wave = np.asarray(wave, np.float32)
    if wave.ndim == 2:
        wave = wave.mean(axis=1)
    if not np.isfinite(wave).all():
        raise Unusable("not finite (NaN or infinite)")
    if not wave.size or np.abs(wave).max() < SILENCE:
        raise Unusable("silent")
    if sample_rate is not None and rate != sample_rate:
        from scipy.signal import resample_poly

        common = math.gcd(rate, sample_rate)
        wave = resample_poly(wave, sample_rate // common, rate // common).astype(np.float32)
    return wave


def _open_picture(source: Any) -> Image.Image:
    try:
        with Image.open(source) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Unusable("unreadable") from error


def _open_sound(source: Any) -> tuple[int, np.ndarray]:
    from scipy.io import wavfile

    try:
        return wavfile.read(source)
    except (OSError, ValueError, EOFError) as error:
        raise Unusable("unreadable") from error


def _from_bytes(opener: Callable[[Any], Any], data: bytes) -> Any:
    return opener(io.BytesIO(data))


def _in_memory(value: Any) -> Any:
    return value


def _failed(path: Path) -> Any:
    raise Unusable(path.read_text(encoding="utf-8").strip() or "failed")


def open_samples(path: str | os.PathLike, kind: str = "image", resolution: int | None = None) -> Samples:
    """The samples of a folder (searched through, sorted by name) or of a parquet file.

    Args:
        kind: "image" or "audio" (wav files; a parquet column of wav bytes).
        resolution: see `Samples`.

    Raises:
        ValueError: nothing there that could be a sample, or no such place.
    """
    if kind not in ("image", "audio"):
        raise ValueError(f"kind: got {kind!r}, expected 'image' or 'audio'")
    path = Path(path)
    suffixes, opener = (PICTURES, _open_picture) if kind == "image" else (SOUNDS, _open_sound)
    items: list[tuple[str, Callable[[], Any]]]
    if path.is_dir():
        items = []
        for file in sorted(f for f in path.rglob("*") if f.is_file()):
            key = str(file.relative_to(path).with_suffix(""))
            if file.suffix.lower() in suffixes:
                items.append((key, partial(opener, file)))
            elif file.suffix == FAILED:
                items.append((key, partial(_failed, file)))
        return Samples(str(path), kind, items, resolution)
    if path.suffix == ".parquet" and path.is_file():
        items = [
            (f"{i:06d}", partial(_from_bytes, opener, data))
            for i, data in enumerate(parquet_bytes(path, ("image",) if kind == "image" else ("audio",)))
        ]
        return Samples(str(path), kind, items, resolution)
    raise ValueError(f"{path}: no such folder or parquet file of samples")


def samples_of(arrays: Iterable[Any], where: str = "arrays", sample_rate: int | None = None) -> Samples:
    """Samples in memory: pictures (arrays (H, W, 3), uint8 or floats in 0 ... 1), or waveforms if `sample_rate` is given."""
    values = [array if sample_rate is None else (sample_rate, np.asarray(array)) for array in arrays]
    items = [(f"{i:06d}", partial(_in_memory, value)) for i, value in enumerate(values)]
    return Samples(where, "image" if sample_rate is None else "audio", items)


def read_parquet(path: str | os.PathLike) -> Any:
    """The table of a parquet file. ImportError that names the extra; ValueError if it is damaged."""
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError('parquet files need pyarrow: pip install "ld_pruner_hf[eval]"') from error
    try:
        return parquet.read_table(path)
    except (arrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not readable as parquet ({error})") from error


def parquet_bytes(path: Path, columns: Sequence[str]) -> list[bytes]:
    """The files inside the first of these columns that the table has."""
    table = read_parquet(path)
    for name in columns:
        if name in table.schema.names:
            values = table.column(name).to_pylist()
            return [(v["bytes"] if isinstance(v, dict) else v) or b"" for v in values]
    raise ValueError(f"{path}: no column {' or '.join(columns)}; it has {table.schema.names}")


def read_prompts(source: str | os.PathLike, column: str = "caption") -> list[str]:
    """Prompts from a text file (one a line), or from a column of a parquet file or of a data set (ID, ID:SPLIT or a folder).

    Raises:
        ValueError: no prompt, no such column, no such file or data set. ImportError: `datasets` is not installed.
    """
    path = Path(source)
    if path.suffix == ".parquet" and path.is_file():
        table = read_parquet(path)
        prompts = table.column(column).to_pylist() if column in table.schema.names else None
        columns = table.schema.names
    elif path.is_file():
        prompts, columns = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()], []
    else:
        data = _data_set(str(source))
        columns = data.column_names
        prompts = data[column] if column in columns else None
    if prompts is None:
        raise ValueError(f"{source}: no column {column!r} with prompts; it has {columns}")
    prompts = [str(prompt) for prompt in prompts if prompt]
    if not prompts:
        raise ValueError(f"{source}: has no prompt")
    return prompts


def _data_set(source: str) -> Any:
    """A data set of the Hub, or of a folder; its split "train" unless the name ends with another one."""
    try:
        from datasets import load_dataset
        from datasets.exceptions import DatasetNotFoundError
    except ImportError as error:
        raise ImportError(
            f'{source}: no such file; as a data set it needs datasets: pip install "ld_pruner_hf[train]"'
        ) from error
    name, _, split = source.partition(":")
    try:
        return load_dataset(name, split=split or "train")
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise ValueError(f"{source}: neither a file nor a data set that can be loaded ({error})") from error
