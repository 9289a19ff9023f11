"""The loopback Hub itself: what the tests beside it rely on."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download


def test_upload_and_download(hub, tmp_path, transport):
    api = HfApi()
    api.create_repo(f"alice/files-{transport}")
    (tmp_path / "up").mkdir()
    (tmp_path / "up" / "a.txt").write_text("text")
    (tmp_path / "up" / "b.bin").write_bytes(transport.encode() + bytes(range(256)) * 5000)
    api.upload_folder(repo_id=f"alice/files-{transport}", folder_path=tmp_path / "up")
    for name in ("a.txt", "b.bin"):
        got = Path(hf_hub_download(f"alice/files-{transport}", name))
        assert got.read_bytes() == (tmp_path / "up" / name).read_bytes()
    used = {"xet": "/v1/xorbs", "lfs": "/lfs/"}
    assert any(entry["path"].startswith(used[transport]) for entry in hub.log)
    other = used["lfs" if transport == "xet" else "xet"]
    assert not any(entry["path"].startswith(other) for entry in hub.log)
