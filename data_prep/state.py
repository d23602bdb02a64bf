"""What a data set folder says about the run that made it. By it the same command goes on, or sees that all is done."""

import hashlib
import json
from dataclasses import asdict, dataclass, field

from data_prep.plan import Options
from data_prep.shard_writer import RECORDS, Record
from data_prep.stores import Store
from pipeline.data.manifest import MANIFEST_NAME
from pipeline.errors import ConfigError

STATE_NAME = "prep.json"
_FORMAT = "chispike-prep"
_OTHER = "give another DIR, or remove this one first"


@dataclass(slots=True)
class State:
    """`DIR/prep.json`."""

    request: str
    """Hash of the source's names, sizes and times, and of the options."""
    source: str
    """What was packed, in words."""
    options: dict
    reading: str = ""
    """Options of how the source's files are read, in words; empty for images."""
    plans: dict[str, str] = field(default_factory=dict)
    """Split: identity of its plan."""
    complete: bool = False
    counts: dict[str, dict] = field(default_factory=dict)
    """Split: samples in, out and refused, and how many of each kind."""

    def save(self, store: Store) -> None:
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=1, ensure_ascii=False)
        store.write(STATE_NAME, text.encode() + b"\n")


def request_identity(fingerprint: list, options: Options) -> str:
    """Hash of what was asked for."""
    return hashlib.sha256(json.dumps([fingerprint, asdict(options)], sort_keys=True).encode()).hexdigest()


def load_state(store: Store) -> State | None:
    """The state in the store, or None in an empty one; `ConfigError` where something else lies there."""
    data = store.read(STATE_NAME)
    if data is None:
        _require_empty(store)
        return None
    try:
        document = json.loads(data)
        if document.pop("format") != _FORMAT:
            raise ValueError("another format")
        return State(**document)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{store.where}/{STATE_NAME} is damaged ({error}); {_OTHER}") from None


def _require_empty(store: Store) -> None:
    if store.upload:
        found = list(store.sizes("")) + [name for name in ("train", "val") if store.read(f"{name}/{MANIFEST_NAME}")]
    else:
        found = [path.name for path in store.work.iterdir() if path.name != "lost+found"]
    found = [name for name in found if not name.startswith(".")]
    if found:
        raise ConfigError(f"{store.where} holds other files ({sorted(found)[0]}); {_OTHER}")


def reads_anew(store: Store, state: State, plans: dict[str, str], source: str, reading: str) -> bool:
    """Whether all is to be packed again, since an unfinished run has read the files in another way.

    Raises:
        ConfigError: the store holds another data set, or this one, made with other options or read in another way.
    """
    if state.reading != reading and state.source == source:
        if not state.complete:
            return True
        if state.reading:  # else made before it was noted
            raise ConfigError(f"{store.where} was made with {state.reading}, and not with {reading}; {_OTHER}")
    if state.plans and state.plans != plans:
        what = "other options or a changed source" if state.source == source else f"another data set ({state.source})"
        raise ConfigError(f"{store.where} was begun with {what}; {_OTHER}")
    return False


def finished_shards(store: Store, split: str) -> dict[str, Record]:
    """The records of shards that are whole: every file there, with the size that the record says."""
    sizes = store.sizes(split)
    found = {}
    for name in store.sizes(f"{split}/{RECORDS}"):
        data = store.read(f"{split}/{RECORDS}/{name}") if name.endswith(".json") else None
        try:
            record = Record.from_json((data or b"").decode())
        except (ValueError, KeyError, TypeError):
            continue
        shard = record.shard
        whole = sizes.get(shard.tar) == shard.num_bytes and shard.index in sizes and shard.samples in sizes
        if whole or not shard.num_samples:
            found[shard.name] = record
    return found


def forget(store: Store, split: str, *, records: bool) -> None:
    """Removes the split's manifest, and with `records` the records of its finished shards."""
    store.remove(f"{split}/{MANIFEST_NAME}")
    if records:
        for name in store.sizes(f"{split}/{RECORDS}"):
            store.remove(f"{split}/{RECORDS}/{name}")
