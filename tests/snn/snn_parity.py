"""SpikingJelly 2.0.0 against this project: fp64 end to end, fp32 neuron by neuron on the peer's inputs.

    python tests/snn/snn_parity.py [--freeze tests/snn/spikingjelly_reference.json]

Runs in an environment that has torch and spikingjelly==2.0.0 (`python -m benchmarks.train_step` makes one in
build/peer), with the repository on PYTHONPATH. Fails where the two differ by more than tests/snn/test_parity.py allows;
--freeze writes the peer's results, with which that test compares this project where the peer is not installed.
"""

import argparse
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch

from pipeline.config import ModelConfig
from pipeline.snn import state_dicts
from pipeline.snn.kernels import dispatch
from pipeline.snn.kernels.reference import Rule
from pipeline.snn.networks.build import build
from tests.snn import snn_network_case as case

CASES = [(arch, shape) for arch in ("sew_resnet18", "sew_resnet34") for shape in ("atan", "triangle")]
CASES += [("ms_resnet18", "atan"), ("ms_resnet34", "triangle")]
WIDTH = {"atan": 1 / torch.pi, "triangle": 1.0}


def peer(arch: str, shape: str, dtype: torch.dtype):
    """The peer's network, filled as ours is, and its neuron modules, in our forward order: branch before shortcut."""
    names = ("torchvision", "torchvision.models", "torchvision.models.utils")
    for name in names:
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[names[2]].load_state_dict_from_url = None  # pyright: ignore[reportAttributeAccessIssue]
    from spikingjelly.activation_based import (  # pyright: ignore[reportMissingImports]
        functional,
        neuron,
        surrogate,
    )
    from spikingjelly.activation_based.model import ms_resnet, sew_resnet  # pyright: ignore[reportMissingImports]

    g = surrogate.ATan(2.0) if shape == "atan" else surrogate.PiecewiseQuadratic(1.0)
    neurons = {"spiking_neuron": neuron.IFNode, "detach_reset": True, "surrogate_function": g}
    if arch.startswith("ms"):
        network = getattr(ms_resnet, arch)(num_classes=case.K, **neurons)
        each_step(network)
    else:
        network = getattr(sew_resnet, arch)(num_classes=case.K, cnf="ADD", **neurons)
    functional.set_step_mode(network, "m")
    mine, _ = ours(arch, shape)
    case.fill(mine.to(dtype))
    filled = mine.state_dict()
    network.to(dtype).load_state_dict({name: filled[our] for name, our in our_names(network).items()})
    return network, [module for module in network.modules() if isinstance(module, neuron.IFNode)]


def each_step(network) -> None:
    """Lets the peer's MS-ResNet return the logits of each step, as the other networks do, instead of their mean."""
    logits = []
    network.head.register_forward_hook(lambda _m, _i, out: logits.append(out))
    network.register_forward_hook(lambda _m, _i, _mean: logits.pop())


def our_names(network) -> dict[str, str]:
    """Our name for each name in the peer's state dict."""
    weights = network.state_dict()
    return dict(zip(weights, state_dicts.from_original(weights), strict=True))


def ours(arch: str, shape: str):
    """This project's network and its neuron modules."""
    model = ModelConfig(arch=arch, T=case.T, surrogate=shape, width=WIDTH[shape])
    network = build(model, num_classes=case.K, image_size=case.SIZE)
    return network, [layer.neuron for layer in network.spiking_layers()]


def our_spikes(neurons: list[Any]) -> dict[int, torch.Tensor]:
    """A dictionary that a forward pass fills with each layer's own spikes, before the shortcut, by neuron index."""
    found: dict[int, torch.Tensor] = {}
    for index, neuron in enumerate(neurons):
        plain = neuron.after_norm

        def spied(y, bn, num_steps, *, shortcut=None, plain=plain, key=index, **rest):
            out = plain(y, bn, num_steps, shortcut=shortcut, **rest)
            found[key] = out.detach() if shortcut is None else out.detach() - shortcut.detach()
            return out

        neuron.after_norm = spied  # pyright: ignore[reportAttributeAccessIssue]
        neuron.register_forward_hook(lambda _m, _i, out, key=index: found.__setitem__(key, out.detach()))
    return found


def run_ours(arch: str, shape: str) -> dict:
    """This project's results for a case, in fp64."""
    network, neurons = ours(arch, shape)
    network.double()
    case.fill(network)
    found = our_spikes(neurons)
    result = case.run(network, [], static=True)
    return {**result, "spikes": [found[index] for index in range(len(neurons))]}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b| in the maximum norm."""
    return ((a - b).abs().max() / b.abs().max()).item()


def compare_fp32(arch: str, shape: str) -> tuple[int, int]:
    """In fp32, neuron by neuron, on the peer's currents: spikes that differ, and those of them over 4 ulp off v_th."""
    network, neurons = peer(arch, shape, torch.float32)
    calls = []
    for module in neurons:
        module.register_forward_hook(lambda _m, inputs, out: calls.append((inputs[0].detach(), out.detach())))
    network(case.numbers("images", (case.N, 3, case.SIZE, case.SIZE)).float()[None].repeat(case.T, 1, 1, 1, 1))
    different = beyond = 0
    for x, s in calls:
        ours, _ = dispatch.run(x, Rule(shape=shape), torch.tensor(WIDTH[shape]), torch.tensor(1.0))
        wrong = ours != s
        v = torch.zeros_like(x[0])
        for t in range(case.T):
            h = v + x[t]
            near = (h - 1).abs() <= 4 * torch.finfo(torch.float32).eps
            beyond += int((wrong[t] & ~near).sum())
            v = h * (1 - s[t])
        different += int(wrong.sum())
    return different, beyond


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--freeze", metavar="FILE")
    arguments = parser.parse_args()
    frozen, failed = {}, False
    for arch, shape in CASES:
        network, neurons = peer(arch, shape, torch.float64)
        theirs = case.run(network, neurons, static=False)  # pyright: ignore
        names = our_names(network)
        theirs["gradients"] = {names[name]: gradient for name, gradient in theirs["gradients"].items()}
        mine = run_ours(arch, shape)
        equal = all(torch.equal(a.reshape(b.shape), b) for a, b in zip(mine["spikes"], theirs["spikes"], strict=True))
        logits = relative(mine["logits"], theirs["logits"])
        worst = max(relative(mine["gradients"][name], g) for name, g in theirs["gradients"].items())
        network_ours, _ = ours(arch, shape)
        state_dicts.load(network_ours, network.state_dict())
        different, beyond = compare_fp32(arch, shape)
        rate = sum(s.mean().item() for s in theirs["spikes"]) / len(neurons)
        print(
            f"{arch} {shape}: {len(neurons)} layers, mean rate {rate:.3f}, "
            f"fp64 spikes {'equal' if equal else 'DIFFER'}, logits {logits:.1e}, gradients {worst:.1e}; "
            f"fp32: {different} spikes differ, {beyond} beyond 4 ulp",
            flush=True,
        )
        failed |= not equal or logits > 1e-9 or worst > 1e-9 or beyond > 0
        frozen[f"{arch} {shape}"] = case.digest(theirs)
    if arguments.freeze and not failed:
        text = json.dumps({"peer": "spikingjelly 2.0.0", "torch": torch.__version__, "cases": frozen}, indent=1)
        Path(arguments.freeze).write_text(text + "\n")
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
