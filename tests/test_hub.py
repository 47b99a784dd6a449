"""``hf://`` addresses against a local server that speaks the hub's endpoints, and without a network."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pretrain3d.__main__ import main
from pretrain3d.backbones import BACKBONES, load_backbone
from pretrain3d.backbones.checkpoints import nnssl
from pretrain3d.backbones.checkpoints.hub import local, name_of
from pretrain3d.backbones.transfer import export_weights, fingerprint, load_export, transfer_into
from pretrain3d.config import UserError
from pretrain3d.registry import build

hub = pytest.importorskip("huggingface_hub", reason="the hub's client is an extra")

NODE = {"name": "resenc", "channels": [4, 6], "blocks": [1, 1], "strides": [1, 2], "in_channels": 1}
COMMIT = "0123456789abcdef0123456789abcdef01234567"

REFUSED = {"lab/token": (401, ""), "lab/gated": (401, "GatedRepo"), "lab/closed": (403, "")}


class Hub(BaseHTTPRequestHandler):
    """Repositories as a dict name -> file -> bytes; a private one answers as the hub does."""

    repositories: dict[str, dict[str, bytes]]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self.listing("/".join(parts[2:4]), parts[4:], body)
        repository, (_, revision), file = "/".join(parts[:2]), parts[2:4], "/".join(parts[4:])
        if repository in REFUSED:
            return self.error(*REFUSED[repository])
        if repository not in self.repositories:
            return self.error(401, "RepoNotFound")
        if revision not in ("main", COMMIT):
            return self.error(404, "RevisionNotFound")
        content = self.repositories[repository].get(file)
        if content is None:
            return self.error(404, "EntryNotFound")
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if body:
            self.wfile.write(content)

    def listing(self, repository: str, rest: list[str], body: bool) -> None:
        if repository not in self.repositories:
            return self.error(401, "RepoNotFound")
        files = self.repositories[repository]
        answer: object = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        if rest[:1] == ["tree"]:
            answer = [{"type": "file", "path": n, "size": len(c), "oid": COMMIT} for n, c in files.items()]
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if body:
            self.wfile.write(text)

    def error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    backbone = build(BACKBONES, NODE, "backbone")
    export_weights(tmp_path / "mae.pt", NODE, backbone.state_dict(), {"intensity": None}, {"method": "mae"})
    nnssl.write(tmp_path / "released.pth", load_export(tmp_path / "mae.pt"))
    released, ours = (tmp_path / "released.pth").read_bytes(), (tmp_path / "mae.pt").read_bytes()
    handler = type("Handler", (Hub,), {"asked": [], "repositories": {
        "lab/ResEnc-MAE": {"README.md": b"card", "checkpoint_final.pth": released, "other.pth": b""},
        "lab/ours": {"README.md": b"card", "folder/mae.pt": ours},
        "lab/many": {"a.pt": b"", "b.ckpt": b""},
    }})  # fmt: skip
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    use(monkeypatch, f"http://127.0.0.1:{httpd.server_address[1]}", tmp_path / "cache")
    yield handler
    httpd.shutdown()
    httpd.server_close()


def use(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE would do, had they been set when the client was imported."""
    from huggingface_hub import constants, file_download, hf_api

    for module in (constants, file_download, hf_api):
        for name, value in {
            "ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), "HF_HUB_DISABLE_XET": True,
            "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        }.items():  # fmt: skip
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(hub, "HfApi", lambda: hf_api.HfApi(endpoint=endpoint))
    monkeypatch.setattr(
        hub,
        "hf_hub_download",
        lambda *a, **k: file_download.hf_hub_download(*a, endpoint=endpoint, cache_dir=cache, **k),
    )


def test_import_and_transfer_from_the_hub(server, tmp_path, capsys):
    out = tmp_path / "out.pt"
    assert main(["import", "hf://lab/ResEnc-MAE", f"out={out}"]) == 0
    mark = load_export(tmp_path / "mae.pt")["fingerprint"]
    assert load_export(out)["fingerprint"] == mark
    assert load_export(out)["source"]["file"] == "hf://lab/ResEnc-MAE"
    for address in ("hf://lab/ours", "hf://lab/ours/folder/mae.pt", f"hf://lab/ours/folder/mae.pt@{COMMIT}"):
        assert fingerprint(load_backbone(address).state_dict()) == mark
    assert transfer_into(build(BACKBONES, NODE, "backbone"), "hf://lab/ours").path == "hf://lab/ours"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://lab", "expected hf://owner/name"),
        ("hf://lab/none", "no such repository or revision, or it is private"),
        ("hf://lab/ours@v9", "no such repository or revision"),
        ("hf://lab/ours/x.pt", "lab/ours has no file x.pt"),
        ("hf://lab/token", r"the hub answers with status 401; check the token \(`hf auth login`, HF_TOKEN\)"),
        ("hf://lab/closed/a.pt", "the hub answers with status 403; check the token"),
        ("hf://lab/gated", "accept its terms on the hub first, then `hf auth login`"),
        ("hf://lab/many", "say which file: hf://lab/many/FILE; it has a.pt, b.ckpt"),
    ],
)
def test_mistakes_are_named(server, address, message):
    if address.endswith("@v9"):
        address = "hf://lab/ours/folder/mae.pt@v9"
    with pytest.raises(UserError, match=message):
        local(address)


def test_without_a_network(tmp_path, monkeypatch):
    use(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its retries
    for address in ("hf://lab/ours", "hf://lab/ours/mae.pt"):
        with pytest.raises(UserError, match=r"is not in the cache and the hub cannot be reached; try again online"):
            local(address)


def test_what_is_in_the_cache_needs_no_network(server, tmp_path, monkeypatch):
    first = local("hf://lab/ResEnc-MAE")
    use(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its retries
    assert local("hf://lab/ResEnc-MAE") == first


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"pip install 'pretrain3d\[hub\]'"):
        local("hf://lab/ours")


def test_names():
    assert local("a/b.pt") == Path("a/b.pt") and local(Path("c.pt")) == Path("c.pt")
    assert name_of("hf://lab/ResEnc-MAE") == name_of("hf://lab/ResEnc-MAE/x.pth@main") == "ResEnc-MAE"
    assert name_of("weights/mae.pth") == "mae"
