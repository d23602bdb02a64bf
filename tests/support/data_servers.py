"""Real servers to read shards from: HTTP and the S3 protocol, both with faults on request."""

import os
import threading
from base64 import b64encode
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit


class FaultyServer(ThreadingHTTPServer):
    """Serves a folder. `faults[name]` lists what goes wrong with the next requests for a file, one each:

    cut: the connection is reset in mid-file; truncated: half the body, announced as whole; corrupted: one byte is
    wrong; busy: 503; forbidden: 403; stalled: half the body, then nothing; slow: whole, in many small pieces.
    """

    daemon_threads = True

    def __init__(self, folder: Path, handler: type[BaseHTTPRequestHandler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or _Handler)
        self.folder, self.faults = folder, dict[str, list[str]]()
        self.requests: Counter[str] = Counter()
        self.release = threading.Event()
        """Ends a stall."""
        self.credentials = ""
        """Of Basic authentication, NAME:PASSWORD; empty: anybody may read."""
        self.pace_s = 0.002

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is part of these tests."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        path = self.server.folder / urlsplit(self.path).path.lstrip("/")  # a proxy gets the whole URL
        self.server.requests[path.name] += 1
        expected = self.server.credentials and f"Basic {b64encode(self.server.credentials.encode()).decode()}"
        if expected and self.headers.get("Authorization") != expected:
            return self.send_error(401)
        if not path.is_file():
            return self.send_error(404)
        planned = self.server.faults.get(path.name, [])
        fault = planned.pop(0) if planned else ""
        if fault in ("busy", "forbidden"):
            return self.send_error(503 if fault == "busy" else 403)
        body = bytearray(path.read_bytes())
        self.send_response(200)
        if fault == "truncated":
            body = body[: len(body) // 2]
        if fault == "corrupted":
            body[len(body) // 2] ^= 1
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._send(bytes(body), fault)
        return None

    def _send(self, body: bytes, fault: str) -> None:
        half = len(body) // 2
        if fault in ("cut", "stalled"):
            self.wfile.write(body[:half])
            if fault == "stalled":
                self.server.release.wait()
            self.close_connection = True
        elif fault == "slow":
            for at in range(0, len(body), 4096):
                self.wfile.write(body[at : at + 4096])
                self.server.release.wait(self.server.pace_s)  # the fault itself: the server takes its time
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args) -> None:
        pass


class FaultyProxy(FaultyServer):
    """Passes requests on to the server at `target`, host and port; `faults` may have cut and busy, of a GET."""

    def __init__(self, target: tuple[str, int]) -> None:
        super().__init__(Path(), _Forwarder)
        self.target = target


class _Forwarder(BaseHTTPRequestHandler):
    server: FaultyProxy  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].rpartition("/")[2]
        fault = ""
        if self.command == "GET":
            self.server.requests[name] += 1
            planned = self.server.faults.get(name, [])
            fault = planned.pop(0) if planned else ""
        if fault == "busy":
            return self.send_error(503)
        target = HTTPConnection(*self.server.target)
        target.request(self.command, self.path, headers=dict(self.headers))
        answer = target.getresponse()
        body = answer.read()
        target.close()
        self.send_response(answer.status)
        for header, value in answer.getheaders():
            if header.lower() not in ("connection", "server", "date"):
                self.send_header(header, value)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)  # and the connection is closed
        return None

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[FaultyServer]:
    with _running(FaultyServer(folder)) as server:
        yield server


@contextmanager
def _running(server: FaultyServer) -> Iterator[FaultyServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.release.set()
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serve_s3(folder: Path, bucket: str) -> Iterator[tuple[str, FaultyServer]]:
    """A folder's files in a bucket of moto's S3 server, behind a proxy that can fail.

    Sets where boto finds the proxy, and yields the bucket's URL and the proxy.
    """
    import boto3
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": "",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket=bucket)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            client.upload_file(str(path), bucket, str(path.relative_to(folder)))
        with _running(FaultyProxy((host, port))) as proxy:
            os.environ["AWS_ENDPOINT_URL"] = proxy.url
            S3FileSystem.clear_instance_cache()  # else a client of an earlier server is used again
            yield f"s3://{bucket}", proxy
    finally:
        server.stop()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
