"""A pruned U-Net and pruned MMDiTs, each in a tiny pipeline, with the arguments of one call of the denoiser."""

from __future__ import annotations

import functools

import families
import torch

import ld_pruner_hf
from ld_pruner_hf import Modification, PruningPlan
from ld_pruner_hf.latents import preserved, record_call
from ld_pruner_hf.operators import steps_argument_if_any
from ld_pruner_hf.profiling import run
from ld_pruner_hf.surgery import architecture_of

COMPONENTS = {"sd": "unet", "sd3": "transformer", "flux": "transformer"}
PATHS = {
    "sd": ("mid_block.attentions.0", "down_blocks.0.attentions.0.transformer_blocks.0.attn1", "up_blocks.1.resnets.0"),
    "sd3": ("transformer_blocks.0.attn", "transformer_blocks.1.ff", "transformer_blocks.0.norm2"),
    "flux": ("transformer_blocks.0.attn", "single_transformer_blocks.1.attn", "transformer_blocks.1.ff_context"),
}


@functools.cache
def plan_for(name: str, paths: tuple[str, ...]) -> PruningPlan:
    """A plan that takes these operators out of the family's denoiser, by the first stand-in of each."""
    pipe, call = families.make(name)
    operators = {
        o.path: o
        for o in ld_pruner_hf.find_operators(pipe, include=paths, latency=False, progress=False, trial=False, **call)
    }
    model = getattr(pipe, COMPONENTS[name])
    chosen = tuple(Modification(p, operators[p].kind, operators[p].stand_ins[0]) for p in paths)
    return PruningPlan(COMPONENTS[name], type(model).__name__, architecture_of(model), chosen)


class Pruned:
    """A pruned tiny pipeline with its denoiser and the arguments of one call of it."""

    def __init__(self, name: str, paths: tuple[str, ...] = ()) -> None:
        self.name, self.component = name, COMPONENTS[name]
        self.pipe, self.call = families.make(name)
        self.pipe.prune(plan_for(name, paths or PATHS[name]), **self.call)
        with preserved(self.pipe):
            self.model_call = record_call(self.pipe, self.component, {**self.call, **steps_argument_if_any(self.pipe)})

    @property
    def model(self):
        return getattr(self.pipe, self.component)

    @torch.no_grad()
    def output(self, model=None) -> torch.Tensor:
        return run(self.model if model is None else model, self.model_call)[0]

    def same(self, model) -> bool:
        return torch.equal(self.output(), self.output(model))

    def latents(self, steps: int = 2, **changes) -> torch.Tensor:
        """What the whole pipeline makes, undecoded."""
        call = {**self.call, "num_inference_steps": steps, **changes}
        return self.pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent").images
