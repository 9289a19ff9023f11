"""Further tiny pipelines that make videos."""

from __future__ import annotations

from typing import Any

import diffusers as d
import families
import tiny
import torch
from families import SIZE, Built, embeds, flow, further, image_processor, noise, picture, wan_vae
from more_families import assemble
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel
from variant_families import with_component


def wan_transformer_of(kind: Any, **changes: Any) -> Any:
    sizes = {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 36, "out_channels": 16, "text_dim": 32,
        "freq_dim": 256, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
    }  # fmt: skip
    return kind(**{**sizes, **changes})


def clip_vision() -> CLIPVisionModel:
    sizes = {"hidden_size": 4, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=16, **sizes))


@further
def chrono_edit() -> Built:
    parts = {
        "transformer": wan_transformer_of(d.ChronoEditTransformer3DModel, image_dim=4),
        "scheduler": families.wan()[0].scheduler, "vae": wan_vae(), "image_encoder": clip_vision(),
        "image_processor": image_processor_32(),
    }  # fmt: skip
    return assemble(d.ChronoEditPipeline, **parts), {**embeds(7, 32), "image": picture(), "num_frames": 5, **SIZE}


def image_processor_32() -> Any:
    processor = image_processor()
    processor.size, processor.crop_size = {"shortest_edge": 32}, {"height": 32, "width": 32}
    return processor


@further
def skyreels_image_to_video() -> Built:
    parts = {
        "transformer": wan_transformer_of(d.SkyReelsV2Transformer3DModel, image_dim=4),
        "scheduler": d.UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True), "vae": wan_vae(),
        "image_encoder": clip_vision(), "image_processor": image_processor_32(),
    }  # fmt: skip
    call = {**embeds(7, 32), "image": picture(), "num_frames": 5, **SIZE}
    return assemble(d.SkyReelsV2ImageToVideoPipeline, **parts), call


@further
def lucy_edit() -> Built:
    transformer = wan_transformer_of(d.WanTransformer3DModel, in_channels=32)
    call = {"video": [picture()] * 5}
    return with_component("wan", d.LucyEditPipeline, call, transformer=transformer)


def hunyuan_video_with(kind: Any, call: dict[str, Any], **changes: Any) -> Built:
    sizes = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1,
        "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1, "patch_size_t": 1, "text_embed_dim": 16,
        "pooled_projection_dim": 8, "rope_axes_dim": (2, 4, 4),
    }  # fmt: skip
    transformer = d.HunyuanVideoTransformer3DModel(**{**sizes, **changes})
    return with_component("hunyuan_video", kind, call, transformer=transformer)


@further
def hunyuan_image_to_video() -> Built:
    changes = {"in_channels": 9, "guidance_embeds": False, "image_condition_type": "latent_concat"}
    return hunyuan_video_with(d.HunyuanVideoImageToVideoPipeline, {"image": picture()}, **changes)


@further
def hunyuan_skyreels() -> Built:
    call = {"image": picture(), "true_cfg_scale": 1.0}
    return hunyuan_video_with(d.HunyuanSkyreelsImageToVideoPipeline, call, in_channels=8, guidance_embeds=True)


@further
def framepack() -> Built:
    transformer = d.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), has_image_proj=True,
        image_proj_dim=8, has_clean_x_embedder=True,
    )  # fmt: skip
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = SiglipVisionModel(SiglipVisionConfig(image_size=32, patch_size=16, **sizes))
    parts = {"transformer": transformer, "image_encoder": vision, "feature_extractor": image_processor_32()}
    call = {"image": picture(32), "num_frames": 9, "latent_window_size": 3, "height": 32, "width": 32}
    return with_component("hunyuan_video", d.HunyuanVideoFramepackPipeline, call, **parts)


@further
def hunyuan_video_15() -> Built:
    transformer = d.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_refiner_layers=1,
        text_embed_dim=32, text_embed_2_dim=16, image_embed_dim=12, rope_axes_dim=(2, 2, 4), target_size=16,
        task_type="t2v",
    )  # fmt: skip
    vae = d.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16, 16, 16), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )  # fmt: skip
    pipe = assemble(
        d.HunyuanVideo15Pipeline, transformer=transformer, scheduler=flow(), vae=vae, guider=d.ClassifierFreeGuidance()
    )
    call = {}
    for seed, sign in enumerate(("", "negative_")):
        for number, width in (("", 32), ("_2", 16)):
            call[f"{sign}prompt_embeds{number}"] = noise(1, 7, width, seed=seed)
            call[f"{sign}prompt_embeds_mask{number}"] = torch.ones(1, 7, dtype=torch.long)
    return pipe, {**call, "num_frames": 5, "height": 32, "width": 32}


@further
def allegro() -> Built:
    transformer = d.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=2, cross_attention_dim=24, sample_width=8,
        sample_height=8, sample_frames=8, caption_channels=24,
    )  # fmt: skip
    vae = d.AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, latent_channels=4, sample_size=16
    )
    pipe = assemble(d.AllegroPipeline, transformer=transformer, scheduler=tiny.scheduler(), vae=vae)
    call = {**embeds(7, 24, mask="attention_mask"), "negative_prompt": None, "clean_caption": False}
    return pipe, {**call, "num_frames": 8, "height": 32, "width": 32}


@further
def easyanimate() -> Built:
    transformer = d.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=16, num_layers=2, sample_width=16, sample_height=16, patch_size=2,
    )  # fmt: skip
    vae = d.AutoencoderKLMagvit(
        latent_channels=4, block_out_channels=[8, 8, 8, 8], layers_per_block=1, norm_num_groups=2,
        spatial_group_norm=False,
    )  # fmt: skip
    pipe = assemble(d.EasyAnimatePipeline, transformer=transformer, scheduler=flow(), vae=vae)
    return pipe, {**embeds(7, 16, mask="attention_mask"), "num_frames": 5, **SIZE}


@further
def cogvideox_image_to_video() -> Built:
    return cogvideox_with(d.CogVideoXImageToVideoPipeline, {"image": picture()})


@further
def cogvideox_control() -> Built:
    return cogvideox_with(d.CogVideoXFunControlPipeline, {"control_video": [picture()] * 9})


def cogvideox_with(kind: Any, call: dict[str, Any]) -> Built:
    """With twice the channels in: the condition's latents beside the noise."""
    transformer = d.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=2, sample_width=2, sample_height=2, sample_frames=9, max_text_seq_length=16,
        use_rotary_positional_embeddings=True,
    )  # fmt: skip
    return with_component("cogvideox", kind, call, transformer=transformer)


@further
def pia() -> Built:
    adapter = d.MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4,
        conv_in_channels=9,
    )  # fmt: skip
    return with_component("sd", d.PIAPipeline, {"image": picture(), "num_frames": 2}, motion_adapter=adapter)


@further
def kandinsky5_image_to_video() -> Built:
    transformer = d.Kandinsky5Transformer3DModel(
        in_visual_dim=4, in_text_dim=16, in_text_dim2=16, time_dim=16, out_visual_dim=4, model_dim=16, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(2, 2, 4), visual_cond=True,
    )  # fmt: skip
    pipe, call = families.MORE["kandinsky5"]()
    parts = {**pipe.components, "transformer": transformer}
    return d.Kandinsky5I2VPipeline(**parts), {**call, "image": picture()}
