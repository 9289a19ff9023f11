"""How much of the removed compute becomes time: Stable Diffusion's U-Net with random weights, whole and pruned.

    python benchmarks/denoiser_cost.py --size 64 --dtype bfloat16

Every plan is timed in turns with the original, as stand-ins and, where a hand-made plan takes out the same blocks, as its stock
model. The share of time saved is the median over rounds of 1 - pruned / original, with its quartiles. On a CPU the time is CPU time,
elsewhere wall time between synchronisations.
"""

import argparse
import copy
import csv
import re
import statistics
import sys
import time

import torch
from diffusers import UNet2DConditionModel

from ld_pruner_hf import Modification, applied, apply_preset_, find_operators
from ld_pruner_hf.latents import RecordedCall
from ld_pruner_hf.profiling import count_macs, processor_name, run, synchronize

CONFIGS = {
    "sd-v1.4": {"cross_attention_dim": 768},
    "sdxl": {
        "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
SECOND_PAIRS = r"(down|up)_blocks\.\d\.(resnets|attentions)\.1"
PLANS = {  # name -> (pattern of the modules that go, preset that takes out the same blocks of sd-v1.4)
    "bk-sdm-base": (SECOND_PAIRS, "bk-sdm-base"),
    "bk-sdm-small": (rf"{SECOND_PAIRS}|mid_block", "bk-sdm-small"),
    "second-resnets": (r"(down|up)_blocks\.\d\.resnets\.1", None),
    "outer-attentions": (r"(down_blocks\.0|up_blocks\.3)\.attentions\.\d", None),
    "all-transformers": (r"(down|up)_blocks\.\d\.attentions\.\d", None),
    "inner-resnets": (r"(down|up)_blocks\.\d\.resnets\.[12]", None),
}
COLUMNS = ["plan", "as", "GMACs", "s", "MACs saved", "time saved", "quartiles"]


def make_unet(config, dtype, device):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    unet = unet.to(dtype).to_empty(device=device).eval()
    for p in unet.parameters():
        p.data.normal_(std=0.02)
    return unet.to(memory_format=torch.channels_last)


def make_call(config, size, batch, dtype, device):
    like = {"dtype": dtype, "device": device}
    x = torch.randn(batch, 4, size, size, **like).to(memory_format=torch.channels_last)
    inputs = {"sample": x, "timestep": torch.tensor(500, device=device)}
    inputs["encoder_hidden_states"] = torch.randn(batch, 77, config["cross_attention_dim"], **like)
    if "addition_embed_type" in config:
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 1280, **like), "time_ids": torch.randn(batch, 6, **like),
        }  # fmt: skip
    return RecordedCall((), inputs)


def seconds(unet, call, device):
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    run(unet, call)
    synchronize(device)
    return clock() - start


def in_turns(variants, call, rounds, device):
    """Seconds of each (model, modifications) in each round, after a round for warm-up."""
    found = [[] for _ in variants]
    for _ in range(rounds + 1):
        for times, (unet, modifications) in zip(found, variants, strict=True):
            with applied(unet, modifications):
                times.append(seconds(unet, call, device))
    return [times[1:] for times in found]


def macs_of(variant, call):
    unet, modifications = variant
    with applied(unet, modifications):
        return count_macs(unet, call)[0][""]


def rows(plan, unet, call, operators, args, device):
    """The original, the plan as stand-ins, and the stock model where there is one."""
    pattern, preset = PLANS[plan]
    chosen = [Modification(o.path, o.kind, o.stand_ins[0]) for o in operators if re.fullmatch(pattern, o.path)]
    if not chosen:
        return  # this model has no such blocks
    variants = {"original": (unet, []), f"{len(chosen)} stand-ins": (unet, chosen)}
    if preset and args.model == "sd-v1.4":
        stock = copy.deepcopy(unet)
        apply_preset_(stock, preset)
        variants["stock config"] = (stock, [])
    macs = [macs_of(variant, call) for variant in variants.values()]
    times = in_turns(list(variants.values()), call, args.rounds, device)
    for name, count, took in zip(variants, macs, times, strict=True):
        saved = [1 - t / whole for t, whole in zip(took, times[0], strict=True)]
        low, middle, high = statistics.quantiles(saved, n=4)
        shares = [f"{1 - count / macs[0]:.3f}", f"{middle:.3f}", f"{low:.3f} to {high:.3f}"]
        yield [plan, name, f"{count / 1e9:.1f}", f"{statistics.median(took):.4f}", *shares]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="sd-v1.4")
    parser.add_argument("--plans", nargs="*", choices=PLANS, default=list(PLANS))
    parser.add_argument("--size", type=int, default=64, help="of the latents")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype, config = torch.device(args.device), getattr(torch, args.dtype), CONFIGS[args.model]
    name = processor_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{args.model}, {name}, {args.threads} threads, {args.dtype}, batch {args.batch}, {args.size}x{args.size}")
    unet, call = make_unet(config, dtype, device), make_call(config, args.size, args.batch, dtype, device)
    paths = [p for p, _ in unet.named_modules() if any(re.fullmatch(PLANS[n][0], p) for n in args.plans)]
    found = find_operators(unet, call.kwargs, include=paths, progress=False, latency=False, trial=False)
    operators = [o for o in found if o.is_candidate]
    out = csv.writer(sys.stdout)
    out.writerow(COLUMNS)
    for plan in args.plans:
        out.writerows(rows(plan, unet, call, operators, args, device))
        sys.stdout.flush()


if __name__ == "__main__":
    main()
