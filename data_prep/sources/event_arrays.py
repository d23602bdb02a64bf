"""Events in arrays of numpy: .npz with x, y, t, p or one structured array, .npy with a structured array."""

import io
import math
import zipfile

import numpy as np

from data_prep.images import RefusedError
from data_prep.sources.event_raw import TIME_UNITS, Raw

_MAX_UNPACKED = 1 << 30  # bytes of an array in an .npz
_NAMES = {
    "t": ("t", "ts", "time", "times", "timestamp", "timestamps"),
    "x": ("x",),
    "y": ("y",),
    "p": ("p", "pol", "polarity", "polarities"),
}


class _ObjectsError(RefusedError):
    """An array of Python objects."""


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
        raise _ObjectsError("holds Python objects, which are not read: they could run any code")
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


def read_npz(data: memoryview, time_unit: str) -> Raw:
    arrays = {}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
            columns = [entry for entry in entries if _stem(entry).casefold() in sum(_NAMES.values(), ())]
            for entry in columns or entries:
                if entry.file_size > _MAX_UNPACKED:
                    raise RefusedError(f"{entry.filename} would unpack to {entry.file_size} bytes")
                try:
                    arrays[_stem(entry)] = _read_npy(archive.read(entry))
                except _ObjectsError:
                    if columns or len(entries) == 1:  # others, such as a list of labels, are not needed
                        raise
    except RefusedError:
        raise
    except Exception as error:  # broken bytes make the parser of a zip raise any exception
        raise RefusedError(f"truncated or damaged: {' '.join(str(error).split())[:200]}") from None
    structured = [array for array in arrays.values() if array.dtype.names]
    if len(structured) == 1 and not columns:
        (only,) = structured
        return _from_columns({name: only[name] for name in only.dtype.names or ()}, time_unit, "npz")
    return _from_columns(arrays, time_unit, "npz")


def _stem(entry: zipfile.ZipInfo) -> str:
    return entry.filename.removesuffix(".npy")


def read_structured(data: memoryview, time_unit: str) -> Raw:
    array = _read_npy(data)
    if not array.dtype.names:
        raise RefusedError(
            f"a plain array of {array.shape}, whose columns have no names; save a structured array with x, y, t, p"
        )
    return _from_columns({name: array[name] for name in array.dtype.names}, time_unit, "npy")


def _from_columns(columns: dict[str, np.ndarray], time_unit: str, format: str) -> Raw:
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
    t = _integers("t", found["t"], TIME_UNITS[time_unit])
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
