"""How good and how dear a pipeline is, before and after pruning. Numbers carry their extractor, device, data and command.

    from ld_pruner_hf.evaluation import EvaluationSettings, evaluate
    result = evaluate(["demo:emoji", "pruned"], "out", EvaluationSettings(n=500, reference="data.parquet"))
    print(result)

The distances work on features from anywhere: `frechet_distance(real, generated)`; and an extractor is anything with a name
and a call (`Extractor`). The format of the result's JSON file stands in `ld_pruner_hf.evaluation.results`.
"""

from .extractors import STANDARD, Extractor, make_extractor
from .generation import generate
from .metrics import (
    METRICS,
    cmmd,
    frechet_distance,
    inception_score,
    kernel_distance,
    mean_cosine,
    ssim,
)
from .results import Evaluation, Measurement
from .run import EvaluationSettings, Judge, evaluate
from .samples import Samples, open_samples, read_prompts, samples_of
from .speed import SpeedUp, Timing, speed_up, time_in_turns, time_pipelines

__all__ = [
    "METRICS", "STANDARD", "Evaluation", "EvaluationSettings", "Extractor", "Judge", "Measurement", "Samples", "SpeedUp",
    "Timing", "cmmd", "evaluate", "frechet_distance", "generate", "inception_score", "kernel_distance", "make_extractor",
    "mean_cosine", "open_samples", "read_prompts", "samples_of", "speed_up", "ssim", "time_in_turns", "time_pipelines",
]  # fmt: skip
