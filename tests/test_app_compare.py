"""Original, pruned and finetuned from the same noise: equal to what the pipelines make by themselves, within the limits."""

from __future__ import annotations

import math
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline

from ld_pruner_hf import PlanError, PruningPlan, plan_of
from ld_pruner_hf.app import AppConfig, Comparer, Limits, ModelEntry, Request
from ld_pruner_hf.app import compare as module
from ld_pruner_hf.app.compare import BY_SCORE, over_same_weights, spectrogram, to_int16

REQUEST = Request("Tiny", "red heart", k=3, seed=5, steps=2, guidance=2.0)


@pytest.fixture(scope="module")
def comparer(app_config):
    return Comparer(app_config, "cpu")


def drawn(pipe, seed=5, steps=2, **call):
    """What the pipeline draws by itself."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return tiny.quiet(pipe)(num_inference_steps=steps, generator=generator, **call).images[0].tobytes()


def test_columns_are_what_the_pipelines_draw_themselves(comparer, app_config):
    comparison = comparer.compare(REQUEST)
    entry = app_config.models[0]
    call = {"prompt": "red heart", "guidance_scale": 2.0}
    original = DiffusionPipeline.from_pretrained(entry.pipeline)
    assert [c.name for c in comparison.columns] == ["Original", "k = 3"]
    assert comparison.columns[0].images[0].tobytes() == drawn(original, **call)
    plan = original.prune(3, scores=entry.scores)
    assert comparison.plan.paths == plan.paths
    assert comparison.columns[1].images[0].tobytes() == drawn(original, **call)
    assert comparison.columns[0].images[0].tobytes() != comparison.columns[1].images[0].tobytes()


def test_costs_are_measured(comparer, app_config):
    first, second = (c.cost for c in comparer.compare(REQUEST).columns)
    pipe = DiffusionPipeline.from_pretrained(app_config.models[0].pipeline)
    call = {"prompt": "red heart", "guidance_scale": 2.0}
    for cost in (first, second):
        if cost is second:
            pipe.prune(3, scores=app_config.models[0].scores)
        profile = pipe.profile(repeats=2, **call)
        assert (cost.params, cost.macs, cost.batch_size) == (profile.params, profile.macs, profile.batch_size)
        assert cost.call_ms > 0 and cost.call_iqr_ms >= 0 and cost.calls >= 3
    assert second.params < first.params


def test_every_picture_has_its_own_seed(comparer):
    both = comparer.compare(replace(REQUEST, pictures=2)).columns
    for i in (0, 1):
        alone = comparer.compare(replace(REQUEST, seed=5 + i)).columns
        for column, one in zip(both, alone, strict=True):
            a, b = (np.asarray(image, dtype=int) for image in (column.images[i], one.images[0]))
            assert np.abs(a - b).max() <= 1  # a batch may round differently


def test_the_shared_original_stays_as_it_is(comparer):
    model = comparer.models["Tiny"]
    before = tiny.snapshot(model.pipe)
    comparer.compare(REQUEST)
    assert tiny.differences(before, tiny.snapshot(model.pipe)) == []


def test_pruned_denoisers_hold_no_weights_of_their_own(comparer):
    model = comparer.models["Tiny"]
    plan, pruned = model.pruned(BY_SCORE, 3)
    own = {id(t) for t in model.original.parameters()}
    stand_ins = {f"{path}." for path in plan.paths}
    for name, parameter in pruned.named_parameters():
        assert (id(parameter) in own) != name.startswith(tuple(stand_ins)), name
    copied = over_same_weights(model.original)
    assert copied is not model.original and copied.conv_in is not model.original.conv_in
    assert copied.conv_in.weight is model.original.conv_in.weight


def test_few_pruned_denoisers_are_kept(app_config):
    comparer = Comparer(replace(app_config, limits=Limits(cached=2)), "cpu")
    for k in (1, 2, 3, 3):
        comparer.compare(replace(REQUEST, k=k, steps=1))
    info = comparer.models["Tiny"].pruned.cache_info()
    assert (info.currsize, info.hits) == (2, 1)


def test_a_finetuned_pipeline_is_shown_beside_its_plan(comparer, app_config):
    comparison = comparer.compare(replace(REQUEST, version="tuned"))
    tuned = DiffusionPipeline.from_pretrained(app_config.models[0].versions[1].pipeline)
    plan = plan_of(tuned.unet)
    pruned = DiffusionPipeline.from_pretrained(app_config.models[0].pipeline)
    pruned.prune(plan)
    call = {"prompt": "red heart", "guidance_scale": 2.0}
    assert [c.name for c in comparison.columns] == ["Original", f"{len(plan)} operators out", "tuned"]
    assert comparison.columns[1].images[0].tobytes() == drawn(pruned, **call)
    assert comparison.columns[2].images[0].tobytes() == drawn(tuned, **call)
    assert comparison.columns[1].cost.params == comparison.columns[2].cost.params
    assert comparison.plan.paths == plan.paths


def test_a_plan_from_a_file(comparer, app_config):
    comparison = comparer.compare(replace(REQUEST, version="by hand"))
    plan = PruningPlan.load(app_config.models[0].versions[0].plan)
    assert [c.name for c in comparison.columns] == ["Original", "2 operators out"]
    assert comparison.plan.paths == plan.paths


def test_sounds_with_their_spectrograms(comparer, app_config):
    comparison = comparer.compare(Request("Tones", k=2, seed=1, steps=2, pictures=2))
    pipe = tiny.quiet(DiffusionPipeline.from_pretrained(app_config.models[2].pipeline))
    first = pipe(steps=2, generator=torch.Generator("cpu").manual_seed(1))
    original = comparison.columns[0]
    assert len(original.sounds) == len(original.images) == 2
    rate, wave = original.sounds[0]
    assert rate == 8000 and wave.dtype == np.int16 and wave.shape == (first.audios.shape[-1],)
    flipped = np.asarray(first.images[0])[::-1]
    assert np.abs(np.asarray(original.images[0], dtype=int) - flipped.astype(int)).max() <= 1  # low frequencies below
    assert [c.name for c in comparison.columns] == ["Original", "k = 2"]


def test_a_pipeline_that_takes_no_prompt(comparer, app_config):
    model = comparer.models["Faces"]
    assert not model.takes_prompt and not model.takes_guidance and model.max_k == 2
    columns = comparer.compare(Request("Faces", k=2, seed=5, steps=2, pictures=2)).columns
    assert columns[0].cost.batch_size == 2 and len(columns[1].images) == 2
    alone = comparer.compare(Request("Faces", k=2, seed=5, steps=2)).columns
    assert alone[0].images[0].tobytes() == drawn(DiffusionPipeline.from_pretrained(app_config.models[1].pipeline))


def test_guidance_of_the_config_counts_and_else_that_of_the_pipeline(app_config):
    for given, expected in ((0, 0), (3.5, 3.5), (None, 7.5)):
        entry = replace(app_config.models[0], guidance=given, versions=())
        assert Comparer(AppConfig((entry,)), "cpu").models["Tiny"].guidance == expected


def test_the_spectrogram_of_a_tone_is_a_line_at_its_height():
    rate, frequency = 16000, 2000
    tone = to_int16(np.sin(2 * math.pi * frequency * np.arange(rate) / rate))
    picture = np.asarray(spectrogram(tone))
    middle = picture[:, picture.shape[1] // 2]
    from_below = picture.shape[0] - 1 - int(middle.argmax())
    assert from_below == round(frequency / (rate / 2) * picture.shape[0])
    assert middle.max() > 230 and np.asarray(spectrogram(np.zeros(rate, np.int16))).max() == 0


def test_sounds_become_int16():
    assert to_int16(torch.tensor([[0.5, -0.5]])).tolist() == [16383, -16383]
    assert to_int16(np.array([2.0, -4.0, np.nan])).tolist() == [16383, -32767, 0]
    assert to_int16(np.zeros((2, 100))).shape == (100, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "/etc/passwd"}, "Model: got '/etc/passwd', expected one of ['Tiny', 'Faces', 'Tones']"),
        ({"model": "CompVis/stable-diffusion-v1-4"}, "Model: got"),
        ({"version": "../plan.json"}, "Version: got '../plan.json'"),
        ({"prompt": "  "}, "Prompt: it is empty"),
        ({"prompt": "a" * 301}, "Prompt: got 301 characters, expected at most 300"),
        ({"steps": 51}, "Steps: got 51, expected a whole number from 1 to 50"),
        ({"steps": 0}, "Steps: got 0"),
        ({"steps": 2.5}, "Steps: got 2.5"),
        ({"steps": True}, "Steps: got True"),
        ({"pictures": 5}, "Pictures: got 5, expected a whole number from 1 to 4"),
        ({"k": 0}, "Operators: got 0"),
        ({"k": 10_000}, "Operators: got 10000, expected a whole number from 1 to"),
        ({"seed": -1}, "Seed: got -1"),
        ({"seed": None}, "Seed: got nothing"),
        ({"seed": 2**40}, "Seed: got"),
        ({"guidance": 31.0}, "Guidance: got 31.0, expected a number from 0 to 30"),
        ({"guidance": math.nan}, "Guidance: got nan"),
        ({"guidance": "high"}, "Guidance: got 'high'"),
        ({"prompt": 3}, "Prompt: got 3, expected text"),
        ({"model": ["Tiny"]}, "Model: got ['Tiny'], expected text"),
    ],
)
def test_limits(comparer, change, message, monkeypatch):
    monkeypatch.setattr(module, "load_pipeline", lambda *_: pytest.fail("nothing may be loaded for a visitor"))
    monkeypatch.setattr(comparer, "_draw", lambda *_: pytest.fail("nothing may run"))
    with pytest.raises(ValueError, match=re.escape(message)):
        comparer.compare(replace(REQUEST, **change))


def test_two_at_once_get_the_same_as_one_alone(comparer):
    requests = [replace(REQUEST, k=k, seed=k) for k in (1, 2, 3, 4)]
    alone = [comparer.compare(request) for request in requests]
    with ThreadPoolExecutor(4) as pool:
        at_once = list(pool.map(comparer.compare, requests))
    for a, b in zip(alone, at_once, strict=True):
        assert [c.images[0].tobytes() for c in a.columns] == [c.images[0].tobytes() for c in b.columns]


def test_progress_only_grows(comparer):
    told = []
    comparer.compare(REQUEST, lambda share, text: told.append((share, text)))
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and shares[0] > 0 and shares[-1] <= 1
    assert "Original: step 1 of 2" in dict(map(reversed, told)) and told[-1][1] == "measuring"


def test_requests_and_results_can_go_to_another_process(comparer):
    """As on ZeroGPU hardware."""
    comparison = comparer.compare(pickle.loads(pickle.dumps(REQUEST)))
    again = pickle.loads(pickle.dumps(comparison))
    assert again.columns[1].images[0].tobytes() == comparison.columns[1].images[0].tobytes()
    assert again.columns[1].cost == comparison.columns[1].cost


def test_a_pipeline_with_nothing_to_compare_with_is_refused(app_config):
    entry = replace(app_config.models[0], scores=None, versions=())
    with pytest.raises(ValueError, match=r"nothing to compare with; make scores with `ld-pruner score"):
        Comparer(AppConfig((entry,)), "cpu")


def test_without_scores_only_the_versions_are_offered(app_config):
    comparer = Comparer(AppConfig((replace(app_config.models[0], scores=None),)), "cpu")
    assert comparer.models["Tiny"].choices == ["by hand", "tuned"] and comparer.models["Tiny"].max_k == 0
    with pytest.raises(ValueError, match="Version: got"):
        comparer.compare(REQUEST)


def test_scores_and_plans_of_another_model_are_refused_at_the_start(app_config):
    tones, other = app_config.models[2], app_config.models[0]
    with pytest.raises(PlanError, match="the scores are of another model"):
        Comparer(AppConfig((replace(tones, scores=other.scores),)), "cpu")
    with pytest.raises(PlanError, match="the plan was made for"):
        Comparer(AppConfig((replace(tones, versions=other.versions[:1]),)), "cpu")


def test_a_device_that_is_not_there(app_config):
    with pytest.raises(ValueError, match="device: got 'abacus'"):
        Comparer(app_config, "abacus")


def test_the_demo_pipeline_compares_with_no_download():
    comparer = Comparer(AppConfig((ModelEntry("demo:emoji", title="Emoji"),)), "cpu")
    columns = comparer.compare(Request("Emoji", "red heart", k=160, steps=1)).columns
    assert columns[1].cost.params / columns[0].cost.params == pytest.approx(0.43, abs=0.01)  # as the README says
