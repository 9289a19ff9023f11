"""Repositories on disk: content-addressed blobs, and commits that list them."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LFS_SUFFIXES = (".bin", ".parquet", ".png", ".jpg", ".wav", ".safetensors", ".tar", ".zip")


class Conflict(Exception):
    """The branch has moved since the parent that the client named."""


class Missing(Exception):
    """A path to delete, or an LFS object to point at, does not exist."""


def git_oid(kind: str, data: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(data)}\0".encode() + data).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def write_atomically(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{threading.get_ident()}")
    aside.write_bytes(data)
    os.replace(aside, path)


class Repo:
    """One repository: `meta` (private, branches, pull requests) and its commits."""

    def __init__(self, store: Store, path: Path) -> None:
        self.store, self.path = store, path
        self.meta: dict[str, Any] = json.loads((path / "repo.json").read_bytes())

    @property
    def id(self) -> str:
        return self.meta["id"]

    def save(self) -> None:
        write_atomically(self.path / "repo.json", json.dumps(self.meta, indent=1).encode())

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch, a pull request (`refs/pr/N`) or a commit id; None if there is none."""
        if revision in self.meta["refs"]:
            return self.meta["refs"][revision]
        return revision if (self.path / "commits" / f"{revision}.json").exists() else None

    def commit(self, oid: str) -> dict[str, Any]:
        return json.loads((self.path / "commits" / f"{oid}.json").read_bytes())

    def log(self, revision: str = "main") -> Iterator[dict[str, Any]]:
        oid = self.resolve(revision)
        while oid:
            commit = self.commit(oid)
            yield commit
            oid = commit["parent"]

    def files(self, revision: str = "main") -> dict[str, dict[str, Any]]:
        return self.commit(self.resolve(revision) or "")["files"]

    def blob(self, entry: dict[str, Any]) -> Path:
        return self.store.lfs(entry["lfs"]) if entry["lfs"] else self.store.git(entry["oid"])

    def read(self, path: str, revision: str = "main") -> bytes | None:
        entry = self.files(revision).get(path)
        if entry is None:
            return None
        if entry["xet"] and not self.blob(entry).exists():
            self.store.rebuild(entry, self.blob(entry))
        return self.blob(entry).read_bytes()

    def add_commit(
        self, ref: str, operations: list[dict[str, Any]], title: str, author: str, parent: str | None = None
    ) -> str:
        """Apply the operations of a commit request to a branch or pull request; all of them or none."""
        with self.store.lock:
            self.meta = json.loads((self.path / "repo.json").read_bytes())
            before = self.meta["refs"].get(ref)
            if parent and parent != before:
                raise Conflict
            files = dict(self.commit(before)["files"]) if before else {}
            for operation in operations:
                self._apply(files, operation["key"], operation["value"])
            now = time.time()
            record: dict[str, Any] = {"parent": before, "title": title, "author": author, "time": now, "files": files}
            oid = git_oid("commit", json.dumps(record).encode())
            write_atomically(self.path / "commits" / f"{oid}.json", json.dumps({"oid": oid, **record}).encode())
            self.meta["refs"][ref] = oid
            self.save()
            return oid

    def _apply(self, files: dict[str, dict[str, Any]], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            oid = git_oid("blob", value["content"])
            write_atomically(self.store.git(oid), value["content"])
            files[path] = {"oid": oid, "size": len(value["content"]), "lfs": None, "xet": None}
        elif key == "lfsFile":
            found = self.store.lfs_info(value["oid"])
            if found is None:
                raise Missing("LFS pointer pointed to a file that does not exist")
            size, xet = found
            pointer = git_oid("blob", lfs_pointer(value["oid"], size))
            files[path] = {"oid": pointer, "size": size, "lfs": value["oid"], "xet": xet}
        elif key == "deletedFile" and files.pop(path, None) is None:
            raise Missing(f"no file {path}")


class Store:
    """All repositories under one folder. The Xet server fills `xet`, sha256 -> (size, xet hash), and sets `rebuild`."""

    rebuild: Callable[[dict[str, Any], Path], None]

    def __init__(self, root: Path) -> None:
        self.root, self.lock = root, threading.RLock()
        self.xet: dict[str, tuple[int, str]] = {}
        (root / "tmp").mkdir(parents=True, exist_ok=True)

    def lfs(self, sha256: str) -> Path:
        return self.root / "lfs" / sha256

    def git(self, oid: str) -> Path:
        return self.root / "git" / oid

    def lfs_info(self, sha256: str) -> tuple[int, str | None] | None:
        if sha256 in self.xet:
            return self.xet[sha256]
        path = self.lfs(sha256)
        return (path.stat().st_size, None) if path.exists() else None

    def repo(self, kind: str, repo_id: str) -> Repo | None:
        path = self.root / "repos" / kind / repo_id
        return Repo(self, path) if (path / "repo.json").exists() else None

    def create(self, kind: str, repo_id: str, author: str, private: bool = False) -> Repo:
        path = self.root / "repos" / kind / repo_id
        meta = {"id": repo_id, "kind": kind, "private": private, "refs": {}, "pull_requests": 0}
        write_atomically(path / "repo.json", json.dumps(meta).encode())
        repo = Repo(self, path)
        attributes = "".join(f"*{s} filter=lfs diff=lfs merge=lfs -text\n" for s in LFS_SUFFIXES).encode()
        repo.add_commit(
            "main", [{"key": "file", "value": {"path": ".gitattributes", "content": attributes}}], "initial commit", author
        )  # fmt: skip
        return repo
