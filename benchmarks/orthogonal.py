"""What few-step schedulers, token merging and caches add to the speed-up of pruning: CPU time of whole generations, in turns.

    OMP_NUM_THREADS=1 python benchmarks/orthogonal.py                      # the shipped emoji pipeline
    OMP_NUM_THREADS=1 python benchmarks/orthogonal.py --model flux         # a small Flux transformer with random weights

For each method four pipelines take turns: the original and the pruned one, each with and without it. Only time is measured here:
few steps need a distilled model, and what merging and caching cost in quality depends on their settings.
"""

import argparse
import copy
import platform
import time
from collections.abc import Callable

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LCMScheduler,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_pyramid_attention_broadcast

from ld_pruner_hf import demo
from ld_pruner_hf.evaluation import Timing, speed_up

STEPS = 20
ALL_TIMESTEPS = (-1, 1001)


def emoji():
    """The shipped pipeline, and its scores."""
    return demo.load("emoji"), {"prompt": "red heart"}, demo.path("emoji") / "scores.jsonl"


def flux():
    """A pipeline around a Flux transformer with random weights: 256 picture tokens, 64 of text."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=4, attention_head_dim=32, num_attention_heads=4,
        joint_attention_dim=256, pooled_projection_dim=64, axes_dims_rope=(8, 12, 12),
    ).eval()  # fmt: skip
    vae = AutoencoderKL(latent_channels=4, block_out_channels=(32, 32), down_block_types=["DownEncoderBlock2D"] * 2,
                        up_block_types=["UpDecoderBlock2D"] * 2)  # fmt: skip
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=transformer,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    size = {"height": 64, "width": 64}
    call = {"prompt_embeds": torch.randn(1, 64, 256), "pooled_prompt_embeds": torch.randn(1, 64), **size}
    return pipe, call, pipe.score(criterion="random", kinds=["FluxAttention", "FeedForward", "Linear"], **call)


def lcm(pipe):
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return {"num_inference_steps": 4}


def token_merging(pipe):
    import tomesd

    tomesd.apply_patch(pipe, ratio=0.5, max_downsample=2)
    return {}


def attention_broadcast(pipe):
    """Attention is computed in every second step only (Pyramid Attention Broadcast)."""
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, cross_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=ALL_TIMESTEPS, cross_attention_timestep_skip_range=ALL_TIMESTEPS,
        current_timestep_callback=lambda: 500,
    )  # fmt: skip
    if hasattr(pipe, "unet"):
        apply_pyramid_attention_broadcast(pipe.unet, config)
    else:
        pipe.transformer.enable_cache(config)
    return {}


def taylor_seer(pipe):
    """Attention and feed-forward are computed in every second step, and extrapolated in the others."""
    pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, max_order=1))
    return {}


METHODS: dict[str, dict[str, Callable]] = {
    "emoji": {"LCM scheduler, 4 steps": lcm, "tomesd, half of the tokens": token_merging,
              "attention broadcast, every 2nd step": attention_broadcast},
    "flux": {"attention broadcast, every 2nd step": attention_broadcast, "TaylorSeer, every 2nd step": taylor_seer},
}  # fmt: skip


def generation(pipe, call, **changes):
    call = {"num_inference_steps": STEPS, "output_type": "latent", **call, **changes}

    def generate():
        if hasattr(pipe, "transformer") and pipe.transformer.is_cache_enabled:
            pipe.transformer._reset_stateful_cache()
        return pipe(**call, generator=torch.Generator().manual_seed(0))

    return generate


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(METHODS), default="emoji")
    parser.add_argument("--macs", type=float, default=0.3, help="share of the MACs that pruning takes away")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    original, call, scores = {"emoji": emoji, "flux": flux}[args.model]()
    original.set_progress_bar_config(disable=True)
    pruned = copy.deepcopy(original)
    plan = pruned.prune(macs=args.macs, method="ratio", scores=scores, **call)
    print(f"{plan.how['measured']['macs']:.1%} of the MACs pruned, {STEPS} steps; {platform.machine()}, "
          f"{torch.get_num_threads()} thread(s), {args.rounds} rounds, median and 99% interval of the ratio a round")  # fmt: skip
    print("| method | alone | pruned alone | both | both / (alone x pruned) |\n|---|---|---|---|---|")
    for name, method in METHODS[args.model].items():
        calls = {}
        for which, pipe in (("original", original), ("pruned", pruned)):
            calls[which] = generation(pipe, call)
            changed = copy.deepcopy(pipe)
            calls[f"{which} with it"] = generation(changed, call, **method(changed))
        times = cpu_times_in_turns(calls, args.rounds)
        original_ms, alone_ms, pruned_ms, both_ms = (times[which].times_ms for which in calls)
        cells = [speed_up(times["original"], times[which]) for which in list(calls)[1:]]
        cells.append(speed_up(product(alone_ms, pruned_ms), product(original_ms, both_ms)))
        print(f"| {name} | {' | '.join(f'{c.value:.2f} ({c.low:.2f}-{c.high:.2f})' for c in cells)} |", flush=True)


def cpu_times_in_turns(calls, rounds, warmup=1):
    """CPU time of functions that take turns, every other round in reverse; with one thread, wall-clock time on an idle machine."""
    times = {name: [] for name in calls}
    for i in range(warmup + rounds):
        for name in list(calls)[:: 1 if i % 2 else -1]:
            start = time.process_time()
            calls[name]()
            if i >= warmup:
                times[name].append((time.process_time() - start) * 1e3)
    return {name: Timing(tuple(ms)) for name, ms in times.items()}


def product(a, b):
    return Timing(tuple(x * y for x, y in zip(a, b, strict=True)))


if __name__ == "__main__":
    main()
