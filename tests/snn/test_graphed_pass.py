"""Recorded passes: the same bits as passes that are not recorded, and what is not recorded or is refused.

The CPU has no CUDA graphs: the same node of autograd runs the pass again into static memory (HostReplay).
"""

import logging

import pytest
import torch
from torch import nn

from pipeline.config import Config, ModelConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.snn.graphed_pass import AS_IT_IS, CudaReplay, GraphedPass, HostReplay, record_passes, require_graphs
from pipeline.snn.losses import cross_entropy
from pipeline.snn.networks import sew_resnet
from pipeline.snn.neurons import NeuronState, bind
from tests.conftest import launch
from tests.snn.graph_ranks import ACCUMULATION, CASES, STEPS
from tests.support.rank_lines import told


@pytest.fixture(scope="module")
def cases() -> dict[str, dict]:
    done = launch("tests/snn/graph_ranks.py", ranks=2)
    assert done.returncode == 0, done.output
    return {line["case"]: line for line in told(done.output, "CASE")}


@pytest.mark.parametrize("case", CASES)
def test_engines_with_recorded_passes_train_bit_for_bit_as_without(case, cases):
    got = cases[case]
    assert got["steps"] == [True] * 2 * STEPS, "losses, indicators and widths of every step"
    assert got["state"], "weights, momentum, running statistics, moving average, controller"
    assert got["outputs stay"], "logits that the caller kept"
    assert got["smaller"], "a smaller batch runs as it is"
    recorded = STEPS * ACCUMULATION - AS_IT_IS
    if "ds_atgo" in case:  # every second step looks at the potentials, and the passes before it are not in a row
        assert 0 < got["replays"] < recorded
    else:
        assert got["replays"] == got["resumed replays"] == recorded


def network(**model) -> tuple[sew_resnet.SEWResNet, NeuronState, GraphedPass]:
    torch.manual_seed(0)
    module = sew_resnet.build(ModelConfig(**model), num_classes=5, image_size=8)
    neurons = bind(module)
    return module, neurons, record_passes(module, neurons, HostReplay)


def train(module: nn.Module, times: int = 1, size: int = 2) -> torch.Tensor:
    for seed in range(times):
        images = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        logits = module(images)
        cross_entropy(logits, torch.arange(size) % 5).backward()
    return logits


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def recorded(**model) -> tuple[sew_resnet.SEWResNet, NeuronState, GraphedPass]:
    module, neurons, graphed = network(**model)
    train(module, AS_IT_IS + 1)
    assert graphed.replays == 1
    return module, neurons, graphed


def test_a_gradient_that_autograd_keeps_is_not_written_into_by_the_next_replay():
    module, neurons, _ = recorded()
    module.zero_grad()
    neurons.zero_counts()
    train(module)
    first = [gradient.clone() for gradient in gradients(module)]
    counts = neurons.counts().clone()
    module.zero_grad()
    neurons.zero_counts()
    train(module)
    train(module)
    assert all(torch.equal(now, 2 * then) for now, then in zip(gradients(module), first, strict=True))
    assert torch.equal(neurons.counts(), 2 * counts)


def test_a_parameter_or_width_that_moved_in_memory_is_followed():
    module, _, graphed = recorded()
    with torch.no_grad():
        module.conv1.weight.data = module.conv1.weight.data * 1.5
    module.zero_grad()
    moved = train(module, AS_IT_IS + 2)
    assert graphed.replays == 3, "recorded again"
    assert torch.equal(moved.detach(), graphed._forward(_last()))
    bind(module)  # other vectors
    train(module)
    assert graphed.replays == 3


def _last() -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(AS_IT_IS + 1))


def test_the_size_of_images_may_change_for_good():
    module, _, graphed = recorded()
    for _ in range(AS_IT_IS):
        train(module, size=3)
    assert graphed.replays == 1
    train(module, 2, size=3)
    assert graphed.replays == 3


def test_evaluation_and_passes_without_gradient_run_as_they_are():
    module, _, graphed = recorded()
    with torch.no_grad():
        module(_last())
    module.eval()
    module(_last())
    assert graphed.replays == 1


@pytest.mark.parametrize("what", ["probe", "watch", "module", "parameter", "images", "frozen"])
def test_what_a_replay_would_leave_out_runs_as_it_is(what, caplog):
    module, neurons, graphed = recorded()
    seen = []
    if what == "probe":
        neurons.neurons[0].probe = seen.append
    elif what == "watch":
        neurons.neurons[0].watch = seen.append  # pyright: ignore[reportArgumentType]
    elif what == "module":
        module.fc.register_forward_hook(lambda *_: seen.append(1))
    elif what == "parameter":
        module.fc.weight.register_hook(seen.append)
    elif what == "frozen":
        module.bn1.eval()
        before = module.bn1.state_dict()["running_mean"].clone()
    if what == "images":
        images = _last().requires_grad_()
        module(images).sum().backward()
        seen.append(images.grad)
    else:
        with caplog.at_level(logging.WARNING):
            train(module, 2)
    assert graphed.replays == 1
    if what == "frozen":
        assert torch.equal(module.bn1.state_dict()["running_mean"], before)
    else:
        assert seen
        assert what == "images" or caplog.text.count("passes run without a graph while") == 1


def test_hooks_of_the_whole_network_are_called_around_a_replay():
    module, _, graphed = recorded()
    seen = []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    train(module)
    assert graphed.replays == 2
    assert seen == ["before", "after"]


def test_two_forward_passes_before_a_backward_pass_are_refused():
    module, _, _ = recorded()
    first, _second = module(_last()), module(_last())
    with pytest.raises(RuntimeError, match="before the next forward pass"):
        first.sum().backward()


def test_a_second_backward_pass_is_refused():
    module, _, _ = recorded()
    loss = module(_last()).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward pass once"):
        loss.backward()


def test_a_device_without_graphs_is_refused():
    config = Config(recipe="digits", train=TrainConfig(cuda_graph=True))
    with pytest.raises(ConfigError, match=r"^train\.cuda_graph=True is not allowed on this device \(cpu\)"):
        require_graphs(config, torch.device("cpu"))
    require_graphs(config, torch.device("cuda"))
    require_graphs(Config(recipe="digits"), torch.device("cpu"))


@pytest.mark.parametrize("inside", [{"sync_bn": True}, {"zero_stage": 3}])
def test_settings_that_exchange_data_within_a_pass_are_refused(inside):
    with pytest.raises(ConfigError, match=r"train\.cuda_graph=True .*exchanges data within a pass"):
        TrainConfig(cuda_graph=True, **inside)


class Capturing:
    """A capture whose end fails once something in it has failed, as CUDA's does."""

    def __init__(self, *_, **__) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, kind, *_) -> None:
        if kind is not None:
            raise RuntimeError("operation failed due to a previous error during capture")


def failing(error: Exception):
    def run(_images):
        raise error

    return run


def test_a_lack_of_memory_while_capturing_stays_what_it_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("uncorrectable ECC error")):
        with pytest.raises(type(error), match=str(error)):
            CudaReplay(failing(error), torch.zeros(1), [])


def test_a_pass_that_cannot_be_captured_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    refused = failing(RuntimeError("operation not permitted when stream is capturing\nmore"))
    with pytest.raises(ConfigError, match=r"cannot be captured \(operation not permitted when stream is capturing\)"):
        CudaReplay(refused, torch.zeros(1), [])
