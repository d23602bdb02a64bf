"""What the progress line says is true: counts, speeds, the time left, and how often it is written."""

import io

import pytest

from data_prep.progress import Progress, duration, size


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1e6

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("seconds", "num", "num_bytes", "expected"),
    [
        (0, 0, 0, "packed 0 of 1,200 images, 0 images/s, 0 MB/s"),
        (8, 400, 64_000_000, "packed 400 of 1,200 images, 50 images/s, 8 MB/s, 16 s left"),
        (400, 10, 64_000_000, "packed 10 of 1,200 images, 0 images/s, 0 MB/s, 13 h 13 min left"),
        (10, 1199, 0, "packed 1,199 of 1,200 images, 120 images/s, 0 MB/s, 0 s left"),
        (10, 1200, 20_000_000, "packed 1,200 of 1,200 images, 120 images/s, 2 MB/s"),
    ],
)
def test_counts_speeds_and_time_left_follow_from_what_was_done(seconds, num, num_bytes, expected):
    clock = Clock()
    progress = Progress(1200, "packed", io.StringIO(), clock)
    clock.now += seconds
    progress.add(num, num_bytes)
    assert progress.line() == expected


def test_with_nothing_to_do_it_says_so():
    assert Progress(0, "packed", io.StringIO(), Clock()).line() == "no image was left to be packed"


def test_a_log_gets_a_line_every_ten_seconds():
    clock, log = Clock(), io.StringIO()
    progress = Progress(100, "verified", log, clock)
    for _ in range(25):
        clock.now += 1
        progress.add(2, 0)
    progress.close()
    assert log.getvalue().splitlines() == [
        "verified 20 of 100 images, 2 images/s, 0 MB/s, 40 s left",
        "verified 40 of 100 images, 2 images/s, 0 MB/s, 30 s left",
    ]


def test_a_terminal_shows_one_line_that_is_rewritten_and_gone_at_the_end():
    clock, terminal = Clock(), Terminal()
    progress = Progress(4, "packed", terminal, clock)
    for _ in range(4):
        clock.now += 0.5
        progress.add(1, 0)
    progress.close()
    drawn = terminal.getvalue().split("\r\033[K")
    assert "\n" not in terminal.getvalue()
    assert [line.split(" images")[0] for line in drawn[1:-1]] == [f"packed {num} of 4" for num in (1, 2, 3, 4)]
    assert drawn[-1] == ""


def test_durations_and_sizes_round_into_the_unit_that_fits():
    assert [duration(seconds) for seconds in (0.4, 59.4, 59.6, 3599.4, 3599.6, 100_000)] == [
        "0 s", "59 s", "1 min 00 s", "59 min 59 s", "1 h 00 min", "27 h 46 min",
    ]  # fmt: skip
    assert [size(num) for num in (0, 999, 1000, 12_345, 999_600, 1_500_000_000, 12_000_000_000_000)] == [
        "0 B", "999 B", "1 kB", "12.3 kB", "1 MB", "1.5 GB", "12,000 GB",
    ]  # fmt: skip
