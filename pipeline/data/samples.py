"""Reads samples by number, replaces bad ones by stand-ins, and ends a run that has too many bad ones.

A single bad sample is never fatal and never silent. Its stand-in is the first good sample of a list that depends only
on its position, so a resumed run, or a run on another number of ranks, sees the same samples.
"""

import logging
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from pipeline.data.decode.image_headers import HeaderError, TruncatedError, read_header
from pipeline.data.shard_reader import Shards
from pipeline.errors import DataError

log = logging.getLogger(__name__)

MAX_LISTED = 50
"""Bad samples that an error names, at most."""
MAX_ATTEMPTS = 1000
"""Candidates for a stand-in that are tried, at most."""
REASONS = UNREADABLE, TRUNCATED, UNDECODABLE, LABEL = "unreadable", "truncated", "undecodable", "label out of range"


class BadSamples:
    """The bad samples that one rank replaced, counted when the training loop uses their batches."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        """Reason by name of the sample."""
        self.count = 0
        """Stand-ins that were used: a bad sample counts again in every epoch."""
        self.by_reason: Counter[str] = Counter()
        """Stand-ins by reason, of this process alone: a resume does not restore it."""

    def met(self, name: str, reason: str, *, instead: str) -> None:
        """Counts a bad sample when its batch is used, so that the count does not depend on read-ahead."""
        self.count += 1
        self.by_reason[reason] += 1
        if name not in self.reasons:
            self.reasons[name] = reason
            log.warning("bad sample %s: %s; %s", name, reason, instead)


def refuse(
    reasons: dict[str, str], *, count: int, seen: int, num_samples: int, max_ratio: float, earlier: int = 0
) -> None:
    """Raises an error when more than `max_ratio` of the samples were bad.

    Args:
        reasons: reason by name of the sample, of all ranks.
        count: stand-ins that were used, on all ranks.
        seen: samples that were used so far, on all ranks.
        num_samples: of the set. In the first epoch the limit is that of a whole epoch: else one early bad sample would
            end the run.
        max_ratio: `data.max_bad_ratio`.
        earlier: the part of `count` from before the resume, whose samples are in the log of that time.

    Raises:
        DataError: the message lists the bad samples.
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


class Taken(NamedTuple):
    """`n` samples, with bad ones replaced."""

    numbers: np.ndarray
    """`(n,)` int64: the numbers of the samples that were taken."""
    encoded: list[np.ndarray]
    """Their files, uint8."""
    records: np.ndarray
    """`(n,)` `SAMPLE_DTYPE`."""
    bad: dict[int, int]
    """Slot → number of the bad sample that was asked for there."""


def flaw(encoded: bytes) -> str:
    """The reason why a JPEG or PNG is not whole, by the same check as in packing; empty if it is whole.

    Decoders silently fill the missing part of a JPEG with grey.
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
    """The samples of a shard set. One thread at a time may use it; any thread may read `bad`."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._num_classes = len(shards.manifest.classes)
        self.bad: dict[int, str] = {}
        """Reason by number, for every sample that was found bad so far."""

    def take(self, numbers: np.ndarray, stand_in: Callable[[int, int], int]) -> Taken:
        """Reads samples; `stand_in(slot, attempt)` gives the number of the next candidate to replace a bad one.

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
