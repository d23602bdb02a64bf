"""The runs of a study: a line of JSON each, in one file, which several processes may extend at the same time."""

import argparse
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks import table
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


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The command line of a study whose module has the docstring `doc`: run or report."""
    made = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    made.add_argument("what", choices=("run", "report"))
    made.add_argument("--scratch", type=Path, default=Path("build/chi_study"), help="folder of the shards")
    made.add_argument("--limit", type=int, help="do at most this many runs")
    made.add_argument("--json", metavar="FILE", help="write the figures here")
    return made


def do_and_exit(settings: Iterable[Setting], file: Path, arguments: argparse.Namespace) -> None:
    """The command `run`: one core; the exit code is 3 where there was nothing left to do."""
    torch.set_num_threads(1)
    raise SystemExit(0 if do(list(settings), file, arguments.scratch, arguments.limit) else 3)


def write(path: str, rows: list[dict], name: str) -> None:
    """Writes the figures of the study that `python -m benchmarks.NAME report` prints."""
    table.write(
        path,
        rows,
        hardware=f"{table.processor()}, one core a run; no GPU was at hand",
        versions={"torch": torch.__version__},
        command=f"python -m benchmarks.{name} report",
        setting=f"docs/chi_study.md; every run is a line of {name}_runs.jsonl",
    )
