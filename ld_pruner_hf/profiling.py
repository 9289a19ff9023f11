"""What a denoiser call costs: parameters, MACs, latency and peak memory, in total and per operator."""

from __future__ import annotations

import functools
import statistics
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .latents import RecordedCall, calling, patched
from .surgery import count_params


def _attention_flops(query_shape: Any, key_shape: Any, value_shape: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


# torch counts scaled-dot-product attention on CUDA and `meta`, but not the CPU's kernel.
_CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
_ATTENTION_OPS = ("scaled_dot_product", "bmm", "baddbmm", "efficient_attention", "flash_attention")


@dataclass(frozen=True)
class Profile:
    """The cost of one denoiser call.

    Attributes:
        params: parameters of the denoiser. macs: multiply-accumulates for one sample (FLOPs / 2), attention included;
        macs_conv_linear: those of convolutions and linear layers alone, as most papers count.
        latency_ms: median time of one call at `batch_size` samples; latency_iqr_ms: distance of the quartiles.
        peak_memory_mb: the model's weights and the most that other tensors held at one time, in 10^6 bytes (`peak_memory`).
        device, dtype, threads, batch_size: what it was measured on. None where nothing was run (`meta` device).
        operators: path -> {"params", "macs", "latency_share"}, if asked for.
    """

    params: int
    macs: int
    macs_conv_linear: int
    latency_ms: float | None
    latency_iqr_ms: float | None
    peak_memory_mb: float
    device: str
    dtype: str
    threads: int
    batch_size: int
    operators: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        time_ = (
            "not measured" if self.latency_ms is None else f"{self.latency_ms:.1f} ms (IQR {self.latency_iqr_ms:.1f})"
        )
        return (
            f"{self.params / 1e6:.2f}M params, {self.macs / 1e9:.3f} GMACs a sample "
            f"({self.macs_conv_linear / 1e9:.3f} conv + linear), {time_} and {self.peak_memory_mb:.1f} MB a call of "
            f"{self.batch_size} on {self.device} {self.dtype}, {self.threads} threads"
        )


def run(model: nn.Module, call: RecordedCall) -> Any:
    """One call of the model. It gets its own lists and dicts: U-Nets take T2I-Adapter features out of theirs."""
    args, kwargs = tree_map(lambda value: value, (call.args, call.kwargs))
    with calling(model, call.method):
        return model(*args, **kwargs)


@contextmanager
def frozen(*models: nn.Module) -> Iterator[None]:
    """Inside, no parameter requires gradients."""
    trained = [p for model in models for p in model.parameters() if p.requires_grad]
    try:
        for p in trained:
            p.requires_grad = False
        yield
    finally:
        for p in trained:
            p.requires_grad = True


def _apart(attend: Callable[..., Any]) -> Callable[..., Any]:
    """Flex attention outside of the modes around it: torch does not compile it inside of a counter."""

    def attended(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return attend(*args, **kwargs)

    return attended


def _counted(attend: Callable[..., Any]) -> Callable[..., Any]:
    """The same, and counted as attention without a mask."""

    def attended(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nn.functional.scaled_dot_product_attention(query.to("meta"), key.to("meta"), value.to("meta"), enable_gqa=True)
        return _apart(attend)(query, key, value, *args, **kwargs)

    return attended


@contextmanager
def _counter() -> Iterator[FlopCounterMode]:
    """Inside, operations are counted."""
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    with patched(flex_attention, "flex_attention", _counted), counter:
        yield counter


def count_macs(model: nn.Module, call: RecordedCall) -> tuple[dict[str, int], dict[str, int]]:
    """MACs for one sample by module path ("" is the model itself): (all, convolutions and linear layers alone)."""
    # Frozen: a slice of a parameter would require a gradient, under `no_grad` too, and torch's counter fails where such a tensor
    # has no graph.
    with torch.no_grad(), frozen(model), _counter() as counter:
        run(model, call)
    batch = call.batch_size
    root = type(model).__name__
    total, conv_linear = {}, {}
    for name, ops in counter.get_flop_counts().items():
        if name == "Global":
            continue
        path = "" if name == root else name.removeprefix(f"{root}.")
        flops = sum(ops.values())
        attention = sum(v for op, v in ops.items() if any(a in str(op) for a in _ATTENTION_OPS))
        total[path] = flops // 2 // batch
        conv_linear[path] = (flops - attention) // 2 // batch
    return total, conv_linear


def count_call_macs(fn: Callable[[], Any]) -> int:
    """MACs of everything that `fn()` runs."""
    with torch.no_grad(), _counter() as counter:
        fn()
    return counter.get_total_flops() // 2


def processor_name() -> str:
    """The processor's name where Linux tells it, else "cpu"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "cpu"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations make on one kind of device, while they live; not `known` ones."""

    def __init__(self, known: list[torch.Tensor], device: torch.device) -> None:
        super().__init__()
        self.device, self.live, self.peak = device.type, 0, 0
        self.alive: dict[int, Any] = {t.untyped_storage()._cdata: t for t in known}

    def _free(self, key: int, size: int, _: Any) -> None:
        self.live -= size
        del self.alive[key]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == self.device:
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.alive:
                    self.alive[key] = weakref.ref(storage, functools.partial(self._free, key, size))
                    self.live += size
        self.peak = max(self.peak, self.live)
        return result


def peak_memory(model: nn.Module, call: RecordedCall) -> int:
    """Bytes of the model's weights and of all other tensors at the moment of one call when these hold the most.

    Counted from the tensors, so it is exact, the same each time and on every device (`meta` too); what kernels use inside
    and what an allocator keeps in reserve come on top.
    """
    given = [v for v in tree_leaves((call.args, call.kwargs)) if isinstance(v, torch.Tensor)]
    return peak_memory_of(lambda: run(model, call), [model], given)


def peak_memory_of(fn: Callable[[], Any], models: Iterable[nn.Module], given: Iterable[torch.Tensor] = ()) -> int:
    """Like `peak_memory`, of anything that `fn()` runs with these models; tensors `given` to it are not counted.

    Tensors elsewhere than on the models' device (results on the CPU, trials on `meta`) are not counted either.
    """
    models = list(models)
    own = _weights(models)
    device = own[0].device if own else torch.device("cpu")
    apart = patched(flex_attention, "flex_attention", _apart)
    with torch.no_grad(), apart, _LiveTensors([*own, *given], device) as tensors:
        fn()
    return weights_memory(models) + tensors.peak


def weights_memory(models: Iterable[nn.Module]) -> int:
    """Bytes of the parameters and buffers of all these models, shared ones counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _weights(models)}.values())


def _weights(models: Iterable[nn.Module]) -> list[torch.Tensor]:
    return [t for model in models for t in (*model.parameters(), *model.buffers())]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_latency(
    fn: Callable[[], Any], device: torch.device, repeats: int = 10, warmup: int = 3
) -> tuple[float, float]:
    """(median, interquartile range) of the time of `fn()` in ms, after warm-up."""
    times = []
    for i in range(warmup + repeats):
        synchronize(device)
        start = time.perf_counter()
        fn()
        synchronize(device)
        if i >= warmup:
            times.append((time.perf_counter() - start) * 1e3)
    if len(times) < 2:
        return times[0], 0.0
    low, _, high = statistics.quantiles(times, n=4)
    return statistics.median(times), high - low


def latency_shares(model: nn.Module, call: RecordedCall, repeats: int = 3) -> dict[str, float]:
    """Part of the model's time that is spent inside each module, by path: median over `repeats` calls after a warm-up."""
    device = device_of(model)
    started: dict[str, float] = {}
    spent: dict[str, float] = {}

    def before(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            synchronize(device)
            started[path] = time.perf_counter()

        return hook

    def after(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            synchronize(device)
            spent[path] = spent.get(path, 0.0) + time.perf_counter() - started[path]

        return hook

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(before(path), prepend=True))
        handles.append(module.register_forward_hook(after(path)))
    runs: dict[str, list[float]] = {}
    try:
        with torch.no_grad():
            for i in range(repeats + 1):
                spent.clear()
                run(model, call)
                if i:
                    for path, seconds in spent.items():
                        runs.setdefault(path, []).append(seconds / spent[""])
    finally:
        for handle in handles:
            handle.remove()
    return {path: statistics.median(shares) for path, shares in runs.items()}


def device_of(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


def profile_call(model: nn.Module, call: RecordedCall, *, per_operator: bool = False, repeats: int = 10) -> Profile:
    """Measure one denoiser call; see `Profile`."""
    device = device_of(model)
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()), "float32")
    total, conv_linear = count_macs(model, call)
    latency = iqr = None
    if device.type != "meta":
        with torch.no_grad():
            latency, iqr = measure_latency(lambda: run(model, call), device, repeats)
    operators: dict[str, dict[str, float]] = {}
    if per_operator:
        shares = latency_shares(model, call) if device.type != "meta" else {}
        for path, module in model.named_modules():
            if path:
                operators[path] = {"params": count_params(module), "macs": total.get(path, 0)}
                if path in shares:
                    operators[path]["latency_share"] = shares[path]
    return Profile(
        params=count_params(model),
        macs=total.get("", 0),
        macs_conv_linear=conv_linear.get("", 0),
        latency_ms=latency,
        latency_iqr_ms=iqr,
        peak_memory_mb=peak_memory(model, call) / 1e6,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=dtype,
        threads=torch.get_num_threads(),
        batch_size=call.batch_size,
        operators=operators,
    )
