"""The bytes of a recording: nothing is lost, and nothing damaged is taken (pipeline/data/decode/events.py)."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.decode.events import Events, decode, encode

WHOLE = Events(
    t=np.array([0, 0, 7, 300, 300, 90_000, 90_001, 90_255, 90_510]),
    x=np.array([0, 33, 1, 2, 3, 4, 5, 6, 7]),
    y=np.array([25, 0, 1, 2, 3, 4, 5, 6, 7]),
    p=np.array([1, 0, 0, 1, 1, 1, 0, 1, 1]),
    width=34,
    height=26,
)


def same(one: Events, other: Events) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one[:4], other[:4], strict=True)) and one[4:] == other[4:]


def patched(data: bytes, at: int, new: bytes) -> bytes:
    """`data` with other bytes at `at` and a checksum that fits them, so that no check but the one meant finds it."""
    data = data[:at] + new + data[at + len(new) :]
    return data[:20] + struct.pack("<I", zlib.crc32(data[24:], zlib.crc32(data[:20]))) + data[24:]


@st.composite
def recordings(draw) -> Events:
    num = draw(st.integers(1, 40))
    width, height = (draw(st.sampled_from([1, 2, 34, 255, 256, 257, 1280, 65_535])) for _ in range(2))
    longest = draw(st.sampled_from([0, 1, 255, 256, 65_535, 65_536, 2**32 - 1]))
    steps = [0, *draw(st.lists(st.integers(0, longest), min_size=num - 1, max_size=num - 1))]
    x, y, p = (
        draw(st.lists(st.integers(0, most - 1), min_size=num, max_size=num)) for most in (width, height, 2)
    )  # fmt: skip
    return Events(np.cumsum(steps, dtype=np.int64), np.array(x), np.array(y), np.array(p), width, height)


@settings(deadline=None)
@given(recordings())
def test_a_recording_comes_back_as_it_was(events):
    back = decode(encode(events))
    assert same(back, events)
    assert [column.dtype for column in back[:4]] == [np.int64, np.uint16, np.uint16, np.uint8]


def test_the_bytes_are_the_ones_of_the_layout():
    # One-byte columns, since 34x26 is small; steps of 4 bytes, since 89,700 µs are more than 65,535.
    data = encode(WHOLE)
    body = struct.pack("<9I", 0, 0, 7, 293, 0, 89_700, 1, 254, 255) + bytes(WHOLE.x.tolist()) + bytes(WHOLE.y.tolist())
    body += bytes([0b10111001, 0b1])
    head = b"\x89CHIEVT\n" + struct.pack("<HBBHHI", 1, 4, 1, 34, 26, 9)
    assert data == head + struct.pack("<I", zlib.crc32(head + body)) + body


def test_a_buffer_of_any_kind_is_read():
    data = encode(WHOLE)
    for buffer in (bytearray(data), memoryview(data), np.frombuffer(data, dtype=np.uint8)):
        assert same(decode(buffer), WHOLE)


def test_what_comes_back_may_be_changed():
    data = encode(WHOLE)
    for column in decode(data)[:4]:
        column += 1
    assert same(decode(data), WHOLE)


@pytest.mark.parametrize("length", range(len(encode(WHOLE))))
def test_a_recording_that_was_cut_is_refused(length):
    with pytest.raises(ValueError, match=r"events"):
        decode(encode(WHOLE)[:length])


@pytest.mark.parametrize("place", range(len(encode(WHOLE))))
def test_a_byte_that_was_changed_is_found(place):
    data = bytearray(encode(WHOLE))
    data[place] ^= 0x40
    with pytest.raises(ValueError, match=r"events|sensor") as caught:
        decode(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("at", "new", "said"),
    [
        (8, b"\2\0", "events of version 2; this program reads version 1"),
        (10, b"\3", "a damaged header of events: 9 events with times of 3 bytes, coordinates of 1"),
        (11, b"\4", "a damaged header of events: 9 events with times of 4 bytes, coordinates of 4"),
        (12, b"\0\0", "a sensor of 0x26 pixels; a side has 1 to 65535"),
        (12, b"\7\0", "x=33 in event 1, where 0 to 6 are allowed"),
        (14, b"\7\0", "y=25 in event 0, where 0 to 6 are allowed"),
        (16, b"\0\0\0\0", "a damaged header of events: 0 events"),
        (16, b"\xff\xff\xff\xff", "80 bytes of events, where the header says 4294967295 events in 26306674706 bytes"),
        (24, b"\5", "damaged events: the first is at 5 µs, not at 0"),
    ],
)
def test_bytes_that_no_recording_has_are_refused(at, new, said):
    with pytest.raises(ValueError, match=said):
        decode(patched(encode(WHOLE), at, new))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"t": WHOLE.t[:-1]}, "columns t, x, y, p of 8, 9, 9, 9 events; they must be of one length"),
        ({name: np.zeros(0, np.int64) for name in "txyp"}, "0 events; a recording has 1 to"),
        ({"t": WHOLE.t + 1}, "time does not begin at 0, or falls"),
        ({"t": WHOLE.t[::-1]}, "time does not begin at 0, or falls"),
        ({"t": np.arange(9, dtype=np.uint64)[::-1] - np.uint64(8)}, "time does not begin at 0, or falls"),
        ({"t": np.arange(9) << 32}, "4294967296 µs between two events; at most 4294967295"),
        ({"x": WHOLE.x - 1}, "x=-1 in event 0, where 0 to 33 are allowed"),
        ({"y": WHOLE.y + 1}, "y=26 in event 0, where 0 to 25 are allowed"),
        ({"p": WHOLE.p + 1}, "p=2 in event 0, where 0 to 1 are allowed"),
        ({"x": WHOLE.x / 1}, r"x has shape \(9,\) of float64, where \(n,\) of integers is needed"),
        ({"width": 65_536}, "a sensor of 65536x26 pixels; a side has 1 to 65535"),
    ],
)
def test_events_that_no_recording_has_are_not_written(change, said):
    with pytest.raises(ValueError, match=said):
        encode(WHOLE._replace(**change))
