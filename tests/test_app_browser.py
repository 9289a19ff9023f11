"""The page in a real browser: Debian's Chromium, driven by playwright.

Set LD_PRUNER_SCREENSHOTS to a folder to keep pictures of the page.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium")

WAIT = 60_000  # ms; the machine may be busy


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser, app_server, request):
    """`open_page(width=..., color_scheme=...)` opens the page; anything that the browser complains about fails the test."""
    complaints, foreign, contexts = [], [], []

    def open_(width=1280, height=900, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": height}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: foreign.append(r.url) if not r.url.startswith((app_server.url, "data:", "blob:")) else None)  # fmt: skip
        page.goto(app_server.url)
        page.locator("#compare-pictures").wait_for()
        return page

    yield open_
    for context in contexts:
        if folder := os.environ.get("LD_PRUNER_SCREENSHOTS"):
            name = re.sub(r"\W+", "_", request.node.name)
            context.pages[0].screenshot(path=Path(folder) / f"{name}.png", full_page=True)
        context.close()
    assert not foreign, f"the page asked other hosts: {foreign}"
    assert not complaints


def compare(page, kind="pictures"):
    """Press the button and wait for new costs."""
    before = page.locator(f"#costs-{kind}").inner_html()
    page.locator(f"#compare-{kind}").click()
    page.wait_for_function(
        "([id, before]) => { const e = document.querySelector(id); return e.innerHTML != before && e.querySelector('.ld-card') }",
        arg=[f"#costs-{kind}", before], timeout=WAIT,
    )  # fmt: skip


def sources(page, selector):
    """Addresses of the pictures there, when they have been loaded."""
    page.wait_for_function(
        "s => { const i = [...document.querySelectorAll(s)]; return i.length && i.every(x => x.complete && x.naturalWidth) }",
        arg=selector, timeout=WAIT,
    )  # fmt: skip
    return [image.get_attribute("src") for image in page.locator(selector).all()]


def set_number(page, selector, value):
    box = page.locator(f"{selector} input[type=number]")
    box.fill(str(value))
    box.press("Tab")


def sideways(page):
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def test_a_prompt_gives_two_pictures_and_their_costs(open_page):
    page = open_page()
    page.locator("#prompt-pictures textarea, #prompt-pictures input").fill("cat face")
    compare(page)
    pictures = sources(page, "#slider img")
    assert len(set(pictures)) == 2  # the original and the pruned one differ
    grid = sources(page, "#grid .thumbnail-item img")
    assert len(grid) == 4 and set(pictures) <= set(grid)
    captions = page.locator("#grid .caption-label").all_inner_texts()
    assert captions == ["Original · seed 0", "k = 3 · seed 0", "Original · seed 1", "k = 3 · seed 1"]
    cards = page.locator("#costs-pictures .ld-card").all_inner_texts()
    assert [card.split("\n")[0] for card in cards] == ["Original", "k = 3"]
    for card in cards:
        for what, unit in (("Parameters", "M"), ("MACs of one call", "G"), ("Time of one call", "ms")):
            assert re.search(rf"{what}\s+[\d.,]+ {unit}", card), card
    assert "−" in cards[1] and "Taken out: 3 operators." in page.locator("#costs-pictures").inner_text()


def test_the_slider_uncovers_the_other_picture(open_page):
    page = open_page()
    compare(page)
    sources(page, "#slider img")
    box = page.locator("#slider").bounding_box()
    middle = box["y"] + box["height"] / 2

    def position():
        handle = page.locator("#slider .outer").bounding_box()
        return (handle["x"] + handle["width"] / 2 - box["x"]) / box["width"]

    clip = page.locator("#slider img").first.evaluate("e => getComputedStyle(e).clipPath + e.parentElement.innerHTML")
    assert position() == pytest.approx(0.5, abs=0.1)
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.8 * box["width"], middle, steps=8)
    page.mouse.up()
    assert position() == pytest.approx(0.8, abs=0.1)
    after = page.locator("#slider img").first.evaluate("e => getComputedStyle(e).clipPath + e.parentElement.innerHTML")
    assert after != clip


def test_another_k_and_another_seed_give_other_pictures(open_page):
    page = open_page()
    compare(page)
    original, pruned = sources(page, "#slider img")
    set_number(page, "#k-pictures", 5)
    compare(page)
    assert "k = 5" in page.locator("#costs-pictures").inner_text()
    same, other = _until_changed(page, [original, pruned])
    assert original in (same, other) and pruned not in (same, other)
    page.locator("#dice-pictures").click()
    page.wait_for_function("document.querySelector('#seed-pictures input').value != '0'")
    compare(page)
    assert original not in _until_changed(page, [same, other])


def _until_changed(page, before):
    page.wait_for_function(
        "old => { const s = [...document.querySelectorAll('#slider img')].map(i => i.getAttribute('src')); "
        "return s.length == 2 && s.join() != old.join() }",
        arg=before,
    )  # fmt: skip
    return sources(page, "#slider img")


def test_an_example_fills_in_the_prompt(open_page):
    page = open_page()
    page.locator("#examples-pictures").get_by_text("cat face").click()
    page.wait_for_function("document.querySelector('#prompt-pictures textarea, #prompt-pictures input').value == 'cat face'")  # fmt: skip


def test_a_finetuned_version_is_the_third_column(open_page):
    page = open_page()
    page.locator("#version-pictures input").click()
    page.get_by_role("option", name="tuned").click()
    page.locator("#k-pictures").wait_for(state="hidden")
    compare(page)
    names = [card.split("\n")[0] for card in page.locator("#costs-pictures .ld-card").all_inner_texts()]
    assert names == ["Original", "4 operators out", "tuned"]
    assert len(set(sources(page, "#grid .thumbnail-item img"))) == 6


def test_another_model_brings_its_own_controls(open_page):
    page = open_page()
    compare(page)
    old = sources(page, "#slider img")
    page.locator("#model-pictures input").click()
    page.get_by_role("option", name="Faces").click()
    page.locator("#prompt-pictures").wait_for(state="hidden")
    page.get_by_text("Nothing made yet").first.wait_for()
    assert page.locator("#k-pictures input[type=range]").get_attribute("max") == "2"
    compare(page)
    assert not set(old) & set(_until_changed(page, old))
    assert "k = 2" in page.locator("#costs-pictures").inner_text()


def test_sounds_have_players_and_spectrograms(open_page):
    page = open_page()
    page.get_by_role("tab", name="Sounds").click()
    compare(page, "sounds")
    assert len(set(sources(page, "#spectrogram-0 img, #spectrogram-1 img"))) == 2
    for i in (0, 1):
        player = page.locator(f"#audio-{i}")
        player.get_by_role("button", name="Play", exact=True).wait_for()
        seconds = page.evaluate(
            "async url => { const c = new AudioContext(); const r = await fetch(url); "
            "return (await c.decodeAudioData(await r.arrayBuffer())).duration }",
            player.locator("a[download]").get_attribute("href"),
        )
        assert 0.2 < seconds < 0.3
    assert page.locator("#spectrogram-2").count() == 0 or page.locator("#spectrogram-2").is_hidden()
    assert "k = 2" in page.locator("#costs-sounds").inner_text()


def test_bad_input_is_an_error_in_the_page(open_page):
    page = open_page()
    page.locator("#prompt-pictures textarea, #prompt-pictures input").fill(" ")
    page.locator("#compare-pictures").click()
    toast = page.locator(".toast-body")
    toast.wait_for()
    assert "Prompt: it is empty" in toast.inner_text() and "Traceback" not in page.content()
    page.locator("#prompt-pictures textarea, #prompt-pictures input").fill("red heart")
    set_number(page, "#seed-pictures", -3)
    page.locator("#compare-pictures").click()
    page.get_by_text("Seed: got -3, expected a whole number from 0").wait_for()
    set_number(page, "#seed-pictures", 0)
    compare(page)  # the page goes on working


def test_importance_figure_follows_light_and_dark(open_page):
    for scheme, shown, hidden in (("light", "light", "dark"), ("dark", "dark", "light")):
        page = open_page(color_scheme=scheme)
        page.get_by_role("button", name="Which operators matter").first.click()
        page.locator(f"#importance-pictures .ld-{shown}").wait_for()
        assert page.locator(f"#importance-pictures .ld-{hidden}").is_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(open_page, scheme):
    """WCAG AA: a contrast of at least 4.5 between text and what is behind it."""
    page = open_page(color_scheme=scheme)
    compare(page)
    for selector in (".ld-head h1", ".ld-head p", ".ld-what", ".ld-value", ".ld-value i", ".ld-note", "#compare-pictures", "button[role=tab]"):  # fmt: skip
        text, behind = page.locator(selector).last.evaluate(_COLOURS)
        assert _contrast(text, behind) >= 4.5, f"{selector}: {text} on {behind}"


_COLOURS = """e => {
    const rgba = c => { const x = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
        x.fillStyle = c; x.fillRect(0, 0, 1, 1); return [...x.getImageData(0, 0, 1, 1).data] };
    let b = e, behind; do { behind = rgba(getComputedStyle(b).backgroundColor); b = b.parentElement } while (b && behind[3] < 255);
    return [rgba(getComputedStyle(e).color), behind] }"""


def _contrast(a, b):
    def luminance(rgba):
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in (x / 255 for x in rgba[:3])]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_on_a_phone_nothing_scrolls_sideways(open_page):
    page = open_page(width=390, height=844, is_mobile=True, has_touch=True, device_scale_factor=2)
    assert sideways(page) == 0
    page.locator("#compare-pictures").tap()
    page.locator("#costs-pictures .ld-card").first.wait_for()
    sources(page, "#slider img")
    assert sideways(page) == 0
    for selector in ("#prompt-pictures", "#k-pictures", "#compare-pictures", "#slider", "#grid", "#costs-pictures .ld-card >> nth=1"):  # fmt: skip
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["width"] > 250, selector
    page.get_by_role("tab", name="Sounds").click()
    page.locator("#compare-sounds").wait_for()
    assert sideways(page) == 0
    page.get_by_role("tab", name="From Python").click()
    page.locator("#usage").get_by_text("gradio_client").first.wait_for()
    assert sideways(page) == 0
