"""Prophesee's formats: DAT with change detection events, and EVT 2.0 and 3.0 (its descriptions; OpenEB's decoders)."""

import re
from dataclasses import dataclass

import numpy as np

from data_prep.images import RefusedError
from data_prep.sources.event_raw import MAX_HEADER, UNTIMED, Raw, text_header, unwrapped, warned, whole

MAX_EVENTS = 1 << 26
"""Most events of an EVT 3.0, whose words may be twelve events each: bounds the memory of a worker."""
_EVT_END, _EVT_LINE = re.compile(rb"\n% end[ \t\r]*\n"), re.compile(rb"%(?: [^\x00-\x08\x0b\x0c\x0e-\x1f\n]*)?\r?\n")


def _size_in(header: bytes) -> tuple[int, int] | None:
    """Width and height in the header of a Prophesee file: "% Width 304", or "geometry 1280x720", or "width=1280"."""
    if found := re.search(rb"geometry[ :]+(\d{1,6})x(\d{1,6})", header, re.IGNORECASE):
        return int(found[1]), int(found[2])
    sides = [re.search(side + rb"[ :=]+(\d{1,6})", header, re.IGNORECASE) for side in (b"width", b"height")]
    return (int(sides[0][1]), int(sides[1][1])) if sides[0] and sides[1] else None


def read_dat(data: memoryview) -> Raw:
    header, at = text_header(data, b"%")
    version = re.search(rb"^% *Version +([0-9]{1,9})", header, re.MULTILINE | re.IGNORECASE)
    number = int(version[1]) if version else 2
    if number not in (1, 2):
        raise RefusedError(f"DAT of version {number}; 1 and 2 are read; convert it, for instance to .npz")
    kind = bytes(data[at : at + 2])
    if len(kind) < 2 or kind[0] not in (0x00, 0x0C) or kind[1] != 8:
        raise RefusedError("not a DAT of change detection events of 8 bytes")
    events = whole(data, at + 2, np.dtype([("t", "<u4"), ("word", "<u4")]), "event")
    word = events["word"].astype(np.int64)
    if number == 1:
        x, y, p = word & 0x1FF, word >> 9 & 0xFF, word >> 17 & 1
    else:
        x, y, p = word & 0x3FFF, word >> 14 & 0x3FFF, word >> 28
    return Raw(t=unwrapped(events["t"], 32), x=x, y=y, p=p, format=f"DAT {number}", sensor=_size_in(header))


def _evt_header(data: memoryview) -> tuple[bytes, int]:
    """The header of an EVT and the offset behind it: up to its end, or where it has none all lines of text.

    The first of the words behind such a header may begin with the byte "%", but it is no line of text.
    """
    head, at = bytes(data[:MAX_HEADER]), 0
    if head[:1] == b"%" and (end := _EVT_END.search(head)):
        return head[: end.end()], end.end()
    while line := _EVT_LINE.match(head, at):
        at = line.end()
    return head[:at], at


def read_evt(data: memoryview) -> Raw:
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
        highs[is_high] = unwrapped(words[is_high], bits, jitter=0)
    return highs[np.maximum(_last(is_high), 0)]


def _read_evt2(data: memoryview, at: int, sensor: tuple[int, int] | None) -> Raw:
    words = whole(data, at, "<u4", "word").astype(np.int64)
    kind = words >> 28
    is_high = kind == 8
    highs = _high_times(words & (1 << 28) - 1, is_high, 28)
    is_event = kind <= 1
    timed = is_event & (_last(is_high) >= 0)
    event, t = words[timed], highs[timed] << 6 | words[timed] >> 22 & 63
    warnings = warned(UNTIMED, is_event & ~timed)
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
    words, state = whole(data, at, "<u2", "word"), _Evt3State()
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
    highs[kind == 8] = unwrapped(marks, 12, jitter=0)[1:] + (first >> 12 << 12)
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
