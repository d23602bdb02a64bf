"""Programs of torch.export and models of ONNX compute what the network does, for any number of images."""

import json
import sys

import pytest
import torch
from torch import nn

from pipeline.errors import ConfigError
from pipeline.snn.exchange import programs
from tests.conftest import ROOT
from tests.snn.exchange.nets import digits, frames, network

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
        (lambda x: x.reshape(2, -1, 4) if len(x) == 2 else x, r"network \(Constraints violated \(N\)"),
    ],
    ids=["branch", "numpy", "two images alone"],
)
def test_a_network_that_cannot_be_traced_is_refused_in_one_line(how, said, tmp_path, capfd):
    for write in (programs.program, lambda net, **size: programs.save_onnx(tmp_path / "net.onnx", net, **size)):
        with pytest.raises(ConfigError, match=said) as caught:
            write(_Odd(how), in_channels=8, image_size=4)
        assert "take out .item(), .numpy() and branches on values, or use --format safetensors" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    assert not (tmp_path / "net.onnx").exists()


def test_what_is_said_while_a_network_is_traced_is_passed_on(capsys):
    programs.program(_Odd(lambda x: print("a word", file=sys.stderr) or x), in_channels=8, image_size=4)
    assert capsys.readouterr().err == "a word\n" * 2, "of the pass before, and of the trace"


def test_an_operation_that_onnx_lacks_is_refused(tmp_path):
    for name in ("onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed: it is in the extra export")
    with pytest.raises(ConfigError, match=r"cannot be written as ONNX \(.*bessel_j0.*\); use --format torch_export"):
        programs.save_onnx(tmp_path / "net.onnx", _Odd(torch.special.bessel_j0), in_channels=8, image_size=4)
