"""IP-Adapters on pruned models: diffusers hands out their weights by position among the attentions, so those that are gone must count."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from diffusers.loaders.transformer_flux import FluxTransformer2DLoadersMixin
from diffusers.loaders.transformer_sd3 import SD3Transformer2DLoadersMixin
from diffusers.loaders.unet import UNet2DConditionLoadersMixin

from .latents import patched
from .modeling import plan_of
from .stock import build_stock, record_of

_LOADERS = (UNet2DConditionLoadersMixin, SD3Transformer2DLoadersMixin, FluxTransformer2DLoadersMixin)


def _wrap_convert(convert: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The loaders' conversion, counting the attentions of the original; those that are gone get no weights.

    Raises:
        ValueError: the model became a stock model, of whose original only the kept part is known.
    """

    @functools.wraps(convert)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        record = record_of(self)
        if record is not None:
            raise ValueError(
                f"{type(self).__name__} became a stock model ({record.how}): IP-Adapter weights belong to attentions by their position "
                "in the original, which it no longer has; load the IP-Adapter into the original, or into a model whose plan is in its config"
            )
        if plan_of(self) is None:
            return convert(self, *args, **kwargs)
        own = self.attn_processors
        original: Any = build_stock(self, {})
        every: Any = {name: own.get(name, processor) for name, processor in original.attn_processors.items()}
        with patched(type(self), "attn_processors", lambda _: every):
            processors = convert(self, *args, **kwargs)
        return {name: processors[name] for name in own}

    return wrapped


def install() -> None:
    """Teach diffusers' loaders; done once, on `import ld_pruner_hf`."""
    for loader in _LOADERS:
        method = loader._convert_ip_adapter_attn_to_diffusers
        if not hasattr(method, "__wrapped__"):
            loader._convert_ip_adapter_attn_to_diffusers = _wrap_convert(method)  # type: ignore[method-assign]
