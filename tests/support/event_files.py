"""Recordings as the files of event cameras, written by the words of each format's description, event by event.

The recordings are those of `data_prep.sources.digits_dvs`, so that no file needs a download.
"""

import io
import struct
from pathlib import Path

import numpy as np

from data_prep.sources.digits import load
from data_prep.sources.digits_dvs import record
from pipeline.data.decode.events import Events

FORMATS = ("bin", "aedat2", "aedat3", "dat", "evt2", "evt3", "npz", "npy")
EXTENSION = {"aedat2": "aedat", "aedat3": "aedat", "evt2": "raw", "evt3": "raw"}
"""Of those formats that are not called by it."""


def recording(number: int) -> tuple[Events, int]:
    """The recording of a digit, and its label."""
    pixels, labels = load()
    return record(pixels[number], number), int(labels[number])


def rows(events: Events, start: int) -> list[tuple[int, int, int, int]]:
    return [(t + start, x, y, p) for t, x, y, p in zip(*(column.tolist() for column in events[:4]), strict=True)]


def write_bin(events: Events, start: int = 0) -> bytes:
    """x, y, then a bit of polarity and 23 bits of time, big-endian."""
    return b"".join(bytes([x, y]) + (p << 23 | t & 0x7FFFFF).to_bytes(3, "big") for t, x, y, p in rows(events, start))


def write_aedat2(events: Events, start: int = 0, is_turned: bool = False) -> bytes:
    """Address and time of 32 bits, big-endian. The address of a DVS128 counts from the lower right, and 1 is OFF; where
    the camera lies on its side, as for CIFAR10-DVS, its rows are the picture's columns."""
    head = b"#!AER-DAT2.0\r\n# This is a raw AE data file - do not edit\r\n# Data format is int32 address, int32 t\r\n"
    return head + b"".join(
        struct.pack(">II", (127 - row) << 8 | (127 - column) << 1 | (1 - p), t & 0xFFFFFFFF)
        for t, x, y, p in rows(events, start)
        for row, column in [(x, y) if is_turned else (y, x)]
    )


def packet(events: list[tuple[int, int, int, int]], overflow: int = 0, invalid: tuple[int, ...] = ()) -> bytes:
    """A packet of polarity events of AEDAT 3.1."""
    head = struct.pack("<hhiiiiii", 1, 1, 8, 4, overflow, len(events), len(events), len(events) - len(invalid))
    return head + b"".join(
        struct.pack("<II", x << 17 | y << 2 | p << 1 | (place not in invalid), t & 0x7FFFFFFF)
        for place, (t, x, y, p) in enumerate(events)
    )


AEDAT3_HEAD = (
    b"#!AER-DAT3.1\r\n#Format: RAW\r\n#Source 1: DVS128\r\n#Start-Time: 2016-08-31 10:51:53\r\n#!END-HEADER\r\n"
)
OTHER_PACKET = struct.pack("<hhiiiiii", 0, 1, 8, 4, 0, 1, 1, 1) + bytes(8)
"""A packet of special events, which are no pixels."""


def write_aedat3(events: Events, start: int = 0, per_packet: int = 100) -> bytes:
    parts, all_rows = [AEDAT3_HEAD, OTHER_PACKET], rows(events, start)
    for at in range(0, len(all_rows), per_packet):
        by_overflow: dict[int, list] = {}
        for row in all_rows[at : at + per_packet]:
            by_overflow.setdefault(row[0] >> 31, []).append(row)
        parts += [packet(some, overflow) for overflow, some in by_overflow.items()]
    return b"".join(parts)


def write_dat(events: Events, start: int = 0) -> bytes:
    head = b"% Data file containing CD events.\n% Version 2\n% Date 2018-11-16 10:25:00\n"
    head += f"% Height {events.height}\n% Width {events.width}\n".encode() + bytes([0x0C, 8])
    return head + b"".join(
        struct.pack("<II", t & 0xFFFFFFFF, x | y << 14 | p << 28) for t, x, y, p in rows(events, start)
    )


def write_evt2(events: Events, start: int = 0) -> bytes:
    parts = [f"% evt 2.0\n% geometry {events.width}x{events.height}\n% end\n".encode()]
    high = None
    for t, x, y, p in rows(events, start):
        if t >> 6 != high:
            high = t >> 6
            parts.append(struct.pack("<I", 8 << 28 | high & (1 << 28) - 1))
        parts.append(struct.pack("<I", p << 28 | (t & 63) << 22 | x << 11 | y))
    parts.append(struct.pack("<I", 0xA << 28 | 1))  # a trigger
    return b"".join(parts)


def write_evt3(events: Events, start: int = 0) -> bytes:
    """Events of one row, time and polarity, of rising columns, go into vectors where there are three or more."""
    head = f"% evt 3.0\n% format EVT3;height={events.height};width={events.width}\n% end\n".encode()
    words, state, todo = [], {}, rows(events, start)

    def tell(kind: int, value: int) -> None:
        if state.get(kind) != value:
            state[kind] = value
            words.append(kind << 12 | value)

    while todo:
        t, x, y, p = todo[0]
        num = 1
        while num < len(todo) and (todo[num][0], todo[num][2], todo[num][3]) == (t, y, p):
            if not todo[num - 1][1] < todo[num][1] < x + 20:
                break
            num += 1
        tell(8, t >> 12 & 0xFFF)
        tell(6, t & 0xFFF)
        tell(0, y)
        if num < 3:
            num = 1
            words.append(2 << 12 | p << 11 | x)
        else:
            columns = [row[1] - x for row in todo[:num]]
            words.append(3 << 12 | p << 11 | x)
            words.append(4 << 12 | sum(1 << column for column in columns if column < 12))
            words.append(5 << 12 | sum(1 << column - 12 for column in columns if column >= 12))
        todo = todo[num:]
    return head + struct.pack(f"<{len(words)}H", *words)


def write_npz(events: Events, start: int = 0) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, t=events.t + start, x=events.x, y=events.y, p=events.p)
    return stream.getvalue()


def structured(events: Events, start: int = 0) -> np.ndarray:
    array = np.zeros(len(events.t), dtype=[("x", "<i2"), ("y", "<i2"), ("t", "<i8"), ("p", "?")])
    for name, column in (("t", events.t + start), ("x", events.x), ("y", events.y), ("p", events.p)):
        array[name] = column
    return array


def write_npy(events: Events, start: int = 0) -> bytes:
    return npy(structured(events, start))


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


WRITERS = {
    "bin": write_bin, "aedat2": write_aedat2, "aedat3": write_aedat3, "dat": write_dat, "evt2": write_evt2,
    "evt3": write_evt3, "npz": write_npz, "npy": write_npy,
}  # fmt: skip


def write_classes(root: Path, format: str, num: int = 20, split: str = "") -> dict[str, Events]:
    """The first `num` digits as files CLASS/NUMBER.EXTENSION below `root`; returns the recordings by NUMBER."""
    found = {}
    for number in range(num):
        events, label = recording(number)
        path = root / split / str(label) / f"{number:04d}.{EXTENSION.get(format, format)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(WRITERS[format](events, start=1_000 + number))
        found[path.stem] = events
    return found


def write_gesture(root: Path, users: int = 3, gestures: int = 4) -> dict[str, tuple[Events, int]]:
    """A small data set in the layout of DVS128 Gesture: in each recording digits one after another, with pauses.

    Returns the gestures, and their classes from 1 on, by the names that their samples get.
    """
    root.mkdir(parents=True)
    found, names = {}, []
    for user in range(users):
        stem = f"user{user + 1:02d}_lab"
        names.append(f"{stem}.aedat")
        lines, all_rows, clock = ["class,startTime_usec,endTime_usec"], [], 80_000_000
        for place in range(gestures):
            events, label = recording(10 * user + place)
            all_rows += rows(events, clock)
            all_rows += [(clock + 500_000 + 1_000 * step, 5, 5, step % 2) for step in range(50)]  # between two gestures
            end = clock + int(events.t[-1]) + 1
            lines.append(f"{label + 1},{clock},{end}")
            found[f"{stem}_{place + 1:02d}"] = (events, label + 1)
            clock += 1_000_000
        packets = [packet(all_rows[at : at + 300]) for at in range(0, len(all_rows), 300)]
        packets.append(packet([(clock + step, 6, 6, 1) for step in range(20)]))  # behind the last gesture
        (root / f"{stem}.aedat").write_bytes(AEDAT3_HEAD + OTHER_PACKET + b"".join(packets))
        (root / f"{stem}_labels.csv").write_text("\n".join(lines) + "\n")
    (root / "trials_to_train.txt").write_text("\n".join(names[:-1]) + "\n")
    (root / "trials_to_test.txt").write_text(names[-1] + "\n")
    return found


def same(one: Events, other: Events) -> bool:
    """Whether the events are the same; their sensors may differ."""
    return all(np.array_equal(a, b) for a, b in zip(one[:4], other[:4], strict=True))
