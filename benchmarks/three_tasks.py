"""One score for three tasks: original, pruned, pruned and finetuned, and finetuned from reset weights, at the shipped pipelines' scale.

    python benchmarks/three_tasks.py --output tasks emoji=emoji.parquet clothing=clothing.parquet digits=digits.parquet

Each argument is a shipped pipeline and its data set (parquet with a column image); FID or FAD are measured against what its
recipe trains on. Everything runs through the commands that users have: `ld-pruner score`, `prune`, `distill` (data-free) and `evaluate`. What
is done is kept, so the same command goes on after an interruption. Prints the table as Markdown.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from ld_pruner_hf.evaluation.results import RESULTS_FILE, Evaluation
from ld_pruner_hf.loading import load_pipeline

TRAINING = Path(__file__).resolve().parents[1] / "training"
sys.path.insert(0, str(TRAINING))

import pretrain_tiny  # noqa: E402

RECIPES = TRAINING / "recipes"
PROMPTS = RECIPES / "emoji_prompts.txt"
SCORED = {"emoji": ["--prompt", "red heart", "cat face", "pizza", "--guidance-scale", "1", "--seeds", "2"]}
TRAINED = {"emoji": ["--data_free_prompts", PROMPTS, "--data_free_guidance", 3, "--proportion_empty_prompts", 0.1]}
JUDGED = {"emoji": ["--prompts", PROMPTS, "--guidance-scale", 3]}
METRIC = {"digits": "FAD"}


def ld_pruner(*arguments):
    command = [sys.executable, "-m", "ld_pruner_hf", *map(str, arguments)]
    print(" ".join(["ld-pruner", *command[3:]]), flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def trained_on(name, data, file):
    """The rows of the data set that the pipeline's recipe keeps, as a parquet file."""
    if not file.is_file():
        recipe = yaml.safe_load((RECIPES / f"pretrain_{name}.yaml").read_text())
        rows = pretrain_tiny.load_rows(data, recipe)
        if "plainest" in recipe:
            images = pretrain_tiny.load_images(rows, recipe["resolution"])
            rows = rows.iloc[pretrain_tiny.plainest(images, recipe["plainest"])]
        file.parent.mkdir(parents=True, exist_ok=True)
        rows[["image"]].to_parquet(file)
    return file


def score(args, name, folder):
    """Scores of 6 samples of 3 steps, without guidance."""
    file = folder / "scores" / "scores.jsonl"
    if not file.is_file():
        how = SCORED.get(name, ["--seeds", "6"])
        ld_pruner("score", f"demo:{name}", "-o", file.parent, "--num-inference-steps", 3, "--batch-size", 6, *how)
    return file


def reset(pruned, folder):
    """The pruned pipeline with new random weights in its denoiser."""
    pipe = load_pipeline(str(pruned))
    torch.manual_seed(0)
    pipe.unet = type(pipe.unet).from_config(pipe.unet.config)
    pipe.save_pretrained(folder)


def distil(args, name, student, folder):
    """Finetune a pruned pipeline by the original's own samples."""
    if not (folder / "model_index.json").is_file():
        flags = [
            "--data_free",
            256,
            "--data_free_steps",
            10,
            "--train_batch_size",
            16,
            "--max_train_steps",
            args.steps,
        ]
        flags += [
            "--learning_rate",
            1e-3,
            "--lr_scheduler",
            "cosine",
            "--lr_warmup_steps",
            10,
            "--checkpointing_steps",
            100,
        ]
        flags += ["--checkpoints_total_limit", 1, "--mixed_precision", args.mixed_precision, *TRAINED.get(name, [])]
        flags += ["--cache_dir", folder.parent / "cache", "--resume_from_checkpoint", "latest"]
        ld_pruner("distill", "--teacher", f"demo:{name}", "--student", student, "--output_dir", folder, *flags)


def evaluate(args, name, reference, folder, *pipelines):
    if not (folder / RESULTS_FILE).is_file():
        how = ["-n", args.samples, "--num-inference-steps", args.sample_steps, "--batch-size", 16, "--device", "cpu"]
        how += ["--reference", reference, "--extractor", "shipped", "--metrics", METRIC.get(name, "FID").lower()]
        ld_pruner("evaluate", *pipelines, "-o", folder, *how, *JUDGED.get(name, []))
    return Evaluation.load(folder / RESULTS_FILE)


def rows_of(args, name, data):
    """The four rows of one task; the speed-up as its 99% interval."""
    folder = args.output / name
    reference = trained_on(name, data, folder / "reference.parquet")
    scores, pruned = score(args, name, folder), folder / "pruned"
    if not (pruned / "model_index.json").is_file():
        ld_pruner("prune", f"demo:{name}", *args.budget.split(), "--scores", scores, "-o", pruned, "--overwrite")
    if not (folder / "reset" / "model_index.json").is_file():
        reset(pruned, folder / "reset")
    metric = METRIC.get(name, "FID")
    both = evaluate(args, name, reference, folder / "judged-pruned", f"demo:{name}", pruned)
    judged = {"original": both.find("A", metric), "pruned": both.find("B", metric)}
    for label, student in (("pruned, finetuned", pruned), ("reset, finetuned", folder / "reset")):
        tuned = folder / label.replace(", ", "-")
        distil(args, name, student, tuned)
        judged[label] = evaluate(args, name, reference, folder / f"judged-{tuned.name}", tuned).find("A", metric)
    speed = both.find("B vs A", "speed-up of a denoiser call").details
    for label, found in judged.items():
        model = "A" if label == "original" else "B"
        params, macs = (both.value(model, n) for n in ("params of the denoiser", "MACs per denoiser call and sample"))
        fast = "1.00" if model == "A" else f"{speed['low']:.2f} to {speed['high']:.2f}"
        yield f"| {name} | {label} | {params / 1e6:.2f}M | {macs / 1e9:.3f}G | {fast} | {metric} {found.text()} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", metavar="NAME=DATA")
    parser.add_argument("--output", type=Path, default=Path("tasks"))
    parser.add_argument("--budget", default="--macs 0.4", help="what `ld-pruner prune` is asked for")
    parser.add_argument("--steps", type=int, default=300, help="of finetuning")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--sample_steps", type=int, default=10)
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    args = parser.parse_args()
    table = [
        "| pipeline | weights | parameters | MACs a call | speed-up (99% interval) | quality |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for task in args.tasks:
        name, _, data = task.partition("=")
        table += rows_of(args, name, data)
    print("\n".join(table))


if __name__ == "__main__":
    main()
