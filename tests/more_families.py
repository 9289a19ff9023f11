"""Further tiny pipelines, for the table of all pipeline classes (`pipelines_table.py`); the suite runs those of `families.py`."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers as d
import families
import tiny
import torch
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder
from families import SIZE, Built, autoencoder, embeds, flow, further, noise, picture, wan_vae
from transformers import (
    ClapTextConfig,
    ClapTextModelWithProjection,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)


def assemble(kind: Any, **components: Any) -> Any:
    """The pipeline of these components; further ones that it demands are None."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    demanded = [p.name for p in parameters if p.default is p.empty and p.name != "self"]
    return kind(**{**dict.fromkeys(demanded), **components})


@further
def ldm() -> Built:
    return tiny.ldm(), {}


@further
def dance() -> Built:
    unet = d.UNet1DModel(
        block_out_channels=(32, 32, 64), extra_in_channels=64, sample_size=64, sample_rate=64, in_channels=2,
        out_channels=2, flip_sin_to_cos=True, use_timestep_embedding=False, time_embedding_type="fourier",
        mid_block_type="UNetMidBlock1D", down_block_types=("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D"),
        up_block_types=("AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
    )  # fmt: skip
    return d.DanceDiffusionPipeline(unet=unet, scheduler=d.IPNDMScheduler()), {"audio_length_in_s": 1.0}


@further
def chroma() -> Built:
    transformer = d.ChromaTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    pipe = assemble(d.ChromaPipeline, transformer=transformer, scheduler=flow(), vae=autoencoder(1))
    masks = {f"{sign}prompt_attention_mask": torch.ones(1, 7, dtype=torch.bool) for sign in ("", "negative_")}
    return pipe, {**embeds(7, 32), **masks, **SIZE}


@further
def cogview3() -> Built:
    transformer = d.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2, out_channels=4,
        text_embed_dim=32, time_embed_dim=8, condition_dim=2, pos_embed_max_size=8, sample_size=8,
    )  # fmt: skip
    pipe = assemble(
        d.CogView3PlusPipeline, transformer=transformer, scheduler=d.CogVideoXDDIMScheduler(), vae=autoencoder()
    )
    return pipe, {**embeds(7, 32), **SIZE}


def cogview4_transformer(in_channels: int) -> d.CogView4Transformer2DModel:
    return d.CogView4Transformer2DModel(
        patch_size=2, in_channels=in_channels, num_layers=2, attention_head_dim=4, num_attention_heads=4,
        out_channels=4, text_embed_dim=32, time_embed_dim=8, condition_dim=4, rope_axes_dim=(8, 8),
    )  # fmt: skip


@further
def cogview4() -> Built:
    pipe = assemble(d.CogView4Pipeline, transformer=cogview4_transformer(4), scheduler=flow(), vae=autoencoder())
    return pipe, {**embeds(16, 32), **SIZE}


@further
def cogview4_control() -> Built:
    transformer = cogview4_transformer(8)
    pipe = assemble(d.CogView4ControlPipeline, transformer=transformer, scheduler=flow(), vae=autoencoder())
    return pipe, {**embeds(16, 32), **SIZE, "control_image": picture()}


@further
def z_image() -> Built:
    transformer = d.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 32, 32],
    )  # fmt: skip
    pipe = assemble(d.ZImagePipeline, transformer=transformer, scheduler=flow(), vae=autoencoder())
    call = {"prompt_embeds": [noise(7, 16)], "negative_prompt_embeds": [noise(7, 16, seed=1)]}
    return pipe, {**call, "height": 32, "width": 32}


@further
def bria() -> Built:
    transformer = d.BriaTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=[0, 4, 4],
    )  # fmt: skip
    pipe = assemble(d.BriaPipeline, transformer=transformer, scheduler=flow(), vae=autoencoder())
    return pipe, {**embeds(7, 32), **SIZE}


@further
def flux2() -> Built:
    transformer = d.Flux2Transformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    vae = d.AutoencoderKLFlux2(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        latent_channels=1, norm_num_groups=1, sample_size=32, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    pipe = assemble(d.Flux2Pipeline, transformer=transformer, scheduler=flow(), vae=vae)
    return pipe, {"prompt_embeds": noise(1, 7, 16), **SIZE}


@further
def lumina() -> Built:
    transformer = d.LuminaNextDiT2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_attention_heads=3,
        num_kv_heads=1, multiple_of=16, ffn_dim_multiplier=None, learn_sigma=True, cross_attention_dim=32,
    )  # fmt: skip
    pipe = assemble(d.LuminaPipeline, transformer=transformer, scheduler=flow(), vae=autoencoder())
    return pipe, {**embeds(7, 32, mask="attention_mask"), **SIZE}


@further
def latte() -> Built:
    transformer = d.LatteTransformer3DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3, caption_channels=32,
        in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, video_length=2,
    )  # fmt: skip
    pipe = assemble(d.LattePipeline, transformer=transformer, scheduler=tiny.scheduler(), vae=autoencoder())
    return pipe, {**embeds(7, 32), "negative_prompt": None, "video_length": 2, "clean_caption": False, **SIZE}


@further
def mochi() -> Built:
    transformer = d.MochiTransformer3DModel(
        patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
        in_channels=12, text_embed_dim=32, time_embed_dim=4, activation_fn="swiglu", max_sequence_length=7,
    )  # fmt: skip
    vae = d.AutoencoderKLMochi(
        latent_channels=12, out_channels=3, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )  # fmt: skip
    pipe = assemble(d.MochiPipeline, transformer=transformer, scheduler=flow(), vae=vae)
    return pipe, {**embeds(7, 32, mask="attention_mask"), "num_frames": 7, **SIZE}


@further
def wan_vace() -> Built:
    transformer = d.WanVACETransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=16,
        ffn_dim=32, num_layers=3, rope_max_seq_len=32, vace_layers=[0, 2], vace_in_channels=96,
    )  # fmt: skip
    scheduler = families.wan()[0].scheduler
    pipe = assemble(d.WanVACEPipeline, transformer=transformer, scheduler=scheduler, vae=wan_vae())
    call = {"video": [picture()] * 5, "mask": [families.mask()] * 5}
    return pipe, {**embeds(7, 32), **call, "num_frames": 5, **SIZE}


@further
def wan_image_to_video() -> Built:
    transformer = d.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=36, out_channels=16, text_dim=32, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = families.wan()[0].scheduler
    pipe = assemble(d.WanImageToVideoPipeline, transformer=transformer, scheduler=scheduler, vae=wan_vae())
    return pipe, {**embeds(7, 32), "image": picture(), "num_frames": 5, **SIZE}


@further
def skyreels() -> Built:
    transformer = d.SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=256,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = d.UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True)
    pipe = assemble(d.SkyReelsV2Pipeline, transformer=transformer, scheduler=scheduler, vae=wan_vae())
    return pipe, {**embeds(7, 32), "num_frames": 5, **SIZE}


@further
def sana_video() -> Built:
    transformer = d.SanaVideoTransformer3DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=12, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24, caption_channels=8,
        sample_size=8, rope_max_seq_len=32,
    )  # fmt: skip
    scheduler = d.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    pipe = assemble(d.SanaVideoPipeline, transformer=transformer, scheduler=scheduler, vae=wan_vae())
    call = {**embeds(7, 8, mask="attention_mask"), "negative_prompt": None, "use_resolution_binning": False}
    return pipe, {**call, "frames": 5, "height": 32, "width": 32}


@further
def deepfloyd_if() -> Built:
    unet = d.UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), in_channels=3, out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", encoder_hid_dim=32, encoder_hid_dim_type="text_proj",
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), cross_attention_dim=32,
        attention_head_dim=8, addition_embed_type="text", addition_embed_type_num_heads=2,
        cross_attention_norm="group_norm", resnet_time_scale_shift="scale_shift", act_fn="gelu",
    )  # fmt: skip
    scheduler = d.DDPMScheduler(
        num_train_timesteps=100, thresholding=True, dynamic_thresholding_ratio=0.95, prediction_type="epsilon",
        variance_type="learned_range",
    )  # fmt: skip
    pipe = assemble(d.IFPipeline, unet=unet, scheduler=scheduler, requires_safety_checker=False)
    return pipe, {**embeds(7, 32), "height": 8, "width": 8}


@further
def i2vgen() -> Built:
    unet = d.I2VGenXLUNet(
        block_out_channels=(16, 32), layers_per_block=1, sample_size=8, norm_num_groups=2, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        attention_head_dim=8,
    )  # fmt: skip
    pipe = assemble(
        d.I2VGenXLPipeline, unet=unet, vae=autoencoder(), scheduler=tiny.scheduler(),
        image_encoder=families.vision(), feature_extractor=families.image_processor(),
    )  # fmt: skip
    return pipe, {**embeds(7, 32), "image": picture(32), "num_frames": 2, "height": 32, "width": 32}


@further
def kandinsky5() -> Built:
    transformer = d.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16, out_visual_dim=4, model_dim=16, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(2, 2, 4),
    )  # fmt: skip
    vae = families.hunyuan_video()[0].vae
    pipe = assemble(d.Kandinsky5T2VPipeline, transformer=transformer, scheduler=flow(), vae=vae)
    call = {"prompt_embeds_qwen": noise(1, 7, 16), "prompt_embeds_clip": noise(1, 16)}
    call |= {
        "negative_prompt_embeds_qwen": noise(1, 7, 16, seed=1),
        "negative_prompt_embeds_clip": noise(1, 16, seed=1),
    }
    lengths = torch.tensor([0, 7], dtype=torch.int32)
    return pipe, {
        **call,
        "prompt_cu_seqlens": lengths,
        "negative_prompt_cu_seqlens": lengths.clone(),
        "num_frames": 5,
        **SIZE,
    }


@further
def ace_step() -> Built:
    shared = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    transformer = d.AceStepTransformer1DModel(
        **shared, num_hidden_layers=2, in_channels=24, audio_acoustic_hidden_dim=8, patch_size=2, sliding_window=16
    )
    encoder = AceStepConditionEncoder(
        **shared, text_hidden_dim=32, timbre_hidden_dim=8, num_lyric_encoder_hidden_layers=1,
        num_timbre_encoder_hidden_layers=1, sliding_window=16,
    )  # fmt: skip
    vae = d.AutoencoderOobleck(
        encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=8,
        audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
    )  # fmt: skip
    text = tiny.stable_diffusion()
    pipe = assemble(
        d.AceStepPipeline, vae=vae, transformer=transformer, condition_encoder=encoder, scheduler=flow(),
        text_encoder=text.text_encoder, tokenizer=text.tokenizer,
    )  # fmt: skip
    return pipe, {"prompt": "red heart", "lyrics": "cat", "audio_duration": 4.0, "max_text_length": 16}


@further
def hidream() -> Built:
    transformer = d.HiDreamImageTransformer2DModel(
        patch_size=4, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, axes_dims_rope=(4, 2, 2),
        max_resolution=(32, 32), llama_layers=(0, 1), force_inference_output=True,
    )  # fmt: skip
    pipe = assemble(d.HiDreamImagePipeline, transformer=transformer, scheduler=flow(), vae=autoencoder())
    call = {}
    for seed, sign in enumerate(("", "negative_")):
        call[f"{sign}prompt_embeds_t5"] = noise(1, 7, 32, seed=seed)
        call[f"{sign}prompt_embeds_llama3"] = noise(2, 1, 7, 16, seed=seed)
        call[f"{sign}pooled_prompt_embeds"] = noise(1, 64, seed=seed)
    return pipe, {**call, **SIZE}


@further
def prx() -> Built:
    transformer = d.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[4, 4],
    )  # fmt: skip
    pipe = assemble(d.PRXPipeline, transformer=transformer, scheduler=flow(), vae=autoencoder())
    call = embeds(7, 16)
    masks = {f"{sign}prompt_attention_mask": torch.ones(1, 7, dtype=torch.bool) for sign in ("", "negative_")}
    return pipe, {**call, **masks, "use_resolution_binning": False, **SIZE}


@further
def prx_pixel() -> Built:
    transformer = d.PRXTransformer2DModel(
        in_channels=3, patch_size=2, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2,
        axes_dim=[4, 4],
    )  # fmt: skip
    _, call = prx()
    return assemble(d.PRXPixelPipeline, transformer=transformer, scheduler=flow()), call


@further
def ovis_image() -> Built:
    transformer = d.OvisImageTransformer2DModel(
        in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    pipe = assemble(d.OvisImagePipeline, transformer=transformer, scheduler=flow(), vae=autoencoder())
    return pipe, {**embeds(7, 32), "negative_prompt": None, **SIZE}


@further
def glm_image() -> Built:
    transformer = d.GlmImageTransformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=32,
        time_embed_dim=16, condition_dim=8, prior_vq_quantizer_codebook_size=32,
    )  # fmt: skip
    vae = autoencoder(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    pipe = assemble(d.GlmImagePipeline, transformer=transformer, scheduler=flow(), vae=vae)
    return pipe, {**embeds(7, 32), "prior_token_ids": torch.arange(16)[None], **SIZE}


@further
def hunyuan_image() -> Built:
    transformer = d.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=32, text_embed_2_dim=16, rope_axes_dim=(4, 4),
    )  # fmt: skip
    vae = d.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64, 64, 64), layers_per_block=1,
        spatial_compression_ratio=8, sample_size=128, scaling_factor=0.5,
    )  # fmt: skip
    pipe = assemble(d.HunyuanImagePipeline, transformer=transformer, scheduler=flow(), vae=vae)
    call = {}
    for seed, sign in enumerate(("", "negative_")):
        for number, width in (("", 32), ("_2", 16)):
            call[f"{sign}prompt_embeds{number}"] = noise(1, 7, width, seed=seed)
            call[f"{sign}prompt_embeds_mask{number}"] = torch.ones(1, 7, dtype=torch.long)
    return pipe, {**call, "height": 32, "width": 32}


@further
def kandinsky3() -> Built:
    unet = d.Kandinsky3UNet(
        time_embedding_dim=4, groups=2, attention_head_dim=4, block_out_channels=(32, 64), layers_per_block=3,
        cross_attention_dim=8, encoder_hid_dim=32,
    )  # fmt: skip
    movq = families.kandinsky_decoder()[0].movq
    pipe = assemble(d.Kandinsky3Pipeline, unet=unet, scheduler=tiny.scheduler(), movq=movq)
    masks = {f"{sign}attention_mask": torch.ones(1, 7, dtype=torch.long) for sign in ("", "negative_")}
    return pipe, {**embeds(7, 32), **masks, "height": 64, "width": 64}


@further
def amused() -> Built:
    transformer = d.UVit2DModel(
        hidden_size=8, cond_embed_dim=32, micro_cond_encode_dim=2, micro_cond_embed_dim=10, encoder_hidden_size=32,
        vocab_size=32, codebook_size=8, in_channels=8, block_out_channels=8, num_res_blocks=1, downsample=True,
        upsample=True, block_num_heads=1, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
    )  # fmt: skip
    vqvae = d.VQModel(
        block_out_channels=[16, 32], down_block_types=["DownEncoderBlock2D"] * 2, latent_channels=8,
        up_block_types=["UpDecoderBlock2D"] * 2, norm_num_groups=8, num_vq_embeddings=8,
    )  # fmt: skip
    text_encoder, tokenizer = families.text_with_projection()
    pipe = d.AmusedPipeline(
        vqvae=vqvae, tokenizer=tokenizer, text_encoder=text_encoder, transformer=transformer,
        scheduler=d.AmusedScheduler(mask_token_id=31),
    )  # fmt: skip
    return pipe, {"prompt": "red heart", **SIZE}


@further
def ernie_image() -> Built:
    transformer = d.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=16, out_channels=16,
        text_in_dim=16, rope_axes_dim=(8, 4, 4),
    )  # fmt: skip
    vae = d.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=1, sample_size=32,
    )  # fmt: skip
    pipe = assemble(d.ErnieImagePipeline, transformer=transformer, scheduler=flow(), vae=vae)
    call = {"prompt_embeds": [noise(7, 16)], "negative_prompt_embeds": [noise(7, 16, seed=1)]}
    return pipe, {**call, "height": 32, "width": 32}


@further
def wuerstchen_prior() -> Built:
    from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior

    text = tiny.stable_diffusion()
    pipe = d.WuerstchenPriorPipeline(
        tokenizer=text.tokenizer, text_encoder=text.text_encoder, scheduler=d.DDPMWuerstchenScheduler(),
        prior=WuerstchenPrior(c_in=2, c=8, depth=2, c_cond=32, c_r=8, nhead=2),
    )  # fmt: skip
    return pipe, {"prompt": "red heart", "height": 128, "width": 128}


@further
def wuerstchen_decoder() -> Built:
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt

    text = tiny.stable_diffusion()
    decoder = WuerstchenDiffNeXt(
        c_cond=32, c_hidden=[32], nhead=[2], blocks=[1], clip_embd=32, inject_effnet=[False], level_config=["CTA"]
    )
    pipe = d.WuerstchenDecoderPipeline(
        tokenizer=text.tokenizer, text_encoder=text.text_encoder, decoder=decoder, latent_dim_scale=4.0,
        scheduler=d.DDPMWuerstchenScheduler(), vqgan=PaellaVQModel(bottleneck_blocks=1, num_vq_embeddings=2),
    )  # fmt: skip
    return pipe, {"image_embeddings": noise(1, 4, 4, 4), "prompt": "red heart"}


@further
def audioldm() -> Built:
    unet = d.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, sample_size=32, in_channels=4,
        out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), class_embeddings_concat=True,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=(16, 32),
        class_embed_type="simple_projection", projection_class_embeddings_input_dim=32,
    )  # fmt: skip
    components = families.audioldm2()[0].components
    parts = {name: components[name] for name in ("vae", "scheduler", "vocoder")}
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    parts["text_encoder"] = ClapTextModelWithProjection(ClapTextConfig(vocab_size=16, projection_dim=32, **sizes))
    call = {"prompt_embeds": noise(1, 32), "negative_prompt_embeds": noise(1, 32, seed=1), "audio_length_in_s": 0.005}
    return assemble(d.AudioLDMPipeline, unet=unet, **parts), call


@further
def krea2() -> Built:
    transformer = d.Krea2Transformer2DModel(
        in_channels=16, num_layers=2, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=2, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    vae = families.qwen_image()[0].vae
    pipe = assemble(d.Krea2Pipeline, transformer=transformer, scheduler=flow(), vae=vae)
    call = {}
    for seed, sign in enumerate(("", "negative_")):
        call[f"{sign}prompt_embeds"] = noise(1, 7, 2, 16, seed=seed)
        call[f"{sign}prompt_embeds_mask"] = torch.ones(1, 7, dtype=torch.bool)
    return pipe, {**call, **SIZE}


@further
def stable_audio_3() -> Built:
    transformer = d.StableAudio3DiTModel(
        io_channels=4, embed_dim=16, depth=2, num_heads=2, cond_token_dim=8, global_cond_dim=8, local_add_cond_dim=5,
        timestep_features_dim=8, num_memory_tokens=2,
    )  # fmt: skip
    vae = d.AutoencoderSAME(
        patch_size=4, encoder_channels=8, encoder_c_mults=(1,), encoder_strides=(2,), encoder_transformer_depths=(1,),
        latent_dim=4, dim_heads=4, sampling_rate=16,
    )  # fmt: skip
    embedder = StableAudio3DurationEmbedder(output_dim=8, fourier_dim=8)
    pipe = assemble(
        d.StableAudio3Pipeline, transformer=transformer, scheduler=flow(), vae=vae, duration_embedder=embedder
    )
    mask = torch.ones(1, 7, dtype=torch.long)
    return pipe, {"prompt_embeds": noise(1, 7, 8), "encoder_attention_mask": mask, "duration": 2.0}


@further
def ldm_text_to_image() -> Built:
    text, tokenizer = families.text_with_projection()
    pipe = d.LDMTextToImagePipeline(
        vqvae=autoencoder(), bert=CLIPTextModel(text.config), tokenizer=tokenizer, unet=tiny.unet(),
        scheduler=tiny.scheduler(),
    )  # fmt: skip
    return pipe, {"prompt": "red heart", "height": 64, "width": 64}


def qwen2_5_vl(tokenizer: Any) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    ids = {f"{k}_token_id": tokenizer.convert_tokens_to_ids(f"<|{k}_pad|>") for k in ("image", "video")}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids))


@further
def longcat_image() -> Built:
    transformer = d.LongCatImageTransformer2DModel(
        in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    pipe = assemble(
        d.LongCatImagePipeline, transformer=transformer, scheduler=flow(), vae=autoencoder(16),
        text_encoder=qwen2_5_vl(tiny.tokenizer()), tokenizer=tiny.tokenizer(),
    )  # fmt: skip
    return pipe, {"prompt": "red heart", "enable_prompt_rewrite": False, **SIZE}


@further
def bria_fibo() -> Built:
    transformer = d.BriaFiboTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=[0, 4, 4], text_encoder_dim=8,
    )  # fmt: skip
    text = SmolLM3Config(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    pipe = assemble(
        d.BriaFiboPipeline, transformer=transformer, scheduler=flow(), vae=wan_vae(),
        text_encoder=SmolLM3ForCausalLM(text), tokenizer=tiny.tokenizer(),
    )  # fmt: skip
    return pipe, {"prompt": "red heart", "height": 32, "width": 32}


@further
def nucleus_moe() -> Built:
    transformer = d.NucleusMoEImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=5, attention_head_dim=16, num_attention_heads=2,
        num_key_value_heads=1, joint_attention_dim=16, axes_dims_rope=(8, 4, 4), num_experts=4,
        moe_intermediate_dim=16, capacity_factors=2.0,
    )  # fmt: skip
    for p in transformer.parameters():  # the class leaves the weights of its experts unset
        torch.nn.init.normal_(p, std=0.1)
    vae = families.qwen_image()[0].vae
    pipe = assemble(d.NucleusMoEImagePipeline, transformer=transformer, scheduler=flow(), vae=vae)
    return pipe, {**embeds(7, 16, mask="embeds_mask"), **SIZE}
