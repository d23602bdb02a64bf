"""The pass over all gradients (pipeline/snn/kernels/sums.py): its twins for the CPU and for GPUs."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.snn.kernels import compiled, sums
from tests.support.snn_twins import require_compiler, run_in_interpreter

ROOT = Path(__file__).parents[2]
PART = 1 << 15  # of cpu.cpp
SIZES = [0, 1, 64, PART - 1, PART, PART + 1, 0, 5 * PART + 7, 3, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_gives_the_reference_sums_of_each_gradient_for_any_number_of_threads(dtype):
    require_compiler()
    flat = torch.randn(sum(SIZES), generator=torch.Generator().manual_seed(0)).to(dtype)
    flat[::3] = 0
    parts, threads = list(flat.split(SIZES)), torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(sums.run(parts))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)
    expected = sums.run_reference(parts)
    assert results[0][:, 0].tolist() == expected[:, 0].tolist()
    torch.testing.assert_close(results[0], expected, rtol=1e-13, atol=0)
    assert torch.equal(torch.stack([sums.run([part])[0] for part in parts]), results[0])


def test_all_gradients_of_a_dtype_are_one_call_of_the_library(monkeypatch):
    require_compiler()
    library, calls = compiled.library(torch.zeros(1)), []
    assert library is not None
    monkeypatch.setattr(compiled, "library", lambda _: library)
    count = library.gradient_sums
    monkeypatch.setattr(library, "gradient_sums", lambda *arguments: calls.append(count(*arguments)))
    sums.run([torch.ones(5) for _ in range(110)])
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_a_dtype_without_a_twin_takes_the_definition(dtype):
    parts = [torch.tensor([0.0, 3.0, -4.0], dtype=dtype), torch.zeros(0, dtype=dtype)]
    torch.testing.assert_close(sums.run(parts), torch.tensor([[2.0, 7, 25], [0, 0, 0]], dtype=torch.float64))


def test_gradients_of_several_dtypes_and_layouts_keep_their_order():
    parts = [torch.randn(4, 6, 3, 3), torch.randn(5).double(), torch.randn(8, 6).bfloat16(), torch.randn(300)[::3]]
    parts[0] = parts[0].to(memory_format=torch.channels_last)
    torch.testing.assert_close(sums.run(parts), sums.run_reference(parts), rtol=1e-14, atol=0)


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; triton==3.7.1 fits torch 2.13"
)


@needs_triton
def test_the_gpu_kernels_agree_with_the_reference_in_the_interpreter():
    run_in_interpreter(Path(__file__).with_name("snn_sums_cases.py"), CHISPIKE_TEST_INTERPRETER="1")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pipeline.snn.kernels import sums_triton

kernels = [(sums_triton._sum_tiles, dtype) for dtype in ("*fp32", "*bf16", "*fp16")] + [(sums_triton._fold, None)]
for kernel, dtype in kernels:
    types = dict(g="constexpr", offset="*i64", numel="*i64", first="*i64", owner="*i32", out="*fp64", tiles="*fp64")
    constants = dict(TILE=sums_triton.TILE, BLOCK=sums_triton._BLOCK if dtype else sums_triton._FOLD)
    types |= {name: "constexpr" for name in constants} | {"g": dtype}
    signature = {name: types[name.removesuffix("_ptr")] for name in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    for architecture in (80, 90, 100):
        built = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", architecture, 32))
        print(kernel.__name__, dtype, architecture, len(built.asm["cubin"]), "st.local" in built.asm["ptx"])
"""


@needs_triton
def test_the_gpu_kernels_compile_for_gpus_without_spilling(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 * 3
    for line in lines:
        assert int(line.split()[3]) > 1000, line
        assert line.endswith("False"), line


def test_the_interpreter_of_the_tests_is_refused_without_tritons_and_announced_with_it(monkeypatch, caplog):
    decide = compiled.gives_way.__wrapped__
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for off in ("", "0"):
        monkeypatch.setenv("CHISPIKE_TEST_INTERPRETER", off)
        assert not decide()
    monkeypatch.setenv("CHISPIKE_TEST_INTERPRETER", "1")
    with pytest.raises(ConfigError, match="CHISPIKE_TEST_INTERPRETER is set, but TRITON_INTERPRET is not 1"):
        decide()
    assert not caplog.records
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert decide()
    (said,) = caplog.messages
    assert said.startswith("for tests, GPU kernels run in Triton's interpreter on the CPU; else unset")
