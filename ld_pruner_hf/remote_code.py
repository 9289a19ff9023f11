"""The module that lets a published pruned model load where this package is not installed (`trust_remote_code=True`).

It is made of this package's own sources when a model is published, so there is no second copy to keep in step.
"""

from __future__ import annotations

import ast
import json
from importlib import resources
from pathlib import Path

import diffusers

from .modeling import REMOTE_MODULE
from .plan import write_atomically

SOURCES = ("plan", "replacements", "surgery", "modeling")
"""What a pruned model needs to load and run; each module imports only those before it, diffusers and torch."""

_HEAD = '''"""Lets diffusers load the pruned {class_name} in this folder where the package ld_pruner_hf is not installed.

Its modules {sources}, one after the other (Apache-2.0). With the package installed, `import ld_pruner_hf`
does the same, and this file is not run.
"""

from __future__ import annotations

'''


def remote_module(class_name: str) -> str:
    """Source of the module for a model of that diffusers class: installs the hooks of `modeling` and offers the stock class.

    Raises:
        ValueError: diffusers has no class of that name, so its own loading could not find it either.
    """
    if not hasattr(diffusers, class_name):
        raise ValueError(f"remote code: diffusers has no class {class_name}, expected a model that diffusers exports")
    imports, bodies = [f"from diffusers import {class_name}"], []
    for name in SOURCES:
        source = resources.files(__package__).joinpath(f"{name}.py").read_text(encoding="utf-8")
        found, body = _split(source)
        imports += found
        bodies.append(f"# ---- {name}.py\n\n{body}")
    head = _HEAD.format(class_name=class_name, sources=", ".join(SOURCES))
    return head + "\n".join(sorted(set(imports))) + "\n\n" + "\n\n\n".join([*bodies, "install()\n"])


def _split(source: str) -> tuple[list[str], str]:
    """(imports of other packages, everything but imports and the docstring)."""
    tree, lines = ast.parse(source), source.splitlines()
    imports = []
    for i, node in enumerate(tree.body):
        is_docstring = i == 0 and isinstance(node, ast.Expr)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            own = isinstance(node, ast.ImportFrom) and (node.level or node.module == "__future__")
            imports += [] if own else [ast.unparse(node)]
        elif not is_docstring:
            continue
        for number in range(node.lineno - 1, node.end_lineno or node.lineno):
            lines[number] = ""
    return imports, "\n".join(lines).strip()


def add_remote_code(folder: Path, components: list[str]) -> None:
    """Put the module into these component folders of a saved pipeline, and name it in `model_index.json`.

    Raises:
        ValueError: a component is not loaded by diffusers itself.
    """
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    for name in components:
        library, class_name = index[name]
        if library not in ("diffusers", REMOTE_MODULE):
            raise ValueError(
                f"remote code: {name} is a {class_name} of {library}, expected a model of diffusers; publish without it"
            )
        write_atomically(folder / name / f"{REMOTE_MODULE}.py", remote_module(class_name))
        index[name] = [REMOTE_MODULE, class_name]
    write_atomically(folder / "model_index.json", json.dumps(index, indent=2) + "\n")
