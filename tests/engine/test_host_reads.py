"""A step in which the host waits for nothing of its own: each read inside the real loop is known by name.

What waits for the device stops the launches of the next kernels, and cannot be captured in a CUDA graph. What runs on
GPUs alone (the Triton kernels, code behind `is_cuda`) is not seen here.
"""

import json
from pathlib import Path

import pytest
import torch

from pipeline.data.manifest import Manifest
from pipeline.errors import EXIT_DONE
from tests.conftest import free_port, launch
from tests.support.host_reads import Read, watched
from tests.support.rank_lines import told

STEPS, LOG_EVERY, BATCH = 6, 3, 16
SETTINGS = {
    0: "--model.neuron plif --model.scale rms --model.connect iand",
    1: "--model.neuron lif --chi.policy ds_atgo --optim.clip 1 --train.ema_decay 0.5",
}
"""By ZeRO stage."""
HOST = {
    "pipeline/chi/async_read.py _values",  # of the step before, from pinned memory
    "pipeline/snn/kernels/compiled.py _tail",  # the CPU's kernels take numbers, the GPU's take addresses
}
KNOWN = {
    0: {"pipeline/chi/comm_hook.py _not_finite"},  # DeepSpeed checks nothing here
    1: {  # DeepSpeed's search for an overflow, and the norm that it clips by
        "deepspeed/runtime/utils.py is_invalid_grad_norm",
        "deepspeed/runtime/utils.py mask_nan_or_inf_with_val_inplace",
        "deepspeed/runtime/zero/stage_1_and_2.py get_grad_norm_direct",
    },
}
"""What the host waits for in every step."""
AT_START = {"pipeline/chi/comm_hook.py compare"}  # χ's self-check
ONCE = {"pipeline/chi/async_read.py __call__"}  # constants, from pinned memory, in the step that first needs them
WHEN_LOGGED = {
    "pipeline/chi/decisions.py record_of",
    "pipeline/chi/indicators.py to_lists",
    "pipeline/metrics/run_log.py _log",
    "pipeline/metrics/run_log.py flush",
}


@pytest.fixture(scope="module")
def steps(digits: Path, tmp_path_factory) -> dict[int, list[set[str]]]:
    """By ZeRO stage: where the host read, in every step of a run in bf16."""
    epochs = (STEPS - 0.5) * BATCH / Manifest.load(digits / "train").num_samples
    common = (
        f"--recipe digits --data.path {digits} --data.image_size 8 --data.global_batch {BATCH} --data.micro_batch 4 "
        f"--model.T 2 --train.precision bf16 --train.log_every {LOG_EVERY} --train.epochs {epochs} --chi.interval 2 "
        f"--metrics.port 0"
    ).split()
    runs = []
    for stage, words in SETTINGS.items():
        own = ["--run_dir", str(tmp_path_factory.mktemp("reads") / "run"), "--train.zero_stage", str(stage)]
        runs.append((free_port(), [*common, *own, *words.split()]))
    done = launch("tests/engine/host_read_job.py", ranks=1, RUNS=json.dumps(runs))
    assert done.returncode == EXIT_DONE, done.output
    found = told(done.output, "READS")
    return {stage: [{where for _, where in step} for step in run] for stage, run in zip(SETTINGS, found, strict=True)}


@pytest.mark.parametrize("stage", SETTINGS)
def test_a_step_reads_nothing_but_what_is_known(steps, stage):
    assert len(steps[stage]) == STEPS
    for step, reads in enumerate(steps[stage][:-1], start=1):  # the last one is also saved
        known = HOST | KNOWN[stage]
        known = known | AT_START if step == 1 else known
        assert reads - WHEN_LOGGED - ONCE == known, f"step {step}"
        assert (reads & WHEN_LOGGED == WHEN_LOGGED) == (step % LOG_EVERY == 0), f"step {step}"
        assert step % LOG_EVERY == 0 or not reads & WHEN_LOGGED, f"step {step}"


X = torch.arange(3.0)


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * float(grads[0].max())


def hooked(x: torch.Tensor) -> None:
    leaf = x.clone().requires_grad_()
    leaf.register_hook(lambda grad: grad if grad.sum() > 0 else None)
    leaf.sum().backward()


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: int(x[0]),
        lambda x: range(5)[x[0].long()],
        lambda x: f"{x[0]:.2f}",
        lambda x: 1 if x[0] > 0 else 2,
        lambda x: 3.0 in x,
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.to(device=x.device, dtype=torch.float64),
        lambda x: x.numpy(),
        lambda x: torch.nonzero(x),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x + torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: x.masked_fill_(x > 1, 2).index_put_((x > 0,), x.new_zeros(())),
        lambda x: Backward.apply(x.clone().requires_grad_()).sum().backward(),
        hooked,
    ],
)
def test_every_kind_of_read_is_seen(read):
    reads: list[Read] = []
    with watched(reads):
        read(X.clone())
    assert reads, "nothing was seen"
    assert {where.split()[0] for _, where in reads} == {"tests/engine/test_host_reads.py"}


def test_what_the_device_does_alone_is_no_read():
    reads: list[Read] = []
    with watched(reads):
        x = X.clone().requires_grad_()
        y = torch.where(x > 0, x, torch.zeros_like(x)).to(torch.bfloat16) * 0.5 + x.new_full((), 2.0)
        y.sum().backward()
        torch.empty(3).copy_(x.detach(), non_blocking=True).to(x.device, non_blocking=True)[1].fill_(3)
    assert reads == []
