"""Programs of torch.export and models of ONNX compute what the network does, for any number of images."""

import json
import sys

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.snn.exchange import programs
from tests.conftest import ROOT
from tests.snn.exchange.nets import K, digits, frames, network
from tests.support import peers

NETWORKS = [
    ("small_bottleneck", {"neuron": "plif", "reset": "soft", "T": 2}),  # max-pooling, a learned tau
    ("sew_tiny", {"neuron": "if", "connect": "iand", "T": 2}),
]
IDS = [arch for arch, _ in NETWORKS]


@pytest.mark.parametrize(("arch", "model"), NETWORKS, ids=IDS)
def test_a_program_gives_the_same_bits_for_any_number_of_images(arch, model, tmp_path):
    net = network(arch, **model)
    programs.save_program(tmp_path / "net.pt2", programs.program(net.train(), image_size=16), {"recipe": "digits"})
    assert net.training, "it is left as it was"
    said = {programs.ABOUT: ""}
    back = torch.export.load(tmp_path / "net.pt2", extra_files=said).module()
    assert json.loads(said[programs.ABOUT]) == {"recipe": "digits"}
    net.eval()
    with torch.no_grad():
        for number in (1, 5):
            assert torch.equal(back(digits(number)), net(digits(number)))
        net.fc.bias.add_(1)
        assert not torch.equal(back(digits(5)), net(digits(5)))


def test_onnxruntime_computes_the_same_logits(tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed: it is in the extra export")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it is in the extra dev")
    net = network("small_bottleneck", neuron="plif", reset="soft", T=2)
    programs.save_onnx(tmp_path / "net.onnx", net, image_size=16, about={"recipe": "digits"})
    assert net.fc.weight.dtype == torch.float64, "it is left as it was"
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert session.get_modelmeta().custom_metadata_map["recipe"] == "digits"
    assert [(one.name, one.shape) for one in session.get_inputs()] == [("images", ["N", 3, 16, 16])]

    def difference(number: int) -> float:
        images = digits(number).float()
        theirs = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        with torch.no_grad():
            return (theirs - net.float()(images)).abs().max().item()

    # A spike more or less changes a mean over the image by 1/16 or more, and a logit by some 1e-3: the spikes are
    # the same. Logits of about 1 have a rounding error of 1e-7.
    assert difference(1) < 1e-5
    assert difference(7) < 1e-5
    with torch.no_grad():
        net.conv1.weight *= 1.1
    assert difference(7) > 1e-4, "a network that is another gives other logits"


T = 3
OF_EVENTS = {"sew_cifar8": {"neuron": "lif"}, f"{ROOT}/docs/network_vgg.py:network": {"neuron": "plif", "v_th": 0.2}}
"""Networks that take event frames: one of ours, and one of a user's."""


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("arch", OF_EVENTS, ids=["ours", "own"])
def test_a_program_for_event_frames_is_for_one_T_and_any_number_of_recordings(arch):
    net = network(arch, events=True, T=T, **OF_EVENTS[arch])
    back = programs.program(net, in_channels=2, image_size=16, num_frames=T).module()
    with torch.no_grad():
        for number in (1, 5):
            assert torch.equal(back(frames(number, T)), net(frames(number, T)))
        for moment in range(T):
            without = frames(5, T).index_fill(0, torch.tensor(moment), 0)
            assert not torch.equal(back(without), net(frames(5, T))), f"frame {moment} is not looked at"
        for other, said in (
            (frames(5, T + 1), rf"images\.size\(\)\[0\] == {T}"),
            (frames(5, T)[:, :, :1], r"images\.size\(\)\[2\] == 2"),
            (frames(5, T)[:, 0], r"images\.size\(\)"),
        ):
            with pytest.raises(AssertionError, match=said):
                back(other)


def test_onnxruntime_computes_the_same_logits_of_event_frames(tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed: it is in the extra export")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it is in the extra dev")
    net = network("sew_cifar8", events=True, T=T, neuron="lif")
    programs.save_onnx(tmp_path / "net.onnx", net, in_channels=2, image_size=16, num_frames=T)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert [(one.name, one.shape) for one in session.get_inputs()] == [("frames", [T, "N", 2, 16, 16])]

    def difference(number: int) -> float:
        given = frames(number, T).float()
        theirs = torch.from_numpy(session.run(["logits"], {"frames": given.numpy()})[0])
        with torch.no_grad():
            return (theirs - net.float()(given)).abs().max().item()

    assert difference(1) < 1e-5
    assert difference(7) < 1e-5
    with torch.no_grad():
        net.conv1.weight *= 1.1
    assert difference(7) > 1e-4, "a network that is another gives other logits"
    with pytest.raises(Exception, match=rf"index: 0 Got: {T + 1} Expected: {T}"):
        session.run(["logits"], {"frames": frames(7, T + 1).float().numpy()})


class _Odd(nn.Module):
    """A network whose pass `how` changes."""

    def __init__(self, how) -> None:
        super().__init__()
        self.fc, self.how = nn.Linear(8, 4), how

    def forward(self, images):
        return self.how(self.fc(images.flatten(2).mean(2, keepdim=True).expand(-1, -1, 8)))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda x: x if x.mean().item() > 0 else -x, r"test_programs\.py:\d+: Could not guard on data-dependent"),
        (lambda x: x * float(x.numpy().mean()), r"test_programs\.py:\d+: \.numpy\(\) is not supported"),
    ],
    ids=["branch", "numpy"],
)
def test_a_network_that_cannot_be_traced_is_refused_in_one_line(how, said, tmp_path, capfd):
    for write in (programs.program, lambda net, **size: programs.save_onnx(tmp_path / "net.onnx", net, **size)):
        with pytest.raises(ConfigError, match=said) as caught:
            write(_Odd(how), in_channels=8, image_size=4)
        assert "take out .item(), .numpy() and branches on values, or use --format safetensors" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            lambda x: x.reshape(len(x), -1),
            r"\(You marked N as dynamic but your code specialized it to be a constant \(2\)\)",
        ),
        (lambda x: x if x.shape[0] < 8 else 2 * x, r"\(N=8: Guard failed: images\.size\(\)\[0\] <= 7\)"),
        (lambda x: x if x.shape[0] % 2 == 0 else 2 * x, r"\(N=1: Guard failed: images\.size\(\)\[0\] % 2 == 0\)"),
        (lambda x: x if x.shape[0] > 1 else 2 * x, r"\(N=1: the program gives other logits than the network\)"),
    ],
    ids=["len", "up to 7", "even", "more than one"],
)
def test_a_network_that_depends_on_the_number_of_images_is_refused_with_the_reason(how, said, tmp_path):
    for write in (programs.program, lambda net, **size: programs.save_onnx(tmp_path / "net.onnx", net, **size)):
        with pytest.raises(ConfigError, match=rf"^torch\.export cannot trace the network for any N {said}") as caught:
            write(_Odd(how), in_channels=8, image_size=4)
        assert "; take N from images.shape, not by len(images), int() or as a number, and" in str(caught.value)
        assert "\n" not in str(caught.value)
    programs.program(_Odd(lambda x: x.reshape(x.shape[0], -1)), in_channels=8, image_size=4)  # the cure


class _SpikingJelly(nn.Module):
    """A network of SpikingJelly's layers, whose own folding of T and N torch.export cannot prove for every N."""

    def __init__(self) -> None:
        super().__init__()
        from spikingjelly.activation_based import functional, layer, neuron

        self.conv, self.sn = layer.Conv2d(3, 8, 3), neuron.IFNode(v_threshold=0.2)
        self.pool, self.flatten, self.fc = layer.AdaptiveAvgPool2d(2), layer.Flatten(), layer.Linear(32, K)
        functional.set_step_mode(self, "m")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        from spikingjelly.activation_based import functional

        functional.reset_net(self)
        x = images.expand(T, *images.shape)
        return self.fc(self.flatten(self.pool(self.sn(self.conv(x)))))


@pytest.mark.filterwarnings("error:The tensor attribute")
def test_spikingjelly_s_layers_are_traced_for_any_number_of_images(tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed: it is in the extra export")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: it is in the extra dev")
    pytest.importorskip("spikingjelly", reason="needs Python 3.11")
    peers.spikingjelly()
    torch.manual_seed(0)
    net = _SpikingJelly().eval()
    program = programs.program(net, image_size=16).module()
    programs.save_onnx(tmp_path / "net.onnx", net, image_size=16)
    session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
    assert [(one.name, one.shape) for one in session.get_inputs()] == [("images", ["N", 3, 16, 16])]
    for number in (1, 2, 5, 40):
        images = digits(number).float()
        with torch.no_grad():
            logits = net(images)
            assert torch.equal(program(images), logits)
        theirs = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        torch.testing.assert_close(theirs, logits, rtol=0, atol=1e-5)
        assert logits.std(0).max() > 1e-3, "the neurons fire"


def test_what_is_said_while_a_network_is_traced_is_passed_on(capsys):
    programs.program(_Odd(lambda x: print("a word", file=sys.stderr) or x), in_channels=8, image_size=4)
    assert capsys.readouterr().err == "a word\n" * 4, "of the pass before, the trace and the two that are compared"


def test_an_operation_that_onnx_lacks_is_refused(tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed: it is in the extra export")
    with pytest.raises(ConfigError, match=r"cannot be written as ONNX \(.*bessel_j0.*\); use --format torch_export"):
        programs.save_onnx(tmp_path / "net.onnx", _Odd(torch.special.bessel_j0), in_channels=8, image_size=4)
