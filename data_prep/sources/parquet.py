"""Parquet files as Hugging Face lays out image data sets: a column `image` of {bytes, path}, and `label`.

A row cannot be read without its row group, so a shuffled order would read each group hundreds of times. The images are
therefore copied once, in order, into one file next to the output, and read from there; it is removed at the end.
"""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_prep.collection import Split, SplitBuilder
from data_prep.progress import size
from data_prep.shards import TEMPORARY
from data_prep.sources.files import existing, path_fingerprint
from data_prep.sources.readers import FileReader
from pipeline.errors import ConfigError, DataError

_SPLITS = {"train": "train", "validation": "val", "val": "val", "valid": "val", "test": "test"}
_IMAGE_COLUMNS = ("image", "img")
_BATCH = 32


class Parquet:
    """Parquet files, or folders of them; the split is the start of a file's name: train-00000-of-00294.parquet."""

    def __init__(self, paths: list[str]) -> None:
        try:
            import pyarrow  # noqa: F401  # here, so that nothing is made where it is missing
        except ImportError:
            raise ConfigError(
                "parquet needs pyarrow, which is not installed; run: python -m pip install 'chispike[parquet]'"
            ) from None
        self._files: list[Path] = []
        for text in paths:
            path = existing(text, "parquet")
            found = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
            if not found:
                raise ConfigError(f"parquet: no *.parquet below {text}; check the path")
            self._files += found
        self._files.sort(key=lambda path: path.name)
        names = [path.name for path in self._files]
        if double := next((one for one, other in pairwise(names) if one == other), None):
            raise ConfigError(f"parquet: two files are called {double}; names tell their rows apart: rename one")
        self.description = f"{len(self._files)} parquet files from {paths[0]}"

    def fingerprint(self) -> list:
        return ["parquet", *(path_fingerprint(path) for path in self._files)]

    def index(self, work: Path, say: Callable[[str], None]) -> list[Split]:
        total = sum(path.stat().st_size for path in self._files)
        target = work / f"{TEMPORARY}parquet.unpacked"
        say(f"copying the images of {len(self._files)} files ({size(total)}) once, to {target}, removed at the end")
        groups: dict[str, list[Path]] = {}
        for path in self._files:
            groups.setdefault(_SPLITS.get(path.name.split("-")[0].split(".")[0], "train"), []).append(path)
        if "val" not in groups and "test" in groups:
            groups["val"] = groups.pop("test")  # what is there to evaluate on takes the name that training looks for
        reader, builders, names = FileReader(target), {}, None
        with open(target, "wb") as out:
            for split in sorted(groups, key=("train", "val", "test").index):
                builders[split] = SplitBuilder(split, [reader])
                for path in groups[split]:
                    here = _copy_images(path, out, builders[split])
                    if names is not None and here != names:
                        raise DataError(
                            f"{path} names other classes than the files before it; give files of one data set"
                        )
                    names = here
        labels = set().union(*(builder.class_names() for builder in builders.values()))
        highest = max((int(label) for label in labels), default=-1)
        names = names or [str(label) for label in range(highest + 1)]
        if highest >= len(names):
            raise DataError(
                f"label {highest} in {self._files[0].parent}, but only {len(names)} classes are named there"
            )
        numbers = tuple(str(label) for label in range(len(names)))
        display = {str(label): name for label, name in enumerate(names)}
        return [builder.build(numbers, display) for builder in builders.values()]


def _copy_images(path: Path, out: Any, builder: SplitBuilder) -> list[str] | None:
    """Appends the images of a file to `out` and their places to `builder`; returns the class names it states."""
    import pyarrow
    import pyarrow.parquet as parquet

    stem, row = path.name.removesuffix(".parquet"), 0
    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            column = next((name for name in _IMAGE_COLUMNS if name in schema.names), None)
            if column is None or "label" not in schema.names:
                raise DataError(f"{path} has the columns {', '.join(schema.names)}; image and label are needed")
            if not pyarrow.types.is_struct(schema.field(column).type):
                raise DataError(
                    f"{path}: {column} is {schema.field(column).type}; a struct of bytes and path is needed"
                )
            for batch in file.iter_batches(batch_size=_BATCH, columns=[column, "label"], use_threads=False):
                for image, label in zip(batch.column(column), batch.column("label"), strict=True):
                    _copy_row(image.as_py() or {}, label.as_py(), f"{stem}/{row:08d}", path, out, builder)
                    row += 1
            return _class_names(schema.metadata or {})
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{path} is no parquet file or is damaged ({' '.join(str(error).split())[:200]})") from None


def _copy_row(image: dict, label: object, place: str, path: Path, out: Any, builder: SplitBuilder) -> None:
    inner = str(image.get("path") or "image").rsplit("/", 1)[-1]
    name = f"{place}-{inner}"
    data = image.get("bytes")
    if not isinstance(label, int) or label < 0:
        raise DataError(f"{path}: row {place.rsplit('/')[-1]} has the label {label}; leave unlabelled files out")
    if data is None:
        builder.refuse(name, "no bytes in its row, only a path")
        return
    builder.add(name=name, label=str(label), place=0, offset=out.tell(), length=len(data))
    out.write(data)


def _class_names(metadata: dict) -> list[str] | None:
    """The names that Hugging Face's own metadata give the labels, where there are any."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return [str(name) for name in names] if isinstance(names, list) and len(set(names)) == len(names) else None
