"""Figures of comparisons: damage and quality against speed, and predicted against measured damage. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .additivity import Additivity
from .benchmark import ONE_SHOT, Result
from .report import FIGURE_WIDTH, require_matplotlib, theme_of

_LINES = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "",
)  # Okabe and Ito; "" is the text's colour
_MARKS = "osD^vPX"


def _plain_axes(axes: Any, look: Mapping[str, str]) -> None:
    axes.set_facecolor(look["paper"])
    axes.tick_params(which="both", colors=look["ink"], labelsize=9, length=0)
    axes.spines[:].set_visible(False)
    axes.grid(color=look["faint"], linewidth=0.8)
    axes.set_axisbelow(True)


def benchmark_figures(results: Sequence[Result], theme: str = "light") -> dict[str, Any]:
    """name -> figure of a benchmark: damage and PSNR against the measured speed-up, and damage against k where k was given.

    A line for each way of choosing, with the intervals of its results; hand-made plans are single points.
    """
    budgets = [r for r in results if r.unit != "operators"]
    by_k = [r for r in results if r.unit == "operators"]
    figures = {}
    for stage in dict.fromkeys(r.stage for r in results):
        suffix = "" if stage == ONE_SHOT else f"_{stage.replace(' ', '_')}"
        some = [r for r in budgets if r.stage == stage]
        if some:
            figures[f"damage_against_speed_up{suffix}"] = _lines_of_ways(some, "speed_up", "damage", theme)
        if any(r.psnr for r in some):
            figures[f"psnr_against_speed_up{suffix}"] = _lines_of_ways(
                [r for r in some if r.psnr], "speed_up", "psnr", theme
            )
        if some := [r for r in by_k if r.stage == stage]:
            figures[f"damage_against_k{suffix}"] = _lines_of_ways(some, "goal", "damage", theme)
    return figures


def _lines_of_ways(results: Sequence[Result], x: str, y: str, theme: str) -> Any:
    look, figure_class = theme_of(theme), require_matplotlib()
    names = list(dict.fromkeys(r.way for r in results))
    height = 3.6 + 0.16 * len(names)
    figure = figure_class(figsize=(FIGURE_WIDTH, height), layout="constrained", facecolor=look["paper"])
    axes = figure.add_subplot()
    _plain_axes(axes, look)
    for i, name in enumerate(names):
        points = sorted(((_middle(getattr(r, x)), r) for r in results if r.way == name), key=lambda p: p[0])
        xs, ys = [p[0] for p in points], [getattr(r, y) for _, r in points]
        # A damage without end (the outputs were not finite) has no place on the axis.
        finite = [j for j, v in enumerate(ys) if math.isfinite(v.value)]
        xs, ys = [xs[j] for j in finite], [ys[j] for j in finite]
        spread = [[v.value - v.low for v in ys], [v.high - v.value for v in ys]]
        axes.errorbar(
            xs, [v.value for v in ys], yerr=spread, label=name, color=_LINES[i % len(_LINES)] or look["ink"],
            marker=_MARKS[(i // len(_LINES) + i) % len(_MARKS)], markersize=5, linewidth=1.3, elinewidth=0.8, capsize=2,
            linestyle=("-", "--", ":")[i // len(_LINES) % 3],
        )  # fmt: skip
    labels = {
        "speed_up": "measured speed-up of one denoiser call", "goal": "operators taken out",
        "damage": "damage: relative distance of the final latents", "psnr": "PSNR to the original's outputs, dB",
    }  # fmt: skip
    axes.set_xlabel(labels[x], color=look["ink"], fontsize=10)
    axes.set_ylabel(labels[y], color=look["ink"], fontsize=10)
    if y == "damage":
        axes.set_yscale("log")
    figure.legend(
        loc="outside lower center", ncols=2, frameon=False, fontsize=8, labelcolor=look["ink"], handlelength=3
    )
    return figure


def _middle(value: Any) -> float:
    return float(getattr(value, "value", value))


def additivity_figure(found: Additivity, theme: str = "light") -> Any:
    """Measured joint damage against the sum of single scores, one mark a set; on the diagonal they are equal."""
    look, figure_class = theme_of(theme), require_matplotlib()
    figure = figure_class(figsize=(FIGURE_WIDTH, 4.4), layout="constrained", facecolor=look["paper"])
    axes = figure.add_subplot()
    _plain_axes(axes, look)
    drawn = [s for s in found.sets if s.predicted > 0 and 0 < s.measured < math.inf]
    ends = [f(v for s in drawn for v in (s.predicted, s.measured)) for f in (min, max)] if drawn else [1, 10]
    axes.plot(ends, ends, color=look["ink"], linewidth=0.8, zorder=1)
    for i, size in enumerate(dict.fromkeys(s.size for s in drawn)):
        some = [s for s in drawn if s.size == size]
        axes.scatter(
            [s.predicted for s in some], [s.measured for s in some], label=f"{size} operators", s=26, marker=_MARKS[i % len(_MARKS)],
            color=_LINES[i % len(_LINES)] or look["ink"], edgecolor=look["ink"], linewidth=0.35, zorder=2,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(f"predicted from single scores ({found.criterion})", color=look["ink"], fontsize=10)
    axes.set_ylabel("measured: all taken out together", color=look["ink"], fontsize=10)
    axes.set_title(f"rank correlation {found.rank_correlation:.2f}", color=look["ink"], fontsize=11)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=8, labelcolor=look["ink"])
    return figure
