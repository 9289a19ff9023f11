"""Tables, figures and a page that show what scoring and pruning found.

Figures need matplotlib (`pip install "ld_pruner_hf[plot]"`). They are drawn on `Figure` objects of their own, so no global
state of a notebook changes, in the colours of Okabe and Ito, which readers with any colour vision can tell apart.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import math
import os
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from .plan import PruningPlan, write_atomically
from .profiling import Profile
from .scores import OperatorScores

FIGURE_WIDTH = 5.6  # inches; with the font sizes below, still legible when a phone shows the figure 360 pixels wide

# group -> (colour of Okabe and Ito, marker); "other" takes the text's colour
GROUPS = {
    "convolution": ("#0072B2", "o"),
    "linear, feed-forward": ("#E69F00", "s"),
    "attention": ("#D55E00", "^"),
    "transformer block": ("#CC79A7", "D"),
    "residual block": ("#009E73", "P"),
    "normalisation": ("#56B4E9", "v"),
    "activation": ("#F0E442", "X"),
    "other": ("", "*"),
}
_GROUP_PATTERNS = (
    ("normalisation", r"norm"),
    ("activation", r"silu|relu|gelu|mish|sigmoid|tanh|softplus|swish|activation"),
    ("other", r"(down|up|mid)block"),
    ("residual block", r"resnet|resblock|residual"),
    ("transformer block", r"transformer|block"),
    ("attention", r"attn|attention"),
    ("linear, feed-forward", r"linear|feedforward|glu|mlp"),
    ("convolution", r"conv"),
)
THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1b1f24", "faint": "#d5d9de"},
    "dark": {"paper": "#15181c", "ink": "#e6e8eb", "faint": "#3a4048"},
}


# ---- what a figure groups by -----------------------------------------------------------------------------------------


def group_of(kind: str) -> str:
    """The group, of `GROUPS`, that operators of this class are drawn as.

    >>> group_of("ResnetBlock2D"), group_of("CrossAttnDownBlock2D"), group_of("GEGLU")
    ('residual block', 'other', 'linear, feed-forward')
    """
    return next((group for group, pattern in _GROUP_PATTERNS if re.search(pattern, kind.lower())), "other")


def block_of(path: str) -> str:
    """The block of the denoiser that an operator lies in: the first part of its path, with the index if one follows.

    >>> block_of("down_blocks.1.attentions.0"), block_of("mid_block.resnets.0"), block_of("conv_in")
    ('down_blocks.1', 'mid_block', 'conv_in')
    """
    first, *rest = path.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first


def blocks_in_order(paths: Iterable[str]) -> list[str]:
    """The blocks of these operators in forward order.

    That is the order of the model's modules, but for U-Nets: they hold their middle block behind the up blocks.
    """
    blocks = list(dict.fromkeys(map(block_of, paths)))
    up = next((b for b in blocks if b.startswith("up")), None)
    middle = [b for b in blocks if b.startswith("mid")]
    if up is None or not middle:
        return blocks
    rest = [b for b in blocks if b not in middle]
    at = rest.index(up)
    return [*rest[:at], *middle, *rest[at:]]


# ---- tables ----------------------------------------------------------------------------------------------------------


def cost_rows(profiles: Mapping[str, Profile]) -> list[dict[str, Any]]:
    """Parameters, MACs and latency of several models; shares are of the first. Latency is None where not measured."""
    if not profiles:
        raise ValueError("profiles: got none, expected at least the original's")
    first = next(iter(profiles.values()))
    rows = []
    for name, p in profiles.items():
        latency = p.latency_ms / first.latency_ms if p.latency_ms is not None and first.latency_ms else None
        rows.append(
            {
                "model": name, "params": p.params, "params_share": p.params / first.params,
                "macs": p.macs, "macs_share": p.macs / first.macs if first.macs else None,
                "latency_ms": p.latency_ms, "latency_iqr_ms": p.latency_iqr_ms, "latency_share": latency,
                "batch_size": p.batch_size, "device": p.device, "dtype": p.dtype, "threads": p.threads,
            }
        )  # fmt: skip
    return rows


def save_csv(path: str | os.PathLike, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows with the same keys as comma-separated values."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, out.getvalue())


# ---- figures ---------------------------------------------------------------------------------------------------------


def require_matplotlib() -> Any:
    """The `Figure` class of matplotlib; ImportError that names the extra, if it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            'figures need matplotlib, which is not installed: pip install "ld_pruner_hf[plot]"'
        ) from error
    return Figure


def theme_of(theme: str) -> dict[str, str]:
    """Colours of a theme; ValueError for an unknown one."""
    if theme not in THEMES:
        raise ValueError(f"theme: got {theme!r}, expected one of {list(THEMES)}")
    return THEMES[theme]


def _colour(group: str, ink: str) -> str:
    return GROUPS[group][0] or ink


def _plain_axes(axes: Any, look: Mapping[str, str], blocks: Sequence[str]) -> None:
    """One category a line, the first on top; nothing drawn that carries no information."""
    axes.set_facecolor(look["paper"])
    axes.set_yticks(range(len(blocks)), blocks)
    axes.set_ylim(len(blocks) - 0.4, -0.6)
    axes.tick_params(colors=look["ink"], labelsize=10, length=0)
    axes.spines[:].set_visible(False)
    axes.grid(axis="x", color=look["faint"], linewidth=0.8)
    axes.set_axisbelow(True)


def _legend(figure: Any, groups: Iterable[str], look: Mapping[str, str], markers: bool) -> None:
    from matplotlib.lines import Line2D

    shown = [g for g in GROUPS if g in set(groups)]
    handles = [
        Line2D([], [], linestyle="", marker=GROUPS[g][1] if markers else "s", markersize=7, label=g,
               color=_colour(g, look["ink"]), markeredgecolor=look["ink"], markeredgewidth=0.4)
        for g in shown
    ]  # fmt: skip
    figure.legend(
        handles=handles, loc="outside upper center", ncols=3, frameon=False, fontsize=9.5, labelcolor=look["ink"],
        handletextpad=0.1, columnspacing=1.2,
    )  # fmt: skip


def importance_figure(scores: OperatorScores, criterion: str | None = None, theme: str = "light") -> Any:
    """Importance of every operator, by block in forward order (LD-Pruner, figures 10 to 12).

    One mark an operator, with its best stand-in, on a logarithmic axis; inside a block, operators stand in the order of the
    model's modules from top to bottom, and a bar marks the median. A score of 0 is drawn at the left edge.

    Raises:
        ValueError: every operator failed. ImportError: matplotlib is not installed.
    """
    look, figure_class = theme_of(theme), require_matplotlib()
    criterion = criterion or scores.criterion
    order = {path: i for i, path in enumerate(dict.fromkeys(row.path for row in scores.rows))}
    rows = sorted((r for r in scores.ranked(criterion) if r.error is None), key=lambda r: order[r.path])
    if not rows:
        raise ValueError(f"scores: none of {len(scores)} rows has a score, there is nothing to draw")
    value = {row.path: row.score(criterion) for row in rows}
    positive = [v for v in value.values() if v > 0]
    floor = min(positive, default=1.0) / 1.5
    blocks = blocks_in_order(value)
    figure = figure_class(
        figsize=(FIGURE_WIDTH, min(40.0, 1.5 + 0.46 * len(blocks))), layout="constrained", facecolor=look["paper"]
    )
    axes = figure.add_subplot()
    _plain_axes(axes, look, blocks)
    points: dict[str, list[tuple[float, float]]] = {}
    for i, block in enumerate(blocks):
        inside = [row for row in rows if block_of(row.path) == block]
        for j, row in enumerate(inside):
            y = i + (0.62 * (j / (len(inside) - 1) - 0.5) if len(inside) > 1 else 0.0)
            points.setdefault(group_of(row.kind), []).append((max(value[row.path], floor), y))
        if len(inside) > 2:
            middle = max(statistics.median(value[row.path] for row in inside), floor)
            axes.plot([middle, middle], [i - 0.4, i + 0.4], color=look["ink"], linewidth=1.6, zorder=4)
    for group, xy in points.items():
        axes.scatter(
            *zip(*xy, strict=True), s=24, marker=GROUPS[group][1], color=_colour(group, look["ink"]), edgecolor=look["ink"],
            linewidth=0.35, alpha=0.9, zorder=3,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(left=floor / 1.25)
    axes.set_xlabel(f"importance ({criterion}, log scale; left = can go first)", color=look["ink"], fontsize=10)
    _legend(figure, points, look, markers=True)
    return figure


def modified_figure(
    plans: Mapping[str, PruningPlan], by: str = "kind", theme: str = "light", blocks: Sequence[str] | None = None
) -> Any:
    """How many operators each plan modifies, by type or by block, one panel a plan (LD-Pruner, figures 13 to 15).

    Args:
        plans: label of the panel -> plan.
        by: "kind" (class names, the most frequent on top) or "block" (in forward order).
        blocks: all blocks of the model, so that untouched ones show as empty lines; default: those that the plans name.
    """
    if by not in ("kind", "block") or not plans:
        raise ValueError(f"by: got {by!r}, expected 'kind' or 'block'; plans: got {len(plans)}, expected 1 or more")
    look, figure_class = theme_of(theme), require_matplotlib()

    def category(path: str, kind: str) -> str:
        return kind if by == "kind" else block_of(path)

    counts = {
        label: Counter((category(m.path, m.kind), group_of(m.kind)) for m in plan) for label, plan in plans.items()
    }
    if by == "kind":
        total = Counter(m.kind for plan in plans.values() for m in plan)
        categories = [kind for kind, _ in total.most_common()]
    else:
        categories = list(blocks or blocks_in_order(m.path for plan in plans.values() for m in plan))
    columns = min(5, len(plans))
    lines = math.ceil(len(plans) / columns)
    height = min(40.0, (0.5 + 0.25 * len(categories)) * lines + 1.0)
    figure = figure_class(figsize=(FIGURE_WIDTH, height), layout="constrained", facecolor=look["paper"])
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat
    for axes, (label, count) in zip(panels, counts.items(), strict=False):
        _stacked_bars(axes, count, categories, look)
        axes.set_title(label, color=look["ink"], fontsize=11)
    for axes in list(panels)[len(plans) :]:
        axes.set_visible(False)
    _legend(figure, {group for count in counts.values() for _, group in count}, look, markers=False)
    figure.supxlabel("modified operators", color=look["ink"], fontsize=10)
    return figure


def _stacked_bars(
    axes: Any, count: Mapping[tuple[str, str], int], categories: Sequence[str], look: Mapping[str, str]
) -> None:
    _plain_axes(axes, look, categories)
    axes.xaxis.get_major_locator().set_params(integer=True, nbins=3)
    axes.margins(x=0.35)
    for y, name in enumerate(categories):
        left = 0
        for group in GROUPS:
            if n := count.get((name, group), 0):
                axes.barh(
                    y,
                    n,
                    left=left,
                    height=0.68,
                    color=_colour(group, look["ink"]),
                    edgecolor=look["paper"],
                    linewidth=0.6,
                )
                left += n
        if left:
            axes.text(left, y, f" {left}", va="center", color=look["ink"], fontsize=9)


def _line_axes(figure: Any, look: Mapping[str, str], x: str, y: str, at: tuple[int, int, int] = (1, 1, 1)) -> Any:
    """Axes for curves: no frame, faint grid, labels in the text's colour."""
    axes = figure.add_subplot(*at)
    axes.set_facecolor(look["paper"])
    axes.tick_params(colors=look["ink"], labelsize=10, length=0)
    axes.spines[:].set_visible(False)
    axes.grid(color=look["faint"], linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, color=look["ink"], fontsize=10)
    axes.set_ylabel(y, color=look["ink"], fontsize=10)
    return axes


def quality_figure(
    rows: Sequence[Mapping[str, Any]],
    metric: str,
    cliff: tuple[int, int] | None,
    recommended: int,
    theme: str = "light",
) -> Any:
    """Quality over k, with the cliff shaded and the recommended k marked.

    Args:
        rows: {"k", "quality", "uncertainty"}, the original (k = 0) first.
    """
    look, figure_class = theme_of(theme), require_matplotlib()
    figure = figure_class(figsize=(FIGURE_WIDTH, 3.4), layout="constrained", facecolor=look["paper"])
    axes = _line_axes(figure, look, "operators taken out (k)", metric)
    if cliff:
        axes.axvspan(*cliff, color=GROUPS["linear, feed-forward"][0], alpha=0.25, linewidth=0, label="cliff")
    k, quality = [row["k"] for row in rows], [row["quality"] for row in rows]
    blue = GROUPS["normalisation"][0]
    axes.errorbar(
        k,
        quality,
        [row["uncertainty"] for row in rows],
        color=blue,
        marker="o",
        markersize=5,
        linewidth=1.6,
        capsize=3,
    )
    at = k.index(recommended)
    axes.scatter([k[at]], [quality[at]], s=110, facecolor="none", edgecolor=look["ink"], linewidth=1.8, zorder=4,
                 label=f"recommended: k = {recommended}")  # fmt: skip
    axes.legend(frameon=False, fontsize=10, labelcolor=look["ink"])
    return figure


def tradeoff_figure(rows: Sequence[Mapping[str, Any]], metric: str, theme: str = "light") -> Any:
    """Quality against measured speed-up, a point a k (LD-Pruner, figure 7).

    Args:
        rows: {"k", "quality", "uncertainty", "speed_up", "speed_up_low", "speed_up_high"}.
    """
    look, figure_class = theme_of(theme), require_matplotlib()
    figure = figure_class(figsize=(FIGURE_WIDTH, 3.4), layout="constrained", facecolor=look["paper"])
    axes = _line_axes(figure, look, "speed-up of a denoiser call (bars: 99% intervals)", metric)
    x, y = [row["speed_up"] for row in rows], [row["quality"] for row in rows]
    low = [row["speed_up"] - row["speed_up_low"] for row in rows]
    high = [row["speed_up_high"] - row["speed_up"] for row in rows]
    axes.errorbar(
        x, y, [row["uncertainty"] for row in rows], [low, high], color=GROUPS["attention"][0], marker="^", markersize=6,
        linestyle="", elinewidth=1, capsize=2,
    )  # fmt: skip
    for row in rows:
        label = "original" if row["k"] == 0 else f"k = {row['k']}"
        axes.annotate(
            label,
            (row["speed_up"], row["quality"]),
            xytext=(7, 4),
            textcoords="offset points",
            color=look["ink"],
            fontsize=9,
        )
    return figure


def training_figure(log: Mapping[str, Sequence[Mapping[str, float]]], theme: str = "light") -> Any:
    """Loss terms over the steps of a finetuning, one panel a term and one line a run, on logarithmic axes.

    Args:
        log: name of the run -> rows with "step" and a number for each term; as `training/distill.py` writes log.csv.
    """
    look, figure_class = theme_of(theme), require_matplotlib()
    no_terms = ("step", "lr", "images_per_s", "epoch")
    terms = [t for t in dict.fromkeys(k for rows in log.values() for row in rows for k in row) if t not in no_terms]
    terms = [t for t in terms if any(row.get(t, 0) > 0 for rows in log.values() for row in rows)]
    if not terms:
        raise ValueError(f"training log: got columns {no_terms} alone, expected at least one loss term above 0")
    figure = figure_class(
        figsize=(FIGURE_WIDTH, 0.6 + 2.0 * len(terms)), layout="constrained", facecolor=look["paper"]
    )
    styles = [(GROUPS[g][0], s) for g, s in zip(GROUPS, ("-", "--", ":", "-.", "-", "--", ":", "-."), strict=True)]
    for i, term in enumerate(terms):
        axes = _line_axes(figure, look, "step" if i == len(terms) - 1 else "", term, (len(terms), 1, i + 1))
        axes.set_yscale("log")
        for (name, rows), (colour, line) in zip(log.items(), styles * len(log), strict=False):
            points = [(row["step"], row[term]) for row in rows if row.get(term, 0) > 0]
            if points:
                axes.plot(
                    *zip(*points, strict=True), color=colour or look["ink"], linestyle=line, linewidth=1.3, label=name
                )
        if i == 0 and len(log) > 1:
            axes.legend(frameon=False, fontsize=10, labelcolor=look["ink"])
    return figure


def figure_png(figure: Any, dpi: int = 200) -> bytes:
    """The figure as a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, facecolor=figure.get_facecolor())
    return out.getvalue()


# ---- pictures --------------------------------------------------------------------------------------------------------


def picture_grid(
    columns: Mapping[str, Sequence[Image.Image]], row_labels: Sequence[str], scale: int = 2
) -> Image.Image:
    """One labelled picture of many: a column for each model, a line for each prompt; enlarged without smoothing.

    Raises:
        ValueError: a column has not one picture for each label.
    """
    for name, pictures in columns.items():
        if len(pictures) != len(row_labels):
            raise ValueError(
                f"column {name!r}: got {len(pictures)} pictures, expected {len(row_labels)}, one for each label"
            )
    if not columns or not row_labels:
        raise ValueError("pictures: got none, expected at least one column with one line")
    cells = [picture for pictures in columns.values() for picture in pictures]
    width, height = scale * max(c.width for c in cells), scale * max(c.height for c in cells)
    gap, size = 8, max(14, height // 9)
    font = ImageFont.load_default(size)
    margin = round(max(font.getlength(label) for label in row_labels)) + 2 * gap
    top = size + 2 * gap
    grid = Image.new("RGB", (margin + len(columns) * (width + gap), top + len(row_labels) * (height + gap)), "white")
    draw = ImageDraw.Draw(grid)
    for i, label in enumerate(row_labels):
        draw.text((gap, top + i * (height + gap) + height // 2), label, fill="black", font=font, anchor="lm")
    for j, (name, pictures) in enumerate(columns.items()):
        x = margin + j * (width + gap)
        draw.text((x + width // 2, top // 2), name, fill="black", font=font, anchor="mm")
        for i, picture in enumerate(pictures):
            big = picture.convert("RGB").resize(
                (picture.width * scale, picture.height * scale), Image.Resampling.NEAREST
            )
            grid.paste(big, (x, top + i * (height + gap)))
    return grid


# ---- page ------------------------------------------------------------------------------------------------------------


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _picture_bytes(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.convert("RGB").save(out, format="PNG", optimize=True)
    return out.getvalue()


def figure_html(draw: Callable[[str], Any], alt: str, caption: str = "") -> str:
    """A figure in two versions, of which the page shows the one that fits the reader's light or dark screen.

    Args:
        draw: theme -> figure.
    """
    light, dark = (data_uri(figure_png(draw(theme))) for theme in ("light", "dark"))
    text = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure class="plot"><picture><source srcset="{dark}" media="(prefers-color-scheme: dark)">'
        f'<img src="{light}" alt="{html.escape(alt)}"></picture>{text}</figure>'
    )


def pictures_html(columns: Mapping[str, Sequence[Image.Image]], row_labels: Sequence[str]) -> str:
    """Pictures side by side, a column for each model and a line for each prompt, enlarged without smoothing."""
    names = list(columns)
    cells = ['<span class="corner"></span>', *(f'<span class="head">{html.escape(name)}</span>' for name in names)]
    for i, label in enumerate(row_labels):
        cells.append(f'<span class="label">{html.escape(label)}</span>')
        for name in names:
            alt = html.escape(f"{label}, {name}")
            cells.append(f'<img src="{data_uri(_picture_bytes(columns[name][i]))}" alt="{alt}">')
    return f'<div class="pictures" style="--columns:{len(names)}">{"".join(cells)}</div>'


def sounds_html(columns: Mapping[str, Sequence[tuple[Image.Image, bytes]]], row_labels: Sequence[str]) -> str:
    """Spectrograms with a player under each: a column for each model, a line for each sound.

    Args:
        columns: model -> (spectrogram, wav file) of each line.
    """
    names = list(columns)
    cells = ['<span class="corner"></span>', *(f'<span class="head">{html.escape(name)}</span>' for name in names)]
    for i, label in enumerate(row_labels):
        cells.append(f'<span class="label">{html.escape(label)}</span>')
        for name in names:
            picture, wav = columns[name][i]
            alt = html.escape(f"{label}, {name}")
            sound = "data:audio/wav;base64," + base64.b64encode(wav).decode("ascii")
            cells.append(
                f'<span class="sound"><img src="{data_uri(_picture_bytes(picture))}" alt="spectrogram of {alt}">'
                f'<audio controls preload="none" src="{sound}" aria-label="{alt}"></audio></span>'
            )
    return f'<div class="pictures" style="--columns:{len(names)}">{"".join(cells)}</div>'


def table_html(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table; the first `text_columns` columns are text, the others numbers. A line break in a cell makes small print."""

    def cell(tag: str, i: int, value: str) -> str:
        main, _, small = value.partition("\n")
        small = f"<small>{html.escape(small)}</small>" if small else ""
        text = (
            html.escape(main).replace(".", ".<wbr>") if i < text_columns else html.escape(main)
        )  # long paths may break
        return f"<{tag}{'' if i < text_columns else ' class=n'}>{text}{small}</{tag}>"

    def line(tag: str, values: Sequence[str]) -> str:
        return f"<tr>{''.join(cell(tag, i, v) for i, v in enumerate(values))}</tr>"

    body = "".join(line("td", row) for row in rows)
    return f"<table><thead>{line('th', head)}</thead><tbody>{body}</tbody></table>"


def render_page(
    title: str, lead: str, facts: Sequence[tuple[str, str]], sections: Sequence[tuple[str, str]], footer: str
) -> str:
    """One self-contained HTML page: no script, nothing from the network.

    Args:
        title, lead, footer: plain text. facts: (number, what it is), plain text. sections: (title, HTML).
    """
    numbers = "".join(f"<div><b>{html.escape(n)}</b><span>{html.escape(what)}</span></div>" for n, what in facts)
    body = f'<div class="facts">{numbers}</div>' if facts else ""
    body += "".join(f"<section><h2>{html.escape(name)}</h2>{content}</section>" for name, content in sections)
    template = resources.files("ld_pruner_hf").joinpath("report_page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        title=html.escape(title), lead=html.escape(lead), body=body, footer=html.escape(footer)
    )
