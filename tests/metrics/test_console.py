"""How a line of progress looks, in a log and on a terminal."""

import io
import math
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.metrics.console import COLUMNS, coloured, progress_line
from pipeline.run_dir.outages import Lines
from pipeline.run_dir.rank_log import Tee

NUMBER = st.floats(allow_nan=True, allow_infinity=True)
SHARE = st.floats(0, 1) | st.just(math.nan)
LAYER_VALUES = st.lists(SHARE, min_size=1, max_size=200)
TYPICAL = {
    "step": 50,
    "train_loss": 1.23456,
    "train_accuracy_ratio": 0.7766,
    "train_images_per_second": 1421.2,
    "data_wait_ratio": 0.001,
    "layer_chi": [1.0, 0.9981],
    "layer_coverage_ratio": [0.31, 0.3222],
    "layer_surrogate_width": [0.894, 1.17],
}


@given(
    record=st.fixed_dictionaries(
        {
            "step": st.integers(1, 9_999_999),
            "train_loss": NUMBER,
            "train_accuracy_ratio": SHARE,
            "train_images_per_second": st.floats(1e-6, 1e9),
            "data_wait_ratio": st.floats(0, 1),
            "layer_chi": LAYER_VALUES,
            "layer_coverage_ratio": LAYER_VALUES,
            "layer_surrogate_width": st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=200),
        },
        optional={"train_image_size_pixels": st.integers(8, 4096)},
    ),
    num_steps=st.integers(1, 9_999_999),
    epoch=st.floats(0, 1e5),
    eta_s=st.floats(0, 1e12) | st.just(math.nan) | st.just(math.inf),
)
@example(record=TYPICAL | {"step": 123_456, "train_loss": math.nan}, num_steps=654_321, epoch=99.0, eta_s=4e6)
def test_a_line_of_progress_fits_and_says_what_matters_most(record, num_steps, epoch, eta_s):
    line = progress_line(record, num_steps, epoch, eta_s)
    assert len(line) <= COLUMNS == 110
    shown = r"step +\d+/\d+  epoch +\S+  loss +\S+  acc +\S+%  .*\S+ img/s  .*ETA \S+"
    assert re.fullmatch(shown, line), line
    assert "wait" in line or record["data_wait_ratio"] < 0.05


@pytest.mark.parametrize(
    ("changed", "num_steps", "eta_s", "parts"),
    [
        ({}, 338, 33.9, "step  50/338|epoch 4.4|loss 1.2346|acc 77.7%|χ 0.998|cov 0.31–0.32|width 0.89–1.17|ETA 33s"),
        ({"train_images_per_second": 0.0173}, 338, 3600 * 123 + 62, "0.02 img/s|ETA 5d03h"),
        ({"train_images_per_second": 123_456.0}, 338, 3600 * 3 + 62, "123k img/s|ETA 3h01m"),
        ({"train_loss": math.nan, "train_accuracy_ratio": 0.0}, 338, 125, "loss    nan|acc 0.00%|ETA 2m"),
        ({"train_loss": 123456.7, "data_wait_ratio": 0.12}, 338, 1, "loss 123457|wait 12%|cov 0.31–0.32"),
        ({"layer_coverage_ratio": [math.nan] * 2, "train_image_size_pixels": 224}, 10**6, 1, "width 0.89–1.17|224²"),
        ({}, 1_601_460, 4e5, "step      50/1601460|cov 0.31–0.32|width 0.89–1.17|ETA 4d15h"),
    ],
)
def test_what_a_line_of_progress_holds(changed, num_steps, eta_s, parts):
    line = progress_line(TYPICAL | changed, num_steps, 4.4, eta_s)
    for part in parts.split("|"):
        assert part in line.split("  ") or part in line, line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_is_for_a_terminal_alone_and_never_for_the_log(tmp_path):
    lines = [progress_line(TYPICAL, 338, 4.4, 33.0), "validation after step 50: 98.89 % of 359 samples, loss 0.1"]
    for line in lines:
        painted = coloured(line, Terminal(), {"TERM": "xterm"})
        assert painted != line
        assert re.sub("\033\\[[0-9;]*m", "", painted) == line
        assert coloured(line, io.StringIO(), {"TERM": "xterm"}) == line
        assert coloured(line, Terminal(), {"TERM": "xterm", "NO_COLOR": "1"}) == line
        assert coloured(line, Terminal(), {"TERM": "dumb"}) == line
        assert coloured(line, Terminal(), {"NO_COLOR": ""}) == painted
        console, path = Terminal(), tmp_path / "rank-0.log"
        Tee(console, Lines(path), shown=True).write(painted + "\n")
        assert console.getvalue() == painted + "\n"
        assert path.read_text().endswith(f" {line}\n")
    plain = "rank 0: SIGINT: the run stops within two steps, with a checkpoint"
    assert coloured(plain, Terminal(), {}) == plain
