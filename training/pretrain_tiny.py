"""Train a small latent diffusion pipeline from scratch, on a CPU, in hours: the pipelines that ship with ld_pruner_hf.

    python training/pretrain_tiny.py --recipe training/recipes/pretrain_emoji.yaml --train_data train.parquet --output_dir out

Two stages, each resumable (run the same command again): an autoencoder, then the denoiser in its latent space.
Every batch is drawn from a generator seeded by (seed, step) alone, so a resumed run sees what an unbroken one would.
"""

import argparse
import copy
import io
import json
import os
import shutil
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import yaml
from diffusers import (
    AudioDiffusionPipeline,
    AutoencoderKL,
    DDIMScheduler,
    LDMPipeline,
    Mel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.training_utils import EMAModel, compute_snr
from PIL import Image
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ld_pruner_hf import demo

# ---- data ----------------------------------------------------------------------------------------------------------


def load_rows(path, recipe, columns=("image",)):
    """The data set's rows that the recipe uses, with a column `weight`: how often a row is drawn.

    Raises:
        ValueError: one of `columns` is missing, or no row is left.
    """
    rows = pd.read_parquet(path)
    missing = set(columns) - set(rows.columns)
    if missing:
        raise ValueError(f"{path}: no column {sorted(missing)}; it has {list(rows.columns)}")
    if recipe.get("skip_column"):
        rows = rows[~rows[recipe["skip_column"]].astype(bool)].reset_index(drop=True)
    for column, kept in recipe.get("keep", {}).items():
        if column not in rows:
            raise ValueError(
                f"{path}: no column {column!r}, which the recipe keeps {kept} of; it has {list(rows.columns)}"
            )
        rows = rows[rows[column].isin(kept)].reset_index(drop=True)
    if rows.empty:
        raise ValueError(f"{path}: no rows are left to train on")
    weights = recipe.get("category_weights", {})
    rows["weight"] = [weights.get(c, 1.0) for c in rows.get("category", pd.Series([""] * len(rows)))]
    if "caption" in columns:
        rows.loc[rows["caption"].str.count(" ") > 1, "weight"] *= recipe.get("long_name_weight", 1.0)
        rows.loc[rows["caption"].isin(recipe.get("favourites", [])), "weight"] = recipe.get("favourite_weight", 1.0)
    return rows


def load_images(rows, resolution, mode="RGB"):
    """Pixels in [-1, 1], (N, C, resolution, resolution); C is 3 for mode "RGB", 1 for "L"."""
    images = torch.empty(len(rows), len(mode), resolution, resolution)
    for i, cell in enumerate(rows["image"]):
        image = Image.open(io.BytesIO(cell["bytes"])).convert(mode).resize((resolution, resolution), Image.LANCZOS)
        pixels = torch.from_numpy(np.array(image)).view(resolution, resolution, len(mode))
        images[i] = pixels.permute(2, 0, 1) / 127.5 - 1
    return images


def plainest(images, count):
    """Indices of the `count` images whose borders, 4 pixels wide, vary least: objects on a plain ground."""
    border = torch.ones(images.shape[-2:], dtype=torch.bool)
    border[4:-4, 4:-4] = False
    return images[:, :, border].std(dim=2).mean(dim=1).argsort()[:count]


def spread(images, count=1024):
    """About `count` of the images, evenly from the first to the last."""
    return images[:: max(1, len(images) // count)]


def step_generator(seed, step):
    """The random numbers of one training step, whichever run it happens in."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


# ---- a run that can be broken off ----------------------------------------------------------------------------------


class Checkpoint:
    """Named tensors and the step they belong to, in one folder that is always whole (written aside, then moved)."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def save(self, tensors, **state):
        aside = self.folder.with_name(self.folder.name + ".new")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_file({k: v.detach().contiguous() for k, v in tensors.items()}, aside / "state.safetensors")
        (aside / "state.json").write_text(json.dumps(state))
        if self.folder.exists():
            old = self.folder.with_name(self.folder.name + ".old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.folder, old)
        os.replace(aside, self.folder)
        shutil.rmtree(self.folder.with_name(self.folder.name + ".old"), ignore_errors=True)

    def load(self):
        """(tensors, state), or None before the first save."""
        old = self.folder.with_name(self.folder.name + ".old")
        folder = self.folder if self.folder.exists() else old
        if not folder.exists():
            return None
        return load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text())


class TrainState:
    """Models, AdamW and their moving average, as named tensors that a checkpoint can hold."""

    def __init__(self, models, learning_rate, ema_decay):
        self.models = models
        self.parameters = {f"{m}.{n}": p for m, model in models.items() for n, p in model.named_parameters()}
        params = list(self.parameters.values())
        self.optimizer = torch.optim.AdamW(params, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        self.ema = EMAModel(params, decay=ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
        self.step, self.minutes = 0, 0.0

    def save(self, checkpoint):
        tensors = {}
        for (name, p), shadow in zip(self.parameters.items(), self.ema.shadow_params, strict=True):
            tensors |= {f"model.{name}": p, f"ema.{name}": shadow}
            tensors |= {f"optimizer.{name}.{k}": v for k, v in self.optimizer.state[p].items()}
        checkpoint.save(tensors, step=self.step, minutes=self.minutes)

    @torch.no_grad()
    def restore(self, checkpoint):
        """Go on where the checkpoint stands; from the start, if there is none."""
        if (found := checkpoint.load()) is None:
            return
        tensors, state = found
        for (name, p), shadow in zip(self.parameters.items(), self.ema.shadow_params, strict=True):
            p.copy_(tensors[f"model.{name}"])
            shadow.copy_(tensors[f"ema.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            self.optimizer.state[p] = {k: tensors[f"optimizer.{name}.{k}"] for k in keys}
        self.step, self.minutes = state["step"], state["minutes"]
        self.ema.optimization_step = self.step

    def update(self, loss, learning_rate):
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.step(self.parameters.values())
        self.step += 1

    def averaged(self):
        """Copies of the models with the averaged weights, in eval mode."""
        copies = {m: copy.deepcopy(model).eval() for m, model in self.models.items()}
        self.ema.copy_to([p for m in copies.values() for p in m.parameters()])
        return copies


def train(models, loss_fn, *, out, seed, config, max_minutes, checkpoint_minutes, on_checkpoint=None):
    """The loop of both stages: AdamW, warm-up, cosine to zero, EMA, checkpoints. Returns the EMA models and a summary.

    Args:
        models: name -> module, trained together.
        loss_fn: (step, generator) -> scalar loss.
        max_minutes: stop there if the steps are not done by then; the learning rate follows whichever is nearer.
        on_checkpoint: called with {name: EMA module} and the step after each checkpoint.
    """
    state = TrainState(models, config["learning_rate"], config.get("ema_decay", 0.999))
    checkpoint = Checkpoint(out / "checkpoint")
    state.restore(checkpoint)

    def save():
        state.save(checkpoint)
        if on_checkpoint:
            on_checkpoint(state.averaged(), state.step)

    total, warmup = config["max_train_steps"], config.get("warmup_steps", 100)
    last, saved, smooth = time.monotonic(), state.minutes, None
    bar = tqdm(total=total, initial=state.step, desc=out.name, dynamic_ncols=True)
    while state.step < total and state.minutes < max_minutes:
        progress = min(max(state.step / total, state.minutes / max_minutes), 1.0)
        lr = config["learning_rate"] * min((state.step + 1) / warmup, 1.0) * 0.5 * (1 + np.cos(np.pi * progress))
        loss = loss_fn(state.step, step_generator(seed, state.step))
        state.update(loss, lr)
        smooth = loss.item() if smooth is None else 0.98 * smooth + 0.02 * loss.item()
        state.minutes, last = state.minutes + (time.monotonic() - last) / 60, time.monotonic()
        bar.update()
        bar.set_postfix(loss=f"{smooth:.4f}", lr=f"{lr:.1e}", minutes=f"{state.minutes:.0f}")
        if state.step % 50 == 0:
            row = {"step": state.step, "loss": smooth, "lr": lr, "minutes": state.minutes}
            with open(out / "train_log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
        if state.minutes - saved >= checkpoint_minutes:
            saved = state.minutes
            save()
            last = time.monotonic()
    save()
    bar.close()
    return state.averaged(), {"steps": state.step, "minutes": round(state.minutes, 1), "final_loss": smooth}


# ---- stage 1: autoencoder --------------------------------------------------------------------------------------------


@torch.no_grad()
def whiten_(vae, images, batch_size=64):
    """Scale and shift the latents to mean 0, variance 1 per channel, inside the VAE's own 1x1 quant convolutions.

    What the VAE reconstructs does not change, and `scaling_factor` becomes 1.
    """
    latents = torch.cat([vae.encode(x).latent_dist.mean for x in images.split(batch_size)])
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    c = len(mean)
    post = vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ mean
    post.weight *= std[None, :, None, None]
    quant = vae.quant_conv
    quant.weight[:c] /= std[:, None, None, None]
    quant.bias[:c] = (quant.bias[:c] - mean) / std
    quant.bias[c:] -= 2 * std.log()
    vae.register_to_config(scaling_factor=1.0)


def build_autoencoder(recipe):
    config = recipe["autoencoder"]
    if "init_from" in config:
        return AutoencoderKL.from_pretrained(demo.path(config["init_from"]), subfolder="vae", dtype=torch.float32)
    return AutoencoderKL(sample_size=recipe["resolution"], **config["config"])


def train_autoencoder(recipe, images, probabilities, out, limits, bf16):
    config = recipe["autoencoder"]
    batch = config.get("train_batch_size", recipe["train_batch_size"])
    vae = build_autoencoder(recipe).train()

    def loss_fn(step, generator):
        x = images[torch.multinomial(probabilities, batch, replacement=True, generator=generator)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            y = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        return F.l1_loss(y, x) + F.mse_loss(y, x) + config["kl_weight"] * posterior.kl().mean()

    averaged, summary = train({"vae": vae}, loss_fn, out=out, seed=recipe["seed"], config=config, **limits)
    vae = averaged["vae"]
    sample = spread(images)
    whiten_(vae, sample)
    with torch.no_grad():
        error = [
            F.mse_loss(vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1), x) for x in sample.split(64)
        ]
    summary["psnr_db"] = round(float(10 * torch.log10(4 / torch.stack(error).mean())), 2)
    vae.save_pretrained(out / "vae")
    (out / "summary.json").write_text(json.dumps(summary, indent=2))
    return vae


# ---- the three tasks -------------------------------------------------------------------------------------------------


class TextToImage:
    """Pictures from captions: Stable Diffusion."""

    pipeline_class = StableDiffusionPipeline
    load_options: ClassVar = {"safety_checker": None}
    autoencoder = "vae"
    mode = "RGB"
    columns = ("image", "caption")

    def __init__(self, recipe, rows):
        self.recipe = recipe
        self.captions = rows["caption"].tolist()
        self.keywords = [list(k) for k in rows.get("keywords", [[]] * len(rows))]

    def build(self, vae, folder):
        """A pipeline with an untrained U-Net and text encoder; what must outlive a broken run is kept in `folder`."""
        config = self.recipe["diffusion"]
        if not (folder / "tokenizer").exists():  # training one twice may number equally frequent pairs differently
            train_tokenizer(self.captions, config).save_pretrained(folder / "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer), bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, **config["text_encoder"],
        )  # fmt: skip
        latent_channels = vae.config.latent_channels
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text_config),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(in_channels=latent_channels, out_channels=latent_channels, **config["unet"]),
            scheduler=DDIMScheduler(**config["scheduler"]),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def with_models(self, pipe, models):
        return StableDiffusionPipeline(**{**pipe.components, **models}, requires_safety_checker=False)

    def models(self, pipe):
        """What trains, by the names of the pipeline's components."""
        return {"unet": pipe.unet, "text_encoder": pipe.text_encoder}

    def conditions(self, pipe, index, generator):
        """The denoiser's arguments for these rows, apart from noisy latents and timesteps."""
        uniform = torch.rand(len(index), 3, generator=generator).tolist()
        ids = pipe.tokenizer(
            [self._caption(i, u) for i, u in zip(index.tolist(), uniform, strict=True)],
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return {"encoder_hidden_states": pipe.text_encoder(ids)[0]}

    def _caption(self, i, u):
        if u[0] < self.recipe["caption_dropout"]:
            return ""
        if self.keywords[i] and u[1] < self.recipe["keyword_probability"]:
            return self.keywords[i][int(u[2] * len(self.keywords[i]))]
        return self.captions[i]

    def draw(self, pipe, validation):
        """One picture a validation prompt, the i-th from seed i."""
        prompts = validation["prompts"]
        return pipe(
            prompts,
            num_inference_steps=validation["num_inference_steps"],
            guidance_scale=validation["guidance_scale"],
            generator=seeded(len(prompts)),
        ).images


class UnconditionalImage:
    """Pictures from noise alone: latent diffusion (LDM)."""

    pipeline_class = LDMPipeline
    load_options: ClassVar = {}
    autoencoder = "vqvae"
    mode = "RGB"
    columns = ("image",)

    def __init__(self, recipe, rows):
        self.recipe = recipe

    def build(self, vae, folder):
        """A pipeline with an untrained U-Net."""
        config = self.recipe["diffusion"]
        latent_channels = vae.config.latent_channels
        return self.pipeline_class(
            vqvae=vae,
            unet=UNet2DModel(in_channels=latent_channels, out_channels=latent_channels, **config["unet"]),
            scheduler=DDIMScheduler(**config["scheduler"]),
            **self.other_components(),
        )

    def other_components(self):
        return {}

    def with_models(self, pipe, models):
        return self.pipeline_class(**{**pipe.components, **models})

    def models(self, pipe):
        return {"unet": pipe.unet}

    def conditions(self, pipe, index, generator):
        return {}

    def draw(self, pipe, validation):
        """Pictures from the seeds 0, 1, ..."""
        count, steps = validation["samples"], validation["num_inference_steps"]
        return pipe(batch_size=count, generator=seeded(count), num_inference_steps=steps).images


class UnconditionalAudio(UnconditionalImage):
    """Sound from noise alone: log-mel spectrograms, drawn as grey pictures."""

    pipeline_class = AudioDiffusionPipeline
    mode = "L"

    def other_components(self):
        return {"mel": Mel(**self.recipe["mel"])}

    def draw(self, pipe, validation):
        """Spectrograms from the seeds 0, 1, ..."""
        count, steps = validation["samples"], validation["num_inference_steps"]
        return pipe(batch_size=count, generator=seeded(count), steps=steps).images


TASKS = {
    "text-to-image": TextToImage,
    "unconditional-image": UnconditionalImage,
    "unconditional-audio": UnconditionalAudio,
}


def task_of(recipe, path):
    """The class of the recipe's task."""
    if recipe.get("task") not in TASKS:
        raise ValueError(f"{path}: task: got {recipe.get('task')!r}, expected one of {list(TASKS)}")
    return TASKS[recipe["task"]]


def train_tokenizer(captions, config):
    """A CLIP tokenizer (byte-pair encoding, lower case) whose vocabulary comes from the captions."""
    blank = CLIPTokenizer(model_max_length=config["text_encoder"]["max_position_embeddings"])
    return blank.train_new_from_iterator(captions, vocab_size=config["tokenizer_vocab_size"])


def seeded(count):
    """A generator a sample, with the seeds 0 to count - 1."""
    return [torch.Generator().manual_seed(i) for i in range(count)]


def sheet(pictures, columns=8):
    """One picture of all, eight in a row."""
    w, h = pictures[0].size
    whole = Image.new("RGB", (columns * w, -(-len(pictures) // columns) * h), "white")
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i % columns * w, i // columns * h))
    return whole


# ---- stage 2: denoiser -----------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(vae, images, bf16):
    """The images' latents, (N, C, h, w) float32: means, for a channel that the decoder ignores would be loud noise else."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        latents = [vae.encode(x).latent_dist.mean for x in tqdm(images.split(64), desc="latents")]
    return torch.cat(latents).float()


def train_denoiser(task, pipe, images, probabilities, out, limits, compile_unet, bf16):
    recipe = task.recipe
    config, batch = recipe["diffusion"], recipe["train_batch_size"]
    encoded = encode(getattr(pipe, task.autoencoder), images, bf16)
    models = {name: model.train() for name, model in task.models(pipe).items()}
    scheduler, forward = pipe.scheduler, torch.compile(pipe.unet) if compile_unet else pipe.unet

    def loss_fn(step, generator):
        index = torch.multinomial(probabilities, batch, replacement=True, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            conditions = task.conditions(pipe, index, generator)
        latents = encoded[index]
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (batch,), generator=generator)
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            prediction = forward(noisy, timesteps, **conditions, return_dict=False)[0].float()
        snr = compute_snr(scheduler, timesteps)
        # Min-SNR (2303.09556) with SNR + 1 for SNR: in terms of x_0, weights from 1 at pure noise up to gamma. Noisy steps
        # decide a picture's shape, and the first of them starts from no signal at all (zero terminal SNR).
        weight = (snr + 1).clamp(max=config["snr_gamma"]) / (snr + 1)
        return ((prediction - target).pow(2).mean(dim=(1, 2, 3)) * weight).mean()

    def on_checkpoint(averaged, step):
        averaged_pipe = task.with_models(pipe, averaged)
        averaged_pipe.set_progress_bar_config(disable=True)
        sheet(task.draw(averaged_pipe, recipe["validation"])).save(out / f"samples_{step:06d}.png")

    averaged, summary = train(
        models, loss_fn, out=out, seed=recipe["seed"] + 1, config=config, on_checkpoint=on_checkpoint, **limits
    )
    (out / "summary.json").write_text(json.dumps(summary, indent=2))
    return task.with_models(pipe, averaged)


# ---- command line ----------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, help="a YAML file of training/recipes")
    parser.add_argument(
        "--train_data", type=Path, required=True, help="parquet file with a column image (and caption)"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--init_from", type=Path, help="a pipeline folder to start from (skips the autoencoder stage)")
    parser.add_argument("--max_train_steps", type=int, help="of each stage; default: the recipe's")
    parser.add_argument("--max_minutes", type=float, default=float("inf"), help="of each stage, wall clock")
    parser.add_argument("--checkpoint_minutes", type=float, default=15.0)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the denoiser: minutes first, faster then"
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    recipe = yaml.safe_load(args.recipe.read_text())
    if args.max_train_steps is not None:
        for stage in ("autoencoder", "diffusion"):
            recipe[stage]["max_train_steps"] = args.max_train_steps
    limits = {"max_minutes": args.max_minutes, "checkpoint_minutes": args.checkpoint_minutes}
    bf16 = args.mixed_precision == "bf16"
    torch.manual_seed(recipe["seed"])
    task_class = task_of(recipe, args.recipe)
    if args.init_from and not (args.init_from / "model_index.json").is_file():
        raise ValueError(
            f"--init_from: {args.init_from} is no pipeline's folder; expected one with a model_index.json"
        )
    rows = load_rows(args.train_data, recipe, task_class.columns)
    images = load_images(rows, recipe["resolution"], task_class.mode)
    if "plainest" in recipe:
        kept = plainest(images, recipe["plainest"])
        images, rows = images[kept], rows.iloc[kept].reset_index(drop=True)
    if recipe.get("random_flip"):
        images, rows = torch.cat([images, images.flip(-1)]), pd.concat([rows, rows], ignore_index=True)
    probabilities = torch.tensor(rows["weight"].to_numpy(), dtype=torch.float32)
    print(
        f"{len(images)} images from {args.train_data}{', half of them flipped' if recipe.get('random_flip') else ''}"
    )
    task = task_class(recipe, rows)
    for stage in ("autoencoder", "denoiser"):
        (args.output_dir / stage).mkdir(parents=True, exist_ok=True)

    if args.init_from:
        pipe = task.pipeline_class.from_pretrained(args.init_from, **task.load_options)
    else:
        folder = args.output_dir / "autoencoder" / "vae"
        if folder.exists():
            vae = AutoencoderKL.from_pretrained(folder)
        else:
            vae = train_autoencoder(recipe, images, probabilities, args.output_dir / "autoencoder", limits, bf16)
        pipe = task.build(vae.requires_grad_(False), args.output_dir)
    getattr(pipe, task.autoencoder).eval()
    out = args.output_dir / "denoiser"
    pipe = train_denoiser(task, pipe, images, probabilities, out, limits, args.compile, bf16)
    pipe.save_pretrained(args.output_dir / "pipeline", safe_serialization=True)
    print(f"saved {args.output_dir / 'pipeline'}; samples in {out}")


if __name__ == "__main__":
    main()
