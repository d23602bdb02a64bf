"""Recordings of every format come out as they went in, or are refused by name with the reason."""

import contextlib
import io
import json
import struct
import zipfile

import numpy as np
import pytest

from data_prep.images import RefusedError
from data_prep.sources.event_raw import INVALID, SORTED, UNTIMED, Settings
from data_prep.sources.events import Recordings
from pipeline.data.decode.events import Events
from pipeline.data.manifest import EVENTS, Manifest, Sensor
from tests.support.event_files import (
    AEDAT3_HEAD,
    FORMATS,
    OTHER_PACKET,
    WRITERS,
    npy,
    packet,
    recording,
    rows,
    same,
    structured,
    write_aedat2,
    write_aedat3,
    write_bin,
    write_classes,
    write_evt2,
    write_evt3,
    write_npz,
)
from tests.support.event_reading import name_of, read, refusal
from tests.support.prep_runs import indexed, packed, prepare, samples_of, write_tar, write_zip


@pytest.fixture(scope="module")
def events() -> Events:
    return recording(3)[0]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_whole_file_gives_its_events(format, number):
    events, _ = recording(number)
    back, warnings = read(name_of(format), WRITERS[format](events, start=123_456))
    assert same(back, events)
    assert (back.width, back.height, warnings) == (34, 34, ())


@pytest.mark.parametrize(
    ("format", "wraps_at"),
    [
        ("bin", 1 << 23),
        ("aedat2", 1 << 32),
        ("aedat3", 1 << 31),
        ("dat", 1 << 32),
        ("evt2", 1 << 34),
        ("evt3", 1 << 24),
    ],
)
def test_a_clock_that_wraps_goes_on(events, format, wraps_at):
    data = WRITERS[format](events, start=wraps_at - 100_000)
    back, warnings = read(name_of(format), data)
    assert same(back, events)
    assert not warnings


@pytest.mark.parametrize("format", FORMATS)
def test_events_out_of_order_are_sorted_and_told(events, format):
    if format == "evt3":
        pytest.skip("its times are words of their own, so that swapping rows is no longer the same file format test")
    order = np.arange(len(events.t))
    order[[10, 500]] = order[[500, 10]]
    mixed = Events(*(column[order] for column in events[:4]), *events[4:])
    back, warnings = read(name_of(format), WRITERS[format](mixed, start=50_000))
    # Of events at one time the order is that of the file: the two that moved may have changed places with those.
    assert np.array_equal(back.t, events.t)
    assert sorted(rows(back, 0)) == sorted(rows(events, 0))
    assert warnings == (SORTED,)


@pytest.mark.parametrize("format", FORMATS)
def test_coordinates_outside_of_the_sensor_are_refused(events, format):
    data = WRITERS[format](events)
    small = Settings(sensor=(24, int(events.y.max())))
    assert refusal(name_of(format), data, small).startswith(f"y={events.y.max()} in event ")
    assert refusal(name_of(format), data, small).endswith(f"(24x{events.y.max()} pixels)")


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_that_was_cut_is_refused(events, format):
    """Of formats without a length or an end, what is cut between two records is a shorter file and cannot be known."""
    data = WRITERS[format](events)
    record = {"bin": 5, "aedat2": 8, "dat": 8, "evt2": 4, "evt3": 2}.get(format, 1 << 30)
    for length in (1, 40, len(data) // 2, len(data) - 1):
        length -= (len(data) - length) % record == 0
        assert refusal(name_of(format), data[:length]), length
    assert refusal(name_of(format), b"") == "empty file"


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_without_an_event_is_refused(events, format):
    none = events._replace(t=events.t[:0], x=events.x[:0], y=events.y[:0], p=events.p[:0])
    data = WRITERS[format](none)
    assert refusal(name_of(format), data) == ("empty file" if format == "bin" else "holds no event")


def test_the_size_of_the_sensor_is_the_one_that_the_file_or_its_format_says(events):
    for format, size in (("bin", (34, 34)), ("aedat2", (128, 128)), ("aedat3", (128, 128)), ("dat", (24, 24)),
                         ("evt2", (24, 24)), ("evt3", (24, 24))):  # fmt: skip
        back, _ = read(name_of(format), WRITERS[format](events), Settings())
        assert (back.width, back.height) == size, format
    assert "--sensor 128x128" in refusal("one.npz", write_npz(events), Settings())
    assert "--sensor" in refusal("one.aedat", write_aedat3(events).replace(b"DVS128", b"DVXYZ9"), Settings())


def test_overflows_of_n_mnist_move_the_later_times(events):
    data = write_bin(events)
    marked = data[:500] + bytes([0, 240, 0, 0, 0]) + data[500:]
    back, _ = read("one.bin", marked)
    assert np.array_equal(back.t, events.t + (np.arange(len(events.t)) >= 100) * 8192)


def test_what_is_no_pixel_is_left_out_and_told(events):
    some, special = write_aedat2(events), struct.pack(">II", 0x8001, 10)
    back, warnings = read("one.aedat", some + special)
    assert (same(back, events), warnings) == (True, (INVALID,))
    invalid = AEDAT3_HEAD + OTHER_PACKET + packet(rows(events, 0), invalid=(0, 7))
    back, warnings = read("one.aedat", invalid)
    assert (len(back.t), warnings) == (len(events.t) - 2, (INVALID,))
    evt2 = write_evt2(events)
    at = evt2.index(b"% end\n") + 6
    back, warnings = read("one.raw", evt2[:at] + evt2[at + 4 : at + 8] + evt2[at:])
    assert (same(back, events), warnings) == (True, (UNTIMED,))
    evt3 = write_evt3(events)
    at = evt3.index(b"% end\n") + 6
    back, warnings = read("one.raw", evt3[:at] + struct.pack("<H", 2 << 12 | 3) + evt3[at:])
    assert (same(back, events), warnings) == (True, (UNTIMED,))


def test_a_vector_of_evt3_is_all_its_events_in_the_order_of_columns():
    words = [8 << 12, 6 << 12 | 5, 0 << 12 | 9, 3 << 12 | 1 << 11 | 2, 4 << 12 | 0b100000000011, 5 << 12 | 0b10000001]
    words += [4 << 12 | 1, 6 << 12 | 8, 3 << 12 | 4, 5 << 12 | 0b10, 2 << 12 | 1 << 11 | 30]
    back, _ = read("one.raw", b"% evt 3.0\n% end\n" + struct.pack(f"<{len(words)}H", *words))
    expected = [(0, x, 9, 1) for x in (2, 3, 13, 14, 21, 22)] + [(3, 5, 9, 0), (3, 30, 9, 1)]
    assert rows(back, 0) == expected


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"#!AER-DAT1.0\r\n" + bytes(16), "not AEDAT 2.0, 3.1 or 4"),
        (b"#!AER-DAT2.0\r\n# no end", "truncated: it ends in its header"),
        (AEDAT3_HEAD + struct.pack("<hhiiiiii", 1, 1, 0, 4, 0, 9, 9, 9), "damaged: a packet of 9 events of 0 bytes"),
        (AEDAT3_HEAD + struct.pack("<hhiiiiii", 1, 1, 8, 4, 0, -1, 9, 9), "damaged: a packet of 9 events of 8 bytes"),
        (AEDAT3_HEAD + struct.pack("<hhiiiiii", 1, 1, 4, 4, 0, 1, 1, 1) + bytes(4), "damaged: polarity events of 4"),
        (AEDAT3_HEAD + struct.pack("<hhiiiiii", 1, 1, 8, 4, 0, 2**31 - 1, 9, 9), "truncated: 28 bytes behind"),
    ],
)  # fmt: skip
def test_a_damaged_aedat_is_refused(data, said):
    assert refusal("one.aedat", data).startswith(said)


def test_other_formats_under_these_names_are_refused(events):
    assert refusal("a.dat", b"% Width 3\n\x0e\x08" + bytes(8)).startswith("not a DAT of change detection events")
    assert refusal("a.raw", write_evt2(events).replace(b"evt 2.0", b"evt 2.1")).endswith("(its header says 2.1)")
    assert refusal("a.raw", bytes(64)).endswith("(its header says none)")
    assert refusal("a.npy", b"no numpy here").startswith("not an array of numpy")
    assert refusal("a.npz", b"no zip here").startswith("truncated or damaged")


def test_polarities_of_minus_one_and_one_are_read_and_others_refused(events):
    signs = structured(events).astype([("x", "<i4"), ("y", "<i4"), ("t", "<f8"), ("p", "<i1")])
    signs["p"] = np.where(events.p == 1, 1, -1)
    assert same(read("a.npy", npy(signs))[0], events)
    signs["p"][3] = 0
    assert refusal("a.npy", npy(signs)) == "polarities from -1 to 1; they must be 0 and 1, or -1 and 1"
    signs["p"][3] = 2
    assert refusal("a.npy", npy(signs)) == "polarities from -1 to 2; they must be 0 and 1, or -1 and 1"


def test_times_of_numpy_files_may_be_in_other_units(events):
    array = structured(events).astype([("x", "<u2"), ("y", "<u2"), ("timestamps", "<f8"), ("polarity", "<u1")])
    array["timestamps"] = (events.t + 7) / 1e6
    assert same(read("a.npy", npy(array), Settings(sensor=(24, 24), time_unit="s"))[0], events)
    assert refusal("a.npy", npy(array)).startswith("t holds values that are no whole numbers of µs; --time-unit says")
    array["timestamps"] = np.nan
    assert refusal("a.npy", npy(array)).startswith("t holds values that are no whole numbers")


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": 4, "y": 4, "t": 4}, "0 arrays are called p or pol or polarity or polarities, where one must be"),
        ({"x": 4, "y": 4, "t": 4, "time": 4, "p": 4}, "2 arrays are called t or ts"),
        ({"x": 4, "y": 4, "t": 4, "p": 3}, "x, y, t, p of the shapes [(3,), (4,)]; they must be (n,) and alike"),
        ({}, "0 arrays are called t"),
    ],
)
def test_an_npz_of_other_arrays_is_refused(arrays, said):
    stream = io.BytesIO()
    np.savez(stream, **{name: np.zeros(num, np.int64) for name, num in arrays.items()})
    assert refusal("a.npz", stream.getvalue()).startswith(said)


def test_a_numpy_file_can_run_no_code_and_take_no_memory_it_does_not_have(events):
    assert refusal("a.npy", npy(np.array([{}], dtype=object))).startswith("holds Python objects")
    huge = npy(structured(events)).replace(f"({len(events.t)},)".encode(), b"(9**9,)")
    assert refusal("a.npy", huge)
    many = npy(structured(events)).replace(f"({len(events.t)},), }}     ".encode(), b"(999999999999,), }")
    assert refusal("a.npy", many).startswith(("truncated or damaged", "not an array"))
    assert refusal("a.npy", npy(np.zeros((5, 4)))).startswith("a plain array of (5, 4), whose columns have no names")
    assert (
        refusal("a.npy", npy(np.zeros(2, [("x", "S1"), ("y", "i1"), ("t", "i1"), ("p", "i1")])))
        == "x is |S1, not numbers"
    )
    bomb = io.BytesIO()
    with (
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("t.npy", "w", force_zip64=True) as out,
    ):
        for _ in range(1025):
            out.write(bytes(1 << 20))
    assert refusal("a.npz", bomb.getvalue()) == "t.npy would unpack to 1074790400 bytes"


@pytest.mark.parametrize("format", FORMATS)
def test_packing_loses_nothing(tmp_path, format):
    expected = write_classes(tmp_path / "in", format)
    done = prepare("events", tmp_path / "in", tmp_path / "out", "--val-ratio", 0.5, "--sensor", "34x34")
    assert done.returncode == 0, done.stderr
    found = {}
    for split in ("train", "val"):
        manifest = Manifest.load(tmp_path / "out" / split)
        assert (manifest.kind, manifest.sensor) == (EVENTS, Sensor(height=34, width=34))
        for sample in samples_of(tmp_path / "out" / split):
            assert manifest.classes[sample.label] == str(recording(int(sample.stem))[1])
        found |= packed(tmp_path / "out" / split)
    assert found.keys() == expected.keys()
    assert all(same(found[name], expected[name]) for name in found)
    whole = prepare("verify", tmp_path / "out", "--decode")
    assert (whole.returncode, "is whole: 20 samples" in whole.stdout) == (0, True), whole.stdout


def test_n_mnist_as_it_is_distributed_is_train_and_val(tmp_path):
    """Train.zip and Test.zip, each with a folder of its name around the classes."""
    write_classes(tmp_path / "a", "bin", 20, "Train")
    write_classes(tmp_path / "b", "bin", 10, "Test")
    for folder, name in (("a", "Train"), ("b", "Test")):
        root = tmp_path / folder
        files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.bin")}
        write_zip(tmp_path / f"{name}.zip", files)
    done = prepare("events", tmp_path / "Train.zip", tmp_path / "Test.zip", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "splits: train from Train; val from Test" in done.stdout
    for split, num in (("train", 20), ("val", 10)):
        found = packed(tmp_path / "out" / split)
        assert len(found) == num
        assert all(same(events, recording(int(name))[0]) for name, events in found.items())


def test_cifar10_dvs_as_it_is_distributed_has_an_archive_for_each_class(tmp_path):
    write_classes(tmp_path / "in", "aedat2", 20)
    sources = []
    for folder in sorted((tmp_path / "in").iterdir()):
        files = {f"{folder.name}/{path.name}": path.read_bytes() for path in folder.iterdir()}
        sources.append(write_zip(tmp_path / f"{folder.name}.zip", files))
    done = prepare("events", *sources, tmp_path / "out", "--val-ratio", 0.5)
    assert done.returncode == 0, done.stderr
    for split in ("train", "val"):
        manifest = Manifest.load(tmp_path / "out" / split)
        assert manifest.classes == tuple("0123456789")
        assert manifest.sensor == Sensor(height=128, width=128)
        assert np.bincount([sample.label for sample in samples_of(tmp_path / "out" / split)]).tolist() == [1] * 10


def test_a_source_that_is_a_link_is_called_by_the_link(tmp_path):
    """As Hugging Face's cache keeps files: under hashes, to which links with the true names lead."""
    (tmp_path / "blobs").mkdir()
    for split, blob in (("Train", "e3b0c4"), ("Test", "9f86d0")):
        write_classes(tmp_path / blob, "bin", 20 if split == "Train" else 10)
        root = tmp_path / blob
        files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.bin")}
        write_tar(tmp_path / "blobs" / blob, files, "w:gz")
        (tmp_path / f"{split}.tar.gz").symlink_to(tmp_path / "blobs" / blob)
    done = prepare("events", tmp_path / "Train.tar.gz", tmp_path / "Test.tar.gz", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    for split, num in (("train", 20), ("val", 10)):
        found = packed(tmp_path / "out" / split)
        assert Manifest.load(tmp_path / "out" / split).classes == tuple("0123456789")
        assert found.keys() == {f"{number:04d}" for number in range(num)}
        assert all(same(events, recording(int(name))[0]) for name, events in found.items())


def test_a_source_given_as_dots_is_called_by_its_folder(tmp_path, monkeypatch):
    for name, number in (("cat", 0), ("dog", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.bin").write_bytes(write_bin(recording(number)[0]))
    monkeypatch.chdir(tmp_path / "cat")
    splits, _ = indexed(Recordings([".", "../dog"], Settings(), 0.0, 0), tmp_path / "work")
    assert splits["train"].classes == ("cat", "dog")


def test_another_name_of_one_of_several_sources_is_another_data_set(tmp_path):
    for name, number in (("cat", 0), ("dog", 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.bin").write_bytes(write_bin(recording(number)[0]))
    first, dog, out = tmp_path / "cat", tmp_path / "dog", tmp_path / "out"
    assert prepare("events", first, dog, out).returncode == 0
    assert "nothing to do" in prepare("events", first, dog, out).stdout
    renamed = first.rename(tmp_path / "horse")
    again = prepare("events", renamed, dog, out)
    assert again.returncode == 64
    assert "was begun with another data set" in again.stderr


def test_bad_recordings_are_listed_with_their_reasons(tmp_path, events):
    write_classes(tmp_path / "in", "npz")
    bad = tmp_path / "in" / "0"
    (bad / "cut.bin").write_bytes(write_bin(events)[:-2])
    (bad / "empty.npy").write_bytes(b"")
    (bad / "outside.npz").write_bytes(write_npz(events._replace(x=events.x + 100)))
    (bad / "notes.txt").write_text("no recording")
    done = prepare("events", tmp_path / "in", tmp_path / "out", "--sensor", "34x34", "--allow-bad", 3)
    assert done.returncode == 0, done.stderr
    assert "1 files that are no recordings by their names are passed over: .txt 1" in done.stdout
    listed = [json.loads(line) for line in (tmp_path / "out/train/quarantine.jsonl").read_text().splitlines()]
    reasons = {row["name"]: row["reason"] for row in listed}
    assert reasons.keys() == {"0/cut.bin", "0/empty.npy", "0/outside.npz"}
    assert reasons["0/cut.bin"] == "truncated: 3 bytes behind the last whole event of 5 bytes"
    assert reasons["0/empty.npy"] == "empty file"
    assert reasons["0/outside.npz"].startswith("x=1")
    refused = prepare("events", tmp_path / "in", tmp_path / "other", "--sensor", "34x34")
    assert refused.returncode == 65
    assert "refused train: 0/cut.bin: truncated" in refused.stderr


def test_sorted_recordings_are_counted(tmp_path, events):
    write_classes(tmp_path / "in", "npz")
    late = events._replace(t=events.t[::-1])
    (tmp_path / "in/0/late.npz").write_bytes(write_npz(late))
    done = prepare("events", tmp_path / "in", tmp_path / "out", "--sensor", "34x34")
    assert f"train: 1 recordings that are kept, 0/late.npz the first: {SORTED}" in done.stdout


def test_recordings_of_several_sensors_have_none_in_common(tmp_path):
    write_classes(tmp_path / "in", "bin", 10)
    write_classes(tmp_path / "in", "aedat2", 10)
    assert prepare("events", tmp_path / "in", tmp_path / "out").returncode == 0
    manifest = Manifest.load(tmp_path / "out/train")
    assert (manifest.kind, manifest.sensor) == (EVENTS, None)
    assert {(sample.height, sample.width) for sample in samples_of(tmp_path / "out/train")} == {(34, 34), (128, 128)}
    assert prepare("verify", tmp_path / "out").returncode == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere", "out"], "events: nowhere does not exist"),
        (["in", "out", "--sensor", "34"], "'34' is no size of a sensor; write WIDTHxHEIGHT, such as 128x128"),
        (["in", "out", "--sensor", "0x34"], "'0x34' is no size of a sensor"),
        (["in", "out", "--time-unit", "ns"], "argument --time-unit: invalid choice: 'ns'"),
        (["in", "in/out"], "lies in in, which is packed"),
        (["in", "in", "out"], "events: two sources are called in; rename one of them, or give a link of another name"),
        (["in", "out", "--resize", "5"], "unrecognized arguments: --resize 5"),
    ],
)
def test_wrong_use_is_refused_in_a_line(tmp_path, monkeypatch, arguments, said, capsys):
    from data_prep.__main__ import main

    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["events", *arguments]) == 64
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_a_folder_without_recordings_says_so(tmp_path):
    (tmp_path / "in/0").mkdir(parents=True)
    (tmp_path / "in/0/a.txt").write_text("")
    done = prepare("events", tmp_path / "in", tmp_path / "out")
    assert done.returncode == 65
    assert "holds no recording in a class folder" in done.stderr


@pytest.mark.parametrize("format", FORMATS)
def test_damaged_files_end_in_a_reason_or_in_events_that_a_recording_can_have(events, format):
    """Never in another error, which would end the run; what is kept is decoded, and so checked."""
    few = events._replace(t=events.t[:60], x=events.x[:60], y=events.y[:60], p=events.p[:60])
    data, random = WRITERS[format](few), np.random.RandomState(0)
    for _ in range(300):
        damaged = bytearray(data)
        for place in random.randint(0, len(data), random.randint(1, 4)):
            damaged[place] = random.randint(256)
        if random.randint(3) == 0:
            del damaged[random.randint(len(damaged)) :]
        with contextlib.suppress(RefusedError):
            read(name_of(format), bytes(damaged))
