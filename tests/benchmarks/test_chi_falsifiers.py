"""The arithmetic of benchmarks/chi_falsifiers.py and its report, on small networks and made-up figures."""

import dataclasses
import itertools

import pytest
import torch

from benchmarks import chi_falsifiers as trials
from benchmarks import chi_falsifiers_report as report
from benchmarks.chi_study_run import model_of, weight_of
from pipeline.snn import neurons
from pipeline.snn.losses import cross_entropy
from pipeline.snn.networks.build import build


@pytest.fixture
def look(tmp_path):
    """A fresh network of 9 layers, two time steps."""
    setting = dataclasses.replace(next(iter(trials.settings("noise"))), arch="sew_cifar8")
    torch.manual_seed(0)
    network = build(model_of(setting), num_classes=10, image_size=16)
    return trials.Look(setting, network, neurons.bind(network), tmp_path, 0)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return torch.randn(6, 3, 16, 16), torch.randint(0, 10, (6,))


def gradient(network, weight, batch):
    return torch.autograd.grad(cross_entropy(network(batch[0]), batch[1]), weight)[0]


def test_one_forward_pass_gives_the_gradient_of_every_width(look, batch):
    layers = dict(enumerate(look.network.spiking_layers()))
    chosen = {i: layers[i] for i in (1, 3)}
    found = trials.by_width(look, chosen, batch)
    assert torch.all(look.neurons.widths == 1)
    for i, layer in chosen.items():
        assert len(found[i]) == len(trials.GRID)
        for width, got in list(zip(trials.GRID, found[i], strict=True))[::4]:
            look.neurons.widths[i] = width
            assert torch.equal(got, gradient(look.network, weight_of(layer), batch))
            look.neurons.widths[i] = 1.0


def test_a_twin_with_a_width_for_each_step_is_the_network_where_they_are_one(look, batch):
    look.network.double()
    images, labels = batch[0].double(), batch[1]
    twin, weights, state = trials.timed_twin(look.setting, look.network)
    twin.double()
    look.neurons.widths.fill_(0.7)
    state.widths.fill_(0.7)
    assert torch.equal(twin(images), look.network(images))
    own = [weight_of(layer) for layer in look.network.spiking_layers()]
    for a, b in zip(own, weights, strict=True):
        expected = gradient(look.network, a, (images, labels))
        torch.testing.assert_close(gradient(twin, b, (images, labels)), expected, rtol=1e-9, atol=1e-12)
    state.widths[5] = 2.0  # the third layer's last step
    assert not torch.allclose(
        gradient(twin, weights[2], (images, labels)), gradient(look.network, own[2], (images, labels))
    )


def test_moments_are_means_over_pairs():
    torch.manual_seed(2)
    vectors = torch.randn(5, 2, 7)
    moments = trials.Moments(2)
    for pair in vectors:
        moments.add(list(pair))
    for row in range(2):
        pairs = list(itertools.combinations(vectors[:, row].double(), 2))
        common = sum((a @ b).item() for a, b in pairs) / len(pairs)
        variance = sum(((a - b) @ (a - b)).item() / 2 for a, b in pairs) / len(pairs)
        assert moments.common()[row].item() == pytest.approx(common)
        assert moments.variance()[row].item() == pytest.approx(variance)


def test_the_crossing_is_found_between_the_widths():
    widths = trials.GRID
    bias_sq = [None, *(0.01 * w**4 for w in widths[1:])]

    def found(variance: float) -> float | None:
        return report.crossing(widths, [variance / w for w in widths], bias_sq)

    assert found(0.2) == pytest.approx((0.2 / 0.04) ** 0.2)  # variance / w = 4 (0.01 w^4)
    assert found(0.2 / 16) == pytest.approx((0.2 / 16 / 0.04) ** 0.2)
    assert found(1e9) is None
    assert found(1e-9) == widths[1]
    assert report.power(widths, [w**4 for w in widths]) == pytest.approx(4)
    assert report.power(widths, [-w for w in widths]) != report.power(widths, [-w for w in widths])  # NaN


def fallen(factors, batches):
    """D of three made-up groups: the first likes to be wider, the second narrower; each batch adds its own share."""
    wanted = torch.tensor([0.4, -0.4, 0.0])
    return 10 - (factors - wanted).square().sum(1, keepdim=True) + torch.tensor(batches)


def test_a_profile_takes_the_best_move_of_each_group():
    groups = {str(i): row for i, row in enumerate(torch.eye(3))}
    pairs = list(range(trials.TO_CHOOSE + trials.TO_JUDGE))
    found = trials.profiles(fallen, groups, {"odd": torch.tensor([1.0, 0.0, 0.0])}, pairs)
    assert found["chosen"] == {"all": 0, "0": 1, "1": -1, "2": 0}
    assert found["chosen_on"]["odd"] == pytest.approx([9.48 + b for b in pairs[: trials.TO_CHOOSE]], abs=1e-4)
    judges = pairs[trials.TO_CHOOSE :]
    assert found["judged_on"]["as it is"] == pytest.approx([9.68 + b for b in judges], abs=1e-4)
    assert found["judged_on"]["common"] == found["judged_on"]["as it is"]
    assert found["judged_on"]["by group"] == pytest.approx([10.0 + b for b in judges], abs=1e-4)


def test_other_seeds_choose_the_moves_that_a_seed_is_judged_by():
    def made(wide: float) -> dict:
        moved = {"all -1": 9.0, "all +1": 9.5, "a -1": 9.0, "a +1": wide, "b -1": 9.0, "b +1": 9.9}
        return {"chosen_on": {name: [value] for name, value in {"as it is": 10.0, **moved}.items()}}

    looks = [made(12.0), made(11.0), made(8.0)]
    # Each seed's gain by "a +1" where the other two are better with it on the mean; "b" and "all" stay.
    assert report.by_other_seeds(looks) == pytest.approx([0.0, 0.0, -2.0])
    assert report.by_other_seeds([made(12.0), made(11.0), made(9.5)]) == pytest.approx([2.0, 1.0, -0.5])


@pytest.mark.parametrize("trial", ["stages", "noise", "times"])
def test_a_run_is_looked_at_on_its_way(trial, tmp_path, monkeypatch, capsys):
    """Made-up images; what a line of the results holds, and that the report takes it."""
    torch.manual_seed(4)
    (tmp_path / "digits").mkdir()
    images = torch.randn(1_200, 3, 16, 16).bfloat16(), torch.randint(0, 10, (1_200,))
    torch.save(images, tmp_path / "digits/train-16.pt")
    for name, value in {"WHEN": {trial: (0, 1)}, "SEEN": 4, "UNSEEN": 8, "TO_CHOOSE": 2, "TO_JUDGE": 2, "MICRO": 2,
                        "GROUPS": 2, "SMALL": 1, "GRID": (0.25, 0.5, 1.0, 2.0)}.items():  # fmt: skip
        monkeypatch.setattr(trials, name, value)
    first = next(iter(trials.settings(trial)))
    setting = dataclasses.replace(
        first, where="here", data="digits", arch="sew_cifar8", T=4, num_images=64, epochs=8, seed=1
    )
    plain = trials.run(setting, tmp_path)
    record = trials.run_one(setting, tmp_path)
    assert (record["train_loss"], record["accuracy"]) == (
        plain["train_loss"],
        plain["accuracy"],
    )  # looks change nothing
    assert [look["step"] for look in record["looks"]] == [0, 1]
    last = record["looks"][-1]
    if trial == "noise":
        assert set(last["layers"]) == {"layer1.0.sn1", "layer2.0.sn1", "layer3.0.sn1"}
        assert [len(values) for values in last["layers"]["layer2.0.sn1"]["descent_small"]] == [2, 2, 2, 2]
    else:
        assert [len(values) for values in last["judged_on"].values()] == [2, 2, 2]
    report.show([record])
    assert f"{trial}: here, after 1 steps, 1 seeds" in capsys.readouterr().out
