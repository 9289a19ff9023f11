"""Do the shipped extractors tell good from bad? Real against real, and against what was spoilt by a known amount.

    python benchmarks/extractors.py --images clothing.parquet --class_column label --recordings recordings.tar

Every second sample is the reference, the others are spoilt. Prints a table in Markdown.
"""

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy.io import wavfile
from scipy.signal import butter, sosfilt

from ld_pruner_hf.evaluation import frechet_distance, inception_score, kernel_distance, make_extractor, samples_of
from ld_pruner_hf.evaluation.samples import read_parquet


def features(extractor, arrays, rate=None):
    """(features, logits) of pictures or waveforms."""
    parts = [extractor(batch) for _, batch in samples_of(arrays, sample_rate=rate).batches(64, rate)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def image_sets(table, class_column):
    """(reference, name -> spoilt pictures)."""
    pictures = [Image.open(io.BytesIO(row["bytes"])).convert("RGB") for row in table.column("image").to_pylist()]
    classes = table.column(class_column).to_pylist()
    reference, rest, kept = pictures[::2], pictures[1::2], classes[1::2]
    rng = np.random.default_rng(0)

    def noisy(amount):
        return [np.clip(np.asarray(p) / 255 + rng.normal(0, amount, (*p.size[::-1], 3)), 0, 1) for p in rest]

    names = sorted(set(kept), key=kept.count, reverse=True)
    sets = {"real": rest}
    sets |= {f"noise, sigma {a:g}": noisy(a) for a in (0.02, 0.05, 0.1, 0.2)}
    sets |= {f"blur, radius {r:g}": [p.filter(ImageFilter.GaussianBlur(r)) for p in rest] for r in (0.5, 1, 2, 4)}
    sets |= {
        f"the {n} largest of {len(names)} classes": [p for p, c in zip(rest, kept, strict=True) if c in names[:n]]
        for n in (7, 4, 2)
    }
    return [np.asarray(p) for p in reference], {k: [np.asarray(p) for p in v] for k, v in sets.items()}


def audio_sets(recordings):
    """(reference, name -> spoilt waveforms, sample rate)."""
    with tarfile.open(recordings) as tar:
        members = sorted((m for m in tar if m.name.endswith(".wav")), key=lambda m: m.name)
        read = [wavfile.read(io.BytesIO(tar.extractfile(m).read())) for m in members]
    rate = read[0][0]
    waves = [wave.astype(np.float32) / 32768 for _, wave in read]
    reference, rest = waves[::2], waves[1::2]
    digits = [Path(m.name).name[0] for m in members][1::2]
    rng = np.random.default_rng(0)

    def noisy(decibel):
        return [w + rng.normal(0, w.std() * 10 ** (-decibel / 20), len(w)).astype(np.float32) for w in rest]

    def muffled(hertz):
        sos = butter(4, hertz, fs=rate, output="sos")
        return [sosfilt(sos, w).astype(np.float32) for w in rest]

    sets = {"real": rest}
    sets |= {f"noise, {d} dB below": noisy(d) for d in (40, 30, 20, 10)}
    sets |= {f"low-pass, {h} Hz": muffled(h) for h in (3000, 2000, 1000, 500)}
    sets |= {f"digits 0 to {n - 1}": [w for w, d in zip(rest, digits, strict=True) if int(d) < n] for n in (7, 4, 2)}
    return reference, sets, rate


def print_table(title, extractor, reference, sets, rate=None):
    real, _ = features(extractor, reference, rate)
    print(f"\n{title}; extractor {extractor.name}, {len(real)} reference samples\n")
    print("| samples | n | Fréchet distance | KID x 1000 | IS |\n|---|---|---|---|---|", flush=True)
    for name, arrays in sets.items():
        x, logits = features(extractor, arrays, rate)
        kid, _ = kernel_distance(real, x)
        row = (
            name,
            len(x),
            f"{frechet_distance(real, x):.3g}",
            f"{1000 * kid:.3g}",
            f"{inception_score(logits)[0]:.2f}",
        )
        print("| " + " | ".join(map(str, row)) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="parquet with columns image and --class_column")
    parser.add_argument("--class_column", default="label")
    parser.add_argument("--recordings", type=Path, help="tar of <digit>_<speaker>_<index>.wav")
    args = parser.parse_args()
    if args.images:
        print_table(
            args.images.name, make_extractor("shipped"), *image_sets(read_parquet(args.images), args.class_column)
        )
    if args.recordings:
        reference, sets, rate = audio_sets(args.recordings)
        print_table(args.recordings.name, make_extractor("shipped", "audio"), reference, sets, rate)


if __name__ == "__main__":
    main()
