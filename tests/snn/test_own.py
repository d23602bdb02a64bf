"""snn/networks/own.py: a network of the user's own, and what the rest of the pipeline measures of it."""

import copy
import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.config import ModelConfig
from pipeline.engine import load_network
from pipeline.errors import ConfigError
from pipeline.snn import energy, losses, memory_estimate, neurons, state_dicts
from pipeline.snn.networks import own_source
from pipeline.snn.networks.build import build
from pipeline.snn.networks.own import OwnNetwork
from pipeline.snn.neurons import bind
from tests.conftest import ROOT
from tests.snn.own_nets import SMALL, built, written


@pytest.mark.parametrize("name", ["vgg.py:network", "spikformer.py:network", "psn.py:network", "psn.py:sliding"])
def test_the_examples_of_the_docs_take_images_and_event_frames(name):
    arch = str(ROOT / f"docs/network_{name}")
    network = built(arch, 16, T=3)
    images = torch.randn(2, 3, 16, 16)
    assert network(images).shape == (3, 2, 5)
    network.eval()
    frames = images.expand(3, -1, -1, -1, -1)
    torch.testing.assert_close(network(frames), network(images), rtol=0, atol=1e-6)
    torch.manual_seed(0)
    events = build(ModelConfig(arch=arch, T=3), num_classes=5, in_channels=2, image_size=16)
    assert events(torch.randn(3, 2, 2, 16, 16)).shape == (3, 2, 5)


def test_the_trial_pass_finds_what_feeds_each_layer_in_the_order_of_use():
    network = built(str(ROOT / "docs/network_spikformer.py") + ":network", 16)
    names = {id(p): name for name, p in network.named_parameters()}
    found = {layer.name: names.get(id(layer.weight)) for layer in network.spiking_layers()}
    assert list(found)[:2] == ["patches.0.2", "patches.1.2"]
    attention = [f"blocks.0.attention.{part}neurons" for part in ("q.", "k.", "v.", "", "out.")]
    assert list(found)[2:7] == attention, "in the order of the forward pass, not of registration"
    assert found["patches.0.2"] == "patches.0.0.weight"
    assert found["blocks.0.attention.neurons"] is None, "a product of spikes feeds it"
    assert found["blocks.0.attention.out.neurons"] == "blocks.0.attention.out.weight.weight"
    assert found["blocks.1.mlp.1.neurons"] == "blocks.1.mlp.1.weight.weight"
    norms = [layer.norm for layer in network.spiking_layers() if layer.weight is not None]
    assert norms[0] is network.get_submodule("patches.0.1")
    assert norms[-1] is network.get_submodule("blocks.1.mlp.1.norm")


def test_a_network_is_the_user_s_module_with_its_own_names_and_weights(tmp_path):
    arch = written(tmp_path, SMALL)
    network = built(arch)
    namespace: dict = {}
    exec(SMALL, namespace)
    torch.manual_seed(0)
    theirs = namespace["network"](ModelConfig(), 5)
    ours = network.state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours[name]), f"the trial changed {name}"
    assert all(parameter.grad is None for parameter in network.parameters())
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(network(images), theirs(images))
    network.eval()
    assert not network.get_submodule("bn").training
    assert torch.equal(network(images), theirs.eval()(images))
    doubled = copy.deepcopy(network).double()
    assert next(doubled.parameters()).dtype == torch.float64
    assert doubled(images.double()).dtype == torch.float64
    assert next(network.parameters()).dtype == torch.float32
    state_dicts.load(built(arch), theirs.state_dict())


def test_logits_of_a_mean_over_time_become_one_step(tmp_path):
    network = built(written(tmp_path, SMALL.replace("s.mean((3, 4))", "s.mean((0, 3, 4))")))
    assert network(torch.randn(2, 3, 8, 8)).shape == (1, 2, 5)


def test_names_that_look_like_the_original_code_s_are_left_alone(tmp_path):
    text = SMALL.replace(
        "self.conv, self.bn, self.sn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), neurons.from_config(model)",
        "conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)); self.sn = neurons.from_config(model)\n"
        "        self.layer1 = nn.ModuleList([nn.ModuleDict({'conv1': conv})])",
    ).replace("self.bn(self.conv(images))", "self.layer1[0]['conv1'](images)")
    arch = written(tmp_path, text)
    network = built(arch)
    assert "layer1.0.conv1.0.weight" in network.state_dict()
    state_dicts.load(built(arch), network.state_dict())


def test_a_module_of_a_package_is_found_beside_the_command(tmp_path, monkeypatch):
    (tmp_path / "my_nets_of_test").mkdir()
    (tmp_path / "my_nets_of_test" / "__init__.py").write_text("")
    written(tmp_path / "my_nets_of_test", SMALL, "small.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert isinstance(built("my_nets_of_test.small:network"), OwnNetwork)
    with pytest.raises(ConfigError, match=r"there is no module my_nets_of_test\.none on this machine; install it on"):
        built("my_nets_of_test.none:network")
    with pytest.raises(ConfigError, match=r"no_such_package\.none.* on this machine|cannot be imported"):
        built("no_such_package.none:network")


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_what_a_file_imports_from_beside_it_is_known_by_hash(tmp_path):
    (tmp_path / "beside_of_test").mkdir()
    (tmp_path / "beside_of_test" / "__init__.py").write_text("CHANNELS = 4\n")
    (tmp_path / "late_of_test.py").write_text("")
    (tmp_path / "unused_of_test.py").write_text("")
    text = SMALL.replace("import torch\n", "import torch\nimport beside_of_test, zlib\n", 1)
    text = text.replace("        s = self", "        import late_of_test\n        s = self")
    (tmp_path / "other").mkdir()
    arch = written(tmp_path, text).replace(str(tmp_path), f"{tmp_path}/other/..")
    built(arch)
    source = own_source.find(arch)
    assert source is not None
    names = ["beside_of_test/__init__.py", "late_of_test.py"]
    assert own_source.imported(source) == {name: digest_of(tmp_path / name) for name in names}
    (tmp_path / "link").symlink_to(tmp_path)
    linked = own_source.find(f"{tmp_path}/link/mine.py:network")
    assert linked is not None
    assert list(own_source.imported(linked)) == names
    (tmp_path / "late_of_test.py").unlink()
    assert list(own_source.imported(source)) == names[:1]


def test_what_a_module_imports_from_its_package_is_known_by_hash(tmp_path, monkeypatch):
    package = tmp_path / "nets_of_test"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "deep" / "__init__.py").write_text("")
    (package / "parts.py").write_text("")
    (tmp_path / "outside_of_test.py").write_text("")
    text = SMALL.replace("import torch\n", "import torch\nimport outside_of_test\nfrom .. import parts\n", 1)
    written(package / "deep", text, "small.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    built("nets_of_test.deep.small:network")
    source = own_source.find("nets_of_test.deep.small:network")
    assert source is not None
    names = ["__init__.py", "deep/__init__.py", "parts.py"]
    assert own_source.imported(source) == {name: digest_of(package / name) for name in names}
    itself = own_source.find("nets_of_test.deep:network")
    assert itself is not None
    assert itself.folder == package
    alone = own_source.find("outside_of_test:network")
    assert alone is not None
    assert alone.folder == tmp_path


def test_files_of_libraries_and_of_this_program_are_not_the_user_s(tmp_path):
    def theirs(arch: str, file: Path, module: str = "") -> list[str]:
        source = own_source.Source(arch, module, tmp_path / "site-packages/nets/small.py", "network")
        return list(own_source.theirs(source, [str(file)]).values())

    mine = f"{ROOT}/mine.py:network"
    assert theirs(mine, ROOT / "docs/network_vgg.py") == ["docs/network_vgg.py"]
    for file in (
        "pipeline/run.py",
        "launch/train.py",
        "data_prep/plan.py",
        ".venv/lib/site-packages/torch/__init__.py",
    ):
        assert theirs(mine, ROOT / file) == [], file
    library = Path(json.__file__).parents[1]
    assert theirs(f"{library.parent}/mine.py:network", Path(json.__file__)) == []
    assert theirs("nets.small:network", tmp_path / "site-packages/nets/parts.py", "nets.small") == ["parts.py"]


@pytest.mark.parametrize("norm", ["nn.BatchNorm2d(4)", "nn.BatchNorm2d(4, affine=False)"])
def test_a_network_in_fp16_normalises_in_fp32_and_takes_what_is_not_cast(norm, tmp_path):
    text = SMALL.replace("nn.BatchNorm2d(4)", norm)
    text = text.replace("self.fc = nn", "self.register_buffer('gain', torch.full((4,), 1.5)); self.fc = nn")
    network = built(written(tmp_path, text.replace("s.mean((3, 4))", "s.mean((3, 4)) * self.gain")))
    half, images = copy.deepcopy(network), torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    load_network.cast(half, "fp16")
    expected, logits = network(images), half(images.half())
    assert logits.dtype == torch.float16
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=0.02)
    logits.sum().backward()
    assert {parameter.grad.dtype for parameter in half.parameters() if parameter.grad is not None} == {torch.float16}
    statistics, others = half.get_buffer("bn.running_var"), network.get_buffer("bn.running_var")
    torch.testing.assert_close(statistics, others, rtol=1e-2, atol=0)
    half.eval()
    assert half(images.half()).shape == (4, 2, 5)


def test_what_a_user_s_network_keeps_for_its_backward_pass_is_measured(tmp_path):
    network = built(written(tmp_path, SMALL))
    one = memory_estimate.of(network, (1, 3, 8, 8), 4)
    many = memory_estimate.of(network, (6, 3, 8, 8), 4)
    assert many.neuron_steps == 6 * one.neuron_steps == 6 * 4 * 4 * 36
    # Of an image at least: its pixels, the convolution's output (for BN), what BN gives to the neurons.
    assert one.kept_bytes >= 4 * (3 * 64 + 2 * 4 * 36)
    assert many.kept_bytes == 6 * one.kept_bytes
    assert all(parameter.grad is None for parameter in network.parameters())


def test_every_size_that_images_grow_through_is_tried(tmp_path):
    code = """
from torch import nn
from pipeline.snn import neurons

class Net(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.T, self.conv, self.neurons = model.T, nn.Conv2d(3, 4, 16, 16), neurons.from_config(model)
        self.fc = nn.Linear(4, 10)
    def forward(self, x):
        assert x.shape[-1] % 16 == 0, f"side {x.shape[-1]}"
        return self.fc(self.neurons(self.conv(x)[None], self.T).mean((3, 4)))

def network(model):
    return Net(model)
"""
    model = ModelConfig(arch=written(tmp_path, code), T=2)
    build(model, num_classes=10, image_size=48, image_size_start=32, image_size_step=16)
    with pytest.raises(ConfigError, match="side 40"):
        build(model, num_classes=10, image_size=48, image_size_start=32, image_size_step=8)


def test_the_energy_of_a_loop_over_time_is_that_of_all_steps_at_once():
    T, N, model = 3, 2, ModelConfig(T=3)

    class Looped(nn.Module):
        def __init__(self, looped: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.looped, self.neurons = looped, neurons.from_config(model)
            self.conv = nn.Conv2d(2, 4, 3, padding="same", dilation=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.looped:
                return self.neurons(self.conv(x.flatten(0, 1)).unflatten(0, x.shape[:2]), T)
            state, spikes = None, []
            for frame in x:
                s, state = self.neurons.step(self.conv(frame)[None], state, num_steps=1)
                spikes.append(s)
            return torch.cat(spikes)

    counts = torch.randint(0, 3, (T, N, 2, 7, 6), generator=torch.Generator().manual_seed(1)).float()
    at_once, looped = (energy.measure(Looped(kind), counts) for kind in (False, True))
    assert looped.layers[0].acs == 0
    # Taps of a dilated 3x3 kernel with zero padding: each axis reaches 3 side - 4 inputs.
    assert looped.layers[0].macs == at_once.layers[0].macs == T * 2 * 4 * (3 * 7 - 4) * (3 * 6 - 4)
    assert looped.firing_rates["neurons"] == pytest.approx(at_once.firing_rates["neurons"])
    assert 0 < looped.firing_rates["neurons"] < 1


def test_a_compiled_network_that_lists_its_layers_stays_one_graph(tmp_path):
    text = SMALL.replace(
        "    def forward",
        """\
    def spiking_layers(self):
        from pipeline.snn.networks.network import SpikingLayer
        return [SpikingLayer("sn", self.sn, self.conv.weight, self.bn)]

    def forward""",
    ).replace("Net(model, num_classes)", "compiled(Net(model, num_classes))")
    text += "\ndef compiled(net):\n    net.forward = torch.compile(net.forward, backend='eager', fullgraph=True)\n"
    text += "    return net\n"
    network = built(written(tmp_path, text))
    assert [layer.weight is network.get_parameter("conv.weight") for layer in network.spiking_layers()] == [True]


def test_a_child_may_have_any_name(tmp_path):
    names = ("_layers", "_rest", "_own")
    text = SMALL
    for name in names:
        text = text.replace("        self.fc =", f"        self.{name} = nn.Identity()\n        self.fc =")
    network = built(written(tmp_path, text))
    assert [layer.name for layer in network.spiking_layers()] == ["sn"]
    assert isinstance(network.get_submodule("_layers"), torch.nn.Identity)
    assert network(torch.zeros(2, 3, 8, 8)).shape == (4, 2, 5)


def test_a_network_is_built_in_training_mode(tmp_path):
    evaluated = SMALL.replace("return Net(model, num_classes)", "return Net(model, num_classes).eval()")
    assert all(module.training for module in built(written(tmp_path, evaluated)).modules())


def test_a_network_that_trains_on_one_image_at_a_time_is_tried_on_one(tmp_path):
    one = SMALL.replace("self.fc = nn", "self.norm = nn.BatchNorm1d(4); self.fc = nn")
    one = one.replace("s.mean((3, 4))", "torch.stack([self.norm(x) for x in s.mean((3, 4))])")
    arch = written(tmp_path, one)
    assert built(arch)(torch.zeros(2, 3, 8, 8)).shape == (4, 2, 5)
    with pytest.raises(ConfigError, match=r"a pass of images of shape \(1, 3, 8, 8\) failed with ValueError: Expected"):
        build(ModelConfig(arch=arch), num_classes=5, image_size=8, micro_batch=1)


def test_a_gradient_step_counts_every_layer(tmp_path):
    network = built(written(tmp_path, SMALL))
    neurons = bind(network)
    losses.cross_entropy(network(torch.randn(2, 3, 8, 8)), torch.tensor([0, 1])).backward()
    assert neurons.names == ("sn",)
    assert neurons.neuron_steps.tolist() == [4 * 2 * 4 * 36]
    assert isinstance(network.get_submodule("conv"), nn.Conv2d)


def test_what_lies_beside_a_network_comes_before_files_of_ours_of_the_same_name(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "launch"), *sys.path])  # as Python has it when it runs launch/train.py
    for name in ("options", "evaluate"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text("CHANNELS = 6\n")
    text = SMALL.replace("import torch\n", "import torch\nimport evaluate\nfrom options import CHANNELS\n", 1)
    network = built(written(tmp_path, text.replace("(4", "(CHANNELS").replace("3, 4, 3", "3, evaluate.CHANNELS, 3")))
    assert network.get_parameter("conv.weight").shape == (6, 3, 3, 3)
    monkeypatch.chdir(tmp_path)
    source = own_source.find("options:network")
    assert source is not None
    assert source.path == tmp_path / "options.py"
