"""snn/networks/own.py: what is said where a user's network breaks the contract."""

import dataclasses

import pytest

from pipeline.config import Config, ModelConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.snn.networks import own_source
from tests.snn.own_nets import SMALL, built, written

LISTED = """\
    def spiking_layers(self):
        from pipeline.snn.networks.network import SpikingLayer
        return [SpikingLayer({})]

    def forward"""
CASES = {
    "no neurons": (("neurons.from_config(model)", "nn.ReLU()"), (", num_steps=self.T", ""),
                   "the network has no spiking neurons; use pipeline.snn.neurons.from_config"),
    "another surrogate": (("neurons.from_config(model)", "neurons.Neuron(neurons.Rule(shape='atan'))"),
                          "the neurons sn have the surrogate 'atan', and model.surrogate is 'triangle'"),
    "shape": (("s.mean((3, 4))", "s.flatten(2)"), ("nn.Linear(4, num_classes)", "nn.Linear(144, 7)"),
              r"images of shape \(2, 3, 8, 8\) give logits of shape \(4, 2, 7\); return \(T, 2, 5\) or \(2, 5\)"),
    "not a tensor": (("return self.fc(s.mean((3, 4)))", "return self.fc(s.mean((3, 4))), s"),
                     "give tuple; return a tensor"),
    "frozen": (("self.fc = nn.Linear(4, num_classes)", "self.fc = nn.Linear(4, num_classes).requires_grad_(False)"),
               r"fc\.weight is frozen"),
    "unused": (("self.fc = nn", "self.spare = nn.Linear(2, 2); self.fc = nn"),
               r"spare\.weight gets no gradient in a pass"),
    "unused neurons": (("self.fc = nn", "self.sn2 = neurons.from_config(model); self.fc = nn"),
                       "the neurons sn2 are not used in a pass; take them out"),
    "tied": (("self.fc = nn", "self.bn2 = nn.Identity(); self.bn2.weight = self.bn.weight; self.fc = nn"),
             r"bn\.weight and bn2\.weight are one parameter"),
    "half": (("return Net(model, num_classes)", "return Net(model, num_classes).double()"),
             "torch.float64 on cpu; build it"),
    "state in a buffer": (("self.fc = nn", "self.register_buffer('h', torch.zeros(0)); self.fc = nn"),
                          ("        s = self", "        self.h = images\n        s = self"),
                          "h is a buffer that a pass makes or"),
    "another buffer": (("self.fc = nn", "self.register_buffer('h', torch.zeros(())); self.fc = nn"),
                       ("        s = self", "        self.h = 0.9 * self.h + images.mean()\n        s = self"),
                       r"h is a buffer in whose place .*; write into it \(copy_"),
    "compiled": (("return Net(model, num_classes)", "return torch.compile(Net(model, num_classes), backend='eager')"),
                 r"torch\.compile hides which weights feed the neurons \S*sn; return the network uncompiled"),
    "scalar": (("self.fc = nn", "self.a = nn.Parameter(torch.tensor(1.0)); self.fc = nn"), "a has no dimension"),
    "random": (("return self.fc(s.mean((3, 4)))", "return self.fc(s.mean((3, 4))) + torch.rand(())"),
               "the same images give other logits the second time"),
    "state that lives on": (("self.fc = nn", "self.s = 0; self.fc = nn"),
                            ("[None], num_steps", "[None] + self.s, num_steps"),
                            ("return self.fc(s", "self.s = s.detach().mean(); return self.fc(0 * s"),
                            "the same images give the neurons sn other potentials the second time"),
    "random input": (("[None], num_steps", "[None] + torch.rand(()), num_steps"),
                     ("self.fc(s", "self.fc(0 * s"), "the same images give the neurons sn other potentials the second"),
    "silent in evaluation": (("return self.fc", "s = s if self.training else 0 * s; return self.fc"),
                             ("s = self.sn(self.bn(self.conv(images))[None], num_steps=self.T)",
                              "c = self.bn(self.conv(images)).expand(self.T, -1, -1, -1, -1)\n"
                              "        s = self.sn(c) if self.training else (c > 1).float()"),
                             "the neurons sn do not call their surrogate in evaluation mode"),
    "no gradient": (("return self.fc(s.mean((3, 4)))", "return self.fc(self.bn(self.conv(images))[None].mean((3, 4)))"),
                    "no gradient flows through the spikes of any neurons, such as sn"),
    "lazy": (("nn.Linear(4, num_classes)", "nn.LazyLinear(num_classes)"), r"fc\.weight is of a lazy layer"),
    "nothing listed": (("    def forward", "    def spiking_layers(self):\n        return []\n\n    def forward"),
                       r"spiking_layers\(\) lists nothing"),
    "another's weight": (("    def forward", LISTED.format("'sn', self.sn, torch.zeros(3)")),
                         r"the weight that spiking_layers\(\) gives for sn is no parameter of the network"),
    "what is no neuron": (("    def forward", LISTED.format("'sn', self.bn, self.conv.weight")),
                   r"the neuron that spiking_layers\(\) gives for sn is a BatchNorm2d"),
    "listed twice": (("    def forward", LISTED.format("'sn', self.sn, self.conv.weight").replace("]", "] * 2")),
                     r"spiking_layers\(\) gives a name twice"),
    "weight_norm": (("nn.Conv2d(3, 4, 3)", "nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))"),
                    r"the weight before the neurons sn is made of .*original0"),
    "several places": (("self.fc = nn", "self.c2, self.b2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4); self.fc = nn"),
                       ("        return self.fc(s",
                        "        s = self.sn(self.b2(self.c2(s.flatten(0, 1))).unflatten(0, (self.T, -1)))\n"
                        "        return self.fc(s"),
                       "the neurons sn are used behind several weights, of conv, c2; give each place neurons"),
    "nothing returned": (("return Net(model, num_classes)", "Net(model, num_classes)"),
                         "network returned NoneType; return a"),
    "another parameter": (("network(model, num_classes)", "network(model, num_classes, depth)"),
                          "network takes depth, which nothing gives; use some of model, num_classes"),
    "another name": (("def network", "def net"), r"mine\.py has no function network; it has net"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_trained_is_refused_with_the_cure(case, tmp_path):
    *changes, said = CASES[case]
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    with pytest.raises(ConfigError, match=said) as refused:
        built(written(tmp_path, text))
    assert str(refused.value).startswith(f"model.arch='{tmp_path}/mine.py:network': ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "first", "lines"),
    [
        ("super().__init__()", "super().__init__(); 1 / 0", "network() failed with ZeroDiv", ["network", "__init__"]),
        ("images))[None]", "images[:, :2]))[None]", "a pass of images of shape (2, 3, 8, 8) failed", ["forward"]),
        ("    def forward", "    def spiking_layers(self):\n        return self.none\n\n    def forward",
         "spiking_layers() failed with AttributeError", ["spiking_layers"]),
        ("import torch\n", "import torch, no_such_module\n", "failed with ModuleNotFoundError", ["<module>"]),
    ],
)  # fmt: skip
def test_an_error_of_the_user_s_code_is_shown_with_their_lines_alone(old, new, first, lines, tmp_path):
    with pytest.raises(ConfigError) as refused:
        built(written(tmp_path, SMALL.replace(old, new, 1)))
    said, *trace = str(refused.value).splitlines()
    assert first in said
    files = [line for line in trace if line.startswith("  File ")]
    assert [line.rpartition(" in ")[2] for line in files] == lines
    assert all(str(tmp_path / "mine.py") in line for line in files)


def test_a_place_without_a_network_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no file .*none\.py on this machine; every node needs it"):
        own_source.find(f"{tmp_path}/none.py:network")
    with pytest.raises(ConfigError, match=r"mine\.py, line 2 is no Python"):
        own_source.find(written(tmp_path, "x = 1\ndef ("))
    for arch in ("vgg", "mine.py", "mine.py:", ":network", "a b:c", "mine.py:1x"):
        with pytest.raises(ConfigError, match=r"one of sew_tiny, .*; or your own, as package\.module:function or path"):
            own_source.check(arch)
    for arch in ("sew_tiny", "a.b:c", "../a b/mine.py:network"):
        own_source.check(arch)
    assert own_source.find("sew_tiny") is None


@pytest.mark.parametrize("settings", [{"checkpoint": True}, {"connect": "iand"}, {"zero_init_residual": True}])
def test_options_of_our_networks_are_refused(settings):
    with pytest.raises(ConfigError, match=rf"model\.{next(iter(settings))}=.* with your own model\.arch"):
        ModelConfig(arch="a:b", **settings)


@pytest.mark.parametrize("name", ["cuda_graph", "sync_bn"])
def test_settings_that_do_not_reach_a_user_s_layers_are_refused(name):
    with pytest.raises(ConfigError, match=rf"train\.{name}=True is not allowed; use false with your own model\.arch"):
        Config(recipe="digits", model=ModelConfig(arch="a:b"), train=dataclasses.replace(TrainConfig(), **{name: True}))
