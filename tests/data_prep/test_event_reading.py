"""Of event recordings: what their files do not say, and what is told by their names."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.images import RefusedError
from data_prep.sources.event_formats import convert
from data_prep.sources.event_raw import Settings
from data_prep.sources.events import Recordings
from pipeline.data.decode.events import decode
from pipeline.data.manifest import Manifest, Sensor
from pipeline.errors import ConfigError
from tests.support.event_files import recording, structured, write_aedat2, write_classes, write_npz
from tests.support.prep_runs import prepare


def test_other_readings_of_a_finished_set_are_refused_and_leave_it_as_it_is(tmp_path):
    write_classes(tmp_path / "in", "npz")
    out = tmp_path / "out"
    assert prepare("events", tmp_path / "in", out, "--sensor", "34x34").returncode == 0
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for other, said in (
        (("--sensor", "40x40"), "--sensor 40x40, --time-unit us"),
        (("--sensor", "34x34", "--time-unit", "ms"), "--sensor 34x34, --time-unit ms"),
    ):
        again = prepare("events", tmp_path / "in", out, *other)
        assert again.returncode == 64
        assert f"{out} was made with --sensor 34x34, --time-unit us, and not with {said}; give another" in again.stderr
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert "nothing to do" in prepare("events", tmp_path / "in", out, "--sensor", "34x34").stdout
    state = json.loads((out / "prep.json").read_text())
    del state["reading"]  # as of before it was noted
    (out / "prep.json").write_text(json.dumps(state))
    again = prepare("events", tmp_path / "in", out, "--sensor", "34x34", "--seed", 1)
    assert again.returncode == 64
    assert "was begun with other options" in again.stderr


@pytest.mark.parametrize("refused", ["all", "some"])
def test_a_run_that_asked_for_the_sensor_goes_on_with_it(tmp_path, refused):
    write_classes(tmp_path / "in", "npz", 40)
    if refused == "some":
        write_classes(tmp_path / "in", "bin", 20)
    out = tmp_path / "out"
    first = prepare("events", tmp_path / "in", out, "--shard-bytes", "100Ki")
    assert first.returncode == 65
    told = [line for line in first.stderr.splitlines() if line.startswith("refused")]
    assert len(told) == 1, "one cause, one line"
    assert "npz and " in told[0]
    assert "others: the file does not say the size of its sensor; give it, such as --sensor 128x128" in told[0]
    again = prepare("events", tmp_path / "in", out, "--shard-bytes", "100Ki", "--sensor", "34x34")
    assert again.returncode == 0, again.stderr
    assert "the recordings are read with --sensor 34x34, --time-unit us from now on" in again.stdout
    manifest = Manifest.load(out / "train")
    assert manifest.num_samples == (40 if refused == "all" else 60)
    assert {path.name for path in (out / "train").glob("*.tar")} == {shard.tar for shard in manifest.shards}
    assert prepare("verify", out).returncode == 0


def test_aedat2_is_upright_and_that_of_cifar10_dvs_turned():
    events, _ = recording(3)
    for name, data, format in (
        ("walk/one.aedat", write_aedat2(events), "AEDAT 2.0"),
        ("cifar10_dog/one.aedat", write_aedat2(events), "AEDAT 2.0"),
        ("dog/cifar10_dog_12.aedat", write_aedat2(events, is_turned=True), "AEDAT 2.0 of CIFAR10-DVS"),
    ):
        found = convert(name, memoryview(data), Settings())
        assert found.kinds == (format,)
        assert found.converted is not None
        read = decode(memoryview(found.converted))
        assert np.array_equal(read.x, events.x)
        assert np.array_equal(read.y, events.y)


@pytest.mark.parametrize(
    ("name", "handed"),
    [("user01_fluorescent_0.npz", True), ("user29_fluorescent_led_11.npz", True), ("user01_run_0.npz", False)],
)
def test_dvs_gesture_as_spikingjelly_cuts_it_is_known_by_its_names(tmp_path, name, handed):
    for split in ("train", "test"):
        for label in range(2):
            folder = tmp_path / "events_np" / split / str(label)
            folder.mkdir(parents=True)
            (folder / name).write_bytes(write_npz(recording(label)[0]))
    done = prepare("events", tmp_path / "events_np", tmp_path / "out", "--sensor", "128x128")
    assert done.returncode == 0, done.stderr
    manifests = [Manifest.load(tmp_path / "out" / split) for split in ("train", "val")]
    assert [one.handed for one in manifests] == [handed] * 2
    assert manifests[0].sensor == Sensor(height=128, width=128)
    assert ("train with --data.flip false" in done.stdout) == handed


def npz(**arrays: np.ndarray) -> memoryview:
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=True, **arrays)
    return memoryview(stream.getvalue())


def test_an_npz_may_hold_more_than_its_events():
    events, _ = recording(3)
    objects, labels = np.array([{"a": 1}], dtype=object), np.arange(3)
    columns = {"t": events.t, "x": events.x, "y": events.y, "p": events.p}
    for arrays in ({"events": structured(events), "labels": labels, "meta": objects}, {**columns, "meta": objects}):
        found = convert("one.npz", npz(**arrays), Settings(sensor=(34, 34)))
        assert found.converted is not None
        assert np.array_equal(decode(memoryview(found.converted)).t, events.t - events.t[0])
    for arrays in ({"a": objects}, {**columns, "t": objects}):
        with pytest.raises(RefusedError, match="holds Python objects"):
            convert("one.npz", npz(**arrays), Settings(sensor=(34, 34)))
    with pytest.raises(RefusedError, match="0 arrays are called t"):
        convert("one.npz", npz(a=structured(events), b=structured(events)), Settings(sensor=(34, 34)))


@pytest.mark.parametrize("name", ["one.raw", "one.H5", "one.npz"])
def test_a_recording_alone_is_no_source(tmp_path: Path, name):
    (tmp_path / name).write_bytes(write_npz(recording(0)[0]))
    with pytest.raises(ConfigError, match="is one recording; give the folder of the class folders"):
        Recordings([str(tmp_path / name)], Settings(), 0.0, 0)
