"""The meter of a gradient's quality: its definition by hand, what it leaves behind, and its command on a real run."""

import json
import math
import subprocess
import sys

import pytest
import torch

from benchmarks import chi_quality
from pipeline.chi import quality
from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.snn import neurons
from pipeline.snn.losses import cross_entropy
from pipeline.snn.networks import sew_resnet
from tests.conftest import ROOT


@pytest.fixture
def setup():
    """A network, its counters, its layers' weights, and three pairs of batches."""
    torch.manual_seed(3)
    network = sew_resnet.build(ModelConfig(arch="sew_tiny", T=2), num_classes=4, image_size=16).double()
    state = neurons.bind(network)
    weights = [layer.weight for layer in network.spiking_layers()]
    batches = [(torch.rand(6, 3, 16, 16).double(), torch.randint(0, 4, (6,))) for _ in range(6)]
    return network, state, weights, list(zip(batches[::2], batches[1::2], strict=True))


def test_it_is_the_slope_of_the_loss_along_the_layers_gradients(setup):
    network, state, weights, pairs = setup
    candidates = torch.tensor([[0.5], [1.5]]).expand(2, len(weights))
    found = quality.measure(network, state, weights, candidates, pairs, cross_entropy, epsilon=0.01)
    directions = []
    for b, ((images, labels), (other, answers)) in enumerate(pairs):
        state.widths.fill_(1.5)
        network.zero_grad()
        cross_entropy(network(images), labels).backward()
        start = [w.detach().clone() for w in weights]
        d = [w.grad * w.detach().norm() / w.grad.norm() for w in weights]
        directions.append(torch.cat([x.flatten() for x in d]))
        losses = []
        for side in (0.01, -0.01):
            with torch.no_grad():
                for w, s, x in zip(weights, start, d, strict=True):
                    w.copy_(s + side * x)
                losses.append(cross_entropy(network(other), answers).item())
                for w, s in zip(weights, start, strict=True):
                    w.copy_(s)
        assert found.descent[1, b] == pytest.approx((losses[0] - losses[1]) / 0.02, rel=1e-9)
    for b in range(3):
        expected = torch.cosine_similarity(directions[b - 1], directions[b], dim=0)
        assert found.cosine[1, b] == pytest.approx(expected.item(), rel=1e-9)
    assert not torch.equal(found.descent[0], found.descent[1])


def test_dropout_is_the_same_in_all_passes_that_are_compared(setup):
    network, state, weights, pairs = setup
    network.avgpool = torch.nn.Sequential(network.avgpool, torch.nn.Dropout(0.5))
    torch.manual_seed(5)
    found = quality.measure(network, state, weights, torch.ones(2, len(weights)), pairs, cross_entropy)
    assert torch.equal(found.descent[0], found.descent[1])
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3)), "the measurement took no random numbers"


def test_a_gradient_that_points_downhill_is_above_zero(setup):
    network, state, weights, pairs = setup
    same = [(seen, seen) for seen, _ in pairs]  # along the gradient of the very batch
    found = quality.measure(network, state, weights, state.widths[None].clone(), same, cross_entropy)
    assert bool((found.descent > 0).all())


def test_everything_is_as_it_was(setup):
    network, state, weights, pairs = setup
    network.eval()
    state.widths[2] = 0.75
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    widths = state.widths.clone()
    quality.measure(network, state, weights, torch.full((1, len(weights)), 2.0), pairs, cross_entropy)
    assert not network.training
    assert torch.equal(state.widths, widths)
    assert bool((state.counts() == 0).all())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())

    def broken(logits, labels):
        if not logits.requires_grad:
            raise RuntimeError("in the middle of a move")
        return cross_entropy(logits, labels)

    with pytest.raises(RuntimeError, match="middle"):
        quality.measure(network, state, weights, torch.full((1, len(weights)), 2.0), pairs, broken)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(state.widths, widths)


def test_layers_without_a_gradient_do_not_move(setup):
    network, state, weights, pairs = setup
    # So narrow that no potential lies within: only the last layers, whose spikes feed the classifier, could learn.
    found = quality.measure(network, state, weights, torch.full((1, len(weights)), 1e-12), pairs, cross_entropy)
    assert found.descent.tolist() == [[0, 0, 0]]
    assert bool(found.cosine.isnan().all())


def test_what_cannot_be_measured_is_refused(setup):
    network, state, weights, pairs = setup
    with pytest.raises(ValueError, match=r"use \(C, 6\)"):
        quality.measure(network, state, weights, torch.ones(6), pairs, cross_entropy)
    with pytest.raises(ValueError, match="use 2 or more"):
        quality.measure(network, state, weights, torch.ones(1, 6), pairs[:1], cross_entropy)
    rms = sew_resnet.build(ModelConfig(arch="sew_tiny", T=2, scale="rms"), num_classes=4, image_size=16)
    layers = [layer.weight for layer in rms.spiking_layers() if layer.weight is not None]
    with pytest.raises(ValueError, match="amplitudes"):
        quality.measure(rms, neurons.bind(rms), layers, torch.ones(1, 6), pairs, cross_entropy)


def test_changes_are_paired_and_need_a_slope_to_compare_with():
    descent = torch.tensor([[2.0, 4.0, 6.0], [3.0, 5.0, 7.0], [2.0, 4.0, 12.0]]).double()
    change, error = quality.relative(descent)
    assert change.tolist() == pytest.approx([0, 0.25, 0.5])
    # Batches differ, but the second is better by the same on each: no error. The third is better on one alone.
    assert error.tolist() == pytest.approx([0, 0, 1.5 / math.sqrt(3) / math.sqrt(3)])
    uphill = torch.tensor([[-1.0, 4.0, -2.0], [3.0, 5.0, 7.0]]).double()
    assert bool(quality.relative(uphill)[0].isnan().all())


def test_layers_are_grouped_by_depth():
    assert list(chi_quality.groups_of(9, 3).values()) == [slice(0, 3), slice(3, 6), slice(6, 9)]
    assert list(chi_quality.groups_of(7, 2)) == ["1 of 2 layers (1 to 4)", "2 of 2 layers (5 to 7)"]
    assert list(chi_quality.groups_of(1, 1).values()) == [slice(0, 1)]


def test_the_command_measures_a_run(straight, tmp_path):
    few = ["--batches", "2", "--batch", "8", "--widths", "0.25", "2", "--groups", "2", "--threads", "1"]
    step = max(int(path.name[5:]) for path in (straight.run_dir / "checkpoints").glob("step-*"))
    picture, document = tmp_path / "q.png", tmp_path / "q.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.chi_quality", str(straight.run_dir), *few, "--checkpoint", str(step),
         "--plot", str(picture), "--json", str(document)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"after step {step}: the run's own widths give D = " in done.stdout
    rows = json.loads(document.read_text())["rows"]
    assert [(row["group"], row["width"]) for row in rows] == [
        ("the run's own", None), ("all layers", 0.25), ("all layers", 2.0),
        ("1 of 2 layers (1 to 3)", 0.25), ("1 of 2 layers (1 to 3)", 2.0),
        ("2 of 2 layers (4 to 6)", 0.25), ("2 of 2 layers (4 to 6)", 2.0),
    ]  # fmt: skip
    assert len({row["descent"] for row in rows}) == 7, "every candidate was tried"
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--widths", "0"], "use numbers above 0"),
        (["--batches", "1"], "use 2 or more"),
        (["--batch", "100000"], "use a smaller --batch"),
        (["--checkpoint", "99999"], "99999"),
    ],
)
def test_a_measurement_that_cannot_be_made_is_refused(straight, words, said):
    with pytest.raises(ConfigError, match=said):
        chi_quality.measure([str(straight.run_dir), "--threads", str(torch.get_num_threads()), *words])
