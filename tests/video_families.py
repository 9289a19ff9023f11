"""Further tiny pipelines that make videos."""

from __future__ import annotations

from typing import Any

import diffusers as d
import families
import tiny
import torch
from diffusers import ModelMixin
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from families import SIZE, Built, autoencoder, embeds, flow, further, image_processor, noise, picture, wan_vae
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


def siglip(hidden_size: int) -> SiglipVisionModel:
    sizes = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return SiglipVisionModel(SiglipVisionConfig(image_size=32, patch_size=16, hidden_size=hidden_size, **sizes))


@further
def framepack() -> Built:
    transformer = d.HunyuanVideoFramepackTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4), has_image_proj=True,
        image_proj_dim=8, has_clean_x_embedder=True,
    )  # fmt: skip
    parts = {"transformer": transformer, "image_encoder": siglip(8), "feature_extractor": image_processor_32()}
    call = {"image": picture(32), "num_frames": 9, "latent_window_size": 3, "height": 32, "width": 32}
    return with_component("hunyuan_video", d.HunyuanVideoFramepackPipeline, call, **parts)


def hunyuan_video_15_transformer(task: str) -> d.HunyuanVideo15Transformer3DModel:
    return d.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_refiner_layers=1,
        text_embed_dim=32, text_embed_2_dim=16, image_embed_dim=12, rope_axes_dim=(2, 2, 4), target_size=16,
        task_type=task,
    )  # fmt: skip


@further
def hunyuan_video_15_image_to_video() -> Built:
    parts = {
        "transformer": hunyuan_video_15_transformer("i2v"), "image_encoder": siglip(12),
        "feature_extractor": image_processor_32(),
    }  # fmt: skip
    call = {"image": picture()}
    return with_component("hunyuan_video_15", d.HunyuanVideo15ImageToVideoPipeline, call, **parts)


@further
def hunyuan_video_15() -> Built:
    transformer = hunyuan_video_15_transformer("t2v")
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
    return with_component("kandinsky5", d.Kandinsky5I2VPipeline, {"image": picture()}, transformer=transformer)


@further
def kandinsky5_text_to_image() -> Built:
    return with_component("kandinsky5", d.Kandinsky5T2IPipeline, {"height": 64, "width": 64}, vae=autoencoder())


@further
def anyflow() -> Built:
    transformer = d.AnyFlowTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32
    )
    parts = {"transformer": transformer, "scheduler": d.FlowMapEulerDiscreteScheduler()}
    return with_component("wan", d.AnyFlowPipeline, {}, **parts)


@further
def wan_animate() -> Built:
    transformer = wan_transformer_of(
        d.WanAnimateTransformer3DModel, latent_channels=16, image_dim=4, motion_encoder_size=16, motion_style_dim=8,
        motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_dim=4, motion_encoder_dim=16,
        face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    parts = {"transformer": transformer, "image_encoder": clip_vision(), "image_processor": image_processor_32()}
    call = {"image": picture(), "pose_video": [picture()] * 5, "face_video": [picture()] * 5}
    return with_component("wan", d.WanAnimatePipeline, {**call, "segment_frame_length": 5}, **parts)


@further
def skyreels_forcing_video_to_video() -> Built:
    call = {"video": [picture()] * 5, "num_frames": 5, "overlap_history": 1, "base_num_frames": 5}
    return with_component("skyreels", d.SkyReelsV2DiffusionForcingVideoToVideoPipeline, call)


@further
def ltx2() -> Built:
    transformer = d.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        audio_in_channels=8, audio_out_channels=8, audio_num_attention_heads=2, audio_attention_head_dim=4,
        audio_cross_attention_dim=8, num_layers=2, caption_channels=16, rope_double_precision=False,
    )  # fmt: skip
    connectors = LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=1, video_connector_num_attention_heads=4,
        video_connector_attention_head_dim=4, video_connector_num_layers=1,
        video_connector_num_learnable_registers=None, audio_connector_num_attention_heads=4,
        audio_connector_attention_head_dim=4, audio_connector_num_layers=1,
        audio_connector_num_learnable_registers=None, rope_double_precision=False,
    )  # fmt: skip
    vae = d.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), down_block_types=("LTX2VideoDownBlock3D",),
        decoder_block_out_channels=(8,), layers_per_block=(1,), decoder_layers_per_block=(1, 1),
        spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,), downsample_type=("spatial",),
        decoder_inject_noise=(False, False), upsample_type=("spatiotemporal",), upsample_residual=(False,),
        upsample_factor=(1,), patch_size=4,
    )  # fmt: skip
    audio_vae = d.AutoencoderKLLTX2Audio(
        base_channels=8, ch_mult=(1, 1, 1), num_res_blocks=1, latent_channels=2, mel_bins=16, resolution=32
    )
    parts = {"vae": vae, "audio_vae": audio_vae, "connectors": connectors, "transformer": transformer}
    pipe = assemble(d.LTX2Pipeline, scheduler=flow(), **parts)
    call = {**embeds(8, 16, mask="attention_mask"), "num_frames": 5, "height": 32, "width": 32}
    return pipe, {**call, "frame_rate": 25.0, "spatio_temporal_guidance_blocks": [0]}


@further
def ltx2_image_to_video() -> Built:
    return with_component("ltx2", d.LTX2ImageToVideoPipeline, {"image": picture(32), "image_crf": 0})


@further
def ltx2_condition() -> Built:
    return with_component("ltx2", d.LTX2ConditionPipeline, {})


@further
def ltx2_in_context() -> Built:
    return with_component("ltx2", d.LTX2InContextPipeline, {})


@further
def ltx2_hdr() -> Built:
    return with_component("ltx2", d.LTX2HDRPipeline, {})


@further
def ltx2_dfr() -> Built:
    return with_component("ltx2", d.LTX2DFRPipeline, {"generate_slots": False})


class Unguarded(ModelMixin, d.ConfigMixin):
    """Stands for the safety checker of Cosmos, which comes with a package of its own: everything passes."""

    config_name = "config.json"

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(1))

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def cosmos_with(kind: Any, channels: int, vae: Any, scheduler: Any, **call: Any) -> Built:
    transformer = d.CosmosTransformer3DModel(
        in_channels=channels, out_channels=16, num_attention_heads=2, attention_head_dim=16, num_layers=2, mlp_ratio=2,
        text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32), concat_padding_mask=False,
    )  # fmt: skip
    parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler, "safety_checker": Unguarded()}
    return assemble(kind, **parts), {**embeds(7, 32), "height": 32, "width": 32, **call}


def cosmos_vae() -> d.AutoencoderKLCosmos:
    widths = (8, 8, 8, 8)
    return d.AutoencoderKLCosmos(
        encoder_block_out_channels=widths, decode_block_out_channels=widths, attention_resolutions=(8,), resolution=64,
        num_layers=1, latents_mean=None, latents_std=None,
    )  # fmt: skip


@further
def cosmos() -> Built:
    scheduler = d.EDMEulerScheduler(sigma_max=80.0, final_sigmas_type="sigma_min")
    return cosmos_with(d.CosmosTextToWorldPipeline, 16, cosmos_vae(), scheduler, num_frames=9)


@further
def cosmos_video_to_world() -> Built:
    scheduler = d.EDMEulerScheduler(sigma_max=80.0, final_sigmas_type="sigma_min")
    call = {"image": picture(32), "num_frames": 9}
    return cosmos_with(d.CosmosVideoToWorldPipeline, 17, cosmos_vae(), scheduler, **call)


@further
def cosmos2_text_to_image() -> Built:
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return cosmos_with(d.Cosmos2TextToImagePipeline, 16, wan_vae(), scheduler)


@further
def cosmos2_video_to_world() -> Built:
    scheduler = d.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    call = {"image": picture(32), "num_frames": 5}
    return cosmos_with(d.Cosmos2VideoToWorldPipeline, 17, wan_vae(), scheduler, **call)


@further
def cosmos2_5_predict() -> Built:
    vae, scheduler = wan_vae(), families.wan()[0].scheduler
    return cosmos_with(d.Cosmos2_5_PredictBasePipeline, 17, vae, scheduler, num_frames=5)


@further
def anyflow_far() -> Built:
    transformer = d.AnyFlowFARTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        chunk_partition=(1, 1), full_chunk_limit=2,
    )  # fmt: skip
    parts = {"transformer": transformer, "scheduler": d.FlowMapEulerDiscreteScheduler()}
    call = {"negative_prompt_embeds": None, "height": 32, "width": 32}
    return with_component("wan", d.AnyFlowFARPipeline, call, **parts)


def helios_with(kind: Any, scheduler: Any, **call: Any) -> Built:
    transformer = d.HeliosTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, text_dim=32, freq_dim=16, ffn_dim=32, num_layers=2,
        rope_dim=(4, 4, 4),
    )  # fmt: skip
    call |= {"num_latent_frames_per_chunk": 2, "height": 32, "width": 32}
    return with_component("wan", kind, call, transformer=transformer, scheduler=scheduler)


@further
def helios() -> Built:
    scheduler = d.HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
    return helios_with(d.HeliosPipeline, scheduler)


@further
def helios_pyramid() -> Built:
    scheduler = d.HeliosScheduler(stages=2, stage_range=[0, 1 / 2, 1], gamma=0.3, use_dynamic_shifting=True)
    return helios_with(d.HeliosPyramidPipeline, scheduler, pyramid_num_inference_steps_list=[2, 2])


def kandinsky6_transformer() -> d.Kandinsky6Transformer3DModel:
    return d.Kandinsky6Transformer3DModel(
        in_visual_dim=4, out_visual_dim=40, in_text_dim=16, in_text_dim2=16, time_dim=16, model_dim=16, ff_dim=32,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(2, 2, 4), in_audio_dim=4, out_audio_dim=40,
    )  # fmt: skip


@further
def kandinsky6() -> Built:
    parts = {
        "transformer": kandinsky6_transformer(), "scheduler": d.PiflowScheduler(num_policy_substeps=4),
        "vae": families.hunyuan_video()[0].vae,
        "audio_vae": d.MMAudioVAE(
            mel_bins=16, latent_channels=4, hidden_channels=16, channel_multipliers=(1, 2), layers_per_block=1,
            sample_rate=160, n_fft=16, hop_length=4,
        ),
        "vocoder": d.MMAudioVocoder(
            num_mels=16, upsample_initial_channel=16, upsample_rates=(2, 2), upsample_kernel_sizes=(4, 4),
            resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3),),
        ),
    }  # fmt: skip
    call = embeds(7, 16)
    call |= {"pooled_prompt_embeds": noise(1, 16), "negative_pooled_prompt_embeds": noise(1, 16, seed=1)}
    return assemble(d.Kandinsky6TI2VAPipeline, **parts), {**call, "num_frames": 5, **SIZE}


@further
def kandinsky6_super_resolution() -> Built:
    transformer = d.Kandinsky6SRTransformer3DModel(
        in_visual_dim=4, out_visual_dim=40, time_dim=16, model_dim=16, ff_dim=32, num_visual_blocks=3, axes_dims=(4, 6, 6),
        nabla_window=(1, 1, 1), tile_sizes=((128, 128),),
    )  # fmt: skip
    vae = d.Kandinsky6SRVAE(
        latent_channels=4, encoder_block_out_channels=(32,) * 5, decoder_block_out_channels=(32,) * 5,
        layers_per_block=1,
    )  # fmt: skip
    upscaler = d.Kandinsky6SRLatentUpscalerBank(
        in_channels=4, stage_channels=(32, 32, 32), num_pre_blocks=1, num_mid_blocks=1, num_post_blocks=1,
        num_x2_adapter_blocks=1,
    )  # fmt: skip
    scheduler = d.PiflowScheduler(num_policy_substeps=4)
    parts = {"transformer": transformer, "vae": vae, "scheduler": scheduler, "latent_upscaler": upscaler}
    return assemble(d.Kandinsky6SRPipeline, **parts), {"video": [picture(64)] * 5, "resolution_scale": 2}


def motif_video_with(kind: Any, call: dict[str, Any], **changes: Any) -> Built:
    transformer = d.MotifVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1, text_embed_dim=32,
        rope_axes_dim=(4, 4, 4), **changes,
    )  # fmt: skip
    parts = {"transformer": transformer, "scheduler": flow(), "guider": d.ClassifierFreeGuidance()}
    masks = embeds(7, 32, mask="attention_mask")
    return with_component("wan", kind, {**masks, **call}, **parts)


@further
def motif_video() -> Built:
    return motif_video_with(d.MotifVideoPipeline, {})


@further
def motif_video_image_to_video() -> Built:
    return motif_video_with(d.MotifVideoImage2VideoPipeline, {"prompt": None, "image": picture()})


@further
def ltx_long_multi_prompt() -> Built:
    tokenizer = tiny.tokenizer()
    parts = {"text_encoder": families.t5(vocab_size=len(tokenizer)), "tokenizer": tokenizer}
    call = {"prompt": "red heart", "seed": None, "num_frames": 9, "temporal_tile_size": 8, "temporal_overlap": 0}
    transformer = d.LTXVideoTransformer3DModel.from_config(
        {**families.ltx()[0].transformer.config, "caption_channels": 16}
    )
    return with_component("ltx", d.LTXI2VLongMultiPromptPipeline, call, transformer=transformer, **parts)


@further
def sana_wm() -> Built:
    transformer = d.SanaWMTransformer3DModel(
        in_channels=4, num_layers=2, hidden_size=32, num_attention_heads=2, softmax_every_n=2, linear_head_dim=16,
        chunk_plucker_channels=12, chunk_plucker_post_attn_blocks=1, caption_channels=16, mlp_ratio=2.0,
    )  # fmt: skip
    call = {"image": picture(32), "prompt": None, "action": "w-4", "intrinsics": [32.0, 32.0, 16.0, 16.0]}
    call |= {"num_frames": 5, "height": 32, "width": 32}
    return with_component("ltx2", d.SanaWMPipeline, call, transformer=transformer)


@further
def consisid() -> Built:
    transformer = d.ConsisIDTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=2, sample_width=2, sample_height=2, sample_frames=9, max_text_seq_length=16,
        use_rotary_positional_embeddings=True, is_train_face=True, cross_attn_interval=1, cross_attn_dim_head=8,
        cross_attn_num_heads=2, LFE_id_dim=8, LFE_vit_dim=8, LFE_depth=5, LFE_dim_head=4, LFE_num_heads=2,
        LFE_num_id_token=2, LFE_num_querie=2, LFE_output_dim=21,
    )  # fmt: skip
    call = {"image": picture(), "id_cond": noise(1, 8), "id_vit_hidden": [noise(1, 2, 8)] * 5}
    return with_component("cogvideox", d.ConsisIDPipeline, call, transformer=transformer)
