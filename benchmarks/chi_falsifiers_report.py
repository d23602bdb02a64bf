"""Tables of the trials of `benchmarks.chi_falsifiers`. Intervals are 95 %, by Student's t over the seeds."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.chi_study_report import interval

AS_IT_IS = "as it is"


def show(records: Sequence[dict]) -> None:
    """Prints what there is of every trial."""
    gaps(records)
    for (trial, where, step), looks in by_place(records).items():
        print(f"\n{trial}: {where}, after {step} steps, {len(looks)} seeds")
        if trial == "noise":
            noise(looks)
        elif step == 0:
            first_gradients(looks)
        else:
            profiles(looks)


def by_place(records: Sequence[dict]) -> Mapping[tuple[str, str, int], list[dict]]:
    """The looks of all seeds, by trial, setting and step."""
    found: dict = defaultdict(list)
    for record in records:
        for look in record["looks"]:
            found[record["arm"], record["where"], look["step"]].append(look)
    return found


def said(values: Sequence[float], digits: int = 1) -> str:
    mean, half = interval(np.array(values)) if len(values) > 1 else (values[0], math.nan)
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def gaps(records: Sequence[dict]) -> None:
    """Accuracies of every setting's runs."""
    found: dict = defaultdict(list)
    for record in records:
        found[record["where"]].append((100 * record["train_accuracy"], 100 * record["accuracy"]))
    for where, pairs in found.items():
        train, held_out = np.array(pairs).T
        print(f"{where}: training {train.mean():.1f} %, held out {held_out.mean():.1f} %, gap {said(train - held_out)}")


def profiles(looks: Sequence[dict]) -> None:
    """Changes of D in %, of single moves and of what was chosen."""
    base = float(np.mean([look["chosen_on"][AS_IT_IS] for look in looks]))
    print(f"  D {base:.3g}; coverage {spread(looks)}; change of D, %:")
    for name in looks[0]["chosen_on"]:
        if name != AS_IT_IS:
            print(f"  {name:28} {said(changes(looks, 'chosen_on', name, AS_IT_IS))}")
    print("  chosen on some batches, judged on others:")
    for name, against in (("common", AS_IT_IS), ("by group", AS_IT_IS), ("by group", "common")):
        print(f"  {f'{name} against {against}':28} {said(changes(looks, 'judged_on', name, against))}")
    if len(looks) > 1:
        print(f"  {'by group, other seeds choose':28} {said(by_other_seeds(looks))} against the best common move")


def spread(looks: Sequence[dict]) -> str:
    """Coverage by layer, or by time step where there is one for each."""
    coverage = np.mean([look["coverage"] for look in looks], 0)
    if coverage.ndim == 2:
        return " ".join(f"{p:.2f}" for p in coverage.mean(0)) + " by time step"
    return f"{coverage.min():.2f} to {coverage.max():.2f} by layer"


def changes(looks: Sequence[dict], part: str, name: str, against: str) -> list[float]:
    """D of one candidate minus that of another, by seed, in % of the mean D as it is (over all seeds)."""
    base = np.mean([look[part][AS_IT_IS] for look in looks])
    return [float(100 * (np.mean(look[part][name]) - np.mean(look[part][against])) / base) for look in looks]


def by_other_seeds(looks: Sequence[dict]) -> list[float]:
    """By seed: the gain in %, as a sum over groups, of the moves that are best on the other seeds.

    It is the gain over the best move of all groups together, which the other seeds choose too.
    """
    moves = [name[:-3] for name in looks[0]["chosen_on"] if name.endswith(" -1")]
    table = {name: changes(looks, "chosen_on", name, AS_IT_IS) for name in looks[0]["chosen_on"]}

    def gain(move: str, seed: int) -> float:
        options = (AS_IT_IS, f"{move} -1", f"{move} +1")
        best = max(options, key=lambda name: sum(table[name][:seed] + table[name][seed + 1 :]))
        return table[best][seed]

    return [sum(gain(move, seed) for move in moves if move != "all") - gain("all", seed) for seed in range(len(looks))]


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
        print(f"  {layer}\n  {'width':>8}{'variance':>10}{f'/{micro}':>8}{'4 bias²':>10}{'D':>18}{f'D of {micro}':>18}")
        for k, width in enumerate(widths):
            small, large = (said([float(np.mean(p[which][k])) for p in parts], 3) for which in
                            ("descent_small", "descent_large"))  # fmt: skip
            squared = f"{4 * bias[k - 1]:10.3f}" if k else f"{'':10}"
            print(f"  {width:8.2f}{variance[k]:10.3f}{variance[k] / micro:8.3f}{squared}{small:>18}{large:>18}")
        for count in (1, micro):
            found = [crossing(widths, [v / count for v in part["variance"]], part["bias_sq"]) for part in parts]
            best = [max(widths, key=lambda w, p=part, c=count: descent(p, widths.index(w), c > 1)) for part in parts]
            where = ", ".join("none" if width is None else f"{width:.2f}" for width in found)
            print(f"  {count} micro-batches: variance = 4 bias² at {where}; D largest at "
                  + ", ".join(f"{width:.2f}" for width in best))  # fmt: skip


def descent(part: dict, k: int, large: bool) -> float:
    return float(np.mean(part["descent_large" if large else "descent_small"][k]))


def crossing(widths: Sequence[float], variance: Sequence[float], bias_sq: Sequence[float | None]) -> float | None:
    """The largest width at which 4 bias² rises above the variance, between the widths of the grid by logarithms.

    None if 4 bias² is not above the variance at the largest width, or is above it at all. A bias² that noise makes
    negative counts as small.
    """
    gaps = [
        None if bias is None else math.log(max(4 * bias, 1e-9 * spread) / spread)
        for spread, bias in zip(variance, bias_sq, strict=True)
    ]
    for k in range(len(widths) - 1, 0, -1):
        low, high = gaps[k - 1], gaps[k]
        if high is None or high < 0:
            return None
        if low is not None and low < 0:
            return widths[k - 1] * (widths[k] / widths[k - 1]) ** (low / (low - high))
    return None
