"""How Triton's kernels are launched on machines that differ from ours."""

import ast
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

KERNELS = ROOT / "pipeline/snn/kernels"


def launches(tree: ast.AST, guarded: bool = False) -> list[tuple[str, bool]]:
    """The kernels that are launched, `_kernel[grid](…)`, and whether it is on their tensors' device."""
    if isinstance(tree, ast.With):
        guarded = guarded or "device_of" in ast.unparse(tree.items[0])
    found = []
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Subscript) and isinstance(tree.func.value, ast.Name):
        found = [(tree.func.value.id, guarded)]
    return found + [launch for child in ast.iter_child_nodes(tree) for launch in launches(child, guarded)]


def test_every_kernel_is_launched_on_the_gpu_where_its_tensors_lie():
    """Triton would take the current GPU, which scripts that say `model.to("cuda:1")` leave at the first."""
    found = [
        launch
        for file in sorted(KERNELS.glob("*_triton.py"))
        for launch in launches(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert {"_forward", "_backward", "_affine", "_pack", "_pool", "_sum_tiles"} <= {name for name, _ in found}
    assert [name for name, guarded in found if not guarded] == []


def test_without_a_c_compiler_the_reference_runs_and_a_line_says_what_to_install(tmp_path):
    pytest.importorskip("triton")
    code = """
import logging
from triton.backends.nvidia.driver import CudaDriver
CudaDriver.is_active = staticmethod(lambda: True)
from pipeline.snn.kernels import dispatch
logging.basicConfig()
assert dispatch._triton() is None
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "TRITON_INTERPRET")}
    environment |= {"PATH": "/nowhere", "TRITON_CACHE_DIR": str(tmp_path), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "Failed to find C compiler" in done.stderr
    assert "install gcc and Python's headers (python3-dev)" in done.stderr
