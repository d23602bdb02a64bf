"""The policies of `data.aa`: TrivialAugmentWide by its name, RandAugment by timm's string."""

import re
from typing import NamedTuple

from pipeline.config.checks import require

TRIVIAL = "ta_wide"
_ALLOWED = (
    "'' (off), ta_wide, or rand-mM-inc1 with M in [0, 10] and, if you like, -nN (operations, 1 to 8), -mstdS (spread "
    "of M, in [0, 10]) and -pP (probability of each operation, in (0, 1]), as in rand-m9-mstd0.5-inc1"
)


class RandAugment(NamedTuple):
    """Cubuk et al., "RandAugment", 2019, with timm's parameters."""

    magnitude: float
    """In [0, 10]."""
    num_ops: int = 2
    """Operations one after the other."""
    spread: float = 0.0
    """Standard deviation of the magnitude, which is then cut to [0, 10]."""
    prob: float = 0.5
    """Probability that an operation is applied once it is chosen."""


def rand_augment(aa: str) -> RandAugment | None:
    """The RandAugment that `data.aa` stands for; None for another policy, or none.

    Raises:
        ConfigError: the text is no policy.
    """
    if aa in ("", TRIVIAL):
        return None
    head, *parts = aa.split("-")
    found: dict[str, str] = {}
    for part in parts:
        match = re.fullmatch(r"(mstd|m|n|p|inc)(\d+(?:\.\d+)?)", part)
        require(match is not None and match[1] not in found, "data.aa", aa, _ALLOWED)
        assert match is not None
        found[match[1]] = match[2]
    # Without inc1, timm's posterize, solarize and others grow weaker as the magnitude grows; that form is not offered.
    named = head == "rand" and "m" in found and found.get("inc") == "1" and "." not in found.get("n", "")
    require(named, "data.aa", aa, _ALLOWED)
    policy = RandAugment(
        magnitude=float(found["m"]),
        num_ops=int(found.get("n", 2)),
        spread=float(found.get("mstd", 0)),
        prob=float(found.get("p", 0.5)),
    )
    fits = policy.magnitude <= 10 and 1 <= policy.num_ops <= 8 and policy.spread <= 10 and 0 < policy.prob <= 1
    require(fits, "data.aa", aa, _ALLOWED)
    return policy
