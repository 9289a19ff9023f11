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

from ld_pruner_hf import PRESETS, DistillationLoss, demo
from ld_pruner_hf.distillation import FEATURE_LOSSES, PREDICTION_TYPES

TRACKERS = ("tensorboard", "wandb", "trackio")
RECIPES = Path(__file__).parent / "recipes"
FILES = ("plan", "scores", "data_free_prompts")


def make_parser(description):
    parser = new_parser("distill.py", description)
    _add_models(parser.add_argument_group("models"))
    _add_data(parser.add_argument_group("data"))
    _add_loss(parser.add_argument_group("loss"))
    add_training(parser.add_argument_group("training"))
    add_output(parser.add_argument_group("output"))
    return parser


def new_parser(script, description):
    """A parser that knows --config."""
    parser = argparse.ArgumentParser(
        usage=f"{script} [--config FILE] [flags]; --help lists them",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", help="YAML file of flags (without --), or the name of a recipe; flags on the command line win"
    )
    return parser


def _add_models(g):
    add = g.add_argument
    add(
        "--pretrained_model_name_or_path",
        "--teacher",
        dest="teacher",
        help="the original pipeline: folder, Hub id or demo:emoji",
    )
    add("--revision")
    add("--variant")
    add("--component", help="which model is distilled; default: the one that denoises")
    add("--student", help="a saved pruned pipeline: folder or Hub id")
    add("--plan", help=f"prune the teacher by this plan instead: a file, or one of {', '.join(PRESETS)}")
    add("--prune", type=int, metavar="K", help="take K operators out of the teacher instead")
    add("--scores", type=Path, help="file of scores for --prune; default: score first, which takes long")


def _add_data(g):
    add = g.add_argument
    add("--dataset_name", help="Hub id of a data set, or a folder that `datasets` can load")
    add("--dataset_config_name")
    add(
        "--train_data_dir",
        type=Path,
        help="folder of images (captions in metadata.jsonl), wav files, parquet files or webdataset tars",
    )
    add("--data_free", type=int, metavar="N", help="no data set: N samples that the teacher makes first")
    add("--data_free_prompts", type=Path, help="text file, a prompt a line; default: the built-in ones")
    add("--data_free_steps", type=int, help="denoising steps of such a sample; default: the pipeline's")
    add("--data_free_guidance", type=float, help="guidance scale of such a sample; default: the pipeline's")
    add("--image_column")
    add(
        "--audio_column",
        help="recordings instead of pictures; each becomes a mel spectrogram of the pipeline's own kind",
    )
    add("--caption_column")
    add("--max_train_samples", type=int)
    add("--streaming", action="store_true", help="read while training; tars always are")
    add("--shuffle_buffer", type=int, default=1000, help="rows of a stream that are shuffled together")
    add("--resolution", type=int, help="default: the pipeline's")
    add("--center_crop", action="store_true")
    add("--random_flip", action="store_true")
    add("--proportion_empty_prompts", type=float, default=0.0)
    add(
        "--cache_latents",
        action="store_true",
        help="encode pictures (cropped in the centre) and captions once, keep them on disk",
    )
    add("--cache_dir", help="of data sets and latents; default: inside --output_dir for latents")
    add("--dataloader_num_workers", type=int, default=0, help="threads that decode pictures")


def _add_loss(g):
    add = g.add_argument
    add("--task_weight", type=float, default=1.0)
    add("--output_weight", type=float, default=1.0)
    add("--feature_weight", type=float, default=1.0)
    add("--feature_loss", choices=FEATURE_LOSSES, default="mse")
    add(
        "--feature_taps",
        nargs="+",
        metavar="PATH",
        help="modules to compare, a or a=b (teacher's=student's); default: ends of stages",
    )
    add("--prediction_type", choices=PREDICTION_TYPES, help="default: the scheduler's")
    add("--snr_gamma", type=float, help="min-SNR weights of the task loss; 5.0 is usual")


def add_training(g, **defaults):
    """Flags of the loop; `defaults` of a script other than distill.py."""
    add = g.add_argument
    add("--train_batch_size", type=int, default=16, help="samples a process and micro-step")
    add("--gradient_accumulation_steps", type=int, default=1)
    add("--max_train_steps", type=int, default=10_000)
    add("--learning_rate", type=float, default=5e-5)
    add("--scale_lr", action="store_true", help="times processes, accumulation and batch size")
    schedulers = [s.value for s in SchedulerType if s.value != "piecewise_constant"]
    add("--lr_scheduler", choices=schedulers, default="constant")
    add("--lr_warmup_steps", type=int, default=0)
    add("--adam_beta1", type=float, default=0.9)
    add("--adam_beta2", type=float, default=0.999)
    add("--adam_weight_decay", type=float, default=1e-2)
    add("--adam_epsilon", type=float, default=1e-8)
    add("--max_grad_norm", type=float, default=1.0)
    add("--use_8bit_adam", action="store_true")
    add("--train_lora_rank", type=int, help="train only LoRA layers of this rank in the attentions")
    add("--use_ema", action="store_true")
    add("--ema_decay", type=float, default=0.9999)
    add("--gradient_checkpointing", action="store_true")
    add("--mixed_precision", choices=["no", "fp16", "bf16"], help="default: that of `accelerate config`")
    add("--allow_tf32", action="store_true")
    add("--seed", type=int, default=0)
    g.set_defaults(**defaults)


def add_output(g):
    add = g.add_argument
    add("--output_dir", type=Path)
    add("--report_to", choices=["none", *TRACKERS], default="none", help="beside log.csv")
    add("--logging_dir", default="logs")
    add("--validation_prompts", nargs="+")
    add("--num_validation_images", type=int, default=4, help="of pipelines that take no prompt")
    add("--validation_steps", type=int, help="draw the pictures before and now every so many steps")
    add("--validation_inference_steps", type=int, default=25)
    add("--validation_guidance", type=float)
    add("--checkpointing_steps", type=int, default=500)
    add("--checkpoints_total_limit", type=int)
    add("--resume_from_checkpoint", help='a checkpoint folder, or "latest"')
    add("--push_to_hub", action="store_true")
    add("--hub_model_id")


def parse_args(description, argv=None):
    """Flags of distill.py from the command line over those of --config; exits with a message for wrong ones."""
    return parse(make_parser(description), check, argv)


def parse(parser, check, argv=None):
    """Parse with the flags of --config put first, then `check`; either's ValueError ends the script with one line."""
    config = argparse.ArgumentParser(add_help=False)
    config.add_argument("--config")
    first, _ = config.parse_known_args(argv)
    given = list(argv) if argv is not None else sys.argv[1:]
    try:
        args = parser.parse_args([*(flags_of(first.config, parser) if first.config else []), *given])
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def flags_of(config, parser):
    """A YAML file as command-line flags, so that types and choices are checked in one place.

    Files that it names may also lie beside it.
    """
    path = Path(config)
    if not path.is_file():
        path = RECIPES / f"{config}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in RECIPES.glob("distill_*.yaml")))
        raise ValueError(f"--config: {config} does not exist; expected a YAML file, or one of the recipes {names}")
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
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            beside = path.parent / str(value)
            is_file = name in FILES and not Path(value).exists() and beside.is_file()
            flags.append(f"--{name}={beside if is_file else value}")
    return flags


def check(args):
    """Raise ValueError for flags of distill.py that cannot work together, before anything is loaded.

    Example of a message: "--resolution: got -1, expected a positive number".
    """
    _check_given(args, "teacher", "output_dir")
    _check_one_of(args, "student", "student", "plan", "prune")
    _check_one_of(args, "data", "dataset_name", "train_data_dir", "data_free")
    if args.scores and args.prune is None:
        raise ValueError("--scores: goes with --prune K")
    for name in FILES:
        path = getattr(args, name)
        if path is not None and not Path(path).is_file() and not (name == "plan" and path in PRESETS):
            raise ValueError(
                f"--{name}: {path} does not exist"
                + (f"; expected a file, or one of {list(PRESETS)}" if name == "plan" else "")
            )
    DistillationLoss(args.task_weight, args.output_weight, args.feature_weight, args.feature_loss)
    if args.random_flip and (args.cache_latents or args.data_free):
        raise ValueError(
            "--random_flip: latents that are computed once cannot be flipped; leave it or --cache_latents out"
        )
    if args.cache_latents and args.streaming:
        raise ValueError("--cache_latents: a stream of the Hub may have no end; leave out --streaming")
    if args.audio_column and args.image_column:
        raise ValueError("--audio_column and --image_column: got both, expected the one that is trained on")
    check_training(args)
    _check_installed("datasets", needed=not args.data_free)
    _check_local_resolution(args)


def check_training(args):
    """The checks of what every script here has: numbers, packages, precision, output folder."""
    _check_numbers(args)
    _check_launch()
    _check_installed(args.report_to, needed=args.report_to != "none")
    _check_installed("bitsandbytes", needed=args.use_8bit_adam)
    _check_installed("peft", needed=args.train_lora_rank)
    _check_precision(args)
    check_writable(args.output_dir)


def _check_given(args, *names):
    for name in names:
        if not getattr(args, name):
            raise ValueError(f"--{name} is missing")


def _check_one_of(args, what, *names):
    given = [f"--{n}" for n in names if getattr(args, n) is not None]
    if len(given) != 1:
        *most, last = (f"--{n}" for n in names)
        raise ValueError(f"{what}: got {given or 'nothing'}, expected exactly one of {', '.join(most)} and {last}")


def _check_numbers(args):
    positive = (
        "prune", "data_free", "data_free_steps", "max_train_samples", "shuffle_buffer", "resolution", "train_batch_size",
        "gradient_accumulation_steps", "max_train_steps", "train_lora_rank", "checkpointing_steps", "checkpoints_total_limit", "learning_rate",
        "validation_steps", "num_validation_images", "validation_inference_steps", "snr_gamma", "max_grad_norm",
    )  # fmt: skip
    for name in positive:
        value = getattr(args, name, None)
        if value is not None and not value > 0:
            raise ValueError(f"--{name}: got {value}, expected a positive number")
    for name in ("lr_warmup_steps", "dataloader_num_workers", "seed"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name}: got {getattr(args, name)}, expected 0 or more")
    share = getattr(args, "proportion_empty_prompts", 0.0)
    if not 0 <= share <= 1:
        raise ValueError(f"--proportion_empty_prompts: got {share}, expected a number from 0 to 1")


def _check_launch():
    """`accelerate launch --num_processes 2 --cpu` starts one process and says nothing (accelerate 1.15, without mpirun)."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    if on_cpu and "MASTER_ADDR" in os.environ and not {"LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE"} & set(os.environ):
        raise ValueError(
            "accelerate launch was asked for several processes on the CPU but started only one; start them with "
            "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ...`, or unset MASTER_ADDR for one"
        )


def _check_installed(package, needed):
    if needed and importlib.util.find_spec(package) is None:
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
