"""`accelerate launch -m ld_pruner_hf.cli` and `torchrun -m ld_pruner_hf.cli`: the command line in many processes."""

import sys

from . import main

sys.exit(main())
