"""The GPU kernels in Triton's interpreter on the CPU: their arithmetic, and the addresses of launches of any size."""

import importlib.util
from pathlib import Path

import pytest

from tests.support.snn_twins import run_in_interpreter

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; triton==3.7.1 fits torch 2.13", allow_module_level=True)


def test_the_kernels_agree_with_the_reference_in_the_interpreter():
    run_in_interpreter(Path(__file__).with_name("snn_triton_cases.py"))


def test_every_launch_at_sizes_past_2_31_is_allowed_and_stays_within_its_tensors():
    run_in_interpreter(Path(__file__).with_name("snn_launch_cases.py"))
