"""Distillation of a pruned denoiser from its original: what the targets are, and the losses.

    L = task * ||target - s||^2 + output * ||t - s||^2 + feature * sum_l d(f_t^l, f_s^l)      (BK-SDM, arXiv 2305.15798)

s and t are the outputs of student and teacher, f^l their features at the end of stage l. Each term is a mean-squared error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

FEATURE_LOSSES = ("mse", "normalised")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample", "flow")


# ---- targets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoiseProcess:
    """x_t = alpha_t x + sigma_t noise, and what the denoiser predicts of it; as tables over the training steps.

    Attributes:
        prediction_type: "epsilon", "v_prediction", "sample" or "flow".
        alpha, sigma: (T,) float32. timesteps: (T,), what the denoiser is told.
    """

    prediction_type: str
    alpha: torch.Tensor
    sigma: torch.Tensor
    timesteps: torch.Tensor

    @classmethod
    def of(cls, scheduler: Any, prediction_type: str | None = None) -> NoiseProcess:
        """The process that a pipeline's scheduler undoes.

        Raises:
            ValueError: a scheduler of another kind of process, or an unknown prediction type.
        """
        config = scheduler.config
        kind = prediction_type or config.get("prediction_type", "epsilon")
        if "FlowMatch" in type(scheduler).__name__ or kind.startswith("flow") or config.get("use_flow_sigmas"):
            count = config.num_train_timesteps
            sigma = torch.arange(1, count + 1, dtype=torch.float32) / count
            shift = 1.0 if config.get("use_dynamic_shifting") else config.get("shift", config.get("flow_shift")) or 1.0
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
            return cls("flow", 1 - sigma, sigma, sigma * count)
        products = getattr(scheduler, "alphas_cumprod", None)
        if kind not in PREDICTION_TYPES or products is None:
            raise ValueError(
                f"scheduler {type(scheduler).__name__} with prediction type {kind!r}: expected one with alphas_cumprod or flow "
                f"matching, and a prediction type of {PREDICTION_TYPES}; give the pipeline such a scheduler"
            )
        products = torch.as_tensor(products, dtype=torch.float32)
        return cls(kind, products.sqrt(), (1 - products).sqrt(), torch.arange(len(products)))

    def __len__(self) -> int:
        return len(self.sigma)

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Indices of `count` training steps, uniform; logit-normal for flow matching (SD 3, arXiv 2403.03206)."""
        if self.prediction_type == "flow":
            u = torch.sigmoid(torch.randn(count, generator=generator))
            return (u * len(self)).long().clamp(max=len(self) - 1)
        return torch.randint(0, len(self), (count,), generator=generator)

    def _at(self, index: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (-1,) + (1,) * (like.ndim - 1)
        alpha, sigma = (table[index.to(table.device)].to(like.device) for table in (self.alpha, self.sigma))
        return alpha.reshape(shape), sigma.reshape(shape)

    def add_noise(self, x: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """x_t for x (B, ...) at training steps `index` (B,)."""
        alpha, sigma = self._at(index, x)
        return alpha * x + sigma * noise

    def target(self, x: torch.Tensor, noise: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """What a perfect denoiser predicts of `add_noise(x, noise, index)`."""
        alpha, sigma = self._at(index, x)
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "v_prediction":
            return alpha * noise - sigma * x
        return x if self.prediction_type == "sample" else noise - x

    def snr_weights(self, index: torch.Tensor, gamma: float) -> torch.Tensor:
        """Min-SNR weights (arXiv 2303.09556) of the task loss, (B,).

        Raises:
            ValueError: the process is flow matching, for which there is no such weight.
        """
        if self.prediction_type == "flow":
            raise ValueError("snr_gamma: got a flow-matching pipeline, which has no min-SNR weights; leave it out")
        snr = (self.alpha[index.to(self.alpha.device)] / self.sigma[index.to(self.sigma.device)]).square()
        capped = snr.clamp(max=gamma)
        if self.prediction_type == "epsilon":
            return torch.where(snr > 0, capped / snr.clamp(min=1e-12), 1.0)
        return capped / (snr + 1) if self.prediction_type == "v_prediction" else capped


# ---- losses ----------------------------------------------------------------------------------------------------------


def squared_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean-squared error of each sample, (B,), in float32."""
    return functional.mse_loss(a.float(), b.float(), reduction="none").flatten(1).mean(dim=1)


def feature_error(student: torch.Tensor, teacher: torch.Tensor, kind: str = "mse") -> torch.Tensor:
    """Distance of one stage's features of each sample, (B,).

    "mse": ||f_t - f_s||^2 as a mean (BK-SDM). "normalised": ||f_t - f_s||^2 / ||f_t||^2, after which no stage dominates by its
    scale alone (LAPTOP-style). The norm is each sample's own, so that a batch can be split over processes.
    """
    error = squared_error(student, teacher.detach())
    if kind == "normalised":
        error = error / teacher.detach().float().square().flatten(1).mean(dim=1).clamp(min=1e-12)
    return error


@dataclass(frozen=True)
class DistillationLoss:
    """The weighted sum of task, output and feature loss.

    Attributes:
        task, output, feature: weights; a term of weight 0 is not computed.
        feature_loss: "mse" or "normalised".
    """

    task: float = 1.0
    output: float = 1.0
    feature: float = 1.0
    feature_loss: str = "mse"

    def __post_init__(self) -> None:
        weights = {"task": self.task, "output": self.output, "feature": self.feature}
        for name, weight in weights.items():
            if not (isinstance(weight, (int, float)) and math.isfinite(weight) and weight >= 0):
                raise ValueError(f"{name}_weight: got {weight!r}, expected a number that is not negative")
        if not any(weights.values()):
            raise ValueError("task_weight, output_weight and feature_weight: all are 0, expected one that is positive")
        if self.feature_loss not in FEATURE_LOSSES:
            raise ValueError(f"feature_loss: got {self.feature_loss!r}, expected one of {FEATURE_LOSSES}")

    @property
    def needs_teacher(self) -> bool:
        return bool(self.output or self.feature)

    def __call__(
        self,
        prediction: torch.Tensor,
        target: torch.Tensor,
        teacher_prediction: torch.Tensor | None = None,
        features: Iterable[torch.Tensor] = (),
        teacher_features: Iterable[torch.Tensor] = (),
        sample_weights: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """The terms and their weighted sum, as scalars: "loss", "task", "output", "feature".

        Args:
            prediction, teacher_prediction: (B, C, ...). target: (B, c, ...); c < C where a denoiser also predicts variances.
            features, teacher_features: one tensor a tap, in the same order; taken one pair at a time.
            sample_weights: (B,) of the task loss.

        Raises:
            ValueError: shapes or numbers of features do not agree.
        """
        terms: dict[str, torch.Tensor] = {}
        if self.task:
            if prediction.shape != target.shape:
                prediction_of_target = prediction[:, : target.shape[1]]
                _check_shapes("prediction and target", prediction_of_target, target)
            else:
                prediction_of_target = prediction
            error = squared_error(prediction_of_target, target)
            terms["task"] = (error if sample_weights is None else error * sample_weights.to(error)).mean()
        if self.output:
            if teacher_prediction is None:
                raise ValueError("the output loss needs the teacher's prediction; got None")
            _check_shapes("predictions of student and teacher", prediction, teacher_prediction)
            terms["output"] = squared_error(prediction, teacher_prediction.detach()).mean()
        if self.feature:
            terms["feature"] = self._feature_term(features, teacher_features)
        loss = torch.stack([getattr(self, name) * term for name, term in terms.items()]).sum()
        return {"loss": loss, **terms}

    def _feature_term(
        self, features: Iterable[torch.Tensor], teacher_features: Iterable[torch.Tensor]
    ) -> torch.Tensor:
        errors: list[torch.Tensor] = []
        for ours, theirs in itertools.zip_longest(features, teacher_features):
            if ours is None or theirs is None:
                fewer = "student" if ours is None else "teacher"
                raise ValueError(
                    f"features: got {len(errors)} of the {fewer} and more of the other, expected one each a tap"
                )
            _check_shapes("features of student and teacher", ours, theirs)
            errors.append(feature_error(ours, theirs, self.feature_loss).mean())
        if not errors:
            raise ValueError("features: got none, expected at least one tap")
        return torch.stack(errors).sum()


def _check_shapes(what: str, a: torch.Tensor, b: torch.Tensor) -> None:
    if a.shape != b.shape:
        raise ValueError(f"{what}: got shapes {tuple(a.shape)} and {tuple(b.shape)}, expected equal ones")
