"""Peak memory of scoring against peak memory of one generation, each in a process of its own.

    python benchmarks/scoring_memory.py                  # the shipped emoji pipeline
    python benchmarks/scoring_memory.py --model sd-v1.4  # Stable Diffusion's U-Net in bf16 with random weights (needs 8 GB)

Only what the denoiser adds counts: the memory before the first call (libraries, weights) is measured and shown beside it.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel

import ld_pruner_hf
from ld_pruner_hf import demo


class PromptFreePipeline(DDIMPipeline):
    """Denoises from noise with constant text states, so that a bare U-Net of Stable Diffusion can be run and scored."""

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=2, height=32):
        unet = self.unet
        generators = generator if isinstance(generator, list) else [generator] * batch_size
        shape = (unet.config.in_channels, height, height)
        latents = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(unet.dtype)
        text = torch.zeros(batch_size, 77, unet.config.cross_attention_dim, dtype=unet.dtype)
        self.scheduler.set_timesteps(num_inference_steps)
        for t in self.scheduler.timesteps:
            latents = self.scheduler.step(unet(latents, t, text).sample, t, latents).prev_sample
        return latents


def load(model):
    if model == "emoji":
        return demo.load("emoji"), {"prompt": "red heart", "num_inference_steps": 2}
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    unet = unet.to(torch.bfloat16).to_empty(device="cpu")
    for p in unet.parameters():
        p.data.normal_(std=0.02)
    return PromptFreePipeline(unet.eval(), DDIMScheduler()), {"num_inference_steps": 2}


def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(task, model):
    pipe, call = load(model)
    pipe.set_progress_bar_config(disable=True)
    before = peak_mb()
    if task == "generate":
        prompt = call.pop("prompt", None)
        batch = {"batch_size": 2} if prompt is None else {"prompt": [prompt] * 2}
        pipe(**batch, **call, generator=[torch.Generator().manual_seed(i) for i in range(2)])
    else:
        ld_pruner_hf.score(
            pipe, seeds=2, include=["mid_block*", "up_blocks.3*"], kinds=["ResnetBlock2D", "Attention"], **call
        )
    print(json.dumps({"before": before, "peak": peak_mb()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["emoji", "sd-v1.4"], default="emoji")
    parser.add_argument("--task", choices=["generate", "score"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        return measure(args.task, args.model)
    found = {}
    for task in ("generate", "score"):
        command = [sys.executable, __file__, "--model", args.model, "--task", task]
        found[task] = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
        print(f"{task:<9} {found[task]['before']:8.0f} MB before, {found[task]['peak']:8.0f} MB at the peak")
    print(f"peak of scoring / peak of one generation: {found['score']['peak'] / found['generate']['peak']:.3f}")


if __name__ == "__main__":
    main()
