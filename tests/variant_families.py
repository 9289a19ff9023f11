"""Tiny pipelines of a family's components and further ones: ControlNets, other schedulers, denoisers with more input channels."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers as d
import families
import tiny
import torch
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP
from families import SIZE, Built, autoencoder, embeds, further, image_processor, mask, noise, picture, vision
from more_families import assemble


def with_component(family: str, kind: Any, call: dict[str, Any], **extra: Any) -> Built:
    """Another pipeline class of a family's components and `extra` ones."""
    pipe, own = {**families.FAMILIES, **families.MORE}[family]()
    names = inspect.signature(kind.__init__).parameters
    components = {k: v for k, v in pipe.components.items() if k in names}
    taken = inspect.signature(kind.__call__).parameters
    return assemble(kind, **{**components, **extra}), {k: v for k, v in {**own, **call}.items() if k in taken}


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
def qwen_image_controlnet_inpaint() -> Built:
    controlnet = d.QwenImageControlNetModel.from_transformer(
        families.qwen_image()[0].transformer, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        extra_condition_channels=4,
    )  # fmt: skip
    call = {"control_image": picture(), "control_mask": mask()}
    return with_component("qwen_image", d.QwenImageControlNetInpaintPipeline, call, controlnet=controlnet)


@further
def sd3_controlnet_inpainting() -> Built:
    controlnet = d.SD3ControlNetModel.from_transformer(
        families.sd3()[0].transformer, num_layers=1, num_extra_conditioning_channels=1
    )
    call = {"control_image": picture(), "control_mask": mask()}
    return with_component("sd3", d.StableDiffusion3ControlNetInpaintingPipeline, call, controlnet=controlnet)


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


@further
def lcm() -> Built:
    parts = {"unet": tiny.unet(time_cond_proj_dim=32), "scheduler": d.LCMScheduler(num_train_timesteps=100)}
    return with_component("sd", d.LatentConsistencyModelPipeline, {}, **parts)


@further
def cycle_diffusion() -> Built:
    call = {"image": picture(), "source_prompt": "cat face", "strength": 1.0}
    return with_component("sd", d.CycleDiffusionPipeline, call)


@further
def attend_and_excite() -> Built:
    call = {"token_indices": [1], "attn_res": (8, 8), "max_iter_to_alter": 1, **SIZE}
    return with_component("sd", d.StableDiffusionAttendAndExcitePipeline, call)


@further
def gligen() -> Built:
    call = {"gligen_phrases": ["cat"], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]}
    return with_component("sd", d.StableDiffusionGLIGENPipeline, call, unet=tiny.unet(attention_type="gated"))


@further
def instruct_pix2pix() -> Built:
    unet = tiny.unet(in_channels=8)
    return with_component("sd", d.StableDiffusionInstructPix2PixPipeline, {"image": picture()}, unet=unet)


@further
def sdxl_instruct_pix2pix() -> Built:
    unet = families.sdxl_unet(in_channels=8)
    return with_component("sdxl", d.StableDiffusionXLInstructPix2PixPipeline, {"image": picture()}, unet=unet)


@further
def upscale() -> Built:
    unet = tiny.unet(in_channels=7, num_class_embeds=1000)
    extra = {"unet": unet, "low_res_scheduler": d.DDPMScheduler()}
    return with_component("sd", d.StableDiffusionUpscalePipeline, {"image": picture(8)}, **extra)


@further
def latent_upscale() -> Built:
    unet = tiny.unet(in_channels=8, out_channels=5, time_cond_proj_dim=128 + 32)
    extra = {"unet": unet, "scheduler": d.EulerDiscreteScheduler(num_train_timesteps=100)}
    return with_component("sd", d.StableDiffusionLatentUpscalePipeline, {"image": picture()}, **extra)


@further
def depth_to_image() -> Built:
    call = {"image": picture(), "depth_map": noise(1, 8, 8), "strength": 1.0}
    return with_component("sd", d.StableDiffusionDepth2ImgPipeline, call, unet=tiny.unet(in_channels=5))


@further
def diff_edit() -> Built:
    call = {"mask_image": torch.ones(1, 8, 8), "image_latents": noise(1, 2, 4, 8, 8), "inpaint_strength": 1.0}
    extra = {"inverse_scheduler": d.DDIMInverseScheduler(num_train_timesteps=100)}
    return with_component("sd", d.StableDiffusionDiffEditPipeline, call, **extra)


@further
def image_variation() -> Built:
    parts = {"image_encoder": vision(), "feature_extractor": image_processor(), "requires_safety_checker": False}
    return with_component("sd", d.StableDiffusionImageVariationPipeline, {"image": picture()}, **parts)


def unclip_parts() -> dict[str, Any]:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    unet = tiny.unet(class_embed_type="projection", projection_class_embeddings_input_dim=64)
    normalizer = StableUnCLIPImageNormalizer(embedding_dim=32)
    return {"unet": unet, "image_normalizer": normalizer, "image_noising_scheduler": d.DDPMScheduler()}


@further
def stable_unclip() -> Built:
    prior = families.kandinsky_prior()[0].components
    parts = {f"prior_{k}": prior[k] for k in ("tokenizer", "text_encoder", "scheduler")} | {"prior": prior["prior"]}
    call = {"prior_num_inference_steps": 2}
    return with_component("sd", d.StableUnCLIPPipeline, call, **parts, **unclip_parts())


@further
def stable_unclip_img2img() -> Built:
    parts = {"image_encoder": vision(), "feature_extractor": image_processor(), **unclip_parts()}
    return with_component("sd", d.StableUnCLIPImg2ImgPipeline, {"image": picture()}, **parts)


@further
def controlnet_union() -> Built:
    controlnet = d.ControlNetUnionModel(
        block_out_channels=(32, 64), layers_per_block=1, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 2), projection_class_embeddings_input_dim=80,
        cross_attention_dim=64, norm_num_groups=8, conditioning_embedding_out_channels=(16, 32),
        num_trans_channel=32, num_trans_head=2, num_proj_channel=32,
    )  # fmt: skip
    call = {"control_image": [picture()], "control_mode": [0]}
    return with_component("sdxl", d.StableDiffusionXLControlNetUnionPipeline, call, controlnet=controlnet)


def controlnet_xs_of(unet: d.UNet2DConditionModel) -> d.ControlNetXSAdapter:
    return d.ControlNetXSAdapter.from_unet(unet, size_ratio=0.5, conditioning_embedding_out_channels=(16, 32))


@further
def controlnet_xs() -> Built:
    unet = tiny.unet(layers_per_block=2)
    parts = {"unet": unet, "controlnet": controlnet_xs_of(unet)}
    return with_component("sd", d.StableDiffusionControlNetXSPipeline, {"image": picture()}, **parts)


@further
def sdxl_controlnet_xs() -> Built:
    unet = families.sdxl_unet(layers_per_block=2)
    parts = {"unet": unet, "controlnet": controlnet_xs_of(unet)}
    return with_component("sdxl", d.StableDiffusionXLControlNetXSPipeline, {"image": picture()}, **parts)


@further
def sdxl_adapter() -> Built:
    adapter = d.T2IAdapter(channels=[32, 64], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter_xl")
    return with_component("sdxl", d.StableDiffusionXLAdapterPipeline, {"image": picture()}, adapter=adapter)


@further
def paint_by_example() -> Built:
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder

    config = families.vision().config
    extra = {
        "unet": tiny.unet(in_channels=9),
        "image_encoder": PaintByExampleImageEncoder(config, proj_size=32),
        "feature_extractor": image_processor(),
    }
    call = {"example_image": picture(), "image": picture(), "mask_image": mask()}
    return with_component("sd", d.PaintByExamplePipeline, call, **extra)


@further
def marigold() -> Built:
    call = {"image": picture(), "processing_resolution": 0}
    return with_component("sd", d.MarigoldDepthPipeline, call, unet=tiny.unet(in_channels=8))


@further
def marigold_intrinsics() -> Built:
    call = {"image": picture(), "processing_resolution": 0}
    unet = tiny.unet(in_channels=12, out_channels=8)
    targets = {"target_names": ["albedo", "material"]}
    return with_component("sd", d.MarigoldIntrinsicsPipeline, call, unet=unet, target_properties=targets)


@further
def animatediff_sdxl() -> Built:
    adapter = d.MotionAdapter(
        block_out_channels=(32, 64), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=4,
        use_motion_mid_block=False,
    )  # fmt: skip
    return with_component("sdxl", d.AnimateDiffSDXLPipeline, {"num_frames": 2}, motion_adapter=adapter)


@further
def animatediff_sparse_control() -> Built:
    controlnet = d.SparseControlNetModel(
        block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"), motion_num_attention_heads=4,
        conditioning_channels=3, conditioning_embedding_out_channels=(16, 32), concat_conditioning_mask=False,
        use_simplified_condition_embedding=False,
    )  # fmt: skip
    call = {"conditioning_frames": [picture()], "controlnet_frame_indices": [0]}
    return with_component("animatediff", d.AnimateDiffSparseControlNetPipeline, call, controlnet=controlnet)


@further
def kandinsky_controlnet() -> Built:
    unet = families.kandinsky_unet(in_channels=8, addition_embed_type="image_hint")
    return with_component(
        "kandinsky_decoder", d.KandinskyV22ControlnetPipeline, {"hint": noise(1, 3, 128, 128)}, unet=unet
    )


# ---- pixel-space U-Nets with schedulers of their own -----------------------------------------------------------------


@further
def karras_ve() -> Built:
    return d.KarrasVePipeline(unet=tiny.unconditional_unet(), scheduler=d.KarrasVeScheduler()), {}


@further
def pndm() -> Built:
    return d.PNDMPipeline(unet=tiny.unconditional_unet(), scheduler=d.PNDMScheduler(skip_prk_steps=True)), {}


@further
def repaint() -> Built:
    pipe = d.RePaintPipeline(unet=tiny.unconditional_unet(), scheduler=d.RePaintScheduler(num_train_timesteps=100))
    return pipe, {"image": picture(32), "mask_image": mask(32), "jump_length": 1, "jump_n_sample": 1}


# ---- transformers with more input channels, or with guidance ---------------------------------------------------------


def flux_with(kind: Any, call: dict[str, Any], in_channels: int, joint_attention_dim: int = 32) -> Built:
    transformer = d.FluxTransformer2DModel(
        patch_size=1, in_channels=in_channels, out_channels=4, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=joint_attention_dim,
        pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return with_component("flux", kind, call, transformer=transformer)


@further
def flux_control() -> Built:
    return flux_with(d.FluxControlPipeline, {"control_image": picture()}, in_channels=8)


@further
def flux_control_img2img() -> Built:
    call = {"image": picture(), "control_image": picture(), "strength": 1.0}
    return flux_with(d.FluxControlImg2ImgPipeline, call, in_channels=8)


@further
def flux_control_inpaint() -> Built:
    call = {"image": picture(), "control_image": picture(), "mask_image": mask(), "strength": 1.0}
    return flux_with(d.FluxControlInpaintPipeline, call, in_channels=8)


@further
def flux_fill() -> Built:
    call = {"image": picture(), "mask_image": mask(), "strength": 1.0}
    return flux_with(d.FluxFillPipeline, call, in_channels=4 + 4 + 16)


@further
def sd3_inpaint() -> Built:
    transformer = d.SD3Transformer2DModel.from_config(
        {**families.sd3()[0].transformer.config, "in_channels": 16, "out_channels": 16}
    )
    call = {"image": picture(), "mask_image": mask(), "strength": 1.0}
    parts = {"transformer": transformer, "vae": autoencoder(16)}
    return with_component("sd3", d.StableDiffusion3InpaintPipeline, call, **parts)


def flux2_klein_with(kind: Any, **call: Any) -> Built:
    return with_component("flux2", kind, {"negative_prompt_embeds": noise(1, 7, 16, seed=1), **call})


@further
def flux2_klein() -> Built:
    return flux2_klein_with(d.Flux2KleinPipeline)


@further
def flux2_klein_inpaint() -> Built:
    return flux2_klein_with(d.Flux2KleinInpaintPipeline, image=picture(), mask_image=mask(), strength=1.0)


@further
def flux2_klein_kv() -> Built:
    return flux2_klein_with(d.Flux2KleinKVPipeline, image=picture(64))


def qwen_image_edit_with(kind: Any, **call: Any) -> Built:
    """They scale pictures to a megapixel, so the autoencoder does little at that size and has to scale them down much."""
    vae = d.AutoencoderKLQwenImage(
        base_dim=1, z_dim=4, dim_mult=[1] * 6, num_res_blocks=0, temperal_downsample=[False] * 5,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    return with_component("qwen_image", kind, {"image": picture(), "height": 64, "width": 64, **call}, vae=vae)


@further
def qwen_image_edit() -> Built:
    return qwen_image_edit_with(d.QwenImageEditPipeline)


@further
def qwen_image_edit_plus() -> Built:
    return qwen_image_edit_with(d.QwenImageEditPlusPipeline)


@further
def qwen_image_edit_inpaint() -> Built:
    return qwen_image_edit_with(d.QwenImageEditInpaintPipeline, mask_image=mask(), strength=1.0)


@further
def qwen_image_layered() -> Built:
    """With a text encoder, of which only the type of its weights is asked."""
    pipe, call = qwen_image_edit_with(d.QwenImageLayeredPipeline, prompt="red heart", layers=1)
    return d.QwenImageLayeredPipeline(**{**pipe.components, "text_encoder": families.t5()}), call


@further
def sana_sprint() -> Built:
    transformer = d.SanaTransformer2DModel(
        patch_size=1, in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=4,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
        sample_size=8, guidance_embeds=True, qk_norm="rms_norm_across_heads",
    )  # fmt: skip
    parts = {"transformer": transformer, "scheduler": d.SCMScheduler()}
    return with_component("sana", d.SanaSprintPipeline, {}, **parts)


@further
def sana_controlnet() -> Built:
    controlnet = d.SanaControlNetModel(
        in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2, attention_head_dim=4, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=8,
    )  # fmt: skip
    return with_component("sana", d.SanaControlNetPipeline, {"control_image": picture(32)}, controlnet=controlnet)


def if_with(kind: Any, call: dict[str, Any]) -> Built:
    """A super-resolution stage of DeepFloyd IF: the small picture beside the noise, its noise level as a class."""
    pipe, own = families.MORE["deepfloyd_if"]()
    unet = d.UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 6, "class_embed_type": "timestep"})
    parts = {"unet": unet, "scheduler": pipe.scheduler, "image_noising_scheduler": d.DDPMScheduler()}
    call = {**{k: v for k, v in own.items() if "embeds" in k}, **call, "noise_level": 20}
    return assemble(kind, **parts, requires_safety_checker=False), call


@further
def if_super_resolution() -> Built:
    return if_with(d.IFSuperResolutionPipeline, {"image": picture(8), "height": 16, "width": 16})


@further
def if_img2img_super_resolution() -> Built:
    call = {"image": picture(8), "original_image": picture(16), "strength": 1.0}
    return if_with(d.IFImg2ImgSuperResolutionPipeline, call)


@further
def if_inpainting_super_resolution() -> Built:
    call = {"image": picture(8), "original_image": picture(16), "mask_image": mask(16), "strength": 1.0}
    return if_with(d.IFInpaintingSuperResolutionPipeline, call)


@further
def kandinsky_inpaint() -> Built:
    call = {"image": picture(32), "mask_image": mask(32)}
    unet = families.kandinsky_unet(in_channels=9)
    return with_component("kandinsky_decoder", d.KandinskyV22InpaintPipeline, call, unet=unet)


@further
def kandinsky_inpaint_combined() -> Built:
    parts = {f"prior_{k}": v for k, v in families.kandinsky_prior()[0].components.items()}
    parts["unet"] = families.kandinsky_unet(in_channels=9)
    call = {"prompt": "red heart", "image": picture(32), "mask_image": mask(32), "prior_num_inference_steps": 2}
    return with_component("kandinsky_decoder", d.KandinskyV22InpaintCombinedPipeline, call, **parts)


def kandinsky_21_with(kind: Any, in_channels: int = 4, prior: bool = False, **call: Any) -> Built:
    """Kandinsky 2.1: the decoder sees the text, too."""
    tokenizer = tiny.tokenizer()
    text = MCLIPConfig(
        vocab_size=len(tokenizer), transformerDimSize=16, imageDimSize=32, hidden_size=16, intermediate_size=16,
        num_attention_heads=2, num_hidden_layers=1,
    )  # fmt: skip
    unet = families.kandinsky_unet(
        in_channels=in_channels, addition_embed_type="text_image", encoder_hid_dim=16,
        encoder_hid_dim_type="text_image_proj",
    )  # fmt: skip
    parts = {"text_encoder": MultilingualCLIP(text), "tokenizer": tokenizer, "unet": unet}
    call["prompt"] = "red heart"
    if prior:
        parts |= {f"prior_{k}": v for k, v in families.kandinsky_prior()[0].components.items()}
        call["prior_num_inference_steps"] = 2
    return with_component("kandinsky_decoder", kind, call, **parts)


@further
def kandinsky_21() -> Built:
    return kandinsky_21_with(d.KandinskyPipeline)


@further
def kandinsky_21_img2img() -> Built:
    return kandinsky_21_with(d.KandinskyImg2ImgPipeline, image=picture(32), strength=1.0)


@further
def kandinsky_21_inpaint() -> Built:
    return kandinsky_21_with(d.KandinskyInpaintPipeline, in_channels=9, image=picture(32), mask_image=mask(32))


@further
def kandinsky_21_combined() -> Built:
    return kandinsky_21_with(d.KandinskyCombinedPipeline, prior=True)


@further
def kandinsky_21_img2img_combined() -> Built:
    return kandinsky_21_with(d.KandinskyImg2ImgCombinedPipeline, prior=True, image=picture(32), strength=1.0)


@further
def kandinsky_21_inpaint_combined() -> Built:
    call = {"image": picture(32), "mask_image": mask(32)}
    return kandinsky_21_with(d.KandinskyInpaintCombinedPipeline, in_channels=9, prior=True, **call)


@further
def wuerstchen_combined() -> Built:
    prior = {f"prior_{k}": v for k, v in families.MORE["wuerstchen_prior"]()[0].components.items()}
    decoder = families.MORE["wuerstchen_decoder"]()[0].components
    call = {"prompt": "red heart", "prior_num_inference_steps": 2, "height": 128, "width": 128}
    return d.WuerstchenCombinedPipeline(**decoder, **prior), call


@further
def z_image_controlnet() -> Built:
    return z_image_with(d.ZImageControlNetPipeline, {}, control_in_dim=4)


@further
def z_image_controlnet_inpaint() -> Built:
    changes = {"control_in_dim": 4 + 1 + 4, "add_control_noise_refiner": "control_noise_refiner"}
    call = {"image": picture(32), "mask_image": mask(32)}
    return z_image_with(d.ZImageControlNetInpaintPipeline, call, **changes)


def z_image_with(kind: Any, call: dict[str, Any], **changes: Any) -> Built:
    controlnet = d.ZImageControlNetModel(
        control_layers_places=[0], control_refiner_layers_places=[0], dim=32, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, **changes,
    )  # fmt: skip
    return with_component("z_image", kind, {"control_image": picture(32), **call}, controlnet=controlnet)


@further
def z_image_img2img() -> Built:
    return with_component("z_image", d.ZImageImg2ImgPipeline, {"image": picture(32), "strength": 1.0})


@further
def z_image_inpaint() -> Built:
    call = {"image": picture(32), "mask_image": mask(32), "strength": 1.0}
    return with_component("z_image", d.ZImageInpaintPipeline, call)


@further
def z_image_omni() -> Built:
    call = {"prompt_embeds": [[noise(7, 16)]], "negative_prompt_embeds": [[noise(7, 16, seed=1)]]}
    return with_component("z_image", d.ZImageOmniPipeline, call, siglip=None, siglip_processor=None)


@further
def gligen_with_images() -> Built:
    from diffusers.pipelines.stable_diffusion import CLIPImageProjection

    parts = {
        "unet": tiny.unet(attention_type="gated-text-image"), "image_encoder": vision(), "processor": image_processor(),
        "image_project": CLIPImageProjection(hidden_size=32),
    }  # fmt: skip
    call = {"gligen_phrases": ["cat"], "gligen_images": [picture()], "gligen_boxes": [[0.1, 0.1, 0.6, 0.6]]}
    return with_component("sd", d.StableDiffusionGLIGENTextImagePipeline, call, **parts)


@further
def audio_diffusion() -> Built:
    return tiny.audio_diffusion(), {}


@further
def music_ldm() -> Built:
    return with_component("audioldm", d.MusicLDMPipeline, {})


@further
def stable_audio_3_audio_to_audio() -> Built:
    return with_component("stable_audio_3", d.StableAudio3AudioToAudioPipeline, {"audio": noise(1, 2, 32)})


@further
def stable_audio_3_inpaint() -> Built:
    call = {"audio": noise(1, 2, 32), "mask_start_seconds": 0.5, "mask_end_seconds": 1.5}
    return with_component("stable_audio_3", d.StableAudio3InpaintPipeline, call)


def alt_diffusion_with(kind: Any, **call: Any) -> Built:
    without_text = {"text_encoder": None, "tokenizer": None}
    return with_component("sd", kind, {"prompt": None, **embeds(7, 32), **call}, **without_text)


@further
def alt_diffusion() -> Built:
    return alt_diffusion_with(d.AltDiffusionPipeline)


@further
def alt_diffusion_img2img() -> Built:
    return alt_diffusion_with(d.AltDiffusionImg2ImgPipeline, image=picture(), strength=1.0)


@further
def bria_fibo_edit() -> Built:
    call = {"prompt": '{"edit_instruction": "red heart"}', "image": picture(32), "_auto_resize": False}
    return with_component("bria_fibo", d.BriaFiboEditPipeline, call)


@further
def chroma_inpaint() -> Built:
    """It asks for an entry of the config that the class does not have, but checkpoints may."""
    call = {"image": picture(), "mask_image": mask(), "strength": 1.0}
    pipe, call = with_component("chroma", d.ChromaInpaintPipeline, call)
    pipe.transformer.register_to_config(guidance_embeds=False)
    return pipe, call


@further
def easyanimate_inpaint() -> Built:
    """As `chroma_inpaint`."""
    transformer = d.EasyAnimateTransformer3DModel.from_config(
        {**families.MORE["easyanimate"]()[0].transformer.config, "in_channels": 9}
    )
    call = {"video": torch.rand(1, 3, 5, 16, 16), "mask_video": torch.ones(1, 1, 5, 16, 16), "strength": 1.0}
    pipe, call = with_component("easyanimate", d.EasyAnimateInpaintPipeline, call, transformer=transformer)
    pipe.vae.register_to_config(cache_mag_vae=True)
    return pipe, call
