"""One side of benchmarks/train_step.py, in its own process: trains one step for each line on standard input.

The first line is a JSON object that says what to build; the answer to every line is one JSON line. It runs in
the environment that has the side's packages: the peer's needs only torch and SpikingJelly.
"""

import json
import resource
import sys
import time
import types

import torch


def peer_packages() -> tuple:
    """SpikingJelly's functional, layer, neuron, surrogate and sew_resnet."""
    # SpikingJelly imports torchvision for a download helper; if its version does not fit torch, that import fails.
    names = ("torchvision", "torchvision.models", "torchvision.models.utils")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    sys.modules[names[2]].load_state_dict_from_url = None  # pyright: ignore[reportAttributeAccessIssue]
    from spikingjelly.activation_based import (  # pyright: ignore[reportMissingImports]
        functional,
        layer,
        neuron,
        surrogate,
    )
    from spikingjelly.activation_based.model import sew_resnet  # pyright: ignore[reportMissingImports]

    return functional, layer, neuron, surrogate, sew_resnet


def peer_network(arch: str, T: int):
    """SpikingJelly's SEW-ResNet in multi-step mode, with its ATan surrogate and IF neurons, as its examples set it."""
    functional, _, neuron, surrogate, sew_resnet = peer_packages()
    network = getattr(sew_resnet, arch)(
        pretrained=False,
        cnf="ADD",
        spiking_neuron=neuron.IFNode,
        detach_reset=True,
        surrogate_function=surrogate.ATan(),
    )
    functional.set_step_mode(network, "m")

    def forward(images: torch.Tensor) -> torch.Tensor:
        functional.reset_net(network)
        return network(images.unsqueeze(0).repeat(T, 1, 1, 1, 1))

    return network, forward


def our_network(arch: str, T: int, counted: bool, checkpoint: bool, surrogate: str = "atan"):
    """This project's network with the same neurons, and the same surrogate unless another is named."""
    from pipeline.config import ModelConfig
    from pipeline.snn import neurons
    from pipeline.snn.networks import sew_resnet

    width = 1 / torch.pi if surrogate == "atan" else 1.0
    model = ModelConfig(arch=arch, T=T, surrogate=surrogate, width=width, checkpoint=checkpoint)
    network = sew_resnet.build(model, num_classes=1000, image_size=224)
    if counted:
        neurons.bind(network)
    return network, network


def main() -> None:
    job = json.loads(sys.stdin.readline())
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    if job["side"] == "peer":
        network, forward = peer_network(job["arch"], job["T"])
    else:
        side = job["side"]
        network, forward = our_network(job["arch"], job["T"], side != "ours, not counting", side == "ours, checkpoint")
    if job["weights"]:
        network.load_state_dict(torch.load(job["weights"], mmap=True))
    elif job["save"]:
        torch.save(network.state_dict(), job["save"])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(job["batch"], 3, job["size"], job["size"], generator=torch.Generator().manual_seed(1))
    labels = torch.randint(0, 1000, (job["batch"],), generator=torch.Generator().manual_seed(2))
    print(json.dumps({"torch": torch.__version__}), flush=True)

    def step() -> dict:
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logits = forward(images)
        loss = torch.nn.functional.cross_entropy(logits.float().mean(0), labels)
        loss.backward()
        optimizer.step()
        seconds = time.perf_counter() - start
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"seconds": seconds, "loss": loss.item(), "peak_bytes": peak_bytes}

    for line in sys.stdin:
        print(json.dumps(step() if json.loads(line) == "step" else profile(step)), flush=True)


def profile(step) -> dict:
    """Seconds of one step by operation, the largest first."""
    with torch.profiler.profile() as profiler:
        step()
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    return {event.key: event.self_cpu_time_total * 1e-6 for event in events[:12]}


if __name__ == "__main__":
    main()
