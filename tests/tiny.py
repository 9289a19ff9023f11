"""Tiny pipelines with random weights, built in well under a second, and a record of everything that a call could change."""

from __future__ import annotations

import copy
import functools
import random
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PROMPTS = ["red heart", "cat face", "pizza"]

UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}

UNCONDITIONAL_UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}


@functools.cache
def tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer(model_max_length=16).train_new_from_iterator(PROMPTS, vocab_size=600)


def unet(seed: int = 0, **changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    return UNet2DConditionModel(**{**UNET, **changes}).eval()


def unet_call(size: tuple[int, int] = (8, 8), batch: int = 2, channels: int = 4) -> dict[str, Any]:
    """Arguments of one call of `unet()`."""
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(batch, channels, *size, generator=generator),
        "timestep": torch.tensor(10),
        "encoder_hidden_states": torch.randn(batch, 5, UNET["cross_attention_dim"], generator=generator),
    }


@torch.no_grad()
def output(model: torch.nn.Module, call: dict[str, Any]) -> torch.Tensor:
    return model(**call).sample


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1, num_train_timesteps=100)


def vae(seed: int = 0) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=16,
    ).eval()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stable_diffusion(seed: int = 0) -> StableDiffusionPipeline:
    """Text to 16x16 pictures over 8x8 latents."""
    denoiser, autoencoder = unet(seed), vae(seed)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer()),
        bos_token_id=tokenizer().bos_token_id,
        eos_token_id=tokenizer().eos_token_id,
        pad_token_id=tokenizer().pad_token_id,
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    torch.manual_seed(seed)
    return quiet(
        StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=CLIPTextModel(text).eval(),
            tokenizer=tokenizer(),
            unet=denoiser,
            scheduler=scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )


def unconditional_unet(seed: int = 0) -> UNet2DModel:
    torch.manual_seed(seed)
    return UNet2DModel(**UNCONDITIONAL_UNET).eval()


def ddpm() -> DDPMPipeline:
    return quiet(DDPMPipeline(unet=unconditional_unet(), scheduler=DDPMScheduler(num_train_timesteps=100)))


def ddim() -> DDIMPipeline:
    return quiet(DDIMPipeline(unet=unconditional_unet(), scheduler=scheduler()))


def ldm() -> LDMPipeline:
    torch.manual_seed(0)
    autoencoder = VQModel(
        block_out_channels=[16, 32],
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        latent_channels=3,
        norm_num_groups=8,
        num_vq_embeddings=16,
    ).eval()
    return quiet(LDMPipeline(vqvae=autoencoder, unet=unconditional_unet(), scheduler=scheduler()))


def audio_diffusion() -> Any:
    """An `AudioDiffusionPipeline`: sounds of 0.25 s by way of 8x8 mel spectrograms."""
    from diffusers import AudioDiffusionPipeline, Mel  # imports librosa, which takes seconds

    torch.manual_seed(0)
    denoiser = UNet2DModel(**{**UNCONDITIONAL_UNET, "in_channels": 1, "out_channels": 1}).eval()
    mel = Mel(x_res=8, y_res=8, sample_rate=8000, n_fft=512, hop_length=256, n_iter=2)
    return quiet(AudioDiffusionPipeline(vqvae=None, unet=denoiser, mel=mel, scheduler=scheduler()))


def dit() -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
        attention_bias=True, activation_fn="gelu-approximate",
    ).eval()  # fmt: skip
    return quiet(DiTPipeline(transformer=transformer, vae=vae(), scheduler=scheduler()))


# ---- what a call could change --------------------------------------------------------------------------------------


def snapshot(pipe: Any) -> dict[str, Any]:
    """Everything that scoring must leave as it was, in comparable form."""
    state: dict[str, Any] = {
        "attributes": {k: id(v) for k, v in vars(pipe).items() if not k.startswith("_ld_pruner_")},
        "scheduler": copy.deepcopy(vars(pipe.scheduler)),
        "scheduler class": {k: v for k, v in vars(type(pipe.scheduler)).items() if k != "__slotnames__"},
        "torch random state": torch.get_rng_state(),
        "numpy random state": np.random.get_state()[1].tolist(),
        "python random state": random.getstate(),
        "gradients on": torch.is_grad_enabled(),
        "config": dict(pipe.config),
    }
    for component, model in pipe.components.items():
        if not isinstance(model, torch.nn.Module):
            continue
        for path, module in model.named_modules(remove_duplicate=False):
            where = f"{component}.{path}"
            state[where] = (id(module), type(module), module.training, sorted(vars(module)))
            state[f"{where} processor"] = id(getattr(module, "processor", None))
            state[f"{where} hooks"] = [list(v) for k, v in sorted(vars(module).items()) if k.endswith("_hooks")]
        for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
            state[f"{component}.{path} tensor"] = (id(tensor), tensor.requires_grad, tensor.grad is None)
            state[f"{component}.{path} values"] = tensor.detach().clone()
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Names of what is not as before; [] if nothing changed."""
    return [k for k in {**before, **after} if k not in before or k not in after or not _equal(before[k], after[k])]


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def picture(pipe: Any, **call: Any) -> np.ndarray:
    """The picture that the pipeline draws from the caller's random state."""
    return np.asarray(pipe(**{"num_inference_steps": 2, "output_type": "np", **call}).images[0])
