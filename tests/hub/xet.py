"""The Xet protocol, the client's default transport of large files: xorbs, shards and reconstructions.

Formats as published in huggingface/xet-core (`openapi/cas.openapi.yaml`, `file_structs.rs`, `xorb_chunk_format.rs`).
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from .store import Store

VERIFICATION, METADATA_EXT = 1 << 31, 1 << 30


def _hex(raw: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", raw))


def shard_files(shard: bytes) -> Iterator[tuple[str, str | None, list[tuple[str, int, int, int]]]]:
    """Yield (file hash, sha256, [(xorb hash, unpacked bytes, first chunk, end chunk), ...]) of every file."""
    at = 48
    while shard[at : at + 32] != b"\xff" * 32:
        file_hash = _hex(shard[at : at + 32])
        flags, count = struct.unpack_from("<II", shard, at + 32)
        at += 48
        terms = []
        for _ in range(count):
            size, first, end = struct.unpack_from("<III", shard, at + 36)
            terms.append((_hex(shard[at : at + 32]), size, first, end))
            at += 48
        at += 48 * count if flags & VERIFICATION else 0
        sha256 = _hex(shard[at : at + 32]) if flags & METADATA_EXT else None
        at += 48 if flags & METADATA_EXT else 0
        yield file_hash, sha256, terms


def chunk_offsets(xorb: bytes) -> list[int]:
    """Start of every chunk in a serialised xorb, then the end of the last one."""
    offsets, at = [0], 0
    while at + 8 <= len(xorb) and xorb[at] == 0:
        at += 8 + int.from_bytes(xorb[at + 1 : at + 4], "little")
        offsets.append(at)
    return offsets


class Cas:
    """Content-addressed storage; `url` is where clients reach it."""

    def __init__(self, root: Path, url: str, store: Store) -> None:
        self.xorbs, self.files, self.url, self.store = root / "xorbs", root / "xet_files", url, store
        store.rebuild = self.rebuild
        for folder in (self.xorbs, self.files):
            folder.mkdir(parents=True, exist_ok=True)

    def index(self) -> None:
        """Tell the store which sha256 are there, before a commit refers to them."""
        for path in self.files.glob("*.json"):
            entry = json.loads(path.read_bytes())
            self.store.xet[entry["sha256"]] = (entry["size"], path.stem)

    def rebuild(self, entry: dict[str, Any], target: Path) -> None:
        """Rebuild a file for clients without Xet, as the Hub's bridge does."""
        from hf_xet import XetFileInfo, XetSession

        target.parent.mkdir(parents=True, exist_ok=True)
        session = XetSession().new_file_download_group(
            endpoint=self.url, token="local", token_expiry_unix_secs=int(time.time()) + 3600
        )
        with session as group:
            group.start_download_file(XetFileInfo(entry["xet"], entry["size"]), str(target))

    def mount(self, app: FastAPI, hub: Any) -> None:
        @app.get("/api/{kind}/{ns}/{name}/xet-{scope}-token/{rev}", response_model=None)
        async def token(request: Request, kind: str, ns: str, name: str, scope: str, rev: str) -> Response:
            repo = hub.open(request, kind, ns, name)
            if scope == "write":
                hub.account(request, required=True)
            if request.query_params.get("create_pr") != "1":  # the client then asks for revision "None"
                hub.at(repo, rev)
            answer = {"casUrl": self.url, "accessToken": f"xet-{scope}", "exp": int(time.time()) + 3600}
            headers = {
                "X-Xet-Cas-Url": self.url,
                "X-Xet-Access-Token": f"xet-{scope}",
                "X-Xet-Token-Expiration": str(answer["exp"]),
            }
            return JSONResponse(answer, headers=headers)

        @app.post("/v1/xorbs/default/{xorb}")
        async def post_xorb(request: Request, xorb: str) -> dict[str, bool]:
            path = self.xorbs / xorb
            fresh = not path.exists()
            path.write_bytes(await request.body())
            return {"was_inserted": fresh}

        @app.post("/v1/shards", response_model=None)
        async def post_shard(request: Request) -> Any:
            for file_hash, sha256, terms in shard_files(await request.body()):
                if any(not (self.xorbs / term[0]).exists() for term in terms):
                    return JSONResponse({"error": "unknown xorb"}, 400)
                record = {"sha256": sha256, "size": sum(term[1] for term in terms), "terms": terms}
                (self.files / f"{file_hash}.json").write_text(json.dumps(record))
            return {"result": 1}

        @app.get("/v1/reconstructions/{file_hash}", response_model=None)
        async def reconstruction(request: Request, file_hash: str) -> Any:
            path = self.files / f"{file_hash}.json"
            if not path.exists():
                return JSONResponse({"error": "not found"}, 404)
            record = json.loads(path.read_bytes())
            first, last = 0, record["size"] - 1
            if "range" in request.headers:
                first, last = (int(x) for x in request.headers["range"].removeprefix("bytes=").split("-"))
            if first >= record["size"] and record["size"]:
                return Response(status_code=416)
            return self._terms(record, first, last)

        @app.get("/xorb-data/{xorb}", response_model=None)
        async def xorb_data(xorb: str) -> FileResponse:
            return FileResponse(self.xorbs / xorb)

        @app.post("/v1/telemetry")
        async def telemetry() -> dict[str, Any]:
            return {}

    def _terms(self, record: dict[str, Any], first: int, last: int) -> dict[str, Any]:
        """Which chunks of which xorbs make up the bytes from `first` to `last`."""
        answer: dict[str, Any] = {"offset_into_first_range": 0, "terms": [], "fetch_info": {}}
        position, spans = 0, {}
        for xorb, size, start, end in record["terms"]:
            if position + size > first and position <= last:
                if not answer["terms"]:
                    answer["offset_into_first_range"] = first - position
                chunks = {"start": start, "end": end}
                answer["terms"].append({"hash": xorb, "unpacked_length": size, "range": chunks})
                low, high = spans.get(xorb, (start, end))
                spans[xorb] = min(low, start), max(high, end)
            position += size
        for xorb, (start, end) in spans.items():
            offsets = chunk_offsets((self.xorbs / xorb).read_bytes())
            where = {"start": offsets[start], "end": offsets[end] - 1}
            fetch = {"range": {"start": start, "end": end}, "url": f"{self.url}/xorb-data/{xorb}", "url_range": where}
            answer["fetch_info"][xorb] = [fetch]
        return answer
