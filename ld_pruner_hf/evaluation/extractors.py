"""What turns pictures and sounds into features. The name of the extractor stands beside every number that it led to.

`shipped` ones come with the package and need no download; the standard ones of the literature are loaded through
transformers from the Hub (or a local folder), and Inception through torch-fidelity.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F

from .nets import IMAGE_SIZE, SAMPLE_RATE, AudioNet, ImageTextNet

SHIPPED = "shipped"

STANDARD = {
    "fid": "inception",
    "kid": "inception",
    "is": "inception",
    "cmmd": "clip:openai/clip-vit-large-patch14-336",
    "clip-score": "clip:laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    "clip-i": "clip:openai/clip-vit-base-patch32",
    "dino": "dino:facebook/dino-vits16",
    "pickscore": "clip:yuvalkirstain/PickScore_v1",
    "lpips": "lpips:alex",
    "fad": "clap:laion/clap-htsat-unfused",
}
"""metric -> the extractor that the literature uses for it."""


class Extractor(Protocol):
    """Anything with a name, a kind and a call. `embed_texts(texts)` -> unit vectors and `scale` are for CLIP-like ones.

    Attributes:
        name: stands beside every number. kind: "image" or "audio".
        sample_rate: what sounds are resampled to; None for pictures.
    """

    name: str
    kind: str
    sample_rate: int | None

    def __call__(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(features (B, D) float32 on the CPU, class logits (B, C) or None) of a batch of `Samples.batches`."""


def _load_shipped(which: str, model_class: Any) -> Any:
    from safetensors import safe_open

    path = resources.files("ld_pruner_hf").joinpath(f"evaluation/weights/{which}.safetensors")
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118, not a dict
    classes = next(len(t) for name, t in tensors.items() if name.endswith("head.weight"))
    model = model_class(classes)
    counters = {k: v for k, v in model.state_dict().items() if not v.is_floating_point()}
    model.load_state_dict(tensors | counters)
    return model.eval().requires_grad_(False)


class ShippedImages:
    """The small network for pictures that ships with the package: features, classes, texts, and stages for LPIPS."""

    name, kind, sample_rate = "ld_pruner_hf/image-small", "image", None
    scale = 100.0  # as CLIP score: 100 x cosine

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.net = _load_shipped("images", ImageTextNet).to(device)

    def _input(self, batch: torch.Tensor) -> torch.Tensor:
        x = batch.to(self.device, torch.float32) / 127.5 - 1
        if x.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            x = F.interpolate(x, (IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", antialias=True).clamp(-1, 1)
        return x

    @torch.no_grad()
    def __call__(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        features, logits = self.net.image(self._input(batch))
        return features.cpu(), logits.cpu()

    @torch.no_grad()
    def embed_images(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net.embed_images(self._input(batch)).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        return self.net.embed_texts(texts).cpu()

    @torch.no_grad()
    def perceptual_distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """LPIPS (1801.03924) with this network and equal weights for all channels: (B,)."""
        pairs = zip(
            self.net.image.stage_outputs(self._input(a)), self.net.image.stage_outputs(self._input(b)), strict=True
        )
        stages = [(F.normalize(x, dim=1) - F.normalize(y, dim=1)).pow(2).sum(1).mean((1, 2)) for x, y in pairs]
        return torch.stack(stages).sum(0).cpu()


class ShippedAudio:
    """The small network for spoken sound that ships with the package."""

    name, kind, sample_rate = "ld_pruner_hf/audio-small", "audio", SAMPLE_RATE

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.net = _load_shipped("audio", AudioNet).to(device)

    @torch.no_grad()
    def __call__(self, batch: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor | None]:
        longest = max(len(wave) for wave in batch)
        waves = torch.stack([F.pad(torch.from_numpy(wave), (0, longest - len(wave))) for wave in batch])
        features, logits = self.net(waves.to(self.device))
        return features.cpu(), logits.cpu()


class Inception:
    """The Inception v3 of FID (1706.08500): 2048 features and the logits of IS, in the weights of torch-fidelity."""

    name, kind, sample_rate = "inception-v3-compat (torch-fidelity)", "image", None

    def __init__(self, device: str = "cpu") -> None:
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            self.net = NoTrainInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"]).to(device)
        except (ImportError, ModuleNotFoundError) as error:
            raise ImportError(
                "Inception needs torch-fidelity and torchvision: pip install torch-fidelity; or use --extractor shipped"
            ) from error
        self.device = device

    @torch.no_grad()
    def __call__(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        features, logits = self.net._torch_fidelity_forward(batch.to(self.device))
        return features.float().cpu(), logits.float().cpu()


class Clip:
    """A CLIP model of transformers (PickScore's is one): unit embeddings of pictures and texts."""

    kind, sample_rate = "image", None

    def __init__(self, model_id: str, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

        self.name, self.device = f"clip:{model_id}", device
        self.net: Any = CLIPModel.from_pretrained(model_id).eval().to(device)
        self.processor = CLIPImageProcessor.from_pretrained(model_id)
        self.tokenizer = AutoTokenizer.from_pretrained(model_id)
        self.scale = self.net.logit_scale.exp().item()

    def __call__(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.embed_images(batch), None

    @torch.no_grad()
    def embed_images(self, batch: torch.Tensor) -> torch.Tensor:
        pictures = [picture.permute(1, 2, 0).numpy() for picture in batch.cpu()]
        pixels = self.processor(pictures, return_tensors="pt").pixel_values.to(self.device)
        pooled = self.net.vision_model(pixels).pooler_output
        return F.normalize(self.net.visual_projection(pooled).float(), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        length = self.net.config.text_config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).to(self.device)
        pooled = self.net.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        return F.normalize(self.net.text_projection(pooled).float(), dim=-1).cpu()


class Dino:
    """A vision transformer of transformers: its class token (DINO's in DreamBooth, 2208.12242)."""

    kind, sample_rate = "image", None

    def __init__(self, model_id: str, device: str = "cpu") -> None:
        from transformers import AutoModel, ViTImageProcessor

        self.name, self.device = f"dino:{model_id}", device
        self.net: Any = AutoModel.from_pretrained(model_id).eval().to(device)
        self.processor = ViTImageProcessor.from_pretrained(model_id)

    @torch.no_grad()
    def __call__(self, batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        pictures = [picture.permute(1, 2, 0).numpy() for picture in batch.cpu()]
        pixels = self.processor(pictures, return_tensors="pt").pixel_values.to(self.device)
        return self.net(pixels).last_hidden_state[:, 0].float().cpu(), None


class Clap:
    """The audio side of a CLAP model of transformers (2211.06687)."""

    kind = "audio"

    def __init__(self, model_id: str, device: str = "cpu") -> None:
        from transformers import AutoFeatureExtractor, ClapModel

        self.name, self.device = f"clap:{model_id}", device
        self.net: Any = ClapModel.from_pretrained(model_id).eval().to(device)
        self.processor = AutoFeatureExtractor.from_pretrained(model_id)
        self.sample_rate = self.processor.sampling_rate

    @torch.no_grad()
    def __call__(self, batch: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs = self.processor(list(batch), sampling_rate=self.sample_rate, return_tensors="pt").to(self.device)
        pooled = self.net.audio_model(**inputs).pooler_output
        return self.net.audio_projection(pooled).float().cpu(), None


class Lpips:
    """LPIPS (1801.03924) as torchmetrics has it; needs torchvision for the network."""

    kind, sample_rate = "image", None

    def __init__(self, network: Any, device: str = "cpu") -> None:
        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

            self.metric: Any = LearnedPerceptualImagePatchSimilarity(network, reduction="none").to(device)
        except (ImportError, ModuleNotFoundError) as error:
            raise ImportError(
                "LPIPS needs torchvision: pip install torchvision; or use --extractor shipped"
            ) from error
        self.name, self.device = f"lpips:{network}", device

    @torch.no_grad()
    def perceptual_distance(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.metric(*(x.to(self.device, torch.float32) / 127.5 - 1 for x in (a, b))).cpu().flatten()


_FAMILIES: dict[str, Any] = {"clip": Clip, "dino": Dino, "clap": Clap, "lpips": Lpips}


def make_extractor(spec: str, kind: str = "image", device: str = "cpu") -> Any:
    """An extractor by its name: "shipped", "inception", or "clip:", "dino:", "clap:" with a Hub id or folder, "lpips:alex".

    Raises:
        ValueError: no such name. ImportError, OSError: its packages or weights are not to be had here.
    """
    with torch.random.fork_rng(devices=[]):  # weights are drawn at random before they are loaded
        if spec == SHIPPED:
            return ShippedImages(device) if kind == "image" else ShippedAudio(device)
        if spec == "inception":
            return Inception(device)
        family, _, model_id = spec.partition(":")
        if family not in _FAMILIES or not model_id:
            known = [SHIPPED, "inception", *(f"{f}:MODEL" for f in _FAMILIES)]
            raise ValueError(f"extractor: got {spec!r}, expected one of {known}")
        return _FAMILIES[family](model_id, device)
