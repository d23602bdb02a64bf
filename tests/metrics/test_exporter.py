"""A node's metrics over real sockets: what is served, to whom, and that no client and no file does harm."""

import errno
import os
import select
import shutil
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from http.client import HTTPConnection
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.metrics import exporter, scrapers
from pipeline.metrics.exporter import NodeServer
from pipeline.metrics.snapshots import Snapshot
from tests.conftest import ROOT
from tests.support.scraping import get, place_of, raw, series


@pytest.fixture
def server(tmp_path):
    (tmp_path / "metrics").mkdir()
    with_probes = NodeServer(tmp_path / "metrics", host="127.0.0.1", port=0)
    yield with_probes
    with_probes.close()


def test_the_ranks_of_a_node_are_served_together(server):
    ranks = [Snapshot(server.folder, f"rank-{rank}", run="mine", rank=str(rank)) for rank in (0, 1)]
    for rank, snapshot in enumerate(ranks):
        snapshot.set("data_queue_depth", 3 - rank)
        snapshot.add("train_phase_seconds", 0.5, phase="data_wait")
        snapshot.add("train_phase_seconds", 0.25, phase="data_wait")
    ranks[0].set("layer_chi", 0.125, layer="00-stem")
    ranks[0].set("train_loss", float("nan"))
    assert series(server) == {}
    for snapshot in ranks:
        snapshot.write()
    text = get(server)
    assert text.count("# TYPE snn_train_phase_seconds_total counter") == 1
    assert 'snn_train_loss{run="mine"} NaN' in text
    assert {key: value for key, value in series(server).items() if value == value} == {
        ("snn_data_queue_depth", "0", "mine"): 3,
        ("snn_data_queue_depth", "1", "mine"): 2,
        ("snn_train_phase_seconds_total", "data_wait", "0", "mine"): 0.75,
        ("snn_train_phase_seconds_total", "data_wait", "1", "mine"): 0.75,
        ("snn_layer_chi", "00-stem", "mine"): 0.125,
    }


def test_a_change_is_seen_by_the_next_scrape_and_a_counter_never_falls(server):
    snapshot = Snapshot(server.folder, "rank-0", run="r", rank="0")
    seen = []
    for increment in (1, 0, 2.5, -4):  # a clock that was set back, say
        snapshot.add("train_steps", increment)
        snapshot.write()
        seen.append(series(server)["snn_train_steps_total", "r"])
    assert seen == [1, 1, 3.5, 3.5]


def test_the_snapshot_of_a_killed_process_stays_and_is_whole(server):
    code = (
        "import sys; from pathlib import Path; from pipeline.metrics.snapshots import Snapshot\n"
        "snapshot = Snapshot(Path(sys.argv[1]), 'rank-3', run='r', rank='3'); count = 0\n"
        "while True:\n"
        "    count += 1\n"
        "    for layer in range(40): snapshot.set('layer_chi', count, layer=str(layer))\n"
        "    snapshot.set('train_last_step_timestamp_seconds', count); snapshot.write()\n"
        "    if count == 50: print('going', flush=True)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, server.folder], cwd=ROOT, stdout=subprocess.PIPE)
    assert writer.stdout
    assert writer.stdout.readline() == b"going\n"
    for _ in range(20):  # while it writes: never half of a snapshot
        assert len(set(series(server).values())) == 1
    writer.kill()  # in the middle of a write, nearly always
    writer.communicate()
    last = series(server)
    assert last["snn_train_last_step_timestamp_seconds", "3", "r"] >= 50
    assert len(last) == 41
    assert len(set(last.values())) == 1


def test_probes_answer_what_they_are_told_and_other_paths_are_unknown(tmp_path):
    state = {"ready": False, "healthy": True}
    server = NodeServer(
        tmp_path, host="127.0.0.1", port=0, ready=lambda: state["ready"], healthy=lambda: state["healthy"]
    )
    try:
        assert get(server, "/healthz") == "ok\n"
        for path, code in (("/readyz", 503), ("/", 404), ("/metrics/../../etc/passwd", 404), ("/metricsx", 404)):
            with pytest.raises(urllib.error.HTTPError) as refused:
                get(server, path)
            assert refused.value.code == code
            refused.value.close()
        state["ready"] = True
        assert get(server, "/readyz?verbose=1") == "ok\n"
    finally:
        server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(place_of(server))


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", b"405"),
        (b"GET /metrics HTTP/2.0\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"400"),
        (b"GET /metrics\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\nX: " + b"a" * 100_000, b"431"),
        (b"", b""),
    ],
    ids=["post", "version", "tls", "no-version", "huge", "nothing"],
)
def test_wrong_requests_are_refused_and_the_next_right_one_served(server, request_, status, monkeypatch):
    monkeypatch.setattr(exporter, "TIMEOUT_S", 0.5)
    answer = raw(server, request_)
    if status != b"431":  # a client that still writes when the server closes may lose the answer
        assert answer[9:12] == status
    assert raw(server, b"HEAD /healthz HTTP/1.1\r\n\r\n").endswith(b"\r\n\r\n")
    assert get(server, "/healthz") == "ok\n"


def test_slow_clients_never_keep_prometheus_out(server, monkeypatch):
    """More clients than are served at a time; none ends its request."""
    monkeypatch.setattr(exporter, "MAX_PER_SECOND", 1000)
    slow = []
    for _ in range(2 * exporter.MAX_OPEN):
        slow.append(socket.create_connection(place_of(server), timeout=10))
        slow[-1].sendall(b"GET /met")
    assert get(server, "/healthz") == "ok\n"
    with pytest.raises(ConnectionResetError):  # the oldest is dropped
        slow[0].recv(1)
    for client in slow:
        client.close()


def test_a_client_that_does_not_read_is_given_up(server, monkeypatch):
    monkeypatch.setattr(exporter, "TIMEOUT_S", 0.2)
    snapshot = Snapshot(server.folder, "rank-0", run="r" * 10_000, rank="0")
    for layer in range(1000):
        snapshot.set("layer_chi", 1.0, layer=str(layer))
    snapshot.write()
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(place_of(server))
        client.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert len(get(server)) > 10_000_000, "another is served meanwhile"
        watch = select.poll()
        watch.register(client, 0)  # only for the connection's end
        assert watch.poll(10_000), "the server waits on"


def test_a_file_that_is_no_snapshot_is_left_out_and_named_once(server, caplog):
    Snapshot(server.folder, "rank-0", run="r", rank="0").write()
    good = Snapshot(server.folder, "rank-1", run="r", rank="1")
    good.set("data_queue_depth", 2)
    good.write()
    bad = {
        "cut": '{"train_loss": [["r", 1',
        "list": "[1]",
        "rows": '{"train_loss": {"r": 1}}',
        "labels": '{"data_queue_depth": [["r", 1.0]]}',
        "text": '{"train_loss": [["r", "high"]]}',
        "bytes": "\udcff",
    }
    for name, text in bad.items():
        (server.folder / f"{name}.json").write_text(text, errors="surrogateescape")
    (server.folder / "other-version.json").write_text('{"a_metric_of_tomorrow": 3}')
    (server.folder / "folder.json").mkdir()
    for _ in range(2):
        assert series(server) == {("snn_data_queue_depth", "1", "r"): 2}
        good.write()
    for name in (*bad, "folder"):
        assert caplog.text.count(f"{name}.json is not a snapshot") == 1
    assert "other-version" not in caplog.text


def test_a_folder_that_cannot_be_written_is_named_once_and_ends_nothing(tmp_path, caplog):
    snapshot = Snapshot(tmp_path / "gone", "rank-0", run="r", rank="0")
    snapshot.set("train_loss", 1)
    snapshot.write()
    snapshot.write()
    assert caplog.text.count(os.strerror(errno.ENOENT)) == 1
    (tmp_path / "gone").mkdir()
    snapshot.write()
    assert (tmp_path / "gone/rank-0.json").exists()


def test_a_folder_that_goes_with_whoever_served_it_is_not_complained_of(tmp_path, caplog):
    snapshot = Snapshot(tmp_path / "served", "rank-1", run="r", rank="1")
    (tmp_path / "served").mkdir()
    snapshot.write()
    shutil.rmtree(tmp_path / "served")
    snapshot.write()
    assert caplog.text == ""


def test_a_full_disk_keeps_the_snapshot_before(tmp_path, caplog):
    """Every write to /dev/full ends with ENOSPC."""
    snapshot = Snapshot(tmp_path, "rank-0", run="r", rank="0")
    snapshot.set("train_loss", 1)
    snapshot.write()
    before = (tmp_path / "rank-0.json").read_text()
    (tmp_path / ".rank-0.json.tmp").symlink_to("/dev/full")
    snapshot.set("train_loss", 2)
    snapshot.write()
    assert os.strerror(errno.ENOSPC) in caplog.text
    assert (tmp_path / "rank-0.json").read_text() == before


def get_from(server: NodeServer, client: str) -> None:
    """A scrape from an address of this machine."""
    connection = HTTPConnection(*place_of(server), timeout=10, source_address=(client, 0))
    connection.request("GET", "/metrics")
    assert connection.getresponse().read() is not None
    connection.close()


def test_every_prometheus_that_comes_regularly_is_waited_for_and_nobody_else(server, monkeypatch):
    monkeypatch.setattr(scrapers, "GRACE_S", 1000.0)
    server.linger()
    get_from(server, "127.0.0.1")
    server.linger()  # a single scrape is not regular
    for client in ("127.0.0.1", "127.0.0.2", "127.0.0.2", "127.0.0.3"):
        get_from(server, client)
    waiting = threading.Thread(target=server.linger, daemon=True)
    waiting.start()
    for client in ("127.0.0.2", "127.0.0.2", "127.0.0.3"):
        waiting.join(0.05)
        assert waiting.is_alive()
        get_from(server, client)
    waiting.join(0.05)
    assert waiting.is_alive()  # the other of two replicas
    get_from(server, "127.0.0.1")
    waiting.join(60)
    assert not waiting.is_alive()


def test_a_stop_waits_for_a_scrape_only_for_a_while_and_until_it_is_asked_again(server, monkeypatch):
    monkeypatch.setattr(scrapers, "GRACE_S", 1000.0)
    for _ in range(2):
        get_from(server, "127.0.0.1")
    asked_again = threading.Event()
    stopping = {"stopped": True, "urgent": asked_again.is_set}
    waiting = threading.Thread(target=server.linger, kwargs=stopping, daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    asked_again.set()
    waiting.join(60)
    assert not waiting.is_alive()
    monkeypatch.setattr(exporter, "STOPPED_S", 0.0)
    server.linger(stopped=True)  # which nobody scrapes


@pytest.mark.parametrize(
    ("times", "now", "interval"),
    [
        ([0, 15, 30], 44, 15),
        ([0, 15, 40, 50], 64, 25),  # one came late
        ([0, 60.4], 120, 60.4),  # a minute, with jitter
        ([0, 60, 121], 240, 61),  # the last is about to come
        ([0, 15, 30], 66, None),  # has stayed away
        ([0, 300], 310, None),
        ([0], 1, None),
    ],
)
def test_what_is_a_regular_scrape(times, now, interval):
    clients = scrapers.Scrapers()
    for at in times:
        clients.came("a", at)
    assert clients.intervals(now) == ({} if interval is None else {"a": interval})
    for number in range(scrapers.MAX_CLIENTS):
        clients.came(f"flood-{number}", now)
    assert clients.intervals(now) == {}


def test_a_port_that_is_taken_is_named(server, tmp_path):
    _, port = place_of(server)
    with pytest.raises(ConfigError, match=rf"metrics.port={port} on 127.0.0.1 cannot be opened \(Address already in"):
        NodeServer(tmp_path, host="127.0.0.1", port=port)
    with pytest.raises(ConfigError, match=r"metrics.port=0 on 192.0.2.1 cannot be opened"):
        NodeServer(tmp_path, host="192.0.2.1", port=0)


def test_ipv6_is_served(tmp_path):
    if not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists():
        pytest.skip("this machine has no IPv6")
    server = NodeServer(tmp_path, host="::1", port=0)
    assert server.address.startswith("http://[::1]:")
    assert get(server, "/healthz") == "ok\n"
    server.close()
