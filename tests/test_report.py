"""Tables, figures and the page: what they show is what the scores and plans say."""

import csv
import io
import re
import sys

import pytest
from PIL import Image

from ld_pruner_hf import (
    Modification,
    OperatorScore,
    OperatorScores,
    OutputRule,
    PlanError,
    Profile,
    PruningPlan,
    StandInSpec,
    report,
)
from ld_pruner_hf.demo import load

IDENTITY = StandInSpec((OutputRule("hidden_states", 0, "identity"),))
PATHS = {
    "conv_in": ("Conv2d", 8.0),
    "down_blocks.0.resnets.0": ("ResnetBlock2D", 2.0),
    "down_blocks.0.resnets.0.norm1": ("GroupNorm", 0.25),
    "down_blocks.1.attentions.0": ("Transformer2DModel", 1.0),
    "up_blocks.0.resnets.0.nonlinearity": ("SiLU", 0.0),
    "mid_block.attentions.0": ("Transformer2DModel", 0.5),
    "conv_out": ("Conv2d", None),
}


def row(path, kind, score):
    if score is None:
        return OperatorScore(path, kind, IDENTITY, error="RuntimeError: it broke")
    return OperatorScore(path, kind, IDENTITY, avg_dist=(score,), std_dist=(0.0,), params_removed=10, macs_removed=20)


@pytest.fixture
def scores():
    rows = tuple(row(path, kind, score) for path, (kind, score) in PATHS.items())
    return OperatorScores(rows, "a" * 16, "b" * 16, "UNet2DConditionModel", "unet", {"seeds": [0]})


def plan(*paths):
    return PruningPlan(
        "unet", "UNet2DConditionModel", "a" * 16, tuple(Modification(p, PATHS[p][0], IDENTITY) for p in paths)
    )


def measured(params=100, macs=1000, latency=10.0):
    return Profile(params, macs, macs, latency, 0.5, 1.0, "cpu", "float32", 1, 2)


@pytest.mark.parametrize(
    ("kind", "group"),
    [
        ("Conv2d", "convolution"),
        ("Linear", "linear, feed-forward"),
        ("FeedForward", "linear, feed-forward"),
        ("GEGLU", "linear, feed-forward"),
        ("GELU", "activation"),
        ("SiLU", "activation"),
        ("GroupNorm", "normalisation"),
        ("AdaLayerNormZero", "normalisation"),
        ("Attention", "attention"),
        ("BasicTransformerBlock", "transformer block"),
        ("FluxSingleTransformerBlock", "transformer block"),
        ("ResnetBlock2D", "residual block"),
        ("CrossAttnDownBlock2D", "other"),
        ("UNetMidBlock2DCrossAttn", "other"),
        ("TimestepEmbedding", "other"),
    ],
)
def test_every_kind_has_a_group(kind, group):
    assert report.group_of(kind) == group


def test_blocks_of_a_real_unet_are_in_forward_order():
    unet = load("emoji").unet
    blocks = report.blocks_in_order(name for name, _ in unet.named_modules() if name)
    stages = [b for b in blocks if "block" in b]
    downs = [f"down_blocks.{i}" for i in range(len(unet.down_blocks))]
    ups = [f"up_blocks.{i}" for i in range(len(unet.up_blocks))]
    assert [b for b in stages if b not in ("down_blocks", "up_blocks")] == [*downs, "mid_block", *ups]
    assert blocks[0] == "conv_in" and blocks[-1] == "conv_out"


def test_blocks_of_a_transformer_keep_the_order_of_the_model():
    paths = [
        "pos_embed.proj",
        "transformer_blocks.0.attn",
        "transformer_blocks.10.ff",
        "transformer_blocks.2.ff",
        "norm_out",
    ]
    assert report.blocks_in_order(paths) == [
        "pos_embed", "transformer_blocks.0", "transformer_blocks.10", "transformer_blocks.2", "norm_out"
    ]  # fmt: skip


def test_importance_figure_draws_each_scored_operator_in_its_block(scores):
    figure = report.importance_figure(scores)
    axes = figure.axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0"]
    points = [tuple(xy) for collection in axes.collections for xy in collection.get_offsets()]
    drawn = {(labels[round(y)], round(float(x), 6)) for x, y in points}
    assert ("conv_in", 8.0) in drawn and ("down_blocks.0", 0.25) in drawn and ("mid_block", 0.5) in drawn
    assert len(points) == len(PATHS) - 1  # the failed one has no place on the axis
    assert min(x for x, _ in points) > 0  # a score of 0 does, at the left edge
    assert axes.get_xscale() == "log"


def test_importance_figure_follows_the_criterion(scores):
    points = report.importance_figure(scores, "latent-shift-std").axes[0].collections
    assert {float(x) for c in points for x, _ in c.get_offsets()} != {8.0, 2.0, 0.25, 1.0, 0.5}
    with pytest.raises(ValueError, match="criterion"):
        report.importance_figure(scores, "no-such")


def test_importance_figure_of_failures_alone_says_so():
    failed = OperatorScores((row("conv_in", "Conv2d", None),), "", "", "M", "", {})
    with pytest.raises(ValueError, match="none of 1 rows"):
        report.importance_figure(failed)


def bars(axes):
    """category -> summed length of its bars; the categories stand beside the first panel."""
    names = [text.get_text() for text in axes.figure.axes[0].get_yticklabels()]
    lengths = dict.fromkeys(names, 0.0)
    for bar in axes.patches:
        lengths[names[round(bar.get_y() + bar.get_height() / 2)]] += bar.get_width()
    return lengths


def test_modified_figure_counts_by_type_and_by_block():
    plans = {
        "k = 1": plan("conv_in"),
        "k = 3": plan("conv_in", "down_blocks.0.resnets.0.norm1", "mid_block.attentions.0"),
    }
    one, three = report.modified_figure(plans).axes
    assert bars(one) == {"Conv2d": 1, "GroupNorm": 0, "Transformer2DModel": 0}
    assert bars(three) == {"Conv2d": 1, "GroupNorm": 1, "Transformer2DModel": 1}
    assert [one.get_title(), three.get_title()] == ["k = 1", "k = 3"]
    _, by_block = report.modified_figure(
        plans, "block", blocks=["conv_in", "down_blocks.0", "mid_block", "up_blocks.0"]
    ).axes
    assert bars(by_block) == {"conv_in": 1, "down_blocks.0": 1, "mid_block": 1, "up_blocks.0": 0}


def test_figures_refuse_what_they_do_not_know(scores):
    with pytest.raises(ValueError, match="theme"):
        report.importance_figure(scores, theme="sepia")
    with pytest.raises(ValueError, match="by: got 'size'"):
        report.modified_figure({"k = 1": plan("conv_in")}, "size")
    with pytest.raises(ValueError, match="expected 1 or more"):
        report.modified_figure({})


def test_figures_become_png_and_leave_no_global_state(scores):
    png = report.figure_png(report.importance_figure(scores, theme="dark"), dpi=60)
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    assert picture.getpixel((1, 1)) == (0x15, 0x18, 0x1C)
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_without_matplotlib_the_error_names_the_extra(scores, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=re.escape('pip install "ld_pruner_hf[plot]"')):
        report.importance_figure(scores)


def test_costs_are_shares_of_the_first(tmp_path):
    rows = report.cost_rows({"original": measured(), "k = 2": measured(75, 500, 8.0)})
    assert [r["params_share"] for r in rows] == [1.0, 0.75]
    assert (rows[1]["macs_share"], rows[1]["latency_share"]) == (0.5, 0.8)
    report.save_csv(tmp_path / "costs.csv", rows)
    with open(tmp_path / "costs.csv", newline="") as file:
        assert [r["model"] for r in csv.DictReader(file)] == ["original", "k = 2"]
    assert report.cost_rows({"original": measured(latency=None)})[0]["latency_share"] is None
    with pytest.raises(ValueError, match="profiles"):
        report.cost_rows({})


def test_both_files_of_scores_are_read_back(scores, tmp_path):
    scores.to_json(tmp_path / "scores.json")
    scores.to_csv(tmp_path / "scores.csv")
    scores.save(tmp_path / "scores.jsonl")
    assert OperatorScores.load(tmp_path / "scores.json") == scores
    assert OperatorScores.load(tmp_path / "scores.jsonl") == scores
    assert (
        (tmp_path / "scores.csv").read_text().splitlines()[1].startswith("1,up_blocks.0.resnets.0.nonlinearity,SiLU")
    )


def test_damaged_files_of_scores_are_refused(scores, tmp_path):
    scores.to_json(tmp_path / "scores.json")
    whole = (tmp_path / "scores.json").read_text()
    for text in (whole[: len(whole) // 2], "", whole.replace('"avg_dist"', '"no_dist"')):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(PlanError):
            OperatorScores.load(tmp_path / "bad.json")
    with pytest.raises(PlanError, match="no such file"):
        OperatorScores.load(tmp_path / "none.json")


def squares(*colours):
    return [Image.new("RGB", (8, 8), colour) for colour in colours]


def test_grid_has_each_picture_at_its_place():
    grid = report.picture_grid(
        {"original": squares("red", "lime"), "k = 2": squares("blue", "yellow")}, ["heart", "tree"], scale=4
    )
    wide = {colour: [] for colour in [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0)]}
    for y in range(grid.height):
        for x in range(grid.width):
            if (pixel := grid.getpixel((x, y))) in wide:
                wide[pixel].append((x, y))
    assert all(len(found) == 32 * 32 for found in wide.values())
    corner = {colour: found[0] for colour, found in wide.items()}
    assert corner[255, 0, 0][1] == corner[0, 0, 255][1] < corner[0, 255, 0][1]
    assert corner[255, 0, 0][0] == corner[0, 255, 0][0] < corner[0, 0, 255][0]


def test_grid_refuses_columns_of_other_lengths():
    with pytest.raises(ValueError, match="got 1 pictures, expected 2"):
        report.picture_grid({"original": squares("red")}, ["heart", "tree"])
    with pytest.raises(ValueError, match="got none"):
        report.picture_grid({}, [])


def test_page_is_one_file_and_escapes_what_it_is_given(scores):
    sections = [
        ("Pictures <1>", report.pictures_html({"k < 2": squares("red")}, ["a & b"])),
        ("Costs", report.table_html(["Model", "Params"], [["<script>", "1\n−2 %"]])),
        (
            "Plot",
            report.figure_html(
                lambda theme: report.importance_figure(scores, theme=theme), "importance", "a $ caption"
            ),
        ),
    ]
    page = report.render_page("What & why", "lead <b>", [("5 < 6", "a fact")], sections, "foot")
    assert "<script" not in page and "<h2>Pictures &lt;1&gt;</h2>" in page and "What &amp; why" in page
    assert 'alt="a &amp; b, k &lt; 2"' in page and "<small>−2 %</small>" in page and "a $ caption" in page
    links = re.findall(r'(?:src|srcset|href)="([^"]{0,30})', page)
    assert len(links) == 3 and all(link.startswith("data:image/png;base64,") for link in links)
    assert "http" not in page
