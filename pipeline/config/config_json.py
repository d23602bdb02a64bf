"""A configuration as a JSON document, such as a run's config.json: read, compared, made a `Config` again.

A document may come from another version of this program, or be written by hand. So its keys are compared with those of
this version before a `Config` is made of it.
"""

import json
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path

from pipeline.config import Config
from pipeline.errors import ConfigError, is_outage

SECTIONS: dict[str, type] = {
    field.name: field.type for field in fields(Config) if is_dataclass(field.type) and isinstance(field.type, type)
}
ADDED = {
    "data": (
        "aa",
        "color_jitter",
        "reprob",
        "mixup",
        "cutmix",
        "mixup_prob",
        "mixup_switch_prob",
        "event_frames",
        "event_shift",
        "event_drop",
    )
}
"""Fields by section that older documents lack, and whose defaults are what the program did before it had them."""
NAMED = 12
"""Most keys of each kind that a message names."""


def flatten(config: dict, prefix: str = "") -> dict[str, object]:
    """`{"data": {"path": p}}` as `{"data.path": p}`."""
    flat = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def read(path: Path, mend: str) -> dict | None:
    """The document in a file, which may lack sections; None if there is no file.

    Args:
        mend: for the message, what to do if the file holds something else.

    Raises:
        ConfigError: the file cannot be read, or does not hold a configuration.
        OSError: the file's storage is gone.
    """
    document = read_object(path, mend, "a configuration, which is a JSON object with sections")
    if document is None:
        return None
    for name in SECTIONS:
        if not isinstance(document.get(name, {}), dict):
            raise ConfigError(f"{path}: {name}={document[name]!r:.80} is not allowed; use a JSON object; {mend}")
    return _with_added(document)


def _with_added(document: dict) -> dict:
    """The document with the defaults of the fields in ADDED that it lacks, in the sections that it has."""
    defaults = {
        section: {field.name: field.default for field in fields(SECTIONS[section]) if field.name in added}
        for section, added in ADDED.items()
        if section in document
    }
    return {**document, **{section: {**values, **document[section]} for section, values in defaults.items()}}


def read_object(path: Path, mend: str, wanted: str = "a JSON object") -> dict | None:
    """The JSON object in a file; None where there is no file.

    Args:
        mend: as for `read`.
        wanted: what the file should hold, for the message.

    Raises:
        ConfigError: as `read`.
        OSError: the file's storage is gone.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if is_outage(error):
            raise
        raise ConfigError(f"{path} cannot be read ({error.strerror}); change its permissions") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}); {mend}") from None
    if not isinstance(document, dict):
        raise ConfigError(f"{path} is not {wanted}; {mend}")
    return document


def names() -> set[str]:
    """Names of all fields, such as `data.path`."""
    top = {field.name for field in fields(Config)} - SECTIONS.keys()
    return top | {f"{name}.{field.name}" for name, kind in SECTIONS.items() for field in fields(kind)}


def foreign_keys(document: dict) -> tuple[list[str], list[str]]:
    """The document's keys that this version does not know, and those of this version that it lacks."""
    there = document.keys() - SECTIONS.keys()
    there |= {f"{name}.{key}" for name in SECTIONS for key in document.get(name, {})}
    return sorted(there - names()), sorted(names() - there)


def said(unknown: Sequence[str], missing: Sequence[str]) -> str:
    """What `foreign_keys` found, in words."""
    parts = [f"it has {_listed(unknown)}, which this version does not know"] if unknown else []
    return " and ".join([*parts, f"it lacks {_listed(missing)}"] if missing else parts)


def _listed(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return ", ".join(keys[:NAMED]) + more


def config_of(document: dict) -> Config:
    """The `Config` of a document whose keys are all known, as `Config.to_dict` made it; missing fields take defaults.

    Raises:
        ConfigError: a value is not allowed.
    """
    sections = {name: kind(**_tuples(document.get(name, {}))) for name, kind in SECTIONS.items()}
    return Config(**{"recipe": "", **document, **sections})


def _tuples(section: dict) -> dict:
    """The section with tuples for lists, since JSON has no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in section.items()}
