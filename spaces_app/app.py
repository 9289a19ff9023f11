"""The Space: the page of `ld-pruner app` with the pipelines of app.yaml."""

from pathlib import Path

try:
    import spaces  # noqa: F401  ZeroGPU wants to be imported before torch
except ImportError:
    pass

from ld_pruner_hf.app import launch, load_config

if __name__ == "__main__":
    launch(load_config(Path(__file__).with_name("app.yaml")))
