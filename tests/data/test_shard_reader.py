"""Opening a shard set's files: damaged records, untrusted manifests, and the limit on open files."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.manifest import MANIFEST_NAME, Manifest, read_samples
from pipeline.data.shard_reader import Shards
from pipeline.errors import DataError
from tests.support.data_servers import serve
from tests.support.data_sets import ROOT, drawn_jpeg, write_set

CUT_WHILE_IN_USE = """
import os, sys
from pipeline.data.manifest import Manifest, read_samples
samples = read_samples(sys.argv[1], Manifest.load(sys.argv[1]).shards[0])
os.truncate(sys.argv[1] + "/train-000000.npy", 0)
print(int(samples["label"].sum()))
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    write_set(tmp_path / "train", [drawn_jpeg(n) for n in range(8)], per_shard=4)
    return tmp_path / "train"


def test_records_that_are_cut_while_in_use_do_not_end_the_process(folder):
    done = subprocess.run(
        [sys.executable, "-c", CUT_WHILE_IN_USE, str(folder)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda content: b"", "cannot be read"),
        (lambda content: content[:40], "cannot be read"),
        (lambda content: content[:-1], r"holds 95 bytes of records, its header says 96"),
        (lambda content: content + b"more", r"holds 100 bytes of records, its header says 96"),
        (lambda content: content.replace(b"(4,)", b"(5,)"), r"holds \(5,\) of .* the manifest says 4 samples"),
        (lambda content: content.replace(b"(4,), }     ", b"(4000000000,)}"), "cannot be read|holds"),
        (lambda content: content.replace(b"<u8", b"|O8"), "cannot be read|holds"),
    ],
)
def test_damaged_records_are_refused_with_their_file(folder, damage, cause):
    path = folder / "train-000001.npy"
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert path.read_bytes() != content
    with pytest.raises(
        DataError, match=rf"train-000001\.npy .*({cause}).*; check the set with python -m data_prep verify"
    ):
        read_samples(folder, Manifest.load(folder).shards[1])


def change_shard(folder: Path, **fields: object) -> None:
    document = json.loads((folder / MANIFEST_NAME).read_text())
    document["shards"][1].update(fields)
    (folder / MANIFEST_NAME).write_text(json.dumps(document))


@pytest.mark.parametrize(
    "name", ["../outside", "a/b", "/etc/passwd", "..", ".hidden", "", "nul\0", "two\nlines", "back\\slash", None, 7]
)
def test_a_remote_manifest_cannot_lead_out_of_the_cache(folder, name):
    change_shard(folder, name=name)
    with serve(folder.parent) as server, pytest.raises(DataError) as caught:
        Shards(f"{server.url}/train", cache_dir=str(folder.parent / "cache"), cache_bytes=10**9)
    assert f"/train/manifest.json names a shard {name!r}; allowed are" in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "train-000000"}, "names the shard 'train-000000' 2 times"),
        ({"sha256": "../../up"}, "gives sha256='../../up' for train-000001, which is not 64 lower-case hex digits"),
        ({"samples_sha256": "A" * 64}, "gives samples_sha256='AAA"),
        ({"num_samples": -1}, "gives num_samples=-1 for train-000001, not a count"),
        ({"num_bytes": "12"}, "gives num_bytes='12' for train-000001, not a count"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(folder, fields, message):
    change_shard(folder, **fields)
    with pytest.raises(DataError) as caught:
        Manifest.load(folder)
    assert message in str(caught.value)
    assert str(caught.value).endswith("make the shards again")


def test_names_in_other_alphabets_are_allowed(folder):
    change_shard(folder, name="blüten_2024-07+a.b=1")
    assert Manifest.load(folder).shards[1].tar == "blüten_2024-07+a.b=1.tar"


def test_what_classes_are_called_changes_no_identity(folder):
    text = (folder / MANIFEST_NAME).read_text()
    plain = Manifest.load(folder)
    assert plain.shown == plain.classes
    assert plain.identity == hashlib.sha256(text.encode()).hexdigest(), "also for a manifest without this field"
    named = replace(plain, display_names=("ant", "bee", "cat", "dog"))
    read = Manifest.from_json(named.to_json(), "here")
    assert (read, read.shown, read.identity) == (named, named.display_names, plain.identity)
    for names in (["ant"], ["ant", "bee", "cat", 4]):
        document = json.dumps(json.loads(text) | {"display_names": names})
        with pytest.raises(DataError, match=f"here has {len(names)} display_names for 4 classes, or not all are text"):
            Manifest.from_json(document, "here")


@pytest.fixture
def file_limit():
    """Sets this process's limit on open files, and restores it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("limit", "stay_open"), [(1024, 300), (320, 64), (200, 8)])
def test_shards_stay_open_as_far_as_the_process_may_open_files(tmp_path, file_limit, limit, stay_open):
    write_set(tmp_path / "train", [drawn_jpeg(0, 8, 8)] * 300, per_shard=1)
    file_limit(limit)
    shards, before = Shards(str(tmp_path / "train")), len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        _, records = shards.locate(np.arange(300))
        assert records["label"].tolist() == [n % 4 for n in range(300)]
        assert len(os.listdir("/proc/self/fd")) - before == stay_open
    shards.expect([3, 4])
    shards.locate(np.array([3]))
    assert len(os.listdir("/proc/self/fd")) - before <= 2  # shards that are no longer expected are closed
    shards.close()
