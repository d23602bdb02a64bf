"""Checks that the sections of a configuration share; each refuses a value in one line: what, got, allowed.

Every section calls `checked` when it is built: each field must have its declared type, the section's own rules must
hold, and they must still hold when every number is rounded to fp32, in which the training computes.
"""

import copy
import dataclasses
import math
import re
import struct
import unicodedata
from collections.abc import Callable
from typing import Any

from pipeline.errors import ConfigError

SMALLEST, LARGEST = 1e-18, 1e12
"""Limits of a float that is not 0: fp32 holds it, its inverse, its square, and a sum of a trillion such squares."""
INTEGER_MAX = 2**31 - 1
WIDE_MAX = 2**63 - 1
WIDE = ("data.cache_bytes", "train.seed")
"""Integers that may be as large as WIDE_MAX."""

_KINDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "text",
    tuple[float, ...]: "numbers, as in 30,80",
}


def require(ok: bool, name: str, got: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={got!r:.200} is not allowed; use {allowed}")


def one_of(name: str, got: str, allowed: tuple[str, ...]) -> None:
    require(got in allowed, name, got, "one of " + ", ".join(allowed))


def without_secrets(name: str, got: str) -> None:
    """Refuses a URL that holds a password or a query. Paths are shown in logs and files; names are put behind them."""
    protocol, is_url, rest = got.partition("://")
    credentials, at, host = rest.partition("/")[0].rpartition("@")
    if is_url and at and ":" in credentials:
        shown = f"{protocol}://…@{host}/…"
        raise ConfigError(
            f"{name}={shown!r} holds a password; leave it to the protocol's client: for http(s), ~/.netrc"
        )
    if protocol in ("http", "https") and is_url and ("?" in rest or "#" in rest):
        got = f"{protocol}://{re.split('[?#]', rest)[0]}"
        raise ConfigError(
            f"{name}={got!r} is followed by a query or fragment, and names of files are put behind it; use the URL "
            "of a folder, without ? and #"
        )


def positive(name: str, got: float) -> None:
    require(math.isfinite(got) and got > 0, name, got, "a number above 0, and finite")


def checked(prefix: str, section: Any) -> None:
    """Checks `section`, a frozen dataclass whose method `check` holds its own rules.

    Args:
        prefix: put before its fields' names in messages: "data." or "".

    Raises:
        ConfigError: a field has another type, breaks a rule, or breaks one when it is rounded to fp32.
    """
    for field in dataclasses.fields(section):
        _kind(prefix + field.name, getattr(section, field.name), field)
    section.check()
    rounded = {}
    for field in dataclasses.fields(section):
        name, got = prefix + field.name, getattr(section, field.name)
        if field.type is int:
            most = WIDE_MAX if name in WIDE else INTEGER_MAX
            require(abs(got) <= most, name, got, f"an integer of at most {most}")
        elif field.type is float:
            _size(name, got, got, zero=lambda field=field: _holds(section, {field.name: 0.0}))
            rounded[field.name] = _fp32(got)
        elif field.type == tuple[float, ...]:
            for number in got:
                _size(name, got, number, zero=lambda: True)
            rounded[field.name] = tuple(map(_fp32, got))
    try:
        _with(section, rounded).check()
    except ConfigError as error:
        raise ConfigError(f"{error} ({_rounding(prefix, section, rounded, error)})") from None


def _kind(name: str, got: object, field: dataclasses.Field) -> None:
    """Refuses a value that is not of the field's type, as a file may hold."""
    if dataclasses.is_dataclass(field.type):
        require(isinstance(got, field.type), name, got, "a section")  # pyright: ignore[reportArgumentType]
        return
    allowed = _KINDS[field.type]  # pyright: ignore[reportArgumentType]
    if field.type is float:
        require(_is_number(got), name, got, allowed)
    elif field.type == tuple[float, ...]:
        require(isinstance(got, tuple) and all(map(_is_number, got)), name, got, allowed)
    else:
        require(type(got) is field.type, name, got, allowed)
    if isinstance(got, str):
        require(bool(got.strip()) or field.default == "", name, got, "text that is not empty")
        readable = not any(unicodedata.category(letter) in ("Cc", "Cs") for letter in got)
        require(readable, name, got, "text in UTF-8 without control characters")


def _is_number(got: object) -> bool:
    """Whether it is a float, or an integer that becomes one without overflow."""
    return isinstance(got, float) or (type(got) is int and abs(got) <= LARGEST)


def _size(name: str, got: object, number: float, *, zero: Callable[[], bool]) -> None:
    """Refuses a number too large or too small to compute with in fp32; `zero` tells whether 0 is allowed."""
    require(number != 0 or math.copysign(1, number) > 0, name, got, "0 without a sign")
    if number != 0 and not SMALLEST <= abs(number) <= LARGEST:  # also true for NaN
        fitting = f"a number from {SMALLEST:g} to {LARGEST:g} in size, which fp32 can compute with"
        require(False, name, got, f"0, or {fitting}" if zero() else fitting)


def _fp32(number: float) -> float:
    """The nearest number of fp32."""
    return struct.unpack("f", struct.pack("f", number))[0]


def _with(section: Any, values: dict[str, object]) -> Any:
    """A copy with `values`, which are not checked."""
    twin = copy.copy(section)
    for name, value in values.items():
        object.__setattr__(twin, name, value)
    return twin


def _holds(section: Any, values: dict[str, object]) -> bool:
    try:
        _with(section, values).check()
    except ConfigError:
        return False
    return True


def _rounding(prefix: str, section: Any, rounded: dict[str, object], error: ConfigError) -> str:
    """Which number of `section` was changed by rounding, to explain an error that only the rounded numbers cause."""
    name = str(error).partition("=")[0].removeprefix(prefix)
    if name in rounded and getattr(section, name) != rounded[name]:
        return f"{getattr(section, name)!r} is {rounded[name]!r} in fp32, in which the training computes"
    return "with all numbers as fp32 holds them, in which the training computes"
