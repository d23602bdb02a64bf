"""The formats of event cameras: the bytes of a file → its events.

    .bin    N-MNIST, N-Caltech101: 40 bits an event, big-endian (Orchard et al. 2015)
    .aedat  AEDAT 2.0 and 3.1, also .aedat4: AEDAT 4 (aedat.py)
    .dat    Prophesee DAT (prophesee.py)
    .raw    Prophesee EVT 2.0 and 3.0 (prophesee.py)
    .npz    arrays named x, y, t, p, or one structured array; .npy: a structured array (event_arrays.py)

All but AEDAT 4 are read by numpy without a loop over events. tonic's readers check nothing and need librosa to install;
expelliarmus does not return from a .dat that was cut. The tests compare with it and with faery on whole files.
"""

from collections.abc import Callable

import numpy as np

from data_prep.images import Inspected, RefusedError
from data_prep.sources.aedat import read_aedat
from data_prep.sources.event_arrays import read_npz, read_structured
from data_prep.sources.event_raw import SORTED, Raw, Settings, unwrapped, whole
from data_prep.sources.prophesee import read_dat, read_evt
from pipeline.data.decode.events import EXTENSION, Events, encode

_UNREAD = frozenset(("es", "h5", "hdf5", "mat", "bag"))
EXTENSIONS = frozenset(("bin", "aedat", "aedat4", "dat", "raw", "npz", "npy")) | _UNREAD
"""Of the files that are recordings; of formats that are not read too, so that nobody misses them in silence."""


def convert(name: str, data: memoryview, settings: Settings) -> Inspected:
    """The recording in the file `name`, of the bytes `data`, as it is stored.

    Raises:
        RefusedError: it is cut, empty, of another format, or holds what no recording can.
    """
    if not len(data):
        raise RefusedError("empty file")
    extension = name.rsplit(".", 1)[-1].casefold()
    if extension in _UNREAD:
        raise RefusedError(f".{extension} is not read; convert it, for instance to .npz with arrays x, y, t and p")
    if extension.startswith("aedat"):
        return inspected(read_aedat(data, name), settings)
    return inspected(_READERS[extension](data, settings), settings)


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


def _read_bin(data: memoryview, settings: Settings) -> Raw:
    columns = whole(data, 0, "(5,)u1", "event").astype(np.int64)
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
        t = unwrapped(t, 23)
    return Raw(t=t, x=x, y=y, p=p, format="N-MNIST bin", sensor=(34, 34), guessed_sensor=True)


_READERS: dict[str, Callable[[memoryview, Settings], Raw]] = {
    "bin": _read_bin,
    "dat": lambda data, _: read_dat(data),
    "raw": lambda data, _: read_evt(data),
    "npz": lambda data, settings: read_npz(data, settings.time_unit),
    "npy": lambda data, settings: read_structured(data, settings.time_unit),
}
