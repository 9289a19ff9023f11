"""Pictures during training, side by side and from the same noise."""

import numpy as np
import torch
from inputs import float32_outputs
from PIL import Image

from ld_pruner_hf.latents import preserved, steps_argument


def draw(pipe, inputs, args):
    """Pictures of the validation prompts, the same noise each time; [] where a pipeline draws none."""
    n = len(args.validation_prompts) if inputs.argument == "prompt" else args.num_validation_images
    prompts = args.validation_prompts if inputs.argument == "prompt" else [0] * n
    call = {
        **inputs.pipeline_call(prompts, n, args.validation_guidance),
        **steps_argument(pipe, args.validation_inference_steps),
    }
    with preserved(pipe), float32_outputs(pipe, inputs.component):
        output = pipe(**call, generator=[torch.Generator().manual_seed(args.seed + i) for i in range(n)])
    return [p.convert("RGB") for p in getattr(output, "images", []) if isinstance(p, Image.Image)]


def validate(step, teacher, student_pipe, inputs, args, ema, parameters, accelerator):
    """validation/step_N.png: a row a prompt; original (if there is a teacher), pruned without training, student."""
    if ema:
        ema.store(parameters)
        ema.copy_to(parameters)
    now = draw(student_pipe, inputs, args)
    if ema:
        ema.restore(parameters)
    if not accelerator.is_main_process:
        return None
    folder = args.output_dir / "validation"
    folder.mkdir(exist_ok=True)
    columns = []
    for name, pipe in ([("original", teacher)] if teacher else []) + [("pruned", student_pipe)]:
        files = [folder / f"{name}_{i}.png" for i in range(len(now))]
        if not all(f.is_file() for f in files):
            for picture, file in zip(now if name == "pruned" else draw(pipe, inputs, args), files, strict=True):
                picture.save(file)
        columns.append([Image.open(f) for f in files])
    if not now:
        return None
    w, h = now[0].size
    columns.append(now)
    grid = Image.new("RGB", (w * len(columns), h * len(now)), "white")
    for x, column in enumerate(columns):
        for y, picture in enumerate(column):
            grid.paste(picture, (x * w, y * h))
    grid.save(folder / f"step_{step:06d}.png")
    return grid


def wants_validation(args, inputs, step):
    due = args.validation_steps and (step % args.validation_steps == 0 or step == args.max_train_steps)
    return due and (args.validation_prompts or inputs.argument != "prompt")


def log_grid(accelerator, grid, step):
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_image("validation", np.asarray(grid), step, dataformats="HWC")
        elif tracker.name == "trackio":  # accelerate has no log_images for it
            import trackio

            tracker.log({"validation": trackio.Image(grid)}, step=step)
        else:
            tracker.log_images({"validation": [grid]}, step=step)
