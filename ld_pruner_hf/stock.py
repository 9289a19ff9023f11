"""Pruned models that a stock config can express: they become a plain diffusers model and need no plug-in to load."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict
from torch import nn

from .latents import RecordedCall
from .modeling import GUARD_KEY, PLAN_KEY, RECORD_KEY, plan_of
from .plan import PruningPlan
from .profiling import run
from .surgery import check_replaceable, count_params

Rename = Callable[[str], str]

_PLAIN = (bool, int, float, str, type(None))
_KEPT_ATTRIBUTES = ("training", "gradient_checkpointing")  # states of use, not of structure


@dataclass(frozen=True)
class StockRecord:
    """What became of a model that is now a stock diffusers model.

    Attributes:
        how: the preset's name, or "plan" for a plan that a stock config can express.
        source: where the architecture and the choice of weights come from.
        component: the pipeline's name of the model; "" for a bare model.
        params_before, params_after: number of parameters.
        config: the config entries that changed, with their new values.
        narrowed: parameters of which only some input channels were kept; all others are the old model's, whole.
        removed: for a plan, the paths that it took out of the old model.
    """

    how: str
    source: str
    component: str
    params_before: int
    params_after: int
    config: dict[str, Any] = field(default_factory=dict)
    narrowed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def params_removed(self) -> int:
        return self.params_before - self.params_after

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StockRecord:
        known = {k: v for k, v in data.items() if k in cls.__dataclass_fields__}
        return cls(
            **{**known, "narrowed": tuple(known.get("narrowed", ())), "removed": tuple(known.get("removed", ()))}
        )

    def __str__(self) -> str:
        share = 100 * self.params_removed / max(1, self.params_before)
        return (
            f"{self.how}: {self.params_before / 1e6:.2f}M -> {self.params_after / 1e6:.2f}M params (-{share:.1f}%), "
            f"a stock diffusers model ({', '.join(f'{k}={v}' for k, v in self.config.items())})"
        )


def record_of(model: nn.Module) -> StockRecord | None:
    """What `model` was made by, if it was made into a stock model here; None otherwise."""
    data = getattr(model, "config", {}).get(RECORD_KEY) if isinstance(model, ConfigMixin) else None
    return None if data is None else StockRecord.from_dict(data)


def edited_config(model: Any, edits: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config with `edits`, free of a plan. What was a default before is no longer one where it is edited."""
    config = {k: v for k, v in model.config.items() if k not in (PLAN_KEY, GUARD_KEY)}
    defaults = [k for k in config.pop("_use_default_values", ()) if k not in edits]
    return {**config, **edits, **({"_use_default_values": defaults} if defaults else {})}


def build_stock(model: Any, edits: Mapping[str, Any]) -> nn.Module:
    """The stock model of the edited config, on `meta`: shapes without weights."""
    with torch.device("meta"):
        return type(model).from_config(FrozenDict(edited_config(model, edits)))


def misfits(model: nn.Module, stock: nn.Module, rename: Rename, narrow: Mapping[str, Any] | None = None) -> list[str]:
    """Why the stock model's weights are not those of `model` at the renamed keys; empty if they are.

    Tables that are not saved with the weights must have their shapes, too: some are made from the number of blocks (Chroma's
    modulation), and what reads them would read other rows.

    Args:
        rename: key (or path) in the stock model -> key in `model`.
        narrow: modules of the stock model whose inputs are cut; their shapes may differ.
    """
    have, wrong = model.state_dict(), []
    for key, value in stock.state_dict().items():
        source = rename(key)
        if source not in have:
            wrong.append(f"{key}: no {source}")
        elif have[source].shape != value.shape and key.rpartition(".")[0] not in (narrow or {}):
            wrong.append(f"{key}: {tuple(value.shape)}, {source} is {tuple(have[source].shape)}")
    tables = dict(model.named_buffers())
    for key, value in stock.named_buffers():
        source = rename(key)
        found = tuple(tables[source].shape) if source in tables else "missing"
        if found != tuple(value.shape):
            wrong.append(f"{key}: {tuple(value.shape)}, {source} is {found}")
    return wrong


class _Undo:
    """Puts modules back as they were."""

    def __init__(self) -> None:
        self.before: list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]] = []

    def note(self, module: nn.Module) -> None:
        self.before.append((module, dict(vars(module)), dict(module._modules), dict(module._parameters)))

    def __call__(self) -> None:
        for module, attributes, modules, parameters in reversed(self.before):
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(modules)
            module._parameters.clear()
            module._parameters.update(parameters)


def _take_plain_attributes(old: nn.Module, new: nn.Module) -> None:
    """What depends on the place or the size, such as an up block's `resolution_idx` or the number of up-samplers."""
    for name, value in vars(new).items():
        if isinstance(value, _PLAIN) and not name.startswith("_") and name not in _KEPT_ATTRIBUTES:
            setattr(old, name, value)


def _narrow(old: nn.Module, index: list[int]) -> None:
    """Keep the input channels `index` of a convolution (dimension 1 of its weight) or a normalisation (dimension 0)."""
    for name, p in list(old._parameters.items()):
        if p is not None and (name == "weight" or (p.ndim == 1 and not isinstance(old, nn.Conv2d))):
            dim = 1 if p.ndim > 1 else 0
            cut = p.detach().index_select(dim, torch.tensor(index, device=p.device))
            old._parameters[name] = nn.Parameter(cut, requires_grad=p.requires_grad)


def _conform(
    model: nn.Module, new: nn.Module, path: str, rename: Rename, narrow: Mapping[str, list[int]], undo: _Undo
) -> nn.Module:
    """The module of `model` that belongs at `path` of the stock model, with the stock structure inside.

    Modules of `model` stay the same objects, with their hooks, attention processors, dtype and device.
    """
    source = rename(path) if path else ""
    old = model.get_submodule(source)
    children = {
        name: child
        if child is None
        else _conform(model, child, f"{path}.{name}" if path else name, rename, narrow, undo)
        for name, child in new._modules.items()
    }
    if type(old) is not type(new):  # another kind of mid block, say: its parts are the old one's
        new._modules.update(children)
        for name in _KEPT_ATTRIBUTES:
            setattr(new, name, getattr(old, name, False))
        return new
    if path != source or not path or path in narrow or list(children.items()) != list(old._modules.items()):
        undo.note(old)
        old._modules.clear()
        old._modules.update(children)
        if path in narrow:
            _narrow(old, narrow[path])
        _take_plain_attributes(old, new)
    return old


def restructure_(
    model: Any,
    edits: Mapping[str, Any],
    rename: Rename,
    *,
    how: str,
    source: str = "",
    component: str = "",
    narrow: Mapping[str, list[int]] | None = None,
    removed: tuple[str, ...] = (),
    params_before: int = 0,
    same_output: Callable[[], bool] | None = None,
) -> StockRecord:
    """Turn `model`, in place, into the stock model of its edited config, with its own weights at the renamed keys.

    The object stays the same, so every reference to it (`pipe.unet`, an optimizer's, a wrapper's) sees the change, and so do
    the modules that remain. dtype and device are kept. Modules that are taken out are freed once nobody holds them.

    Args:
        edits: config entries to change. rename: key in the new model -> key in the old one.
        narrow: path in the new model -> input channels to keep of the old module, where its input gets smaller.
        removed, params_before: for the record; the parameters default to those that the model has now.
        same_output: asked after the change; False undoes it.

    Raises:
        ValueError: the stock model's weights are not found in `model`, or `same_output` says no; it is then as it was.
    """
    check_replaceable(model)
    narrow = narrow or {}
    stock = build_stock(model, edits)
    wrong = misfits(model, stock, rename, narrow)
    if wrong:
        raise ValueError(
            f"{how}: {len(wrong)} weights of the stock {type(model).__name__} with {dict(edits)} are not in this one "
            f"({'; '.join(wrong[:3])}); expected an unchanged model (unload or fuse adapters first)"
        )
    have = model.state_dict()
    narrowed = tuple(key for key, value in stock.state_dict().items() if have[rename(key)].shape != value.shape)
    before, config, undo = params_before or count_params(model), model.config, _Undo()
    _conform(model, stock, "", rename, narrow, undo)
    if same_output is not None and not same_output():
        undo()
        raise ValueError(f"{how}: the stock {type(model).__name__} with {dict(edits)} gives another output")
    record = StockRecord(how, source, component, before, count_params(model), dict(edits), narrowed, removed)
    earlier = config.get(RECORD_KEY)
    data = record.to_dict() | ({"earlier": earlier} if earlier else {})
    model._internal_dict = FrozenDict({**edited_config(model, edits), RECORD_KEY: data})
    return record


# ---- plans that a stock config can express ---------------------------------------------------------------------------

_INNER_LAYERS = re.compile(r"(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks")


def _kept_indices(model: nn.Module, plan: PruningPlan) -> dict[str, list[int]] | None:
    """path of a list of blocks -> indices that stay; None if the plan does anything else than take out blocks and the mid block."""
    gone: dict[str, set[int]] = {}
    for m in plan:
        parent, _, index = m.path.rpartition(".")
        if m.stand_in.name != "identity":
            return None
        if m.path == "mid_block":
            continue
        if not index.isdigit() or ("." in parent and not _INNER_LAYERS.fullmatch(parent)):
            return None
        gone.setdefault(parent, set()).add(int(index))
    lists: dict[str, Any] = {path: model.get_submodule(path) for path in gone}
    return {path: [i for i in range(len(blocks)) if i not in gone[path]] for path, blocks in lists.items()}


def _renaming(kept: Mapping[str, list[int]]) -> Rename:
    """Index in a shortened list -> index in the full one."""

    def rename(key: str) -> str:
        for path, indices in kept.items():
            if key.startswith(path + "."):
                index, dot, rest = key.removeprefix(path + ".").partition(".")
                if int(index) >= len(indices):  # the stock model has more blocks: its weights come from nowhere
                    return f"no {key}"
                return f"{path}.{indices[int(index)]}{dot}{rest}"
        return key

    return rename


def _list_edits(config: Mapping[str, Any], length: int, kept: list[int]) -> Iterator[dict[str, Any]]:
    """Ways in which a config may say that a list of `length` blocks keeps only some: its number, and what is given per block."""
    per_block: dict[str, Any] = {}
    for key, value in config.items():
        if not isinstance(value, (list, tuple)) or key.startswith("_"):
            continue
        if key.endswith("_layers") and all(type(v) is int for v in value):  # indices of special blocks (SD 3.5)
            per_block[key] = [kept.index(v) for v in value if v in kept]
        elif len(value) == length:
            per_block[key] = [value[i] for i in kept]
    for key, value in config.items():
        if type(value) is int and value == length and not key.startswith("_"):
            yield {key: len(kept)}
            if per_block:
                yield {key: len(kept), **per_block}


def _depth_edits(model: nn.Module, kept: Mapping[str, list[int]]) -> dict[str, Any]:
    """A U-Net's `transformer_layers_per_block`, per stage and attention, with only the kept inner layers."""

    def depths(side: str) -> list[Any]:
        result: list[Any] = []
        for i, block in enumerate(getattr(model, f"{side}_blocks")):
            paths = [
                f"{side}_blocks.{i}.attentions.{j}.transformer_blocks"
                for j in range(len(getattr(block, "attentions", ())))
            ]
            counts = [len(kept[p]) if p in kept else len(model.get_submodule(p)) for p in paths]  # type: ignore[arg-type]
            result.append(counts[0] if len(set(counts)) == 1 else counts or 1)
        return result

    return {"transformer_layers_per_block": depths("down"), "reverse_transformer_layers_per_block": depths("up")}


def stock_candidates(model: Any, plan: PruningPlan) -> Iterator[tuple[dict[str, Any], Rename]]:
    """Config edits that may express the plan, and where the weights of the stock model then come from."""
    kept = _kept_indices(model, plan)
    if kept is None:
        return
    config = {k: v for k, v in model.config.items() if k not in (PLAN_KEY, GUARD_KEY)}
    fixed: dict[str, Any] = {"mid_block_type": None} if "mid_block" in plan.paths else {}
    if any("." in path for path in kept):
        fixed |= _depth_edits(model, kept)
    ways = [list(_list_edits(config, len(model.get_submodule(p)), i)) for p, i in kept.items() if "." not in p]
    for chosen in itertools.product(*ways):
        merged = dict(fixed)
        for edit in chosen:
            merged |= edit
        yield merged, _renaming(kept)


def _tensors(output: Any) -> list[torch.Tensor]:
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else [output]
    )
    return [v for v in values if isinstance(v, torch.Tensor)]


def to_stock_(model: Any, call: RecordedCall, component: str = "") -> StockRecord | None:
    """Turn a pruned model, in place, into a stock diffusers model, if a stock config can express its plan.

    Such plans take out whole blocks: the mid block of a U-Net, blocks of a transformer (the rest is numbered anew), transformer
    layers inside a U-Net's attention. Nothing is known about single classes: candidate edits of the config are tried, and one
    is taken if its weights are this model's, all of them, and the output of `call` stays the same to the last bit.

    Args:
        model: a model that a plan has pruned. call: arguments of one call.

    Returns:
        What was done, or None if the plan stays in the config and loading needs this package.
    """
    plan, has_config = plan_of(model), isinstance(model, ConfigMixin)
    if plan is None or not has_config:
        return None
    with torch.no_grad():
        for edits, rename in stock_candidates(model, plan):
            try:
                stock = build_stock(model, edits)
            except Exception:  # a coincidence of numbers: this entry does not count the blocks
                continue
            used = {rename(key) for key in stock.state_dict()}
            if misfits(model, stock, rename) or used != set(model.state_dict()):
                continue
            before = _tensors(_repeatable(model, call))

            def same_output(before: list[torch.Tensor] = before) -> bool:
                after = _tensors(_repeatable(model, call))
                return len(before) == len(after) and all(map(torch.equal, before, after))

            try:
                return restructure_(
                    model,
                    edits,
                    rename,
                    how="plan",
                    component=component,
                    removed=tuple(plan.paths),
                    params_before=plan.params_before,
                    same_output=same_output,
                )
            except ValueError:
                continue
    return None


def _repeatable(model: nn.Module, call: RecordedCall) -> Any:
    """One call in eval mode."""
    training = [(m, m.training) for m in model.modules()]
    try:
        return run(model.eval(), call)
    finally:
        for module, flag in training:
            module.training = flag
