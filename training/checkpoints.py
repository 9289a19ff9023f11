"""A run that can be broken off: everything that the next step depends on, as safetensors and JSON, in folders that are always whole."""

import csv
import json
import os
import shutil
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor

ENGINE = "deepspeed"


def make_aside(folder):
    """An empty folder beside the one that it is to become."""
    aside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return aside


def save_checkpoint(folder, aside, tensors, state):
    """Write tensors and JSON state aside, then move all that is there into place."""
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, aside / "state.safetensors")
    (aside / "state.json").write_text(json.dumps(state))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(aside, folder)


def load_checkpoint(folder):
    """(tensors, state).

    Raises:
        ValueError: the folder is no checkpoint.
    """
    folder = Path(folder)
    if not (folder / "state.json").is_file() or not (folder / "state.safetensors").is_file():
        raise ValueError(
            f"--resume_from_checkpoint: {folder} is no checkpoint; expected state.json and state.safetensors in it"
        )
    return load_file(folder / "state.safetensors"), json.loads((folder / "state.json").read_text())


def checkpoints_in(output_dir):
    """Folders checkpoint-N, by N."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("checkpoint-")))


def find_checkpoint(output_dir, wanted):
    """The checkpoint to go on from, or None for a fresh start."""
    if wanted is None:
        return None
    if wanted == "latest":
        found = checkpoints_in(output_dir)
        return found[-1] if found else None
    folder = Path(wanted) if Path(wanted).is_dir() else Path(output_dir) / wanted
    if not folder.is_dir():
        raise ValueError(
            f"--resume_from_checkpoint: got {wanted!r}, expected 'latest' or a folder; there are {checkpoints_in(output_dir)}"
        )
    return folder


def resume_point(args, source):
    """(checkpoint to go on from, its step), or (None, 0); the source of data is set to where it was then."""
    checkpoint = find_checkpoint(args.output_dir, args.resume_from_checkpoint)
    if checkpoint is None:
        return None, 0
    state = load_checkpoint(checkpoint)[1]
    source.restore(state["stream"])
    return checkpoint, state["step"]


def remove_old(output_dir, limit):
    """Keep the newest `limit` checkpoints."""
    if limit is not None:
        for folder in checkpoints_in(output_dir)[:-limit]:
            shutil.rmtree(folder)


# ---- tensors that FSDP or DeepSpeed may have split -------------------------------------------------------------------


def gathered(tensor):
    """The whole tensor on the CPU; every process must ask for it."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu()


def float32_weights(engine):
    """The weights of a DeepSpeed engine's model as its optimizer has them; every process must ask for them."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = engine.module.state_dict()
    trained = {n: safe_get_full_fp32_param(p) for n, p in engine.module.named_parameters() if p.requires_grad}
    return {name: (value if (w := trained.get(name)) is None else w).detach().cpu() for name, value in whole.items()}


def split_as(value, like):
    """`value` spread over the processes as `like` is."""
    if isinstance(like, DTensor) and value.shape == like.shape:
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value.to(like.device)


def optimizer_tensors(optimizer, names):
    """(tensors, plain values) of an optimizer's state, by parameter name."""
    tensors, plain = {}, {}
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, torch.Tensor):
                    tensors[f"optimizer.{names[p]}.{key}"] = gathered(value)
                else:
                    plain[f"optimizer.{names[p]}.{key}"] = value
    return tensors, plain


def restore_optimizer(optimizer, names, tensors, plain):
    """Undo `optimizer_tensors`."""
    by_name = {name: p for p, name in names.items()}
    for full, value in {**tensors, **plain}.items():
        if full.startswith("optimizer."):
            name, _, key = full.removeprefix("optimizer.").rpartition(".")
            p = by_name[name]
            if isinstance(value, torch.Tensor):
                value = split_as(value, p) if key != "step" else value
            optimizer.state[p][key] = value


class Log:
    """log.csv, a row a step, and the trackers; a resumed run drops the rows behind its checkpoint."""

    def __init__(self, path, columns, first_step, accelerator):
        self.path, self.columns, self.accelerator = Path(path), columns, accelerator
        if not accelerator.is_main_process:
            return
        rows = []
        if first_step and self.path.is_file():
            with open(self.path, newline="") as file:
                rows = [r for r in csv.DictReader(file) if int(r["step"]) <= first_step]
        aside = self.path.with_suffix(".new")
        with open(aside, "w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(aside, self.path)

    def write(self, step, row):
        if self.accelerator.is_main_process:
            with open(self.path, "a", newline="") as file:
                csv.DictWriter(file, self.columns).writerow({"step": step, **row})
            self.accelerator.log(row, step=step)


class Progress:
    """Everything that a checkpoint holds: student, EMA, optimizer, gradient scaler, data position.

    Args:
        model: the student, as `accelerator.prepare` left it.
    """

    def __init__(self, model, optimizer, ema, accelerator):
        self.student, self.optimizer, self.ema, self.accelerator = (
            accelerator.unwrap_model(model),
            optimizer,
            ema,
            accelerator,
        )
        self.names = {p: name for name, p in self.student.named_parameters()}
        # DeepSpeed alone can put its part of weights and optimizer state away: a folder of its own, a file a process.
        self.engine = model if accelerator.distributed_type.value == "DEEPSPEED" else None

    def save(self, folder, step, stream, samples_a_step):
        """Every process must call it; the main one writes."""
        main = self.accelerator.is_main_process
        aside = make_aside(folder) if main else None
        tensors, plain = {}, {}
        if self.engine is not None:
            (aside,) = broadcast_object_list([aside])
            self.engine.save_checkpoint(aside, tag=ENGINE)
        else:
            tensors, plain = optimizer_tensors(self.optimizer, self.names)
            tensors |= {f"model.{k}": gathered(v) for k, v in self.student.state_dict().items()}
        if self.ema:
            tensors |= {f"ema.{i}": gathered(v) for i, v in enumerate(self.ema.shadow_params)}
        if main:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler else None
            state = {
                "step": step,
                "stream": stream,
                "optimizer": plain,
                "scaler": scaler,
                "samples_a_step": samples_a_step,
            }
            save_checkpoint(folder, aside, tensors, state)

    @torch.no_grad()
    def load(self, folder, samples_a_step):
        """The step to go on with and the state of the data."""
        tensors, state = load_checkpoint(folder)
        if state["samples_a_step"] != samples_a_step:
            raise ValueError(
                f"{folder}: was trained with {state['samples_a_step']} samples a step, now it is {samples_a_step}; keep processes x batch size x "
                "accumulation, or the same samples would not follow"
            )
        if (self.engine is not None) != (Path(folder) / ENGINE).is_dir():
            raise ValueError(f"{folder}: a run under DeepSpeed goes on under DeepSpeed, any other one without it")
        if self.engine is not None:
            self.engine.load_checkpoint(folder, tag=ENGINE)
            return state["step"], state["stream"]
        now = self.student.state_dict()
        model = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
        try:
            self.student.load_state_dict({k: split_as(v, now[k]) if k in now else v for k, v in model.items()})
        except RuntimeError as error:
            raise ValueError(f"{folder}: the checkpoint is of another student: {error}") from error
        restore_optimizer(self.optimizer, self.names, tensors, state["optimizer"])
        if self.ema:
            if "ema.0" not in tensors:
                raise ValueError(f"{folder}: was trained without --use_ema; leave it out here too")
            for i, shadow in enumerate(self.ema.shadow_params):
                shadow.copy_(split_as(tensors[f"ema.{i}"], shadow))
            self.ema.optimization_step = state["step"]
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return state["step"], state["stream"]
