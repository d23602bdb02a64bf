"""scikit-learn's digits, moved before a simulated event camera: a data set of recordings that needs no download.

A pixel of an event camera remembers the logarithm of the light at its last event. When the present one is above or
below by its threshold θ, it sends an event, ON or OFF, and remembers one θ more or less (Lichtsteiner, Posch and
Delbruck 2008). Between two pictures the logarithm is linear in time, which gives each event its microsecond.

All of it is integer arithmetic and one hash, so that every machine makes the same bytes.
"""

import itertools
import struct
from pathlib import Path

import numpy as np

from data_prep.collection import Split, SplitBuilder
from data_prep.images import Inspected
from data_prep.sources.digits import CLASSES, held_out, load
from data_prep.sources.readers import MemoryReader
from pipeline.data.decode.events import EXTENSION, Events, encode
from pipeline.data.order import mix

SIDE = 24
"""Pixels of a side of the sensor."""
NUM_MOVES, MOVE_US, PICTURE_US = 4, 50_000, 2_500
"""A recording is of so many moves, each of so many microseconds, seen in pictures so far apart."""
DURATION_US = NUM_MOVES * MOVE_US
_UNIT = 16  # lengths on the sensor are in 1/16 of its pixel
_ZOOM = 24  # of these are a pixel of the digit, which is so 12 pixels high
_REACH = 3 * _UNIT  # farthest that a corner of the path is from the middle, along each axis
_SHORTEST = 2 * _UNIT  # move, along the longer axis
_MOST_LIGHT = 16 * _ZOOM * _ZOOM  # a digit's pixel has at most 16, and its neighbours are weighted by _ZOOM twice
_DARK = _MOST_LIGHT // 16  # light of the background: ln 17 = 2.8 lies between it and the brightest stroke
_LOG = np.rint(10_000 * np.log((np.arange(_MOST_LIGHT + 1) + _DARK) / _DARK)).astype(np.int64)
_THRESHOLD, _SPREAD = 6_000, 600  # θ = 0.6 in the logarithm; that of a pixel is up to a tenth off
_NOISE_ODDS = 20  # one in so many pixels sends an event of noise in a recording
_PATH, _PIXEL, _NOISE = range(3)  # streams of the hash
_HEAD = struct.Struct("<I")


class DigitsDvs:
    """The digits as recordings of events of 0.2 s, in the same splits as `Digits`."""

    description = "scikit-learn's digits before a simulated event camera"

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fingerprint(self) -> list:
        return ["digits_dvs"]

    def index(self, work: Path, say: object) -> list[Split]:
        pixels, labels = load()
        size = _HEAD.size + pixels[0].size
        reader = MemoryReader(b"".join(_HEAD.pack(number) + image.tobytes() for number, image in enumerate(pixels)))
        builders = {name: SplitBuilder(name, [reader]) for name in ("train", "val")}
        for split, number in held_out(labels, self._seed):
            label = str(labels[number])
            name = f"{label}/{number:04d}.{EXTENSION}"
            builders[split].add(name=name, label=label, place=0, offset=number * size, length=size)
        return [builder.build(CLASSES, convert=_convert) for builder in builders.values()]


def _convert(name: str, data: memoryview) -> Inspected:
    (number,) = _HEAD.unpack_from(data)
    pixels = np.frombuffer(data, dtype=np.uint8, offset=_HEAD.size).reshape(8, 8)
    return Inspected(EXTENSION, SIDE, SIDE, ("simulated",), encode(record(pixels, number)))


def record(pixels: np.ndarray, number: int) -> Events:
    """What the camera sends while a digit moves before it.

    Args:
        pixels: `(8, 8)` uint8, 0 to 16; 16 is the stroke.
        number: of the recording; decides its path and its noise.
    """
    t, place, p = _crossings(_LOG[_pictures(pixels, _path(number))], _thresholds())
    noise_t, noise_place, noise_p = _noise(number)
    t, place, p = (np.concatenate(pair) for pair in ((t, noise_t), (place, noise_place), (p, noise_p)))
    order = np.lexsort((place, t))
    t, place, p = t[order], place[order], p[order]
    return Events(
        t - t[0], (place % SIDE).astype(np.uint16), (place // SIDE).astype(np.uint16), p.astype(np.uint8), SIDE, SIDE
    )


def _path(number: int) -> np.ndarray:
    """Where the middle of the digit is at each picture, `(K, 2)` int64 in _UNIT: x and y."""
    corners, draws = [], 0
    while len(corners) <= NUM_MOVES:
        words = mix(number, _PATH, np.arange(2 * draws, 2 * draws + 2)) >> np.uint64(32)
        corner = words.astype(np.int64) % (2 * _REACH + 1) - _REACH
        draws += 1
        if not corners or np.abs(corner - corners[-1]).max() >= _SHORTEST:
            corners.append(corner)
    num = MOVE_US // PICTURE_US
    u = np.arange(num, dtype=np.int64)
    eased = u * u * (3 * num - 2 * u)  # slow, fast, slow: 0 to num³
    moves = [a + (b - a) * eased[:, None] // num**3 for a, b in itertools.pairwise(corners)]
    return np.concatenate([*moves, corners[-1][None]])


def _pictures(pixels: np.ndarray, path: np.ndarray) -> np.ndarray:
    """The light on the sensor, `(K, SIDE, SIDE)` int64 from 0 to _MOST_LIGHT: the digit enlarged (bilinear)."""
    padded = np.zeros((12, 12), np.int64)
    padded[2:10, 2:10] = pixels
    at = (2 * np.arange(SIDE) - SIDE + 1) * _UNIT // 2  # of the sensor's pixels, from its middle
    middle = 11 * _ZOOM // 2  # of `padded`, whose pixels are at 0 to 11
    columns, rows = (np.clip(at - path[:, axis, None] + middle, 0, 11 * _ZOOM - 1) for axis in (0, 1))
    (x, fx), (y, fy) = (np.divmod(places, _ZOOM) for places in (columns, rows))
    x, fx, y, fy = x[:, None, :], fx[:, None, :], y[:, :, None], fy[:, :, None]
    upper = padded[y, x] * (_ZOOM - fx) + padded[y, x + 1] * fx
    lower = padded[y + 1, x] * (_ZOOM - fx) + padded[y + 1, x + 1] * fx
    return upper * (_ZOOM - fy) + lower * fy


def _thresholds() -> np.ndarray:
    """θ of every pixel, `(SIDE * SIDE,)` int64: the same camera in all recordings."""
    words = mix(_PIXEL, np.arange(SIDE * SIDE)) >> np.uint64(32)
    return _THRESHOLD - _SPREAD + words.astype(np.int64) % (2 * _SPREAD + 1)


def _crossings(logs: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times in µs, pixels and polarities of all events of the pictures `logs`, `(K, SIDE, SIDE)`."""
    logs = logs.reshape(len(logs), -1)
    remembered, found = logs[0].copy(), []
    for picture in range(1, len(logs)):
        before, now = logs[picture - 1], logs[picture]
        nums = np.abs(now - remembered) // thresholds
        place = np.repeat(np.flatnonzero(nums), nums[nums > 0])
        if not len(place):
            continue
        # The j-th event of a pixel in this picture is where the line from `before` to `now` meets remembered ± j θ.
        nth = np.arange(len(place)) - np.repeat(np.cumsum(nums[nums > 0]) - nums[nums > 0], nums[nums > 0]) + 1
        up = now[place] > remembered[place]
        level = remembered[place] + np.where(up, nth, -nth) * thresholds[place]
        way = now[place] - before[place]
        t = (picture - 1) * PICTURE_US + (level - before[place]) * PICTURE_US // way
        found.append((t, place, up))
        remembered += np.where(now > remembered, nums, -nums) * thresholds
    columns = zip(*found, strict=True) if found else ((np.zeros(0, np.int64),),) * 3
    t, place, up = (np.concatenate(column) for column in columns)
    return t, place, up.astype(np.int64)


def _noise(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Events that no light made: times in µs, pixels, polarities."""
    words = mix(number, _NOISE, np.arange(SIDE * SIDE)) >> np.uint64(20)
    place = np.flatnonzero(words % np.uint64(_NOISE_ODDS) == 0)
    drawn = (words[place] // np.uint64(_NOISE_ODDS)).astype(np.int64)
    return drawn // 2 % DURATION_US, place, drawn % 2
