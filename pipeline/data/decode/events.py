"""Recordings of event cameras in memory, and the bytes of one in a shard. Packing, verifying and training use it.

The bytes are little-endian: a header of 24 bytes, then one column for each field, without gaps.

    offset  type    what
    0       8 byte  magic: 89 43 48 49 45 56 54 0A, which is \\x89CHIEVT\\n
    8       u16     version, 1
    10      u8      bytes of a time step: 1, 2 or 4, the fewest that hold the longest one
    11      u8      bytes of a coordinate: 1 where the sensor is at most 256 wide and high, else 2
    12      u16     width of the sensor
    14      u16     height of the sensor
    16      u32     n, the number of events
    20      u32     CRC-32 of all other bytes
    24              n time steps: µs since the event before; the first is 0
                    n coordinates x, n coordinates y
                    ceil(n / 8) bytes of polarity, the first event in the lowest bit; the bits left over are 0

A recording of N-MNIST takes 4.1 bytes an event, in its own format 5. Decoding is a cumulative sum, two casts and an
unpacking of bits: no loop over events.
"""

import struct
import zlib
from typing import NamedTuple

import numpy as np

MAGIC = b"\x89CHIEVT\n"
VERSION = 1
EXTENSION = "events"
"""What the member of a sample is called in a shard: KEY.events, beside KEY.cls."""
MAX_SIDE = 65_535
"""Most pixels of a side of the sensor."""
MAX_GAP_US = (1 << 32) - 1
"""Longest time between two events in a row: 71 minutes."""
_HEADER, _CHECKSUM = struct.Struct("<8sHBBHHI"), struct.Struct("<I")
_BODY_AT = _HEADER.size + _CHECKSUM.size
_STEP_BYTES, _COORDINATE_BYTES = (1, 2, 4), (1, 2)


class Events(NamedTuple):
    """One recording: at least one event, in the order of time."""

    t: np.ndarray
    """`(n,)` int64: µs since the first event, which is at 0; never falling."""
    x: np.ndarray
    """`(n,)` uint16: column, below `width`; 0 is left."""
    y: np.ndarray
    """`(n,)` uint16: row, below `height`; 0 is the top."""
    p: np.ndarray
    """`(n,)` uint8: 1 where the pixel became brighter (ON), 0 where it became darker (OFF)."""
    width: int
    """Of the sensor, in pixels."""
    height: int


def encode(events: Events) -> bytes:
    """The bytes of `events`; `decode` gives back the same.

    Raises:
        ValueError: there is no event, the columns are of different lengths, a value is out of its range, time falls or
            does not begin at 0, or there are more than 71 minutes between two events.
    """
    width, height = int(events.width), int(events.height)
    _require_sensor(width, height)
    columns = [np.asarray(column) for column in events[:4]]
    for name, column in zip("txyp", columns, strict=True):
        if column.ndim != 1 or column.dtype.kind not in "iu":
            raise ValueError(f"{name} has shape {column.shape} of {column.dtype}, where (n,) of integers is needed")
    lengths = [len(column) for column in columns]
    if len(set(lengths)) > 1:
        raise ValueError(f"columns t, x, y, p of {', '.join(map(str, lengths))} events; they must be of one length")
    t, x, y, p = columns
    if not 0 < len(t) < 1 << 32:
        raise ValueError(f"{len(t)} events; a recording has 1 to 4,294,967,295")
    steps = np.diff(t.astype(np.int64), prepend=0)
    if steps[0] or (steps < 0).any():
        raise ValueError("time does not begin at 0, or falls; sort the events and subtract the first one's time")
    longest = int(steps.max())
    if longest > MAX_GAP_US:
        raise ValueError(f"{longest} µs between two events; at most {MAX_GAP_US} (71 minutes) are stored")
    for name, column, size in (("x", x, width), ("y", y, height), ("p", p, 2)):
        _require_below(name, column, size)
    step_bytes = next(num for num in _STEP_BYTES if longest < 1 << 8 * num)
    coordinate_bytes = 1 if max(width, height) <= 256 else 2
    body = b"".join(
        (
            steps.astype(f"<u{step_bytes}").tobytes(),
            x.astype(f"<u{coordinate_bytes}").tobytes(),
            y.astype(f"<u{coordinate_bytes}").tobytes(),
            np.packbits(p.astype(np.uint8), bitorder="little").tobytes(),
        )
    )
    head = _HEADER.pack(MAGIC, VERSION, step_bytes, coordinate_bytes, width, height, len(t))
    return head + _CHECKSUM.pack(zlib.crc32(body, zlib.crc32(head))) + body


def decode(data: bytes | bytearray | memoryview | np.ndarray) -> Events:
    """The recording that `encode` wrote; its arrays are new, and may be changed.

    Args:
        data: all of its bytes; an array must be uint8 and contiguous.

    Raises:
        ValueError: these are not the whole, undamaged bytes of one recording; the message is one line.
    """
    view = memoryview(data.data if isinstance(data, np.ndarray) else data).cast("B")
    if len(view) < _BODY_AT or view[:8] != MAGIC:
        raise ValueError(f"no recording of events: its {len(view)} bytes do not begin with the header of one")
    _, version, step_bytes, coordinate_bytes, width, height, num = _HEADER.unpack_from(view)
    if version != VERSION:
        raise ValueError(f"events of version {version}; this program reads version {VERSION}")
    if step_bytes not in _STEP_BYTES or coordinate_bytes not in _COORDINATE_BYTES or not num:
        raise ValueError(
            f"a damaged header of events: {num} events with times of {step_bytes} bytes, coordinates of "
            f"{coordinate_bytes}"
        )
    _require_sensor(width, height)
    needed = _BODY_AT + num * (step_bytes + 2 * coordinate_bytes) + -(-num // 8)
    if len(view) != needed:
        raise ValueError(f"{len(view)} bytes of events, where the header says {num} events in {needed} bytes")
    if (zlib.crc32(view[_BODY_AT:], zlib.crc32(view[: _HEADER.size])),) != _CHECKSUM.unpack_from(view, _HEADER.size):
        raise ValueError("damaged events: their bytes do not fit their checksum")
    at, columns = _BODY_AT, []
    for size in (step_bytes, coordinate_bytes, coordinate_bytes):
        columns.append(np.frombuffer(view, dtype=f"<u{size}", count=num, offset=at))
        at += num * size
    steps, x, y = columns
    p = np.unpackbits(np.frombuffer(view, dtype=np.uint8, offset=at), count=num, bitorder="little")
    _require_below("x", x, width)
    _require_below("y", y, height)
    if steps[0]:
        raise ValueError(f"damaged events: the first is at {steps[0]} µs, not at 0")
    return Events(np.cumsum(steps, dtype=np.int64), x.astype(np.uint16), y.astype(np.uint16), p, width, height)


def _require_sensor(width: int, height: int) -> None:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise ValueError(f"a sensor of {width}x{height} pixels; a side has 1 to {MAX_SIDE}")


def _require_below(name: str, column: np.ndarray, size: int) -> None:
    """`ValueError` where a value of `column` is not in [0, size)."""
    wrong = (column >= size) if column.dtype.kind == "u" else (column < 0) | (column >= size)
    if wrong.any():
        place = int(wrong.argmax())
        raise ValueError(f"{name}={column[place]} in event {place}, where 0 to {size - 1} are allowed")
