"""Programs of torch.export and models of ONNX compute what the network does, for any number of images."""

import json

import pytest
import torch

from pipeline.snn.exchange import programs
from tests.snn.exchange.nets import digits, network

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
    assert [(one.name, one.shape[1:]) for one in session.get_inputs()] == [("images", [3, 16, 16])]

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
