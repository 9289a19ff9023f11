#!/usr/bin/env python
"""Train the small feature extractors that `ld_pruner_hf.evaluation` ships, and print what their model card says.

    python training/train_extractors.py images --clothing clothing.parquet --emoji emoji.parquet --output_dir out
    python training/train_extractors.py audio --recordings recordings.tar --output_dir out

Images: classes of garments and of emoji, and matching pictures to their captions. Audio: spoken digits. What the tests of
both are made of is held out by rule, not by chance: the clothing data set's own test split, every tenth emoji by name,
and recordings 0 to 4 of each speaker and digit (the data set's own rule).
"""

import argparse
import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from scipy.io import wavfile
from tqdm import tqdm

from ld_pruner_hf.evaluation.nets import IMAGE_SIZE, SAMPLE_RATE, AudioNet, ImageTextNet

NO_CLASS = -100  # F.cross_entropy leaves these out


def load_images(rows):
    """(N, 3, 64, 64) in -1 ... 1."""
    pictures = [Image.open(io.BytesIO(row["bytes"])).convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE)) for row in rows]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def image_data(clothing_file, emoji_file):
    """Pictures, captions, class ids, held-out flags, and the names of the classes."""
    clothing, emoji = pd.read_parquet(clothing_file), pd.read_parquet(emoji_file)
    emoji = emoji[~emoji["skin_tone"]].sort_values("caption").reset_index(drop=True)
    garment = clothing["caption"].str.removeprefix("a photo of ").str.removeprefix("a ")
    categories = emoji["category"].where(emoji["category"].map(emoji["category"].value_counts()) >= 20, "")
    classes = sorted(set(garment)) + sorted(set(categories) - {""})
    names = pd.concat([garment, categories]).tolist()
    return {
        "images": load_images([*clothing["image"], *emoji["image"]]),
        "captions": [*clothing["caption"], *emoji["caption"]],
        "labels": torch.tensor([classes.index(name) if name else NO_CLASS for name in names]),
        "held_out": torch.tensor([*(clothing["orig_split"] == "test"), *(emoji.index % 10 == 0)]),
        "emoji": torch.tensor([False] * len(clothing) + [True] * len(emoji)),
    }, classes


def augment_images(x, generator):
    """Mirror, move and scale (up to a fifth), change brightness and contrast. No noise and no blur: FID must see those."""
    b = len(x)
    uniform = torch.rand(6, b, generator=generator) * 2 - 1
    zoom, angle = 1 - 0.2 * uniform[0].abs(), 0.15 * uniform[1]
    mirror = torch.where(uniform[2] < 0, -1.0, 1.0)
    rows = [
        torch.stack([mirror * zoom * angle.cos(), -zoom * angle.sin(), 0.15 * uniform[3]], -1),
        torch.stack([mirror * zoom * angle.sin(), zoom * angle.cos(), 0.15 * uniform[4]], -1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    return (x * (1 + 0.2 * uniform[5])[:, None, None, None]).clamp(-1, 1)


def audio_data(recordings):
    """Waveforms of one second, digits and held-out flags."""
    waves, digits, held_out = [], [], []
    with tarfile.open(recordings) as tar:
        for member in sorted((m for m in tar if m.name.endswith(".wav")), key=lambda m: m.name):
            digit, _, index = Path(member.name).stem.split("_")
            rate, wave = wavfile.read(io.BytesIO(tar.extractfile(member).read()))
            if rate != SAMPLE_RATE:
                raise ValueError(f"{member.name}: got {rate} Hz, expected {SAMPLE_RATE}")
            wave = wave[:SAMPLE_RATE].astype(np.float32) / 32768
            waves.append(np.pad(wave, (0, SAMPLE_RATE - len(wave))))
            digits.append(int(digit))
            held_out.append(int(index) < 5)
    return torch.from_numpy(np.stack(waves)), torch.tensor(digits), torch.tensor(held_out)


def augment_mels(x, generator):
    """Move in time by up to 12 frames (the padding is silence)."""
    shift = torch.randint(-12, 13, (len(x),), generator=generator).tolist()
    moved = torch.full_like(x, -1.0)
    for i, s in enumerate(shift):
        moved[i, ..., max(s, 0) : x.shape[-1] + min(s, 0)] = x[i, ..., max(-s, 0) : x.shape[-1] - max(s, 0)]
    return moved


def train(model, loss_fn, indices, args):
    """AdamW with one cycle of the learning rate, `args.epochs` times over `indices` in shuffled batches."""
    generator = torch.Generator().manual_seed(args.seed)
    steps = args.epochs * (len(indices) // args.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps)
    model.to(memory_format=torch.channels_last).train()
    with tqdm(total=steps, desc="training") as bar:
        for _ in range(args.epochs):
            shuffled = indices[torch.randperm(len(indices), generator=generator)]
            for batch in shuffled[: len(indices) // args.batch_size * args.batch_size].split(args.batch_size):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16, enabled=args.mixed_precision == "bf16"):
                    loss = loss_fn(batch, generator)
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def accuracy(predicted, labels):
    kept = labels != NO_CLASS
    return round((predicted[kept] == labels[kept]).float().mean().item(), 4)


@torch.no_grad()
def in_batches(fn, x):
    return torch.cat([fn(part) for part in x.split(128)])


def train_images(args):
    data, classes = image_data(args.clothing, args.emoji)
    images, labels, held_out = data["images"], data["labels"], data["held_out"]
    # Texts of the same caption are one positive: all 928 photos of a t-shirt share theirs.
    caption_ids = torch.tensor(pd.factorize(pd.Series(data["captions"]))[0])
    model = ImageTextNet(len(classes))

    def loss_fn(batch, generator):
        features, logits = model.image(augment_images(images[batch], generator))
        pictures = F.normalize(model.image_projection(features), dim=-1)
        texts = model.embed_texts([data["captions"][i] for i in batch.tolist()])
        similar = model.logit_scale.exp() * pictures @ texts.T
        same = (caption_ids[batch][:, None] == caption_ids[batch]).float()
        target = same / same.sum(1, keepdim=True)
        contrast = F.cross_entropy(similar, target) + F.cross_entropy(similar.T, target)
        return F.cross_entropy(logits, labels[batch], label_smoothing=0.1) + 0.5 * contrast

    train(model, loss_fn, torch.nonzero(~held_out).flatten(), args)
    predicted = in_batches(lambda x: model.image(x)[1].argmax(-1), images)
    embedded = in_batches(model.embed_images, images)
    emoji = data["emoji"]
    summary = {"classes": classes, "parameters": sum(p.numel() for p in model.parameters())}
    for name, part in (("clothing", ~emoji), ("emoji", emoji)):
        summary[f"test_accuracy_{name}"] = accuracy(predicted[part & held_out], labels[part & held_out])
    with torch.no_grad():
        texts = model.embed_texts([c for c, e in zip(data["captions"], emoji.tolist(), strict=True) if e])
    ranks = embedded[emoji] @ texts.T
    top = ranks.topk(10, dim=-1).indices == torch.arange(len(ranks))[:, None]
    for name, part in (("training", ~held_out[emoji]), ("test", held_out[emoji])):
        summary[f"emoji_name_among_10_of_{len(ranks)}_{name}"] = round(top[part].any(-1).float().mean().item(), 4)
    summary["test_pictures"] = {"clothing": int((~emoji & held_out).sum()), "emoji": int((emoji & held_out).sum())}
    return model, summary


def train_audio(args):
    waves, digits, held_out = audio_data(args.recordings)
    model = AudioNet(10)
    with torch.no_grad():
        mels = in_batches(model.mel, waves)

    def loss_fn(batch, generator):
        return F.cross_entropy(model.net(augment_mels(mels[batch], generator))[1], digits[batch], label_smoothing=0.1)

    train(model, loss_fn, torch.nonzero(~held_out).flatten(), args)
    predicted = in_batches(lambda x: model.net(x)[1].argmax(-1), mels[held_out])
    return model, {
        "classes": [str(i) for i in range(10)],
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_accuracy_digits": accuracy(predicted, digits[held_out]),
        "test_recordings": int(held_out.sum()),
    }


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="which", required=True)
    images, audio = commands.add_parser("images"), commands.add_parser("audio")
    images.add_argument("--clothing", type=Path, required=True, help="parquet: image, caption, orig_split")
    images.add_argument("--emoji", type=Path, required=True, help="parquet: image, caption, category, skin_tone")
    audio.add_argument("--recordings", type=Path, required=True, help="tar of <digit>_<speaker>_<index>.wav, 8 kHz")
    for sub, epochs in ((images, 18), (audio, 20)):
        sub.add_argument("--output_dir", type=Path, required=True)
        sub.add_argument("--epochs", type=int, default=epochs)
        sub.add_argument("--batch_size", type=int, default=64)
        sub.add_argument("--learning_rate", type=float, default=4e-3)
        sub.add_argument("--mixed_precision", choices=["no", "bf16"], default="bf16")
        sub.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    model, summary = (train_images if args.which == "images" else train_audio)(args)
    summary |= {"epochs": args.epochs, "minutes": round((time.monotonic() - start) / 60, 1)}
    tensors = {name: t.half().contiguous() for name, t in model.state_dict().items() if t.is_floating_point()}
    metadata = {"classes": json.dumps(summary["classes"])}
    save_file(tensors, args.output_dir / f"{args.which}.safetensors", metadata=metadata)
    (args.output_dir / f"{args.which}.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
