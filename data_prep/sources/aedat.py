"""AEDAT: 2.0 of a DVS128, as CIFAR10-DVS has it, 3.1, as DVS128 Gesture has it (inivation's specifications), and 4, of
DV, by the package aedat.
"""

import os
import re
import struct
from dataclasses import dataclass

import numpy as np

from data_prep.images import RefusedError
from data_prep.sources.event_raw import DVS128, INVALID, Raw, text_header, unwrapped, warned, whole

_SOURCES = {"DVS128": DVS128, "DAVIS240": (240, 180), "DAVIS346": (346, 260)}  # of 3.1, width and height
_PACKET = struct.Struct("<hhiiiiii")
_POLARITY_EVENT = 1


def read_aedat(data: memoryview, name: str) -> Raw:
    """Of the file `name`: those of CIFAR10-DVS, which are called cifar10_…, are turned."""
    start = bytes(data[:16])
    if start.startswith(b"#!AER-DAT2"):
        return _read_aedat2(data, name.rpartition("/")[2].startswith("cifar10_"))
    if start.startswith(b"#!AER-DAT3.1"):
        header, at = text_header(data, b"#", b"#!END-HEADER")
        found = [size for name, size in _SOURCES.items() if re.search(rb"#Source \d+: " + name.encode(), header)]
        packets, end = walk_packets(data, at)
        if end < len(data):
            raise RefusedError(f"truncated: {len(data) - end} bytes behind the last whole packet")
        return read_packets(data, packets, sensor=found[0] if found else None)
    if start.startswith(b"#!AER-DAT4"):
        return _read_aedat4(data)
    raise RefusedError("not AEDAT 2.0, 3.1 or 4, the versions that are read; convert it, for instance to .npz")


def _read_aedat4(data: memoryview) -> Raw:
    """The one stream of events in it; frames, motion and triggers are left out."""
    try:
        import aedat
    except ImportError:
        raise RefusedError(
            "AEDAT 4 needs the package aedat, which is not installed; run: python -m pip install 'chispike[events]'"
        ) from None
    # The package opens paths alone: a file in memory has one, and is gone whatever happens.
    with os.fdopen(os.memfd_create("aedat4"), "wb") as file:
        file.write(data)
        file.flush()
        try:
            decoder = aedat.Decoder(f"/proc/self/fd/{file.fileno()}")
            streams = {number: one for number, one in decoder.id_to_stream().items() if one["type"] == "events"}
            if len(streams) != 1:
                raise RefusedError(f"holds {len(streams)} streams of events; write one to a file of its own")
            parts = [packet["events"] for packet in decoder if "events" in packet]
        except BaseException as error:
            # What its Rust code did not expect is no Exception.
            if isinstance(error, RuntimeError) or type(error).__name__ == "PanicException":
                raise RefusedError(f"damaged or cut: {error}") from None
            raise
    if not parts:
        raise RefusedError("holds no event")
    events, (stream,) = np.concatenate(parts), streams.values()
    sensor = int(stream["width"]), int(stream["height"])
    t = events["t"].astype(np.int64)
    return Raw(t=t, x=events["x"], y=events["y"], p=events["on"], format="AEDAT 4", sensor=sensor)


def _read_aedat2(data: memoryview, is_turned: bool) -> Raw:
    """Of a DVS128, whose addresses count columns from the right and rows from below, as jAER shows them.

    Args:
        data: the file.
        is_turned: the camera lay on its side, as for CIFAR10-DVS; columns are then rows, as SpikingJelly has them.
    """
    header, at = text_header(data, b"#")
    mend = "convert it, for instance to .npz"
    chip = re.search(rb"^# *AEChip: *(\S+)", header, re.MULTILINE)
    if chip and b"dvs128" not in chip[1].lower():
        name = chip[1].rsplit(b".", 1)[-1].decode("utf-8", "replace")
        raise RefusedError(f"AEDAT 2.0 of the camera {name}, whose addresses are others than a DVS128's; {mend}")
    events = whole(data, at, np.dtype([("address", ">u4"), ("t", ">u4")]), "event")
    address, is_pixel = events["address"].astype(np.int64), events["address"] < 1 << 15
    if 2 * (num := int(is_pixel.sum())) < len(is_pixel):
        num = len(is_pixel) - num
        raise RefusedError(f"{num} of {len(is_pixel)} events have addresses that no pixel of a DVS128 has; {mend}")
    t = unwrapped(events["t"], 32)
    warnings = warned(INVALID, ~is_pixel)
    address, t = address[is_pixel], t[is_pixel]
    x, y, p = 127 - (address >> 1 & 127), 127 - (address >> 8 & 127), 1 - (address & 1)
    x, y, format = (y, x, "AEDAT 2.0 of CIFAR10-DVS") if is_turned else (x, y, "AEDAT 2.0")
    return Raw(t=t, x=x, y=y, p=p, format=format, sensor=DVS128, warnings=warnings)


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet of AEDAT 3.1."""

    at: int
    """Offset of its header."""
    end: int
    kind: int
    """Type of its events."""
    size: int
    """Bytes of an event."""
    num: int
    overflow: int
    """How often the 31 bits of the time had wrapped."""

    def columns(self, data: memoryview) -> np.ndarray:
        """Of a packet of polarity events, `(num, 2)` uint32: data and time."""
        flat = np.frombuffer(data, dtype="<u4", count=self.num * 2, offset=self.at + _PACKET.size)
        return flat.reshape(-1, 2)

    def times(self, data: memoryview) -> np.ndarray:
        """In µs, `(num,)` int64."""
        return self.columns(data)[:, 1].astype(np.int64) + (self.overflow << 31)


def walk_packets(data: memoryview, at: int) -> tuple[list[Packet], int]:
    """The packets of polarity events from byte `at`, and where the last whole packet of any kind ends."""
    packets = []
    while at + _PACKET.size <= len(data):
        kind, _, size, _, overflow, capacity, num, _ = _PACKET.unpack_from(data, at)
        if size <= 0 or capacity <= 0 or not 0 <= num <= capacity or overflow < 0:
            raise RefusedError(f"damaged: a packet of {num} events of {size} bytes at byte {at}")
        end = at + _PACKET.size + capacity * size
        if end > len(data):
            break
        if kind == _POLARITY_EVENT:
            if size != 8:
                raise RefusedError(f"damaged: polarity events of {size} bytes at byte {at}, where they have 8")
            packets.append(Packet(at, end, kind, size, num, overflow))
        at = end
    return packets, at


def read_packets(
    data: memoryview, packets: list[Packet], sensor: tuple[int, int] | None, between: tuple[int, int] | None = None
) -> Raw:
    """The valid events of these packets; with `between` only those from its first time on and before its second."""
    columns = [packet.columns(data) for packet in packets] or [np.zeros((0, 2), np.uint32)]
    times = [packet.times(data) for packet in packets] or [np.zeros(0, np.int64)]
    word, t = np.concatenate(columns)[:, 0].astype(np.int64), np.concatenate(times)
    if between is not None:
        within = (t >= between[0]) & (t < between[1])
        word, t = word[within], t[within]
    valid = word & 1 == 1
    warnings = warned(INVALID, ~valid)
    word, t = word[valid], t[valid]
    x, y, p = word >> 17 & 0x7FFF, word >> 2 & 0x7FFF, word >> 1 & 1
    return Raw(t=t, x=x, y=y, p=p, format="AEDAT 3.1", sensor=sensor, warnings=warnings)
