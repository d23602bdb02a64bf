"""Integers as floats that survive an all-reduce exactly.

Three 12-bit limbs in fp32: a sum over up to 1,024 ranks stays below 2²², and is recovered exactly also where it is
averaged rather than summed.
"""

import torch
from torch import Tensor

LIMB_BITS, NUM_LIMBS, MAX_RANKS = 12, 3, 1024


def pack(counts: Tensor) -> Tensor:
    """`(n,)` int64, each in [0, 2**36), as `(3n,)` float32 limbs."""
    mask = (1 << LIMB_BITS) - 1
    return torch.cat([(counts >> (LIMB_BITS * limb)) & mask for limb in range(NUM_LIMBS)]).float()


def unpack(limbs: Tensor) -> Tensor:
    """The `(n,)` int64 of which the sums of the ranks' `pack` are given."""
    rows = limbs.double().round().long().view(NUM_LIMBS, -1)
    return sum((rows[limb] << (LIMB_BITS * limb) for limb in range(1, NUM_LIMBS)), start=rows[0])
