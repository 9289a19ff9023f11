"""The file that says what the page may load and do."""

from __future__ import annotations

import re
import sys

import pytest

from ld_pruner_hf import OperatorScores, demo
from ld_pruner_hf.app import AppConfig, Limits, ModelEntry, Version, load_config
from ld_pruner_hf.surgery import weights_of


def config(tmp_path, text):
    path = tmp_path / "app.yaml"
    path.write_text(text)
    return path


def test_without_a_file_every_demo_pipeline_is_offered():
    models = load_config().models
    assert {entry.pipeline for entry in models} == {f"demo:{name}" for name in demo.names()}
    assert models[0].pipeline == "demo:emoji" and models[0].examples == tuple(demo.PROMPTS["emoji"])


@pytest.mark.parametrize("name", demo.names())
def test_every_demo_pipeline_ships_with_scores_of_its_own_weights(name):
    """The page takes out the k least important operators of each. Made by `ld-pruner score demo:NAME`; see docs/app.md."""
    scores = OperatorScores.load(demo.path(name) / "scores.jsonl")
    assert scores.weights == weights_of(getattr(demo.load(name), scores.component))


def test_a_file_is_read_with_paths_relative_to_it(tmp_path):
    (tmp_path / "mine").mkdir()
    path = config(
        tmp_path,
        """
        models:
          - pipeline: demo:*
          - pipeline: mine
            title: Mine
            scores: mine/s.jsonl
            versions: [{title: fast, plan: plan.json}, {title: tuned, pipeline: user/tuned}]
            steps: 10
            guidance: 5
            examples: [a, b]
            call: {height: 64}
        limits: {steps: 20, pictures: 1}
        """,
    )
    *demos, mine = load_config(path).models
    assert tuple(demos) == AppConfig().models
    assert mine == ModelEntry(
        str(tmp_path / "mine"), "Mine", str(tmp_path / "mine/s.jsonl"),
        (Version("fast", plan=str(tmp_path / "plan.json")), Version("tuned", pipeline="user/tuned")),
        steps=10, guidance=5, examples=("a", "b"), call={"height": 64},
    )  # fmt: skip
    assert load_config(path).limits == Limits(steps=20, pictures=1)


def test_an_empty_file_is_the_default(tmp_path):
    assert load_config(config(tmp_path, "# nothing\n")) == AppConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: []", "the file: got unknown entries ['model']"),
        ("- a", "the file: got list, expected entries"),
        ("models: demo", "models: got str, expected a list"),
        ("models: []", "models: got [], expected at least one"),
        ("models: [a]", "models[0]: got str, expected entries"),
        ("models: [{title: a}]", "models[0]: "),
        ("models: [{pipeline: a, path: b}]", "models[0]: got unknown entries ['path']"),
        ("models: [{pipeline: 'demo:*', steps: 2}]", "models[0]: got unknown entries ['steps']"),
        ("models: [{pipeline: a, steps: many}]", "models[0], steps: got 'many', expected int"),
        ("models: [{pipeline: a, steps: true}]", "models[0], steps: got True, expected int"),
        ("models: [{pipeline: a, steps: 99}]", "models, a, steps: got 99, expected 1 to 50"),
        ("models: [{pipeline: a, guidance: high}]", "models[0], guidance: got 'high', expected float or int"),
        ("models: [{pipeline: a}, {pipeline: a}]", "each with a title of its own"),
        ("models: [{pipeline: a, versions: [{title: t}]}]", "version 't': expected either a plan or a pipeline"),
        ("models: [{pipeline: a, versions: [{plan: p}]}]", "models[0], versions[0]: "),
        ("models: [{pipeline: a, versions: {plan: p}}]", "models[0], versions: got dict, expected a list"),
        ("limits: {waiting: 0}", "limits, waiting: got 0, expected 1 or more"),
        ("limits: {picture: 1}", "limits: got unknown entries ['picture']"),
        ("limits: [", "app.yaml"),
        ("models: [{pipeline: !!python/object:os.system a}]", "app.yaml"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_config(config(tmp_path, text))
    assert str(tmp_path / "app.yaml") in str(caught.value)


def test_without_yaml_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=re.escape("ld_pruner_hf[app]")):
        load_config(config(tmp_path, "{}"))
