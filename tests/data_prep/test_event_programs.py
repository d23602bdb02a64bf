"""Recordings that other programs wrote: expelliarmus, faery and DV."""

import gc
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from data_prep.sources.event_raw import UNTIMED, Settings
from pipeline.data.decode.events import Events
from tests.support.event_files import WRITERS, recording, write_npz
from tests.support.event_reading import read, refusal
from tests.support.prep_runs import prepare, samples_of


@pytest.fixture(scope="module")
def events() -> Events:
    return recording(3)[0]


def same(one: Events, other: Events, start: int = 0) -> bool:
    """Whether the events are the same, but for the first `start` of the other."""
    t = other.t[start:] - other.t[start]
    return all(np.array_equal(a, b) for a, b in zip(one[:4], (t, *(c[start:] for c in other[1:4])), strict=True))


def by_faery(path: Path, events: Events, version: str | None = None) -> bytes:
    faery = pytest.importorskip("faery")
    array = np.zeros(len(events.t), dtype=faery.events_stream.EVENTS_DTYPE)
    for name, column in (("t", events.t + 70_000), ("x", events.x), ("y", events.y), ("on", events.p)):
        array[name] = column
    faery.events_stream_from_array(array, dimensions=(events.width, events.height)).to_file(path, version=version)
    return path.read_bytes()


def test_readers_agree_with_expelliarmus_on_its_files(tmp_path, events):
    """Not of EVT 3.0: its writer gives the high bits of the time once only, and its reader counts them twice."""
    expelliarmus = pytest.importorskip("expelliarmus")
    array = np.zeros(len(events.t), dtype=[("t", "<i8"), ("x", "<i2"), ("y", "<i2"), ("p", "u1")])
    for name, column in (("t", events.t + 70_000), ("x", events.x), ("y", events.y), ("p", events.p)):
        array[name] = column
    for encoding, extension in (("dat", "dat"), ("evt2", "raw")):
        path = tmp_path / f"theirs_{encoding}.{extension}"
        expelliarmus.Wizard(encoding=encoding).save(path, array)
        assert same(read(path.name, path.read_bytes())[0], events), encoding
        ours = tmp_path / f"ours_{encoding}.{extension}"
        ours.write_bytes(WRITERS[encoding](events, start=70_000))
        theirs = expelliarmus.Wizard(encoding=encoding).read(ours)
        assert [theirs[name].tolist() for name in "txyp"] == [array[name].tolist() for name in "txyp"], encoding


@pytest.mark.parametrize(
    ("version", "name", "lost"),
    [("dat1", "a.dat", 0), ("dat2", "a.dat", 0), ("evt2", "a.raw", 0), ("evt3", "a.raw", 1)],
)
def test_readers_agree_with_faery_on_its_files(tmp_path, events, version, name, lost):
    """Its writer of EVT 3.0 begins at the time 0 of the recording without a word of time."""
    back, warnings = read(name, by_faery(tmp_path / name, events, version))
    assert same(back, events, lost)
    assert warnings == ((UNTIMED,) if lost else ())


def test_aedat4_is_read_whole_by_any_of_its_names(tmp_path, events):
    pytest.importorskip("aedat")
    data = by_faery(tmp_path / "a.aedat4", events)
    for name in ("a.aedat4", "a.aedat", "A.AEDAT4"):
        back, warnings = read(name, data, Settings())
        assert same(back, events)
        assert (back.width, back.height, warnings) == (events.width, events.height, ())
    assert same(read("a.aedat4", data[:-1])[0], events), "a table of the packets ends the file; all are there"
    before = len(os.listdir("/proc/self/fd"))
    for length in (14, 40, len(data) // 2):
        assert refusal("a.aedat4", data[:length]).startswith("damaged or cut: ")
    assert refusal("a.aedat4", data[:14] + bytes(100)).startswith("damaged or cut: ")
    garbled = data[: len(data) // 2] + bytes(100) + data[len(data) // 2 + 100 :]
    assert refusal("a.aedat4", garbled).startswith("damaged or cut: ")
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_aedat4_without_its_package_is_refused_with_the_cure(tmp_path, events, monkeypatch):
    data = by_faery(tmp_path / "a.aedat4", events)
    monkeypatch.setitem(sys.modules, "aedat", None)
    assert refusal("a.aedat4", data).endswith("run: python -m pip install 'chispike[events]'")


def test_recordings_of_formats_that_are_not_read_are_refused_by_name(tmp_path, events):
    for name, data in (("a/1.npz", write_npz(events)), ("b/1.es", b"Event Stream"), ("b/note.txt", b"hello")):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(data)
    done = prepare("events", tmp_path / "in", tmp_path / "out", "--sensor", "34x34")
    assert done.returncode != 0
    assert ".es is not read; convert it, for instance to .npz with arrays x, y, t and p" in done.stderr
    (tmp_path / "in/b/2.npz").write_bytes(write_npz(events))
    done = prepare("events", tmp_path / "in", tmp_path / "out2", "--sensor", "34x34", "--allow-bad", 1)
    assert done.returncode == 0, done.stderr
    assert len(list(samples_of(tmp_path / "out2/train"))) == 2
