"""The GPU kernels: their arithmetic in Triton's interpreter on the CPU, and that they compile for real GPUs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.snn_twins import run_in_interpreter

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed; triton==3.7.1 fits torch 2.13", allow_module_level=True)

ROOT = Path(__file__).parents[2]


def test_the_kernels_agree_with_the_reference_in_the_interpreter():
    run_in_interpreter(Path(__file__).with_name("snn_triton_cases.py"))


COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipeline.snn.kernels import fused_triton as kernels

constants = dict(T=4, STATIC=False, NORM={norm}, ADD={norm}, LEAKY={leaky}, HARD=True, DETACH=False, SHAPE={shape},
                 PEAK=False, FROM_STATE=False, TO_STATE=False, COUNT=True, BLOCK_R=8, BLOCK_C=64)
if not {norm}:
    constants["R"] = 1  # all of a layer without channels is one row, and Triton compiles an argument of 1 in
types = dict(x="*bf16", shortcut="*bf16", out="*bf16", grad_s="*bf16", grad_x="*bf16")
for kernel in (kernels._forward, kernels._backward):
    signature, values = {{}}, {{}}
    for name in kernel.arg_names:
        if name in constants:
            signature[name], values[name] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name] = types.get(name.removesuffix("_ptr"), "*fp32")
        else:
            signature[name] = "fp32" if name in ("v_th", "v_reset") else "i32"
    for architecture in (80, 90):
        built = triton.compile(ASTSource(kernel, signature, values), target=GPUTarget("cuda", architecture, 32))
        text = built.asm["ptx"]
        print(kernel.__name__, architecture, len(built.asm["cubin"]), "st.local" in text)
"""


@pytest.mark.parametrize(("leaky", "shape", "norm"), [(False, 0, True), (True, 2, True), (False, 3, False)])
def test_the_kernels_compile_for_gpus_without_spilling_their_potentials(leaky, shape, norm, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE.format(leaky=leaky, shape=shape, norm=norm)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")[:-1]
    assert len(lines) == 4
    for line in lines:
        assert int(line.split()[2]) > 1000, line
        assert line.endswith("False"), line
