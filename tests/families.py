"""One tiny pipeline with random weights of every family of denoisers, and the arguments of one call.

Prompts go in as embeddings where the pipeline allows it: the text encoder is no part of what is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers as d
import tiny
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

Built = tuple[Any, dict[str, Any]]

FAMILIES: dict[str, Callable[[], Built]] = {}
MORE: dict[str, Callable[[], Built]] = {}
"""Those of `more_families.py` and `variant_families.py`."""
SEVERAL = {
    "wan_2_2": ("transformer", "transformer_2"),
    "kandinsky_combined": ("unet", "prior_prior"),
    "cascade_combined": ("decoder", "prior_prior"),
    "ideogram4": ("transformer", "unconditional_transformer"),
    "unclip": ("prior", "decoder", "super_res_first", "super_res_last"),
}
"""Families with more than one denoiser."""


def family(build: Callable[[], Built]) -> Callable[[], Built]:
    FAMILIES[build.__name__] = build
    return build


def further(build: Callable[[], Built]) -> Callable[[], Built]:
    MORE[build.__name__] = build
    return build


def make(name: str) -> Built:
    """The pipeline of that family and the arguments of its call; the same weights each time."""
    torch.manual_seed(0)
    pipe, call = {**FAMILIES, **MORE}[name]()
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    wake(pipe)
    return tiny.quiet(pipe), call


def wake(pipe: Any) -> None:
    """Give the parameters that start as zeros (gates, last layers) values, or nothing behind them would reach the output."""
    generator = torch.Generator().manual_seed(1)
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module) and any(
            word in name for word in ("unet", "transformer", "prior", "decoder", "control")
        ):
            for p in part.parameters():
                if not p.detach().any():
                    p.data.copy_(0.1 * torch.randn(p.shape, generator=generator))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def embeds(tokens: int, width: int, pooled: int = 0, mask: str = "") -> dict[str, torch.Tensor]:
    """Embeddings of a prompt and of a negative one, with `pooled` ones and masks where the pipeline takes them."""
    call = {"prompt_embeds": noise(1, tokens, width), "negative_prompt_embeds": noise(1, tokens, width, seed=1)}
    if pooled:
        call |= {"pooled_prompt_embeds": noise(1, pooled), "negative_pooled_prompt_embeds": noise(1, pooled, seed=1)}
    if mask:
        ones = torch.ones(1, tokens, dtype=torch.long)
        call |= {"prompt_" + mask: ones, "negative_prompt_" + mask: ones.clone()}
    return call


def picture(size: int = 16, shade: int = 120) -> Image.Image:
    return Image.new("RGB", (size, size), (shade, 40, 200))


def mask(size: int = 16) -> Image.Image:
    image = Image.new("L", (size, size), 0)
    image.paste(255, (0, 0, size // 2, size))
    return image


def autoencoder(latent_channels: int = 4, widths: Sequence[int] = (16, 32), **changes: Any) -> d.AutoencoderKL:
    return d.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=["DownEncoderBlock2D"] * len(widths),
        up_block_types=["UpDecoderBlock2D"] * len(widths),
        latent_channels=latent_channels,
        norm_num_groups=widths[0] // 2,
        sample_size=16,
        **{"shift_factor": 0.0, "scaling_factor": 1.0, **changes},
    )


def vision() -> CLIPVisionModelWithProjection:
    sizes = {"hidden_size": 32, "projection_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    return CLIPVisionModelWithProjection(
        CLIPVisionConfig(image_size=224, intermediate_size=37, patch_size=32, **sizes)
    )


def text_with_projection() -> tuple[CLIPTextModelWithProjection, CLIPTokenizer]:
    tokenizer = CLIPTokenizer(model_max_length=77).train_new_from_iterator(tiny.PROMPTS, vocab_size=600)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4,
        projection_dim=32, max_position_embeddings=77, eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return CLIPTextModelWithProjection(text), tokenizer


def t5(vocab_size: int = 16) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=vocab_size, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=16, n_embd=8, n_layer=1, n_head=2))


def image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(crop_size=224, size=224)


def flow() -> d.FlowMatchEulerDiscreteScheduler:
    return d.FlowMatchEulerDiscreteScheduler()


SIZE = {"height": 16, "width": 16}


# ---- U-Nets ----------------------------------------------------------------------------------------------------------


@family
def ddpm() -> Built:
    return tiny.ddpm(), {}


@family
def sd() -> Built:
    return tiny.stable_diffusion(), {"prompt": "red heart"}


@family
def sd_img2img() -> Built:
    pipe = d.StableDiffusionImg2ImgPipeline.from_pipe(tiny.stable_diffusion())
    return pipe, {"prompt": "red heart", "image": picture(), "strength": 1.0}


@family
def sd_inpaint() -> Built:
    pipe = d.StableDiffusionInpaintPipeline.from_pipe(tiny.stable_diffusion())
    return pipe, {"prompt": "pizza", "image": picture(), "mask_image": mask(), "strength": 1.0, **SIZE}


@family
def sd_controlnet() -> Built:
    pipe = tiny.stable_diffusion()
    controlnet = d.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(16, 32))
    return d.StableDiffusionControlNetPipeline(**pipe.components, controlnet=controlnet), {
        "prompt": "red heart",
        "image": picture(),
    }


@family
def sd_adapter() -> Built:
    pipe = tiny.stable_diffusion()
    adapter = d.T2IAdapter(in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=2)
    parts = {k: v for k, v in pipe.components.items() if k != "image_encoder"}
    return d.StableDiffusionAdapterPipeline(**parts, adapter=adapter), {"prompt": "red heart", "image": picture()}


def sdxl_unet(**changes: Any) -> d.UNet2DConditionModel:
    sizes = {
        "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (2, 4),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "transformer_layers_per_block": (1, 2), "projection_class_embeddings_input_dim": 80,
        "cross_attention_dim": 64, "norm_num_groups": 8,
    }  # fmt: skip
    return d.UNet2DConditionModel(**{**sizes, **changes})


@family
def sdxl() -> Built:
    pipe = d.StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None,
        unet=sdxl_unet(), scheduler=d.EulerDiscreteScheduler(num_train_timesteps=100, steps_offset=1),
        add_watermarker=False,
    )  # fmt: skip
    return pipe, {**embeds(7, 64, pooled=32), **SIZE}


@family
def animatediff() -> Built:
    adapter = d.MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4
    )
    parts = tiny.stable_diffusion().components
    parts = {k: v for k, v in parts.items() if k not in ("safety_checker",)}
    return d.AnimateDiffPipeline(**parts, motion_adapter=adapter), {"prompt": "red heart", "num_frames": 2}


@family
def text_to_video() -> Built:
    unet = d.UNet3DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, sample_size=8,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=32, attention_head_dim=4, norm_num_groups=2,
    )  # fmt: skip
    pipe = d.TextToVideoSDPipeline(
        vae=autoencoder(), text_encoder=None, tokenizer=None, unet=unet, scheduler=tiny.scheduler()
    )
    return pipe, {**embeds(7, 32), **SIZE, "num_frames": 2}


@family
def svd() -> Built:
    unet = d.UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, sample_size=8, in_channels=8, out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=32, num_attention_heads=8, projection_class_embeddings_input_dim=96,
        addition_time_embed_dim=32, num_frames=2,
    )  # fmt: skip
    vae = d.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 64), down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=4
    )
    scheduler = d.EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_min=0.002,
        sigma_max=700.0, num_train_timesteps=100,
    )  # fmt: skip
    pipe = d.StableVideoDiffusionPipeline(
        vae=vae, image_encoder=vision(), unet=unet, scheduler=scheduler, feature_extractor=image_processor()
    )
    return pipe, {"image": picture(32), "height": 32, "width": 32, "num_frames": 2}


@family
def audioldm2() -> Built:
    unet = d.AudioLDM2UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, sample_size=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=[[None, 8, 16], [None, 8, 16]],
    )  # fmt: skip
    vocoder = SpeechT5HifiGan(
        SpeechT5HifiGanConfig(
            model_in_dim=8, upsample_initial_channel=16, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4],
            resblock_kernel_sizes=[3, 7], resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]], normalize_before=False,
        )
    )  # fmt: skip
    pipe = d.AudioLDM2Pipeline(
        vae=d.AutoencoderKL(
            block_out_channels=[16, 32], in_channels=1, out_channels=1, down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=8,
        ),
        text_encoder=None, text_encoder_2=t5(), projection_model=None, language_model=gpt2(), tokenizer=None,
        tokenizer_2=None, feature_extractor=None, unet=unet, scheduler=tiny.scheduler(), vocoder=vocoder,
    )  # fmt: skip
    ones = torch.ones(1, 5, dtype=torch.long)
    call = {"prompt_embeds": noise(1, 5, 16), "generated_prompt_embeds": noise(1, 8, 8), "attention_mask": ones}
    return pipe, {**call, "guidance_scale": 1.0, "audio_length_in_s": 0.005}


def kandinsky_unet(**changes: Any) -> d.UNet2DConditionModel:
    sizes = {
        "in_channels": 4, "out_channels": 8, "addition_embed_type": "image",
        "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "block_out_channels": (32, 64), "layers_per_block": 1,
        "encoder_hid_dim": 32, "encoder_hid_dim_type": "image_proj", "cross_attention_dim": 32,
        "attention_head_dim": 4, "resnet_time_scale_shift": "scale_shift",
    }  # fmt: skip
    return d.UNet2DConditionModel(**{**sizes, **changes})


@family
def kandinsky_decoder() -> Built:
    movq = d.VQModel(
        block_out_channels=[32, 64], down_block_types=["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        latent_channels=4, layers_per_block=1, norm_num_groups=8, norm_type="spatial", num_vq_embeddings=12,
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D"], vq_embed_dim=4,
    )  # fmt: skip
    pipe = d.KandinskyV22Pipeline(unet=kandinsky_unet(), movq=movq, scheduler=tiny.scheduler())
    return pipe, {
        "image_embeds": noise(1, 32),
        "negative_image_embeds": noise(1, 32, seed=1),
        "height": 32,
        "width": 32,
    }


@family
def kandinsky_prior() -> Built:
    text_encoder, tokenizer = text_with_projection()
    pipe = d.KandinskyV22PriorPipeline(
        prior=d.PriorTransformer(num_attention_heads=2, attention_head_dim=12, embedding_dim=32, num_layers=2),
        image_encoder=vision(), text_encoder=text_encoder, tokenizer=tokenizer,
        scheduler=d.UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample=True, clip_sample_range=5.0
        ),
        image_processor=image_processor(),
    )  # fmt: skip
    return pipe, {"prompt": "red heart"}


@family
def cascade_prior() -> Built:
    text_encoder, tokenizer = text_with_projection()
    prior = d.StableCascadeUNet(
        conditioning_dim=128, block_out_channels=(128, 128), num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), clip_image_in_channels=32,
        clip_text_in_channels=32, clip_text_pooled_in_channels=32, switch_level=(False,),
    )  # fmt: skip
    pipe = d.StableCascadePriorPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, prior=prior, scheduler=d.DDPMWuerstchenScheduler()
    )
    return pipe, {"prompt": "red heart", "height": 128, "width": 128}


@family
def cascade_decoder() -> Built:
    from diffusers.pipelines.stable_cascade.pipeline_stable_cascade import PaellaVQModel

    text_encoder, tokenizer = text_with_projection()
    decoder = d.StableCascadeUNet(
        in_channels=4, out_channels=4, conditioning_dim=64, block_out_channels=(16, 32), num_attention_heads=(-1, 2),
        down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 2),
        block_types_per_layer=(
            ("SDCascadeResBlock", "SDCascadeTimestepBlock"),
            ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),
        ),
        switch_level=None, clip_text_pooled_in_channels=32, effnet_in_channels=16, patch_size=1, kernel_size=3,
        timestep_ratio_embedding_dim=16, dropout=(0.0, 0.0),
    )  # fmt: skip
    pipe = d.StableCascadeDecoderPipeline(
        decoder=decoder, tokenizer=tokenizer, text_encoder=text_encoder, scheduler=d.DDPMWuerstchenScheduler(),
        vqgan=PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2), latent_dim_scale=4.0,
    )  # fmt: skip
    return pipe, {"image_embeddings": noise(1, 16, 4, 4), "prompt": "red heart", "guidance_scale": 2.0}


# ---- transformers ----------------------------------------------------------------------------------------------------


@family
def dit() -> Built:
    return tiny.dit(), {"class_labels": [1]}


@family
def pixart() -> Built:
    transformer = d.PixArtTransformer2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, norm_type="ada_norm_single",
    )  # fmt: skip
    pipe = d.PixArtSigmaPipeline(
        tokenizer=None, text_encoder=None, vae=autoencoder(), transformer=transformer, scheduler=tiny.scheduler()
    )
    call = {**embeds(7, 32, mask="attention_mask"), "negative_prompt": None, "use_resolution_binning": False}
    return pipe, {**call, **SIZE}


@family
def sd3() -> Built:
    transformer = d.SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    pipe = d.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=flow(), vae=autoencoder(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    return pipe, {**embeds(7, 32, pooled=64), **SIZE}


@family
def sd3_img2img() -> Built:
    pipe, call = sd3()
    return d.StableDiffusion3Img2ImgPipeline(**pipe.components), {**call, "image": picture(), "strength": 1.0}


@family
def flux() -> Built:
    transformer = d.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    pipe = d.FluxPipeline(
        scheduler=flow(), vae=autoencoder(1), text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        transformer=transformer,
    )  # fmt: skip
    return pipe, {"prompt_embeds": noise(1, 7, 32), "pooled_prompt_embeds": noise(1, 32), **SIZE}


@family
def aura_flow() -> Built:
    transformer = d.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, pos_embed_max_size=64, joint_attention_dim=32, out_channels=4,
    )  # fmt: skip
    pipe = d.AuraFlowPipeline(
        tokenizer=None, text_encoder=None, vae=autoencoder(), transformer=transformer, scheduler=flow()
    )
    return pipe, {**embeds(7, 32, mask="attention_mask"), **SIZE}


@family
def sana() -> Built:
    transformer = d.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=8,
    )  # fmt: skip
    two = {"block_types": ("ResBlock", "EfficientViTBlock"), "block_out_channels": (8, 8), "layers_per_block": (1, 1)}
    sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in two.items()}
    vae = d.AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)), downsample_block_type="conv", upsample_block_type="interpolate", **sides,
    )  # fmt: skip
    pipe = d.SanaPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=flow())
    call = {**embeds(7, 8, mask="attention_mask"), "negative_prompt": None, "use_resolution_binning": False}
    return pipe, {**call, "height": 32, "width": 32}


@family
def lumina2() -> Built:
    transformer = d.Lumina2Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, hidden_size=8, num_layers=2, num_refiner_layers=1,
        num_attention_heads=1, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2), axes_lens=(64, 64, 64),
        cap_feat_dim=8,
    )  # fmt: skip
    pipe = d.Lumina2Pipeline(
        transformer=transformer, scheduler=flow(), vae=autoencoder(), text_encoder=None, tokenizer=None
    )
    return pipe, {**embeds(7, 8, mask="attention_mask"), **SIZE}


@family
def qwen_image() -> Built:
    transformer = d.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = d.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False], latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = d.QwenImagePipeline(scheduler=flow(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    call = {"prompt_embeds": noise(1, 7, 16), "prompt_embeds_mask": torch.ones(1, 7, dtype=torch.long)}
    return pipe, {**call, "true_cfg_scale": 1.0, **SIZE}


def wan_transformer() -> d.WanTransformer3DModel:
    return d.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=16,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip


def wan_vae() -> d.AutoencoderKLWan:
    return d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def wan_pipeline(**second: Any) -> Built:
    scheduler = d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = d.WanPipeline(
        tokenizer=None, text_encoder=None, vae=wan_vae(), scheduler=scheduler, transformer=wan_transformer(), **second
    )
    return pipe, {**embeds(7, 32), "num_frames": 5, **SIZE}


@family
def wan() -> Built:
    return wan_pipeline()


@family
def wan_2_2() -> Built:
    return wan_pipeline(transformer_2=wan_transformer(), boundary_ratio=0.9)


@family
def ltx() -> Built:
    transformer = d.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=4, attention_head_dim=8, cross_attention_dim=32,
        num_layers=2, caption_channels=32,
    )  # fmt: skip
    scaling = (True, True, False, False)
    vae = d.AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=scaling,
        decoder_spatio_temporal_scaling=scaling, decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4, patch_size=1, patch_size_t=1,
    )  # fmt: skip
    pipe = d.LTXPipeline(scheduler=flow(), vae=vae, text_encoder=None, tokenizer=None, transformer=transformer)
    return pipe, {**embeds(7, 32, mask="attention_mask"), "num_frames": 9, "height": 32, "width": 32}


@family
def cogvideox() -> Built:
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=2, sample_width=2, sample_height=2, sample_frames=9, max_text_seq_length=16,
    )  # fmt: skip
    vae = d.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    pipe = d.CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=vae, transformer=transformer, scheduler=d.CogVideoXDDIMScheduler()
    )
    return pipe, {**embeds(16, 32), "num_frames": 9, **SIZE}


@family
def hunyuan_dit() -> Built:
    transformer = d.HunyuanDiT2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    pipe = d.HunyuanDiTPipeline(
        vae=autoencoder(), text_encoder=None, tokenizer=None, transformer=transformer,
        scheduler=d.DDPMScheduler(num_train_timesteps=100), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    first, second = embeds(77, 32, mask="attention_mask"), embeds(256, 32, mask="attention_mask")
    call = {**first, **{f"{k}_2": v for k, v in second.items()}, "use_resolution_binning": False}
    return pipe, {**call, **SIZE}


@family
def hunyuan_video() -> Built:
    transformer = d.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    vae = d.AutoencoderKLHunyuanVideo(
        latent_channels=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4, block_out_channels=(8,) * 4, layers_per_block=1,
        norm_num_groups=4,
    )  # fmt: skip
    pipe = d.HunyuanVideoPipeline(
        text_encoder=None, tokenizer=None, transformer=transformer, vae=vae, scheduler=flow(), text_encoder_2=None,
        tokenizer_2=None,
    )  # fmt: skip
    call = {"prompt_embeds": noise(1, 7, 16), "pooled_prompt_embeds": noise(1, 8)}
    return pipe, {**call, "prompt_attention_mask": torch.ones(1, 7, dtype=torch.long), "num_frames": 5, **SIZE}


@family
def stable_audio() -> Built:
    transformer = d.StableAudioDiTModel(
        sample_size=4, in_channels=3, num_layers=2, attention_head_dim=4, num_attention_heads=2,
        num_key_value_attention_heads=2, out_channels=3, cross_attention_dim=4, time_proj_dim=8,
        global_states_input_dim=8, cross_attention_input_dim=4,
    )  # fmt: skip
    vae = d.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=3,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    pipe = d.StableAudioPipeline(
        vae=vae, text_encoder=None,
        projection_model=d.pipelines.stable_audio.StableAudioProjectionModel(4, 4, 0, 32), tokenizer=None,
        transformer=transformer,
        scheduler=d.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
    )  # fmt: skip
    return pipe, embeds(7, 4)
