"""`accelerate launch -m ld_pruner_hf.cli`, `torchrun -m ld_pruner_hf.cli`: the command line in many processes."""

from . import main

if __name__ == "__main__":
    raise SystemExit(main())
