"""DreamBooth (arXiv 2208.12242) on a pruned pipeline, or any other: teach it one subject from a few pictures.

    accelerate launch training/dreambooth.py --pretrained_model_name_or_path sd-pruned \\
        --instance_data_dir my-dog --instance_prompt "a photo of sks dog" \\
        --with_prior_preservation --class_data_dir dogs --class_prompt "a photo of dog" --output_dir sd-pruned-dog

loss = |target - prediction|^2 on the subject + prior_loss_weight * the same on pictures of its class, which the pipeline draws first

--output_dir holds at the end the complete pipeline; with --train_lora_rank R only the LoRA, for `pipe.load_lora_weights(output_dir)`.
"""

import contextlib
from argparse import Namespace
from pathlib import Path

import torch
from checkpoints import resume_point
from data import Images, load_rows
from distill import launch
from inputs import DenoiserInputs, Encoder, check_resolution
from models import (
    add_lora,
    freeze,
    freeze_unused,
    load_pipeline,
    noise_process,
    save_lora,
    save_pipeline,
    with_component,
)
from options import add_output, add_training, check_training, new_parser, parse
from sources import Batches, EncodedImages, noised, picture_size
from tqdm.auto import tqdm

from ld_pruner_hf.distillation import squared_error
from ld_pruner_hf.latents import find_denoiser, preserved


def make_parser():
    parser = new_parser("dreambooth.py", __doc__)
    add = parser.add_argument_group("model").add_argument
    add("--pretrained_model_name_or_path", dest="teacher", help="the pipeline: folder, Hub id or demo:emoji")
    add("--revision")
    add("--variant")
    add("--component", help="which model is trained; default: the one that denoises")
    add = parser.add_argument_group("data").add_argument
    add("--instance_data_dir", type=Path, help="folder with pictures of the subject")
    add("--instance_prompt", help="prompt with a rare word for the subject; for pipelines that take one")
    add("--with_prior_preservation", action="store_true", help="also train on pictures of the subject's class")
    add(
        "--class_data_dir",
        type=Path,
        help="folder with these; the pipeline draws what is missing of --num_class_images",
    )
    add("--class_prompt", help="prompt without the subject")
    add("--num_class_images", type=int, default=100)
    add("--sample_batch_size", type=int, default=4, help="pictures that are drawn together")
    add("--prior_loss_weight", type=float, default=1.0)
    add("--resolution", type=int, help="default: the pipeline's")
    add("--center_crop", action="store_true")
    add("--random_flip", action="store_true")
    add("--dataloader_num_workers", type=int, default=0, help="threads that decode pictures")
    add("--prediction_type", help="default: the scheduler's")
    add("--snr_gamma", type=float, help="min-SNR weights of the loss; 5.0 is usual")
    defaults = {"train_batch_size": 4, "max_train_steps": 800, "learning_rate": 1e-6}  # BK-SDM: 800 steps, 1e-6
    add_training(parser.add_argument_group("training"), **defaults)
    add_output(parser.add_argument_group("output"))
    return parser


def check(args):
    """Raise ValueError for flags that cannot work together, before anything is loaded."""
    for name in ("teacher", "instance_data_dir", "output_dir"):
        if not getattr(args, name):
            raise ValueError(f"--{'pretrained_model_name_or_path' if name == 'teacher' else name} is missing")
    if not args.instance_data_dir.is_dir():
        raise ValueError(f"--instance_data_dir: {args.instance_data_dir} is no folder; expected one with pictures")
    if args.with_prior_preservation and not args.class_data_dir:
        raise ValueError(
            "--with_prior_preservation: needs --class_data_dir, and --class_prompt where prompts are taken"
        )
    for name in ("num_class_images", "sample_batch_size", "prior_loss_weight"):
        if not getattr(args, name) > 0:
            raise ValueError(f"--{name}: got {getattr(args, name)}, expected a positive number")
    check_training(args)


class DreamBooth:
    """Model, pictures and loss of one run: everything but the loop, which is distill.py's."""

    TERMS = ("loss", "task", "prior")
    watching = contextlib.nullcontext

    def __init__(self, args, accelerator):
        self.args, self.accelerator = args, accelerator
        self.dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        self.samples_a_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
        self.pipe = None  # no teacher to draw beside the student
        self._load()
        instance = self._pictures(args.instance_data_dir)
        prior = None
        if args.with_prior_preservation:
            draw_class(self.student_pipe, self.inputs, args, accelerator)
            prior = self._pictures(args.class_data_dir)
        self.source = Pairs(
            instance, prior, [args.instance_prompt, args.class_prompt], self.encoder, self.inputs, args.seed
        )
        self.checkpoint, self.first_step = resume_point(args, self.source)
        self.batches = Batches(self.source, self.first_step, args, accelerator)
        self.student.train().requires_grad_(True)
        if args.train_lora_rank:
            add_lora(self.student, args.train_lora_rank)
        if args.gradient_checkpointing:
            self.student.enable_gradient_checkpointing()
        first = self.prepare(*self.batches.peek()[:2])
        self.frozen = freeze_unused(self.student, self.terms(self.student, first)["loss"])
        self.parameters = [p for p in self.student.parameters() if p.requires_grad]

    def _load(self):
        args = self.args
        pipe = load_pipeline(args.teacher, args).to(self.accelerator.device)
        self.component = find_denoiser(pipe, args.component)
        check_resolution(pipe, args.resolution)
        self.process = noise_process(pipe, args)
        self.inputs = DenoiserInputs(pipe, self.component, args.resolution)
        for name in ("instance_prompt", "class_prompt") if args.with_prior_preservation else ("instance_prompt",):
            if self.inputs.argument == "prompt" and not getattr(args, name):
                raise ValueError(f"--{name} is missing; {type(pipe).__name__} takes a prompt")
        self.student = getattr(pipe, self.component)
        freeze(pipe, self.dtype)
        self.student.to(torch.float32)
        self.student_pipe, self.encoder = (
            with_component(pipe, self.component, self.student),
            Encoder(pipe, self.inputs),
        )

    def _pictures(self, folder):
        args = self.args
        settings = Namespace(
            dataset_name=None, train_data_dir=folder, streaming=False, cache_dir=None, image_column=None, audio_column=None,
            max_train_samples=None, seed=args.seed,
        )  # fmt: skip
        rows, column, _ = load_rows(settings, needs_caption=False)
        return Images(
            rows, column, None, resolution=args.resolution or picture_size(self.inputs), channels=self.encoder.channels,
            center_crop=args.center_crop, random_flip=args.random_flip, seed=args.seed, workers=args.dataloader_num_workers,
        )  # fmt: skip

    @torch.no_grad()
    def prepare(self, positions, fetched):
        """(arguments of the denoiser, target, weights of the samples) of the subject's pictures, then those of its class."""
        latents, conditions = self.source.batch(positions, fetched)
        latents = latents.to(self.accelerator.device, torch.float32)
        positions = self.source.all_positions(positions)
        noisy, target, index = noised(latents, self.process, self.args.seed, positions)
        gamma = self.args.snr_gamma
        weights = self.process.snr_weights(index, gamma).to(latents.device) if gamma else None
        return self.inputs.call(noisy, self.process.timesteps[index], conditions, self.dtype), target, weights

    def terms(self, model, batch):
        call, target, weights = batch
        with self.accelerator.autocast():
            prediction = model(**call.kwargs)[0]
        error = squared_error(prediction[:, : target.shape[1]], target)
        error = error if weights is None else error * weights
        if not self.args.with_prior_preservation:
            return {"loss": error.mean(), "task": error.mean()}
        task, prior = (half.mean() for half in error.chunk(2))
        return {"loss": task + self.args.prior_loss_weight * prior, "task": task, "prior": prior}

    def save(self, student):
        if self.args.train_lora_rank:
            save_lora(self.args, self.student_pipe, self.component, student)
        else:
            save_pipeline(self.args, self.component, student)

    def __str__(self):
        trained = sum(p.numel() for p in self.parameters) / 1e6
        return (
            f"{self.component}: {type(self.student).__name__}, {trained:.2f}M parameters are trained\n"
            f"steps {self.first_step + 1} to {self.args.max_train_steps}, {self.samples_a_step} samples each"
            + (" and as many of the class" if self.args.with_prior_preservation else "")
        )


class Pairs:
    """Pictures of the subject and, behind them in the same batch, as many of its class."""

    def __init__(self, instance, prior, prompts, encoder, inputs, seed):
        self.parts = [
            EncodedImages(images, encoder, inputs, seed) for images in (instance, prior) if images is not None
        ]
        self.prompts, self.inputs = prompts[: len(self.parts)], inputs
        self.skipped = instance.skipped

    def all_positions(self, positions):
        """Those of the class are negative, so that their noise is their own."""
        return [*positions, *(-1 - p for p in positions)] if len(self.parts) > 1 else positions

    def fetch(self, positions):
        return [part.images.batch(positions)[0] for part in self.parts]

    def batch(self, positions, fetched):
        n, half = len(positions), self.all_positions(positions)
        captions = [[p] * n if self.inputs.argument else None for p in self.prompts]
        batches = [
            part.batch(half[i * n : (i + 1) * n], (pixels, captions[i]))
            for i, (part, pixels) in enumerate(zip(self.parts, fetched, strict=True))
        ]
        conditions = {k: torch.cat([c[k] for _, c in batches]) for k in batches[0][1]}
        return torch.cat([latents for latents, _ in batches]), conditions

    def state(self):
        return {}

    def restore(self, state):
        pass


def draw_class(pipe, inputs, args, accelerator):
    """Draw what --class_data_dir lacks of --num_class_images, before the pipeline is trained."""
    if accelerator.is_main_process:
        args.class_data_dir.mkdir(parents=True, exist_ok=True)
        numbers = [i for i in range(args.num_class_images) if not (args.class_data_dir / f"{i:05d}.png").is_file()]
        have = sum(p.is_file() for p in args.class_data_dir.iterdir())
        numbers = numbers[: max(0, args.num_class_images - have)]
        for first in tqdm(
            range(0, len(numbers), args.sample_batch_size), desc="pictures of the class", disable=not numbers
        ):
            chunk = numbers[first : first + args.sample_batch_size]
            call = inputs.pipeline_call([args.class_prompt] * len(chunk), len(chunk))
            with preserved(pipe), accelerator.autocast():
                pictures = pipe(**call, generator=[torch.Generator().manual_seed(i) for i in chunk]).images
            for number, picture in zip(chunk, pictures, strict=True):
                picture.save(args.class_data_dir / f"{number:05d}.png")
    accelerator.wait_for_everyone()


def main(argv=None):
    launch("dreambooth", DreamBooth, parse(make_parser(), check, argv))


if __name__ == "__main__":
    main()
