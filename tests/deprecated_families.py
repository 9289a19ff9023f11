"""Tiny pipelines that diffusers has deprecated, most of them variants of Stable Diffusion."""

from __future__ import annotations

from typing import Any

import diffusers as d
import families
import tiny
import torch
from families import SIZE, Built, autoencoder, further, image_processor, noise, picture, vision
from variant_families import with_component


@further
def paradigms() -> Built:
    scheduler = d.DDIMParallelScheduler.from_config(tiny.scheduler().config)
    return with_component("sd", d.StableDiffusionParadigmsPipeline, {}, scheduler=scheduler)


@further
def pix2pix_zero() -> Built:
    call = {"source_embeds": noise(1, 16, 32), "target_embeds": noise(1, 16, 32, seed=1)}
    return with_component("sd", d.StableDiffusionPix2PixZeroPipeline, call)


MOTION = {"video_length": 2, "t0": 0, "t1": 1}
"""Text2Video-Zero moves what is in the first frame between these steps, counted from the last one."""


@further
def text_to_video_zero() -> Built:
    return with_component("sd", d.TextToVideoZeroPipeline, MOTION)


@further
def sdxl_text_to_video_zero() -> Built:
    scheduler = tiny.scheduler()
    return with_component("sdxl", d.TextToVideoZeroSDXLPipeline, {"prompt": None, **MOTION}, scheduler=scheduler)


@further
def vq_diffusion() -> Built:
    from diffusers.pipelines.deprecated.vq_diffusion import LearnedClassifierFreeSamplingEmbeddings

    transformer = d.Transformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_vector_embeds=12, cross_attention_dim=32, sample_size=4,
        num_embeds_ada_norm=12, norm_num_groups=8, num_layers=2,
    )  # fmt: skip
    text = tiny.stable_diffusion()
    parts = {
        "vqvae": families.kandinsky_decoder()[0].movq, "transformer": transformer, "tokenizer": text.tokenizer,
        "text_encoder": text.text_encoder, "scheduler": d.VQDiffusionScheduler(12, num_train_timesteps=12),
        "learned_classifier_free_sampling_embeddings": LearnedClassifierFreeSamplingEmbeddings(learnable=False),
    }  # fmt: skip
    return d.VQDiffusionPipeline(**parts), {"prompt": "red heart"}


@further
def unidiffuser() -> Built:
    from diffusers.pipelines.deprecated.unidiffuser import UniDiffuserModel, UniDiffuserTextDecoder

    unet = UniDiffuserModel(
        text_dim=32, clip_img_dim=32, num_text_tokens=16, num_attention_heads=2, attention_head_dim=8, in_channels=4,
        out_channels=4, num_layers=2, sample_size=8, patch_size=2, norm_num_groups=1, use_patch_pos_embed=True, ff_final_dropout=True,
        use_data_type_embedding=True,
    )  # fmt: skip
    decoder = UniDiffuserTextDecoder(
        prefix_length=16,
        prefix_inner_dim=32,
        prefix_hidden_dim=32,
        vocab_size=16,
        n_positions=32,
        n_embd=8,
        n_layer=1,
        n_head=2,
    )
    head = decoder.transformer.lm_head  # tied to the embeddings: diffusers cannot save that
    head.weight = torch.nn.Parameter(head.weight.detach().clone())
    text = tiny.stable_diffusion()
    parts = {
        "vae": autoencoder(), "text_encoder": text.text_encoder, "image_encoder": vision(), "unet": unet,
        "clip_image_processor": image_processor(), "clip_tokenizer": text.tokenizer, "text_decoder": decoder,
        "text_tokenizer": text.tokenizer, "scheduler": tiny.scheduler(),
    }  # fmt: skip
    return d.UniDiffuserPipeline(**parts), {"prompt": "red heart", **SIZE}


@further
def versatile_diffusion_image_variation() -> Built:
    parts = {"image_unet": tiny.unet(), "image_encoder": vision(), "image_feature_extractor": image_processor()}
    return with_component("sd", d.VersatileDiffusionImageVariationPipeline, {"image": picture()}, **parts)


def unclip_with(kind: Any, call: dict[str, Any], **parts: Any) -> Built:
    """Each stage has a scheduler of its own: prior, decoder to 8x8 pixels, two networks up to 16x16."""
    from diffusers.pipelines.deprecated.unclip import UnCLIPTextProjModel

    decoder = d.UNet2DConditionModel(
        sample_size=8, in_channels=3, out_channels=6, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24, attention_head_dim=8,
        resnet_time_scale_shift="scale_shift", class_embed_type="identity",
    )  # fmt: skip
    sizes = {
        "sample_size": 16, "layers_per_block": 1, "block_out_channels": (32, 64), "in_channels": 6, "out_channels": 3,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2,
    }  # fmt: skip
    text_encoder, tokenizer = families.text_with_projection()
    parts |= {
        "decoder": decoder, "text_encoder": text_encoder, "tokenizer": tokenizer,
        "text_proj": UnCLIPTextProjModel(clip_embeddings_dim=32, time_embed_dim=128, cross_attention_dim=24),
        "super_res_first": d.UNet2DModel(**sizes), "super_res_last": d.UNet2DModel(**sizes),
        "decoder_scheduler": d.UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": d.UnCLIPScheduler(variance_type="fixed_small_log"),
    }  # fmt: skip
    call |= {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2}
    return kind(**parts), call


@further
def unclip() -> Built:
    prior = families.kandinsky_prior()[0]
    return unclip_with(d.UnCLIPPipeline, {"prompt": "red heart"}, prior=prior.prior, prior_scheduler=prior.scheduler)


@further
def unclip_image_variation() -> Built:
    parts = {"image_encoder": vision(), "feature_extractor": image_processor()}
    return unclip_with(d.UnCLIPImageVariationPipeline, {"image": picture()}, **parts)


@further
def score_sde_ve() -> Built:
    return d.ScoreSdeVePipeline(unet=tiny.unconditional_unet(), scheduler=d.ScoreSdeVeScheduler()), {}
