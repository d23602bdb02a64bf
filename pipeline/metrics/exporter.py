"""Serves the metrics of a node's processes to Prometheus, whatever clients do.

    Snapshot.write() → FOLDER/rank-0.json, rank-1.json … → NodeServer → /metrics, /healthz, /readyz

A supervisor sets `CHISPIKE_METRICS_DIR` to the folder that it serves; without one the node's first rank serves. Needs
only prometheus-client and the standard library.
"""

import asyncio
import errno
import math
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import NamedTuple

from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from pipeline.config import MetricsConfig
from pipeline.errors import ConfigError
from pipeline.metrics.scrapers import STOPPED_S, Scrapers
from pipeline.metrics.snapshots import Families, snapshot_files

FOLDER_VARIABLE = "CHISPIKE_METRICS_DIR"
USUAL_PORT = MetricsConfig().port
MAX_OPEN = 64
"""Open connections at a time; a further one closes the oldest, so that slow clients never keep Prometheus out."""
MAX_PER_SECOND = 50
"""Connections accepted per second; more wait in the kernel, so that a flood costs the serving rank almost nothing."""
TIMEOUT_S = 5.0
"""Seconds for a whole connection, TLS handshake and answer included."""
MAX_REQUEST_BYTES = 16384


class Tls(NamedTuple):
    """Files in PEM form; with `client_ca` only clients whose certificate it signed are served."""

    cert: str
    key: str
    client_ca: str = ""

    def context(self) -> ssl.SSLContext:
        """Raises ConfigError where a file cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.cert, self.key)
            if self.client_ca:
                context.load_verify_locations(self.client_ca)
                context.verify_mode = ssl.CERT_REQUIRED
        except OSError as error:  # ssl.SSLError is one
            raise ConfigError(
                f"metrics.tls_cert={self.cert!r}, metrics.tls_key={self.key!r} and metrics.tls_client_ca="
                f"{self.client_ca!r} cannot be used ({error.strerror or error}); name files in PEM form that belong "
                "together and can be read"
            ) from None
        return context


def tls_of(metrics: MetricsConfig) -> Tls | None:
    return Tls(metrics.tls_cert, metrics.tls_key, metrics.tls_client_ca) if metrics.tls_cert else None


def listen(host: str, port: int, *, or_any: bool = False) -> socket.socket:
    """The server's socket, IPv4 or IPv6; with `or_any` on a free port if `port` is taken.

    Raises:
        ConfigError: the port is taken, or the host is no address of this machine.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, backlog=128, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        if or_any and getattr(error, "errno", None) == errno.EADDRINUSE:
            return listen(host, 0)
        raise ConfigError(
            f"metrics.port={port} on {host} cannot be opened ({_reason(error)}); use another, or 0 for a free one"
        ) from None


def _reason(error: OSError | UnicodeError) -> str:
    """The system's text for the error; create_server appends the address, which our message already has."""
    number = getattr(error, "errno", None)
    return os.strerror(number) if number and number > 0 else getattr(error, "strerror", None) or str(error)


class NodeServer:
    """Serves the snapshots of `folder` until `close`, in a thread of its own.

    /metrics is for Prometheus; /healthz and /readyz answer 200, or 503 if `healthy` or `ready` returns False. These
    two are called in the server's thread and must be quick. Any other path gets 404.

    Args:
        folder: of snapshots; it may be empty, or be made later.
        host, port: 0 takes a free port.
        or_any: take a free port if `port` is taken; `said` then says so.
        tls: serve https.

    Raises:
        ConfigError: the port is taken, or a file of `tls` cannot be used.
    """

    def __init__(
        self,
        folder: Path,
        *,
        host: str,
        port: int,
        or_any: bool = False,
        ready: Callable[[], bool] | None = None,
        healthy: Callable[[], bool] | None = None,
        tls: Tls | None = None,
    ) -> None:
        self.folder = folder
        self._probes = {"/healthz": healthy, "/readyz": ready}
        self._families = Families(folder)
        self._state: list | None = None
        self._text = b""
        self._scrapers = Scrapers()
        self._context = tls.context() if tls else None
        self._socket = listen(host, port, or_any=or_any)
        self._socket.setblocking(False)
        shown = f"[{host}]" if ":" in host else host
        opened = self._socket.getsockname()[1]
        self.address = f"{'https' if tls else 'http'}://{shown}:{opened}/metrics"
        self.said = f"metrics at {self.address}" + (f" (port {port} is taken)" if opened != port != 0 else "")
        """A line for the console: where the metrics are."""
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(lambda loop, context: None)  # a client's broken connection is not our error
        self._accepting = self._loop.create_task(self._accept())
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def linger(self, *, stopped: bool = False, urgent: Callable[[], bool] = lambda: False) -> None:
        """If Prometheus scrapes regularly, waits until it has read the last values, which tell how the run ended.

        After a stop on request there is less time: at most `STOPPED_S`, and only until `urgent`.
        """
        self._scrapers.wait(STOPPED_S if stopped else math.inf, urgent)

    def close(self) -> None:
        """Ends the thread and every connection. It may be called twice."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._accepting.cancel)
            self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._accepting)
        except asyncio.CancelledError:
            pass
        finally:
            self._socket.close()
            self._loop.close()

    async def _accept(self) -> None:
        clients: dict[asyncio.Task, None] = {}  # oldest first
        try:
            while True:
                try:
                    client, address = await self._loop.sock_accept(self._socket)
                except OSError:  # the client is already gone, or the process has no descriptor left
                    await asyncio.sleep(0.1)
                    continue
                if len(clients) >= MAX_OPEN:
                    next(iter(clients)).cancel()
                task = self._loop.create_task(self._serve(client, address[0]))
                clients[task] = None
                task.add_done_callback(clients.pop)
                await asyncio.sleep(1 / MAX_PER_SECOND)
        finally:
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
            await asyncio.sleep(0)  # the loop closes their sockets in its next iteration

    async def _serve(self, client: socket.socket, address: str) -> None:
        """Answers one request of one connection, or gives up after `TIMEOUT_S`."""
        with suppress(OSError, EOFError, asyncio.TimeoutError):  # the client broke off, was too slow, or spoke no TLS
            await asyncio.wait_for(self._exchange(client, address), TIMEOUT_S)

    async def _exchange(self, client: socket.socket, address: str) -> None:
        reader = asyncio.StreamReader(limit=MAX_REQUEST_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await self._loop.connect_accepted_socket(lambda: protocol, client, ssl=self._context)
        try:
            try:
                answer = self._answer(await reader.readuntil(b"\r\n\r\n"), address)
            except asyncio.LimitOverrunError:
                answer = _http(431, b"the request is too long\n")
            writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
            writer.write(answer)
            writer.close()
            await writer.wait_closed()
        except asyncio.CancelledError:
            with suppress(OSError):  # else the kernel keeps the rest for a client that does not read it
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise
        finally:
            transport.abort()

    def _answer(self, request: bytes, address: str) -> bytes:
        line = request.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        if len(line) != 3 or not line[2].startswith("HTTP/1."):
            return _http(400, b"not a request of HTTP/1.1\n")
        method, path = line[0], line[1].split("?")[0]
        if method not in ("GET", "HEAD"):
            return _http(405, b"use GET or HEAD\n", "Allow: GET, HEAD\r\n")
        only_head = method == "HEAD"
        if path == "/metrics":
            self._scrapers.came(address, time.monotonic())
            return _http(200, self._metrics(), f"Content-Type: {CONTENT_TYPE_PLAIN_0_0_4}\r\n", only_head)
        if path in self._probes:
            probe = self._probes[path]
            status, word = (200, b"ok\n") if probe is None or probe() else (503, b"no\n")
            return _http(status, word, "", only_head)
        return _http(404, b"see /metrics, /healthz and /readyz\n", "", only_head)

    def _metrics(self) -> bytes:
        """The text for Prometheus, made again only if a snapshot has changed."""
        state = [(path.name, status.st_ino, status.st_mtime_ns) for path, status in snapshot_files(self.folder)]
        if state != self._state:
            self._state, self._text = state, generate_latest(self._families)
        return self._text


def _http(status: int, body: bytes, headers: str = "", only_head: bool = False) -> bytes:
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n{headers}Content-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + (b"" if only_head else body)
