"""The account of bad samples: each named once in the log, all counted by reason, too many of them refused."""

import logging
from collections import Counter

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
