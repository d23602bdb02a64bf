"""The formats of event cameras: the bytes of a file → its events.

    .bin    N-MNIST, N-Caltech101: 40 bits an event, big-endian (Orchard et al. 2015)
    .aedat  AEDAT 2.0 of a DVS128, as CIFAR10-DVS has it, and 3.1, as DVS128 Gesture has it (inivation's specifications)
    .dat    Prophesee DAT, change detection events
    .raw    Prophesee EVT 2.0 and 3.0
    .npz    arrays named x, y, t, p, or one structured array; .npy: a structured array

All are read by numpy without a loop over events. tonic's readers check nothing and need librosa to install;
expelliarmus does not return from a .dat that was cut. The tests compare with both on whole files.
"""

import io
import math
import re
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from data_prep.images import Inspected, RefusedError
from pipeline.data.decode.events import EXTENSION, Events, encode

EXTENSIONS = frozenset(("bin", "aedat", "dat", "raw", "npz", "npy"))
"""Of the files that are recordings."""
DVS128 = (128, 128)
TIME_UNITS = {"us": 1, "ms": 1_000, "s": 1_000_000}
"""Microseconds of each unit that times in .npz and .npy may have."""
SORTED, INVALID, UNTIMED = (
    "events out of the order of time were sorted",
    "events marked as invalid, or of no pixel, were left out",
    "events before the first time of the file were left out",
)
"""Warnings of recordings that are kept."""
_MAX_HEADER = 4 << 20  # bytes; jAER writes all its preferences into one
_EVT_END, _EVT_LINE = re.compile(rb"\n% end[ \t\r]*\n"), re.compile(rb"%(?: [^\x00-\x08\x0b\x0c\x0e-\x1f\n]*)?\r?\n")
_MAX_UNPACKED = 1 << 30  # bytes of an array in an .npz
_SOURCES = {"DVS128": DVS128, "DAVIS240": (240, 180), "DAVIS346": (346, 260)}  # of AEDAT 3.1, width and height
MAX_EVENTS = 1 << 26
"""Most events of an EVT 3.0, whose words may be twelve events each: bounds the memory of a worker."""
_JITTER_US = 1 << 16  # that events may come late
_PACKET = struct.Struct("<hhiiiiii")
_POLARITY_EVENT = 1
_NAMES = {
    "t": ("t", "ts", "time", "times", "timestamp", "timestamps"),
    "x": ("x",),
    "y": ("y",),
    "p": ("p", "pol", "polarity", "polarities"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What files do not say of themselves."""

    sensor: tuple[int, int] | None = None
    """Width and height; None: as the file or its format says."""
    time_unit: str = "us"
    """Of .npz and .npy, a key of `TIME_UNITS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Raw:
    """What lies in a file, in its order."""

    t: np.ndarray
    """int64, in µs from any point."""
    x: np.ndarray
    y: np.ndarray
    p: np.ndarray
    """0 and 1, or -1 and 1."""
    format: str
    sensor: tuple[int, int] | None = None
    """Width and height, where the file or its format says them."""
    guessed_sensor: bool = False
    """Whether files of this format may be of others."""
    warnings: dict[str, int] = field(default_factory=dict)
    """Of how many events each warning is."""


def convert(name: str, data: memoryview, settings: Settings) -> Inspected:
    """The recording in the file `name`, of the bytes `data`, as it is stored.

    Raises:
        RefusedError: it is cut, empty, of another format, or holds what no recording can.
    """
    if not len(data):
        raise RefusedError("empty file")
    return inspected(_READERS[name.rsplit(".", 1)[-1].casefold()](data, settings), settings)


def inspected(raw: Raw, settings: Settings) -> Inspected:
    """The recording as it is stored: in the order of time, polarity 0 or 1, on a known sensor."""
    sensor = settings.sensor or raw.sensor
    if sensor is None:
        raise RefusedError("the file does not say the size of its sensor; give it, such as --sensor 128x128")
    if not len(raw.t):
        raise RefusedError("holds no event")
    warnings, t, x, y = raw.warnings, raw.t, raw.x, raw.y
    p = _polarity(raw.p)
    if (t[1:] < t[:-1]).any():
        warnings = {**warnings, SORTED: int((t < np.maximum.accumulate(t)).sum())}
        order = np.argsort(t, kind="stable")
        t, x, y, p = t[order], x[order], y[order], p[order]
    try:
        data = encode(Events(t - t[0], x, y, p, *sensor))
    except ValueError as error:
        is_guessed = settings.sensor is None and raw.guessed_sensor
        mend = "; of a larger sensor give its size, such as --sensor 240x180 for N-Caltech101" if is_guessed else ""
        raise RefusedError(f"{error} ({sensor[0]}x{sensor[1]} pixels){mend}") from None
    kinds, nums = (raw.format,), tuple(warnings.values())
    return Inspected(EXTENSION, sensor[1], sensor[0], kinds, data, tuple(warnings), nums)


def _polarity(p: np.ndarray) -> np.ndarray:
    if p.dtype == bool:
        return p.astype(np.uint8)
    low, high = p.min(), p.max()
    if low == -1 and high <= 1 and not (p == 0).any():
        return (p == 1).astype(np.uint8)
    if low < 0 or high > 1 or not ((p == 0) | (p == 1)).all():
        raise RefusedError(f"polarities from {low} to {high}; they must be 0 and 1, or -1 and 1")
    return p.astype(np.uint8)


def _unwrapped(t: np.ndarray, bits: int, jitter: int = _JITTER_US) -> np.ndarray:
    """`t` as int64 without the wraps of a counter of so many bits: a fall by more than half its range is one.

    A rise is a quiet time, however long. Only across a wrap, from within `jitter` behind it to within `jitter` before
    it, a rise is an event that comes late.
    """
    t, size = t.astype(np.int64), 1 << bits
    turns = np.zeros(len(t), np.int64)
    turns[1:] = t[1:] - t[:-1] < -size // 2
    turns[1:] -= (t[:-1] < jitter) & (t[1:] >= size - jitter) & (np.cumsum(turns)[:-1] > 0)
    return t + np.cumsum(turns) * size


def _warning(text: str, events: np.ndarray) -> dict[str, int]:
    """`text` with the number of those of the `events` that it is about; nothing where it is about none."""
    num = int(np.count_nonzero(events))
    return {text: num} if num else {}


def _whole(data: memoryview, at: int, dtype: np.dtype | str, what: str) -> np.ndarray:
    """The records from byte `at` to the end; `RefusedError` where the last is cut."""
    size = np.dtype(dtype).itemsize
    if rest := (len(data) - at) % size:
        raise RefusedError(f"truncated: {rest} bytes behind the last whole {what} of {size} bytes")
    return np.frombuffer(data, dtype=dtype, offset=at)


def _read_bin(data: memoryview, settings: Settings) -> Raw:
    columns = _whole(data, 0, "(5,)u1", "event").astype(np.int64)
    x, y, p = columns[:, 0], columns[:, 1], columns[:, 2] >> 7
    t = (columns[:, 2] & 127) << 16 | columns[:, 3] << 8 | columns[:, 4]
    overflows = y == 240  # no event: later times are 2^13 µs more
    if overflows.any() and settings.sensor and settings.sensor[1] > 240:
        raise RefusedError(
            f"{int(overflows.sum())} events in row 240, which this format also uses as the mark of an overflow of its "
            "clock: on a sensor of more than 240 rows they cannot be told apart; convert it, for instance to .npz"
        )
    if overflows.any():
        t = t + np.cumsum(overflows) * (1 << 13)
        t, x, y, p = (column[~overflows] for column in (t, x, y, p))
    else:
        t = _unwrapped(t, 23)
    return Raw(t=t, x=x, y=y, p=p, format="N-MNIST bin", sensor=(34, 34), guessed_sensor=True)


def text_header(data: memoryview, mark: bytes, last: bytes | None = None) -> tuple[bytes, int]:
    """The lines at the start that begin with `mark`, up to the one that is `last`, and the offset behind them."""
    head, at = bytes(data[:_MAX_HEADER]), 0
    while head[at : at + 1] == mark:
        start, at = at, head.find(b"\n", at) + 1
        if not at:
            over = f"its header has more than {_MAX_HEADER} bytes; remove the longest lines of it"
            raise RefusedError("truncated: it ends in its header" if len(head) == len(data) else over)
        if last is not None and head[start:at].strip() == last:
            break
    return head[:at], at


def _read_aedat(data: memoryview, settings: Settings) -> Raw:
    start = bytes(data[:16])
    if start.startswith(b"#!AER-DAT2"):
        return _read_aedat2(data)
    if start.startswith(b"#!AER-DAT3.1"):
        header, at = text_header(data, b"#", b"#!END-HEADER")
        found = [size for name, size in _SOURCES.items() if re.search(rb"#Source \d+: " + name.encode(), header)]
        packets, end = walk_packets(data, at)
        if end < len(data):
            raise RefusedError(f"truncated: {len(data) - end} bytes behind the last whole packet")
        return read_packets(data, packets, sensor=found[0] if found else None)
    raise RefusedError("not AEDAT 2.0 or 3.1, the versions that are read; convert it, for instance to .npz")


def _read_aedat2(data: memoryview) -> Raw:
    """Of a DVS128. x and y are as in SpikingJelly's CIFAR10-DVS: upright pictures with 0, 0 at the top left."""
    header, at = text_header(data, b"#")
    mend = "convert it, for instance to .npz"
    chip = re.search(rb"^# *AEChip: *(\S+)", header, re.MULTILINE)
    if chip and b"dvs128" not in chip[1].lower():
        name = chip[1].rsplit(b".", 1)[-1].decode("utf-8", "replace")
        raise RefusedError(f"AEDAT 2.0 of the camera {name}, whose addresses are others than a DVS128's; {mend}")
    events = _whole(data, at, np.dtype([("address", ">u4"), ("t", ">u4")]), "event")
    address, is_pixel = events["address"].astype(np.int64), events["address"] < 1 << 15
    if 2 * (num := int(is_pixel.sum())) < len(is_pixel):
        num = len(is_pixel) - num
        raise RefusedError(f"{num} of {len(is_pixel)} events have addresses that no pixel of a DVS128 has; {mend}")
    t = _unwrapped(events["t"], 32)
    warnings = _warning(INVALID, ~is_pixel)
    address, t = address[is_pixel], t[is_pixel]
    x, y, p = 127 - (address >> 8 & 127), 127 - (address >> 1 & 127), 1 - (address & 1)
    return Raw(t=t, x=x, y=y, p=p, format="AEDAT 2.0", sensor=DVS128, warnings=warnings)


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
    warnings = _warning(INVALID, ~valid)
    word, t = word[valid], t[valid]
    x, y, p = word >> 17 & 0x7FFF, word >> 2 & 0x7FFF, word >> 1 & 1
    return Raw(t=t, x=x, y=y, p=p, format="AEDAT 3.1", sensor=sensor, warnings=warnings)


def _size_in(header: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a Prophesee file: "% Width 304", or "geometry 1280x720", or "width=1280"."""
    if found := re.search(rb"geometry[ :]+(\d{1,6})x(\d{1,6})", header, re.IGNORECASE):
        return int(found[1]), int(found[2])
    sides = [re.search(side + rb"[ :=]+(\d{1,6})", header, re.IGNORECASE) for side in (b"width", b"height")]
    return (int(sides[0][1]), int(sides[1][1])) if sides[0] and sides[1] else None


def _read_dat(data: memoryview, settings: Settings) -> Raw:
    header, at = text_header(data, b"%")
    version = re.search(rb"^% *Version +([0-9]{1,9})", header, re.MULTILINE | re.IGNORECASE)
    if version and int(version[1]) < 2:
        raise RefusedError(
            f"DAT of version {int(version[1])}, which packs coordinates in other bits than version 2; convert it, for "
            "instance to .npz"
        )
    kind = bytes(data[at : at + 2])
    if len(kind) < 2 or kind[0] not in (0x00, 0x0C) or kind[1] != 8:
        raise RefusedError("not a DAT of change detection events of 8 bytes")
    events = _whole(data, at + 2, np.dtype([("t", "<u4"), ("word", "<u4")]), "event")
    word = events["word"].astype(np.int64)
    x, y, p = word & 0x3FFF, word >> 14 & 0x3FFF, word >> 28
    return Raw(t=_unwrapped(events["t"], 32), x=x, y=y, p=p, format="DAT", sensor=_size_in(header))


def _evt_header(data: memoryview) -> tuple[bytes, int]:
    """The header of an EVT and the offset behind it: up to its end, or where it has none all lines of text.

    The first of the words behind such a header may begin with the byte "%", but it is no line of text.
    """
    head, at = bytes(data[:_MAX_HEADER]), 0
    if head[:1] == b"%" and (end := _EVT_END.search(head)):
        return head[: end.end()], end.end()
    while line := _EVT_LINE.match(head, at):
        at = line.end()
    return head[:at], at


def _read_raw(data: memoryview, settings: Settings) -> Raw:
    header, at = _evt_header(data)
    version = re.search(rb"% (?:evt (\d\.\d)|format EVT(\d+))", header, re.IGNORECASE)
    number = (version[1] or version[2]).rstrip(b"0").rstrip(b".").decode() if version else "none"
    if number not in ("2", "3"):
        raise RefusedError(f"not EVT 2.0 or 3.0, the formats that are read (its header says {number})")
    return (_read_evt2 if number == "2" else _read_evt3)(data, at, _size_in(header))


def _last(is_mark: np.ndarray) -> np.ndarray:
    """For every place the last one up to it where `is_mark`; -1 where there is none."""
    return np.maximum.accumulate(np.where(is_mark, np.arange(len(is_mark)), -1))


def _high_times(words: np.ndarray, is_high: np.ndarray, bits: int) -> np.ndarray:
    """At each word the time that the last TIME_HIGH word up to it says, without its wraps; meaningless before."""
    highs = np.zeros(len(words), np.int64)
    if is_high.any():
        highs[is_high] = _unwrapped(words[is_high], bits, jitter=0)
    return highs[np.maximum(_last(is_high), 0)]


def _read_evt2(data: memoryview, at: int, sensor: tuple[int, int] | None) -> Raw:
    words = _whole(data, at, "<u4", "word").astype(np.int64)
    kind = words >> 28
    is_high = kind == 8
    highs = _high_times(words & (1 << 28) - 1, is_high, 28)
    is_event = kind <= 1
    timed = is_event & (_last(is_high) >= 0)
    event, t = words[timed], highs[timed] << 6 | words[timed] >> 22 & 63
    warnings = _warning(UNTIMED, is_event & ~timed)
    x, y, p = event >> 11 & 0x7FF, event & 0x7FF, event >> 28
    return Raw(t=t, x=x, y=y, p=p, format="EVT 2.0", sensor=sensor, warnings=warnings)


@dataclass(slots=True)
class _Evt3State:
    """What the words so far have set; -1: not yet."""

    high: int = -1
    """Without its wraps."""
    clock: int = -1
    row: int = -1
    column: int = -1
    """Where the next vector begins."""
    p: int = -1
    """Of the vectors."""


def _read_evt3(data: memoryview, at: int, sensor: tuple[int, int] | None, slice_words: int = 1 << 16) -> Raw:
    """EVT 3.0: words of 16 bits, of which some set row, time, or first column of the vectors of events that follow.

    Args:
        slice_words: words that are decoded at a time: a word may be twelve events.
    """
    words, state = _whole(data, at, "<u2", "word"), _Evt3State()
    parts, num, num_timed = [(np.zeros(0, np.int64),) * 4], 0, 0
    for start in range(0, len(words), slice_words):
        part, num_found = _evt3_slice(words[start : start + slice_words], state)
        parts.append(part)
        num, num_timed = num + num_found, num_timed + len(part[0])
        if num_timed > MAX_EVENTS:
            raise RefusedError(f"more than {MAX_EVENTS} events; cut the recording into shorter ones")
    t, x, y, p = (np.concatenate(column) for column in zip(*parts[1:] or parts, strict=True))
    warnings = {UNTIMED: num - num_timed} if num > num_timed else {}
    return Raw(t=t, x=x, y=y, p=p, format="EVT 3.0", sensor=sensor, warnings=warnings)


def _evt3_slice(words: np.ndarray, state: _Evt3State) -> tuple[tuple[np.ndarray, ...], int]:
    """t, x, y, p of the events of `words` whose time and place are known, and how many there are in all.

    `state` is what the words before have set, and is brought to the end of these.
    """
    kind, low = words >> 12, words.astype(np.int64) & 0xFFF
    is_single, is_base, is_12, is_8 = (kind == number for number in (2, 3, 4, 5))
    first = max(state.high, 0)
    highs = np.zeros(len(words), np.int64)
    marks = np.concatenate((np.array([first & 0xFFF]), low[kind == 8]))
    highs[kind == 8] = _unwrapped(marks, 12, jitter=0)[1:] + (first >> 12 << 12)
    high = _held(highs, kind == 8, state.high)
    # Another high part starts the low one at 0, as in Prophesee's OpenEB, if any was read so far.
    is_low, before = kind == 6, np.concatenate((np.array([state.high]), high[:-1]))
    restarts = (high != before) & ((_last(is_low) >= 0) | (state.clock >= 0))
    clock, row = _held(low * is_low, is_low | restarts, state.clock), _held(low & 0x7FF, kind == 0, state.row)
    widths = 12 * is_12 + 8 * is_8
    # A vector begins where the last base says, moved by the vectors in between.
    moved = np.cumsum(widths) - widths
    column = _held((low & 0x7FF) - moved, is_base, state.column) + moved
    vector_p = _held(low >> 11, is_base, state.p)
    known = (row >= 0) & (clock >= 0) & (high >= 0) & (is_single | (vector_p >= 0))
    state.high, state.clock, state.row, state.p = (int(held[-1]) for held in (high, clock, row, vector_p))
    state.column = int(column[-1] + widths[-1])

    bits = np.where(is_single, 1, low * is_12 + (low & 0xFF) * is_8).astype("<u2")
    events = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))  # 16 places a word
    num, events = len(events), events[known[events >> 4]]
    place, is_single = events >> 4, is_single[events >> 4]
    x = np.where(is_single, low[place] & 0x7FF, column[place] + (events & 15)).astype(np.int32)
    p = np.where(is_single, low[place] >> 11, vector_p[place]).astype(np.uint8)
    return (high[place] << 12 | clock[place], x, row[place].astype(np.uint16), p), num


def _held(values: np.ndarray, is_set: np.ndarray, before: int) -> np.ndarray:
    """At every place the last of `values` up to it where `is_set`; `before` where there is none."""
    last = _last(is_set)
    return np.where(last >= 0, values[last], before)


def _read_npy(data: bytes | memoryview) -> np.ndarray:
    """The array in an .npy; nothing in it is executed, and no more memory is taken than it has bytes."""
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except Exception as error:  # broken bytes make the parser of a header raise any exception
        raise RefusedError(f"not an array of numpy: {' '.join(str(error).split())[:200]}") from None
    if dtype.hasobject:
        raise RefusedError("holds Python objects, which are not read: they could run any code")
    if not dtype.itemsize or not all(type(side) is int and 0 <= side < 1 << 48 for side in shape):
        raise RefusedError(f"damaged: its header says an array of {shape}, of elements of {dtype.itemsize} bytes"[:300])
    needed = math.prod(shape) * dtype.itemsize
    if needed != len(data) - stream.tell():
        raise RefusedError(f"truncated or damaged: {len(data) - stream.tell()} bytes, its header says {needed}")
    try:
        flat = np.frombuffer(data, dtype=dtype, offset=stream.tell())
        return flat.reshape(shape, order="F" if fortran else "C")
    except ValueError as error:  # of sides that are too many, or together too long
        raise RefusedError(f"damaged: an array of {shape}: {error}"[:300]) from None


def _read_npz(data: memoryview, settings: Settings) -> Raw:
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for entry in archive.infolist():
                if entry.filename.endswith(".npy"):
                    if entry.file_size > _MAX_UNPACKED:
                        raise RefusedError(f"{entry.filename} would unpack to {entry.file_size} bytes")
                    arrays[entry.filename.removesuffix(".npy")] = _read_npy(archive.read(entry))
    except RefusedError:
        raise
    except Exception as error:  # broken bytes make the parser of a zip raise any exception
        raise RefusedError(f"truncated or damaged: {' '.join(str(error).split())[:200]}") from None
    if len(arrays) == 1 and (only := next(iter(arrays.values()))).dtype.names:
        return _from_columns({name: only[name] for name in only.dtype.names}, settings, "npz")
    return _from_columns(arrays, settings, "npz")


def _read_structured(data: memoryview, settings: Settings) -> Raw:
    array = _read_npy(data)
    if not array.dtype.names:
        raise RefusedError(
            f"a plain array of {array.shape}, whose columns have no names; save a structured array with x, y, t, p"
        )
    return _from_columns({name: array[name] for name in array.dtype.names}, settings, "npy")


def _from_columns(columns: dict[str, np.ndarray], settings: Settings, format: str) -> Raw:
    found = {}
    for name, known in _NAMES.items():
        named = [column for called, column in columns.items() if called.casefold() in known]
        if len(named) != 1:
            there = ", ".join(sorted(columns)) or "no arrays"
            raise RefusedError(
                f"{len(named)} arrays are called {' or '.join(known)}, where one must be; it has {there}"
            )
        found[name] = named[0]
    shapes = {column.shape for column in found.values()}
    if len(shapes) > 1 or len(shapes.copy().pop()) != 1:
        raise RefusedError(f"x, y, t, p of the shapes {sorted(shapes)}; they must be (n,) and alike")
    t = _integers("t", found["t"], TIME_UNITS[settings.time_unit])
    x, y, p = (_integers(name, found[name], 1) for name in "xyp")
    return Raw(t=t, x=x, y=y, p=p, format=format)


def _integers(name: str, column: np.ndarray, factor: int) -> np.ndarray:
    """`column` times `factor` as int64; `RefusedError` where that loses something."""
    if column.dtype.kind not in "biuf":
        raise RefusedError(f"{name} is {column.dtype}, not numbers")
    if column.dtype.kind == "f":
        scaled = column.astype(np.float64) * factor
        rounded = np.rint(scaled)
        if not (np.abs(scaled) < 2**53).all() or (np.abs(scaled - rounded) > _rounding(column, factor)).any():
            what = "µs; --time-unit says what t is in (us, ms or s)" if name == "t" else name
            if factor > 1:
                what += (
                    f"; {column.dtype} may be too coarse for µs at such times: subtract the first one before you save"
                )
            raise RefusedError(f"{name} holds values that are no whole numbers of {what}")
        return rounded.astype(np.int64)
    if len(column) and (int(column.max()) * factor >= 1 << 62 or int(column.min()) * factor <= -(1 << 62)):
        raise RefusedError(f"{name} goes up to {column.max()}, which is no time or place of an event")
    return column.astype(np.int64) * factor


def _rounding(column: np.ndarray, factor: int) -> np.ndarray | float:
    """How far times in seconds or milliseconds may be from whole µs: as far as their type rounds, up to 1/4 µs."""
    step = np.spacing(np.abs(column)).astype(np.float64) * factor  # to the next number that the type has
    return np.where((factor > 1) & (step <= 0.25), np.maximum(0.01, 1.1 * step), 0.01)


_READERS: dict[str, Callable[[memoryview, Settings], Raw]] = {
    "bin": _read_bin,
    "aedat": _read_aedat,
    "dat": _read_dat,
    "raw": _read_raw,
    "npz": _read_npz,
    "npy": _read_structured,
}
