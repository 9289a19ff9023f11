"""Distil a pruned pipeline from its original.

    accelerate launch training/distill.py --config training/recipes/distill_emoji.yaml --output_dir out
    accelerate launch training/distill.py --teacher CompVis/stable-diffusion-v1-4 --student sd-pruned \\
        --dataset_name me/captioned-pictures --resolution 512 --mixed_precision fp16 --use_ema --output_dir out

loss = task_weight * |target - student|^2 + output_weight * |teacher - student|^2 + feature_weight * sum over stages |f_t - f_s|^2

--output_dir holds at the end: a complete pipeline, log.csv (each loss term of each step), checkpoint-N folders, validation/.
"""

import contextlib
import copy
import functools
import json
import time

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from checkpoints import Log, Progress, float32_weights, gathered, remove_old, resume_point
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from inputs import DenoiserInputs, check_resolution
from models import (
    add_lora,
    create_repo,
    freeze,
    freeze_unused,
    load_pipeline,
    make_student,
    noise_process,
    save_pipeline,
    with_component,
)
from options import check_writable, parse_args
from sources import Batches, drop_conditions, make_source, noised, open_rows
from tqdm.auto import tqdm
from validation import log_grid, validate, wants_validation

from ld_pruner_hf import DistillationLoss, FeatureTaps, find_taps
from ld_pruner_hf.latents import find_denoiser
from ld_pruner_hf.memory import freed_memory_kept


def make_accelerator(args):
    try:
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(
                project_dir=str(args.output_dir), logging_dir=str(args.output_dir / args.logging_dir)
            ),
        )
    except ValueError as error:
        raise ValueError(f"--mixed_precision {args.mixed_precision}: {error}") from error
    kind = accelerator.distributed_type.value
    if kind == "MEGATRON_LM":
        raise ValueError(
            "accelerate is configured for MEGATRON_LM, for which there is no code here; use FSDP (version 2)"
        )
    if kind == "FSDP" and not accelerator.is_fsdp2:
        raise ValueError("accelerate is configured for FSDP version 1; set fsdp_version: 2")
    if kind == "DEEPSPEED":
        configure_deepspeed(args, accelerator)
    return accelerator


def configure_deepspeed(args, accelerator):
    """What DeepSpeed must know of the run before it takes the model."""
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage > 2:
        raise ValueError(
            f"accelerate is configured for DeepSpeed stage {plugin.zero_stage}, got no whole student in any process; use stage 1 or 2, "
            "or FSDP (version 2)"
        )
    if args.use_ema:
        raise ValueError("--use_ema: DeepSpeed keeps the float32 weights to itself; leave it out, or use DDP or FSDP")
    plugin.deepspeed_config |= {
        "train_micro_batch_size_per_gpu": args.train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "gradient_clipping": args.max_grad_norm,
    }


def make_optimizer(args, parameters, accelerator):
    rate = args.learning_rate
    if args.scale_lr:
        rate *= args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    kind = functools.partial(torch.optim.AdamW, fused=True)
    if args.use_8bit_adam:
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit
    betas = (args.adam_beta1, args.adam_beta2)
    optimizer = kind(parameters, lr=rate, betas=betas, weight_decay=args.adam_weight_decay, eps=args.adam_epsilon)
    factor = get_scheduler(args.lr_scheduler, optimizer, None, args.lr_warmup_steps, args.max_train_steps).lr_lambdas[
        0
    ]
    return (
        optimizer,
        lambda step: rate * factor(step),
    )  # of the step alone, so that resuming needs no scheduler's state


class Distillation:
    """Teacher, student, data and loss of one run: everything but the loop."""

    TERMS = ("loss", "task", "output", "feature")

    def __init__(self, args, accelerator):
        self.args, self.accelerator = args, accelerator
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        self.samples_a_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        self.loss = DistillationLoss(args.task_weight, args.output_weight, args.feature_weight, args.feature_loss)
        self._load_teacher()
        scores_first = args.prune is not None and args.scores is None
        if not scores_first:
            self._load_student()
        rows = open_rows(args, self.inputs, accelerator)  # wrong columns show before anything that takes long
        if scores_first:
            self._load_student()
        self._load_data(rows)
        self._find_taps()

    def _load_teacher(self):
        self.pipe = load_pipeline(self.args.teacher, self.args).to(self.accelerator.device)
        self.component = find_denoiser(self.pipe, self.args.component)
        check_resolution(self.pipe, self.args.resolution)
        self.process = noise_process(self.pipe, self.args)
        if self.args.snr_gamma:
            self.process.snr_weights(torch.tensor([0]), self.args.snr_gamma)
        self.inputs = DenoiserInputs(self.pipe, self.component, self.args.resolution)

    def _load_student(self):
        """The student is trained in float32; the teacher, frozen, is in the precision of the run from here on."""
        args = self.args
        self.student = make_student(args, self.pipe, self.component, self.accelerator)
        self.student.to(self.accelerator.device, torch.float32)
        size = sum(p.numel() for p in self.student.parameters())
        check_writable(args.output_dir, needed=2 * 4 * size * (4 if args.use_ema else 3))
        freeze(self.pipe, self.dtype)
        self.teacher = getattr(self.pipe, self.component)
        self.student.train().requires_grad_(True)
        if args.train_lora_rank:
            add_lora(self.student, args.train_lora_rank)
        if args.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        self.student_pipe = with_component(self.pipe, self.component, self.student)

    def _load_data(self, rows):
        """The source of batches, where the last checkpoint left it."""
        args = self.args
        self.source = make_source(args, self.inputs, rows, self.accelerator, self.dtype)
        self.checkpoint, self.first_step = resume_point(args, self.source)
        self.batches = Batches(self.source, self.first_step, args, self.accelerator)
        self.blank = self.inputs.encode([self.inputs.blank], 1) if args.proportion_empty_prompts else {}

    def _find_taps(self):
        """Watch one batch go through both; freeze what it shows can never be trained."""
        first, self.pairs = self.prepare(*self.batches.peek()[:2]), []
        if self.args.feature_weight:
            with self.accelerator.autocast():
                self.pairs = find_taps(self.teacher, self.student, first[0], self.args.feature_taps)
        self.teacher_taps = FeatureTaps(self.teacher, [pair.teacher for pair in self.pairs])
        self.student_taps = FeatureTaps(self.student, [pair.student for pair in self.pairs])
        with self.teacher_taps, self.student_taps:
            self.frozen = freeze_unused(self.student, self.terms(self.student, first)["loss"])
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]

    @torch.no_grad()
    def prepare(self, positions, fetched):
        """(arguments of the denoisers, target, weights of the samples in the task loss) of one micro-batch."""
        latents, conditions = self.source.batch(positions, fetched)
        latents = latents.to(self.accelerator.device, torch.float32)  # (B, C, h, w), or as the denoiser takes them
        conditions = drop_conditions(conditions, self.blank, self.args, positions)
        noisy, target, index = noised(latents, self.process, self.args.seed, positions)
        gamma = self.args.snr_gamma
        weights = self.process.snr_weights(index, gamma).to(latents.device) if gamma else None
        return self.inputs.call(noisy, self.process.timesteps[index], conditions, self.dtype), target, weights

    def terms(self, model, batch):
        """The loss and its terms; `model` is the student, bare or wrapped."""
        call, target, weights = batch
        expected, expected_features = None, []
        if self.loss.needs_teacher:
            with torch.no_grad():
                expected, expected_features = self.teacher(**call.kwargs)[0], self.teacher_taps.take()
        with self.accelerator.autocast():
            prediction = model(**call.kwargs)[0]
        return self.loss(prediction, target, expected, self.student_taps.take(), expected_features, weights)

    @contextlib.contextmanager
    def watching(self):
        """Features are kept inside."""
        with self.teacher_taps, self.student_taps:
            yield

    def save(self, student):
        save_pipeline(self.args, self.component, student)

    def __str__(self):
        before, after = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (self.teacher, self.student))
        compared = (
            f"features compared at {len(self.pairs)} stages ({self.loss.feature_loss}):"
            if self.pairs
            else "no features"
        )
        lines = [
            f"{self.component}: {type(self.student).__name__}, {before:.2f}M -> {after:.2f}M parameters, predicts "
            f"{self.process.prediction_type}",
            f"steps {self.first_step + 1} to {self.args.max_train_steps}, {self.samples_a_step} samples each",
            compared,
            *(f"  {pair}" for pair in self.pairs),
        ]
        if self.frozen:
            trained = sum(p.numel() for p in self.parameters) / 1e6
            lines.append(
                f"{len(self.frozen)} parameters that no loss depends on, or that are frozen, stay; {trained:.2f}M are trained"
            )
        return "\n".join(lines)


def train(run, args, accelerator):
    """The loop. Returns the student, with averaged weights under --use_ema; on all but the main process perhaps None.

    Args:
        run: model, data and loss: a `Distillation`, or anything with its attributes TERMS, student, parameters, batches, prepare,
            terms, checkpoint, first_step, samples_a_step, and those that `look` and `launch` use.
    """
    optimizer, learning_rate = make_optimizer(args, run.parameters, accelerator)
    whole = Whole(run.student, accelerator)
    model, optimizer = accelerator.prepare(run.student, optimizer)
    parameters = [p for p in model.parameters() if p.requires_grad]
    ema = EMAModel(parameters, decay=args.ema_decay, use_ema_warmup=True) if args.use_ema else None
    progress = Progress(model, optimizer, ema, accelerator)
    if run.checkpoint is not None:
        progress.load(run.checkpoint, run.samples_a_step)
    log = Log(args.output_dir / "log.csv", ["step", *run.TERMS, "lr", "images_per_s"], run.first_step, accelerator)
    if run.first_step == 0:
        look(run, args, accelerator, 0, ema, parameters)

    bar = tqdm(total=args.max_train_steps, initial=run.first_step, disable=not accelerator.is_local_main_process)
    for step in range(run.first_step + 1, args.max_train_steps + 1):
        began = time.monotonic()
        # Dropout, if there is any, depends on step and process alone: a resumed run repeats it.
        torch.manual_seed(args.seed * 1_000_003 + step * accelerator.num_processes + accelerator.process_index)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1)
        total = torch.zeros(len(run.TERMS), device=accelerator.device)
        for _ in range(args.gradient_accumulation_steps):
            positions, fetched, stream = run.batches.take()
            with accelerator.accumulate(model):
                terms = run.terms(model, run.prepare(positions, fetched))
                accelerator.backward(terms["loss"])
            total += torch.stack([terms.get(name, total.new_zeros(())).detach() for name in run.TERMS])
        accelerator.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if ema:
            ema.step(parameters)

        total = accelerator.reduce(total / args.gradient_accumulation_steps, reduction="mean").tolist()
        rate = run.samples_a_step / (time.monotonic() - began)
        row = {**dict(zip(run.TERMS, total, strict=True)), "lr": learning_rate(step - 1), "images_per_s": rate}
        log.write(step, row)
        bar.update()
        bar.set_postfix(loss=f"{total[0]:.4f}", lr=f"{row['lr']:.1e}")
        if not np.isfinite(total[0]) and accelerator.scaler is None:
            raise RuntimeError(f"step {step}: the loss is {total[0]}; lower --learning_rate or a weight, then resume")
        if step % args.checkpointing_steps == 0:
            progress.save(args.output_dir / f"checkpoint-{step}", step, stream, run.samples_a_step)
            if accelerator.is_main_process:
                remove_old(args.output_dir, args.checkpoints_total_limit)
        look(run, args, accelerator, step, ema, parameters)
    bar.close()
    accelerator.wait_for_everyone()
    if ema:
        ema.copy_to(parameters)
    return whole.student(model)


class Whole:
    """The trained model in one piece, also where FSDP has split it in place or DeepSpeed has the float32 weights."""

    def __init__(self, student, accelerator):
        self.accelerator = accelerator
        self.kind = accelerator.distributed_type.value
        elsewhere = self.kind in ("FSDP", "DEEPSPEED")
        self.copy = copy.deepcopy(student).cpu() if elsewhere and accelerator.is_main_process else None

    def student(self, model):
        """Every process must call it; the main one has the model."""
        if self.kind == "DEEPSPEED":
            weights = float32_weights(model)
        elif self.kind == "FSDP":
            weights = {name: gathered(value) for name, value in model.state_dict().items()}
        else:
            return self.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if self.copy is not None:
            self.copy.load_state_dict(weights)
        return self.copy


def look(run, args, accelerator, step, ema, parameters):
    """Draw validation pictures, if they are due; a model that is split needs every process."""
    everywhere = accelerator.distributed_type.value == "FSDP"
    if (accelerator.is_main_process or everywhere) and wants_validation(args, run.inputs, step):
        with accelerator.autocast():
            grid = validate(step, run.pipe, run.student_pipe, run.inputs, args, ema, parameters, accelerator)
        if grid is not None:
            log_grid(accelerator, grid, step)


def launch(name, make_run, args):
    """The frame of a training script: accelerator, trackers, the loop, the result."""
    accelerator = make_accelerator(args)
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.allow_tf32
    try:
        if args.push_to_hub and accelerator.is_main_process:
            create_repo(args)
        run = make_run(args, accelerator)
        accelerator.print(run)
        flags = json.loads(json.dumps(vars(args), default=str))
        if accelerator.is_main_process:
            (args.output_dir / "recipe.json").write_text(json.dumps(flags, indent=1))
        if args.report_to != "none":
            plain = {
                k: v if isinstance(v, (int, float, str)) else str(v) for k, v in flags.items()
            }  # tensorboard takes no lists
            accelerator.init_trackers(name, plain)
        with run.watching(), freed_memory_kept():
            student = train(run, args, accelerator)
        if run.source.skipped:
            accelerator.print(f"skipped: {dict(run.source.skipped)}")
        if accelerator.is_main_process:
            run.save(student)
    finally:
        accelerator.end_training()


def main(argv=None):
    launch("distill", Distillation, parse_args(__doc__, argv))


if __name__ == "__main__":
    main()
