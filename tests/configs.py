"""Public architectures as configs (random weights, built on `meta`), and the shapes of one denoiser call of each."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import nn

SD_V1 = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}

SD_V2 = {
    **SD_V1,
    "sample_size": 96,
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "upcast_attention": True,
}

SDXL = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "layers_per_block": 2,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}

LDM_CELEBA_HQ = {  # CompVis/ldm-celebahq-256
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "attention_head_dim": 32,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}

LATENT_AUDIO_DIFFUSION = {  # teticio/latent-audio-diffusion-256
    "sample_size": 32,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [128, 128, 256, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
}


def on_meta(model_class: type[nn.Module], config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return model_class(**config).eval()


def meta_call(config: dict[str, Any], size: int | None = None) -> dict[str, Any]:
    """Arguments of one call for one sample, on `meta`."""
    size = size or config["sample_size"]
    with torch.device("meta"):
        call: dict[str, Any] = {
            "sample": torch.empty(1, config["in_channels"], size, size),
            "timestep": torch.tensor(1),
        }
        if "cross_attention_dim" in config:
            call["encoder_hidden_states"] = torch.empty(1, 77, config["cross_attention_dim"])
        if config.get("addition_embed_type") == "text_time":
            call["added_cond_kwargs"] = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
    return call


UNETS = {  # name -> (class, config, millions of parameters)
    "sd-v1.4": (UNet2DConditionModel, SD_V1, 859.5),
    "sd-v2.1": (UNet2DConditionModel, SD_V2, 865.9),
    "sdxl": (UNet2DConditionModel, SDXL, 2567.5),
    "ldm-celebahq": (UNet2DModel, LDM_CELEBA_HQ, 274.1),
    "latent-audio-diffusion": (UNet2DModel, LATENT_AUDIO_DIFFUSION, 113.7),
}
