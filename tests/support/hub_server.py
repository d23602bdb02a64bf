"""A server of the Hugging Face hub's protocol on this machine: a repository that takes weights, or says why not."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest


@contextmanager
def hub(patch: pytest.MonkeyPatch, cache: object, *, refusal: tuple[int, str] | None = None) -> Iterator[None]:
    """huggingface_hub talks to this server, and keeps what it downloads in `cache`.

    Args:
        refusal: status and X-Error-Code of every answer; None: repositories are made, and weights are refused with 403.
    """

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            asked = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, said = (refusal[0], {}) if refusal else _answer(self.path, asked, address)
            content = json.dumps(said).encode()
            self.send_response(status)
            if refusal:
                self.send_header("X-Error-Code", refusal[1])
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        address = f"http://127.0.0.1:{server.server_port}"
        patch.setattr("huggingface_hub.constants.ENDPOINT", address)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)  # weights go by Git LFS
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield
        finally:
            server.shutdown()


def _answer(path: str, asked: bytes, address: str) -> tuple[int, dict]:
    if path.endswith("/repos/create"):
        return 200, {"url": f"{address}/me/net"}
    if "/preupload/" in path:
        names = [file["path"] for file in json.loads(asked)["files"]]
        kinds = {True: "lfs", False: "regular"}
        return 200, {
            "files": [
                {"path": name, "uploadMode": kinds[name.endswith(".safetensors")], "shouldIgnore": False}
                for name in names
            ]
        }
    if path.endswith("/objects/batch"):
        upload = {"upload": {"href": f"{address}/weights"}}
        return 200, {"objects": [{**one, "actions": upload} for one in json.loads(asked)["objects"]]}
    if path == "/weights":
        return 403, {}
    return 200, {"errors": [], "warnings": []}
