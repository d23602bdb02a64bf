"""The metrics that a rank still shows when it ends."""

import os
import subprocess
import sys
import urllib.error
import urllib.request
from contextlib import suppress

from pipeline.metrics import exporter
from tests.conftest import ROOT

FAILING = """
import sys
import torch
from launch.options import parse
from pipeline.metrics.rank_metrics import RankMetrics

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
config = parse(["--recipe", "digits", "--metrics.port", "0"])
about = {"layers": ["stem"], "num_steps": 5, "identity": "0"}
metrics = RankMetrics(config, rank=0, local_rank=0, world_size=1, **about)
print(metrics.said.split()[-1], flush=True)
sys.stdin.readline()
metrics.count(train_nonfinite_steps=1)
metrics.fail()
metrics.close()
print("error: step 7", flush=True)
"""


def test_what_ended_a_run_is_said_at_once_and_can_be_scraped_before_the_rank_is_gone(tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != exporter.FOLDER_VARIABLE}
    process = subprocess.Popen(
        [sys.executable, "-c", FAILING, str(tmp_path / "meeting")],
        cwd=ROOT,
        env={**environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    counter, seen = 'snn_train_nonfinite_steps_total{run="digits"}', ""
    with process:
        assert process.stdin
        assert process.stdout
        address = process.stdout.readline().strip()
        for _ in range(2):
            seen = urllib.request.urlopen(address).read().decode()
        assert f"{counter} 0.0" in seen
        print(file=process.stdin, flush=True)
        assert process.stdout.readline() == "error: step 7\n"
        while process.poll() is None:  # it waits for one more scrape
            with suppress(OSError):
                seen = urllib.request.urlopen(address).read().decode()
    assert f"{counter} 1.0" in seen
    assert process.returncode == 0
