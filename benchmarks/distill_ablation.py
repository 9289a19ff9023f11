"""What each part of the distillation is worth: the emoji pipeline, pruned until it looks broken, brought back in several ways.

    python benchmarks/distill_ablation.py --output ablation                 # 5 ways x 3 seeds; a run that is done is kept
    python benchmarks/distill_ablation.py --output ablation --report        # the tables and the picture of what is done

Every run is `training/distill.py --config distill_emoji` with other weights of the loss, and as many steps. It is judged on prompts and
seeds that no run was trained on: by the distance to the original's final latents and pictures (same noise, RMS, relative to
the original's RMS for latents), and by the error against the original's prediction on noised latents.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml
from diffusers import DiffusionPipeline
from PIL import Image

import ld_pruner_hf
from ld_pruner_hf import NoiseProcess, PruningPlan
from ld_pruner_hf.latents import final_latents, preserved

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "training" / "recipes" / "distill_emoji.yaml"
PLAN = RECIPE.with_name("emoji_plan.json")
VARIANTS = {
    "no KD": {"output_weight": 0, "feature_weight": 0},
    "output KD": {"feature_weight": 0},
    "output + feature KD": {"feature_loss": "mse", "feature_weight": 1},
    "output + normalised feature KD": {},
    "output + normalised feature KD, weights reset": {},
}
HELD_OUT = [
    "grinning cat", "orange heart", "wolf", "hatching chick", "ship", "delivery truck", "peanuts", "cut of meat",
    "sun with face", "glass of milk", "hibiscus", "confused face", "pouting cat", "baseball", "racing car", "bell pepper",
]  # fmt: skip
SHOWN = ["red heart", "cat face", "pizza", "grinning face", "rocket", "evergreen tree", "crescent moon", "blue car"]
STEPS, GUIDANCE, FIRST_SEED = 10, 3.0, 1000


# ---- training --------------------------------------------------------------------------------------------------------


def pruned_pipeline(reset_seed=None):
    """The pipeline as the recipe prunes it; with `reset_seed`, its denoiser has new random weights."""
    pipe = ld_pruner_hf.demo.load("emoji")
    pipe.prune(PruningPlan.load(PLAN))
    if reset_seed is not None:
        torch.manual_seed(reset_seed)
        pipe.unet = type(pipe.unet).from_config(pipe.unet.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(args, variant, seed):
    """Train one student, unless that is done."""
    folder = folder_of(args, variant, seed)
    if (folder / "model_index.json").is_file():
        return
    config = yaml.safe_load(RECIPE.read_text())
    config |= {"plan": str(PLAN), "data_free_prompts": str(RECIPE.with_name("emoji_prompts.txt"))}
    config |= {"max_train_steps": args.steps, "seed": seed, "cache_dir": str(args.output), "validation_steps": None}
    config |= {"mixed_precision": args.mixed_precision, "checkpointing_steps": 40, **VARIANTS[variant]}
    if "reset" in variant:
        reset = args.output / f"reset-{seed}"
        pruned_pipeline(reset_seed=seed).save_pretrained(reset)
        config |= {"plan": None, "student": str(reset)}
    folder.mkdir(exist_ok=True)
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, ROOT / "training" / "distill.py", "--config", file, "--output_dir", folder]
    command += ["--resume_from_checkpoint", "latest"]
    subprocess.run([str(x) for x in command], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def folder_of(args, variant, seed):
    return args.output / f"{variant.replace(' ', '_').replace(',', '')}-{seed}"


# ---- judging ---------------------------------------------------------------------------------------------------------


def draw(pipe, prompts, first_seed):
    """(final latents, pictures in [0, 1]), the same noise for every pipeline."""
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": prompts, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    with preserved(pipe):
        latents = final_latents(pipe, call, [first_seed + i for i in range(len(prompts))])
        pictures = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
    return latents, (pictures / 2 + 0.5).clamp(0, 1)


@torch.no_grad()
def predictions(pipe, latents, prompts):
    """The denoiser's predictions on the noised latents, at ten evenly spaced timesteps."""
    process = NoiseProcess.of(pipe.scheduler)
    text = pipe.encode_prompt(prompts, "cpu", 1, False)[0]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(FIRST_SEED))
    found = []
    for t in range(50, 1000, 100):
        index = torch.full((len(latents),), t)
        found.append(pipe.unet(process.add_noise(latents, noise, index), process.timesteps[index], text).sample)
    return torch.stack(found)


class Judge:
    """Distances of a pipeline to the original."""

    def __init__(self):
        self.original = ld_pruner_hf.demo.load("emoji")
        self.latents, self.pictures = draw(self.original, HELD_OUT, FIRST_SEED)
        self.predictions = predictions(self.original, self.latents, HELD_OUT)

    def __call__(self, pipe):
        latents, pictures = draw(pipe, HELD_OUT, FIRST_SEED)
        error = predictions(pipe, self.latents, HELD_OUT) - self.predictions
        return {
            "latents": float((latents - self.latents).square().mean().sqrt() / self.latents.square().mean().sqrt()),
            "pictures": float((pictures - self.pictures).square().mean().sqrt()),
            "output error": float(error.square().mean()),
        }


def judged(args, name, make, judge):
    """The distances of `make()`, computed once."""
    file = args.output / f"{name}.json"
    if not file.is_file():
        file.write_text(json.dumps(judge(make())))
    return json.loads(file.read_text())


def report(args):
    """Print the table of what is done, and draw the picture."""
    judge = Judge()
    rows = {"pruned, not trained": [judged(args, "pruned", pruned_pipeline, judge)]}
    for variant in VARIANTS:
        done = [f for s in args.seeds if ((f := folder_of(args, variant, s)) / "model_index.json").is_file()]
        rows[variant] = [
            judged(args, f.name, lambda f=f: DiffusionPipeline.from_pretrained(f), judge) | {"minutes": minutes(f)}
            for f in done
        ]
    columns = ["latents", "pictures", "output error", "minutes"]
    print("| training | runs | " + " | ".join(columns) + " |\n|---|---|" + "---|" * len(columns))
    for name, found in rows.items():
        cells = [mean_and_range([r[c] for r in found if c in r]) for c in columns]
        print(f"| {name} | {len(found)} | " + " | ".join(cells) + " |")
    best = folder_of(args, "output + feature KD", args.seeds[0])
    if best.is_dir():
        grid(args.output / "distill.png", [judge.original, pruned_pipeline(), DiffusionPipeline.from_pretrained(best)])


def minutes(folder):
    """Time of all steps of a run, from its log."""
    with open(folder / "log.csv", newline="") as file:
        return sum(16 / float(row["images_per_s"]) for row in csv.DictReader(file)) / 60


def mean_and_range(values):
    if not values:
        return "-"
    spread = f" ({min(values):.3f}-{max(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def grid(file, pipes):
    """A row a pipeline: original, pruned, distilled; the same noise in a column."""
    rows = [draw(pipe, SHOWN, FIRST_SEED)[1] for pipe in pipes]
    side = rows[0].shape[-1]
    picture = Image.new("RGB", (side * len(SHOWN), side * len(rows)))
    for y, row in enumerate(rows):
        for x, pixels in enumerate(row):
            array = (pixels.permute(1, 2, 0) * 255).round().byte().numpy()
            picture.paste(Image.fromarray(array), (x * side, y * side))
    picture.save(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("ablation"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="train only these"
    )
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if not args.report:
        for seed in args.seeds:
            for variant in args.variants:
                start = time.monotonic()
                run(args, variant, seed)
                print(f"{variant}, seed {seed}: {time.monotonic() - start:.0f} s", flush=True)
    if args.report or args.variants == list(VARIANTS):
        report(args)


if __name__ == "__main__":
    main()
