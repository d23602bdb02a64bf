"""`python -m data_prep SOURCE … DIR`: a collection of images, or of recordings of events, becomes verified shards."""

import argparse
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import NoReturn

from data_prep.info import SHEET_NAME, info
from data_prep.plan import Options
from data_prep.pool import StopRequestedError
from data_prep.prepare import AllowedBad, Source, prepare
from data_prep.sources.digits import SHARD_BYTES, Digits
from data_prep.sources.digits_dvs import DigitsDvs
from data_prep.sources.event_raw import TIME_UNITS, Settings
from data_prep.sources.events import Recordings
from data_prep.sources.imagefolder import ImageFolder
from data_prep.sources.imagenet import ImageNet
from data_prep.sources.parquet import Parquet
from data_prep.stores import Store, is_url, make_store
from data_prep.verify import verify
from pipeline.data.decode.events import MAX_SIDE
from pipeline.errors import EXIT_DATA, EXIT_DONE, EXIT_STOPPED, EXIT_USAGE, ConfigError, DataError
from pipeline.run_dir import caches

EXIT_PIPE = 128 + signal.SIGPIPE
"""The exit code that shells report for a command whose output nobody reads any more."""
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def _num_bytes(text: str) -> int:
    """A size such as 256Mi, 1G, 500000."""
    lowered = text.lower().removesuffix("b")
    digits = lowered.rstrip("kmgi")
    unit = _UNITS.get(lowered[len(digits) :])
    if unit is None or not digits.isdigit() or int(digits) * unit < 1 << 16:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size of at least 64Ki; write 256Mi, 1G or a number of bytes"
        )
    return int(digits) * unit


def _allowed_bad(text: str) -> AllowedBad:
    """A count, or a share with a percent sign."""
    try:
        if text.endswith("%"):
            ratio = float(text[:-1]) / 100
            if 0 <= ratio <= 1:
                return AllowedBad(ratio=ratio)
        elif int(text) >= 0:
            return AllowedBad(count=int(text))
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of samples nor a share; write 20 or 0.1%")


def _ratio(text: str) -> float:
    try:
        if 0 <= float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not allowed; use a number from 0 to below 1, such as 0.1")


def _integer(low: int, high: int):
    def parse(text: str) -> int:
        if not text.isdigit() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; use an integer from {low} to {high}")
        return int(text)

    return parse


def _add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "directory", metavar="DIR", help="folder or URL to write to; new, empty, or begun by the same command"
    )
    command.add_argument("--shard-bytes", type=_num_bytes, default=None, help="size of a shard (default 256Mi)")
    command.add_argument(
        "--workers", type=_integer(1, 1024), default=len(os.sched_getaffinity(0)), help="processes (default: all cores)"
    )
    command.add_argument("--seed", type=_integer(0, 2**63 - 1), default=0, help="seed of the shuffle (default 0)")
    command.add_argument(
        "--limit",
        type=_integer(1, 2**40),
        default=0,
        metavar="N",
        help="take at most N samples of each split, a fair draw",
    )
    command.add_argument(
        "--allow-bad",
        type=_allowed_bad,
        default=AllowedBad(),
        metavar="N",
        help="refused samples of a split that are tolerated, a number or a share (default 0.1%%)",
    )
    command.add_argument("--scratch", metavar="FOLDER", help="local folder for files before their upload to a URL")


def _add_image_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--resize",
        type=_integer(1, 65536),
        default=0,
        metavar="SHORT_SIDE",
        help="shrink the shorter side to this many pixels",
    )
    command.add_argument(
        "--quality", type=_integer(1, 100), default=90, help="JPEG quality of resized images (default 90)"
    )
    command.add_argument(
        "--no-decode", action="store_true", help="check headers and ends of files only, at the speed of a copy"
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m data_prep", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    digits = commands.add_parser("digits", help="scikit-learn's 1,797 digits, the built-in default")
    digits_dvs = commands.add_parser("digits_dvs", help="the digits before a simulated event camera")
    imagenet = commands.add_parser("imagenet", help="ILSVRC2012, from its archives or unpacked")
    imagenet.add_argument("--train", required=True, help="ILSVRC2012_img_train.tar, or a folder of synset folders")
    imagenet.add_argument("--val", help="ILSVRC2012_img_val.tar, or a folder of its images")
    imagenet.add_argument("--devkit", help="ILSVRC2012_devkit_t12.tar.gz, or its folder")
    imagefolder = commands.add_parser("imagefolder", help="class folders, loose or in a tar, tar.gz or zip")
    imagefolder.add_argument("source", metavar="PATH", help="folder or archive of CLASS/IMAGE or SPLIT/CLASS/IMAGE")
    imagefolder.add_argument(
        "--val-ratio",
        type=_ratio,
        default=0.0,
        help="share of each class to hold out as val where there is one split (default 0)",
    )
    parquet = commands.add_parser("parquet", help="Hugging Face's layout: image {bytes, path} and label")
    parquet.add_argument(
        "source", metavar="PATH", nargs="+", help="files such as train-00000-of-00294.parquet, or folders of them"
    )
    parquet.add_argument("--image-column", metavar="NAME", help="column of the images, where it is not found")
    parquet.add_argument("--label-column", metavar="NAME", help="column of the labels, where it is not found")
    events = commands.add_parser("events", help="recordings of event cameras: .bin, .aedat, .dat, .raw, .npz, .npy")
    _add_event_options(events)
    for command in (digits, imagenet, imagefolder, parquet):
        _add_common(command)
        _add_image_options(command)
    for command in (digits_dvs, events):
        _add_common(command)
    _add_checks(commands)
    return parser


def _sensor(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not all(side.isdigit() and 0 < int(side) <= MAX_SIDE for side in (width, height)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size of a sensor; write WIDTHxHEIGHT, such as 128x128")
    return int(width), int(height)


def _add_event_options(events: argparse.ArgumentParser) -> None:
    events.add_argument(
        "source", metavar="SRC", nargs="+", help="folders or archives of [SPLIT/]CLASS/FILE, or of DVS128 Gesture"
    )
    events.add_argument(
        "--sensor", type=_sensor, metavar="WxH", help="width and height, where the files do not say them (34x34)"
    )
    events.add_argument(
        "--time-unit", choices=tuple(TIME_UNITS), default="us", help="of times in .npz and .npy (default us)"
    )
    events.add_argument(
        "--val-ratio",
        type=_ratio,
        default=0.0,
        help="share of each class to hold out as val where there is one split (default 0)",
    )


def _add_checks(commands) -> None:
    verify = commands.add_parser("verify", help="check a data set against its manifests, one line a fault")
    verify.add_argument("directory", metavar="DIR", help="folder or URL of a data set, or of one split")
    verify.add_argument("--decode", action="store_true", help="decode every sample, too")
    verify.add_argument("--workers", type=_integer(1, 1024), default=len(os.sched_getaffinity(0)), help="processes")
    info = commands.add_parser("info", help="a table of what a data set holds, and a contact sheet")
    info.add_argument("directory", metavar="DIR", help="folder or URL of a data set, or of one split")
    info.add_argument("--sheet", metavar="FILE", help=f"where to write the contact sheet (default DIR/{SHEET_NAME})")
    info.add_argument(
        "--seed", type=_integer(0, 2**63 - 1), default=0, help="seed that draws the samples of the sheet (default 0)"
    )


def _source(arguments: argparse.Namespace) -> Source:
    if arguments.command == "imagenet":
        return ImageNet(arguments.train, arguments.val, arguments.devkit)
    if arguments.command == "imagefolder":
        return ImageFolder(arguments.source, arguments.val_ratio, arguments.seed)
    if arguments.command == "parquet":
        return Parquet(arguments.source, arguments.image_column, arguments.label_column)
    if arguments.command == "events":
        settings = Settings(sensor=arguments.sensor, time_unit=arguments.time_unit)
        return Recordings(arguments.source, settings, arguments.val_ratio, arguments.seed)
    return DigitsDvs(arguments.seed) if arguments.command == "digits_dvs" else Digits(arguments.seed)


def _require_apart(arguments: argparse.Namespace) -> None:
    """`ConfigError` where DIR lies in the source: the next run would find its shards among the images."""
    if is_url(arguments.directory):
        return
    directory = Path(arguments.directory).resolve()
    for name in ("source", "train", "val", "devkit"):
        given = getattr(arguments, name, None)
        several = (
            given if isinstance(given, list) and arguments.command == "events" else []
        )  # parquet takes its own files
        for path in [given, *several]:
            if isinstance(path, str) and directory.is_relative_to(Path(path).resolve()):
                raise ConfigError(
                    f"DIR={arguments.directory} lies in {path}, which is packed; give a DIR outside of it"
                )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "verify":
        store = make_store(arguments.directory)
        num_faults = verify(store, decode=arguments.decode, num_workers=arguments.workers, say=_say)
        return EXIT_DATA if num_faults else EXIT_DONE
    if arguments.command == "info":
        store = make_store(arguments.directory)
        info(store, Path(arguments.sheet) if arguments.sheet else _sheet_path(store), arguments.seed, _say)
        return EXIT_DONE
    small = SHARD_BYTES if arguments.command in ("digits", "digits_dvs") else 0
    options = Options(shard_bytes=arguments.shard_bytes or small, seed=arguments.seed, limit=arguments.limit)
    if "resize" in arguments:  # of images
        decode = not arguments.no_decode
        options = replace(options, resize=arguments.resize, quality=arguments.quality, decode=decode)
    store = make_store(arguments.directory, arguments.scratch)
    _require_apart(arguments)
    source, allowed_bad = _source(arguments), arguments.allow_bad
    reading = str(source.settings) if isinstance(source, Recordings) else ""
    prepare(source, store, options, num_workers=arguments.workers, allowed_bad=allowed_bad, reading=reading, say=_say)
    return EXIT_DONE


def _sheet_path(store: Store) -> Path:
    return Path(SHEET_NAME) if store.upload else store.work / SHEET_NAME


class _ReaderGoneError(StopRequestedError):
    """The reader of our output has ended, as `head` does. No `OSError`: that would be taken for one of the store."""


def _printable(text: str) -> str:
    """`text` in one line: control characters, which names in a source may hold, are escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def _say(line: str) -> None:
    try:
        print(_printable(line), flush=True)  # without the flush a closed pipe shows only at the end
    except BrokenPipeError:
        raise _ReaderGoneError("SIGPIPE") from None


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise StopRequestedError(signal.Signals(number).name)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    os.environ.update(caches.stand_ins(os.environ))
    try:
        return _run(_parser().parse_args(argv))
    except (ConfigError, DataError) as error:
        sys.stderr.write(f"error: {_printable(str(error))}\n")
        return error.exit_code
    except _ReaderGoneError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # it is flushed again at exit
        return EXIT_PIPE
    except StopRequestedError as stop:
        sys.stderr.write(f"stopped by {stop}; finished shards are kept: run the same command again to continue\n")
        return EXIT_STOPPED
    except OSError as error:
        sys.stderr.write(f"error: {error.filename or 'input or output'}: {error.strerror or error}\n")
        return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
