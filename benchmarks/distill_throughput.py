"""Time of a training step and peak memory of our distillation loop against a straightforward one.

    python benchmarks/distill_throughput.py --mixed_precision bf16                         # the emoji pipeline
    python benchmarks/distill_throughput.py --mixed_precision bf16 --model sd --batch_size 2
        # Stable Diffusion's U-Net, autoencoder and text encoder at half width with random weights, 128x128 pixels, bk-sdm-base

The straightforward loop is what scripts of 2023 do: every step encodes the pictures with the VAE and the captions with the text
encoder, then runs the teacher and the student with hooks on all blocks. Ours is `training/distill.py`: once on the same
pictures, once with --cache_latents. Same student, batch, precision, pictures and machine. Each loop is a process of its own;
they take turns, so that other work on the machine hits all alike, and start anew several times, in another order. CPU seconds
count only the loop's own work; the table has the median of the starts.
"""

import argparse
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "training"))

import distill  # noqa: E402
from sources import Batches  # noqa: E402

import ld_pruner_hf  # noqa: E402
from ld_pruner_hf.loading import load_pipeline  # noqa: E402

PLAN = ROOT / "training" / "recipes" / "emoji_plan.json"


# ---- data ------------------------------------------------------------------------------------------------------------


def write_sd(folder):
    """A pipeline of Stable Diffusion's proportions."""
    emoji = ld_pruner_hf.demo.load("emoji")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(emoji.tokenizer), hidden_size=384, intermediate_size=1536, num_hidden_layers=12, num_attention_heads=6,
        max_position_embeddings=emoji.tokenizer.model_max_length, projection_dim=384, eos_token_id=emoji.tokenizer.eos_token_id,
        bos_token_id=emoji.tokenizer.bos_token_id, pad_token_id=emoji.tokenizer.pad_token_id,
    )  # fmt: skip
    widths = (64, 128, 256, 256)
    StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=widths, layers_per_block=2, latent_channels=4, down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4, sample_size=128,
        ),
        unet=UNet2DConditionModel(sample_size=16, block_out_channels=(160, 320, 640, 640), cross_attention_dim=384),
        text_encoder=CLIPTextModel(text), tokenizer=emoji.tokenizer,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip


def write_pictures(folder, count, side):
    """Pictures with captions; what they show does not matter for the time."""
    generator, lines = np.random.default_rng(0), []
    for i in range(count):
        pixels = generator.integers(0, 255, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"picture number {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))


# ---- the loops -------------------------------------------------------------------------------------------------------


class Turns:
    """Called at the start of each step of a loop; after every `steps` of them it reports and waits until it is told to go on."""

    def __init__(self, steps):
        self.steps, self.count, self.began = steps, 0, None

    def __call__(self):
        if self.count % self.steps == 0:
            if self.began is not None:
                taken = {"wall": time.perf_counter() - self.began[0], "cpu": time.process_time() - self.began[1]}
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
                print(
                    "TURN", json.dumps({k: v / self.steps for k, v in taken.items()} | {"peak_mb": peak}), flush=True
                )
            else:
                print("READY", flush=True)
            if sys.stdin.readline().strip() != "go":
                raise SystemExit
            self.began = time.perf_counter(), time.process_time()
        self.count += 1


def straightforward(args, folder, turn):
    """Teacher, student, VAE and text encoder in every step, hooks on all blocks, as one would first write it."""
    half = torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32
    pipe, pruned = (load_pipeline(args.teacher, device="cpu") for _ in range(2))
    pruned.prune(args.plan)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.eval().requires_grad_(False).to(half)
    teacher, student = pipe.unet, pruned.unet.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    kept = {}

    def keep(model, path):
        def hook(_, __, output):
            kept[model, path] = output[0] if isinstance(output, tuple) else output

        return hook

    left = len(student.up_blocks)  # a student without the innermost stages (bk-sdm-tiny) has fewer
    gone = len(teacher.up_blocks) - left
    pairs = [(f"down_blocks.{i}", f"down_blocks.{i}") for i in range(left)]
    pairs += [(f"up_blocks.{gone + i}", f"up_blocks.{i}") for i in range(left)]
    for name, model in (("teacher", teacher), ("student", student)):
        for path, module in model.named_modules():
            if re.fullmatch(r"(down|up)_blocks\.\d(\.resnets\.\d)?", path):
                module.register_forward_hook(keep(name, path))
    pictures = sorted(folder.glob("*.png"))
    captions = {
        d["file_name"]: d["text"] for d in map(json.loads, (folder / "metadata.jsonl").read_text().splitlines())
    }
    alphas = pipe.scheduler.alphas_cumprod
    mse = torch.nn.functional.mse_loss
    while True:
        turn()
        chosen = [pictures[i] for i in torch.randint(0, len(pictures), (args.batch_size,))]
        pixels = torch.stack([torch.from_numpy(np.array(Image.open(p).convert("RGB"))) for p in chosen])
        pixels = (pixels.permute(0, 3, 1, 2) / 127.5 - 1).to(half)
        with torch.no_grad():
            latents = pipe.vae.encode(pixels).latent_dist.sample() * pipe.vae.config.scaling_factor
            text = pipe.encode_prompt([captions[p.name] for p in chosen], "cpu", 1, False)[0]
        t = torch.randint(0, 1000, (args.batch_size,))
        a, noise = alphas[t].reshape(-1, 1, 1, 1), torch.randn_like(latents)
        noisy, target = a.sqrt() * latents + (1 - a).sqrt() * noise, noise
        noisy = noisy.to(half)
        with torch.no_grad():
            expected = teacher(noisy, t, text).sample
        with torch.autocast("cpu", torch.bfloat16, enabled=half == torch.bfloat16):
            prediction = student(noisy, t, text).sample
        loss = mse(prediction.float(), target.float()) + mse(prediction.float(), expected.float())
        features = [(kept["teacher", t], kept["student", s]) for t, s in pairs]
        loss = loss + sum(mse(b.float(), a.float()) for a, b in features if a.shape == b.shape)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def ours(args, folder, turn, cached):
    """training/distill.py as users start it."""
    output = Path(tempfile.mkdtemp(dir=folder.parent))
    flags = [
        "--teacher",
        args.teacher,
        "--plan",
        args.plan,
        "--train_data_dir",
        folder,
        "--center_crop",
        "--learning_rate",
        1e-4,
    ]
    flags += ["--train_batch_size", args.batch_size, "--mixed_precision", args.mixed_precision, "--cache_dir", output]
    flags += ["--max_train_steps", 10**6, "--checkpointing_steps", 10**6, "--output_dir", output]
    flags += ["--cache_latents"] if cached else []
    take = Batches.take

    def take_in_turn(self):
        turn()
        return take(self)

    Batches.take = take_in_turn
    distill.main([str(f) for f in flags])


LOOPS = {
    "straightforward": straightforward,
    "ours": lambda *a: ours(*a, cached=False),
    "ours, cached latents": lambda *a: ours(*a, cached=True),
}


# ---- taking turns ----------------------------------------------------------------------------------------------------


def start(args, name, folder):
    command = [sys.executable, __file__, "--loop", name, "--folder", folder, "--batch_size", args.batch_size]
    command += ["--steps", args.steps, "--mixed_precision", args.mixed_precision]
    command += ["--teacher", args.teacher, "--plan", args.plan]
    return subprocess.Popen([str(c) for c in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def heard(process, word):
    """The rest of the next line that begins with `word`."""
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word)
    raise RuntimeError("a loop ended before its turn; its error is above")


def one_start(args, folder, order):
    """Name -> medians over the rounds of loops that start anew and take turns."""
    processes = {name: start(args, name, folder) for name in order}
    for process in processes.values():
        heard(process, "READY")
    found = {name: [] for name in order}
    for _ in range(args.rounds + 1):  # the first is warm-up
        for name, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            found[name].append(json.loads(heard(process, "TURN")))
    for process in processes.values():
        process.communicate("stop\n")
    return {n: {k: statistics.median(r[k] for r in rows[1:]) for k in rows[0]} for n, rows in found.items()}


def compare(args, folder):
    names, starts = list(LOOPS), []
    for i in range(args.starts):
        turn = i % len(names)
        starts.append(one_start(args, folder, names[turn:] + names[:turn]))
        print({name: round(m["cpu"], 3) for name, m in starts[-1].items()}, file=sys.stderr)
    print(
        "| loop | CPU s a step | s a step | speed-up in CPU time (lowest to highest start) | peak MB |\n|---|---|---|---|---|"
    )
    for name in names:
        cpu, wall, peak = (
            statistics.median(found[name][key] for found in starts) for key in ("cpu", "wall", "peak_mb")
        )
        gains = [found["straightforward"]["cpu"] / found[name]["cpu"] for found in starts]
        gain = f"{statistics.median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})"
        print(f"| {name} | {cpu:.3f} | {wall:.3f} | {gain} | {peak:.0f} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument(
        "--starts", type=int, default=3, help="how often all loops start anew: a start's speed differs by up to 10%%"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps of each loop in a round")
    parser.add_argument("--pictures", type=int, default=128)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--model", choices=["emoji", "sd"], default="emoji")
    parser.add_argument("--teacher", default="demo:emoji", help=argparse.SUPPRESS)
    parser.add_argument(
        "--plan", default=None, help="what the student lacks; by default emoji_plan.json or bk-sdm-base"
    )
    parser.add_argument("--loop", choices=list(LOOPS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.plan = args.plan or {"emoji": str(PLAN), "sd": "bk-sdm-base"}[args.model]
    if args.loop:
        return LOOPS[args.loop](args, args.folder, Turns(args.steps))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pictures"
        folder.mkdir()
        write_pictures(folder, args.pictures, side=64 if args.model == "emoji" else 128)
        if args.model == "sd":
            args.teacher = str(folder.parent / "sd")
            write_sd(args.teacher)
        compare(args, folder)


if __name__ == "__main__":
    main()
