"""LoRA made for the original of a pruned pipeline: which of its layers still fit, and loading those."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import nn

from .latents import find_denoiser
from .modeling import RECORD_KEY
from .presets import PRESETS, teacher_key

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class LoraFit:
    """Which layers of a LoRA fit a pruned model.

    Attributes:
        component: the pipeline's name of the model.
        fitting: path of a layer in the LoRA -> its path in the model; another one where blocks were numbered anew.
        gone: paths of layers that the model has lost.
        misshapen: path -> what does not agree.
        elsewhere: number of keys for the pipeline's other models, which are loaded as they are.
    """

    component: str
    fitting: dict[str, str]
    gone: tuple[str, ...] = ()
    misshapen: dict[str, str] = field(default_factory=dict)
    elsewhere: int = 0

    def __str__(self) -> str:
        total = len(self.fitting) + len(self.gone) + len(self.misshapen)
        lines = [f"{self.component}: {len(self.fitting)} of {total} LoRA layers fit"]
        moved = sum(old != new for old, new in self.fitting.items())
        if moved:
            lines.append(f"  {moved} of them in blocks that are numbered anew")
        lines += [f"  gone: {path}" for path in self.gone]
        lines += [f"  misshapen: {path} ({why})" for path, why in self.misshapen.items()]
        if self.elsewhere:
            lines.append(f"{self.elsewhere} keys of other models are loaded as they are")
        return "\n".join(lines)


def lora_fit(pipe: Any, lora: str | os.PathLike | Mapping[str, torch.Tensor], **kwargs: Any) -> LoraFit:
    """Which layers of a LoRA, made for the original pipeline, fit this pruned one; nothing is loaded into it.

    Args:
        lora: what `pipe.load_lora_weights` takes: a folder, a file, a Hub id or a state dict, in any format that it knows.
        **kwargs: of `load_lora_weights`, such as `weight_name`.

    Raises:
        ValueError: the pipeline takes no LoRA.

    Example:
        >>> print(lora_fit(pipe, "pytorch_lora_weights.safetensors"))
    """
    component = _denoiser_with_lora(pipe)
    if "unet" in component and "unet_config" not in kwargs and "XL" in type(pipe).__name__:
        kwargs["unet_config"] = pipe.unet.config
    return _match(pipe, component, _read(pipe.lora_state_dict, lora, kwargs)[0])


def load_lora(pipe: Any, lora: str | os.PathLike | Mapping[str, torch.Tensor], **kwargs: Any) -> LoraFit:
    """Load those layers of a LoRA that fit; `pipe.load_lora_weights` for pruned pipelines.

    Returns:
        What was loaded and what was not.

    Raises:
        ValueError: the pipeline takes no LoRA, or none of the layers fits.

    Example:
        >>> fit = load_lora(pipe, "me/lora-of-the-original", adapter_name="style")
    """
    component = _denoiser_with_lora(pipe)
    read, found = pipe.lora_state_dict, []

    def fitting_only(*args: Any, **options: Any) -> Any:
        result = read(*args, **options)
        parts = list(result) if isinstance(result, tuple) else [result]
        fit = _match(pipe, component, parts[0])
        found.append(fit)
        if not fit.fitting:
            raise ValueError(f"LoRA: none of its layers fits; {fit}")
        parts = [_keep(part, fit) for part in parts]
        return tuple(parts) if isinstance(result, tuple) else parts[0]

    pipe.lora_state_dict = fitting_only  # the pipeline's own loader reads through it
    try:
        pipe.load_lora_weights(dict(lora) if isinstance(lora, Mapping) else lora, **kwargs)
    finally:
        del pipe.lora_state_dict
    return found[-1]


def _denoiser_with_lora(pipe: Any) -> str:
    if not hasattr(pipe, "load_lora_weights"):
        raise ValueError(f"{type(pipe).__name__} takes no LoRA; expected a pipeline with load_lora_weights")
    return find_denoiser(pipe)


def _read(read: Any, lora: Any, kwargs: dict[str, Any]) -> tuple[State, ...]:
    result = read(dict(lora) if isinstance(lora, Mapping) else lora, **kwargs)
    return result if isinstance(result, tuple) else (result,)


# ---- matching --------------------------------------------------------------------------------------------------------


def _layers(state: Mapping[str, torch.Tensor], component: str) -> dict[str, dict[str, torch.Tensor]]:
    """path of a layer -> its tensors by their names in peft's format ("lora_A.weight", ...)."""
    own = {k.removeprefix(f"{component}."): v for k, v in state.items() if k.startswith(f"{component}.")}
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in _to_peft(own).items():
        path, _, name = key.partition(".lora_")
        layers.setdefault(path, {})[f"lora_{name}"] = value
    return layers


def _to_peft(state: State) -> State:
    return state if not state or "lora_A" in next(iter(state)) else convert_unet_state_dict_to_peft(state)


def _match(pipe: Any, component: str, state: Mapping[str, torch.Tensor]) -> LoraFit:
    model = getattr(pipe, component)
    modules = {original_path(model, path): (path, module) for path, module in model.named_modules()}
    fitting, gone, misshapen = {}, [], {}
    for path, tensors in _layers(state, component).items():
        here, module = modules.get(path, ("", None))
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor):
            gone.append(path)
        elif why := _misfit(weight, tensors):
            misshapen[path] = why
        else:
            fitting[path] = here
    elsewhere = sum(not key.startswith(f"{component}.") for key in state)
    return LoraFit(component, fitting, tuple(gone), misshapen, elsewhere)


def _misfit(weight: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> str:
    """Why the LoRA's matrices cannot be added to a weight (out, in, ...); "" if they can."""
    a, b = tensors.get("lora_A.weight"), tensors.get("lora_B.weight")
    if a is None or b is None:
        return f"has {sorted(tensors)}, expected lora_A.weight and lora_B.weight"
    wanted = tuple(weight.shape)
    got = (b.shape[0], *a.shape[1:])
    return "" if got == wanted else f"made for a weight {got}, the model's is {wanted}"


def original_path(model: nn.Module, path: str) -> str:
    """Where a module of a pruned model was in its original; the same path, unless a stock config numbers blocks anew."""
    record = model.config.get(RECORD_KEY) if isinstance(model, ConfigMixin) else None
    while record:
        preset = PRESETS.get(record["how"])
        path = _shifted(path, record["removed"]) if preset is None else teacher_key(preset, path)
        record = record.get("earlier")
    return path


def _shifted(path: str, removed: list[str]) -> str:
    """`path` with its indices as they were before the blocks `removed` left their lists."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            parent = ".".join(parts[:i])
            gone = {int(m[1]) for p in removed if (m := re.fullmatch(re.escape(parent) + r"\.(\d+)", p))}
            stays = (n for n in range(int(part) + len(gone) + 1) if n not in gone)
            parts[i] = str([next(stays) for _ in range(int(part) + 1)][-1])
    return ".".join(parts)


# ---- keeping what fits -----------------------------------------------------------------------------------------------


def _keep(part: Any, fit: LoraFit) -> Any:
    """A state dict, network alphas or metadata of the LoRA with only the layers that fit, at their paths in the model."""
    if not isinstance(part, Mapping):
        return part
    prefix = f"{fit.component}."
    if f"{prefix}target_modules" in part:
        return {**part, f"{prefix}target_modules": list(fit.fitting.values())}
    kept = {k: v for k, v in part.items() if not k.startswith(prefix)}
    own = {k.removeprefix(prefix): v for k, v in part.items() if k.startswith(prefix)}
    own = _to_peft(own) if any(isinstance(v, torch.Tensor) for v in own.values()) else own
    for key, value in own.items():
        path = re.split(r"\.lora_|\.alpha$", key)[0]
        if path in fit.fitting:
            kept[f"{prefix}{fit.fitting[path]}{key.removeprefix(path)}"] = value
    return kept
