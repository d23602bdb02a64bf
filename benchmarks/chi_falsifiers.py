"""Cheap trials of ideas for steering widths, each meant to end its idea early. Protocol, verdicts: docs/chi_study.md.

    python -m benchmarks.chi_falsifiers run TRIAL --scratch DIR [--limit N]    do the runs that are not done yet
    python -m benchmarks.chi_falsifiers report [TRIAL …]

    TRIAL    stages    do widths that differ by stage give a better gradient than one width?
             noise     where is a layer's variance four times its squared bias, and is its gradient best there?
             times     do widths that differ by time step give a better gradient?
             gap       how far does training accuracy run ahead of held-out accuracy?
             soft      do soft spikes at a share of the neurons, while training, narrow this gap?
             again     do they gain on new seeds, and more than a longer run with hard spikes?

DIR holds cifar10, cifar100 and digits as shards, as for `benchmarks.chi_regret`. Every finished run is a line of
benchmarks/results/chi_falsifiers.jsonl: the setting, its accuracies, and what was measured on its way (`looks`).
A better gradient is one with a larger D (pipeline/chi/quality.py), in fp32, on images without augmentation.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from benchmarks import chi_falsifiers_report, chi_soft_spikes, study_runs
from benchmarks.chi_regret import SETTINGS, SHORT
from benchmarks.chi_study_arms import FIXED
from benchmarks.chi_study_run import DATA, Elsewhere, accuracy, drawn_for, images_of, model_of, run, weight_of
from pipeline import chi
from pipeline.chi import quality
from pipeline.chi.widths import in_training_mode
from pipeline.snn.kernels import reference
from pipeline.snn.losses import cross_entropy
from pipeline.snn.membrane_probe import probed
from pipeline.snn.networks.build import build
from pipeline.snn.networks.network import Network, SpikingLayer
from pipeline.snn.neurons import NeuronState

RUNS = Path(__file__).parent / "results/chi_falsifiers.jsonl"
SEEDS = range(4)
EARLY, MIDDLE, LATE = 39, 156, 273
"""Steps done when a run of 312 is looked at."""
SEEN, UNSEEN = 64, 256
"""Images of a gradient, and of the loss that falls along it."""
TO_CHOOSE, TO_JUDGE = 6, 6
"""Pairs of batches on which a profile is chosen, and others on which it is judged."""
MOVE = 0.4
"""A trial width is the present one times e to plus or minus this."""

PLACES = {
    "stages": {where: SETTINGS[where] for where in ("27 layers, IF, T=2", "plain, 19 layers, IF, T=2")},
    "noise": {"9 layers, T=2": {"T": 2}},
    "times": {"9 layers, T=4": {}, "9 layers, T=8": {"T": 8}},
    "gap": {
        "digits, 40 epochs": {"data": "digits", "num_images": 1_000, "epochs": 40, "T": 2},
        "CIFAR-10, 5,000 images, 12 epochs": {"epochs": 12, "T": 2},
        "CIFAR-100, 10,000 images, 8 epochs": {"data": "cifar100", "num_images": 10_000, "epochs": 8, "T": 2},
    },
}
TRIALS = (*PLACES, chi_soft_spikes.TRIAL, chi_soft_spikes.AGAIN)
WHEN = {"stages": (0, EARLY, MIDDLE, LATE), "noise": (MIDDLE,), "times": (MIDDLE,), "gap": ()}


def settings(trial: str) -> Iterator[Elsewhere]:
    """Every run of a trial, seed by seed. All train at width 1, the best of the sweeps."""
    if trial == chi_soft_spikes.TRIAL:
        yield from chi_soft_spikes.settings()
        return
    if trial == chi_soft_spikes.AGAIN:
        yield from chi_soft_spikes.settings_again()
        return
    for seed in SEEDS:
        for where, place in PLACES[trial].items():
            yield Elsewhere(arm=trial, where=where, lr=0.2, seed=seed, policy=FIXED, **{**SHORT, **place})


class Look(NamedTuple):
    """A network on its way, and images to measure it with."""

    setting: Elsewhere
    network: Network
    neurons: NeuronState
    scratch: Path
    step: int

    def pairs(self, count: int, seen: int, unseen: int) -> list[tuple[quality.Batch, quality.Batch]]:
        """Batches of images that the run trains on, each with one of images that no run trains on."""
        images, labels = images_of(self.scratch / self.setting.data, "train", self.setting.image_size)
        num_train = DATA[self.setting.data][0]
        generator = torch.Generator().manual_seed(1000 * self.setting.seed + self.step)
        inside = shuffled(drawn_for(self.setting, num_train), generator)[: count * seen].split(seen)
        outside = shuffled(torch.arange(num_train, len(images)), generator)[: count * unseen].split(unseen)
        whole = [[(images[n].float(), labels[n]) for n in numbers] for numbers in (inside, outside)]
        return list(zip(*whole, strict=True))


def shuffled(values: Tensor, generator: torch.Generator) -> Tensor:
    return values[torch.randperm(len(values), generator=generator)]


# Profiles: widths that differ by group (stage, or part of the time), chosen on some batches and judged on others.


def profiles(
    measure: Callable[[Tensor, Sequence], Tensor], groups: dict[str, Tensor], extra: dict[str, Tensor], pairs: Sequence
) -> dict:
    """D of the common width, of each group's width moved alone, of all moved, and of what is best of these.

    Args:
        measure: from natural logarithms of factors on the widths, (C, W), and pairs of batches, to D (C, B).
        groups: which of the W widths belong to each, (W,) of 0 and 1; together they are all.
        extra: other logarithms of factors to try, (W,), by name.
        pairs: TO_CHOOSE + TO_JUDGE pairs.

    Returns:
        `chosen_on` and `judged_on`: D by candidate, a list over batches each. In `judged_on`, `by group` has each
        group's best move, and `common` the best move of all groups together.
    """
    everything = torch.stack(list(groups.values())).sum(0)
    moves = {"all": everything, **groups}
    tried = {"as it is": 0 * everything}
    tried |= {f"{name} {sign:+d}": sign * MOVE * mask for name, mask in moves.items() for sign in (-1, 1)}
    tried |= extra
    first = measure(torch.stack(list(tried.values())), pairs[:TO_CHOOSE])
    mean = dict(zip(tried, first.mean(1).tolist(), strict=True))
    best = {name: best_move(mean, name) for name in moves}
    judged = {
        "as it is": tried["as it is"],
        "common": best["all"] * MOVE * everything,
        "by group": torch.stack([best[name] * MOVE * mask for name, mask in groups.items()]).sum(0),
    }
    rows, which = torch.stack(list(judged.values())).unique(dim=0, return_inverse=True)
    second = measure(rows, pairs[TO_CHOOSE:])[which]
    return {
        "chosen": best,
        "chosen_on": dict(zip(tried, first.tolist(), strict=True)),
        "judged_on": dict(zip(judged, second.tolist(), strict=True)),
    }


def best_move(mean: dict[str, float], name: str) -> int:
    """-1, 0 or 1: which move of the group has the largest D."""
    return max((0, -1, 1), key=lambda sign: mean[f"{name} {sign:+d}"] if sign else mean["as it is"])


def distances(look: Look, images: Tensor) -> list[list[Tensor]]:
    """|h - v_th| of every layer at every time step, flat, over one batch."""
    seen: list[list[Tensor]] = [[] for _ in look.neurons.names]

    def see(layer: int, u: Tensor) -> None:
        seen[layer].append(u.abs().flatten())

    with torch.no_grad(), in_training_mode(look.network), probed(look.neurons.neurons, see):
        look.network(images)
    return seen


def share(values: Tensor, width: Tensor) -> Tensor:
    """Coverage of `values` = |h - v_th| at a width."""
    return (values < width).float().mean()


def quantile(values: Tensor, probability: Tensor) -> Tensor:
    return values.kthvalue(max(1, round(probability.item() * len(values)))).values


def stages(look: Look) -> dict:
    """Widths by stage, and widths of equal coverage in all layers. At step 0: sizes of the first gradients."""
    pairs = look.pairs(TO_CHOOSE + TO_JUDGE, SEEN, UNSEEN)
    layers = look.network.spiking_layers()
    weights = [weight_of(layer) for layer in layers]
    seen = [torch.cat(steps) for steps in distances(look, pairs[0][0][0])]
    now = look.neurons.widths.clone()
    coverage = torch.stack([share(u, w) for u, w in zip(seen, now, strict=True)])
    if look.step == 0:
        return {"coverage": coverage.tolist(), "norms": first_gradients(look, seen, pairs[0][0])}
    names = [layer.name for layer in layers]
    groups = {f"stage {i}": torch.tensor([float(name.startswith(f"layer{i}.")) for name in names]) for i in (1, 2, 3)}
    groups["stage 1"][0] = 1.0  # the stem
    equal = torch.stack([quantile(u, coverage.mean()) for u in seen])

    def measure(factors: Tensor, batches: Sequence) -> Tensor:
        widths = now * factors.exp()
        return quality.measure(look.network, look.neurons, weights, widths, batches, cross_entropy).descent

    found = profiles(measure, groups, {"equal coverage": (equal / now).log()}, pairs)
    return {"coverage": coverage.tolist(), "equal": equal.tolist(), **found}


def first_gradients(look: Look, seen: list[Tensor], batch: quality.Batch) -> dict[str, list[float]]:
    """|G| / |W| of every layer before the first step, by widths: common ones, and those of equal coverage."""
    now = look.neurons.widths.clone()
    tried = {f"width {w:g}": torch.full_like(now, w) for w in (0.5, 1.0, 2.0)}
    for p in (0.3, 0.5, 0.7):
        tried[f"coverage {p:g}"] = torch.stack([quantile(u, torch.tensor(p)) for u in seen])
    norms = {}
    with in_training_mode(look.network):
        for name, widths in tried.items():
            look.neurons.widths.copy_(widths)
            weights = [weight_of(layer) for layer in look.network.spiking_layers()]
            gradients = torch.autograd.grad(cross_entropy(look.network(batch[0]), batch[1]), weights)
            norms[name] = [(g.norm() / w.norm()).item() for g, w in zip(gradients, weights, strict=True)]
    look.neurons.widths.copy_(now)
    return norms


# Time steps: a twin of the network whose neurons have a width at each of them.


class Timed(nn.Module):
    """Neurons by the definition, with a width for each time step: `widths` (T,)."""

    def __init__(self, rule: reference.Rule, widths: Tensor) -> None:
        super().__init__()
        self.rule, self.widths = rule, widths

    def after_norm(self, y, bn, num_steps, *, static=False, shortcut=None, again=None):
        """As `Neuron.after_norm`."""
        current = bn(y)
        steps = [current] * num_steps if static else current.unflatten(0, (num_steps, -1)).unbind()
        spikes, v = [], None
        for x, width in zip(steps, self.widths, strict=True):
            s, v = reference.run(x[None], self.rule, width, torch.ones(()), v=v)
            spikes.append(s[0])
        return torch.cat(spikes) if shortcut is None else torch.cat(spikes) + shortcut


class TimedWidths(NamedTuple):
    """What `quality.measure` asks of a network's widths, for (layer, time step) instead of layer."""

    names: tuple[str, ...]
    widths: Tensor
    has_rms: Tensor


def timed_twin(setting: Elsewhere, network: Network) -> tuple[Network, list, TimedWidths]:
    """A copy of `network` with `Timed` neurons of width 1, its layers' weights, and its (L T,) widths."""
    _, num_classes = DATA[setting.data]
    twin = build(model_of(setting), num_classes=num_classes, image_size=setting.image_size)
    twin.load_state_dict(network.state_dict())
    layers = twin.spiking_layers()
    names = tuple(f"{layer.name} {t}" for layer in layers for t in range(setting.T))
    state = TimedWidths(names, torch.ones(len(names)), torch.zeros(len(names), dtype=torch.bool))
    for layer, widths in zip(layers, state.widths.view(len(layers), -1), strict=True):
        twin.set_submodule(layer.name, Timed(layer.neuron.rule, widths))
    return twin, [weight_of(layer) for layer in layers], state


def times(look: Look) -> dict:
    """Widths by quarter of the time, and widths of equal coverage at all time steps of a layer."""
    pairs = look.pairs(TO_CHOOSE + TO_JUDGE, SEEN, UNSEEN)
    T, L = look.setting.T, len(look.neurons.names)
    seen = distances(look, pairs[0][0][0])
    coverage = torch.stack([torch.stack([share(u, torch.ones(())) for u in steps]) for steps in seen])
    mean = coverage.mean(1)
    equal = torch.stack([torch.stack([quantile(u, p) for u in steps]) for steps, p in zip(seen, mean, strict=True)])
    twin, weights, state = timed_twin(look.setting, look.network)
    quarter = torch.arange(T) * 4 // T
    groups = {f"quarter {q + 1}": (quarter == q).float().expand(L, T).flatten() for q in range(4)}

    def measure(factors: Tensor, batches: Sequence) -> Tensor:
        widths = cast(NeuronState, state)
        return quality.measure(twin, widths, weights, factors.exp(), batches, cross_entropy).descent

    found = profiles(measure, groups, {"equal coverage": equal.log().flatten()}, pairs)
    return {"coverage": coverage.tolist(), "equal": equal.tolist(), **found}


# Bias and variance of one layer's gradient, from micro-batches that share no image.

GRID = tuple(2 ** (k / 2) for k in range(-4, 5))
"""Widths, each √2 times the one before."""
MICRO, GROUPS, SMALL = 16, 4, 4
"""Micro-batches of SEEN images in the larger batch; how many such batches there are; D of the first SMALL in each."""


class Moments:
    """Sums over vectors `(V,)`, one for each row and micro-batch, without keeping them."""

    def __init__(self, rows: int) -> None:
        self.count, self.sums, self.squares = 0, [torch.zeros(()) for _ in range(rows)], torch.zeros(rows).double()

    def add(self, vectors: Sequence[Tensor]) -> None:
        self.count += 1
        self.sums = [total + vector.double() for total, vector in zip(self.sums, vectors, strict=True)]
        self.squares += torch.stack([vector.double().square().sum() for vector in vectors])

    @property
    def _of_sums(self) -> Tensor:
        return torch.stack([total.square().sum() for total in self.sums])

    def common(self) -> Tensor:
        """Mean of <a, b> over all pairs of different vectors of a row: its expectation is |E a|^2."""
        return (self._of_sums - self.squares) / (self.count * (self.count - 1))

    def variance(self) -> Tensor:
        """Mean of |a - b|^2 / 2 over all such pairs: E |a - E a|^2."""
        return (self.squares - self._of_sums / self.count) / (self.count - 1)


def noise(look: Look) -> dict:
    """By layer and width: variance of one micro-batch's gradient, squared bias, and D for small and large batches."""
    pairs = look.pairs(MICRO * GROUPS, SEEN, UNSEEN // 2)
    far = [pair[1] for pair in look.pairs(GROUPS, SEEN, 2 * UNSEEN)]
    layers = {i: layer for i, layer in enumerate(look.network.spiking_layers()) if layer.name.endswith(".0.sn1")}
    gradients = {i: Moments(len(GRID)) for i in layers}
    changes = {i: Moments(len(GRID) - 1) for i in layers}
    small: dict[int, list] = {i: [[] for _ in GRID] for i in layers}
    large: dict[int, list] = {i: [[] for _ in GRID] for i in layers}

    def fall(layer: SpikingLayer, gradient: Tensor, batch: quality.Batch) -> float:
        direction = gradient / gradient.norm() * weight_of(layer).detach().norm()
        return quality.slope_along(look.network, [weight_of(layer)], [direction], batch, cross_entropy)

    with in_training_mode(look.network):
        for group in range(GROUPS):
            sums = {i: [torch.zeros(()) for _ in GRID] for i in layers}
            for m in range(MICRO):
                seen, unseen = pairs[group * MICRO + m]
                found = by_width(look, layers, seen)
                for i, layer in layers.items():
                    gradients[i].add([g.flatten() for g in found[i]])
                    changes[i].add([(b - a).flatten() for a, b in itertools.pairwise(found[i])])
                    sums[i] = [total + g for total, g in zip(sums[i], found[i], strict=True)]
                    if m < SMALL:
                        for values, g in zip(small[i], found[i], strict=True):
                            values.append(fall(layer, g, unseen))
            for i, layer in layers.items():
                for values, total in zip(large[i], sums[i], strict=True):
                    values.append(fall(layer, total, far[group]))
    by_layer = {
        layer.name: {
            "variance": gradients[i].variance().tolist(),
            "bias_sq": [None, *(4 * changes[i].common()).tolist()],
            "gradient_sq": gradients[i].common().tolist(),
            "descent_small": small[i],
            "descent_large": large[i],
        }
        for i, layer in layers.items()
    }
    return {"widths": list(GRID), "micro": MICRO, "layers": by_layer}


def by_width(look: Look, layers: dict[int, SpikingLayer], batch: quality.Batch) -> dict[int, list[Tensor]]:
    """The gradient of each layer's weights while that layer alone has each width of GRID; one forward pass."""
    loss = cross_entropy(look.network(batch[0]), batch[1])
    # Kernels read a width in their backward pass. Through `data`, autograd does not hold the change against us.
    widths, found = look.neurons.widths.data, {}
    for i, layer in layers.items():
        kept, found[i] = widths[i].clone(), []
        for width in GRID:
            widths[i] = width
            found[i] += torch.autograd.grad(loss, weight_of(layer), retain_graph=True)
        widths[i] = kept
    return found


LOOKS: dict[str, Callable[[Look], dict]] = {"stages": stages, "noise": noise, "times": times}


def run_one(setting: Elsewhere, scratch: Path) -> dict:
    """Trains one network and looks at it on its way."""
    if isinstance(setting, chi_soft_spikes.Softened):
        return chi_soft_spikes.run_one(setting, scratch)
    trial, looks, trained_on = setting.arm, [], 0.0
    images, labels = images_of(scratch / setting.data, "train", setting.image_size)
    numbers = drawn_for(setting, DATA[setting.data][0])
    last = setting.epochs * (setting.num_images // setting.batch)

    def watch(step: int, network: Network, pilot: chi.Pilot) -> None:
        nonlocal trained_on
        if step in WHEN[trial]:
            looks.append({"step": step, **LOOKS[trial](Look(setting, network, pilot.neurons, scratch, step))})
        if step == last:
            trained_on = accuracy(network, images[numbers], labels[numbers], setting.precision)

    record = run(setting, scratch, watch)
    del record["course"]
    return {**record, "train_accuracy": trained_on, "looks": looks}


def do(trial: str, scratch: Path, limit: int | None) -> int:
    """Does at most `limit` runs of a trial; returns the number done."""
    done = 0
    for setting in study_runs.free(list(settings(trial)), RUNS, scratch / "claims"):
        if done == limit:
            break
        record = {"key": study_runs.key_of(asdict(setting)), **run_one(setting, scratch)}
        with RUNS.open("a") as lines:
            lines.write(json.dumps(study_runs.rounded(record)) + "\n")
        print(f"{trial}, {setting.where}, seed {setting.seed}: {record['seconds']:.0f} s", flush=True)
        done += 1
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help=f"of {', '.join(TRIALS)} [all]")
    parser.add_argument("--scratch", type=Path, default=Path("build/chi_study"))
    parser.add_argument("--limit", type=int, help="do at most this many runs of each trial")
    arguments = parser.parse_args()
    arguments.trials = arguments.trials or list(TRIALS)
    if unknown := set(arguments.trials) - set(TRIALS):
        parser.error(f"TRIAL {min(unknown)} is not allowed; use {', '.join(TRIALS)}")
    if arguments.what == "run":
        torch.set_num_threads(1)
        done = sum(do(trial, arguments.scratch, arguments.limit) for trial in arguments.trials)
        raise SystemExit(0 if done else 3)
    chi_falsifiers_report.show([record for record in study_runs.finished(RUNS) if record["arm"] in arguments.trials])


if __name__ == "__main__":
    main()
