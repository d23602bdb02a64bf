"""The runs of a study: a line of JSON each, in one file, which several processes may extend at the same time."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from benchmarks.chi_study_run import Setting, run

AnySetting = TypeVar("AnySetting", bound=Setting)


def key_of(setting: dict) -> str:
    return hashlib.sha256(json.dumps(setting, sort_keys=True).encode()).hexdigest()[:16]


def finished(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def rounded(value):
    """`value` with its floats rounded to four digits, so that people can read the file."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, list):
        return [rounded(element) for element in value]
    return {name: rounded(element) for name, element in value.items()} if isinstance(value, dict) else value


def free(settings: Sequence[AnySetting], file: Path, claims: Path) -> Iterator[AnySetting]:
    """Each setting that is neither done nor being done by another process."""
    claims.mkdir(parents=True, exist_ok=True)
    for setting in settings:
        key = key_of(asdict(setting))
        if any(record["key"] == key for record in finished(file)):
            continue
        try:
            os.close(os.open(claims / key, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            continue
        yield setting


def do(settings: Sequence[Setting], file: Path, scratch: Path, limit: int | None, **said: str) -> int:
    """Does at most `limit` runs, each a line of `file` with the fields `said`; returns the number done."""
    done = 0
    for setting in free(settings, file, scratch / "claims"):
        record = {"key": key_of(asdict(setting)), **said, **run(setting, scratch)}
        record["course"] = rounded(record["course"])
        with file.open("a") as lines:
            lines.write(json.dumps(record) + "\n")
        print(f"{setting.arm:32} lr {setting.lr:<5} seed {setting.seed}: {100 * record['accuracy']:.2f} %", flush=True)
        done += 1
        if done == limit:
            break
    return done
