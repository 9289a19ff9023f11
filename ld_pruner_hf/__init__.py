"""Score and prune the denoiser of any diffusers pipeline (LD-Pruner, arXiv 2404.11936).

In short:

    import ld_pruner_hf                                  # adds score, prune and profile to every DiffusionPipeline
    pipe = DiffusionPipeline.from_pretrained(...)
    plan = pipe.prune(10)                                # in place: exactly 10 operators
    pipe.save_pretrained("pruned")                       # and back: DiffusionPipeline.from_pretrained("pruned")
"""

from . import demo
from . import hub as _hub
from . import ip_adapter as _ip_adapter
from . import modeling as _modeling
from . import pipeline as _pipeline
from .additivity import measure_additivity
from .distillation import DistillationLoss, NoiseProcess
from .features import FeatureTaps, Tap, TapPair, find_taps
from .fitting import Fit, fit_stand_ins
from .hub import publish, push_plan
from .loading import load_plan
from .lora import LoraFit, load_lora, lora_fit
from .measurements import Measurements
from .modeling import plan_of
from .operators import find_operators
from .pipeline import LDPrunerMixin, make_plan, profile, prune, score
from .plan import Modification, Operator, OutputRule, PlanDiff, PlanError, PruningPlan, StandInSpec
from .presets import PRESETS, apply_preset_
from .profiling import Profile
from .publication import Evidence
from .scores import CRITERIA, OperatorScore, OperatorScores
from .scoring import ScoringCost, measure_damage, score_cost, score_operators
from .selection import agreement, knapsack, ratio, top_k
from .stock import StockRecord, record_of, to_stock_
from .surgery import applied, apply_plan_

__version__ = "0.1.0.dev0"

__all__ = [
    "CRITERIA", "PRESETS", "DistillationLoss", "Evidence", "FeatureTaps", "Fit", "LDPrunerMixin", "LoraFit",
    "Measurements", "Modification", "NoiseProcess", "Operator", "OperatorScore", "OperatorScores", "OutputRule",
    "PlanDiff", "PlanError", "Profile", "PruningPlan", "ScoringCost", "StandInSpec", "StockRecord", "Tap", "TapPair",
    "agreement", "applied", "apply_plan_", "apply_preset_", "demo", "find_operators", "find_taps", "fit_stand_ins", "knapsack",
    "load_lora", "load_plan", "lora_fit", "make_plan", "measure_additivity", "measure_damage", "plan_of",
    "profile", "prune", "publish", "push_plan", "ratio", "record_of", "score", "score_cost", "score_operators", "to_stock_",
    "top_k",
]  # fmt: skip

_modeling.install()
_ip_adapter.install()
_pipeline.install()
_hub.install()
