"""The way of an alert: a run's metrics, a real Prometheus, a real Alertmanager, a webhook.

Rules and configurations are those of k8s/monitoring. To be quick, every duration in the rules and in Alertmanager's
configuration is divided by `FASTER`; that the rules hold with their own durations is the matter of rules_test.yml.
"""

import contextlib
import json
import queue
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import yaml

from tests.conftest import free_port, kill
from tests.deploy.packages import need, tool
from tests.support.namespaces import Job
from tests.support.prometheus import MONITORING, Prometheus
from tests.support.supervised import supervise
from tests.support.training_runs import arguments

pytestmark = pytest.mark.deploy
FASTER = 20
_UNITS_MS = {"s": 1000, "m": 60_000, "h": 3_600_000}
DOWN, STALLED = "SnnTargetDown", "SnnTrainingStalled"
WHOSE = {"namespace": "lab", "job": "chispike", "run": "watched"}
NOTICED_S = 200
"""Longer than an alert takes on a machine that does much else."""


def faster(text: str) -> str:
    """Rules or a configuration with durations such as 5m, and seconds compared as plain numbers, divided by FASTER."""
    text = re.sub(r"\b(\d+)([smh])\b", lambda it: f"{int(it[1]) * _UNITS_MS[it[2]] // FASTER}ms", text)
    return re.sub(r"(?<=[<>-] )\d{2,}\b(?!\.)", lambda it: f"{int(it[0]) / FASTER:g}", text)


class Webhook:
    """A server that Alertmanager posts to."""

    def __init__(self) -> None:
        posted: queue.Queue[dict] = queue.Queue()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                posted.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """pytest shows what failed."""

        self._posted, self._told = posted, {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"

    def told(self, status: str, wait_s: float = 0) -> dict[str, dict]:
        """The alerts about the run that were told with this status so far, by name; up to `wait_s` for the next."""
        with contextlib.suppress(queue.Empty):
            while message := self._posted.get(timeout=wait_s) if wait_s else self._posted.get_nowait():
                for alert in message["alerts"]:
                    if WHOSE.items() <= alert["labels"].items():
                        assert message["groupLabels"] == WHOSE
                        self._told[alert["labels"]["alertname"], alert["status"]] = alert
                wait_s = 0
        return {name: alert for (name, as_), alert in self._told.items() if as_ == status}

    def until(self, status: str, *names: str) -> dict[str, dict]:
        """Returns when each of these alerts was told with this status."""
        end = time.monotonic() + NOTICED_S
        while not set(names) <= (told := self.told(status, wait_s=1)).keys():
            assert time.monotonic() < end, f"{names} not all {status} within {NOTICED_S} s, but {sorted(self._told)}"
        return told

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class Alertmanager:
    """Started in an empty folder with the configuration of k8s/monitoring, and our webhook in it."""

    def __init__(self, folder: Path, webhook: str) -> None:
        config = yaml.safe_load(faster((MONITORING / "alertmanager.yml").read_text()))
        config["receivers"][0]["webhook_configs"][0]["url"] = webhook
        (folder / "alertmanager.yml").write_text(yaml.safe_dump(config))
        self.address = f"127.0.0.1:{free_port()}"
        words = ["--config.file=alertmanager.yml", "--storage.path=data", f"--web.listen-address={self.address}"]
        command = [tool("prometheus-alertmanager") or "", *words, "--cluster.listen-address="]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, stderr=log, start_new_session=True)


class Node:
    """A node's supervisor, whose metrics are where the scrape configuration looks for them, and its ranks."""

    def __init__(self, digits: Path, folder: Path) -> None:
        self.port, self._jobs = free_port(), []
        train = [*arguments(digits, folder / WHOSE["run"]), "--train.epochs", "2000", "--train.checkpoint_every", "20"]
        self._words = ["--metrics-port", str(self.port), "--slots", "2", "--", *train]

    def start(self) -> Job:
        self._jobs.append(Job(supervise(*self._words)))
        return self._jobs[-1]

    def power_off(self) -> None:
        """SIGKILL to the supervisor, its launcher and its ranks."""
        for job in self._jobs:
            with contextlib.suppress(psutil.NoSuchProcess):
                first = psutil.Process(job.process.pid)
                for process in (first, *first.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
            job.process.wait(timeout=30)


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    made = Webhook()
    yield made
    made.close()


@pytest.fixture
def node(digits, tmp_path) -> Iterator[Node]:
    made = Node(digits, tmp_path)
    yield made
    made.power_off()


@pytest.fixture
def prometheus(node, webhook, tmp_path) -> Iterator[Prometheus]:
    need("prometheus", "prometheus-alertmanager", root=False)
    for name in ("alertmanager", "prometheus"):
        (tmp_path / name).mkdir()
    alertmanager = Alertmanager(tmp_path / "alertmanager", webhook.url)
    labels, rules = {"namespace": WHOSE["namespace"]}, faster((MONITORING / "rules.yml").read_text())
    target = f"127.0.0.1:{node.port}"
    made = Prometheus(tmp_path / "prometheus", target, labels, rules, alertmanager.address)
    yield made
    for one in (made, alertmanager):
        kill(one.process)


def test_a_node_that_is_gone_reaches_a_webhook_and_is_resolved_when_the_run_goes_on(prometheus, webhook, node):
    job = node.start()
    job.until(r"^step +20/")
    for known in ("run:snn_train_last_step_timestamp_seconds:max24h", "instance_run:snn_train_seen:timestamp_seconds"):
        assert [one["metric"]["run"] for one in prometheus.wait_for(known)] == [WHOSE["run"]]
    job.until(r"^step +40/")  # the checkpoint after step 20 is there
    assert not {DOWN, STALLED} & webhook.told("firing").keys()
    node.power_off()
    alerts = webhook.until("firing", DOWN, STALLED)
    for name in (DOWN, STALLED):
        assert {**WHOSE, "severity": "critical"}.items() <= alerts[name]["labels"].items()
        assert alerts[name]["annotations"]["summary"].startswith("watched: ")
    assert alerts[DOWN]["labels"]["instance"] == f"127.0.0.1:{node.port}"
    job = node.start()
    job.until(r"resumed from the checkpoint after step \d+")
    assert STALLED not in webhook.told("resolved")  # the node answers again, but it has logged no step
    job.until(r"^step ")
    webhook.until("resolved", DOWN, STALLED)
