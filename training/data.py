"""Rows of a data set by position, and what they hold: pictures or recordings, with or without captions.

Every sample has a position in one endless, shuffled sequence, and all its random numbers (crop, flip, noise, timestep) are drawn from
a generator seeded by that position. So a run is the same however its samples are spread over processes and batches,
and a resumed run goes on exactly.

    parquet, folders, a Hub data set   Table: a permutation an epoch
    webdataset tars, --streaming       Stream: read in order, shuffled in blocks of --shuffle_buffer rows
"""

import copy
import io
import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

IMAGE_COLUMNS = ("image", "png", "jpg", "jpeg", "webp", "img")
AUDIO_COLUMNS = ("audio", "wav", "flac", "ogg", "mp3")
AUDIO_SUFFIXES = tuple(f".{kind}" for kind in AUDIO_COLUMNS[1:])
SHORTEST_AUDIO = 0.25  # of a spectrogram's length; up to a whole one the rest is silence
CAPTION_COLUMNS = ("text", "caption", "txt", "prompt", "title")
PURPOSES = ("picture", "latent", "noise", "order")


def generator_for(seed, position, purpose):
    """The random numbers of one sample for one purpose, whichever process and batch it falls in."""
    number = (seed * 1_000_000_007 + position) * len(PURPOSES) + PURPOSES.index(purpose)
    return torch.Generator().manual_seed(number % 2**63)


class DataError(ValueError):
    """Training data that cannot be used."""


class Skip(Exception):
    """A row that has nothing to train on; its message is what is counted."""


# ---- rows by position ------------------------------------------------------------------------------------------------


class Table:
    """Rows of a data set that can be read in any order; a new permutation every epoch."""

    def __init__(self, rows, seed, name="data"):
        if not len(rows):
            raise DataError(f"{name}: the data set is empty; expected at least one row")
        self.rows, self.seed, self.name = rows, seed, name
        self._epoch, self._order = None, None

    def candidates(self, position):
        """The row at `position`, then those that take its place if it is broken; an iterator that reads when asked."""
        epoch, i = divmod(position, len(self.rows))
        if epoch != self._epoch:
            order = torch.randperm(len(self.rows), generator=generator_for(self.seed, epoch, "order"))
            self._epoch, self._order = epoch, order.tolist()
        order = self._order
        return (self.rows[order[(i + k) % len(order)]] for k in range(len(order)))

    def in_order(self):
        """Numbers of the rows, which `row` takes."""
        return range(len(self.rows))

    def row(self, number):
        return self.rows[number]

    def state(self):
        return {}

    def restore(self, state):
        pass


class Stream:
    """Rows of a stream, read in order and shuffled in blocks; positions must not go back behind the current block.

    Args:
        rows: a `datasets.IterableDataset`.
        buffer: rows a block. They stay in memory as they were read, not decoded.
    """

    def __init__(self, rows, seed, buffer, name="data"):
        self.rows, self.seed, self.buffer, self.name = rows, seed, buffer, name
        self._block, self._order, self._next_start = [], [], 0
        self._state = {"start": 0, "epoch": 0, "rows": None}
        self._blocks = self._read()

    def _read(self, first_epoch=0, resumed=None):
        """(epoch, state of the rows before the block, block), for ever."""
        for epoch in itertools.count(first_epoch):
            self.rows.set_epoch(epoch)
            if resumed is not None:
                self.rows.load_state_dict(resumed)
            before, block, any_row = resumed, [], resumed is not None
            resumed = None
            for row in self.rows:
                any_row = True
                block.append(row)
                if len(block) == self.buffer:
                    yield epoch, before, block
                    before, block = self.rows.state_dict(), []
            if block:
                yield epoch, before, block
            if not any_row:
                raise DataError(f"{self.name}: the data set is empty; expected at least one row")

    def candidates(self, position):
        """The row at `position`, then those of its block that take its place if it is broken."""
        while position >= self._next_start:
            epoch, before, self._block = next(self._blocks)
            start = self._next_start
            self._state = {"start": start, "epoch": epoch, "rows": before}
            self._next_start = start + len(self._block)
            self._order = torch.randperm(len(self._block), generator=generator_for(self.seed, start, "order")).tolist()
        i = position - self._state["start"]
        if i < 0:
            raise ValueError(f"{self.name}: position {position} lies before the current block; a stream only goes on")
        block, order = self._block, self._order  # a later position may move on to the next block
        return (block[order[(i + k) % len(block)]] for k in range(len(block)))

    def in_order(self):
        """The rows of one pass, unshuffled."""
        return iter(self.rows)

    def row(self, row):
        return row

    def state(self):
        """Where the current block begins, as JSON."""
        return self._state

    def restore(self, state):
        if state:
            self._block, self._next_start = [], state["start"]
            self._blocks = self._read(state["epoch"], state["rows"])


# ---- pictures and recordings -----------------------------------------------------------------------------------------


def _encoded(cell, missing):
    """A path or a binary file, from a data set's cell: encoded bytes, a path or {"bytes", "path"}."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if cell is None:
        raise Skip(missing)
    return io.BytesIO(cell) if isinstance(cell, bytes) else cell


def open_picture(cell, mode, generator=None):
    """A picture from a data set's cell; the cell may also hold one that is decoded."""
    cell = cell if isinstance(cell, Image.Image) else _encoded(cell, "missing images")
    try:
        return (cell if isinstance(cell, Image.Image) else Image.open(cell)).convert(mode)
    except Exception:  # PIL raises a dozen kinds of errors for broken files
        raise Skip("broken images") from None


class MelPictures:
    """Recordings as the mel spectrograms that the pipeline's own `Mel` makes; of a long one a slice is drawn.

    Args:
        mel: the `mel` component of an `AudioDiffusionPipeline`.

    Raises:
        DataError: no package to read audio with.
    """

    def __init__(self, mel):
        try:
            import librosa
            import soundfile
        except ImportError as error:
            raise DataError("reading audio needs librosa and soundfile: pip install 'ld_pruner_hf[audio]'") from error
        self.mel, self._read, self._resample = mel, soundfile.read, librosa.resample

    def __call__(self, cell, mode, generator=None):
        """One slice, as a picture; `Skip` for recordings that are broken, silent, or much shorter than a slice."""
        cell = _encoded(cell, "missing audio")
        try:
            samples, rate = self._read(cell, dtype="float32", always_2d=True)
        except (OSError, RuntimeError):  # soundfile's errors are RuntimeErrors
            raise Skip("broken audio") from None
        samples = samples.mean(axis=1)
        mel = copy.copy(self.mel)  # it keeps what it reads, and several threads read
        if rate != mel.get_sample_rate():
            samples = self._resample(samples, orig_sr=rate, target_sr=mel.get_sample_rate())
        if len(samples) < SHORTEST_AUDIO * mel.slice_size:
            raise Skip("short audio")
        mel.load_audio(raw_audio=samples)
        slices = mel.get_number_of_slices()
        chosen = 0 if generator is None else int(torch.randint(0, slices, (1,), generator=generator))
        if not np.any(mel.get_audio_slice(chosen)):
            raise Skip("silent audio")
        return mel.audio_slice_to_image(chosen).convert(mode)


def to_pixels(picture, resolution, center_crop=True, random_flip=False, generator=None):
    """(C, resolution, resolution) in [-1, 1]: shorter side to `resolution`, then a crop; at random without `center_crop`."""
    w, h = picture.size
    scale = resolution / min(w, h)
    w, h = max(resolution, round(w * scale)), max(resolution, round(h * scale))
    picture = picture.resize((w, h), Image.Resampling.LANCZOS)
    if center_crop or generator is None:
        left, top = (w - resolution) // 2, (h - resolution) // 2
    else:
        left = int(torch.randint(0, w - resolution + 1, (1,), generator=generator))
        top = int(torch.randint(0, h - resolution + 1, (1,), generator=generator))
    pixels = np.asarray(picture.crop((left, top, left + resolution, top + resolution)))
    pixels = torch.from_numpy(pixels.reshape(resolution, resolution, -1).copy()).permute(2, 0, 1) / 127.5 - 1
    if random_flip and torch.rand(1, generator=generator) < 0.5:
        pixels = pixels.flip(-1)
    return pixels


class Images:
    """Pixels and captions by position; rows without either are passed over and counted in `skipped`.

    Args:
        rows: a `Table` or `Stream`.
        column: of the pictures, or whatever `open_cell` makes pictures of.
        caption_column: None for pipelines that take no caption.
        channels: 1 (spectrograms, grey), 3 or 4.
        workers: threads that decode.
        open_cell: (cell, mode, generator) -> picture; `MelPictures` for recordings.
    """

    def __init__(
        self, rows, column, caption_column, *, resolution, channels=3, center_crop=False, random_flip=False,
        seed=0, workers=0, open_cell=open_picture,
    ):  # fmt: skip
        modes = {1: "L", 3: "RGB", 4: "RGBA"}
        if channels not in modes:
            raise DataError(
                f"images: the pipeline takes {channels} channels, expected one of {list(modes)}; run it data-free"
            )
        self.rows, self.column, self.caption_column, self.open_cell = rows, column, caption_column, open_cell
        self.resolution, self.mode, self.seed = resolution, modes[channels], seed
        self.center_crop, self.random_flip = center_crop, random_flip
        self.skipped = Counter()
        self._threads = ThreadPoolExecutor(workers) if workers else None

    def read(self, row, generator):
        """(pixels, caption) of one row; `Skip` if it cannot be used."""
        caption = self.caption(row, generator)
        picture = self.open_cell(row.get(self.column), self.mode, generator)
        return to_pixels(picture, self.resolution, self.center_crop, self.random_flip, generator), caption

    def caption(self, row, generator):
        if self.caption_column is None:
            return None
        caption = row.get(self.caption_column)
        if isinstance(caption, (list, tuple)) and caption:
            caption = caption[int(torch.randint(0, len(caption), (1,), generator=generator))]
        if isinstance(caption, bytes):
            caption = caption.decode("utf-8", "replace")
        if isinstance(caption, int) and not isinstance(caption, bool):
            return caption  # a class label
        if not isinstance(caption, str) or not caption.strip():
            raise Skip("missing captions")
        return caption

    def _first_usable(self, candidates, position):
        for row in candidates:
            try:
                return self.read(row, generator_for(self.seed, position, "picture"))
            except Skip as reason:
                self.skipped[str(reason)] += 1
        raise DataError(f"{self.rows.name}: no usable row is left; skipped: {dict(self.skipped)}")

    def batch(self, positions):
        """(pixels (B, C, H, W), captions or None)."""
        candidates = [self.rows.candidates(p) for p in positions]  # in order: a stream only goes on
        do = self._threads.map if self._threads else map
        samples = list(do(self._first_usable, candidates, positions))
        captions = None if self.caption_column is None else [caption for _, caption in samples]
        return torch.stack([pixels for pixels, _ in samples]), captions


# ---- loading ---------------------------------------------------------------------------------------------------------


def pick_column(columns, wanted, usual, flag, name):
    """The column that the user named, else the first of the usual names that is there.

    Raises:
        DataError: no such column.
    """
    if wanted is not None:
        if wanted not in columns:
            raise DataError(f"{flag}: {name} has no column {wanted!r}; it has {sorted(columns)}")
        return wanted
    found = next((c for c in usual if c in columns), None)
    if found is None:
        raise DataError(f"{flag}: {name} has none of the columns {list(usual)}; name one of {sorted(columns)}")
    return found


def load_rows(args, needs_caption, caption_columns=CAPTION_COLUMNS):
    """(Table or Stream, column, caption column or None) from --dataset_name or --train_data_dir.

    The column is the one of pictures; of recordings with --audio_column or in a folder of them.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("reading data sets needs `datasets`: pip install 'ld_pruner_hf[train]'") from error
    name = args.dataset_name or str(args.train_data_dir)
    data = _open_dataset(args, datasets)
    columns = data.column_names or list(next(iter(data), {}))
    if not columns:
        raise DataError(f"{name}: the data set is empty; expected at least one row")
    if args.audio_column or (
        args.image_column is None and not set(columns) & set(IMAGE_COLUMNS) and set(columns) & set(AUDIO_COLUMNS)
    ):
        column = pick_column(columns, args.audio_column, AUDIO_COLUMNS, "--audio_column", name)
    else:
        column = pick_column(columns, args.image_column, IMAGE_COLUMNS, "--image_column", name)
    caption = None
    if needs_caption:
        caption = pick_column(columns, args.caption_column, caption_columns, "--caption_column", name)
    data = data.select_columns([c for c in (column, caption) if c])
    kind = (data.features or {}).get(column)
    if isinstance(kind, (datasets.Image, datasets.Audio)):
        data = data.cast_column(column, type(kind)(decode=False))  # a broken one is skipped, not fatal
    if args.max_train_samples is not None:
        streaming = isinstance(data, datasets.IterableDataset)
        n = args.max_train_samples
        data = data.take(n) if streaming else data.shuffle(seed=args.seed).select(range(min(n, len(data))))
    if isinstance(data, datasets.IterableDataset):
        return Stream(data, args.seed, args.shuffle_buffer, name), column, caption
    return Table(data, args.seed, name), column, caption


def _open_dataset(args, datasets):
    options = {"split": "train", "cache_dir": args.cache_dir}
    if args.dataset_name:
        return datasets.load_dataset(args.dataset_name, args.dataset_config_name, streaming=args.streaming, **options)
    kind, files = files_of(args.train_data_dir)
    if kind == "audio":  # datasets' own reader of folders needs torchcodec
        return datasets.Dataset.from_dict({"audio": [str(f) for f in files]})
    options |= {"data_dir": str(files)} if kind == "imagefolder" else {"data_files": [str(f) for f in files]}
    return datasets.load_dataset(kind, streaming=args.streaming or kind == "webdataset", **options)


def files_of(path):
    """("webdataset", tars), ("parquet", files), ("audio", recordings) or ("imagefolder", folder)."""
    path = Path(path)
    if not path.exists():
        raise DataError(
            f"--train_data_dir: {path} does not exist; expected a folder of images or recordings, parquet files or tars"
        )
    present = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for kind, suffixes in (("webdataset", (".tar",)), ("parquet", (".parquet",)), ("audio", AUDIO_SUFFIXES)):
        files = [p for p in present if p.suffix.lower() in suffixes]
        if files:
            return kind, files
    if not path.is_dir() or not present:
        raise DataError(
            f"--train_data_dir: {path} is empty; expected images, recordings, parquet files or webdataset tars"
        )
    return "imagefolder", path
