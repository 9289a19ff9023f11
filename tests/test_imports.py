"""The order in which the package reads: an import may only point to a lower level."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import ld_pruner_hf

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ld_pruner_hf"
LEVELS = {
    "plan": 0, "memory": 0, "demo": 0, "evaluation.nets": 0, "evaluation.samples": 0,
    "scores": 1, "replacements": 1, "latents": 1, "loading": 1, "evaluation.results": 1, "evaluation.extractors": 1,
    "surgery": 2, "selection": 2, "batching": 2, "evaluation.metrics": 2,
    "profiling": 3, "modeling": 3,
    "watching": 4, "stock": 4, "fitting": 4, "trajectory": 4, "measurements": 4, "remote_code": 4, "reuse": 4,
    "evaluation.generation": 4, "evaluation.speed": 4,
    "operators": 5, "twins": 5, "ip_adapter": 5, "criteria": 5, "linear": 5, "presets": 5, "distillation": 5, "evaluation.run": 5,
    "features": 6, "effort": 6, "unused": 6,
    "scoring": 7, "evaluation": 7,
    "additivity": 8, "lora": 8, "planning": 8, "report": 8,
    "pipeline": 9, "cards": 9,
    "benchmark": 10, "sweep": 10, "publication": 10, "app.config": 10,
    "curves": 11, "hub": 11, "reporting": 11, "app.compare": 11,
    "demo.job": 12, "app.page": 12,
    "cli.common": 13, "app": 13,
    "cli.output": 14, "cli.evaluate": 14, "cli.distill": 14,
    "cli": 16,
    "__init__": 17, "__main__": 17, "cli.__main__": 17,
}  # fmt: skip
LEVELS |= {f"cli.{path.stem}": 15 for path in (PACKAGE / "cli").glob("[!_]*.py") if f"cli.{path.stem}" not in LEVELS}


def name_of(path: Path) -> str:
    """Module name inside the package; a folder's `__init__` has the folder's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported(path: Path) -> set[str]:
    """Our modules that the file at `path` imports, anywhere in it."""
    package = path.relative_to(PACKAGE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {
                a.name.partition(".")[2] or "__init__" for a in node.names if a.name.split(".")[0] == PACKAGE.name
            }
        elif isinstance(node, ast.ImportFrom):
            if not node.level and (node.module or "").split(".")[0] != PACKAGE.name:
                continue
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (node.module or "") if node.level else node.module.partition(".")[2]
            start = ".".join([*base, *([module] if module else [])])
            for alias in node.names:
                inner = f"{start}.{alias.name}".strip(".")
                found.add(inner if inner in LEVELS else start or "__init__")
    return found


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_to_lower_levels(path):
    name = name_of(path)
    assert name in LEVELS, f"{name}: give the new module a level"
    wrong = {other for other in imported(path) if LEVELS.get(other, 99) >= LEVELS[name]}
    assert not wrong, f"{name} (level {LEVELS[name]}) imports {sorted(wrong)}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_inside_the_package_are_relative(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        assert not any(n.split(".")[0] == PACKAGE.name for n in names), f"line {node.lineno}: {names}"


@pytest.mark.parametrize("module", ["plan", "scores", "selection"])
def test_the_nouns_need_no_torch(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    modules = [a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names]
    modules += [n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
    assert not any(m.split(".")[0] in ("torch", "diffusers") for m in modules)


def test_every_module_has_a_level_and_every_level_a_module():
    assert {name_of(p) for p in FILES} == set(LEVELS)


@pytest.mark.parametrize("folder", ["training", "spaces_app", "benchmarks"])
def test_scripts_use_only_public_names(folder):
    """`from ld_pruner_hf import x` and `ld_pruner_hf.x`, with x in `__all__`; or a public name of one of its modules."""
    public = set(ld_pruner_hf.__all__)
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            used = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE.name:
                used = [a.name for a in node.names] if node.module != PACKAGE.name else []
                if node.module == PACKAGE.name:
                    assert {a.name for a in node.names} <= public, f"{path}, line {node.lineno}"
            elif (
                isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == PACKAGE.name
            ):
                assert node.attr in public | {"__version__"}, f"{path}, line {node.lineno}: {node.attr}"
            assert not any(name.startswith("_") for name in used), f"{path}, line {node.lineno}: {used}"


def test_every_public_name_exists():
    assert all(hasattr(ld_pruner_hf, name) for name in ld_pruner_hf.__all__)
