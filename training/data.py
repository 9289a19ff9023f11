"""Where training samples come from: images with or without captions, cached latents, or the teacher's own pictures.

Every sample has a position in one endless, shuffled sequence, and all its random numbers (crop, flip, noise, timestep) are drawn from
a generator seeded by that position. So a run is the same however its samples are spread over processes and batches,
and a resumed run goes on exactly.

    parquet / imagefolder / a Hub data set   Table: a permutation a epoch
    webdataset tars, --streaming             Stream: read in order, shuffled in blocks of --shuffle_buffer rows
"""

import io
import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

IMAGE_COLUMNS = ("image", "png", "jpg", "jpeg", "webp", "img")
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

    def state(self):
        """Where the current block begins, as JSON."""
        return self._state

    def restore(self, state):
        if state:
            self._block, self._next_start = [], state["start"]
            self._blocks = self._read(state["epoch"], state["rows"])


# ---- pictures --------------------------------------------------------------------------------------------------------


def open_picture(cell, mode):
    """A picture from a data set's cell: encoded bytes, a path, {"bytes", "path"} or a decoded picture."""
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if cell is None:
        raise Skip("missing images")
    try:
        picture = (
            cell
            if isinstance(cell, Image.Image)
            else Image.open(io.BytesIO(cell) if isinstance(cell, bytes) else cell)
        )
        return picture.convert(mode)
    except Exception:  # PIL raises a dozen kinds of errors for broken files
        raise Skip("broken images") from None


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
        caption_column: None for pipelines that take no caption.
        channels: 1 (spectrograms, grey), 3 or 4.
        workers: threads that decode.
    """

    def __init__(
        self, rows, image_column, caption_column, *, resolution, channels=3, center_crop=False, random_flip=False,
        seed=0, workers=0,
    ):  # fmt: skip
        modes = {1: "L", 3: "RGB", 4: "RGBA"}
        if channels not in modes:
            raise DataError(
                f"images: the pipeline takes {channels} channels, expected one of {list(modes)}; run it data-free"
            )
        self.rows, self.image_column, self.caption_column = rows, image_column, caption_column
        self.resolution, self.mode, self.seed = resolution, modes[channels], seed
        self.center_crop, self.random_flip = center_crop, random_flip
        self.skipped = Counter()
        self._threads = ThreadPoolExecutor(workers) if workers else None

    def read(self, row, generator):
        """(pixels, caption) of one row; `Skip` if it cannot be used."""
        caption = self.caption(row, generator)
        picture = open_picture(row.get(self.image_column), self.mode)
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
    """(Table or Stream, image column, caption column or None) from --dataset_name or --train_data_dir."""
    try:
        import datasets
    except ImportError as error:
        raise DataError("reading data sets needs `datasets`: pip install 'ld_pruner_hf[train]'") from error
    name = args.dataset_name or str(args.train_data_dir)
    options = {"split": "train", "cache_dir": args.cache_dir}
    if args.dataset_name:
        data = datasets.load_dataset(name, args.dataset_config_name, streaming=args.streaming, **options)
    else:
        kind, files = _files_of(Path(args.train_data_dir))
        options |= {"data_dir": str(files)} if kind == "imagefolder" else {"data_files": [str(f) for f in files]}
        data = datasets.load_dataset(kind, streaming=args.streaming or kind == "webdataset", **options)
    columns = data.column_names or list(next(iter(data), {}))
    if not columns:
        raise DataError(f"{name}: the data set is empty; expected at least one row")
    image = pick_column(columns, args.image_column, IMAGE_COLUMNS, "--image_column", name)
    caption = None
    if needs_caption:
        caption = pick_column(columns, args.caption_column, caption_columns, "--caption_column", name)
    data = data.select_columns([c for c in (image, caption) if c])
    if isinstance((data.features or {}).get(image), datasets.Image):
        data = data.cast_column(image, datasets.Image(decode=False))  # a broken picture is skipped, not fatal
    if args.max_train_samples is not None:
        streaming = isinstance(data, datasets.IterableDataset)
        n = args.max_train_samples
        data = data.take(n) if streaming else data.shuffle(seed=args.seed).select(range(min(n, len(data))))
    if isinstance(data, datasets.IterableDataset):
        return Stream(data, args.seed, args.shuffle_buffer, name), image, caption
    return Table(data, args.seed, name), image, caption


def _files_of(path):
    """("webdataset", tars), ("parquet", files) or ("imagefolder", folder)."""
    if not path.exists():
        raise DataError(f"--train_data_dir: {path} does not exist; expected a folder of images, parquet files or tars")
    for kind, suffix in (("webdataset", ".tar"), ("parquet", ".parquet")):
        files = [path] if path.suffix == suffix else sorted(path.rglob(f"*{suffix}")) if path.is_dir() else []
        if files:
            return kind, files
    if not path.is_dir() or not any(p.is_file() for p in path.rglob("*")):
        raise DataError(f"--train_data_dir: {path} is empty; expected images, parquet files or webdataset tars")
    return "imagefolder", path
