"""The two small networks that ship with the package: pictures (with a text side, as in CLIP) and sound to features.

`training/train_extractors.py` trains them; the weights lie in `weights/` with a card that says on what, and how well.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

FEATURES = 128
IMAGE_SIZE = 64
SAMPLE_RATE = 8000
MEL_BANDS, FRAMES, N_FFT, HOP = 64, 64, 512, 128
TOP_DB = 60.0
TEXT_BUCKETS = 4096


class _Block(nn.Module):
    """Two 3x3 convolutions with a residual connection; halves the resolution if `stride` is 2."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.skip = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.skip(x))


class SmallNet(nn.Module):
    """A residual network of 0.4M parameters: (B, C, 64, 64) to stages, features (B, 128) and class logits."""

    def __init__(self, channels_in: int, classes: int) -> None:
        super().__init__()
        widths = (24, 48, 96, FEATURES)
        self.stem = nn.Conv2d(channels_in, widths[0], 3, 1, 1)
        self.stages = nn.ModuleList(_Block(a, b, 2) for a, b in zip((widths[0], *widths[:-1]), widths, strict=True))
        self.head = nn.Linear(FEATURES, classes)

    def stage_outputs(self, x: torch.Tensor) -> list[torch.Tensor]:
        """What each stage gives: (B, 24, 32, 32), (B, 48, 16, 16), (B, 96, 8, 8), (B, 128, 4, 4)."""
        outputs = []
        x = F.relu(self.stem(x))
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.stage_outputs(x)[-1].mean(dim=(2, 3))
        return features, self.head(features)


class ImageTextNet(nn.Module):
    """Pictures and texts in one space (2103.00020, at a thousandth of the size), and classes of pictures."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.image = SmallNet(3, classes)
        self.image_projection = nn.Linear(FEATURES, FEATURES, bias=False)
        self.text = nn.EmbeddingBag(TEXT_BUCKETS, FEATURES, mode="mean")
        self.text_projection = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.GELU(), nn.Linear(FEATURES, FEATURES))
        self.logit_scale = nn.Parameter(torch.tensor(2.6))

    def embed_images(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 3, 64, 64) in -1 ... 1 to unit vectors (B, 128)."""
        return F.normalize(self.image_projection(self.image(x)[0]), dim=-1)

    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors (B, 128)."""
        ids = [text_buckets(text) for text in texts]
        device = self.text.weight.device
        offsets = torch.tensor([0, *(len(i) for i in ids[:-1])]).cumsum(0).to(device)
        flat = torch.tensor([i for row in ids for i in row]).to(device)
        return F.normalize(self.text_projection(self.text(flat, offsets)), dim=-1)


def text_buckets(text: str) -> list[int]:
    """A text as hashed words and their runs of three letters (fastText's way, 1607.04606).

    >>> text_buckets("Red heart") == text_buckets("red  heart") != text_buckets("red hear")
    True
    """
    parts = []
    for word in text.lower().split() or [""]:
        marked = f"<{word}>"
        parts += [marked, *(marked[i : i + 3] for i in range(len(marked) - 2))]
    return [zlib.crc32(part.encode()) % TEXT_BUCKETS for part in parts]


class LogMel(nn.Module):
    """Log-mel spectrogram as diffusers' `Mel` draws it: waveforms (B, samples) at 8 kHz to (B, 1, 64, 64) in -1 ... 1.

    About the first second counts; shorter sound is padded with silence. The loudest band is 1 whatever the volume, and what
    is more than 60 dB below it is -1.
    """

    filters: torch.Tensor
    window: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        from transformers.audio_utils import mel_filter_bank

        filters = mel_filter_bank(
            N_FFT // 2 + 1, MEL_BANDS, 0.0, SAMPLE_RATE / 2, SAMPLE_RATE, norm="slaney", mel_scale="slaney"
        )
        self.register_buffer("filters", torch.tensor(filters, dtype=torch.float32), persistent=False)
        self.register_buffer("window", torch.hann_window(N_FFT), persistent=False)

    def forward(self, waveforms: torch.Tensor) -> torch.Tensor:
        length = FRAMES * HOP - 1
        x = F.pad(waveforms[:, :length], (0, max(0, length - waveforms.shape[1])))
        spectrum = torch.stft(x, N_FFT, HOP, window=self.window, center=True, pad_mode="constant", return_complex=True)
        mel = spectrum.abs().pow(2).transpose(1, 2) @ self.filters  # (B, frames, bands)
        decibel = 10 * mel.clamp_min(1e-10).log10()
        decibel = decibel - decibel.amax(dim=(1, 2), keepdim=True)
        return (decibel.clamp_min(-TOP_DB) / TOP_DB * 2 + 1).transpose(1, 2)[:, None]


class AudioNet(nn.Module):
    """Waveforms (B, samples) at 8 kHz to features (B, 128) and class logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.mel = LogMel()
        self.net = SmallNet(1, classes)

    def forward(self, waveforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.net(self.mel(waveforms))
