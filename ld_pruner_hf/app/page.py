"""The page itself, in gradio: what is asked, what is shown, and one endpoint for programs."""

from __future__ import annotations

import html
import logging
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import resources
from typing import Any

from PIL import Image

from .. import report
from ..loading import one_line
from ..plan import PruningPlan
from .compare import BY_SCORE, MAX_GUIDANCE, MAX_SEED, Column, Comparer, Comparison, Model, Request
from .config import AppConfig

TITLE = "What can a diffusion model do without?"
LEAD = (
    "The same prompt and the same noise, drawn by a pipeline as it was trained and with its least important operators taken "
    'out by <a href="https://arxiv.org/abs/2404.11936" target="_blank" rel="noopener">LD-Pruner</a>.'
)
HINT = '<p class="ld-hint">Nothing made yet: press <b>Compare</b>.</p>'
SHOWN_SIZE = 512  # pixels; smaller pictures are enlarged to it without smoothing
KEEP_FILES = (600, 3600)  # seconds: every 10 minutes, files older than an hour are deleted
BUSY = {"concurrency_id": "device", "concurrency_limit": 1}  # whatever needs the device waits in one line

log = logging.getLogger(__name__)


def require_gradio() -> Any:
    """The module `gradio`; ImportError that names the extra, if it is not installed."""
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page needs gradio, which is not installed: pip install 'ld_pruner_hf[app]'") from error
    return gradio


def on_gpu(run: Callable[..., Any], seconds: int) -> Callable[..., Any]:
    """`run` on ZeroGPU hardware where there is some: the package `spaces` then lends a GPU for each call."""
    try:
        import spaces
    except ImportError:
        return run
    return spaces.GPU(duration=seconds)(run)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def shown(image: Image.Image) -> Image.Image:
    """A small picture enlarged by a whole number, so that every pixel can be seen."""
    factor = max(1, SHOWN_SIZE // max(image.size))
    return image.convert("RGB").resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def coloured(spectrogram: Image.Image) -> Image.Image:
    """A grey spectrogram in colours that grow evenly brighter."""
    from matplotlib import colormaps

    grey = shown(spectrogram).convert("L")
    palette = (colormaps["magma"](range(256))[:, :3] * 255).astype("uint8").tobytes()
    grey.putpalette(palette)
    return grey.convert("RGB")


def plain(value: float, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent.

    >>> plain(0.02163), plain(65.04), plain(1234.5)
    ('0.0216', '65', '1,230')
    """
    return f"{float(f'{value:.{digits}g}'):,.10g}"


def _change(value: float, before: float) -> str:
    percent = round(100 * (value / before - 1))
    return f"{percent:+d} %".replace("-", "−") if percent else "±0 %"


def _line(what: str, value: float, unit: str, before: float | None) -> str:
    """A line of a card: a number, the change from the original's, and a bar that shows what is left of it."""
    change = "" if before is None else _change(value, before)
    bar = min(100.0, 100 * value / (before or value))
    return (
        f'<div class="ld-line"><span class="ld-what">{what}</span>'
        f'<span class="ld-value">{plain(value)} {unit}<i>{change}</i></span>'
        f'<span class="ld-bar"><span style="width:{bar:.1f}%"></span></span></div>'
    )


def costs_html(comparison: Comparison) -> str:
    """A card for each version: parameters, MACs and measured time; how they were measured; what was taken out."""
    first = comparison.columns[0].cost
    cards = []
    for i, column in enumerate(comparison.columns):
        lines = [
            _line(what, getattr(column.cost, name) * scale, unit, getattr(first, name) * scale if i else None)
            for what, name, scale, unit in (
                ("Parameters", "params", 1e-6, "M"),
                ("MACs of one call", "macs", 1e-9, "G"),
                ("Time of one call", "call_ms", 1, "ms"),
            )
        ]
        cards.append(f'<div class="ld-card"><h3>{html.escape(column.name)}</h3>{"".join(lines)}</div>')
    spread = ", ".join(plain(column.cost.call_iqr_ms, 2) for column in comparison.columns)
    samples = f"{first.batch_size} sample{'s' if first.batch_size > 1 else ''}"
    note = (
        f"Measured just now on {html.escape(comparison.device)}: the median of {first.calls} calls of the denoiser with {samples}, in turns. "
        f"The quartiles lie {spread} ms apart; a smaller difference says nothing. MACs: multiply-accumulates for one sample."
    )
    return f'<div class="ld-cards">{"".join(cards)}</div><p class="ld-note">{note}</p>{_removed(comparison.plan)}'


def _removed(plan: PruningPlan | None) -> str:
    if plan is None:
        return ""
    groups = Counter(report.group_of(m.kind) for m in plan)
    parts = ", ".join(f"{n} {html.escape(group)}" for group, n in groups.most_common())
    return f'<p class="ld-note"><b>Taken out: {len(plan)} operators.</b> {parts}.</p>'


def importance_html(model: Model) -> str:
    """The importance of every operator as a figure for light and one for dark pages."""
    if model.scores is None:
        return '<p class="ld-note">There are no scores of this pipeline.</p>'
    images = "".join(
        f'<img class="ld-{theme}" src="{report.data_uri(report.figure_png(report.importance_figure(model.scores, theme=theme), dpi=150))}" '
        f'alt="Importance of every operator of {html.escape(model.entry.name)}, by block of the denoiser">'
        for theme in report.THEMES
    )
    return (
        f'<div class="ld-figure">{images}</div><p class="ld-note">One mark an operator: how far the final latents move if it alone is '
        "taken out. Blocks from the input (top) to the output; bars are medians. Pruning starts at the left.</p>"
    )


# ---- what happens ----------------------------------------------------------------------------------------------------


def answer(run: Callable[..., Comparison], request: Request, progress: Any) -> Comparison:
    """One comparison. What goes wrong becomes one line in the page; what the visitor cannot help is only in the log."""
    gr = require_gradio()
    try:
        return run(request, progress)
    except ValueError as error:
        raise gr.Error(html.escape(one_line(error)), title="Please check", print_exception=False) from error
    except Exception as error:
        log.exception("a comparison failed")
        text = "The server could not do this; the reason is in its log. Please try again."
        raise gr.Error(text, title="Not done", print_exception=False) from error


def silent(share: float, text: str) -> None:
    """No progress to be shown."""


class _Tab:
    """Controls and results for the pipelines of one kind: pictures, or sounds."""

    def __init__(self, comparer: Comparer, run: Callable[..., Comparison], names: list[str]) -> None:
        self.gr = gr = require_gradio()
        self.comparer, self.run = comparer, run
        self.figures = {name: importance_html(comparer.models[name]) for name in names}
        first = comparer.models[names[0]]
        self.is_audio = first.is_audio
        kind = "sounds" if self.is_audio else "pictures"
        with gr.Row():
            with gr.Column(scale=2, min_width=290):
                self._controls(names, first, kind)
            with gr.Column(scale=5, min_width=300):
                if self.is_audio:
                    self._sound_results(kind)
                else:
                    self._picture_results(kind)
                with gr.Accordion("Which operators matter", open=False):
                    self.figure = gr.HTML(self.figures[names[0]], elem_id=f"importance-{kind}")
        self._events()

    def _controls(self, names: list[str], first: Model, kind: str) -> None:
        gr, limits, entry = self.gr, self.comparer.config.limits, first.entry
        self.model = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1, elem_id=f"model-{kind}")
        self.prompt = gr.Textbox(
            value=next(iter(entry.examples), ""), label="Prompt", max_length=limits.prompt, lines=1, max_lines=4,
            visible=first.takes_prompt, elem_id=f"prompt-{kind}", submit_btn=False,
        )  # fmt: skip
        self.examples = gr.Dataset(
            components=[gr.Textbox(visible=False)], samples=[[e] for e in entry.examples], label="Examples", samples_per_page=24,
            visible=first.takes_prompt and bool(entry.examples), elem_id=f"examples-{kind}",
        )  # fmt: skip
        self.version = gr.Dropdown(
            first.choices, value=first.choices[0], label="Compare with", visible=len(first.choices) > 1, elem_id=f"version-{kind}"
        )  # fmt: skip
        self.k = gr.Slider(
            1, max(first.max_k, 2), value=min(entry.k, max(first.max_k, 1)), step=1, label="Operators taken out (k)",
            info="the least important ones first", visible=first.choices[0] == BY_SCORE, elem_id=f"k-{kind}",
        )  # fmt: skip
        with gr.Row(elem_classes="ld-seed"):
            self.seed = gr.Number(0, label="Seed", precision=0, min_width=120, elem_id=f"seed-{kind}")
            self.dice = gr.Button("New seed", size="sm", min_width=100, elem_id=f"dice-{kind}")
        with gr.Accordion("More settings", open=False, elem_id=f"more-{kind}"):
            self.steps = gr.Slider(
                1, limits.steps, value=entry.steps, step=1, label="Denoising steps", elem_id=f"steps-{kind}"
            )
            self.guidance = gr.Slider(
                0, MAX_GUIDANCE, value=first.guidance, step=0.5, label="Guidance", visible=first.takes_guidance, elem_id=f"guidance-{kind}"
            )  # fmt: skip
            self.pictures = gr.Slider(
                1, max(limits.pictures, 2), value=1 if self.is_audio else min(2, limits.pictures), step=1, label="Pictures of each",
                info="seeds from the one above on",
                visible=not self.is_audio and limits.pictures > 1, elem_id=f"count-{kind}",
            )  # fmt: skip
        self.button = gr.Button("Compare", variant="primary", size="lg", elem_id=f"compare-{kind}")

    def _costs(self, kind: str) -> Any:
        return self.gr.HTML(HINT, elem_id=f"costs-{kind}")

    def _picture_results(self, kind: str) -> None:
        gr = self.gr
        with gr.Row():
            with gr.Column(scale=3, min_width=290):
                self.slider = gr.ImageSlider(
                    label="Original | pruned", format="png", interactive=False, max_height=480, elem_id="slider",
                    elem_classes="ld-pixels",
                )  # fmt: skip
            with gr.Column(scale=2, min_width=240):
                self.costs = self._costs(kind)
        self.gallery = gr.Gallery(
            label="Side by side", format="png", columns=4, object_fit="contain", height="auto", interactive=False, elem_id="grid",
            elem_classes="ld-pixels", visible=False,
        )  # fmt: skip
        self.results = [self.slider, self.gallery]

    def _sound_results(self, kind: str) -> None:
        """Three places: original, pruned, finetuned."""
        gr = self.gr
        self.results = []
        with gr.Row():
            for i, name in enumerate(("Original", "Pruned", "Finetuned")):
                with gr.Column(min_width=220, visible=i < 2) as place:
                    image = gr.Image(
                        format="png", label=name, interactive=False, elem_id=f"spectrogram-{i}", buttons=["download", "fullscreen"],
                        elem_classes="ld-pixels",
                    )  # fmt: skip
                    audio = gr.Audio(label="Sound", interactive=False, buttons=["download"], elem_id=f"audio-{i}")
                self.results += [place, image, audio]
        self.costs = self._costs(kind)

    def _events(self) -> None:
        gr = self.gr
        inputs = [self.model, self.prompt, self.version, self.k, self.seed, self.steps, self.guidance, self.pictures]
        fill = self._fill_sounds if self.is_audio else self._fill_pictures

        def compare(
            model: str, prompt: str, version: str, k: int, seed: int, steps: int, guidance: float, pictures: int,
            progress: Any = gr.Progress(),  # noqa: B008 gradio's way to ask for it
        ) -> list[Any]:  # fmt: skip
            request = Request(model, prompt, version, k, seed, steps, guidance, pictures)
            comparison = answer(self.run, request, progress)
            return [*fill(comparison), costs_html(comparison)]

        gr.on(
            [self.button.click, self.prompt.submit], compare, inputs, [*self.results, self.costs], api_visibility="private",
            show_progress_on=self.costs if self.is_audio else self.slider, trigger_mode="once", **BUSY,
        )  # fmt: skip
        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        self.model.change(
            self._model_chosen, self.model,
            [self.prompt, self.examples, self.version, self.k, self.steps, self.guidance, self.figure, self.costs, *self.results], **quick,
        )  # fmt: skip
        self.version.change(lambda v: gr.update(visible=v == BY_SCORE), self.version, self.k, **quick)
        self.examples.click(lambda sample: sample[0], self.examples, self.prompt, **quick)
        self.dice.click(lambda: random.randrange(MAX_SEED // 2), None, self.seed, **quick)

    def _fill_pictures(self, comparison: Comparison) -> list[Any]:
        gr, columns = self.gr, comparison.columns
        pairs = [
            (shown(column.images[i]), f"{column.name} · seed {comparison.request.seed + i}")
            for i in range(comparison.request.pictures)
            for column in columns
        ]
        ends = columns[0], columns[-1]
        slider = gr.ImageSlider(
            value=tuple(shown(c.images[0]) for c in ends), label=" | ".join(c.name for c in ends)
        )  # fmt: skip
        across = len(columns) * min(2, comparison.request.pictures)
        return [slider, gr.Gallery(value=pairs, columns=across, visible=True)]

    def _fill_sounds(self, comparison: Comparison) -> list[Any]:
        gr = self.gr
        filled: list[Any] = []
        for i in range(3):
            column = comparison.columns[i] if i < len(comparison.columns) else None
            filled += [gr.Column(visible=column is not None), *self._sound(column)]
        return filled

    def _sound(self, column: Column | None) -> list[Any]:
        if column is None:
            return [None, None]
        return [self.gr.Image(value=coloured(column.images[0]), label=column.name), column.sounds[0]]

    def _model_chosen(self, name: str) -> list[Any]:
        """The controls with the model's own settings; the results of the one before are cleared."""
        gr, model = self.gr, self.comparer.models[name]
        entry = model.entry
        cleared = [gr.Column(), None, None] * 3 if self.is_audio else [None, gr.Gallery(visible=False)]
        return [
            gr.Textbox(value=next(iter(entry.examples), ""), visible=model.takes_prompt),
            gr.Dataset(samples=[[e] for e in entry.examples], visible=model.takes_prompt and bool(entry.examples)),
            gr.Dropdown(choices=model.choices, value=model.choices[0], visible=len(model.choices) > 1),
            gr.Slider(maximum=max(model.max_k, 2), value=min(entry.k, max(model.max_k, 1)), visible=model.choices[0] == BY_SCORE),
            entry.steps,
            gr.Slider(value=model.guidance, visible=model.takes_guidance),
            self.figures[name],
            HINT,
            *cleared,
        ]  # fmt: skip


# ---- the endpoint for programs ---------------------------------------------------------------------------------------


def _endpoint(gr: Any, page: Any, comparer: Comparer, run: Callable[..., Comparison]) -> Callable[..., dict]:
    """The function behind `/compare`. Its files are among those that gradio deletes after a while."""
    from gradio import processing_utils, utils

    made: set[str] = set()
    page.temp_file_sets.append(made)

    def files(column: Column) -> list[dict[str, Any]]:
        folder = utils.get_upload_folder()
        paths = [processing_utils.save_pil_to_cache(image, folder, format="png") for image in column.images]
        paths += [processing_utils.save_audio_to_cache(wave, rate, "wav", folder) for rate, wave in column.sounds]
        made.update(paths)
        return [gr.FileData(path=path).model_dump() for path in paths]

    def compare(
        model: str = next(iter(comparer.models)), prompt: str = "", version: str = BY_SCORE, k: int = 40, seed: int = 0,
        steps: int = 20, guidance: float = 3.0, pictures: int = 1,
    ) -> dict:  # fmt: skip
        """Draw with the original and the pruned (and finetuned) pipeline from the same prompt and noise.

        Returns a JSON object: `columns`, the original first, each with `name`, `cost` and `files`; `operators`; `device`.
        """
        request = Request(model, prompt, version, k, seed, steps, guidance, pictures)
        comparison = answer(run, request, silent)
        columns = [{"name": c.name, "cost": asdict(c.cost), "files": files(c)} for c in comparison.columns]
        operators = comparison.plan.paths if comparison.plan else []
        return {"columns": columns, "operators": operators, "device": comparison.device}

    return compare


# ---- the page --------------------------------------------------------------------------------------------------------


def _look(gr: Any) -> dict[str, Any]:
    """Theme and style: the system's fonts, one accent colour, nothing from the network."""
    blue = gr.themes.Color(
        "#eaf4fb", "#d3e8f6", "#a8d2ed", "#74b7e0", "#3f99cf", "#0072b2", "#00659e", "#005789", "#004a74", "#003c5f", "#002f4a"
    )  # fmt: skip
    theme = gr.themes.Base(
        primary_hue=blue, secondary_hue=blue, neutral_hue=gr.themes.colors.slate, radius_size=gr.themes.sizes.radius_md,
        font=("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"), font_mono=("ui-monospace", "Consolas", "monospace"),
    ).set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_400", block_label_text_color="*neutral_600",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_400", button_primary_background_fill="*primary_500",
        button_primary_background_fill_hover="*primary_600", button_primary_background_fill_dark="*primary_500",
        button_primary_background_fill_hover_dark="*primary_600", button_primary_text_color="white",
    )  # fmt: skip
    return {"theme": theme, "css": resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")}


def _usage(comparer: Comparer) -> str:
    """How a program asks for the same, as Markdown."""
    models, limits = comparer.models, comparer.config.limits
    first = next(iter(models.values()))
    prompt = f'prompt="{next(iter(first.entry.examples), "")}", ' if first.takes_prompt else ""
    versions = list(dict.fromkeys(choice for model in models.values() for choice in model.choices))
    return f"""
The page has one endpoint for programs: the same queue, the same limits.

```python
from gradio_client import Client

client = Client("http://127.0.0.1:7860")   # or "user/space"
result = client.predict(model="{first.entry.name}", {prompt}k={first.entry.k}, api_name="/compare")
for column in result["columns"]:
    print(column["name"], column["cost"], column["files"])
```

| argument | what it is |
|---|---|
| `model` | {_quoted(models)} |
| `prompt` | up to {limits.prompt} characters, where the model takes a prompt |
| `version` | {_quoted(versions)} |
| `k` | how many operators to take out |
| `seed` | of the first picture |
| `steps` | 1 to {limits.steps} |
| `guidance` | 0 to {MAX_GUIDANCE}, where the model takes it |
| `pictures` | 1 to {limits.pictures} |

The result holds `columns`, the original first, each with `name`, `cost` (`params`, `macs`, `call_ms`, `call_iqr_ms`, `calls`, `batch_size`) and
`files`: PNG pictures, or for sounds PNG spectrograms and then WAV; `operators` that were taken out; and the `device`.
"""


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'`"{name}"`' for name in names)


def build_page(comparer: Comparer) -> Any:
    """The page as `gradio.Blocks`, with its queue.

    Raises:
        ImportError: gradio or matplotlib is not installed.
    """
    gr = require_gradio()
    report.require_matplotlib()
    limits = comparer.config.limits
    run = on_gpu(comparer.compare, limits.gpu_seconds)
    kinds: dict[str, list[str]] = {}
    for name, model in comparer.models.items():
        kinds.setdefault("Sounds" if model.is_audio else "Pictures", []).append(name)
    with gr.Blocks(title=TITLE, delete_cache=KEEP_FILES, analytics_enabled=False) as page:
        gr.api(_endpoint(gr, page, comparer, run), api_name="compare", **BUSY)
        gr.HTML(f'<header class="ld-head"><h1>{TITLE}</h1><p>{LEAD}</p></header>')
        with gr.Tabs():
            for kind, names in kinds.items():
                with gr.Tab(kind, elem_id=f"tab-{kind.lower()}"):
                    _Tab(comparer, run, names)
            with gr.Tab("From Python"):
                gr.Markdown(_usage(comparer), elem_id="usage")
    return page.queue(max_size=limits.waiting, default_concurrency_limit=1, api_open=False)


def launch(
    config: AppConfig, device: str = "auto", host: str | None = None, port: int | None = None, *, open_browser: bool = False
) -> None:  # fmt: skip
    """Load the pipelines of the config and serve the page until it is interrupted.

    Args:
        device: "auto", "cpu", "cuda", ... host, port: default: gradio's, 127.0.0.1 and the first free port from 7860 on.

    Raises:
        ValueError: a pipeline of the config cannot be offered; no such port or device. OSError: the port is taken.
        ImportError: no gradio.
    """
    require_gradio()
    if port is not None and not 0 < port < 2**16:
        raise ValueError(f"port: got {port}, expected 1 to 65535")
    page = build_page(Comparer(config, device))
    _, url, _ = serve(page, host=host, port=port, open_browser=open_browser)
    print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


def serve(
    page: Any, host: str | None = None, port: int | None = None, open_browser: bool = False
) -> tuple[Any, str, str]:
    """Start the server of a page and return at once: (app, local URL, shared URL). It takes no files and shows no traceback."""
    return page.launch(
        server_name=host, server_port=port, inbrowser=open_browser, prevent_thread_lock=True, quiet=True, share=False, show_error=False,
        ssr_mode=False, max_file_size="1kb", run_history=False, enable_monitoring=False, footer_links=["api"],
        **_look(require_gradio()),
    )  # fmt: skip
