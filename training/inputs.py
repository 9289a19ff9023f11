"""What the denoiser is called with: the pipeline's own call is recorded, so that text encoders, size embeddings, packed latents and
whatever else a pipeline passes are as it passes them; only the noisy latents and the timestep are ours.
"""

import contextlib
import inspect

import torch
from data import DataError

from ld_pruner_hf.latents import (
    RecordedCall,
    call_parameters,
    execution_device,
    on_device,
    preserved,
    record_call,
    steps_argument,
)

TIME_NAMES = ("timestep", "timesteps", "t", "timestep_ratio")
CONDITION_ARGUMENTS = ("prompt", "class_labels")


# ---- the denoiser's call ---------------------------------------------------------------------------------------------


def _flatten(value, name=""):
    """{"a/b": tensor or other leaf} of nested dicts, lists and tuples."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in _flatten(inner, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, inner in enumerate(value) for k, v in _flatten(inner, f"{name}/{i}").items()}
    return {name: value}


def _replaced(value, new, name=""):
    """The same nested structure with the leaves in `new` put in."""
    if isinstance(value, dict):
        return {key: _replaced(inner, new, f"{name}/{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(inner, new, f"{name}/{i}") for i, inner in enumerate(value))
    return new.get(name, value)


class DenoiserInputs:
    """Calls of a pipeline's denoiser, learnt from two recorded ones (of one sample and of two).

    Attributes:
        argument: what the pipeline is conditioned by, "prompt" or "class_labels"; None if by nothing.
        sample_shape: of one sample's latents, in the layout that the denoiser takes.
    """

    def __init__(self, pipe, component, resolution=None):
        self.pipe, self.component, self.device = pipe, component, execution_device(pipe)
        parameters = call_parameters(pipe)
        self.argument = next((a for a in CONDITION_ARGUMENTS if a in parameters), None)
        self.options = steps_argument(pipe, 2) if {"num_inference_steps", "steps"} & set(parameters) else {}
        for name in ("height", "width"):
            if resolution and name in parameters:
                self.options[name] = resolution
        one, two = (self._record([self.blank] * n, n) for n in (1, 2))
        names = list(inspect.signature(getattr(pipe, component).forward).parameters)
        self.sample_name = names[0]
        self.time_name = next((n for n in names if n in TIME_NAMES), None)
        if self.time_name is None:
            raise DataError(
                f"{component}: its forward takes {names}, none of {TIME_NAMES}; only denoisers with a timestep are distilled"
            )
        a, b = _flatten(one), _flatten(two)
        # What grows with the batch is a condition of each sample; guidance may double both.
        self.batched = [
            k for k in a if isinstance(a[k], torch.Tensor) and a[k].ndim and b[k].shape[0] == 2 * a[k].shape[0]
            and k not in (f"/{self.sample_name}", f"/{self.time_name}")
        ]  # fmt: skip
        self.template, self.sample_shape = one, tuple(one[self.sample_name].shape[1:])
        self.time_scale = self._time_scale(one)

    @property
    def blank(self):
        """The condition that stands for none."""
        return 0 if self.argument == "class_labels" else ""

    def pipeline_call(self, conditions, n, guidance_scale=None):
        """Arguments of one pipeline call for n samples."""
        parameters = call_parameters(self.pipe)
        call = dict(self.options)
        if self.argument:
            call[self.argument] = list(conditions)
        elif "batch_size" in parameters:
            call["batch_size"] = n
        if guidance_scale is not None and "guidance_scale" in parameters:
            call["guidance_scale"] = guidance_scale
        return call

    def _record(self, conditions, n):
        """Keyword arguments of the denoiser's first call."""
        with preserved(self.pipe), on_device(self.pipe, self.device):
            recorded = record_call(self.pipe, self.component, self.pipeline_call(conditions, n, guidance_scale=1.0))
            self._first_time = float(self.pipe.scheduler.timesteps[0])
        names = list(inspect.signature(getattr(self.pipe, self.component).forward).parameters)
        return {**dict(zip(names, recorded.args, strict=False)), **recorded.kwargs}

    def _time_scale(self, call):
        """Some pipelines tell their denoiser the time from 0 to 1 instead of the scheduler's."""
        told = float(torch.as_tensor(call[self.time_name]).flatten()[0])
        return 1.0 if told > 1 or self._first_time <= 1 else told / self._first_time

    def encode(self, conditions, n):
        """{name: (n, ...)} of what the pipeline passes for these prompts or labels."""
        flat = _flatten(self._record(conditions, n))
        return {k: flat[k][-n:].detach() for k in self.batched}  # with guidance, the conditional half comes last

    def call(self, noisy, timesteps, conditions, dtype):
        """The denoiser's arguments for noisy latents (B, ...) at timesteps (B,)."""
        ready = {k: v.to(noisy.device, dtype if v.is_floating_point() else v.dtype) for k, v in conditions.items()}
        time = timesteps if self.time_scale == 1.0 else timesteps * self.time_scale
        kwargs = _replaced(self.template, ready)
        return RecordedCall((), {**kwargs, self.sample_name: noisy.to(dtype), self.time_name: time.to(noisy.device)})


# ---- pictures to latents ---------------------------------------------------------------------------------------------


def autoencoder_of(pipe):
    """The pipeline's autoencoder, or None where it denoises pixels."""
    return next((m for n in ("vae", "vqvae", "movq") if (m := getattr(pipe, n, None)) is not None), None)


def check_resolution(pipe, resolution):
    """Raise DataError if the autoencoder cannot halve the resolution as often as it does."""
    vae = autoencoder_of(pipe)
    factor = 2 ** (len(vae.config.get("block_out_channels", [0])) - 1) if vae is not None else 1
    if resolution and (resolution < factor or resolution % factor):
        good = max(factor, round(resolution / factor) * factor)
        raise DataError(
            f"--resolution: got {resolution}, expected a multiple of {factor}, which the VAE halves it by; {good} is one"
        )


class Encoder:
    """Pixels (B, C, H, W) in [-1, 1] to the mean and the standard deviation of their latents, scaled as the pipeline's are."""

    def __init__(self, pipe, inputs):
        self.pipe, self.vae, self.shape = pipe, autoencoder_of(pipe), inputs.sample_shape

    @property
    def channels(self):
        """Of the pictures."""
        return self.vae.config.get("in_channels", 3) if self.vae is not None else self.shape[0]

    @torch.no_grad()
    def __call__(self, pixels):
        if self.vae is None:
            mean, std = pixels, None
        else:
            encoded = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype))
            posterior = getattr(encoded, "latent_dist", None)
            mean, std = (posterior.mean, posterior.std) if posterior is not None else (encoded.latents, None)
            shift, scale = self.vae.config.get("shift_factor") or 0.0, self.vae.config.get("scaling_factor") or 1.0
            mean, std = (mean.float() - shift) * scale, None if std is None else std.float() * scale
        if tuple(mean.shape[1:]) != self.shape and hasattr(self.pipe, "_pack_latents"):
            mean, std = (None if x is None else self.pipe._pack_latents(x, *x.shape) for x in (mean, std))
        if tuple(mean.shape[1:]) != self.shape:
            raise DataError(
                f"pictures encode to latents {tuple(mean.shape[1:])}, the denoiser is called with {self.shape}; set --resolution to "
                "the pipeline's, or run it data-free (--data_free)"
            )
        return mean, std


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _widened(output):
    """A model's output in float32."""
    if isinstance(output, dict):
        return type(output)(**{name: value.float() for name, value in output.items()})
    return tuple(value.float() for value in output)


@contextlib.contextmanager
def float32_outputs(pipe, component):
    """Denoiser and decoder give float32, whatever they compute in: some pipelines end in numpy, which has no bf16."""
    handle = getattr(pipe, component).register_forward_hook(lambda _, __, output: _widened(output))
    autoencoder = autoencoder_of(pipe)
    if autoencoder is not None:
        decode = autoencoder.decode
        autoencoder.decode = lambda *args, **kwargs: _widened(decode(*args, **kwargs))
    try:
        yield
    finally:
        handle.remove()
        if autoencoder is not None:
            del autoencoder.decode
