"""Running a pipeline to its final latents: which model denoises, with which conditions and seeds, leaving no trace.

The decoder never runs, and everything that a pipeline call changes (scheduler, random state, training flags, private
attributes) is put back, also after an error or Ctrl-C.
"""

from __future__ import annotations

import copy
import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin, SchedulerMixin
from torch import nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from .plan import SEVERAL

Condition = dict[str, Any]

# Components that denoise in diffusers' pipelines, by the attribute's name; any other name is found by watching a call.
USUAL_DENOISERS = ("unet", "transformer", "prior")


def default_prompts() -> list[str]:
    """The 50 built-in prompts: everyday scenes, styles and objects (LD-Pruner, section 2.4, uses 50 prompts)."""
    text = resources.files("ld_pruner_hf").joinpath("prompts.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


# ---- which model -----------------------------------------------------------------------------------------------------


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's components that are torch modules, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """The pipeline's models of diffusers, without its autoencoders, by name."""
    return {n: m for n, m in modules_of(pipe).items() if isinstance(m, ModelMixin) and not hasattr(m, "decode")}


def schedulers_of(pipe: Any) -> list[Any]:
    """The schedulers that take the pipeline's steps: `scheduler`, or where there is none of that name, one for each stage."""
    if hasattr(pipe, "scheduler"):
        return [pipe.scheduler]
    return [part for part in pipe.components.values() if isinstance(part, SchedulerMixin)]


def scheduler_names(pipe: Any) -> str:
    return ", ".join(type(scheduler).__name__ for scheduler in schedulers_of(pipe))


def find_denoiser(pipe: Any, component: str | None = None, **call: Any) -> str:
    """Name of the component that denoises.

    `component` if given; else a usual name (`unet`, `transformer`, `prior`); else the module whose forward ran last
    before the first scheduler step of one real call with the arguments `call`.

    Raises:
        ValueError: no such component, or none that denoises.
    """
    modules = modules_of(pipe)
    where = type(pipe).__name__
    if component is not None:
        if component not in modules:
            raise ValueError(f"{where}: no component {component!r} to prune; it has {sorted(modules)}")
        return component
    for name in USUAL_DENOISERS:
        if name in modules:
            return name
    if not modules or not schedulers_of(pipe):
        raise ValueError(
            f"{where}: no denoiser found among its components {sorted(pipe.components)}; name one with component=..., "
            "or pass the model itself with example_inputs to ld_pruner_hf.find_operators"
        )
    last: list[str] = []
    handles = [m.register_forward_hook(lambda *_, name=n: last.append(name)) for n, m in modules.items()]
    try:
        with explained(pipe, call):
            final_latents(pipe, call, seeds=[0], stop_after=1)
    except ValueError as error:
        raise ValueError(
            f"{where}: no denoiser found: {error}; or name one of {sorted(modules)} with component=..."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    if not last:
        raise ValueError(
            f"{where}: none of {sorted(modules)} ran before a scheduler step; name one with component=..."
        )
    return last[-1]


def find_denoisers(pipe: Any, component: str | None = None, **call: Any) -> list[str]:
    """Names of the components that denoise: most pipelines have one, Wan 2.2 has two that take turns, prior and decoder follow
    each other.

    Those named by `component` (several with a "+" between them); else what `find_denoiser` finds, and the models that ran last
    before some step of a scheduler of the pipeline in one real call with the arguments `call`. Run it inside `preserved(pipe)`.

    Raises:
        ValueError: no such component, or none that denoises.
    """
    if component is not None:
        return [find_denoiser(pipe, name) for name in component.split(SEVERAL)]
    first = find_denoiser(pipe, **call)
    modules = modules_of(pipe)
    others = [name for name in models_of(pipe) if name != first]
    if not others:
        return [first]
    ran, last = [first], {first}

    def note(step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def noted(*args: Any, **kwargs: Any) -> Any:
            last.add(ran[-1])
            return step(*args, **kwargs)

        return noted

    schedulers = {type(part) for part in pipe.components.values() if hasattr(part, "step")}
    with ExitStack() as stack:
        for kind in schedulers:
            stack.enter_context(patched(kind, "step", note))
        for name in (first, *others):
            handle = modules[name].register_forward_hook(lambda *_, name=name: ran.append(name))
            stack.callback(handle.remove)
        stack.enter_context(explained(pipe, call))
        final_latents(pipe, call, seeds=[0])
    return [name for name in modules if name in last]


def only_one(names: Sequence[str], what: str) -> str:
    """The component of that name; ValueError for several names where `what` takes one component."""
    if len(names) > 1:
        raise ValueError(
            f"{what}: got {' and '.join(names)}, which denoise together, expected one of them; choose it with "
            f"--component {names[0]} (component={names[0]!r} in Python), when scoring, too"
        )
    return names[0]


# ---- conditions ------------------------------------------------------------------------------------------------------


def call_parameters(pipe: Any) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(type(pipe).__call__).parameters)


def check_call_arguments(pipe: Any, names: Sequence[str]) -> None:
    """Raise ValueError if the pipeline's call takes none of these names."""
    parameters = call_parameters(pipe)
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if takes_more and not type(pipe).__module__.startswith(
        "diffusers."
    ):  # diffusers' own ignore what they do not name
        return
    unknown = [n for n in names if n not in parameters]
    if unknown:
        known = [n for n, p in parameters.items() if n != "self" and p.kind is not p.VAR_KEYWORD]
        raise ValueError(f"{type(pipe).__name__} takes no argument {unknown}; its call takes {known}")


_NO_INPUTS = {
    "self",
    "generator",
    "latents",
    "height",
    "width",
    "timesteps",
    "sigmas",
    "output_type",
    "attention_kwargs",
}


def unset_inputs(pipe: Any, call: Condition) -> list[str]:
    """The arguments that the pipeline's call might need and `call` does not give: no default, or None; settings left out."""
    return [
        name
        for name, p in call_parameters(pipe).items()
        if name not in call and p.default in (None, p.empty) and p.kind is p.POSITIONAL_OR_KEYWORD
        and name not in _NO_INPUTS and not name.startswith(("callback", "num_", "guidance_"))
        and not name.endswith(("_kwargs", "_steps", "_scale", "_type"))
    ]  # fmt: skip


@contextmanager
def explained(pipe: Any, call: Condition) -> Iterator[None]:
    """Inside, an error of the pipeline's call becomes a ValueError that lists the arguments that it may lack."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"{type(pipe).__name__} cannot be called with {sorted(call) or 'no arguments'} ({type(error).__name__}: {error}); it "
            f"also takes {unset_inputs(pipe, call)}: pass what it needs of these as conditions=[{{...}}, ...] or as keyword arguments"
        ) from error


def steps_argument(pipe: Any, num_inference_steps: int | None) -> Condition:
    """The number of denoising steps under the name that this pipeline uses."""
    if num_inference_steps is None:
        return {}
    if not isinstance(num_inference_steps, int) or num_inference_steps < 1:
        raise ValueError(f"num_inference_steps: got {num_inference_steps!r}, expected a positive integer")
    parameters = call_parameters(pipe)
    for name in ("num_inference_steps", "steps", "prior_num_inference_steps"):
        if name in parameters:
            return {name: num_inference_steps}
    raise ValueError(f"{type(pipe).__name__} takes no number of steps; leave num_inference_steps out")


def make_conditions(
    pipe: Any, conditions: Any = None, call_kwargs: Mapping[str, Any] | None = None
) -> list[Condition]:
    """Turn what a user passed as conditions into a list of call arguments, one dict a condition.

    Args:
        conditions: None (the built-in prompts where the pipeline takes a prompt, else one implicit condition), a prompt,
            a list of prompts, a dict of call arguments or a list of dicts.
        call_kwargs: arguments that go to every call.

    Raises:
        ValueError: nothing given, an unknown argument, or an argument missing that the call needs.
    """
    call_kwargs = dict(call_kwargs or {})
    parameters = call_parameters(pipe)
    if conditions is None:
        given = any(name == "prompt" or name.startswith("prompt_embeds") for name in call_kwargs)
        if "prompt" in parameters and not given:
            conditions = default_prompts()
        else:
            conditions = [{}]
    if isinstance(conditions, (str, Mapping)):
        conditions = [conditions]
    conditions = list(conditions)
    if not conditions:
        raise ValueError("conditions: got an empty list, expected at least one prompt or dict of call arguments")
    result: list[Condition] = []
    for i, condition in enumerate(conditions):
        if isinstance(condition, str):
            condition = {"prompt": condition}
        if not isinstance(condition, Mapping):
            raise ValueError(
                f"conditions[{i}]: got {type(condition).__name__}, expected a prompt or a dict of call arguments"
            )
        result.append({**call_kwargs, **condition})
    check_call_arguments(pipe, list(dict.fromkeys(k for c in result for k in c)))
    for reserved in ("generator", "latents", "output_type", "return_dict"):
        if any(reserved in c for c in result):
            raise ValueError(f"{reserved!r} is set by ld_pruner_hf itself; use seed= and seeds= to choose the noise")
    needed = [
        n for n, p in parameters.items() if n != "self" and p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    for i, condition in enumerate(result):
        missing = [n for n in needed if n not in condition]
        if missing:
            raise ValueError(
                f"conditions[{i}]: {type(pipe).__name__} needs {missing}; pass conditions=[{{...}}, ...] with these, or as "
                "keyword arguments"
            )
    return result


@dataclass(frozen=True)
class Job:
    """One pipeline call: some (condition, seed) pairs that run as one batch."""

    call: Condition
    seeds: tuple[int, ...]
    condition_ids: tuple[int, ...]


def make_jobs(pipe: Any, conditions: Sequence[Condition], seeds: Sequence[int], batch_size: int) -> list[Job]:
    """Group all (condition, seed) pairs into calls of at most `batch_size` samples.

    Pairs share a call where the pipeline can take them together: conditions that differ in nothing but their prompt, or
    an unconditional pipeline with a `batch_size` argument. Everything else runs one by one.
    """
    parameters = call_parameters(pipe)
    pairs = [(i, s) for i in range(len(conditions)) for s in seeds]
    prompts = [c.get("prompt") for c in conditions]
    rest = [{k: v for k, v in c.items() if k != "prompt"} for c in conditions]
    same_rest = all(_same(r, rest[0]) for r in rest)
    texts = all(isinstance(p, str) for p in prompts) and _takes_lists(parameters.get("prompt"))
    if texts and same_rest and all(_batchable(k, v) for k, v in rest[0].items()):

        def call(chunk: list[tuple[int, int]]) -> Condition:
            text = {k: [v] * len(chunk) if "prompt" in k and isinstance(v, str) else v for k, v in rest[0].items()}
            return {**text, "prompt": [prompts[i] for i, _ in chunk]}

    elif len(conditions) == 1 and "prompt" not in conditions[0] and "batch_size" in parameters:

        def call(chunk: list[tuple[int, int]]) -> Condition:
            return {**conditions[0], "batch_size": len(chunk)}

    else:
        return [Job(conditions[i], (s,), (i,)) for i, s in pairs]
    chunks = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
    return [Job(call(c), tuple(s for _, s in c), tuple(i for i, _ in c)) for c in chunks]


def _takes_lists(parameter: inspect.Parameter | None) -> bool:
    """As far as its type says; nearly all pipelines take several prompts in a call, DreamLite takes one."""
    if parameter is None or parameter.annotation is parameter.empty:
        return True
    return "list" in str(parameter.annotation).lower()


def _same(a: Condition, b: Condition) -> bool:
    return a.keys() == b.keys() and all(a[k] is b[k] or (_is_plain(a[k]) and a[k] == b[k]) for k in a)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _batchable(name: str, value: Any) -> bool:
    return _is_plain(value) and name != "num_images_per_prompt"


# ---- leaving no trace ------------------------------------------------------------------------------------------------


@contextmanager
def preserved(pipe: Any) -> Iterator[None]:
    """Put back what pipeline calls change: random state, training flags, attention processors, scheduler, the pipeline's private
    attributes.

    Inside, modules are in eval mode, gradients are off, the pipeline's own progress bars are quiet and its scheduler is a copy.
    """
    rng = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    attributes = dict(vars(pipe))
    modules = [m for part in modules_of(pipe).values() for m in part.modules()]
    training = [m.training for m in modules]
    processors: list[tuple[Any, Any]] = [
        (m, m.processor) for m in modules if hasattr(type(m), "set_processor") and hasattr(m, "processor")
    ]
    try:
        for module in modules:
            if module.training:  # setting an attribute of a module is slow
                module.training = False
        pipe._progress_bar_config = {"disable": True}
        if hasattr(pipe, "scheduler"):
            pipe.scheduler = copy.deepcopy(pipe.scheduler)
        with torch.no_grad():
            yield
    finally:
        for module, flag in zip(modules, training, strict=True):
            if module.training != flag:
                module.training = flag
        for module, processor in processors:
            if module.processor is not processor:
                module.set_processor(processor)
        vars(pipe).clear()
        vars(pipe).update(attributes)
        torch.set_rng_state(rng[0])
        np.random.set_state(rng[1])
        random.setstate(rng[2])
        if cuda_rng is not None:
            torch.cuda.set_rng_state_all(cuda_rng)


# ---- final latents ---------------------------------------------------------------------------------------------------


class _Stop(BaseException):
    """Ends a pipeline call early; a BaseException, so that no `except Exception` on the way swallows it."""


class _Recorded(BaseException):
    """Ends a pipeline call as soon as the denoiser's arguments are known."""


@contextmanager
def patched(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Replace `owner.name` (a class or an object) for a while."""
    had = name in vars(owner)
    original = vars(owner).get(name)
    setattr(owner, name, wrap(getattr(owner, name)))
    try:
        yield
    finally:
        if had:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def execution_device(pipe: Any) -> torch.device:
    """Where the pipeline runs."""
    return getattr(pipe, "_execution_device", None) or torch.device("cpu")


@contextmanager
def on_device(pipe: Any, device: torch.device) -> Iterator[None]:
    """Inside, the pipeline is told where it runs; else it goes through all modules whenever it asks, which is often."""
    if not isinstance(getattr(type(pipe), "_execution_device", None), property):
        yield
        return

    def told(asked: property) -> property:
        return property(lambda self: device if self is pipe else asked.__get__(self))

    with patched(type(pipe), "_execution_device", told):  # type: ignore[arg-type]
        yield


@contextmanager
def encoders_remembered(pipe: Any, component: str, found: dict[Any, Any]) -> Iterator[None]:
    """Inside, models from outside diffusers (text and image encoders), but not `component`, run once for equal inputs.

    Args:
        found: their outputs; keep it for the next time.
    """

    def key_of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.dtype, value.detach().cpu().float().numpy().tobytes()
        return repr(value)

    def remembering(name: str, model: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def remembered(*args: Any, **kwargs: Any) -> Any:
            if any(m._forward_hooks for m in model.modules()):  # JoyImage takes its embeddings from a hook
                return forward(*args, **kwargs)
            leaves, structure = tree_flatten((args, kwargs))
            key = name, str(structure), tuple(map(key_of, leaves))
            if key not in found:
                found[key] = forward(*args, **kwargs)
            return found[key]

        return remembered

    with ExitStack() as stack:
        for name, model in modules_of(pipe).items():
            if name != component and not isinstance(model, ModelMixin):
                stack.enter_context(patched(model, "forward", functools.partial(remembering, name, model)))
        yield


@dataclass(frozen=True)
class RecordedCall:
    """The arguments of one call of a model: of the denoiser's forward, or of the autoencoder's `decode`."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    method: str = "forward"

    @property
    def batch_size(self) -> int:
        """Size of the first dimension of the first tensor: the samples in the call (two a picture under guidance)."""
        for value in [*self.args, *self.kwargs.values()]:
            if isinstance(value, torch.Tensor) and value.ndim > 1:
                return value.shape[0]
        return 1

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> RecordedCall:
        """The same call with every tensor changed."""
        args, kwargs = tree_map_only(torch.Tensor, change, (self.args, self.kwargs))
        return RecordedCall(args, kwargs, self.method)


@contextmanager
def calling(model: nn.Module, method: str) -> Iterator[None]:
    """Inside, to call the model means its method of that name: hooks and counters on the model see `decode` as a forward."""
    if method == "forward":
        yield
        return
    with patched(model, "forward", lambda _: getattr(model, method)):
        yield


def run_to_latents(
    pipe: Any, call: Condition, seeds: Sequence[int], stop_after: int | None = None
) -> tuple[torch.Tensor, dict[str, RecordedCall], int]:
    """Run the pipeline up to its first decoding: latents as the last scheduler step returns them, component -> its `decode`
    call, scheduler steps.

    Where several schedulers step in turns (for pictures and sound, or for each frame), the latents of all in one (B, n) tensor.
    Where none steps, what a model of the pipeline gave last.
    """
    device = execution_device(pipe)
    generators = [torch.Generator(device="cpu" if device.type == "mps" else device).manual_seed(s) for s in seeds]
    call = dict(call)
    if "generator" in call_parameters(pipe):
        call["generator"] = generators if len(generators) > 1 else generators[0]
    # The last step of each scheduler that takes turns; it is kept alive, so that no id comes twice.
    latest: dict[int, tuple[Any, torch.Tensor]] = {}
    prediction: torch.Tensor | None = None
    decodes: dict[str, RecordedCall] = {}
    steps = 0

    def keep_output(step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)  # pipelines look at the signature to see what a scheduler's step takes
        def kept(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            output = step(scheduler, *args, **kwargs)
            if id(scheduler) in latest:
                latest.clear()
            latest[id(scheduler)] = scheduler, output[0]
            steps += 1
            if steps == stop_after:
                raise _Stop
            return output

        return kept

    def keep_prediction(_: nn.Module, args: Any, output: Any) -> None:
        nonlocal prediction
        if not steps:
            prediction = next((x for x in tree_leaves(output) if isinstance(x, torch.Tensor)), prediction)

    def stop_when_denoised(component: str, method: str, decode: Callable[..., Any]) -> Callable[..., Any]:
        def stopping(*args: Any, **kwargs: Any) -> Any:
            if steps:
                if method == "decode":
                    decodes[component] = RecordedCall(args, dict(kwargs), method)
                raise _Stop
            return decode(*args, **kwargs)

        return stopping

    torch.manual_seed(seeds[0])  # for pipelines that draw noise without their generator
    with ExitStack() as stack:
        for kind in {type(scheduler) for scheduler in schedulers_of(pipe) if hasattr(scheduler, "step")}:
            # On the class, not on the object: some pipelines copy their scheduler.
            stack.enter_context(patched(kind, "step", keep_output))
        for model in models_of(pipe).values():
            stack.callback(model.register_forward_hook(keep_prediction).remove)
        stack.enter_context(on_device(pipe, device))
        for name, part in modules_of(pipe).items():
            # Shap-E's renderer has decode_to_image and decode_to_mesh.
            for method in (m for m in dir(type(part)) if m == "decode" or m.startswith("decode_")):
                stack.enter_context(patched(part, method, functools.partial(stop_when_denoised, name, method)))
        try:
            pipe(**call)
        except _Stop:
            if hasattr(pipe, "maybe_free_model_hooks"):
                pipe.maybe_free_model_hooks()
    outputs = [x for _, x in latest.values()] or ([] if prediction is None else [prediction])
    if not outputs:
        raise RuntimeError(f"{type(pipe).__name__} finished without a step of its scheduler {scheduler_names(pipe)}")
    together = [x for x in outputs if len(x) == len(outputs[-1])]
    latents = together[0] if len(together) == 1 else torch.cat([x.flatten(1) for x in together], dim=1)
    return latents, decodes, steps


def denoise(
    pipe: Any, call: Condition, seeds: Sequence[int], stop_after: int | None = None
) -> tuple[torch.Tensor, dict[str, RecordedCall]]:
    """Run the pipeline up to its first decoding: (latents after the last scheduler step, component -> its `decode` call)."""
    latents, decodes, _ = run_to_latents(pipe, call, seeds, stop_after)
    return latents.detach().to("cpu", torch.float32), decodes


def final_latents(pipe: Any, call: Condition, seeds: Sequence[int], stop_after: int | None = None) -> torch.Tensor:
    """Run the pipeline and return the latents after the last scheduler step, undecoded: (B, ...) float32 on the CPU.

    Nothing is asked of the pipeline but that its scheduler steps: the call ends when it begins to decode. Run it inside
    `preserved(pipe)`.

    Args:
        call: the pipeline's arguments for the whole batch.
        seeds: one seed a sample; the noise depends on nothing else.
        stop_after: stop after so many scheduler steps.

    Raises:
        RuntimeError: the call made no scheduler step.
    """
    return denoise(pipe, call, seeds, stop_after)[0]


def decoder_call(pipe: Any, component: str, call: Condition, seeds: Sequence[int]) -> RecordedCall:
    """The arguments with which the pipeline decodes what it denoised from these seeds. Run it inside `preserved(pipe)`.

    Raises:
        ValueError: the pipeline does not decode with this component.
    """
    return _decode_of(pipe, component, denoise(pipe, call, seeds)[1])


def _decode_of(pipe: Any, component: str, decodes: Mapping[str, RecordedCall]) -> RecordedCall:
    if component not in decodes:
        raise ValueError(
            f"{type(pipe).__name__}: its component {component!r} neither denoises nor decodes; name another with component=..."
        )
    return decodes[component]


def record_call(pipe: Any, component: str, call: Condition, seed: int = 0) -> RecordedCall:
    """The first call of the component in one real pipeline call. Run it inside `preserved(pipe)`.

    Raises:
        ValueError: the component neither denoises nor decodes.
    """
    found: list[RecordedCall] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(RecordedCall(args, dict(kwargs)))
        raise _Recorded

    handle = getattr(pipe, component).register_forward_pre_hook(keep, with_kwargs=True)
    try:
        try:
            with explained(pipe, call):
                decodes = denoise(pipe, call, [seed])[1]
            return _decode_of(pipe, component, decodes)
        except _Recorded:
            if hasattr(pipe, "maybe_free_model_hooks"):
                pipe.maybe_free_model_hooks()
    finally:
        handle.remove()
    return found[0]
