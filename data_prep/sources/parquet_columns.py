"""The columns of a parquet file that hold images and labels, and the classes that the labels stand for.

Where Hugging Face's `datasets` wrote the file, its metadata name the columns that are an Image or a ClassLabel, and the
classes.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DataError

_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "class", "target", "cls")
_MOST_CLASSES = 1_000_000
UNLABELLED = (None, -1, "")
"""What stands for no label."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Where images and labels are in one file."""

    image: str
    label: str | None
    """None where the file has no label column."""
    kind: str
    """Kind of the labels: integer, boolean or text; empty without labels."""
    names: tuple[str, ...] | None
    """Class names that the metadata give, in label order."""
    all: tuple[str, ...]
    """Names of all columns."""


def find_columns(schema: Any, path: Path, image: str | None, label: str | None) -> Columns:
    """The columns of the file `path` with this Arrow schema; `image` and `label` are the names that the user gives.

    Raises:
        ConfigError: the user's column is not in the file.
        DataError: there is no such column, there are several, or its type cannot be used.
    """
    features = _features(schema.metadata or {})
    for option, name in (("--image-column", image), ("--label-column", label)):
        if name is not None and name not in schema.names:
            raise ConfigError(f"{option}={name}: {path} has the columns {', '.join(schema.names)}; name one of them")
    image = image or _image_column(schema, features, path)
    label = label or _label_column(schema, features, path)
    held = schema.field(image).type
    if not _is_image(held):
        raise DataError(
            f"{path}: {image} is {held}; a struct of bytes and path, or the bytes alone, are needed: name another by "
            "--image-column"
        )
    if label is None:
        return Columns(image, None, "", None, tuple(schema.names))
    kind = _label_kind(schema.field(label).type, label, path)
    return Columns(image, label, kind, _names(features.get(label)), tuple(schema.names))


def _features(metadata: dict) -> dict[str, dict]:
    """What the metadata say of each column, where `datasets` wrote them."""
    try:
        found = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {str(name): feature for name, feature in found.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _image_column(schema: Any, features: dict[str, dict], path: Path) -> str:
    typed = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    found = [name for name in _IMAGE_NAMES if name in schema.names] or typed
    if not found:
        found = [name for name in schema.names if _is_image(schema.field(name).type)]
    if not found or (len(found) > 1 and found[0] not in _IMAGE_NAMES):
        what = f"several image columns, {' and '.join(found)}" if found else "no image column"
        raise DataError(
            f"{path} has {what} among {', '.join(schema.names)}; image and label are needed, or name the column by "
            "--image-column"
        )
    return found[0]


def _label_column(schema: Any, features: dict[str, dict], path: Path) -> str | None:
    if "label" in schema.names:
        return "label"
    typed = [name for name in schema.names if features.get(name, {}).get("_type") == "ClassLabel"]
    found = typed or [name for name in _LABEL_NAMES if name in schema.names]
    if len(found) > 1:
        raise DataError(f"{path} has the labels {' and '.join(found)}; choose one by --label-column={found[0]}")
    return found[0] if found else None


def _is_image(held: Any) -> bool:
    import pyarrow

    if pyarrow.types.is_struct(held):
        inner = next((field.type for field in held if field.name == "bytes"), None)
        return inner is not None and _is_image(inner)
    return pyarrow.types.is_binary(held) or pyarrow.types.is_large_binary(held)


def _label_kind(held: Any, label: str, path: Path) -> str:
    from pyarrow import types

    value = held.value_type if types.is_dictionary(held) else held
    if types.is_boolean(value):
        return "boolean"
    if types.is_integer(value):
        return "integer"
    if types.is_string(value) or types.is_large_string(value):
        return "text"
    raise DataError(
        f"{path}: {label} is {held}; integers, booleans or text are needed, one for an image: name another by "
        "--label-column"
    )


def _names(feature: dict | None) -> tuple[str, ...] | None:
    names = (feature or {}).get("names")
    if not isinstance(names, list) or len(set(map(str, names))) != len(names):
        return None
    return tuple(map(str, names))


def classes_of(found: Iterable[Any], columns: Columns, where: str) -> dict[Any, str]:
    """The class of every label, in the order of their numbers, from all labels of the collection `where`.

    Raises:
        DataError: a label is beyond the names, or too large for the number of a class.
    """
    labels = set(found)
    if columns.kind == "text":
        known = columns.names if columns.names and labels <= set(columns.names) else sorted(labels)
        return {name: name for name in known}
    if columns.kind == "boolean":
        names = columns.names if columns.names and len(columns.names) == 2 else ("False", "True")
        return dict(zip((False, True), names, strict=True))
    highest = max(labels, default=-1)
    if columns.names is None and highest >= _MOST_CLASSES:
        raise DataError(f"{where}: the label {highest} of {columns.label} is no number of a class, counted from 0")
    names = columns.names or [str(number) for number in range(highest + 1)]
    if highest >= len(names):
        raise DataError(f"{where}: label {highest} in {columns.label}, but only {len(names)} classes are named there")
    return dict(enumerate(names))
