"""A real Prometheus with the configuration of k8s/monitoring."""

import json
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, free_port

MONITORING = ROOT / "k8s/monitoring"


class Prometheus:
    """Scrapes `target` every second, in a folder of its own.

    Args:
        folder: an empty one.
        target: host and port of a node of a run.
        labels: what the scrape configuration adds to every series, such as a namespace.
        rules: the text of the rules [k8s/monitoring/rules.yml].
        alertmanager: host and port of one that gets the alerts.
    """

    def __init__(
        self, folder: Path, target: str, labels: dict[str, str] | None = None, rules: str = "", alertmanager: str = ""
    ) -> None:
        program = shutil.which("prometheus")
        if program is None:
            pytest.skip("there is no prometheus; apt install prometheus")
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        (folder / "rules.yml").write_text(rules or (MONITORING / "rules.yml").read_text())
        (folder / "targets").mkdir()
        (folder / "targets/hosts.yml").write_text(yaml.safe_dump([{"targets": [target], "labels": labels or {}}]))
        listed = [{"targets": [alertmanager]}] if alertmanager else []
        (folder / "alertmanagers.yml").write_text(yaml.safe_dump(listed))
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        self.url = f"http://127.0.0.1:{free_port()}"
        words = ["--config.file=prometheus.yml", "--storage.tsdb.path=data", f"--web.listen-address={self.url[7:]}"]
        with (folder / "log").open("w") as log:
            self.process = subprocess.Popen([program, *words], cwd=folder, stderr=log, start_new_session=True)

    def ask(self, expression: str) -> list[dict]:
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self.url}/api/v1/query?{query}", timeout=10) as response:
            return json.load(response)["data"]["result"]

    def wait_for(self, expression: str) -> list[dict]:
        """Its series, once there are any. It polls, since Prometheus has no event to wait for."""
        end = time.monotonic() + 120
        while time.monotonic() < end:
            try:
                if found := self.ask(expression):
                    return found
            except OSError:
                assert self.process.poll() is None, "Prometheus ended"
            time.sleep(0.2)
        raise AssertionError(f"no series of {expression} came")
