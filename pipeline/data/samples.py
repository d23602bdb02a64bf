"""Samples by number, with a stand-in for each that cannot be used.

A bad sample is never fatal by itself and never silent: it is replaced by the first good one of a list that depends on
its position alone, so that a resumed run, or one on another number of ranks, sees the same.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pipeline.data.image_headers import HeaderError, TruncatedError, read_header
from pipeline.data.shard_reader import Shards
from pipeline.errors import DataError

log = logging.getLogger(__name__)

MAX_LISTED = 50


class BadSamples:
    """What one rank replaced, in the order in which the training loop met it."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        """Reason by name."""
        self.count = 0
        """Places of the stream that were given to a stand-in: a bad sample counts again in every epoch."""

        self.by_reason: Counter[str] = Counter()
        """Places that this process gave to a stand-in."""

    def met(self, name: str, reason: str, *, instead: str) -> None:
        """Counts a bad sample where its batch is used, so that the count does not depend on what is read ahead."""
        self.count += 1
        self.by_reason[reason] += 1
        if name not in self.reasons:
            self.reasons[name] = reason
            log.warning("bad sample %s: %s; %s", name, reason, instead)


def refuse(
    reasons: dict[str, str], *, count: int, seen: int, num_samples: int, max_ratio: float, earlier: int = 0
) -> None:
    """Ends the run when more than `max_ratio` of the samples were bad.

    Args:
        reasons: reason by name, over all ranks.
        count: places that were given to a stand-in, over all ranks.
        seen: places of the stream that were used.
        num_samples: of the set. Until an epoch is over the limit is that of a whole one, or the first would stop it.
        max_ratio: `data.max_bad_ratio`.
        earlier: those of `count` that a run before this one met, and named in its log.

    Raises:
        DataError: with the list.
    """
    if not too_many(count, seen=seen, num_samples=num_samples, max_ratio=max_ratio):
        return
    kinds = ", ".join(f"{number} {reason}" for reason, number in sorted(Counter(reasons.values()).items()))
    names = [f"{name} ({reason})" for name, reason in sorted(reasons.items())]
    more = f", and {len(names) - MAX_LISTED} more named above" if len(names) > MAX_LISTED else ""
    if earlier:
        kinds = f"{earlier} before the resume, named in the log of then" + (f"; since then {kinds}" if kinds else "")
    raise DataError(
        f"{count} of {seen} samples were bad, more than data.max_bad_ratio={max_ratio} allows ({kinds}); make the "
        f"shards again without these, or raise the limit: {', '.join(names[:MAX_LISTED])}{more}"
    )


def too_many(count: int, *, seen: int, num_samples: int, max_ratio: float) -> bool:
    return count > max_ratio * max(seen, num_samples)


MAX_ATTEMPTS = 1000

REASONS = UNREADABLE, TRUNCATED, UNDECODABLE, LABEL = "unreadable", "truncated", "undecodable", "label out of range"


class Taken(NamedTuple):
    """`n` samples, the bad ones replaced."""

    numbers: np.ndarray
    """`(n,)` int64: what was taken."""
    encoded: list[np.ndarray]
    """Their files, uint8."""
    records: np.ndarray
    """`(n,)` `SAMPLE_DTYPE`."""
    bad: dict[int, int]
    """Slot → number of the bad sample that was asked for there."""


def flaw(encoded: bytes) -> str:
    """Why a JPEG or PNG is not whole, by the same reading as when it was packed; empty where it is.

    Decoders fill the missing part of a JPEG with grey and say nothing.
    """
    try:
        header = read_header(encoded)
    except TruncatedError:
        return TRUNCATED
    except HeaderError:
        return UNDECODABLE
    if header is None:
        return ""
    return TRUNCATED if header.truncated else UNDECODABLE if header.damage else ""


class Samples:
    """The samples of a shard set. One thread uses it at a time; `bad` may be read by any."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._num_classes = len(shards.manifest.classes)
        self.bad: dict[int, str] = {}
        """Reason by number, for every sample that was found bad so far."""

    def take(self, numbers: np.ndarray, stand_in: Callable[[int, int], int]) -> Taken:
        """Reads samples; `stand_in(slot, attempt)` numbers the candidates for a bad one's place.

        Raises:
            DataError: no candidate can be used, or a shard is missing.
        """
        owners, records = self._shards.locate(numbers)
        numbers, encoded, bad = numbers.copy(), [], {}
        for slot, (number, owner) in enumerate(zip(numbers.tolist(), owners.tolist(), strict=True)):
            content = self._usable(number, owner, records[slot])
            if content is None:
                bad[slot] = number
                numbers[slot], records[slot], content = self._replace(slot, number, stand_in)
            encoded.append(np.frombuffer(content, dtype=np.uint8))
        return Taken(numbers, encoded, records, bad)

    def _replace(self, slot: int, number: int, stand_in: Callable[[int, int], int]) -> tuple[int, np.void, bytes]:
        for attempt in range(MAX_ATTEMPTS):
            candidate = stand_in(slot, attempt)
            (owner,), (record,) = self._shards.locate(np.array([candidate]))
            content = self._usable(candidate, int(owner), record)
            if content is not None:
                return candidate, record, content
        raise DataError(
            f"{self.name(number)} is {self.bad[number]}, and so are all that could stand in for it; "
            "check the set with python -m data_prep verify"
        )

    def _usable(self, number: int, owner: int, record: np.void) -> bytes | None:
        """The sample's file, or None with the reason in `bad`."""
        if number in self.bad:
            return None
        if not 0 <= record["label"] < self._num_classes:
            self.bad[number] = LABEL
            return None
        try:
            content = self._shards.read(owner, int(record["offset"]), int(record["length"]))
        except (OSError, EOFError):
            self.bad[number] = UNREADABLE
            return None
        if reason := flaw(content):
            self.bad[number] = reason
            return None
        return content

    def name(self, number: int) -> str:
        return self._shards.name(number)
