"""Where the features of a pruned denoiser and its original are compared: stages found by watching one real call of each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .operators import recorded
from .profiling import run

TAPS_PER_LIST = 6  # all stages of every U-Net; enough of a transformer's blocks to guide each part of it

# Names that wrappers put into a module's path; the model inside knows nothing of them.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@dataclass(frozen=True)
class Tap:
    """A module whose output is a feature: `index` says which of its output tensors, `shape` is that of one real call."""

    path: str
    index: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TapPair:
    """The same stage in teacher and student; shapes agree."""

    teacher: Tap
    student: Tap

    def __str__(self) -> str:
        names = (
            self.teacher.path
            if self.teacher.path == self.student.path
            else f"{self.teacher.path} -> {self.student.path}"
        )
        return f"{names} {self.student.shape[1:]}"


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DDP, DeepSpeed, FSDP or `torch.compile`."""
    while True:
        inner = next((m for name in _WRAPPERS if isinstance(m := model._modules.get(name), nn.Module)), None)
        if inner is None or not _is_wrapper(model):
            return model
        model = inner


def _is_wrapper(model: nn.Module) -> bool:
    """True for a module that holds one child, under a name that wrappers use."""
    return len(model._modules) == 1 and next(iter(model._modules)) in _WRAPPERS


def _modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Modules under the names that they have without wrappers inside the model."""
    named: dict[str, nn.Module] = {}
    for path, module in unwrap(model).named_modules(remove_duplicate=False):
        clean = ".".join(part for part in path.split(".") if part not in _WRAPPERS[1:])
        named.setdefault(clean, module)
    return named


def _tensors(output: Any) -> list[torch.Tensor | None]:
    """The tensors that a module returns, not those of tuples inside (in a U-Net's stage these are skip connections)."""
    if isinstance(output, Mapping):
        output = list(output.values())
    values = output if isinstance(output, (tuple, list)) else [output]
    return [v if isinstance(v, torch.Tensor) and v.is_floating_point() else None for v in values]


def _largest(output: Any) -> int | None:
    """Index of the largest returned tensor: of image and text tokens, the image's."""
    sizes = [t.numel() if t is not None and t.ndim > 1 else 0 for t in _tensors(output)]
    largest = max(sizes, default=0)
    return sizes.index(largest) if largest else None


@torch.no_grad()
def _observe(model: nn.Module, call: Any) -> tuple[dict[str, Tap], tuple[int, ...]]:
    """(path -> tap of every module that ran, in the order in which they first finished; shape of the output)."""
    seen: dict[str, Tap] = {}

    def watch(path: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            index = _largest(output)
            if index is not None:
                seen[path] = Tap(path, index, tuple(_tensors(output)[index].shape))  # type: ignore[union-attr]

        return hook

    inner = unwrap(model)
    training = [(m, m.training) for m in inner.modules()]
    handles = [m.register_forward_hook(watch(path)) for path, m in _modules_by_path(model).items() if path]
    try:
        inner.eval()
        output = run(inner, recorded(call))
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in training:
            module.training = flag
    index = _largest(output)
    if index is None:
        raise ValueError(f"{type(inner).__name__}: one call returned no tensor, expected the denoiser's prediction")
    return seen, tuple(_tensors(output)[index].shape)  # type: ignore[union-attr]


def _block_lists(model: nn.Module, seen: Mapping[str, Tap]) -> dict[str, list[Tap]]:
    """Name of each outermost list of blocks -> taps at the ends of those of its blocks that ran."""
    modules = _modules_by_path(model)
    lists = [path for path, m in modules.items() if isinstance(m, nn.ModuleList)]
    outermost = [p for p in lists if not any(p.startswith(f"{q}.") for q in lists)]
    top = [p for p in outermost if "." not in p]  # text refiners and the like lie deeper
    found = {p: _ends(p, modules, seen) for p in top}
    if not any(found.values()):
        found = {p: _ends(p, modules, seen) for p in outermost}
    return {path: taps for path, taps in found.items() if taps}


def _ends(path: str, modules: Mapping[str, nn.Module], seen: Mapping[str, Tap]) -> list[Tap]:
    """The last output of each element of the list at `path`; an element may itself be a list of blocks."""
    taps = []
    for i in range(len(modules[path])):  # type: ignore[arg-type]
        element = f"{path}.{i}"
        if element in seen:
            taps.append(seen[element])
        elif isinstance(modules[element], nn.ModuleList):
            inner = [seen[p] for j in range(len(modules[element])) if (p := f"{element}.{j}") in seen]  # type: ignore[arg-type]
            taps += inner[-1:]
    return [t for t in taps if len(t.shape) > 2]


def _align(teacher: Sequence[Tap], student: Sequence[Tap]) -> list[TapPair]:
    """Pair as many taps of equal shape as keep their order; of several ways, the one closest to equal relative depth."""
    n, m = len(teacher), len(student)
    best: list[list[tuple[int, float]]] = [
        [(0, 0.0)] * (m + 1) for _ in range(n + 1)
    ]  # (-pairs, distance), least wins
    for i in range(n - 1, -1, -1):
        for j in range(m - 1, -1, -1):
            best[i][j] = min(best[i + 1][j], best[i][j + 1], _with_pair(teacher, student, i, j, best))
    pairs, i, j = [], 0, 0
    while i < n and j < m:
        if best[i][j] == _with_pair(teacher, student, i, j, best):
            pairs.append(TapPair(teacher[i], student[j]))
            i, j = i + 1, j + 1
        elif best[i][j] == best[i + 1][j]:
            i += 1
        else:
            j += 1
    return pairs


def _with_pair(
    teacher: Sequence[Tap], student: Sequence[Tap], i: int, j: int, best: list[list[tuple[int, float]]]
) -> tuple[int, float]:
    """The cost of pairing i with j and doing the best behind them; infinite where shapes differ."""
    if teacher[i].shape != student[j].shape:
        return (1, math.inf)
    pairs, distance = best[i + 1][j + 1]
    return (pairs - 1, distance + abs((i + 1) / len(teacher) - (j + 1) / len(student)))


def _thinned(pairs: list[TapPair], most: int = TAPS_PER_LIST) -> list[TapPair]:
    """At most so many pairs, evenly spaced, the last always among them."""
    if len(pairs) <= most:
        return pairs
    return [pairs[round((i + 1) * len(pairs) / most) - 1] for i in range(most)]


def find_taps(
    teacher: nn.Module,
    student: nn.Module,
    call: Any,
    paths: Sequence[str] | None = None,
    student_call: Any = None,
) -> list[TapPair]:
    """Where teacher and student are compared, found by watching one real call of each.

    Without `paths`: the ends of the blocks in the models' top-level lists. In a U-Net these are the down and up stages
    (BK-SDM; the mid block is in no list), in a transformer its blocks, of which `TAPS_PER_LIST` evenly spaced are taken. Blocks
    are paired in order by equal shapes, so a student with fewer of them has its pairs too.

    Args:
        teacher, student: the denoisers, bare or wrapped; stand-ins inside are like any other module.
        call: arguments of one call, as for `find_operators`. student_call: the student's, if other than `call`.
        paths: module paths to compare instead; "a=b" where teacher's `a` belongs to student's `b`.

    Raises:
        ValueError: outputs of other shapes; a path that a model does not have or does not run; nothing to compare.

    Example:
        >>> for pair in find_taps(teacher.unet, student.unet, call):
        ...     print(pair)
    """
    seen_t, out_t = _observe(teacher, call)
    seen_s, out_s = _observe(student, call if student_call is None else student_call)
    names = f"teacher {type(unwrap(teacher)).__name__} and student {type(unwrap(student)).__name__}"
    if out_t != out_s:
        raise ValueError(
            f"{names}: outputs have shapes {out_t} and {out_s}, expected equal ones; the student must be pruned from this teacher"
        )
    if paths:
        return [_pair_of(path, seen_t, seen_s) for path in paths]
    lists_t, lists_s = _block_lists(teacher, seen_t), _block_lists(student, seen_s)
    pairs = [pair for name in lists_t if name in lists_s for pair in _thinned(_align(lists_t[name], lists_s[name]))]
    if not pairs:
        raise ValueError(
            f"{names}: no blocks of equal output shapes found in their lists {sorted({*lists_t, *lists_s})}; name modules to "
            "compare (--feature_taps), or distil without features (--feature_weight 0)"
        )
    return pairs


def _pair_of(path: str, seen_t: Mapping[str, Tap], seen_s: Mapping[str, Tap]) -> TapPair:
    """The pair that a user named, "a" or "a=b"."""
    name_t, _, name_s = path.partition("=")
    name_s = name_s or name_t
    for who, name, seen in (("teacher", name_t, seen_t), ("student", name_s, seen_s)):
        if name not in seen:
            near = [p for p in seen if p.startswith(name.rpartition(".")[0])][:8] or list(seen)[:8]
            raise ValueError(
                f"feature tap {path!r}: the {who} has no module {name!r}, or does not run it; it has for example {near}"
            )
    pair = TapPair(seen_t[name_t], seen_s[name_s])
    if pair.teacher.shape != pair.student.shape:
        raise ValueError(
            f"feature tap {path!r}: shapes {pair.teacher.shape} (teacher) and {pair.student.shape} (student) differ; compare "
            "stages of equal shape"
        )
    return pair


class FeatureTaps:
    """Keeps the features of each call of a model until they are taken; hooks go on the model inside any wrapper.

    Example:
        >>> with FeatureTaps(student, [pair.student for pair in pairs]) as taps:
        ...     prediction = student(**call).sample
        ...     features = list(taps.take())
    """

    def __init__(self, model: nn.Module, taps: Iterable[Tap]) -> None:
        self.model, self.taps = model, tuple(taps)
        self._features: dict[Tap, torch.Tensor] = {}
        self._watching = False
        self._handles: list[Any] = []

    def __enter__(self) -> FeatureTaps:
        modules = _modules_by_path(self.model)
        missing = [t.path for t in self.taps if t.path not in modules]
        if missing:
            raise ValueError(f"{type(unwrap(self.model)).__name__} has no modules {missing}; find its taps anew")
        self._handles.append(unwrap(self.model).register_forward_pre_hook(self._begin))
        self._handles += [modules[t.path].register_forward_hook(self._keeper(t)) for t in self.taps]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._features.clear()

    def _begin(self, *_: Any) -> None:
        self._features.clear()
        self._watching = True

    def _keeper(self, tap: Tap) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if self._watching:  # not while gradient checkpointing runs a block again in the backward pass
                feature = _tensors(output)[tap.index]
                if feature is not None:
                    self._features[tap] = feature

        return hook

    def take(self) -> Iterator[torch.Tensor]:
        """The features of the last call, in the order of the taps, each forgotten here as it is handed out.

        So a teacher's features go one by one, while the loss goes through the stages.
        """
        self._watching = False
        missing = [t.path for t in self.taps if t not in self._features]
        if missing:
            raise RuntimeError(
                f"{type(unwrap(self.model)).__name__}: {missing} did not run in the last call, or no call was made since take()"
            )
        features, self._features = self._features, {}
        return (features.pop(tap) for tap in self.taps)
