"""The distances of image and audio quality, on features; and what each metric needs. torchmetrics does the sums where it has them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .extractors import SHIPPED

INCEPTION_SPLITS = 10
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0
_ALONE: Any = {"sync_on_compute": False}  # one process measures; torchmetrics would wait for the others


@dataclass(frozen=True)
class Metric:
    """What a metric is called, and what it needs.

    Attributes:
        title: as it stands in tables. kind: "image" or "audio".
        needs: "reference" (real samples), "prompts", "original" (samples of model A on the same seeds).
        fallback: the extractor where the standard one is not to be had; None: the metric is left out then.
        higher_is_better: direction.
    """

    title: str
    kind: str
    needs: str
    fallback: str | None
    higher_is_better: bool = False


METRICS = {
    "fid": Metric("FID", "image", "reference", SHIPPED),
    "kid": Metric("KID", "image", "reference", SHIPPED),
    "is": Metric("IS", "image", "", SHIPPED, True),
    "cmmd": Metric("CMMD", "image", "reference", SHIPPED),
    "clip-score": Metric("CLIP score", "image", "prompts", SHIPPED, True),
    "clip-i": Metric("CLIP-I", "image", "reference", SHIPPED, True),
    "dino": Metric("DINO", "image", "reference", None, True),
    "pickscore": Metric("PickScore", "image", "prompts", None, True),
    "lpips": Metric("LPIPS", "image", "original", SHIPPED),
    "ssim": Metric("SSIM", "image", "original", None, True),
    "fad": Metric("FAD", "audio", "reference", SHIPPED),
}
DEFAULT_METRICS = ("fid", "kid", "is", "cmmd", "clip-score", "lpips", "ssim", "fad")


def require_torchmetrics() -> None:
    try:
        import torchmetrics  # noqa: F401
    except ImportError as error:
        raise ImportError('evaluation needs torchmetrics: pip install "ld_pruner_hf[eval]"') from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """torchmetrics draws subsets with torch's global generator."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # its notes on memory
        torch.manual_seed(seed)
        yield


def _passthrough(features: torch.Tensor) -> nn.Module:
    """The extractor of metrics that are handed features."""
    module: Any = nn.Identity()
    module.num_features = features.shape[1]
    return module


def _check_features(a: torch.Tensor, b: torch.Tensor, least: int, what: str, remedy: str = "") -> None:
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{what}: features of {a.shape[1]} and {b.shape[1]} dimensions cannot be compared")
    for side in (a, b):
        if not torch.isfinite(side).all():
            raise ValueError(f"{what}: the features are not finite; the extractor cannot take these samples")
    if min(len(a), len(b)) < least:
        raise ValueError(f"{what}: got {len(a)} and {len(b)} samples, needs at least {least} of each{remedy}")


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """|mu_a - mu_b|^2 + Tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of features (N, D): FID (1706.08500) and FAD (1812.08466).

    Raises:
        ValueError: fewer samples than D + 1, with which the covariances would be singular; features that are not finite.
    """
    require_torchmetrics()
    from torchmetrics.image.fid import FrechetInceptionDistance

    d = a.shape[1]
    _check_features(
        a, b, d + 1, f"Fréchet distance of {d} features",
        "; generate more, use KID, or an extractor with fewer features (shipped: 128)",
    )  # fmt: skip
    metric = FrechetInceptionDistance(feature=_passthrough(a), **_ALONE).set_dtype(torch.float64)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    return max(0.0, float(metric.compute()))


def kernel_distance(
    a: torch.Tensor, b: torch.Tensor, subsets: int = KID_SUBSETS, subset_size: int | None = None, seed: int = 0
) -> tuple[float, float]:
    """KID (1801.01401): unbiased MMD^2 with the kernel (x.y / D + 1)^3; mean and standard deviation over random subsets.

    Args:
        subset_size: default: 1000, or half of the samples if they are fewer than 2000.
    """
    require_torchmetrics()
    from torchmetrics.image.kid import KernelInceptionDistance

    _check_features(a, b, 4, "KID")
    size = subset_size or min(KID_SUBSET_SIZE, len(a) // 2, len(b) // 2)
    with _seeded(seed):
        metric = KernelInceptionDistance(feature=_passthrough(a), subsets=subsets, subset_size=size, **_ALONE)
        metric.update(a.double(), real=True)
        metric.update(b.double(), real=False)
        mean, std = metric.compute()
    return float(mean), float(std)


def inception_score(logits: torch.Tensor, splits: int = INCEPTION_SPLITS, seed: int = 0) -> tuple[float, float]:
    """IS (1606.03498): exp of the mean KL divergence of p(y|x) from p(y); mean and standard deviation over the splits."""
    require_torchmetrics()
    from torchmetrics.image.inception import InceptionScore

    _check_features(logits, logits, 2 * splits, "IS")
    with _seeded(seed):
        metric = InceptionScore(feature=_passthrough(logits), splits=splits, **_ALONE)
        metric.update(logits.double())
        mean, std = metric.compute()
    return float(mean), float(std)


def cmmd(a: torch.Tensor, b: torch.Tensor) -> float:
    """CMMD (2401.09603): 1000 x MMD^2 of unit vectors with a Gaussian kernel, sigma 10, diagonals included."""
    _check_features(a, b, 2, "CMMD")
    a, b = (F.normalize(x.double(), dim=-1) for x in (a, b))

    def mean_kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        gamma = 1 / (2 * CMMD_SIGMA**2)
        total = sum(torch.exp(-gamma * torch.cdist(part, y).pow(2)).sum() for part in x.split(1024))
        return torch.as_tensor(total) / (len(x) * len(y))

    return float(CMMD_SCALE * (mean_kernel(a, a) + mean_kernel(b, b) - 2 * mean_kernel(a, b)))


def mean_cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean cosine of every pair from the two sets: CLIP-I and DINO of DreamBooth (2208.12242)."""
    _check_features(a, b, 1, "mean cosine")
    return float(F.normalize(a, dim=-1).mean(0) @ F.normalize(b, dim=-1).mean(0))


def ssim(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """SSIM of uint8 pictures (B, 3, H, W), one by one: (B,). ValueError if they are smaller than the window of 11 pixels."""
    require_torchmetrics()
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(a.shape[-2:]) < 11:
        raise ValueError(f"SSIM: got pictures of {a.shape[-1]}x{a.shape[-2]}, needs at least 11x11")
    return structural_similarity_index_measure(a.float(), b.float(), data_range=255.0, reduction="none")  # type: ignore[return-value]
