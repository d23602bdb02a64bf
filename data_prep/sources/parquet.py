"""Parquet files as Hugging Face lays out image data sets: a column `image` of {bytes, path}, and `label`.

A row cannot be read without its row group, so a shuffled order would read each group hundreds of times. The images are
therefore copied once, in order, into one file next to the output, and read from there; it is removed at the end.
Labels are looked at first: a set that cannot be packed is refused before its images are copied.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from data_prep.collection import Split, SplitBuilder
from data_prep.progress import size
from data_prep.sources.files import existing, is_hidden, path_fingerprint, walk_folder
from data_prep.sources.parquet_columns import UNLABELLED, Columns, classes_of, find_columns
from data_prep.sources.readers import FileReader
from data_prep.sources.splits import SPLITS, is_exactly_split, part_base, split_of, split_words
from data_prep.stores import SCRATCH
from pipeline.errors import ConfigError, DataError

_BATCH = 32
_TOTAL = re.compile(r"-of-0*(\d+)(?!\d)")  # train-00000-of-00002: how many files the split has


@dataclass(slots=True)
class _File:
    """One of the files, and what was found in it before its images are copied."""

    path: Path
    parts: tuple[str, ...]
    """Folders below what the user gave, and the name."""
    above: str | None = None
    """The split that `top` names, if it counts."""
    top: str = ""
    """Name of the folder that the user gave, or that the given file lies in."""
    split: str = "train"
    place: str = ""
    """Prefix of its rows' names."""
    columns: Columns | None = None
    labels: set = field(default_factory=set)
    """The distinct labels."""
    num_rows: int = 0
    num_unlabelled: int = 0


class Parquet:
    """Parquet files, or folders of them; the words of folders and names tell the split, as in `datasets`.

    Args:
        paths: files and folders.
        image_column: where the images are; None to find it.
        label_column: where the labels are; None to find it.
    """

    def __init__(self, paths: list[str], image_column: str | None = None, label_column: str | None = None) -> None:
        try:
            import pyarrow  # noqa: F401  # checked first, before anything is written
        except ImportError:
            raise ConfigError(
                "parquet needs pyarrow, which is not installed; run: python -m pip install 'chispike[parquet]'"
            ) from None
        self._chosen = (image_column, label_column)
        self._files = _files_of([existing(text, "parquet") for text in paths])
        self._files.sort(key=lambda file: (file.path.name, file.parts))
        times = Counter(file.path.absolute() for file in self._files)
        if double := [path for path, num in times.items() if num > 1]:
            raise ConfigError(f"parquet: {double[0]} is given twice; give each file once")
        self.description = f"{len(self._files)} parquet files from {paths[0]}"
        _set_splits(self._files)
        _set_places(self._files)

    def fingerprint(self) -> list:
        chosen = [list(self._chosen)] if any(self._chosen) else []
        return ["parquet", *(path_fingerprint(file.path) for file in self._files), *chosen]

    def index(self, work: Path, say: Callable[[str], None]) -> list[Split]:
        for file in self._files:
            _look(file, *self._chosen)
        files = _labelled(self._files, say)
        columns = _one_columns(files)
        names = classes_of(set().union(*(file.labels for file in files)), columns, f"{files[0].path.parent}")
        _refuse_new_classes(files, columns)
        order = sorted(files, key=lambda file: SPLITS.index(file.split))
        target = work / f"{SCRATCH}parquet.unpacked"
        total = sum(file.path.stat().st_size for file in files)
        for split, group in groupby(order, key=lambda file: file.split):
            _say_files(split, [*group], say)
        say(f"copying the images of {len(files)} files ({size(total)}) once, to {target}, removed at the end")
        reader, builders = FileReader(target), []
        number_of = {label: str(number) for number, label in enumerate(names)}
        with open(target, "wb") as out:
            for split, group in groupby(order, key=lambda file: file.split):
                builders.append(SplitBuilder(split, [reader]))
                for file in group:
                    _copy_images(file, out, builders[-1], number_of)
        display = dict(zip(number_of.values(), names.values(), strict=True))
        return [builder.build(tuple(display), display) for builder in builders]


def _files_of(given: list[Path]) -> list[_File]:
    tops = [path.absolute() if path.is_dir() else path.absolute().parent for path in given]
    apart = len({split_of(top.name) for top in tops}) > 1
    files = []
    for path, top in zip(given, tops, strict=True):
        # A given folder may have any name. It counts where it is just a split's word, or where given folders differ.
        above = split_of(top.name) if apart or is_exactly_split(top.name) else None
        inner = [path]
        if path.is_dir():
            inner = [*_below(path)]
            if not inner:
                raise ConfigError(f"parquet: no *.parquet below {path}; check the path")
        files += [_File(one, one.relative_to(path).parts or (one.name,), above, top.name) for one in inner]
    return files


def _below(folder: Path) -> Iterator[Path]:
    """The parquet files below `folder`; links are followed. `ConfigError` for a link that leads nowhere."""
    for found in walk_folder(folder):
        path = folder / os.fsdecode(found.name)
        kind = path.suffix.lower()
        if found.refused and not is_hidden(found.name) and kind in ("", ".parquet"):  # perhaps a folder of them
            raise ConfigError(f"parquet: {str(path)!a}: {found.refused}; mend or remove it")
        if kind == ".parquet" and not found.folder and not is_hidden(found.name):
            yield path


def _set_splits(files: list[_File]) -> None:
    """The split of each file by the words of its folders and its name; `ConfigError` where they cannot tell."""
    found: list[str | None] = []
    for file in files:
        exact = {split for folder in file.parts[:-1] if is_exactly_split(folder) for split in split_words(folder)}
        folders = exact or set().union(*map(split_words, file.parts[:-1]))
        words = folders | split_words(file.path.stem)
        if len(words) > 1:
            raise ConfigError(
                f"parquet: {file.path} names the splits {' and '.join(sorted(words))}; rename it, so that it names one"
            )
        found.append(next(iter(words), file.above))
    unnamed = [file for file, split in zip(files, found, strict=True) if split is None]
    if unnamed and len(unnamed) < len(files):
        raise ConfigError(
            f"parquet: {unnamed[0].path} names no split, while others do; leave it out, or put it into a folder train, "
            "validation or test"
        )
    for file, split in zip(files, found, strict=True):
        file.split = split or "train"
    _refuse_mixtures(files)


def _refuse_mixtures(files: list[_File]) -> None:
    """`ConfigError` where a split has files of several configurations, or copies, of one data set."""
    first: dict[str, _File] = {}
    for file in files:
        other = first.setdefault(file.split, file)
        if [*map(part_base, other.parts[:-1])] != [*map(part_base, file.parts[:-1])]:
            raise ConfigError(
                f"parquet: {file.split} has files in several folders, {other.path} and {file.path}; if these are "
                "configurations of one data set, give the folder of one, else give each of the folders"
            )
    counted: dict[str, _File] = {}
    for file in files:
        if _total(file) and _total(file) != _total(other := counted.setdefault(file.split, file)):
            raise ConfigError(
                f"parquet: {other.path} is one of {_total(other)} files of {file.split}, {file.path} one of "
                f"{_total(file)}; these are copies or configurations of one data set: give the files of one"
            )


def _total(file: _File) -> int:
    """How many files the split of `file` has by its name; 0 where that does not say."""
    found = _TOTAL.search(file.path.stem)
    return int(found[1]) if found else 0


def _say_files(split: str, files: list[_File], say: Callable[[str], None]) -> None:
    first, last, num = files[0].path.name, files[-1].path.name, len(files)
    say(f"{split}: {first}{f' to {last}, {num} files' if num > 1 else ''}")
    if (total := max(map(_total, files))) > num:
        say(f"warning: {split} has {total} files by their names, and {num} are given: the others are not packed")


def _set_places(files: list[_File]) -> None:
    """Sets the prefix of row names: the file's name. Where two files have the same name, their folders come before it,
    and first the given folder, where that tells the split."""
    alike = len({file.path.name for file in files}) < len(files)
    first: dict[str, _File] = {}
    for file in files:
        folders = (*((file.top,) if file.above else ()), *file.parts[:-1]) if alike else ()
        file.place = "/".join((*folders, file.path.stem))
        if (other := first.setdefault(file.place, file)) is not file:
            raise ConfigError(
                f"parquet: two files are called {file.path.name}, {other.path} and {file.path}; names tell their rows "
                "apart: rename one, or give the folder of both"
            )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The parquet file `path`; a `DataError` where it is none, or is damaged where it is read."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{path} is no parquet file or is damaged ({' '.join(str(error).split())[:200]})") from None


def _look(file: _File, image: str | None, label: str | None) -> None:
    """Finds the columns of a file and its labels."""
    with _opened(file.path) as opened:
        if file.split == "test" and label not in opened.schema_arrow.names:
            label = None  # a test split without labels is passed over
        file.columns = find_columns(opened.schema_arrow, file.path, image, label)
        file.num_rows = opened.metadata.num_rows
        if file.columns.label is None:
            file.num_unlabelled = file.num_rows
            return
        for batch in opened.iter_batches(columns=[file.columns.label], use_threads=False):
            values = Counter(batch.column(0).to_pylist())
            file.num_unlabelled += sum(values.pop(none, 0) for none in UNLABELLED)
            file.labels |= values.keys()


def _labelled(files: list[_File], say: Callable[[str], None]) -> list[_File]:
    """The files to pack: without those of an unlabelled test split; `DataError` where others lack labels."""
    kept = []
    for split in SPLITS:
        here = [file for file in files if file.split == split]
        num_rows, num_unlabelled = sum(file.num_rows for file in here), sum(file.num_unlabelled for file in here)
        if split == "test" and num_rows and num_rows == num_unlabelled:
            say(f"test is passed over: its {num_rows:,} images have no labels ({here[0].path.name})")
            continue
        kept += here
    for file in kept:
        assert file.columns is not None
        if file.columns.label is None:
            raise DataError(
                f"{file.path} has the columns {', '.join(file.columns.all)}, and none is known to hold labels; name it "
                "by --label-column"
            )
        if file.num_unlabelled:
            raise DataError(
                f"{file.path}: {file.num_unlabelled:,} of {file.num_rows:,} rows have no label ({file.columns.label} "
                "is empty or -1); leave unlabelled files out"
            )
        if file.columns.kind == "integer" and (lowest := min(file.labels, default=0)) < 0:
            raise DataError(f"{file.path} has the label {lowest} in {file.columns.label}; labels count from 0")
    if not kept:
        raise DataError(f"{files[0].path}: no file has labels, so there is nothing to learn; give labelled files")
    if not any(file.split == "val" for file in kept):
        for file in kept:
            file.split = "val" if file.split == "test" else file.split  # training evaluates on val
    return kept


def _one_columns(files: list[_File]) -> Columns:
    """The label column and the class names that all `files` share; `DataError` where they differ."""
    named = next((file for file in files if file.columns and file.columns.names), files[0])
    columns = named.columns
    assert columns is not None
    for file in files:
        assert file.columns is not None
        if file.columns.names not in (None, columns.names):
            raise DataError(f"{file.path} names other classes than {named.path}; give files of one data set")
        if (file.columns.label, file.columns.kind) != (columns.label, columns.kind):
            raise DataError(
                f"{file.path} has {file.columns.kind} labels in {file.columns.label}, {named.path} {columns.kind} "
                f"labels in {columns.label}; give files of one data set"
            )
    return columns


def _refuse_new_classes(files: list[_File], columns: Columns) -> None:
    """`DataError` where text labels come without a list of classes, and a split has one that the first split lacks."""
    known = set().union(*(file.labels for file in files if file.split == files[0].split))
    for file in files:
        if columns.kind == "text" and not columns.names and (extra := file.labels - known):
            raise DataError(
                f"{file.path} has the class {min(extra)} in {columns.label}, which {files[0].split} has not"
            )


def _copy_images(file: _File, out: Any, builder: SplitBuilder, number_of: dict[Any, str]) -> None:
    """Appends the images of a file to `out` and their places to `builder`."""
    columns, row = file.columns, 0
    assert columns is not None
    assert columns.label is not None
    with _opened(file.path) as opened:
        for batch in opened.iter_batches(_BATCH, columns=[columns.image, columns.label], use_threads=False):
            images, labels = batch.column(columns.image), batch.column(columns.label)
            for image, label in zip(images, labels, strict=True):
                _copy_row(image.as_py(), number_of[label.as_py()], f"{file.place}/{row:08d}", out, builder)
                row += 1


def _copy_row(image: dict | bytes | None, label: str, place: str, out: Any, builder: SplitBuilder) -> None:
    held = {"bytes": image} if isinstance(image, bytes) else image or {}
    inner = str(held.get("path") or "image").rsplit("/", 1)[-1]
    name, data = f"{place}-{inner}", held.get("bytes")
    if data is None:
        builder.refuse(name, "no bytes in its row, only a path")
        return
    builder.add(name=name, label=label, place=0, offset=out.tell(), length=len(data))
    out.write(data)
