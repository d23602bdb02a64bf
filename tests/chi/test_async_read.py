"""`pipeline/chi/async_read.py`: reads that arrive a step later, and constants that are sent only when they change."""

import torch

from pipeline.chi.async_read import AsyncRead, Constants


def test_what_is_sent_is_read_a_step_later_or_at_once_on_request():
    later, sent = AsyncRead(torch.zeros(2, dtype=torch.int64)), torch.zeros(2, dtype=torch.int64)
    seen = []
    for value in (1, 2, 3):
        sent.fill_(value)  # the sender may reuse its tensor at once
        seen.append((later.late(10 * value, sent), later.newest()))
    assert seen == [
        ((0, [0, 0]), (10, [1, 1])),
        ((10, [1, 1]), (20, [2, 2])),
        ((20, [2, 2]), (30, [3, 3])),
    ]


def test_a_tensor_of_constants_is_made_anew_only_when_they_change():
    constants = Constants(torch.device("cpu"))
    first = constants([3, 4])
    assert constants([3, 4]) is first
    assert constants([3, 5]).tolist() == [3, 5]
    assert first.tolist() == [3, 4]
