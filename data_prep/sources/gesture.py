"""DVS128 Gesture (Amir et al. 2017) as it is distributed: long recordings, and for each a list of what happens when.

    trials_to_train.txt, trials_to_test.txt     names of the recordings of each split, a line each
    user01_fluorescent.aedat                    AEDAT 3.1
    user01_fluorescent_labels.csv               class,startTime_usec,endTime_usec; classes count from 1
    gesture_mapping.csv                         action,label; where it is missing, the names below

A sample is a line of a list: the events from its start on and before its end.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_prep.collection import Reader, Split, SplitBuilder
from data_prep.images import Inspected, RefusedError
from data_prep.sources.aedat import read_packets, walk_packets
from data_prep.sources.event_formats import inspected
from data_prep.sources.event_raw import DVS128, Settings, text_header
from data_prep.sources.readers import FileReader
from data_prep.sources.tars import Member
from pipeline.errors import DataError

TRIALS = {b"trials_to_train.txt": "train", b"trials_to_test.txt": "val"}
"""The lists of the recordings, and the splits that they become: training evaluates on the one called val."""
CLASSES = (
    "hand_clapping", "right_hand_wave", "left_hand_wave", "right_arm_clockwise", "right_arm_counter_clockwise",
    "left_arm_clockwise", "left_arm_counter_clockwise", "arm_roll", "air_drums", "air_guitar", "other_gestures",
)  # fmt: skip
HANDED = "left and right hands are classes of their own: train with --data.flip false, which the manifest demands"
CUT = re.compile(r"(?:^|/)user\d+_(?:fluorescent|fluorescent_led|lab|led|natural)(?:_\d+)?\.\w+$")
"""Names of its recordings, also of the pieces by gesture that other programs make of them."""
_LABELS, _MAPPING = "_labels.csv", "gesture_mapping.csv"
_MAX_LIST_BYTES = 1 << 20
_NUMBER = re.compile(r"[0-9]{1,18}")  # fits into int64
FileOf = Callable[[Member], tuple[Path, int]]


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of a list of labels."""

    number: int
    label: int
    start: int
    """In µs of the recording's clock."""
    end: int


class _Packets(NamedTuple):
    """The packets of events of a recording, `(n,)` int64 each."""

    at: np.ndarray
    """Offsets in the recording."""
    end: np.ndarray
    first: np.ndarray
    """Earliest time, in µs."""
    last: np.ndarray
    is_cut: bool
    """Whether the recording ends inside a packet."""


def index_gesture(
    members: list[Member], reader: Reader, file_of: FileOf, settings: Settings, where: str, say: Callable[[str], None]
) -> list[Split]:
    """The splits of the data set whose `members` these are.

    Args:
        file_of: the uncompressed file that a member lies in, and its offset there.
        where: the source, for messages.
    """
    files = {member.name.decode("utf-8", "replace"): member for member in members if not member.folder}
    classes = _classes(files, reader, where)
    builders, windows, listed = [], {}, {}
    for base, split in TRIALS.items():
        paths = [name for name in files if name.rsplit("/", 1)[-1].encode() == base]
        if len(paths) != 1:
            raise DataError(f"{where}: {len(paths)} lists {base.decode()}, where DVS128 Gesture has one; complete it")
        above = paths[0].rpartition("/")[0]
        builder = SplitBuilder(split)
        for line in _text(files[paths[0]], reader).split():
            name = f"{above}/{line}" if above else line
            if name in listed:
                builder.refuse(name, f"is named in {listed[name]} already; a recording is of one split, once")
                continue
            listed[name] = paths[0]
            if name not in files:
                builder.refuse(name, f"is named in {paths[0]}, but is not there")
            elif files[name].refused:
                builder.refuse(name, files[name].refused)
            else:
                _add_recording(builder, windows, files, name, reader, file_of, classes)
        builders.append(builder)
    others = sorted(name for name in files if name.endswith(".aedat") and name not in listed)
    if others:
        say(
            f"{len(others)} recordings that are in neither list are passed over: {others[0]}{', …' * (len(others) > 1)}"
        )
    say(HANDED)
    convert = partial(_convert, settings, windows)
    return [builder.build(classes, convert=convert, handed=True) for builder in builders]


def _add_recording(
    builder: SplitBuilder, windows: dict, files: dict[str, Member], name: str, reader: Reader, file_of: FileOf,
    classes: tuple[str, ...],
) -> None:  # fmt: skip
    """Adds a sample for every line of the list of the recording `name`, or refuses the recording or a line."""
    stem = name.removesuffix(".aedat")
    labels = files.get(f"{stem}{_LABELS}")
    if labels is None:
        builder.refuse(name, f"its list {stem}{_LABELS} is missing")
        return
    path, start = file_of(files[name])
    recording = FileReader(path)
    try:
        packets = _packets_of(recording, start, files[name].length)
    except RefusedError as error:
        builder.refuse(name, str(error))
        return
    place = len(builder.readers)
    builder.readers.append(recording)
    for line in _lines(_text(labels, reader), builder, f"{stem}{_LABELS}", len(classes)):
        sample = f"{stem}_{line.number:02d}.aedat"
        within = np.flatnonzero((packets.last >= line.start) & (packets.first < line.end))
        if packets.is_cut and packets.last.max(initial=-1) < line.end:
            builder.refuse(sample, f"truncated: {name} is cut before the end of this gesture")
        elif not len(within):
            builder.refuse(sample, f"no event of {name} lies between {line.start} and {line.end} µs")
        else:
            offset, length = int(packets.at[within[0]]), int(packets.end[within[-1]] - packets.at[within[0]])
            label = classes[line.label - 1]
            builder.add(name=sample, label=label, place=place, offset=start + offset, length=length)
            windows[sample] = (line.start, line.end)


def _packets_of(reader: FileReader, start: int, length: int) -> _Packets:
    """The packets of events of the recording at `start` of a file; it is read once, to find their times."""
    if not length:
        raise RefusedError("empty file")
    data = memoryview(bytearray(length))
    reader.read_into(data, start, "")
    if bytes(data[:12]) != b"#!AER-DAT3.1":
        raise RefusedError("not AEDAT 3.1, which the recordings of DVS128 Gesture are")
    _, at = text_header(data, b"#", b"#!END-HEADER")
    packets, end = walk_packets(data, at)
    packets = [packet for packet in packets if packet.num]
    times = [packet.times(data) for packet in packets]
    return _Packets(
        at=np.array([packet.at for packet in packets], dtype=np.int64),
        end=np.array([packet.end for packet in packets], dtype=np.int64),
        first=np.array([t.min() for t in times], dtype=np.int64),
        last=np.array([t.max() for t in times], dtype=np.int64),
        is_cut=end < length,
    )


def _convert(settings: Settings, windows: dict[str, tuple[int, int]], name: str, data: memoryview) -> Inspected:
    packets, _ = walk_packets(data, 0)
    raw = read_packets(data, packets, sensor=DVS128, between=windows[name])
    return inspected(replace(raw, format="AEDAT 3.1, cut by its labels"), settings)


def _lines(text: str, builder: SplitBuilder, name: str, num_classes: int) -> list[_Line]:
    """The lines of a list of labels; those that are wrong are refused by their number, from 1 on behind the heading."""
    found = []
    for number, row in enumerate(text.splitlines()[1:], 1):
        if not row.strip():
            continue
        cells = [cell.strip() for cell in row.split(",")]
        if len(cells) != 3 or not all(map(_NUMBER.fullmatch, cells)):
            builder.refuse(f"{name}:{number}", f"{row[:80]!r} is not class,startTime_usec,endTime_usec")
            continue
        line = _Line(number, *map(int, cells))
        if not 1 <= line.label <= num_classes:
            builder.refuse(f"{name}:{number}", f"the class {line.label} is none of 1 to {num_classes}")
        elif line.end <= line.start:
            builder.refuse(f"{name}:{number}", f"ends at {line.end} µs, which is not after its start {line.start}")
        else:
            found.append(line)
    return found


def _classes(files: dict[str, Member], reader: Reader, where: str) -> tuple[str, ...]:
    mapping = [member for name, member in files.items() if name.rsplit("/", 1)[-1] == _MAPPING]
    if not mapping:
        return CLASSES
    names = {}
    for row in _text(mapping[0], reader).splitlines()[1:]:
        name, _, label = row.partition(",")
        if _NUMBER.fullmatch(label.strip()):
            names[int(label)] = name.strip()
    if sorted(names) != list(range(1, len(names) + 1)) or not names or len(set(names.values())) < len(names):
        raise DataError(f"{where}: {_MAPPING} does not give each of 1, 2, 3, … one name; mend it or remove it")
    return tuple(names[label] for label in sorted(names))


def _text(member: Member, reader: Reader) -> str:
    name = member.name.decode("utf-8", "replace")
    if member.refused or member.length > _MAX_LIST_BYTES:
        raise DataError(f"{name}: {member.refused or 'is too long for a list'}; mend it")
    room = bytearray(member.length)
    reader.read_into(memoryview(room), member.offset, name)
    try:
        return room.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8 text ({error.reason}); mend it") from None
