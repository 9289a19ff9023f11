"""Publish: one commit with a pruned pipeline, its plan, scores, figures and a model card; or a plan alone.

Nothing is written into the folder that is published, and the repository changes only by the last request, the commit. So a
failed upload leaves both as they were, and the same command again sends only what is missing.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from torch import nn

from .loading import one_line
from .modeling import plan_of
from .plan import PruningPlan
from .publication import CARD_FILE, Evidence, copy_pipeline, prepare, prepare_plan, pruned_parts
from .stock import record_of


@contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Turn what clients of the Hub raise into errors that say what to do."""
    try:
        yield
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{repo_id}: no such repository that your token may see; check the name, and log in with `hf auth login`"
        ) from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status == 401:
            raise ValueError(
                f"{repo_id}: the Hub does not know the access token, or there is none; log in with `hf auth login`"
            ) from error
        if status == 403:
            raise ValueError(
                f"{repo_id}: the token may not write there; use a token with write access, or --create-pr"
            ) from error
        raise ConnectionError(f"{repo_id}: the Hub answered: {one_line(error)}; {_RERUN}") from error
    except ValueError:
        raise
    except Exception as error:  # httpx and hf_xet have no common base
        raise ConnectionError(
            f"{repo_id}: the upload broke off ({type(error).__name__}: {one_line(error)}); {_RERUN}"
        ) from error


_RERUN = "the local result is as it was; the same command again sends only what is missing"


def check_card(path: Path) -> None:
    """Ask the Hub whether it accepts the card's metadata; ValueError that says what is wrong."""
    try:
        ModelCard.load(path).validate()
    except ValueError as error:
        try:
            wrong = "; ".join(entry["message"] for entry in json.loads(str(error))["errors"])
        except (ValueError, KeyError, TypeError):
            wrong = one_line(error)
        raise ValueError(f"{path.name}: the Hub does not accept its metadata: {wrong}") from error


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> CommitInfo:
    """Upload a prepared folder in one commit; files of an earlier version of the same parts go with it.

    Args:
        private: make a new repository private. create_pr: open a pull request instead of changing the branch.
        revision: the branch; made if it is missing.

    Raises:
        ValueError: a token that is wrong, missing or may only read; no such repository for a pull request; a public
            repository where a private one is asked for; metadata that the Hub does not accept.
        ConnectionError: the Hub failed or the connection broke; nothing was committed unless its answer was lost.
    """
    api = HfApi(token=token)
    with _explained(repo_id):
        check_card(folder / CARD_FILE)
        if not create_pr:
            api.create_repo(repo_id, private=private, exist_ok=True)
        info = api.model_info(repo_id)
        if private and not info.private:
            raise ValueError(f"{repo_id}: --private, but the repository is there and public; choose another name")
        if revision and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
        parts = {name.partition("/")[0] for name in files if "/" in name}
        gone = [
            name
            for name in api.list_repo_files(repo_id, revision=revision)
            if name not in files and "/" in name and name.partition("/")[0] in parts
        ]
        return api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, folder / name) for name in files),
                *(CommitOperationDelete(name) for name in gone),
            ],
            commit_message=commit_message or "Upload a pruned pipeline with ld_pruner_hf",
            revision=revision,
            create_pr=create_pr,
        )


def full_id(repo_id: str, token: str | None = None) -> str:
    """`name` as `user/name` of the token's user; a full id as it is."""
    if "/" in repo_id:
        return repo_id
    with _explained(repo_id):
        return f"{HfApi(token=token).whoami()['name']}/{repo_id}"


def publish(
    result: Any,
    repo_id: str,
    evidence: Evidence | None = None,
    *,
    remote_code: bool = False,
    save: Mapping[str, Any] | None = None,
    **push: Any,
) -> CommitInfo:
    """Publish a pruned pipeline on the Hub, with its plan, scores, figures and a model card, in one commit.

    Args:
        result: a pruned pipeline, or the folder that it was saved to (by `save_pretrained`, `ld-pruner prune` or
            training/distill.py).
        evidence: what the card says beyond the pipeline's own files.
        remote_code: ship the code that lets it load with `trust_remote_code=True` where this package is not installed.
        save: arguments of `save_pretrained`, if `result` is a pipeline. **push: `private`, `create_pr`, `revision`, `token`, `commit_message`, as in `push_folder`.

    Raises:
        ValueError, ConnectionError: as `prepare` and `push_folder`.

    Example:
        >>> publish("sd-pruned", "me/sd-pruned", Evidence(base_model="CompVis/stable-diffusion-v1-4"))
    """
    token = push.get("token")
    repo_id = full_id(repo_id, token)
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside) / "pipeline"
        if isinstance(result, (str, os.PathLike)):
            source, pipe = Path(result), None
            pruned_parts(source)
            copy_pipeline(source, folder)
        else:
            source, pipe = None, result
            result.save_pretrained(folder, **(save or {}))
        prepare(
            folder, repo_id, evidence or Evidence(), source=source, pipe=pipe, remote_code=remote_code, token=token
        )
        return push_folder(folder, repo_id, **push)


def push_plan(plan: PruningPlan, repo_id: str, *, base_model: str | None = None, **push: Any) -> CommitInfo:
    """Publish a plan alone, a few kB: `pipe.prune(repo_id)` then applies it to any pipeline of that architecture.

    Args:
        base_model: Hub id of the model that the plan was made from. **push: as in `push_folder`.
    """
    repo_id = full_id(repo_id, push.get("token"))
    with tempfile.TemporaryDirectory() as aside:
        folder = Path(aside)
        prepare_plan(plan, folder, repo_id, base_model, push.get("token"))
        return push_folder(folder, repo_id, **{"commit_message": "Upload a pruning plan with ld_pruner_hf", **push})


# ---- push_to_hub of pipelines ----------------------------------------------------------------------------------------


def is_pruned(pipe: Any) -> bool:
    """Was a model of this pipeline pruned, by a plan or into a stock model?"""
    models = [m for m in pipe.components.values() if isinstance(m, nn.Module)]
    return any(plan_of(m) is not None or record_of(m) is not None for m in models)


_OWN = {"remote_code", "revision", *Evidence.__dataclass_fields__}


def _wrap_push_to_hub(push_to_hub: Callable[..., Any]) -> Callable[..., Any]:
    """`push_to_hub` that publishes a pruned pipeline with plan and card; all of diffusers' arguments keep their meaning."""
    signature = inspect.signature(push_to_hub)

    @functools.wraps(push_to_hub)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        own = {k: kwargs[k] for k in _OWN & kwargs.keys()}
        given = signature.bind(self, *args, **{k: v for k, v in kwargs.items() if k not in own}).arguments
        if given.get("subfolder") or not is_pruned(self):
            return push_to_hub(self, *args, **kwargs)
        keys = ("commit_message", "private", "token", "create_pr")
        push = {k: given[k] for k in keys if k in given} | {k: own.pop(k) for k in ("revision",) if k in own}
        save: dict[str, Any] = {k: given[k] for k in ("safe_serialization", "variant") if k in given}
        remote_code = own.pop("remote_code", False)
        return publish(self, given["repo_id"], Evidence(**own), remote_code=remote_code, save=save, **push)

    wrapped.__doc__ = f"""{push_to_hub.__doc__}
        A pruned pipeline is published with its plan and a model card; see `ld_pruner_hf.publish`, whose further arguments
        (`remote_code`, `revision`, and the fields of `ld_pruner_hf.Evidence`) are taken by name.
        """
    return wrapped


def _wrap_save_pretrained(save_pretrained: Callable[..., Any]) -> Callable[..., Any]:
    """`save_pretrained(push_to_hub=True)` that publishes a pruned pipeline as `push_to_hub` does, and no README.md of yours is lost."""
    signature = inspect.signature(save_pretrained)

    @functools.wraps(save_pretrained)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, *args, **kwargs)
        if not bound.arguments.get("push_to_hub") or not is_pruned(self):
            return save_pretrained(self, *args, **kwargs)
        push = bound.arguments.pop("kwargs", {})
        del bound.arguments["push_to_hub"]
        save_pretrained(*bound.args, **bound.kwargs)
        folder = bound.arguments["save_directory"]
        repo_id = push.pop("repo_id", Path(folder).name)
        evidence = Evidence(**{k: push.pop(k) for k in Evidence.__dataclass_fields__ if k in push})
        publish(folder, repo_id, evidence, **push)

    return wrapped


def install() -> None:
    """Make `push_to_hub` and `save_pretrained(push_to_hub=True)` of pruned pipelines publish them as `publish` does."""
    for name, wrap in (("push_to_hub", _wrap_push_to_hub), ("save_pretrained", _wrap_save_pretrained)):
        method = getattr(DiffusionPipeline, name)
        if not getattr(method, "_by_ld_pruner_hf", False):
            wrapped = wrap(method)
            wrapped._by_ld_pruner_hf = True  # type: ignore[attr-defined]
            setattr(DiffusionPipeline, name, wrapped)
