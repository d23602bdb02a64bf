"""Checks that the sections of a configuration share; each refuses a value in one line: what, got, allowed."""

import math

from pipeline.errors import ConfigError


def require(ok: bool, name: str, got: object, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={got!r} is not allowed; use {allowed}")


def one_of(name: str, got: str, allowed: tuple[str, ...]) -> None:
    require(got in allowed, name, got, "one of " + ", ".join(allowed))


def positive(name: str, got: float) -> None:
    require(math.isfinite(got) and got > 0, name, got, "a number above 0")
