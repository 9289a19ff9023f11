"""The flags of distill.py, named as in diffusers' training scripts; a YAML file may hold any of them; all checks that need no model."""

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import yaml
from diffusers.optimization import SchedulerType

from ld_pruner_hf import DistillationLoss, demo
from ld_pruner_hf.distillation import FEATURE_LOSSES, PREDICTION_TYPES

TRACKERS = ("tensorboard", "wandb", "trackio")


def make_parser(description):
    p = argparse.ArgumentParser(
        usage="distill.py [--config FILE] [flags]; --help lists them",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--config", type=Path, help="YAML file of flags (without --); flags on the command line win")
    g = p.add_argument_group("models")
    g.add_argument(
        "--pretrained_model_name_or_path",
        "--teacher",
        dest="teacher",
        help="the original pipeline: folder, Hub id or demo:emoji",
    )
    g.add_argument("--revision")
    g.add_argument("--variant")
    g.add_argument("--component", help="which model is distilled; default: the one that denoises")
    g.add_argument("--student", help="a saved pruned pipeline: folder or Hub id")
    g.add_argument("--plan", type=Path, help="prune the teacher by this plan instead")
    g.add_argument("--prune", type=int, metavar="K", help="take K operators out of the teacher instead")
    g.add_argument("--scores", type=Path, help="file of scores for --prune; default: score first, which takes long")
    g = p.add_argument_group("data")
    g.add_argument("--dataset_name", help="Hub id of a data set, or a folder that `datasets` can load")
    g.add_argument("--dataset_config_name")
    g.add_argument(
        "--train_data_dir",
        type=Path,
        help="folder of images (captions in metadata.jsonl), parquet files or webdataset tars",
    )
    g.add_argument("--data_free", type=int, metavar="N", help="no data set: N samples that the teacher makes first")
    g.add_argument("--data_free_prompts", type=Path, help="text file, a prompt a line; default: the built-in ones")
    g.add_argument("--data_free_steps", type=int, help="denoising steps of such a sample; default: the pipeline's")
    g.add_argument("--data_free_guidance", type=float, help="guidance scale of such a sample; default: the pipeline's")
    g.add_argument("--image_column")
    g.add_argument("--caption_column")
    g.add_argument("--max_train_samples", type=int)
    g.add_argument("--streaming", action="store_true", help="read while training; tars always are")
    g.add_argument("--shuffle_buffer", type=int, default=1000, help="rows of a stream that are shuffled together")
    g.add_argument("--resolution", type=int, help="default: the pipeline's")
    g.add_argument("--center_crop", action="store_true")
    g.add_argument("--random_flip", action="store_true")
    g.add_argument("--proportion_empty_prompts", type=float, default=0.0)
    g.add_argument(
        "--cache_latents",
        action="store_true",
        help="encode pictures (cropped in the centre) and captions once, keep them on disk",
    )
    g.add_argument("--cache_dir", help="of data sets and latents; default: inside --output_dir for latents")
    g.add_argument("--dataloader_num_workers", type=int, default=0, help="threads that decode pictures")
    g = p.add_argument_group("loss")
    g.add_argument("--task_weight", type=float, default=1.0)
    g.add_argument("--output_weight", type=float, default=1.0)
    g.add_argument("--feature_weight", type=float, default=1.0)
    g.add_argument("--feature_loss", choices=FEATURE_LOSSES, default="mse")
    g.add_argument(
        "--feature_taps",
        nargs="+",
        metavar="PATH",
        help="modules to compare, a or a=b (teacher's=student's); default: ends of stages",
    )
    g.add_argument("--prediction_type", choices=PREDICTION_TYPES, help="default: the scheduler's")
    g.add_argument("--snr_gamma", type=float, help="min-SNR weights of the task loss; 5.0 is usual")
    g = p.add_argument_group("training")
    g.add_argument("--train_batch_size", type=int, default=16, help="samples a process and micro-step")
    g.add_argument("--gradient_accumulation_steps", type=int, default=1)
    g.add_argument("--max_train_steps", type=int, default=10_000)
    g.add_argument("--learning_rate", type=float, default=5e-5)
    g.add_argument("--scale_lr", action="store_true", help="times processes, accumulation and batch size")
    g.add_argument(
        "--lr_scheduler",
        choices=[s.value for s in SchedulerType if s.value != "piecewise_constant"],
        default="constant",
    )
    g.add_argument("--lr_warmup_steps", type=int, default=0)
    g.add_argument("--adam_beta1", type=float, default=0.9)
    g.add_argument("--adam_beta2", type=float, default=0.999)
    g.add_argument("--adam_weight_decay", type=float, default=1e-2)
    g.add_argument("--adam_epsilon", type=float, default=1e-8)
    g.add_argument("--max_grad_norm", type=float, default=1.0)
    g.add_argument("--use_8bit_adam", action="store_true")
    g.add_argument(
        "--train_lora_rank", type=int, help="train LoRA layers of the attentions only, and merge them at the end"
    )
    g.add_argument("--use_ema", action="store_true")
    g.add_argument("--ema_decay", type=float, default=0.9999)
    g.add_argument("--gradient_checkpointing", action="store_true")
    g.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: that of `accelerate config`")
    g.add_argument("--allow_tf32", action="store_true")
    g.add_argument("--seed", type=int, default=0)
    g = p.add_argument_group("output")
    g.add_argument("--output_dir", type=Path)
    g.add_argument("--report_to", choices=["none", *TRACKERS], default="none", help="beside log.csv")
    g.add_argument("--logging_dir", default="logs")
    g.add_argument("--validation_prompts", nargs="+")
    g.add_argument("--num_validation_images", type=int, default=4, help="of pipelines that take no prompt")
    g.add_argument("--validation_steps", type=int, help="draw original / pruned / student every so many steps")
    g.add_argument("--validation_inference_steps", type=int, default=25)
    g.add_argument("--validation_guidance", type=float)
    g.add_argument("--checkpointing_steps", type=int, default=500)
    g.add_argument("--checkpoints_total_limit", type=int)
    g.add_argument("--resume_from_checkpoint", help='a checkpoint folder, or "latest"')
    g.add_argument("--push_to_hub", action="store_true")
    g.add_argument("--hub_model_id")
    return p


def parse_args(description, argv=None):
    """Flags from the command line over those of --config; exits with a message for wrong ones."""
    parser = make_parser(description)
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("--config", type=Path)
    first, _ = config.parse_known_args(argv)
    given = list(argv) if argv is not None else sys.argv[1:]
    try:
        args = parser.parse_args([*(_flags_of(first.config, parser) if first.config else []), *given])
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _flags_of(path, parser):
    """A YAML file as command-line flags, so that types and choices are checked in one place."""
    if not path.is_file():
        raise ValueError(f"--config: {path} does not exist; expected a YAML file, such as those in training/recipes")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"--config: {path} is not readable as YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"--config: {path} holds a {type(values).__name__}, expected flags and their values")
    actions = {name.lstrip("-"): action for name, action in parser._option_string_actions.items()}
    flags = []
    for name, value in values.items():
        if name not in actions or name in ("config", "help"):
            raise ValueError(f"--config: {path} sets {name!r}, which is no flag; see --help")
        if isinstance(actions[name], argparse._StoreTrueAction):
            if not isinstance(value, bool):
                raise ValueError(f"--config: {path} sets {name}: {value!r}, expected true or false")
            flags += [f"--{name}"] if value else []
        elif value is not None:
            flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


def check(args):
    """Raise ValueError for flags that cannot work together, before anything is loaded.

    Example of a message: "--resolution: got -1, expected a positive number".
    """
    for name in ("teacher", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing")
    students = [f"--{n}" for n in ("student", "plan", "prune") if getattr(args, n) is not None]
    if len(students) != 1:
        raise ValueError(
            f"student: got {students or 'nothing'}, expected exactly one of --student, --plan and --prune"
        )
    if args.scores and args.prune is None:
        raise ValueError("--scores: goes with --prune K")
    sources = [f"--{n}" for n in ("dataset_name", "train_data_dir", "data_free") if getattr(args, n) is not None]
    if len(sources) != 1:
        raise ValueError(
            f"data: got {sources or 'nothing'}, expected exactly one of --dataset_name, --train_data_dir and --data_free"
        )
    for name in ("plan", "scores", "data_free_prompts"):
        path = getattr(args, name)
        if path is not None and not path.is_file():
            raise ValueError(f"--{name}: {path} does not exist")
    _check_numbers(args)
    DistillationLoss(args.task_weight, args.output_weight, args.feature_weight, args.feature_loss)
    if args.random_flip and (args.cache_latents or args.data_free):
        raise ValueError(
            "--random_flip: latents that are computed once cannot be flipped; leave it or --cache_latents out"
        )
    if args.cache_latents and args.streaming:
        raise ValueError("--cache_latents: a stream has no end; leave out --streaming")
    _check_launch()
    _check_installed(args)
    _check_precision(args)
    _check_local_resolution(args)
    check_writable(args.output_dir)


def _check_numbers(args):
    positive = (
        "prune", "data_free", "data_free_steps", "max_train_samples", "shuffle_buffer", "resolution", "train_batch_size",
        "gradient_accumulation_steps", "max_train_steps", "train_lora_rank", "checkpointing_steps", "checkpoints_total_limit", "learning_rate",
        "validation_steps", "num_validation_images", "validation_inference_steps", "snr_gamma", "max_grad_norm",
    )  # fmt: skip
    for name in positive:
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name}: got {value}, expected a positive number")
    for name in ("lr_warmup_steps", "dataloader_num_workers", "seed"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name}: got {getattr(args, name)}, expected 0 or more")
    if not 0 <= args.proportion_empty_prompts <= 1:
        raise ValueError(
            f"--proportion_empty_prompts: got {args.proportion_empty_prompts}, expected a number from 0 to 1"
        )


def _check_launch():
    """`accelerate launch --num_processes 2 --cpu` starts one process and says nothing (accelerate 1.15, without mpirun)."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    if on_cpu and "MASTER_ADDR" in os.environ and not {"LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE"} & set(os.environ):
        raise ValueError(
            "accelerate launch was asked for several processes on the CPU but started only one; start them with "
            "`ACCELERATE_USE_CPU=true torchrun --nproc_per_node N training/distill.py ...`, or unset MASTER_ADDR for one"
        )


def _check_installed(args):
    needed = [args.report_to] if args.report_to != "none" else []
    needed += ["bitsandbytes"] if args.use_8bit_adam else []
    needed += ["peft"] if args.train_lora_rank else []
    needed += ["datasets"] if not args.data_free else []
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed: pip install {package}")


def _check_precision(args):
    precision = args.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    on_cpu = (
        os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
        or not torch.accelerator.is_available()
    )
    if precision == "fp16" and on_cpu:
        raise ValueError("--mixed_precision: got fp16 on the CPU, which cannot train in it; use bf16 or no")


def _check_local_resolution(args):
    """A resolution that the VAE cannot take, seen in its config before any weight is read."""
    name = args.teacher
    if name.startswith("demo:"):
        folder = demo.path(name.removeprefix("demo:"))
    else:
        folder = Path(name)
    config = folder / "vae" / "config.json"
    if args.resolution and config.is_file():
        factor = 2 ** (len(json.loads(config.read_text()).get("block_out_channels", [0])) - 1)
        if args.resolution % factor:
            raise ValueError(
                f"--resolution: got {args.resolution}, expected a multiple of {factor}, by which the VAE divides it"
            )


def check_writable(folder, needed=0):
    """Raise ValueError if `folder` cannot be written to, or has less than `needed` bytes of room."""
    probe = Path(folder) / ".writable"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0" * 4096)
        probe.unlink()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(f"--output_dir: cannot write to {folder} ({error}); choose another folder") from error
    if free < needed:
        raise ValueError(
            f"--output_dir: {folder} has {free / 1e9:.1f} GB of room, checkpoints need {needed / 1e9:.1f} GB; free some"
        )
