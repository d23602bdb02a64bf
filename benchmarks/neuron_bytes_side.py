"""One side of benchmarks/neuron_bytes.py, in its own process: times and kept bytes of a spiking layer's ops.

The first line on standard input is a JSON object that says what to build; every further line asks for a round. The
answer to each line is one JSON line. It runs in the environment that has the side's packages.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

REPEATS = 3
"""Runs of each op in a round, of which the median is used."""


def kept_by(function: Callable[[], object]) -> int:
    """Bytes allocated by a call and not freed when it returns."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    return sum(event.self_cpu_memory_usage for event in profile.key_averages())


def our_ops(T: int, C: int, checkpoint: bool) -> dict[str, Callable]:
    """This project's neurons, BN + neurons + shortcut, and a residual block, on (T N, C, H, W)."""
    from pipeline.config import ModelConfig
    from pipeline.snn import neurons
    from pipeline.snn.networks import sew_resnet
    from pipeline.snn.networks.archs import TABLE

    model = ModelConfig(arch="sew_resnet34", T=T, surrogate="atan", width=1 / torch.pi, checkpoint=checkpoint)
    neuron, bn = neurons.from_config(model), nn.BatchNorm2d(C)
    block = sew_resnet.Block(model, TABLE[model.arch], C, C, 1, largest_in=2)
    for module in (neuron, block):
        neurons.bind(module)
    ops = {
        "neurons": lambda y, _: neuron(y.unflatten(0, (T, -1))),
        "BN + neurons + shortcut": lambda y, shortcut: neuron.after_norm(y, bn, T, shortcut=shortcut),
        "block": lambda _, shortcut: block(shortcut, T),
    }
    return {"block": ops["block"]} if checkpoint else ops


def peer_ops(T: int, C: int) -> tuple[dict[str, Callable], Callable[[], None]]:
    """The same ops of SpikingJelly in multi-step mode, as in its SEW-ResNet, and a function that resets them."""
    from benchmarks.train_step_side import peer_packages

    functional, layer, neuron, surrogate, sew_resnet = peer_packages()
    settings = {"detach_reset": True, "surrogate_function": surrogate.ATan()}
    fires, bn = neuron.IFNode(**settings), layer.BatchNorm2d(C)
    block = sew_resnet.BasicBlock(C, C, cnf="ADD", spiking_neuron=neuron.IFNode, **settings)
    for module in (fires, bn, block):
        functional.set_step_mode(module, "m")

    def run(op: Callable) -> Callable:
        return lambda y, shortcut: op(y.unflatten(0, (T, -1)), shortcut.unflatten(0, (T, -1)))

    def reset() -> None:
        for module in (fires, block):
            functional.reset_net(module)

    ops = {
        "neurons": run(lambda y, _: fires(y)),
        "BN + neurons + shortcut": run(lambda y, shortcut: fires(bn(y)) + shortcut),
        "block": run(lambda _, shortcut: block(shortcut)),
    }
    return ops, reset


def kept(op: Callable, reset: Callable[[], None], y: torch.Tensor, shortcut: torch.Tensor) -> int:
    """Bytes that the op's graph and modules hold when its inputs and its output are freed."""
    reset()
    graphs = []

    def forward() -> None:
        # Copies are made inside, so that an input counts only if the graph keeps it.
        inputs = [t.detach().requires_grad_().clone(memory_format=torch.preserve_format) for t in (y, shortcut)]
        with torch.autocast("cpu", torch.bfloat16):
            graphs.append(op(*inputs).grad_fn)

    return kept_by(forward)


def times(op: Callable, reset: Callable[[], None], y: torch.Tensor, shortcut: torch.Tensor) -> float:
    """Processor seconds of a forward and backward pass, the median of REPEATS."""
    inputs = [t.detach().requires_grad_() for t in (y, shortcut)]
    grad = torch.randn_like(y)
    seconds = []
    for _ in range(REPEATS):
        reset()
        start = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            out = op(*inputs)
        torch.autograd.grad(out, inputs, grad.view_as(out), allow_unused=True)
        seconds.append(time.process_time() - start)
        del out
    return statistics.median(seconds)


def copying(y: torch.Tensor) -> float:
    """Bytes read and written per processor second when a tensor is copied."""
    to, seconds = torch.empty_like(y), []
    for _ in range(REPEATS):
        start = time.process_time()
        to.copy_(y)
        seconds.append(time.process_time() - start)
    return 2 * y.nbytes / statistics.median(seconds)


def main() -> None:
    job = json.loads(sys.stdin.readline())
    # One thread: processor seconds must not include waits for other threads.
    torch.set_num_threads(1)
    torch.manual_seed(0)
    T, N, C, size, side = (job[name] for name in ("T", "N", "C", "size", "side"))
    if side == "peer":
        ops, reset = peer_ops(T, C)
    else:
        ops, reset = our_ops(T, C, side == "ours, checkpoint"), lambda: None
    layout = torch.contiguous_format if side == "peer" else torch.channels_last
    y = torch.randn(T * N, C, size, size).bfloat16().contiguous(memory_format=layout)
    shortcut = (torch.rand(y.shape) < 0.2).to(y.dtype).contiguous(memory_format=layout)
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        if json.loads(line) == "kept":
            # Twice: the first call also makes compiled kernels and constants.
            answer = [{name: kept(op, reset, y, shortcut) for name, op in ops.items()} for _ in range(2)][1]
        else:
            answer = {name: times(op, reset, y, shortcut) for name, op in ops.items() if name != "block"}
            answer["copy"] = copying(y)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
