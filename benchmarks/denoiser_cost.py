"""How much of the removed compute becomes time: Stable Diffusion's U-Net with random weights, whole and pruned.

    python benchmarks/denoiser_cost.py --size 64 --dtype bfloat16

Each plan is measured in turns with the original, `--rounds` times: as stand-ins, and, where a stock config can express it, as the
stock model of a hand-made plan. On a CPU the time is CPU time, elsewhere wall time. `--model sdxl` needs 12 GB more.
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
from ld_pruner_hf.surgery import count_params

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
PLANS = {  # name -> (pattern of the modules that go, preset that takes out the same blocks)
    "bk-sdm-base": (SECOND_PAIRS, "bk-sdm-base"),
    "bk-sdm-small": (rf"{SECOND_PAIRS}|mid_block", "bk-sdm-small"),
    "outer attentions": (r"(down_blocks\.0|up_blocks\.3)\.attentions\.\d", None),
    "all attentions": (r"(down|up)_blocks\.\d\.attentions\.\d", None),
    "second resnets": (r"(down|up)_blocks\.\d\.resnets\.1", None),
    "second and third resnets": (r"(down|up)_blocks\.\d\.resnets\.[12]", None),
}


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
    kwargs = {"encoder_hidden_states": torch.randn(batch, 77, config["cross_attention_dim"], **like)}
    if "addition_embed_type" in config:
        kwargs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(batch, 1280, **like), "time_ids": torch.randn(batch, 6, **like),
        }  # fmt: skip
    return RecordedCall((x, torch.tensor(500, device=device)), kwargs)


def seconds(unet, call, device):
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    start = clock()
    run(unet, call)
    synchronize(device)
    return clock() - start


def measure(pairs, call, rounds, device):
    """(MACs, median seconds, parameters) of each (model, modifications), measured in turns."""
    found = [[] for _ in pairs]
    sizes = []
    for unet, modifications in pairs:
        with applied(unet, modifications):
            sizes.append((count_macs(unet, call)[0][""], count_params(unet)))
    for _ in range(rounds):
        for times, (unet, modifications) in zip(found, pairs, strict=True):
            with applied(unet, modifications):
                times.append(seconds(unet, call, device))
    return [(macs, statistics.median(t), params) for t, (macs, params) in zip(found, sizes, strict=True)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, default="sd-v1.4")
    parser.add_argument("--plans", nargs="*", choices=PLANS, default=list(PLANS))
    parser.add_argument("--size", type=int, default=64, help="of the latents")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, dtype, config = torch.device(args.device), getattr(torch, args.dtype), CONFIGS[args.model]
    name = processor_name() if device.type == "cpu" else torch.cuda.get_device_name(device)
    print(f"{args.model}, {name}, {args.threads} threads, {args.dtype}, batch {args.batch}, {args.size}x{args.size}")
    unet, call = make_unet(config, dtype, device), make_call(config, args.size, args.batch, dtype, device)
    out = csv.writer(sys.stdout)
    out.writerow(["plan", "as", "M params", "GMACs", "s", "MACs saved", "time saved"])
    with torch.no_grad():
        paths = [p for p, _ in unet.named_modules() if any(re.fullmatch(PLANS[n][0], p) for n in args.plans)]
        found = find_operators(
            unet,
            {"sample": call.args[0], "timestep": call.args[1], **call.kwargs},
            include=paths,
            progress=False,
            latency=False,
        )
        specs = {o.path: o for o in found if o.is_candidate}
        for plan in args.plans:
            pattern, preset = PLANS[plan]
            chosen = [o for path, o in specs.items() if re.fullmatch(pattern, path)]
            pairs = [(unet, []), (unet, [Modification(o.path, o.kind, o.stand_ins[0]) for o in chosen])]
            if preset and args.model == "sd-v1.4":
                stock = copy.deepcopy(unet)
                apply_preset_(stock, preset)
                pairs.append((stock, []))
            rows = measure(pairs, call, args.rounds, device)
            for kind, (macs, took, params) in zip(
                ["original", f"{len(chosen)} stand-ins", "stock"], rows, strict=False
            ):
                saved = [f"{1 - value / whole:.3f}" for value, whole in ((macs, rows[0][0]), (took, rows[0][1]))]
                out.writerow([plan, kind, f"{params / 1e6:.1f}", f"{macs / 1e9:.1f}", f"{took:.3f}", *saved])
            sys.stdout.flush()


if __name__ == "__main__":
    main()
