"""Batches of latents and conditions, however they come about.

EncodedImages    pictures through the autoencoder and captions through the text encoders, each step
CachedLatents    the same, computed once and kept on disk; also the teacher's own samples (--data_free)
"""

import hashlib
import itertools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from data import (
    AUDIO_COLUMNS,
    CAPTION_COLUMNS,
    DataError,
    Images,
    MelPictures,
    Skip,
    files_of,
    generator_for,
    load_rows,
    open_picture,
)
from inputs import Encoder, autoencoder_of, float32_outputs
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

import ld_pruner_hf
from ld_pruner_hf.latents import default_prompts, final_latents, modules_of, preserved, steps_argument
from ld_pruner_hf.surgery import weights_of


def draw_latents(mean, std, seed, positions):
    """One latent a sample from its posterior; the noise is the position's."""
    if std is None:
        return mean
    noise = [torch.randn(mean.shape[1:], generator=generator_for(seed, p, "latent")) for p in positions]
    return mean + std * torch.stack(noise).to(mean)


class EncodedImages:
    """Latents and conditions computed anew for each batch."""

    def __init__(self, images, encoder, inputs, seed):
        self.images, self.encoder, self.inputs, self.seed = images, encoder, inputs, seed
        self.skipped = images.skipped

    def fetch(self, positions):
        """What can be prepared aside while the denoisers run."""
        return self.images.batch(positions)

    def batch(self, positions, fetched):
        pixels, captions = fetched
        mean, std = self.encoder(pixels)
        return draw_latents(mean, std, self.seed, positions), self.inputs.encode(captions, len(positions))

    def state(self):
        return self.images.rows.state()

    def restore(self, state):
        self.images.rows.restore(state)


class CachedLatents:
    """Latents and conditions from the files that `build_cache` wrote; a new permutation every epoch."""

    def __init__(self, folder, seed):
        self.seed, self.skipped = seed, {}
        self.files = [safe_open(f, "pt") for f in sorted(Path(folder).glob("*.safetensors"))]
        self.index = [(f, i) for f in self.files for i in range(f.get_slice("mean").get_shape()[0])]
        if not self.index:
            raise DataError(f"{folder}: no usable sample is left; expected at least one")

    def fetch(self, positions):
        rows = []
        for position in positions:
            epoch, i = divmod(position, len(self.index))
            order = self._order(epoch)
            file, row = self.index[order[i]]
            rows.append({name: file.get_slice(name)[row : row + 1] for name in file.keys()})  # noqa: SIM118
        return {name: torch.cat([r[name] for r in rows]) for name in rows[0]}

    def _order(self, epoch):
        if getattr(self, "_epoch", None) != epoch:
            self._epoch = epoch
            generator = generator_for(self.seed, epoch, "order")
            self._permutation = torch.randperm(len(self.index), generator=generator).tolist()
        return self._permutation

    def batch(self, positions, fetched):
        conditions = {k.removeprefix("condition:"): v for k, v in fetched.items() if k.startswith("condition:")}
        mean, std = fetched["mean"].float(), fetched.get("std")
        return draw_latents(mean, None if std is None else std.float(), self.seed, positions), conditions

    def state(self):
        return {}

    def restore(self, state):
        pass


def build_cache(folder, settings, produce, items, per_file, accelerator, what):
    """Write what `produce` makes of `items`, `per_file` in a file, shared among the processes; files that are there are kept.

    Args:
        settings: what the samples depend on; each combination has a folder of its own inside `folder`.
        produce: (number of the first item, items) -> {name: (n, ...)}, where n may be smaller, or None if none is usable.
        items: numbers or rows, in an order that stays.

    Returns:
        The folder of these settings.
    """
    settings = json.dumps({**settings, "per_file": per_file}, sort_keys=True)
    folder = Path(folder) / hashlib.sha256(settings.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    complete = folder / "complete"
    if complete.exists():
        return folder
    (folder / "settings.json").write_text(settings)
    total = len(items) if hasattr(items, "__len__") else None
    bar = tqdm(desc=what, total=total, disable=not accelerator.is_main_process)
    for block, start, chunk in _blocks(items, per_file):
        bar.update(len(chunk))
        file, empty = folder / f"{start:09d}.safetensors", folder / f"{start:09d}.empty"
        if block % accelerator.num_processes != accelerator.process_index or file.exists() or empty.exists():
            continue
        tensors = produce(start, chunk)
        if tensors is None:
            empty.touch()
            continue
        aside = file.with_suffix(".new")
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, aside)
        os.replace(aside, file)
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        complete.touch()
    return folder


def _blocks(items, size):
    """(number of the block, number of its first item, its items)."""
    items = iter(items)
    for block in itertools.count():
        chunk = list(itertools.islice(items, size))
        if not chunk:
            return
        yield block, block * size, chunk


def encode_rows(images, encoder, inputs, dtype):
    """`produce` of --cache_latents: rows, cropped in the centre, to latents and conditions."""

    def produce(start, items):
        pixels, captions = [], []
        for number, item in enumerate(items, start):
            try:
                x, caption = images.read(images.rows.row(item), generator_for(0, number, "picture"))
            except Skip as reason:
                images.skipped[str(reason)] += 1
                continue
            pixels.append(x)
            captions.append(caption)
        if not pixels:
            return None
        mean, std = encoder(torch.stack(pixels))
        conditions = inputs.encode(captions, len(pixels))
        tensors = {"mean": mean} | ({} if std is None else {"std": std})
        return tensors | {f"condition:{k}": v.to(dtype) if v.is_floating_point() else v for k, v in conditions.items()}

    return produce


def sample_teacher(inputs, conditions, steps, guidance_scale, dtype):
    """`produce` of --data_free: latents that the teacher makes from its conditions and the samples' numbers as seeds, and the conditions.

    They are a data set like any other: --seed does not change it.
    """

    def produce(_, numbers):
        n, chosen = len(numbers), [conditions[i % len(conditions)] for i in numbers]
        call = inputs.pipeline_call(chosen, n, guidance_scale)
        if steps:
            call |= steps_argument(inputs.pipe, steps)
        # Some pipelines draw their noise in float32, whatever the denoiser's precision.
        mixed = torch.autocast(inputs.pipe.device.type, dtype, enabled=dtype != torch.float32)
        with preserved(inputs.pipe), float32_outputs(inputs.pipe, inputs.component), mixed:
            latents = final_latents(inputs.pipe, call, numbers)
        if tuple(latents.shape[1:]) != inputs.sample_shape:
            raise DataError(
                f"the teacher's samples have shape {tuple(latents.shape[1:])}, its denoiser is called with {inputs.sample_shape}"
            )
        encoded = inputs.encode(chosen, n)
        return {"mean": latents} | {
            f"condition:{k}": v.to(dtype) if v.is_floating_point() else v for k, v in encoded.items()
        }

    return produce


# ---- from flags to batches ------------------------------------------------------------------------------------------


def prompts_of(args, pipe):
    """Conditions that the teacher draws its own samples from."""
    if args.data_free_prompts:
        prompts = [line.strip() for line in args.data_free_prompts.read_text().splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"--data_free_prompts: {args.data_free_prompts} is empty; expected a prompt a line")
        return prompts
    if args.teacher.startswith("demo:"):
        return ld_pruner_hf.demo.PROMPTS.get(args.teacher.removeprefix("demo:"))
    return default_prompts() if hasattr(pipe, "tokenizer") else None


def open_rows(args, inputs, accelerator):
    """(rows, column of pictures or recordings, caption column) of a data set, or None without one."""
    if args.data_free:
        return None
    usual = ("label", *CAPTION_COLUMNS) if inputs.argument == "class_labels" else CAPTION_COLUMNS
    with accelerator.main_process_first():
        return load_rows(args, inputs.argument is not None, usual)


def make_source(args, inputs, rows, accelerator, dtype):
    """Where batches come from: pictures encoded each step, or latents computed once."""
    if rows is None:
        produce, settings = _data_free(args, inputs, dtype)
        return CachedLatents(
            _cache(args, inputs, produce, range(args.data_free), settings, accelerator, dtype), args.seed
        )
    encoder = Encoder(inputs.pipe, inputs)
    images = Images(
        *rows, resolution=args.resolution or picture_size(inputs), channels=encoder.channels,
        center_crop=args.center_crop or args.cache_latents, random_flip=args.random_flip, seed=args.seed,
        workers=args.dataloader_num_workers, open_cell=_opener(rows[1], args, inputs.pipe),
    )  # fmt: skip
    if not args.cache_latents:
        return EncodedImages(images, encoder, inputs, args.seed)
    settings = {
        "data": [args.dataset_name, args.dataset_config_name, str(args.train_data_dir), args.max_train_samples],
        "files": _sizes(args.train_data_dir), "columns": rows[1:], "resolution": images.resolution, "seed": args.seed,
    }  # fmt: skip
    produce = encode_rows(images, encoder, inputs, dtype)
    folder = _cache(args, inputs, produce, rows[0].in_order(), settings, accelerator, dtype)
    source = CachedLatents(folder, args.seed)
    source.skipped = images.skipped
    return source


def _opener(column, args, pipe):
    """What makes pictures of the column's cells."""
    if column != args.audio_column and column not in AUDIO_COLUMNS:
        return open_picture
    if getattr(pipe, "mel", None) is None:
        raise DataError(
            f"--audio_column: {type(pipe).__name__} has no `mel` that turns recordings into its spectrograms; give it pictures"
        )
    return MelPictures(pipe.mel)


def _sizes(folder):
    """Names and sizes of a data set's files: a changed file makes new latents."""
    if folder is None:
        return None
    files = files_of(folder)[1]
    files = files if isinstance(files, list) else sorted(p for p in files.rglob("*") if p.is_file())
    return [[str(f), f.stat().st_size] for f in files]


def _data_free(args, inputs, dtype):
    """(produce, settings) of the teacher's own samples."""
    conditions = [None]
    if inputs.argument == "prompt":
        conditions = prompts_of(args, inputs.pipe)
    elif inputs.argument == "class_labels":
        conditions = list(range(getattr(inputs.pipe, inputs.component).config.num_embeds_ada_norm))
    steps, guidance = args.data_free_steps, args.data_free_guidance
    settings = {"steps": steps, "guidance": guidance, "of": conditions, "count": args.data_free}
    return sample_teacher(inputs, conditions, steps, guidance, dtype), settings


def _cache(args, inputs, produce, items, settings, accelerator, dtype):
    """The folder of latents that depend on these settings and on the pipeline's models."""
    folder = Path(args.cache_dir or args.output_dir) / "latents"
    models = {name: weights_of(m) for name, m in modules_of(inputs.pipe).items()}
    settings |= {"models": models, "shape": inputs.sample_shape, "dtype": str(dtype), "options": inputs.options}
    return build_cache(folder, settings, produce, items, args.train_batch_size, accelerator, "latents")


def picture_size(inputs):
    """Pixels a side of the pictures that the pipeline draws by itself."""
    vae = autoencoder_of(inputs.pipe)
    factor = 2 ** (len(vae.config.get("block_out_channels", [0])) - 1) if vae is not None else 1
    size = getattr(inputs.pipe, inputs.component).config.get("sample_size")
    size = size[0] if isinstance(size, (list, tuple)) else size
    if not size:
        raise ValueError("--resolution is missing, and the denoiser's config names no sample_size")
    return size * factor


class Batches:
    """Positions and what was fetched for them, one micro-batch ahead of the training."""

    def __init__(self, source, first_step, args, accelerator):
        self.source, self.size = source, args.train_batch_size
        self.stride = self.size * accelerator.num_processes
        self.next = first_step * args.gradient_accumulation_steps * self.stride + accelerator.process_index * self.size
        self.thread = ThreadPoolExecutor(1)
        self.ahead = self.thread.submit(self._fetch, self.next)

    def _fetch(self, start):
        positions = list(range(start, start + self.size))
        return positions, self.source.fetch(positions), self.source.state()

    def peek(self):
        """(positions, what was fetched, state of the data that leads to it)."""
        return self.ahead.result()

    def take(self):
        current = self.peek()
        self.next += self.stride
        self.ahead = self.thread.submit(self._fetch, self.next)
        return current


def drop_conditions(conditions, blank, args, positions):
    """Replace a share of the conditions by the empty one, for classifier-free guidance."""
    if not args.proportion_empty_prompts:
        return conditions
    draws = [float(torch.rand(1, generator=generator_for(args.seed + 1, p, "picture"))) for p in positions]
    drop = torch.tensor([d < args.proportion_empty_prompts for d in draws])
    return {
        k: torch.where(drop.reshape(-1, *[1] * (v.ndim - 1)).to(v.device), blank[k].to(v), v)
        for k, v in conditions.items()
    }


def noised(latents, process, seed, positions):
    """(noisy latents, target, timestep numbers); a sample's noise belongs to its position."""
    generators = [generator_for(seed, p, "noise") for p in positions]
    noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(latents)
    index = torch.cat([process.draw(1, g) for g in generators])
    return process.add_noise(latents, noise, index), process.target(latents, noise, index), index
