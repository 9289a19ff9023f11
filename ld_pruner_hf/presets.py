"""Hand-made plans from the literature: which blocks of a Stable Diffusion U-Net go, and whose weights the rest inherits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn

from .modeling import plan_of
from .stock import StockRecord, restructure_

_BK_SDM = "BK-SDM, arXiv 2305.15798, section 3"
_KOALA = "KOALA, arXiv 2312.04005, and the configs of etri-vilab/koala-700m and koala-1b; inheritance as in BK-SDM, first layers: ours"
_SSD = "SSD-1B and Vega, arXiv 2401.02677, and the configs of segmind/SSD-1B and Segmind-Vega; inheritance of the first layers: ours"

_SD_STAGES = (("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",), ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
_SDXL_STAGES = (("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2, ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",))

_PAIR = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)(.*)", re.DOTALL)
_UP_BLOCK = re.compile(r"up_blocks\.(\d+)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Preset:
    """One hand-made plan.

    Attributes:
        source: the paper, and what of the plan is not in it.
        family: "sd" (Stable Diffusion 1 and 2), "sdxl", or "any" U-Net with a mid block.
        one_pair: keep pair 0 of the down stages and pairs 0 and 2 of the up stages (a pair is a resnet and its attention).
        mid: class of the new mid block, None to remove it, or "same".
        innermost: keep the innermost down and up stage.
        down_depth, up_depth: transformer layers to keep per stage and attention, the first ones; empty: all.
    """

    source: str
    family: str = "sd"
    one_pair: bool = True
    mid: str | None = "same"
    innermost: bool = True
    down_depth: tuple[Any, ...] = ()
    up_depth: tuple[Any, ...] = ()
    about: str = field(default="", compare=False)


PRESETS: dict[str, Preset] = {
    "no-mid-block": Preset(_BK_SDM, "any", one_pair=False, mid=None, about="the mid block alone"),
    "bk-sdm-base": Preset(_BK_SDM, about="the second pair of every stage"),
    "bk-sdm-small": Preset(_BK_SDM, mid=None, about="bk-sdm-base, and the mid block"),
    "bk-sdm-tiny": Preset(_BK_SDM, mid=None, innermost=False, about="bk-sdm-small, and the innermost stages"),
    "koala-1b": Preset(_KOALA, "sdxl", down_depth=(1, 2, 6), about="second pairs; 6 of 10 transformer layers"),
    "koala-700m": Preset(_KOALA, "sdxl", mid=None, down_depth=(1, 2, 5), about="second pairs, mid block; 5 of 10 layers"),
    "ssd-1b": Preset(
        _SSD, "sdxl", one_pair=False, mid="UNetMidBlock2D", down_depth=(1, 2, 4), up_depth=((4, 4, 10), (2, 1, 1), 1),
        about="transformer layers; of the mid block one resnet stays",
    ),
    "segmind-vega": Preset(
        _SSD, "sdxl", one_pair=False, mid="UNetMidBlock2D", down_depth=(1, 1, 2), up_depth=(2, 1, 1),
        about="more transformer layers than ssd-1b",
    ),
}  # fmt: skip
"""name -> plan. The results are stock `UNet2DConditionModel`s."""


def find_preset(name: str) -> Preset:
    """The preset of that name; ValueError that lists the names if there is none."""
    if name not in PRESETS:
        raise ValueError(f"preset: got {name!r}, expected one of {list(PRESETS)}")
    return PRESETS[name]


def _per_stage(value: Any, stages: int) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] * stages


def check_architecture(name: str, model: nn.Module) -> None:
    """Raise ValueError if the preset was not made for U-Nets like this one: what was got, what is expected."""
    family = find_preset(name).family
    if not isinstance(model, UNet2DConditionModel):
        raise ValueError(
            f"preset {name!r}: got a {type(model).__name__}, expected a UNet2DConditionModel; use a plan or a budget"
        )
    if plan_of(model) is not None:
        raise ValueError(
            f"preset {name!r}: got a model that a plan has pruned, expected an unpruned one; load the original"
        )
    config: Any = model.config
    types = tuple(config.down_block_types), tuple(config.up_block_types)
    wanted: dict[str, tuple[Any, Any]] = {"mid_block_type": (config.mid_block_type, "UNetMidBlock2DCrossAttn")}
    if family == "any":
        wanted = {} if config.mid_block_type else {"mid_block_type": (None, "a mid block")}
    else:
        wanted["layers_per_block"] = (_per_stage(config.layers_per_block, len(types[0])), [2] * len(types[0]))
        wanted["block types"] = (types, _SD_STAGES if family == "sd" else _SDXL_STAGES)
    if family == "sdxl":
        wanted["transformer_layers_per_block"] = (_per_stage(config.transformer_layers_per_block, 3)[1:], [2, 10])
    for what, (got, expected) in wanted.items():
        if got != expected:
            kind = {"sd": "Stable Diffusion 1 or 2", "sdxl": "Stable Diffusion XL", "any": "a mid block"}[family]
            raise ValueError(f"preset {name!r} is for U-Nets of {kind}: {what} is {got}, expected {expected}")


def config_edits(preset: Preset, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config entries that the preset changes, with their new values."""
    edits: dict[str, Any] = {}
    if preset.one_pair:
        edits["layers_per_block"] = 1
    if preset.mid != "same":
        edits["mid_block_type"] = preset.mid
    if preset.down_depth:
        edits["transformer_layers_per_block"] = list(preset.down_depth)
    if preset.up_depth:
        edits["reverse_transformer_layers_per_block"] = [
            list(d) if isinstance(d, tuple) else d for d in preset.up_depth
        ]
    if not preset.innermost:
        stages = len(config["block_out_channels"])
        edits["up_block_types"] = list(config["up_block_types"][1:])
        for key, value in config.items():  # all that is given per stage, outermost first
            if (
                isinstance(value, (list, tuple))
                and len(value) == stages
                and not key.startswith("_")
                and key not in edits
            ):
                edits[key] = list(value[:-1])
    return edits


def teacher_key(preset: Preset, key: str) -> str:
    """Where a weight (or module) of the pruned model comes from (METHODS, BK-SDM: weight inheritance).

    >>> teacher_key(PRESETS["bk-sdm-tiny"], "up_blocks.0.resnets.1.conv1.weight")
    'up_blocks.1.resnets.2.conv1.weight'
    """
    if preset.one_pair and (pair := _PAIR.fullmatch(key)) is not None:
        side, stage, part, i, rest = pair.groups()
        key = f"{side}_blocks.{stage}.{part}.{2 if side == 'up' and i == '1' else i}{rest}"
    if not preset.innermost and (block := _UP_BLOCK.fullmatch(key)) is not None:
        key = f"up_blocks.{int(block[1]) + 1}{block[2]}"
    return key


def _narrowed_inputs(preset: Preset, config: Mapping[str, Any]) -> dict[str, list[int]]:
    """Input channels to keep of the first up resnet, where the removed innermost stages are wider than the next ones.

    The resnet reads the main branch and behind it a skip connection. In Stable Diffusion the two innermost stages are
    equally wide and nothing is cut; elsewhere the main branch gets narrower and its first channels are kept [ours].
    """
    channels = config["block_out_channels"]
    if preset.innermost or channels[-1] == channels[-2]:
        return {}
    if channels[-1] < channels[-2]:
        raise ValueError(
            f"block_out_channels is {list(channels)}: expected an innermost stage no narrower than the next one"
        )
    kept = [*range(channels[-2]), *range(channels[-1], channels[-1] + channels[-2])]
    return {f"up_blocks.0.resnets.0.{part}": kept for part in ("norm1", "conv1", "conv_shortcut")}


def apply_preset_(model: nn.Module, name: str, component: str = "") -> StockRecord:
    """Prune a Stable Diffusion U-Net by a hand-made plan, in place; the result is a stock `UNet2DConditionModel`.

    `model` stays the same object, so `pipe.unet` and every other reference to it see the change; dtype, device, hooks and
    attention processors of what remains are kept. Its config becomes the stock config of the smaller model, with a private
    entry `_pruned` that says what was done, so it saves and loads with plain diffusers.

    Args:
        name: one of `PRESETS`.

    Returns:
        What was done, with the number of parameters before and after.

    Raises:
        ValueError: unknown name (the names are listed), or a model of another architecture; the model is then as it was.

    Example:
        >>> record = apply_preset_(pipe.unet, "bk-sdm-small")
        >>> pipe.save_pretrained("small")
    """
    preset = find_preset(name)
    check_architecture(name, model)
    config: Any = model.config
    narrow = _narrowed_inputs(preset, config)
    edits = config_edits(preset, config)
    return restructure_(
        model,
        edits,
        lambda key: teacher_key(preset, key),
        how=name,
        source=preset.source,
        component=component,
        narrow=narrow,
    )
