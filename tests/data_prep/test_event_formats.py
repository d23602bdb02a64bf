"""Files of event cameras beyond plain recordings: other cameras, quiet times, long headers, hostile numbers."""

import io
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from data_prep.info import _events_tile
from data_prep.shard_writer import Record
from data_prep.sources import prophesee
from data_prep.sources.event_formats import convert
from data_prep.sources.event_raw import INVALID, SORTED, UNTIMED, Settings
from data_prep.sources.gesture import _convert
from data_prep.sources.prophesee import _read_evt3
from pipeline.data.decode.events import Events, decode, encode
from tests.support.event_files import (
    WRITERS,
    packet,
    recording,
    write_aedat2,
    write_bin,
    write_evt2,
    write_npz,
)
from tests.support.event_reading import ON_34, name_of, read, refusal
from tests.support.prep_runs import prepare, write_folder


def test_aedat2_of_another_camera_than_a_dvs128_is_refused():
    """A DAVIS346 has y in bits 22 to 30 of an address, x in 12 to 21, the polarity in 11."""
    random, num = np.random.RandomState(0), 1000
    words = np.zeros((num, 2), ">u4")
    words[:, 0] = (
        random.randint(1, 260, num) << 22 | random.randint(0, 346, num) << 12 | random.randint(0, 2, num) << 11
    )
    words[:, 1] = np.arange(num)
    head, chip = b"#!AER-DAT2.0\r\n", b"# AEChip: eu.seebetter.ini.chips.davis.Davis346red\r\n"
    said = (
        "AEDAT 2.0 of the camera Davis346red, whose addresses are others than a DVS128's; convert it, for instance to"
    )
    assert refusal("a.aedat", head + chip + words.tobytes()).startswith(said)
    said = "1000 of 1000 events have addresses that no pixel of a DVS128 has; convert it"
    assert refusal("a.aedat", head + words.tobytes()).startswith(said)
    events, _ = recording(3)
    for name in (b"ch.unizh.ini.jaer.chip.retina.DVS128", b"DVS128_PAER"):
        whole = write_aedat2(events).replace(head, head + b"# AEChip: " + name + b"\r\n")
        assert np.array_equal(read("a.aedat", whole, Settings())[0].x, events.x)


def test_half_of_an_aedat2_may_be_no_pixels():
    pixel, special = struct.pack(">II", 5 << 8 | 3 << 1, 1), struct.pack(">II", 1 << 15, 1)
    head = b"#!AER-DAT2.0\r\n"
    assert len(read("a.aedat", head + pixel + special, Settings())[0].t) == 1
    assert refusal("a.aedat", head + pixel + 2 * special, Settings()).startswith("2 of 3 events")


def test_of_how_many_events_a_warning_is_adds_up_over_the_recordings(tmp_path):
    one, other = (write_aedat2(recording(number)[0]) for number in (0, 1))
    special = struct.pack(">II", 1 << 15, 1)
    write_folder(tmp_path / "in/a", {"0.aedat": one + 3 * special, "1.aedat": other + 2 * special})
    done = prepare("events", tmp_path / "in", tmp_path / "out")
    assert f" the first: {INVALID} (5 in all)\n" in done.stdout
    record = next((tmp_path / "out/train/.done").iterdir())
    assert Record.from_json(record.read_text()).warnings[INVALID][::2] == (2, 5)
    older = record.read_text().replace('.aedat", 5]', '.aedat"]')
    assert Record.from_json(older).warnings[INVALID][::2] == (2, 0)


def test_events_before_the_first_time_and_out_of_order_are_counted():
    events, _ = recording(3)
    at = write_evt2(events).index(b"% end\n") + 6
    untimed = write_evt2(events)[:at] + 2 * struct.pack("<I", 1) + write_evt2(events)[at:]
    assert convert("a.raw", memoryview(untimed), ON_34).warned_events == (2,)
    late = events._replace(t=np.concatenate([events.t[1:], events.t[:1]]))
    assert convert("a.npz", memoryview(write_npz(late)), ON_34).warned_events == (1,)


# Bits of the clock, and the µs of a step of its words of time.
CLOCKS = {"bin": (23, 1), "aedat2": (32, 1), "dat": (32, 1), "evt2": (34, 64), "evt3": (24, 4096)}


def few(*times: int) -> Events:
    """Events at these times, in columns 0, 1, 2, …"""
    num = len(times)
    columns = np.arange(num, dtype=np.uint16), np.full(num, 5, np.uint16), np.ones(num, np.uint8)
    return Events(np.array(times, dtype=np.int64), *columns, 34, 34)


@pytest.mark.parametrize("format", CLOCKS)
@pytest.mark.parametrize("start", [0, 1_000_000])
def test_a_quiet_time_of_nearly_the_clock_s_range_stays(format, start):
    bits, step = CLOCKS[format]
    quiet = min((1 << bits) - 2 * step - 1_005_000, (1 << 32) - 1)
    events = few(0, 1000, 1000 + quiet, 2000 + quiet, 3000 + quiet + (1 << bits) // 5)
    back, warnings = read(name_of(format), WRITERS[format](events, start=start))
    assert (back.t.tolist(), back.x.tolist(), warnings) == (events.t.tolist(), [0, 1, 2, 3, 4], ())


@pytest.mark.parametrize("format", ["bin", "aedat2", "dat"])
def test_events_that_come_late_over_a_wrap_are_put_back(format):
    size = 1 << CLOCKS[format][0]
    events = few(0, 900, 1005, 995, 1009, 998, 999, 1100, 1100 + size // 8 * 5)
    back, warnings = read(name_of(format), WRITERS[format](events, start=size - 1000))
    assert back.t.tolist() == sorted(events.t.tolist())
    assert back.x.tolist() == [0, 1, 3, 5, 6, 2, 4, 7, 8]
    assert warnings == (SORTED,)


def test_late_is_65_ms_at_most():
    """A rise from further behind a wrap, or to further before the next one, is a quiet time."""
    for behind, before in ((70_000, 100), (100, 70_000)):
        times = (0, 1000 + behind, 1000 + (1 << 23) - before)
        back, warnings = read("a.bin", write_bin(few(*times), start=(1 << 23) - 1000))
        assert (back.t.tolist(), warnings) == (list(times), ())


def evt3_word_by_word(words: list[int]) -> tuple[list[tuple[int, int, int, int]], int]:
    """The events of EVT 3.0 by the words of its description, and how many have no known time or place."""
    high = low = row = base = polarity = None
    mark, turns, found, num_unknown = 0, 0, [], 0
    for word in words:
        kind, value = word >> 12, word & 0xFFF
        columns = []
        if kind == 8:
            turns += high is not None and value < mark - 2048
            mark, last = value, high
            high = turns << 12 | value
            low = low if high == last or low is None else 0
        elif kind == 6:
            low = value
        elif kind == 0:
            row = value & 0x7FF
        elif kind == 3:
            base, polarity = value & 0x7FF, value >> 11
        elif kind == 2:
            columns = [(value & 0x7FF, value >> 11)]
        elif kind in (4, 5):
            width = 12 if kind == 4 else 8
            columns = [((base or 0) + bit, polarity) for bit in range(width) if value >> bit & 1]
            base = None if base is None else base + width
        for column, p in columns:
            if high is None or low is None or row is None or p is None:
                num_unknown += 1
            else:
                found.append((high << 12 | low, column, row, p))
    return found, num_unknown


@pytest.mark.parametrize("slice_words", [1, 2, 7, 1 << 16])
def test_evt3_is_decoded_in_slices_as_word_by_word(slice_words):
    random = np.random.RandomState(slice_words)
    for _ in range(100):
        num = random.randint(1, 120)
        kinds = random.choice([0, 2, 3, 4, 5, 6, 8, 7, 10, 14, 15], num)
        words = (kinds << 12 | random.randint(0, 4096, num)).astype("<u2")
        raw = _read_evt3(memoryview(words.tobytes()), 0, None, slice_words)
        expected, num_unknown = evt3_word_by_word(words.tolist())
        assert list(zip(*(column.tolist() for column in (raw.t, raw.x, raw.y, raw.p)), strict=True)) == expected
        assert raw.warnings == ({UNTIMED: num_unknown} if num_unknown else {})


def dense_evt3(num_words: int) -> bytes:
    """Nearly all of its words are vectors of twelve events."""
    words = np.full(num_words, 4 << 12 | 0xFFF, "<u2")
    for place, word in enumerate((8 << 12 | 1, 6 << 12 | 5, 0 << 12 | 9, 3 << 12 | 1 << 11)):
        words[place::64] = word
    return b"% evt 3.0\n% geometry 1280x720\n% end\n" + words.tobytes()


def test_evt3_takes_little_more_memory_than_its_events():
    data = dense_evt3(1 << 18)
    tracemalloc.start()
    num = len(_read_evt3(memoryview(data), data.index(b"% end\n") + 6, None).t)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num > 2_900_000
    assert peak < 45 * num


def test_an_evt3_of_more_events_than_a_worker_can_hold_is_refused(monkeypatch):
    monkeypatch.setattr(prophesee, "MAX_EVENTS", 50_000)
    assert refusal("a.raw", dense_evt3(1 << 16)) == "more than 50000 events; cut the recording into shorter ones"


FIELDS = [("x", "<u2"), ("y", "<u2"), ("t", "<i8"), ("p", "u1")]
NO_BYTES = [(name, "S0") for name in "xytp"]


def npy_of(descr: object, shape: tuple, body: bytes = b"") -> bytes:
    """An .npy of this header, true or not."""
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body


@pytest.mark.parametrize(
    ("descr", "shape", "body"),
    [
        (FIELDS, (-2, -4), bytes(8 * 13)),
        (FIELDS, (-1,), b""),
        (FIELDS, (True,), bytes(13)),
        (FIELDS, (2**63, 0), b""),
        (FIELDS, (0, 2**47, 2**47), b""),
        (FIELDS, (1,) * 70, bytes(13)),
        ("|V0", (3,), b""),
        ([], (3,), b""),
        (NO_BYTES, (4,), b""),
        (NO_BYTES, (2**62,), b""),
    ],
)
def test_an_npy_of_an_impossible_header_is_refused(descr, shape, body):
    data = npy_of(descr, shape, body)
    said = refusal("a.npy", data)
    assert said.startswith(("damaged: ", "not an array of numpy")), said
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("events.npy", data)
    assert refusal("a.npz", stream.getvalue()) == said


def test_an_npy_of_a_true_header_is_read():
    assert read("a.npy", npy_of(FIELDS, (2,), bytes(26)))[0].t.tolist() == [0, 0]


def test_the_sheet_draws_a_sensor_of_65535_pixels_in_little_memory(tmp_path):
    """Its pixels would be 34 GB a polarity. A sensor of 1280 pixels is drawn pixel by pixel."""
    edge = 65_534
    events = few(0, 1)._replace(x=np.array([0, edge]), y=np.array([0, edge]), p=np.array([1, 0]))
    for side in (1280, 65_535):
        shown = events._replace(x=events.x * (side - 1) // edge, y=events.y * (side - 1) // edge)
        tracemalloc.start()
        tile = np.asarray(_events_tile(encode(shown._replace(width=side, height=side)))).astype(int)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 400 << 20
        assert tile.shape == (128, 128, 3)
        assert tile[0, 0, 0] > tile[0, 0, 2]  # red
        assert tile[-1, -1, 2] > tile[-1, -1, 0]  # blue
        assert (tile[40:60, 40:60] == 255).all()


def test_row_240_of_a_bin_is_an_overflow_only_where_the_sensor_has_no_such_row():
    data = write_bin(few(0, 10, 20)._replace(y=np.array([239, 240, 239])))
    back, _ = read("a.bin", data, Settings(sensor=(304, 240)))
    assert (back.t.tolist(), back.y.tolist()) == ([0, 8192 + 20], [239, 239])
    said = refusal("a.bin", data, Settings(sensor=(304, 241)))
    assert said.startswith("1 events in row 240, which this format also uses as the mark of an overflow")
    whole = write_bin(few(0, 10)._replace(y=np.array([239, 241])))
    assert read("a.bin", whole, Settings(sensor=(304, 256)))[0].y.tolist() == [239, 241]


def test_a_header_may_have_a_long_line():
    """jAER writes all its preferences into one."""
    events, _ = recording(3)
    long = write_aedat2(events).replace(b"# This", b"# <entry value=" + b"a" * 100_000 + b"/>\r\n# This")
    assert np.array_equal(read("a.aedat", long)[0].t, events.t)
    endless = b"#!AER-DAT2.0\r\n#" + bytes(5 << 20)
    assert refusal("a.aedat", endless) == "its header has more than 4194304 bytes; remove the longest lines of it"


@pytest.mark.parametrize("first", [0x25, 0x2025])
def test_the_first_word_behind_a_header_of_evt_without_its_end_may_look_like_one(first):
    """The header of cameras of the third generation, as OpenEB reads it."""
    head = b"% Date 2020-09-14 09:03:25\n% system_ID 21\r\n%\n% evt 2.0\n"
    words = [8 << 28 | first, *(1 << 28 | place % 64 << 22 | place << 11 | 10 for place in range(200))]
    data = head + struct.pack(f"<{len(words)}I", *words)
    back, warnings = read("a.raw", data, Settings(sensor=(640, 480)))
    assert (sorted(back.x.tolist()), set(back.y.tolist()), warnings) == (list(range(200)), {10}, (SORTED,))


def test_evt_with_its_end_is_read_from_there_whatever_lines_there_are():
    data = write_evt2(few(0, 10)).replace(b"% end\n", b"% odd \x01\x02\nno mark\n% end \r\n")
    assert read("a.raw", data)[0].t.tolist() == [0, 10]


def test_a_file_that_does_not_begin_as_an_evt_is_none():
    assert refusal("a.raw", b"x\n" + write_evt2(few(0, 10))).endswith("(its header says none)")


def test_a_gesture_warns_of_its_own_events_only():
    data = packet([(t, 3, 4, 1) for t in range(10)], invalid=(0, 5, 9))
    found = _convert(Settings(), {"g": (2, 8)}, "g", memoryview(data))
    assert (found.warnings, found.warned_events) == ((INVALID,), (1,))
    assert found.converted is not None
    assert decode(found.converted).t.tolist() == [0, 1, 2, 4, 5]


def test_dat_of_other_versions_than_1_and_2_is_refused():
    data = WRITERS["dat"](few(0, 10))
    assert read("a.dat", data)[0].x.tolist() == [0, 1]
    for version in (b"0", b"3"):
        said = f"DAT of version {version.decode()}; 1 and 2 are read; convert it"
        assert refusal("a.dat", data.replace(b"% Version 2", b"% Version " + version)).startswith(said)


def test_a_bin_of_a_larger_sensor_says_how_to_give_its_size():
    data = write_bin(few(0, 10)._replace(x=np.array([3, 200])))
    cure = "; of a larger sensor give its size, such as --sensor 240x180 for N-Caltech101"
    assert refusal("a.bin", data, Settings()) == f"x=200 in event 1, where 0 to 33 are allowed (34x34 pixels){cure}"
    assert refusal("a.bin", data).endswith("(34x34 pixels)")
    assert read("a.bin", data, Settings(sensor=(240, 180)))[0].x.tolist() == [3, 200]


def npz_of(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # pyright: ignore[reportArgumentType]
    return stream.getvalue()


def test_an_npz_of_two_arrays_whose_names_differ_in_case_is_refused():
    x = np.zeros(3, int)
    said = refusal("a.npz", npz_of(t=np.arange(3), T=np.arange(3) * 10, x=x, y=x, p=x))
    assert said.startswith("2 arrays are called t or ts")
    assert read("a.npz", npz_of(T=np.arange(3) * 10, X=x, y=x, P=x))[0].t.tolist() == [0, 10, 20]


@pytest.mark.parametrize(("unit", "per_unit"), [("s", 1e6), ("ms", 1e3)])
def test_times_since_1970_in_double_precision_are_whole_microseconds(unit, per_unit):
    times = 1_600_000_000_000_000 + np.cumsum(np.random.RandomState(0).randint(0, 90, 5000))
    x = np.zeros(len(times), int)
    data = npz_of(t=times / per_unit, x=x, y=x, p=x)
    back, _ = read("a.npz", data, Settings(sensor=(34, 34), time_unit=unit))
    assert np.array_equal(back.t, times - times[0])


def test_times_that_are_too_coarse_for_microseconds_are_refused_with_the_cure():
    times, x = np.array([100.000_001, 100.000_04], np.float32), np.zeros(2, int)
    said = refusal("a.npz", npz_of(t=times, x=x, y=x, p=x), Settings(sensor=(34, 34), time_unit="s"))
    assert said.endswith("; float32 may be too coarse for µs at such times: subtract the first one before you save")
    halves = npz_of(t=np.array([0.0, 1.5e-6]), x=x, y=x, p=x)
    assert refusal("a.npz", halves, Settings(sensor=(34, 34), time_unit="s")).startswith("t holds values that are no")
    fine = npz_of(t=np.array([0, 200_000.015625], np.float32), x=x, y=x, p=x)
    assert refusal("a.npz", fine).startswith("t holds values that are no whole numbers of µs; --time-unit says")
    exact = npz_of(t=np.array([16_000_000, 16_000_002], np.float32), x=x, y=x, p=x)
    assert read("a.npz", exact)[0].t.tolist() == [0, 2]
