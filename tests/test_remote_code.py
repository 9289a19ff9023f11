"""The module that `publish --remote-code` ships: made of the package's sources, and complete. tests/hub runs it without the package."""

from __future__ import annotations

import ast
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import tiny
from diffusers import DiffusionPipeline

import ld_pruner_hf
from ld_pruner_hf.modeling import REMOTE_MODULE
from ld_pruner_hf.remote_code import SOURCES, add_remote_code, remote_module

PACKAGE = Path(ld_pruner_hf.__file__).parent


def definitions(source: str) -> dict[str, str]:
    """Top-level name -> its definition, without comments and formatting."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found[node.name] = ast.unparse(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = ast.unparse(node)
    return found


def test_it_holds_every_definition_of_its_sources_as_it_is():
    shipped = definitions(remote_module("UNet2DConditionModel"))
    for name in SOURCES:
        own = definitions((PACKAGE / f"{name}.py").read_text())
        assert {k: shipped.get(k) for k in own} == own, name


def test_joining_the_sources_confuses_no_names():
    """Each source imports only those before it, under the names that they have there; no name is defined twice."""
    names: Counter[str] = Counter()
    for i, source in enumerate(SOURCES):
        tree = ast.parse((PACKAGE / f"{source}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.module in SOURCES[:i], f"{source} imports {node.module}"
                assert not any(alias.asname for alias in node.names)
        names.update(list(definitions(ast.unparse(tree))))
    assert [name for name, n in names.items() if n > 1] == []


def test_it_imports_nothing_but_the_standard_library_torch_and_diffusers():
    tree = ast.parse(remote_module("UNet2DConditionModel"))
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    third_party = {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names)
    assert third_party == {"torch", "diffusers"}


def test_with_the_package_the_shipped_code_is_not_needed(tmp_path, scores):
    pipe = tiny.stable_diffusion()
    pipe.prune(4, scores=scores)
    pipe.save_pretrained(tmp_path)
    add_remote_code(tmp_path, ["unet"])
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"] == [REMOTE_MODULE, "UNet2DConditionModel"]
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert tiny.picture(again, prompt="pizza").shape == (16, 16, 3)
    assert ld_pruner_hf.plan_of(again.unet) is not None
    again.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "model_index.json").read_text())["unet"][0] == "diffusers"


def test_models_that_diffusers_does_not_load_itself_are_refused(tmp_path):
    with pytest.raises(ValueError, match="diffusers has no class MyModel"):
        remote_module("MyModel")
    (tmp_path / "model_index.json").write_text('{"unet": ["my_module", "UNet2DConditionModel"]}')
    with pytest.raises(ValueError, match="expected a model of diffusers"):
        add_remote_code(tmp_path, ["unet"])
