"""`python -m ld_pruner_hf`: the same as `ld-pruner`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
