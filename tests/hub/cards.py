"""Checks of model-card metadata without a network, worded like the answers of the Hub's `/api/validate-yaml`.

Field types follow `ApiModelMetadata` of the npm package `@huggingface/hub`; licences hub-docs `repositories-licenses.md`; tasks
`PIPELINE_TYPES` of `@huggingface/tasks` (those that diffusion models have).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

ID = re.compile(r"^(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?$")
BLOCK = re.compile(r"^\s*---\r?\n(.*?)\r?\n---(\r?\n|$)", re.DOTALL)
RELATIONS = ("adapter", "merge", "quantized", "finetune")
LICENSES = (
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0",
    "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0",
    "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1",
    "lgpl-3.0", "isc", "h-research", "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0",
    "odc-by", "odbl", "openmdw-1.0", "openmdw-1.1", "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa",
    "unlicense", "zlib", "pddl", "lgpl-lr", "deepfloyd-if-license", "fair-noncommercial-research-license",
    "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "grok2-community", "gemma", "unknown",
    "other",
)  # fmt: skip
TASKS = (
    "text-to-image", "image-to-image", "unconditional-image-generation", "text-to-audio", "audio-to-audio", "text-to-video",
    "image-to-video", "video-to-video", "text-to-3d", "image-to-3d", "depth-estimation", "image-segmentation", "other",
)  # fmt: skip
STRINGS = (
    "pipeline_tag",
    "library_name",
    "license_name",
    "license_link",
    "thumbnail",
    "base_model_relation",
    "new_version",
)
LISTS = ("tags", "widget", "metrics", "model-index")


def metadata(content: str) -> dict[str, Any]:
    """The metadata of a card; empty if there is none."""
    match = BLOCK.match(content)
    data = yaml.safe_load(match[1]) if match else None
    return data if isinstance(data, dict) else {}


def validate(content: str) -> tuple[list[str], list[str]]:
    """(errors, warnings) for a README.md."""
    match = BLOCK.match(content)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return [f"invalid YAML: {' '.join(str(error).split())}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["metadata must be an object"], []
    errors = [f'"{k}" must be a string' for k in STRINGS if data.get(k) is not None and not isinstance(data[k], str)]
    errors += [f'"{k}" must be an array' for k in LISTS if k in data and not isinstance(data[k], list)]
    errors += _ids(data.get("base_model"), "base_model", "Use a model id from https://hf.co/models.")
    errors += _ids(data.get("datasets"), "datasets", "If possible, use a dataset id from https://hf.co/datasets.")
    for i, tag in enumerate(data["tags"] if isinstance(data.get("tags"), list) else []):
        if not isinstance(tag, str):
            errors.append(f'"tags[{i}]" must be a string')
    licences = data.get("license")
    for value in licences if isinstance(licences, list) else [licences] * (licences is not None):
        if value not in LICENSES:
            errors.append(f'"license" must be one of [{", ".join(sorted(LICENSES))}]')
    if isinstance(data.get("base_model_relation"), str) and data["base_model_relation"] not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(RELATIONS)}]')
    if isinstance(data.get("model-index"), list):
        errors += _model_index(data["model-index"])
    warnings = []
    if data.get("license") == "other" and not data.get("license_name"):
        warnings.append('"license_name" should be set when "license" is "other"')
    if isinstance(data.get("pipeline_tag"), str) and data["pipeline_tag"] not in TASKS:
        warnings.append(f'The pipeline tag "{data["pipeline_tag"]}" is not in the official list')
    return errors, warnings


def _ids(value: Any, key: str, hint: str) -> list[str]:
    if value is None:
        return []
    many = isinstance(value, list)
    out = []
    for i, item in enumerate(value if many else [value]):
        name = f"{key}[{i}]" if many else key
        if not isinstance(item, str):
            out.append(f'"{name}" must be a string')
        elif not ID.match(item):
            out.append(f'"{name}" with value "{item}" is not valid. {hint}')
    return out


def _model_index(index: list[Any]) -> list[str]:
    errors: list[str] = []

    def need(node: Any, path: str, *required: str, optional: tuple[str, ...] = ()) -> bool:
        if not isinstance(node, dict):
            errors.append(f'"{path}" must be of type object')
            return False
        for key in required:
            if node.get(key) is None:
                errors.append(f'"{path}.{key}" is required')
        for key in (*required, *optional):
            nested = key in ("value", "results", "metrics", "task", "dataset")
            if not nested and node.get(key) is not None and not isinstance(node[key], str):
                errors.append(f'"{path}.{key}" must be a string')
        return True

    for i, model in enumerate(index):
        here = f"model-index[{i}]"
        if not need(model, here, "name", "results"):
            continue
        for j, result in enumerate(model.get("results") or []):
            there = f"{here}.results[{j}]"
            if not need(result, there, "task", "metrics"):
                continue
            need(result.get("task") or {}, f"{there}.task", "type", optional=("name",))
            if result.get("dataset") is not None:
                need(result["dataset"], f"{there}.dataset", "type", "name", optional=("config", "split", "revision"))
            for k, metric in enumerate(result.get("metrics") or []):
                need(metric, f"{there}.metrics[{k}]", "type", "value", optional=("name", "config"))
            if result.get("source") is not None:
                need(result["source"], f"{there}.source", "url", optional=("name",))
    return errors
