"""The part of the Hub's HTTP interface that huggingface_hub, diffusers and datasets use to push and to load."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.requests import ClientDisconnect

from . import cards
from .store import LFS_SUFFIXES, Conflict, Missing, Repo, Store
from .xet import Cas

KINDS = {"models": "model", "datasets": "dataset"}
PREFIX = {"model": "", "dataset": "datasets/"}
REGULAR_LIMIT = 10_000_000


class HubError(Exception):
    """An answer with an error status, as the Hub words it."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body


@dataclass(frozen=True)
class Account:
    """Whom a token belongs to, and what it may do."""

    user: str
    role: str = "write"
    orgs: tuple[str, ...] = ()

    def owns(self, namespace: str) -> bool:
        return namespace == self.user or namespace in self.orgs


class Hub:
    """The routes' handlers; `accounts` maps tokens. Large files are sent to and from `cdn_url`, another origin."""

    def __init__(self, root: Path, accounts: dict[str, Account], base_url: str, cdn_url: str) -> None:
        self.accounts, self.base_url, self.cdn_url = accounts, base_url, cdn_url
        self.store, self.key = Store(root), secrets.token_bytes(16)
        self.cas = Cas(root, cdn_url, self.store)

    # ---- who may do what ---------------------------------------------------------------------------------------------

    def account(self, request: Request, required: bool = False) -> Account | None:
        header = request.headers.get("authorization")
        if header is None:
            if required:
                raise HubError(401, "Invalid username or password.")
            return None
        account = self.accounts.get(header.removeprefix("Bearer "))
        if account is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return account

    def open(self, request: Request, kind: str, ns: str, name: str, write: bool = False) -> Repo:
        """A repo that the caller may see; a private one does not exist for others (401 without a token, else 404)."""
        who = self.account(request)
        repo = self.store.repo(KINDS.get(kind, ""), f"{ns}/{name}")
        if repo is None or (repo.meta["private"] and not (who and who.owns(ns))):
            if who is None:
                raise HubError(401, "Invalid username or password.")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write:
            who = self.account(request, required=True)
            if who is None or who.role != "write":
                raise HubError(403, "You must use a write token to upload to a repository.")
            if not who.owns(ns):
                raise HubError(403, "pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def at(self, repo: Repo, revision: str) -> str:
        oid = repo.resolve(revision.replace("%2F", "/"))
        if oid is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def sign(self, text: str) -> str:
        return hmac.new(self.key, text.encode(), "sha256").hexdigest()

    def check_signed(self, request: Request, signature: str, text: str) -> None:
        if "authorization" in request.headers:  # a signed address needs no token; the client must not leak it here
            raise HubError(400, "Only one auth mechanism allowed")
        if not hmac.compare_digest(signature, self.sign(text)):
            raise HubError(403, "SignatureDoesNotMatch")

    # ---- accounts, cards, repositories -------------------------------------------------------------------------------

    async def whoami(self, request: Request) -> Any:
        who = self.account(request, required=True)
        assert who
        orgs = [{"type": "org", "name": name} for name in who.orgs]
        return {"type": "user", "name": who.user, "orgs": orgs, "auth": {"accessToken": {"role": who.role}}}

    async def validate_yaml(self, request: Request) -> Any:
        body = await request.json()
        errors, warnings = cards.validate(body["content"])
        answer = {"errors": [{"message": e} for e in errors], "warnings": [{"message": w} for w in warnings]}
        return JSONResponse(answer, 400 if errors else 200)

    async def create(self, request: Request) -> Any:
        who = self.account(request, required=True)
        assert who
        body = await request.json()
        kind, ns, name = body.get("type") or "model", body.get("organization") or who.user, body["name"]
        if who.role != "write":
            raise HubError(403, "You don't have the rights to create a repository with a read-only token")
        if not who.owns(ns):
            raise HubError(403, f'You don\'t have the rights to create a {kind} under the namespace "{ns}"')
        url = f"{self.base_url}/{PREFIX[kind]}{ns}/{name}"
        if self.store.repo(kind, f"{ns}/{name}"):
            raise HubError(409, f"You already created this {kind} repo", url=url)
        private = body.get("visibility") == "private" or bool(body.get("private"))
        repo = self.store.create(kind, f"{ns}/{name}", who.user, private)
        return {"url": url, "name": repo.id}

    async def branch(self, request: Request, kind: str, ns: str, name: str, branch: str) -> Any:
        repo = self.open(request, kind, ns, name, write=True)
        body = json.loads(await request.body() or b"{}")
        branch = branch.replace("%2F", "/")
        if branch in repo.meta["refs"]:
            raise HubError(409, f"Branch {branch} already exists")
        repo.meta["refs"][branch] = self.at(repo, body.get("startingPoint", "main"))
        repo.save()
        return Response("OK")

    async def info(self, request: Request, kind: str, ns: str, name: str, rev: str = "main") -> Any:
        repo = self.open(request, kind, ns, name)
        oid = self.at(repo, rev)
        card = cards.metadata((repo.read("README.md", oid) or b"").decode("utf-8", "replace"))
        return {
            "id": repo.id, "author": ns, "sha": oid, "private": repo.meta["private"], "cardData": card or None,
            "tags": card.get("tags") or [], "siblings": [{"rfilename": path} for path in sorted(repo.files(oid))],
            "pipeline_tag": card.get("pipeline_tag"), "library_name": card.get("library_name"), "downloads": 0, "likes": 0,
        }  # fmt: skip

    # ---- trees and files ---------------------------------------------------------------------------------------------

    def _item(self, path: str, entry: dict[str, Any]) -> dict[str, Any]:
        item = {"type": "file", "oid": entry["oid"], "size": entry["size"], "path": path}
        if entry["lfs"]:
            item["lfs"] = {"oid": entry["lfs"], "size": entry["size"], "pointerSize": 130}
        if entry["xet"]:
            item["xetHash"] = entry["xet"]
        return item

    async def tree(self, request: Request, kind: str, ns: str, name: str, rev: str, path: str = "") -> Any:
        repo = self.open(request, kind, ns, name)
        files = repo.files(self.at(repo, rev))
        prefix = path.strip("/") + "/" if path.strip("/") else ""
        recursive = request.query_params.get("recursive", "").lower() in ("true", "1")
        items: dict[str, Any] = {}
        for file, entry in files.items():
            if not file.startswith(prefix):
                continue
            parts = file.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folder = prefix + "/".join(parts[:depth])
                items[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
            if recursive or len(parts) == 1:
                items[file] = self._item(file, entry)
        if prefix and not items:
            raise HubError(404, f"{path} does not exist", "EntryNotFound")
        return [items[p] for p in sorted(items)]

    async def paths_info(self, request: Request, kind: str, ns: str, name: str, rev: str) -> Any:
        repo = self.open(request, kind, ns, name)
        files = repo.files(self.at(repo, rev))
        form = parse_qs((await request.body()).decode())
        return [self._item(p, files[p]) for p in form.get("paths", []) if p in files]

    async def resolve(self, request: Request, kind: str, ns: str, name: str, rev: str, path: str) -> Any:
        repo = self.open(request, kind, ns, name)
        oid = self.at(repo, rev)
        entry = repo.files(oid).get(path)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if entry is None:
            raise HubError(404, "Entry not found", "EntryNotFound")
        etag = entry["lfs"] or entry["oid"]
        headers |= {"ETag": f'"{etag}"', "X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(entry["size"])}
        if not entry["lfs"]:  # the Hub answers for small files with a relative redirect
            headers["Location"] = f"/api/resolve-cache/{kind}/{ns}/{name}/{oid}/{quote(path)}"
            return Response(status_code=307, headers=headers)
        if entry["xet"]:
            token = f"{self.base_url}/api/{kind}/{ns}/{name}/xet-read-token/{oid}"
            headers |= {"X-Xet-Hash": entry["xet"], "Link": f'<{token}>; rel="xet-auth"'}
            if not self.store.lfs(entry["lfs"]).exists():
                await asyncio.to_thread(self.cas.rebuild, entry, self.store.lfs(entry["lfs"]))
        headers["Location"] = f"{self.cdn_url}/cdn/{entry['lfs']}?signature={self.sign('GET' + entry['lfs'])}"
        return Response(status_code=302, headers=headers)

    async def resolve_cache(self, request: Request, kind: str, ns: str, name: str, oid: str, path: str) -> Any:
        repo = self.open(request, kind, ns, name)
        entry = repo.files(oid)[path]
        return FileResponse(repo.blob(entry), headers={"X-Repo-Commit": oid, "ETag": f'"{entry["oid"]}"'})

    async def cdn(self, request: Request, sha: str, signature: str) -> Any:
        self.check_signed(request, signature, "GET" + sha)
        return FileResponse(self.store.lfs(sha), headers={"ETag": f'"{sha}"'})

    # ---- uploads -----------------------------------------------------------------------------------------------------

    async def preupload(self, request: Request, kind: str, ns: str, name: str, rev: str) -> Any:
        create_pr = request.query_params.get("create_pr") == "1"
        repo = self.open(request, kind, ns, name, write=not create_pr)
        oid = self.at(repo, rev)
        old, answer = repo.files(oid), []
        for file in (await request.json())["files"]:
            binary = b"\0" in base64.b64decode(file.get("sample", ""))
            large = file["size"] > REGULAR_LIMIT or binary or file["path"].endswith(LFS_SUFFIXES)
            item = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in old:
                item["oid"] = old[file["path"]]["lfs"] or old[file["path"]]["oid"]
            answer.append(item)
        return {"files": answer, "commitOid": oid}

    async def lfs_batch(self, request: Request, kind: str, ns: str, name: str) -> Any:
        self.account(request, required=True)
        self.open(request, kind, ns, name)
        objects = []
        for item in (await request.json())["objects"]:
            if self.store.lfs_info(item["oid"]) is None:
                href = f"{self.cdn_url}/lfs/{item['oid']}?signature={self.sign('PUT' + item['oid'])}"
                item = {**item, "actions": {"upload": {"href": href}}}
            objects.append(item)
        return {"transfer": "basic", "objects": objects}

    async def lfs_put(self, request: Request, oid: str, signature: str) -> Any:
        self.check_signed(request, signature, "PUT" + oid)
        digest = hashlib.sha256()
        handle, aside = tempfile.mkstemp(dir=self.store.root / "tmp")
        try:
            with os.fdopen(handle, "wb") as out:
                async for chunk in request.stream():
                    digest.update(chunk)
                    out.write(chunk)
            if digest.hexdigest() != oid:
                raise HubError(400, "XAmzContentSHA256Mismatch")
            self.store.lfs(oid).parent.mkdir(exist_ok=True)
            os.replace(aside, self.store.lfs(oid))
        except ClientDisconnect:
            return Response(status_code=499)
        finally:
            Path(aside).unlink(missing_ok=True)
        return Response()

    async def commit(self, request: Request, kind: str, ns: str, name: str, rev: str) -> Any:
        create_pr = request.query_params.get("create_pr") == "1"
        repo = self.open(request, kind, ns, name, write=not create_pr)
        who = self.account(request, required=True)
        assert who
        head, *operations = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                value["content"] = base64.b64decode(value["content"])
                if value["path"] == "README.md":
                    errors, _ = cards.validate(value["content"].decode("utf-8", "replace"))
                    if errors:
                        raise HubError(400, f"Your push was rejected during YAML metadata verification: {errors}")
        self.cas.index()
        ref, extra = rev.replace("%2F", "/"), {}
        self.at(repo, rev)
        if create_pr:
            repo.meta["pull_requests"] += 1
            number = repo.meta["pull_requests"]
            repo.meta["refs"][f"refs/pr/{number}"], ref = self.at(repo, rev), f"refs/pr/{number}"
            repo.save()
            extra["pullRequestUrl"] = f"{self.base_url}/{PREFIX[repo.meta['kind']]}{repo.id}/discussions/{number}"
        value = head["value"]
        try:
            oid = repo.add_commit(ref, operations, value["summary"], who.user, value.get("parentCommit"))
        except Conflict:
            raise HubError(412, "A commit has happened since. Please refresh and try again.") from None
        except Missing as error:
            raise HubError(400, str(error)) from None
        url = f"{self.base_url}/{PREFIX[repo.meta['kind']]}{repo.id}/commit/{oid}"
        return {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": "", **extra}


async def _nothing(rest: str = "") -> Response:
    return Response()


def create_app(hub: Hub) -> FastAPI:
    """The routes."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(HubError)
    async def on_error(request: Request, error: HubError) -> JSONResponse:
        headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
        return JSONResponse({"error": error.message, **error.body}, error.status, headers)

    @app.middleware("http")
    async def request_id(request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        response.headers["X-Request-Id"] = secrets.token_hex(8)
        return response

    repo = "/api/{kind}/{ns}/{name}"
    for method, path, handler in (
        ("GET", "/api/whoami-v2", hub.whoami),
        ("POST", "/api/validate-yaml", hub.validate_yaml),
        ("POST", "/api/repos/create", hub.create),
        ("HEAD", "/api/telemetry/{rest:path}", _nothing),
        ("GET", "/api/agent-harnesses", _nothing),
        ("POST", repo + "/branch/{branch}", hub.branch),
        ("POST", repo + "/preupload/{rev}", hub.preupload),
        ("POST", repo + "/commit/{rev}", hub.commit),
        ("POST", repo + "/paths-info/{rev}", hub.paths_info),
        ("GET", repo + "/tree/{rev}/{path:path}", hub.tree),
        ("GET", repo + "/tree/{rev}", hub.tree),
        ("GET", repo + "/revision/{rev}", hub.info),
        ("GET", "/api/resolve-cache/{kind}/{ns}/{name}/{oid}/{path:path}", hub.resolve_cache),
        ("GET", "/cdn/{sha}", hub.cdn),
        ("PUT", "/lfs/{oid}", hub.lfs_put),
    ):
        methods = ["GET", "HEAD"] if method == "GET" else [method]
        app.add_api_route(path, handler, methods=methods, response_model=None)
    hub.cas.mount(app, hub)
    app.add_api_route(repo, hub.info, methods=["GET"], response_model=None)
    for prefix, kind in (("/datasets", "datasets"), ("", "models")):
        _add_web_routes(app, hub, prefix, kind)
    return app


def _add_web_routes(app: FastAPI, hub: Hub, prefix: str, kind: str) -> None:
    """Routes without /api: models have no prefix there."""

    async def resolve(request: Request) -> Any:
        return await hub.resolve(request, kind, **request.path_params)

    async def lfs_batch(request: Request) -> Any:
        return await hub.lfs_batch(request, kind, **request.path_params)

    app.add_api_route(prefix + "/{ns}/{name}/resolve/{rev}/{path:path}", resolve, methods=["GET", "HEAD"])
    app.add_api_route(prefix + "/{ns}/{name}.git/info/lfs/objects/batch", lfs_batch, methods=["POST"])
