"""Further tiny pipelines, for the table of all pipeline classes (`pipelines_table.py`); the suite runs those of `families.py`."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers as d
import families
import tiny
import torch
from diffusers.pipelines.ace_step import AceStepConditionEncoder
from families import SIZE, Built, autoencoder, embeds, flow, further, noise, picture


def assemble(kind: Any, **components: Any) -> Any:
    """The pipeline of these components; further ones that it demands are None."""
    parameters = inspect.signature(kind.__init__).parameters.values()
    demanded = [p.name for p in parameters if p.default is p.empty and p.name != "self"]
    return kind(**{**dict.fromkeys(demanded), **components})


def wan_vae() -> d.AutoencoderKLWan:
    return d.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def with_component(family: str, kind: Any, call: dict[str, Any], **extra: Any) -> Built:
    """Another pipeline class of a family's components and `extra` ones."""
    pipe, own = families.FAMILIES[family]()
    names = inspect.signature(kind.__init__).parameters
    components = {k: v for k, v in pipe.components.items() if k in names}
    taken = inspect.signature(kind.__call__).parameters
    return assemble(kind, **components, **extra), {k: v for k, v in {**own, **call}.items() if k in taken}


# ---- a family's components and one more ------------------------------------------------------------------------------


@further
def sdxl_controlnet() -> Built:
    unet = families.sdxl()[0].unet
    controlnet = d.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32))
    return with_component("sdxl", d.StableDiffusionXLControlNetPipeline, {"image": picture()}, controlnet=controlnet)


@further
def sd3_controlnet() -> Built:
    controlnet = d.SD3ControlNetModel.from_transformer(
        families.sd3()[0].transformer, num_layers=1, num_extra_conditioning_channels=0
    )
    call = {"control_image": picture(), "controlnet_conditioning_scale": 0.5}
    return with_component("sd3", d.StableDiffusion3ControlNetPipeline, call, controlnet=controlnet)


@further
def flux_controlnet() -> Built:
    controlnet = d.FluxControlNetModel.from_transformer(
        families.flux()[0].transformer, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    call = {"control_image": picture(), "controlnet_conditioning_scale": 0.5}
    return with_component("flux", d.FluxControlNetPipeline, call, controlnet=controlnet)


@further
def qwen_image_controlnet() -> Built:
    controlnet = d.QwenImageControlNetModel.from_transformer(
        families.qwen_image()[0].transformer, num_layers=1, attention_head_dim=16, num_attention_heads=2
    )
    return with_component(
        "qwen_image", d.QwenImageControlNetPipeline, {"control_image": picture()}, controlnet=controlnet
    )


@further
def hunyuan_dit_controlnet() -> Built:
    controlnet = d.HunyuanDiT2DControlNetModel(
        sample_size=8, transformer_num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        in_channels=4, cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
        activation_fn="gelu-approximate", text_len=77, text_len_t5=256,
    )  # fmt: skip
    return with_component(
        "hunyuan_dit", d.HunyuanDiTControlNetPipeline, {"control_image": picture()}, controlnet=controlnet
    )


@further
def animatediff_controlnet() -> Built:
    unet = tiny.stable_diffusion().unet
    controlnet = d.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32))
    call = {"conditioning_frames": [picture()] * 2}
    return with_component("animatediff", d.AnimateDiffControlNetPipeline, call, controlnet=controlnet)


@further
def animatediff_video_controlnet() -> Built:
    unet = tiny.stable_diffusion().unet
    controlnet = d.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32))
    call = {"video": [picture()] * 2, "conditioning_frames": [picture()] * 2, "strength": 1.0}
    return with_component("animatediff", d.AnimateDiffVideoToVideoControlNetPipeline, call, controlnet=controlnet)


@further
def kandinsky_combined() -> Built:
    prior = {f"prior_{k}": v for k, v in families.kandinsky_prior()[0].components.items()}
    call = {"prompt": "red heart", "prior_num_inference_steps": 2}
    return with_component("kandinsky_decoder", d.KandinskyV22CombinedPipeline, call, **prior)


@further
def cascade_combined() -> Built:
    prior = families.cascade_prior()[0].components
    parts = {f"prior_{k}": prior.get(k) for k in ("prior", "text_encoder", "tokenizer", "scheduler")}
    call = {"prior_num_inference_steps": 2, "height": 128, "width": 128}
    parts |= {"prior_feature_extractor": None, "prior_image_encoder": None}
    return with_component("cascade_decoder", d.StableCascadeCombinedPipeline, call, **parts)


# ---- further denoisers -----------------------------------------------------------------------------------------------


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
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, norm_num_groups=2, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        num_attention_heads=2,
    )  # fmt: skip
    pipe = assemble(
        d.I2VGenXLPipeline, unet=unet, vae=autoencoder(), scheduler=tiny.scheduler(),
        text_encoder=tiny.stable_diffusion().text_encoder, tokenizer=tiny.tokenizer(), image_encoder=families.vision(),
        feature_extractor=families.image_processor(),
    )  # fmt: skip
    return pipe, {"prompt": "red heart", "image": picture(32), "num_frames": 2, "height": 32, "width": 32}


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
