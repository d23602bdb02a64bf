"""Tables of the trials of `benchmarks.chi_falsifiers`. Intervals are 95 %, by Student's t.

Those of D are over the pairs of batches of all seeds, as if pairs of one seed were independent; over three seeds alone
they would be two to four times as wide.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats

from benchmarks import chi_soft_spikes
from benchmarks.chi_study_report import interval

AS_IT_IS = "as it is"
SEEN_AS = 0.05
"""The change of D for which the pairs of batches are counted that show it."""


def show(records: Sequence[dict]) -> None:
    """Prints what there is of every trial."""
    softened = [record for record in records if "budget" in record]
    others = [record for record in records if "budget" not in record]
    gaps(others)
    soft_spikes([record for record in softened if record["arm"] == "soft"])
    soft_again([record for record in softened if record["arm"] == "again"])
    for (trial, where, when), looks in by_place(others).items():
        print(f"\n{trial}: {where}, {when}, {len({look['seed'] for look in looks})} seeds")
        if trial == "noise":
            noise(looks)
        elif "norms" in looks[0]:
            first_gradients(looks)
        else:
            profiles(looks)


def by_place(records: Sequence[dict]) -> Mapping[tuple[str, str, str], list[dict]]:
    """The looks of all seeds, by trial, setting and time; and those of all times together where there are several."""
    found: dict = defaultdict(list)
    for record in records:
        for look in record["looks"]:
            times = [f"after {look['step']} steps"]
            if record["arm"] == "stages" and look["step"]:
                times.append("at all times")
            for when in times:
                found[record["arm"], record["where"], when].append({**look, "seed": record["seed"]})
    return dict(sorted(found.items()))


def said(values: Sequence[float] | np.ndarray, unit: float = 1.0, digits: int = 1) -> str:
    """Mean and half of its interval, over `unit`."""
    mean, half = interval(np.asarray(values)) if len(values) > 1 else (values[0], math.nan)
    return f"{mean / unit:+.{digits}f} ± {half / unit:.{digits}f}"


def gaps(records: Sequence[dict]) -> None:
    """Accuracies of every setting's runs."""
    found: dict = defaultdict(list)
    for record in records:
        found[record["where"]].append((100 * record["train_accuracy"], 100 * record["accuracy"]))
    for where, pairs in found.items():
        train, held_out = np.array(pairs).T
        print(f"{where}: training {train.mean():.1f} %, held out {held_out.mean():.1f} %, gap {said(train - held_out)}")


STATISTICS = {"as training left them": "", "of hard passes": "hard_"}
"""Of batch normalisation, with the start of the names of the accuracies that go with them."""


def soft_gains(records: Sequence[dict], statistics: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By budget, and for their mean: held-out accuracy, and gap, against budget 0, in points, a seed each.

    A seed counts where it has both of what is compared, and for the mean where it has all budgets.
    """
    start = STATISTICS[statistics]
    found: dict[float, dict[int, np.ndarray]] = defaultdict(dict)
    for record in records:
        held_out, train = 100 * record[f"{start}accuracy"], 100 * record[f"{start}train_accuracy"]
        found[record["budget"]][record["seed"]] = np.array([held_out, train - held_out])
    hard = found.pop(0.0)
    against = {
        f"budget {budget:g}": {seed: found[budget][seed] - hard[seed] for seed in sorted(found[budget]) if seed in hard}
        for budget in sorted(found)
    }
    whole = sorted(set.intersection(*(set(gains) for gains in against.values())))
    gains = {name: np.array(list(by_seed.values())) for name, by_seed in against.items()}
    if len(gains) > 1:
        gains["mean of both"] = np.array([np.mean([by_seed[s] for by_seed in against.values()], 0) for s in whole])
    return {name: (rows[:, 0], rows[:, 1]) for name, rows in gains.items() if len(rows)}


def one_sided(values: np.ndarray) -> float:
    """Lower end of the one-sided 95 % interval of a mean."""
    return float(values.mean() - stats.t.ppf(0.95, len(values) - 1) * stats.sem(values))


def soft_spikes(records: Sequence[dict]) -> None:
    """Accuracies by budget, and what soft spikes gain over hard ones on the same seeds."""
    if len({record["budget"] for record in records}) < 2:
        return
    for statistics, start in STATISTICS.items():
        print(f"\nsoft spikes, statistics {statistics}:")
        for budget in sorted({record["budget"] for record in records}):
            runs = [record for record in records if record["budget"] == budget]
            train, held_out = (
                100 * np.mean([run[f"{start}{name}"] for run in runs]) for name in ("train_accuracy", "accuracy")
            )
            print(f"  budget {budget:<5g} {len(runs)} runs: training {train:.2f} %, held out {held_out:.2f} %")
        for name, (gain, gap) in soft_gains(records, statistics).items():
            if len(gain) > 1:
                print(f"  {name:13} against 0, {len(gain)} pairs: held out {said(gain, digits=2)}, "
                      f"one-sided 95 % bound {one_sided(gain):+.2f}; gap {said(gap, digits=2)}")  # fmt: skip


def gains_again(records: Sequence[dict], statistics: str) -> dict[str, np.ndarray]:
    """Of the second trial: what soft spikes gain over hard ones, and over hard ones for longer; points, a seed each."""
    found: dict[str, dict[int, float]] = {"soft": {}, "hard": {}, "longer": {}}
    for record in records:
        arm = "soft" if record["budget"] else "longer" if record["epochs"] == chi_soft_spikes.LONGER else "hard"
        found[arm][record["seed"]] = 100 * record[f"{STATISTICS[statistics]}accuracy"]
    soft = found.pop("soft")
    names = {"hard": "hard spikes", "longer": "hard spikes, longer"}
    gains = {names[arm]: np.array([soft[s] - by_seed[s] for s in sorted(soft) if s in by_seed])
             for arm, by_seed in found.items()}  # fmt: skip
    return {name: values for name, values in gains.items() if len(values) > 1}


def soft_again(records: Sequence[dict]) -> None:
    """What soft spikes gain on new seeds."""
    for statistics in STATISTICS:
        for name, gain in gains_again(records, statistics).items():
            print(f"soft spikes again, statistics {statistics}, against {name}, {len(gain)} pairs: held out "
                  f"{said(gain, digits=2)}, one-sided 95 % bound {one_sided(gain):+.2f}")  # fmt: skip


def profiles(looks: Sequence[dict]) -> None:
    """Changes of D, in nats and in % of D as it is, of single moves and of what was chosen."""
    base = {part: np.concatenate([look[part][AS_IT_IS] for look in looks]) for part in ("chosen_on", "judged_on")}
    print(f"  coverage {spread(looks)}; D {said(base['chosen_on'], digits=2)}, {said(base['judged_on'], digits=2)}")

    def line(name: str, part: str, values: np.ndarray) -> None:
        mean, half = interval(base[part])
        share = f"{said(values, mean / 100):>16} %" if mean > half else "   D is not surely above 0"
        print(f"  {name:32}{said(values, digits=2):>16}{share}")

    for name in looks[0]["chosen_on"]:
        if name != AS_IT_IS:
            line(name, "chosen_on", changes(looks, "chosen_on", name, AS_IT_IS))
    print("  chosen on some batches, judged on others:")
    for name, against in (("common", AS_IT_IS), ("by group", AS_IT_IS), ("by group", "common")):
        line(f"{name} against {against}", "judged_on", changes(looks, "judged_on", name, against))
    single = np.concatenate([changes(looks, "chosen_on", name, AS_IT_IS) for name in looks[0]["chosen_on"]][1:])
    if (mean := base["chosen_on"].mean()) > 0:
        needed = (2 * single.std() / (SEEN_AS * mean)) ** 2
        print(f"  a change of {100 * SEEN_AS:g} % is seen, at two standard errors, with {needed:.0f} pairs of batches")
    if len({look["seed"] for look in looks}) == len(looks) > 1:
        print("  chosen on the other seeds, gains of single moves added up:")
        line("by group against common", "chosen_on", by_other_seeds(looks))


def spread(looks: Sequence[dict]) -> str:
    """Coverage by layer, or by time step where there is one for each."""
    coverage = np.mean([look["coverage"] for look in looks], 0)
    if coverage.ndim == 2:
        return " ".join(f"{p:.2f}" for p in coverage.mean(0)) + " by time step"
    return f"{coverage.min():.2f} to {coverage.max():.2f} by layer"


def changes(looks: Sequence[dict], part: str, name: str, against: str) -> np.ndarray:
    """D of one candidate minus that of another on every pair of batches."""
    return np.concatenate([np.subtract(look[part][name], look[part][against]) for look in looks])


def by_other_seeds(looks: Sequence[dict]) -> np.ndarray:
    """Gain of the moves that are best on the other seeds, as a sum over groups, on every pair of batches.

    It is the gain over the best move of all groups together, which the other seeds choose too.
    """
    moves = [name[:-3] for name in looks[0]["chosen_on"] if name.endswith(" -1")]

    def gain(move: str, seed: int) -> np.ndarray:
        others = [look for number, look in enumerate(looks) if number != seed]
        options = (AS_IT_IS, f"{move} -1", f"{move} +1")
        best = max(options, key=lambda name: changes(others, "chosen_on", name, AS_IT_IS).mean())
        return changes([looks[seed]], "chosen_on", best, AS_IT_IS)

    return np.concatenate(
        [sum((gain(move, seed) for move in moves if move != "all"), -gain("all", seed)) for seed in range(len(looks))]
    )


def first_gradients(looks: Sequence[dict]) -> None:
    """Of the first step: |G| / |W| of the first layer over that of the middle and the last one."""
    for name in looks[0]["norms"]:
        norms = np.array([look["norms"][name] for look in looks])
        first, middle, last = norms[:, 0], norms[:, norms.shape[1] // 2], norms[:, -1]
        print(f"  {name:14} first layer {first.mean():8.3g}, middle {middle.mean():8.3g}, last {last.mean():8.3g}; "
              f"growth backwards, a layer {np.mean((first / last) ** (1 / norms.shape[1])):.3f}")  # fmt: skip


def noise(looks: Sequence[dict]) -> None:
    """By layer and width: variance and squared bias in units of |E G|^2 at width 1, and D of both batches."""
    widths, micro = looks[0]["widths"], looks[0]["micro"]
    one = widths.index(1.0)
    for layer in looks[0]["layers"]:
        parts = [look["layers"][layer] for look in looks]
        unit = np.mean([part["gradient_sq"][one] for part in parts])
        variance = np.mean([part["variance"] for part in parts], 0) / unit
        bias = np.mean([part["bias_sq"][1:] for part in parts], 0) / unit
        falls = {which: np.array([np.concatenate([p[which][k] for p in parts]) for k in range(len(widths))])
                 for which in ("descent_small", "descent_large")}  # fmt: skip
        at_one = ", ".join(said(values[one], digits=2) for values in falls.values())
        print(f"  {layer}: D at width 1 of 1 and {micro} micro-batches {at_one}; against that:")
        print(f"  {'width':>8}{'variance':>10}{f'/{micro}':>8}{'4 bias²':>10}{'D':>18}{f'D of {micro}':>18}")
        for k, width in enumerate(widths):
            small, large = (said(values[k] - values[one], digits=3) for values in falls.values())
            squared = f"{4 * bias[k - 1]:10.3f}" if k else f"{'':10}"
            print(f"  {width:8.2f}{variance[k]:10.3f}{variance[k] / micro:8.3f}{squared}{small:>18}{large:>18}")
        powers = [power(widths, values) for values in (variance, [math.nan, *bias])]
        print(f"  from 0.5 to 2 variance goes as w^{powers[0]:.1f}, bias² as w^{powers[1]:.1f}")
        for count in (1, micro):
            found = [crossing(widths, [v / count for v in part["variance"]], part["bias_sq"]) for part in parts]
            best = [max(widths, key=lambda w, p=part, c=count: descent(p, widths.index(w), c > 1)) for part in parts]
            where = ", ".join(f"> {widths[-1]:g}" if width is None else f"{width:.2f}" for width in found)
            print(f"  {count} micro-batches: variance = 4 bias² at {where}; D largest at "
                  + ", ".join(f"{width:.2f}" for width in best))  # fmt: skip


def power(widths: Sequence[float], values: Sequence[float]) -> float:
    """n where the values go as w^n from width 0.5 to 2; NaN where noise makes one of them negative."""
    low, high = (values[widths.index(width)] for width in (0.5, 2.0))
    return math.log(high / low) / math.log(4) if low > 0 and high > 0 else math.nan


def descent(part: dict, k: int, large: bool) -> float:
    return float(np.mean(part["descent_large" if large else "descent_small"][k]))


def crossing(widths: Sequence[float], variance: Sequence[float], bias_sq: Sequence[float | None]) -> float | None:
    """The width from which on 4 bias² is above the variance, between the grid's by logarithms; None above the largest.

    The smallest width that has a bias² if it is above at all of them. A bias² that noise makes negative is small.
    """
    gaps = [
        math.log(max(4 * bias, 1e-9 * spread) / spread)
        for spread, bias in zip(variance[1:], bias_sq[1:], strict=True)
        if bias is not None
    ]
    if gaps[-1] < 0:
        return None
    k = len(gaps) - 1
    while k and gaps[k - 1] >= 0:
        k -= 1
    if not k:
        return widths[1]
    return widths[k] * (widths[k + 1] / widths[k]) ** (gaps[k - 1] / (gaps[k - 1] - gaps[k]))
