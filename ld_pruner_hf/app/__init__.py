"""The page that compares an original pipeline with its pruned and finetuned versions: `ld-pruner app`, and the Space.

    from ld_pruner_hf.app import launch, load_config

    launch(load_config("app.yaml"))

Needs the extra `app`: pip install 'ld_pruner_hf[app]'.
"""

from .compare import Comparer, Comparison, Request
from .config import AppConfig, Limits, ModelEntry, Version, load_config
from .page import build_page, launch

__all__ = [
    "AppConfig", "Comparer", "Comparison", "Limits", "ModelEntry", "Request", "Version", "build_page", "launch", "load_config",
]  # fmt: skip
