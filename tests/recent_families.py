"""Tiny pipelines of the last releases of diffusers: pictures, sounds, molecules."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path
from typing import Any

import diffusers as d
import families
import tiny
import torch
from diffusers import ModelMixin
from families import (
    SIZE,
    Built,
    autoencoder,
    embeds,
    flow,
    further,
    image_processor,
    noise,
    picture,
    wan_vae,
)
from more_families import assemble, qwen2_5_vl
from transformers import (
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    UMT5Config,
    UMT5EncoderModel,
)
from variant_families import flux_with, with_component


def chat_tokenizer() -> CLIPTokenizer:
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] | string }}{% endfor %}"
    return tokenizer


def qwen3_vl(layers: int) -> Qwen3VLForConditionalGeneration:
    text = {
        "vocab_size": len(tiny.tokenizer()), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    vision |= {"deepstack_visual_indexes": [0]}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision))


@further
def hunyuan_image_refiner() -> Built:
    transformer = d.HunyuanImageTransformer2DModel(
        in_channels=8, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, text_embed_dim=32, patch_size=(1, 1, 1), rope_axes_dim=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    vae = d.AutoencoderKLHunyuanImageRefiner(
        latent_channels=2, block_out_channels=(32, 32, 32), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=2,
    )  # fmt: skip
    call = {"image": picture(), **embeds(7, 32, mask="embeds_mask")}
    parts = {"transformer": transformer, "vae": vae}
    return with_component("hunyuan_image", d.HunyuanImageRefinerPipeline, {**call, **SIZE}, **parts)


@further
def bria_fibo2() -> Built:
    transformer = d.BriaFibo2Transformer2DModel(
        in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=16, injection_layer_ids=(1,),
        perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4, gist_min_text_len=4,
        gist_max_text_len=16, axes_dims=(8, 4, 4), axes_lens=(64, 16, 16),
    )  # fmt: skip
    vae = families.MORE["ernie_image"]()[0].vae
    pipe = assemble(d.BriaFibo2Pipeline, transformer=transformer, scheduler=flow(), vae=vae)
    call = {}
    for seed, sign in enumerate(("", "negative_")):
        call[f"{sign}prompt_embeds"] = noise(1, 2, 7, 16, seed=seed)
        call[f"{sign}prompt_embeds_mask"] = torch.ones(1, 7, dtype=torch.bool)
    return pipe, {**call, "height": 32, "width": 32}


@further
def ideogram4() -> Built:
    """A second transformer, without the prompt, stands for the negative prompt."""
    sizes = {
        "in_channels": 16, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2, "intermediate_size": 32,
        "adaln_dim": 16, "llm_features_dim": 13 * 16, "mrope_section": (2, 1, 1),
    }  # fmt: skip
    pipe = assemble(
        d.Ideogram4Pipeline, transformer=d.Ideogram4Transformer2DModel(**sizes), scheduler=flow(),
        unconditional_transformer=d.Ideogram4Transformer2DModel(**sizes), vae=families.MORE["ernie_image"]()[0].vae,
        text_encoder=qwen3_vl(layers=36).model, tokenizer=chat_tokenizer(),
    )  # fmt: skip
    call = {"prompt": "red heart", "guidance_scale": 3.0, "guidance_schedule": None}
    return pipe, {**call, "max_sequence_length": 64, "height": 32, "width": 32}


def dreamlite_with(kind: Any) -> Built:
    sizes = {
        "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8, "cross_attention_dim": 16,
        "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"), "norm_num_groups": 8,
        "attention_head_dim": 4, "ff_mult": 2, "addition_embed_type": "time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 16, "encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 16,
    }  # fmt: skip
    vae = d.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )  # fmt: skip
    parts = {"unet": d.DreamLiteUNetModel(**sizes), "vae": vae, "scheduler": flow()}
    parts |= {"text_encoder": qwen3_vl(layers=1), "tokenizer": tiny.tokenizer()}
    return assemble(kind, **parts), {"prompt": "red heart", **SIZE}


@further
def dreamlite() -> Built:
    return dreamlite_with(d.DreamLitePipeline)


@further
def dreamlite_mobile() -> Built:
    return dreamlite_with(d.DreamLiteMobilePipeline)


def joy_image_with(kind: Any, transformer: Any, **call: Any) -> Built:
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "text_dim": 16, "num_layers": 2, "rope_dim_list": [4, 6, 6]}
    parts = {"transformer": transformer(**sizes), "vae": wan_vae(), "scheduler": flow(), "text_encoder": qwen3_vl(1)}
    parts |= {
        "tokenizer": tiny.tokenizer(),
        "processor": tiny.tokenizer(),
    }  # without pictures, nothing else is asked of it
    return assemble(kind, **parts), {"prompt": "red heart", **call}


@further
def joy_image_edit() -> Built:
    return joy_image_with(d.JoyImageEditPipeline, d.JoyImageEditTransformer3DModel)


@further
def joy_image_edit_plus() -> Built:
    transformer = d.JoyImageEditPlusTransformer3DModel
    return joy_image_with(d.JoyImageEditPlusPipeline, transformer, **SIZE)


@further
def long_cat_audio() -> Built:
    text = UMT5Config(vocab_size=len(tiny.tokenizer()), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    transformer = d.LongCatAudioDiTTransformer(dit_dim=32, dit_depth=2, dit_heads=2, dit_text_dim=16, latent_dim=4)
    vae = d.LongCatAudioDiTVae(
        channels=8,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=4,
        encoder_latent_dim=8,
        downsampling_ratio=2,
        sample_rate=16,
    )
    pipe = d.LongCatAudioDiTPipeline(
        vae=vae, text_encoder=UMT5EncoderModel(text), tokenizer=tiny.tokenizer(), transformer=transformer
    )
    return pipe, {"prompt": "red heart", "audio_duration_s": 1.0}


def shap_e_with(kind: Any, call: dict[str, Any], **encoder: Any) -> Built:
    from diffusers.pipelines.shap_e import ShapERenderer

    prior = d.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_embeddings=32, embedding_proj_dim=32,
        time_embed_dim=64, num_layers=2, clip_embed_dim=32, additional_embeddings=0, time_embed_act_fn="gelu",
        norm_in_type="layer", embedding_proj_norm_type="layer" if "image_encoder" in encoder else None,
        encoder_hid_proj_type=None, added_emb_type=None,
    )  # fmt: skip
    renderer = ShapERenderer(
        param_shapes=((8, 93), (8, 8), (8, 8), (8, 8)), d_latent=16, d_hidden=8, background=(0.1, 0.1, 0.1)
    )
    scheduler = d.HeunDiscreteScheduler(
        beta_schedule="exp",
        num_train_timesteps=100,
        prediction_type="sample",
        use_karras_sigmas=True,
        clip_sample=True,
    )
    return kind(prior=prior, scheduler=scheduler, shap_e_renderer=renderer, **encoder), call


@further
def shap_e() -> Built:
    text_encoder, tokenizer = families.text_with_projection()
    parts = {"text_encoder": text_encoder, "tokenizer": tokenizer}
    return shap_e_with(d.ShapEPipeline, {"prompt": "red heart"}, **parts)


@further
def shap_e_img2img() -> Built:
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4}
    encoder = CLIPVisionModel(CLIPVisionConfig(image_size=224, patch_size=32, **sizes))
    parts = {"image_encoder": encoder, "image_processor": image_processor()}
    return shap_e_with(d.ShapEImg2ImgPipeline, {"image": picture()}, **parts)


def kolors_with(kind: Any, **call: Any) -> Built:
    unet = families.sdxl_unet(
        encoder_hid_dim_type="text_proj", encoder_hid_dim=64, projection_class_embeddings_input_dim=80
    )
    return with_component("sdxl", kind, call, unet=unet)


@further
def kolors() -> Built:
    return kolors_with(d.KolorsPipeline)


@further
def kolors_img2img() -> Built:
    """Of prompts as embeddings it loses the pooled ones on the way, so this one has a text encoder."""
    from diffusers.pipelines.kolors import ChatGLMModel, ChatGLMTokenizer
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    tokenizer = ChatGLMTokenizer(sentencepiece_file())
    text = ChatGLMConfig(
        padded_vocab_size=len(tokenizer) + 8, hidden_size=32, ffn_hidden_size=32, kv_channels=16, num_attention_heads=2,
        num_layers=2, seq_length=256, multi_query_attention=True, multi_query_group_num=1, add_qkv_bias=True,
        original_rope=True,
    )  # fmt: skip
    unet = families.sdxl_unet(
        encoder_hid_dim_type="text_proj", encoder_hid_dim=32, projection_class_embeddings_input_dim=80
    )
    text_encoder = ChatGLMModel(text)
    for p in text_encoder.parameters():  # the class leaves them unset
        torch.nn.init.normal_(p, std=0.1)
    parts = {"unet": unet, "text_encoder": text_encoder, "tokenizer": tokenizer}
    call = {"prompt": "red heart", "prompt_embeds": None, "negative_prompt_embeds": None, "image": picture()}
    return with_component("sdxl", d.KolorsImg2ImgPipeline, {**call, "strength": 1.0}, **parts)


@functools.cache
def sentencepiece_file() -> str:
    import sentencepiece

    path = Path(tempfile.mkdtemp(prefix="sentencepiece-")) / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(tiny.PROMPTS),
            model_writer=file,
            vocab_size=24,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return str(path)


@further
def kolors_pag() -> Built:
    return kolors_with(d.KolorsPAGPipeline)


def visual_cloze_with(kind: Any) -> Built:
    text = tiny.stable_diffusion()
    parts = {
        "transformer": flux_with(d.FluxFillPipeline, {}, 4 + 4 + 16, joint_attention_dim=16)[0].transformer, "tokenizer": text.tokenizer,
        "text_encoder": text.text_encoder, "tokenizer_2": text.tokenizer, "text_encoder_2": families.t5(vocab_size=len(text.tokenizer)),
    }  # fmt: skip
    call = {"task_prompt": "red heart", "content_prompt": "pizza", "prompt_embeds": None, "pooled_prompt_embeds": None}
    call["image"] = [[picture(), picture()], [picture(), None]]
    return with_component("flux", kind, call, **parts, resolution=32)


@further
def visual_cloze() -> Built:
    return visual_cloze_with(d.VisualClozePipeline)


@further
def visual_cloze_generation() -> Built:
    return visual_cloze_with(d.VisualClozeGenerationPipeline)


class Chat(ModelMixin, d.ConfigMixin):
    """Stands for the processor of Qwen-VL, which needs torchvision: what is asked of it besides text."""

    config_name = "config.json"
    tokenizer = tiny.tokenizer()
    image_processor = Qwen2VLImageProcessorPil()

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("nothing", torch.zeros(1))

    def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> list[list[int]]:
        return [[0]]


@further
def qwen_image_21() -> Built:
    transformer = d.QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2, context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = d.AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=4, dim_mult=[1] * 5, num_res_blocks=1, latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = assemble(d.QwenImage21Pipeline, transformer=transformer, scheduler=flow(), vae=vae, processor=Chat())
    return pipe, {**embeds(7, 16, mask="embeds_mask"), "height": 64, "width": 64}


@further
def rfd4_proteina() -> Built:
    """Molecules: positions of atoms and latents of what is around them, each with a scheduler of its own."""
    sizes = {"nlayers": 2, "token_dim": 16, "nheads": 2, "dim_cond": 8, "pair_repr_dim": 8, "latent_dim": 4}
    transformer = d.RFD4ProteinaTransformer(
        **sizes, token_type_emb_dim=4, cath_emb_dim=4, t_emb_dim=8, seq_sep_dim=8, tri_mult_c=8,
        feats_seq=("xt_bb_ca", "xt_local_latents"), feats_cond_seq=("time_emb_bb_ca", "time_emb_local_latents"),
        feats_pair_repr=("xt_bb_ca_pair_dists",),
    )  # fmt: skip
    vae = d.RFD4ProteinaAutoencoder(
        [[True] * 37] * 147, [[True] * 147] * 7, **sizes, token_type_emb_dim=4, encoder_feats_seq=("x1_a37coors_nm",),
        decoder_feats_seq=("ca_coors_nm", "z_latent_seq"),
    )  # fmt: skip
    schedule = {"noise_mode": "tan", "tsr_k": 1.0, "tsr_sigma": 1.0, "tail_steps": 0}
    pipe = d.RFD4ProteinaPipeline(
        transformer=transformer, vae=vae, recycle_depths=[1, 1],
        bb_ca_scheduler=d.RFD4ProteinaScheduler("log", **schedule),
        local_latents_scheduler=d.RFD4ProteinaScheduler("power", **schedule),
    )  # fmt: skip
    every = torch.ones(1, 5, dtype=torch.bool)
    call = {"padding_mask": every, "is_in_context_conditioning": ~every, "supports_local_latent": every}
    features = {"condition_sequence_1_residue": torch.zeros(1, 5, dtype=torch.long)}
    return pipe, {**call, "conditioning_features": {**features, "molecule_iid": torch.zeros(1, 5)}}


@further
def ldm_super_resolution() -> Built:
    pipe, unet = tiny.ldm(), d.UNet2DModel(**{**tiny.UNCONDITIONAL_UNET, "in_channels": 6})
    call = {"image": picture(32)}
    return d.LDMSuperResolutionPipeline(vqvae=pipe.vqvae, unet=unet, scheduler=tiny.scheduler()), call


@further
def long_cat_image_edit() -> Built:
    """It scales pictures to a megapixel, so the autoencoder does little at that size and has to scale them down much."""
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.add_tokens(["<|image_pad|>", "<|vision_start|>", "<|vision_end|>"], special_tokens=True)
    parts = {
        "tokenizer": tokenizer, "text_encoder": qwen2_5_vl(tokenizer), "text_processor": Chat(),
        "vae": autoencoder(16, (4,) * 7),
    }  # fmt: skip
    return with_component("longcat_image", d.LongCatImageEditPipeline, {"image": picture()}, **parts)


@further
def kandinsky5_image_to_image() -> Built:
    """Pictures of no less than a megapixel."""
    call = {"image": picture(), "guidance_scale": 1.0}
    return with_component("kandinsky5_image_to_video", d.Kandinsky5I2IPipeline, call, vae=autoencoder(4, (4,) * 4))


@further
def cosmos3_omni() -> Built:
    transformer = d.Cosmos3OmniTransformer(
        head_dim=12, hidden_size=24, intermediate_size=32, latent_channel=16, num_attention_heads=2,
        num_hidden_layers=2, num_key_value_heads=1, patch_latent_dim=64, vocab_size=len(tiny.tokenizer()), sound_gen=True, sound_dim=4,
        rope_axes_dim=[2, 2, 2],
    )  # fmt: skip
    sound = d.Cosmos3AVAEAudioTokenizer(
        sampling_rate=16, vocoder_input_dim=4, dec_dim=8, dec_c_mults=(1, 2), dec_strides=(2, 2), enc_dim=8,
        enc_intermediate_dim=8, enc_num_layers=1, enc_num_blocks=1, enc_latent_dim=8, enc_c_mults=(1, 2),
        enc_strides=(2, 2),
    )  # fmt: skip
    pipe = d.Cosmos3OmniPipeline(
        transformer=transformer, text_tokenizer=chat_tokenizer(), vae=wan_vae(), sound_tokenizer=sound,
        scheduler=families.wan()[0].scheduler, enable_safety_checker=False,
    )  # fmt: skip
    return pipe, {"prompt": "red heart", "num_frames": 5, "enable_sound": True, "height": 32, "width": 32}
