"""The digits: the right samples, readable by webdataset, the same bytes in every way of making them."""

import hashlib
import io
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from data_prep.plan import shuffled
from pipeline.data.manifest import Manifest, read_samples
from tests.conftest import ROOT
from tests.support.prep_runs import contents, prepare


def test_every_digit_is_in_one_split_with_its_label_and_pixels(digits):
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    seen = []
    for split in ("train", "val"):
        manifest = Manifest.load(digits / split)
        if split == "train":
            assert abs(manifest.num_samples - 0.8 * 1797) <= 1
        assert manifest.classes == tuple("0123456789")
        for shard in manifest.shards:
            tar = (digits / split / shard.tar).read_bytes()
            assert (len(tar), hashlib.sha256(tar).hexdigest()) == (shard.num_bytes, shard.sha256)
            keys = [line.split()[-1] for line in (digits / split / shard.index).read_text().splitlines()[1:]]
            for key, record in zip(keys, read_samples(digits / split, shard), strict=True):
                number = int(key.removesuffix(".png").rsplit("_", 1)[-1])
                data = tar[int(record["offset"]) : int(record["offset"]) + int(record["length"])]
                pixels = np.asarray(Image.open(io.BytesIO(data)))
                np.testing.assert_array_equal(np.rint(pixels * (16 / 255)), values[number].reshape(8, 8))
                assert record["label"] == labels[number]
                assert (record["height"], record["width"]) == (8, 8)
                seen.append(number)
    assert sorted(seen) == list(range(1797))


def test_webdataset_reads_the_shards_to_the_same_samples(digits):
    from webdataset.compat import WebDataset

    for split in ("train", "val"):
        manifest = Manifest.load(digits / split)
        urls = [str(digits / split / shard.tar) for shard in manifest.shards]
        labels = [int(s["cls"]) for s in WebDataset(urls, shardshuffle=False, empty_check=False)]
        records = np.concatenate([read_samples(digits / split, shard)["label"] for shard in manifest.shards])
        assert labels == records.tolist()


def test_bytes_do_not_depend_on_the_number_of_workers_and_a_second_run_rewrites_nothing(digits, tmp_path):
    assert prepare("digits", tmp_path / "one", "--workers", 1).returncode == 0
    assert contents(tmp_path / "one") == contents(digits)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")}
    again = prepare("digits", tmp_path / "one", "--workers", 3)
    assert again.returncode == 0
    assert "complete already" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "one").rglob("*")} == before


@pytest.mark.faults
@pytest.mark.parametrize("finished", [0, 1, 4, 7])
def test_killed_and_run_again_it_ends_with_the_same_bytes(digits, tmp_path, finished):
    folder = tmp_path / "set"
    command = [sys.executable, "-m", "data_prep", "digits", str(folder), "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 30
    while process.poll() is None and len(list(folder.glob("*/*.tar"))) < finished and time.monotonic() < deadline:
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert prepare("digits", folder).returncode == 0
    assert contents(folder) == contents(digits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits"], "the following arguments are required: DIR"),
        (["digts", "x"], "invalid choice: 'digts'"),
        (["digits", "x", "--workers", "0"], "'0' is not allowed; use an integer from 1"),
        (["digits", "x", "--seed", "-1"], "'-1' is not allowed; use an integer from 0"),
    ],
)
def test_wrong_usage_is_one_line_and_64(arguments, message):
    run = prepare(*arguments)
    assert run.returncode == 64
    assert message in run.stderr
    assert run.stderr.count("\n") == 1


def test_a_folder_with_something_else_is_refused_and_left_alone(digits, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train/thesis.txt").write_text("years of work")
    run = prepare("digits", tmp_path)
    assert (run.returncode, run.stderr.count("\n")) == (64, 1)
    assert "holds other files (train)" in run.stderr
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["thesis.txt"]
    other = prepare("digits", digits, "--seed", 3)
    assert (other.returncode, other.stderr.count("\n")) == (64, 1)
    assert str(digits) in other.stderr


def test_the_shuffle_is_the_same_in_every_version():
    """Of another one, a set that was begun would be refused, and its bytes would be others."""
    assert shuffled(8, 0).tolist() == [1, 4, 5, 7, 6, 0, 3, 2]
    assert shuffled(8, 7).tolist() == [7, 1, 2, 3, 5, 4, 0, 6]
    assert shuffled(5, 2**63 - 1).tolist() == [2, 4, 0, 1, 3]
    assert shuffled(0, 0).tolist() == []
