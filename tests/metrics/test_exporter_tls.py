"""A node's metrics over TLS: who is served, and which files are refused."""

import datetime
import ipaddress
import socket
import ssl
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from pipeline.errors import ConfigError
from pipeline.metrics.exporter import NodeServer, Tls
from pipeline.metrics.snapshots import Snapshot
from tests.support.scraping import get, place_of, raw


class Authority:
    """Signs certificates for 127.0.0.1."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._key = folder, ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = self._write(f"{name}.pem", self._signed(self._name, self._key, is_authority=True))

    def issue(self, name: str) -> tuple[str, str]:
        """Files of a certificate and its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        return (
            self._write(f"{name}.pem", self._signed(subject, key, is_authority=False)),
            self._write(f"{name}.key", key.private_bytes(encoding, form, serialization.NoEncryption())),
        )

    def _signed(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_authority: bool) -> bytes:
        now = datetime.datetime.now(datetime.timezone.utc)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        )
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, content: bytes) -> str:
        (self._folder / name).write_bytes(content)
        return str(self._folder / name)


def test_mutual_tls_serves_only_whom_the_authority_signed(tmp_path, monkeypatch):
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    folder = tmp_path / "metrics"
    folder.mkdir()
    Snapshot(folder, "rank-0", run="r", rank="0").write()
    server = NodeServer(folder, host="127.0.0.1", port=0, tls=Tls(*ours.issue("server"), client_ca=ours.file))
    try:
        assert server.address.startswith("https://")
        right = ssl.create_default_context(cafile=ours.file)
        right.load_cert_chain(*ours.issue("prometheus"))
        foreign = ssl.create_default_context(cafile=ours.file)
        foreign.load_cert_chain(*theirs.issue("stranger"))
        for context in (ssl.create_default_context(cafile=ours.file), foreign):
            with pytest.raises((ssl.SSLError, ConnectionError, urllib.error.URLError)):
                get(server, "/healthz", context)
        with pytest.raises(urllib.error.URLError, match="certificate verify failed"):
            get(server, "/healthz", ssl.create_default_context(cafile=theirs.file))
        assert raw(server, b"GET /metrics HTTP/1.1\r\n\r\n")[9:12] != b"200", "no plain text on this port"
        silent = socket.create_connection(place_of(server))  # never begins its handshake
        assert get(server, "/healthz", right) == "ok\n"
        silent.close()
    finally:
        server.close()


def test_tls_without_client_certificates_and_with_wrong_files(tmp_path):
    ours, theirs = Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")
    cert, key = ours.issue("server")
    server = NodeServer(tmp_path / "none", host="127.0.0.1", port=0, tls=Tls(cert, key))
    assert get(server, "/metrics", ssl.create_default_context(cafile=ours.file)) == ""
    server.close()
    for tls in (Tls(cert, theirs.issue("other")[1]), Tls(cert, "/nowhere"), Tls(cert, key, client_ca=key)):
        with pytest.raises(ConfigError, match=r"cannot be used \(.+\); name files in PEM form"):
            NodeServer(tmp_path, host="127.0.0.1", port=0, tls=tls)
