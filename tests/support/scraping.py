"""Requests to a node's metrics, as Prometheus and others make them."""

import socket
import ssl
import urllib.error
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from pipeline.metrics.exporter import NodeServer


def place_of(server: NodeServer) -> tuple[str, int]:
    host, port = server.address.split("/")[2].rsplit(":", 1)
    return host, int(port)


def get(server: NodeServer, path: str = "/metrics", context: ssl.SSLContext | None = None) -> str:
    url = server.address.replace("/metrics", path)
    with urllib.request.urlopen(url, timeout=10, context=context) as response:
        return response.read().decode()


def series(server: NodeServer) -> dict[tuple[str, ...], float]:
    """Value by name and label values."""
    families = text_string_to_metric_families(get(server))
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }


def raw(server: NodeServer, request: bytes) -> bytes:
    """The server's whole answer; it may close the connection while we still write."""
    with socket.create_connection(place_of(server), timeout=10) as client:
        try:
            client.sendall(request)
            answer = b""
            while part := client.recv(65536):
                answer += part
        except ConnectionError:
            pass
    return answer
