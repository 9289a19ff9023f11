"""Peak memory of scoring against peak memory of one generation at the same batch, both without decoding.

    python benchmarks/scoring_memory.py                  # the shipped pipelines
    python benchmarks/scoring_memory.py --model sd-v1.4  # Stable Diffusion's U-Net in bf16 with random weights (needs 8 GB)

Counted are the bytes of all tensors, the pipeline's weights included: the same on every device. What libraries, kernels and
allocators take on top is left out.
"""

import argparse
import functools

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel
from torch import nn

import ld_pruner_hf
from ld_pruner_hf import demo
from ld_pruner_hf.latents import final_latents, make_conditions, make_jobs, preserved, steps_argument
from ld_pruner_hf.profiling import peak_memory_of

FEW = {"include": ["mid_block", "up_blocks.1"], "kinds": ["ResnetBlock2D"]}
"""Operators for `exact`, whose memory does not depend on how many there are. Estimates look at all."""


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
    if model in demo.names():
        return demo.load(model)
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768, sample_size=64)
    unet = unet.to(torch.bfloat16).to_empty(device="cpu")
    for p in unet.parameters():
        p.data.normal_(std=0.02)
    return PromptFreePipeline(unet.eval(), DDIMScheduler())


def measure(name, args):
    pipe = load(name)
    pipe.set_progress_bar_config(disable=True)
    models = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    prompts = demo.PROMPTS[name][:1] if name in demo.PROMPTS else None
    conditions = make_conditions(pipe, prompts, steps_argument(pipe, args.steps))
    job = make_jobs(pipe, conditions, range(args.batch), args.batch)[0]
    with preserved(pipe):
        one = peak_memory_of(lambda: final_latents(pipe, job.call, job.seeds), models)
    print(f"{name}: one generation of {args.batch} latents {one / 1e6:.1f} MB", flush=True)
    how = {"seeds": args.batch, "batch_size": args.batch, "num_inference_steps": args.steps}
    for effort in args.efforts:
        how |= {"effort": effort, **(FEW if effort == "exact" else dict.fromkeys(FEW))}
        peak = peak_memory_of(functools.partial(ld_pruner_hf.score, pipe, prompts, **how), models)
        print(f"  {effort}: {peak / 1e6:.1f} MB, {peak / one:.2f} times", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=[*demo.names(), "sd-v1.4"], default=demo.names())
    parser.add_argument("--efforts", nargs="+", default=["exact", "balanced", "fast"])
    parser.add_argument("--batch", type=int, default=8, help="latents")
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    for name in args.model:
        measure(name, args)


if __name__ == "__main__":
    main()
