"""The loader in real processes: every rank's share of one stream, and how bad data end a job."""

import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from pipeline.config import DataConfig
from pipeline.data.loader import Loader
from pipeline.data.order import Order
from tests.conftest import launch
from tests.support.data_sets import ROOT, drawn_jpeg, write_set


def test_both_ranks_stop_at_the_step_that_passes_the_limit_with_65_and_the_list(tmp_path):
    """The last bad sample is in the last micro-batch of step 2, on rank 1; nothing else makes the host wait."""
    _, at = Order([32] * 8, seed=0, window_shards=16).samples(0, 256)
    label, cut, wrong, last = (int(at[position]) for position in (0, 20, 40, 127))
    images = [drawn_jpeg(n, 16, 16) for n in range(256)]
    images[cut], images[last] = images[cut][:-9], images[last][:-9]
    images[wrong] = b"\xff\xd8" + bytes(200) + b"\xff\xd9"
    write_set(tmp_path / "data/train", images, per_shard=32, labels={label: -1})
    write_set(tmp_path / "data/val", [drawn_jpeg(n, 16, 16) for n in range(16)], per_shard=8)
    settings = {
        "--recipe": "digits",
        "--run_dir": tmp_path / "run",
        "--data.path": tmp_path / "data",
        "--data.global_batch": 64,
        "--data.max_bad_ratio": 0.012,  # three bad ones in an epoch of 256 are allowed, four are not
        "--train.epochs": 3,
        "--train.log_every": 50,
        "--train.eval_every_epochs": 0,
        "--metrics.port": 0,
    }
    done = launch("launch/train.py", *(str(word) for pair in settings.items() for word in pair))
    assert done.returncode == 65, done.output
    refusal = next(line for line in done.output.splitlines() if "samples were bad" in line)
    assert "4 of 128 samples were bad, more than data.max_bad_ratio=0.012" in refusal  # as of step 2 of both ranks
    bad = {label: "label out of range", cut: "truncated", wrong: "undecodable", last: "truncated"}
    for number, reason in bad.items():
        name = f"train-{number // 32:06d}.tar:{number:06d}.jpg"
        assert f"{name} ({reason})" in refusal  # also those of the other rank
        assert f"bad sample {name}: {reason}; train-" in done.output
    assert "Traceback" not in done.output


def digests(path: str, rank: int, world_size: int) -> dict[str, str]:
    """A hash of the pixels of each of a rank's micro-batches of two epochs, by position."""
    data = DataConfig(path=path, image_size=24, global_batch=12, micro_batch=2, window_shards=2, threads=1)
    loader = Loader(data, seed=5, rank=rank, world_size=world_size, device=torch.device("cpu"))
    seen = {}
    for micro_batches in loader.steps(0, 5):
        for batch in micro_batches:
            seen[str(batch.position)] = hashlib.sha256(batch.images.contiguous().numpy().tobytes()).hexdigest()
    loader.close()
    return seen


RANK = """
import json, sys
from tests.data.test_loader_ranks import digests
print(json.dumps(digests(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
"""


def test_two_and_three_real_ranks_share_the_stream_of_one(tmp_path):
    write_set(tmp_path / "train", [drawn_jpeg(n, 32 + n, 80 - n) for n in range(30)], per_shard=7)
    whole = digests(str(tmp_path), 0, 1)
    for ranks in (2, 3):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, str(tmp_path), str(rank), str(ranks)],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        shares = [json.loads(process.communicate(timeout=60)[0].splitlines()[-1]) for process in processes]
        together = {position: digest for share in shares for position, digest in share.items()}
        assert sum(map(len, shares)) == len(whole)
        assert together == whole


@pytest.mark.faults
def test_a_rank_that_cannot_go_on_ends_the_job_in_seconds(tmp_path):
    write_set(tmp_path / "data/train", [drawn_jpeg(n, 16, 16) for n in range(128)], per_shard=32)
    write_set(tmp_path / "data/val", [drawn_jpeg(n, 16, 16) for n in range(16)], per_shard=8)
    tar = tmp_path / "data/train/train-000002.tar"
    tar.write_bytes(tar.read_bytes().replace(b"JFIF", b"JPEG"))
    settings = {"--recipe": "digits", "--run_dir": tmp_path / "run", "--data.path": f"file://{tmp_path}/data"}
    settings |= {"--data.cache_dir": tmp_path / "cache", "--data.retries": 0}
    settings |= {"--data.global_batch": 64, "--metrics.port": 0}
    done = launch("launch/train.py", *(str(word) for pair in settings.items() for word in pair))
    assert done.returncode == 65, done.output
    assert re.search(
        r"train-000002\.tar could not be read in 1 attempts; .* have SHA-256 .*, the manifest", done.output
    )
    assert "Traceback" not in done.output
