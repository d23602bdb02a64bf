"""Results of the final stages of the χ study: means, intervals, paired tests, plots."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks.table import row

CHI, BASELINE, FIXED, RIVAL = "chi", "atan", "best fixed", "rival"
FINAL_RATE, CHOSEN = 0.2, "chi 0.6 to 0.2"
"""Learning rate and course of the target, frozen before the test split was read."""


def by_arm(records: list[dict]) -> dict[str, dict[int, float]]:
    """Accuracy in % by arm and seed. An arm's role is the text before its colon."""
    arms: dict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        arms[record["arm"].split(":")[0]][record["seed"]] = 100 * record["accuracy"]
    return arms


def paired(arms: dict[str, dict[int, float]], first: str, second: str) -> np.ndarray:
    """Differences in accuracy on the seeds that both arms have."""
    seeds = sorted(arms[first].keys() & arms[second].keys())
    return np.array([arms[first][seed] - arms[second][seed] for seed in seeds])


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t."""
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def carried(records: list[dict]) -> list[dict]:
    """The gain of the frozen setting over other arms with LIF neurons, paired by seed."""
    arms = {arm.removesuffix(", lif"): by_seed for arm, by_seed in by_arm(records).items() if len(by_seed) > 1}
    control = next(arm for arm in arms if arm.startswith("chi"))
    table = []
    for arm in arms:
        difference = paired(arms, control, arm)
        if arm == control or len(difference) < 2:
            continue
        mean, half = interval(difference)
        goal = 2.05 if arm == BASELINE else None
        table.append(
            row(f"LIF: chi control against {arm}, {len(difference)} pairs", float(mean), "points", goal, "higher")
        )
        table.append(row(f"LIF: chi control against {arm}, half of the 95 % interval", float(half), "points"))
    return table


def rows(records: list[dict], where: str = "") -> list[dict]:
    """The table of a final stage in the benchmarks' row format; `where` goes before every name."""
    arms = by_arm(records)
    names = {record["arm"].split(":")[0]: record["arm"].split(":")[1].strip() for record in records}
    table = []

    def add(name: str, value: float, unit: str, goal: float | None = None, better: str = "higher") -> None:
        table.append(row(where + name, float(value), unit, goal, better))

    for role, by_seed in arms.items():
        mean, half = interval(np.array(list(by_seed.values())))
        add(f"{role} ({names[role]}), test accuracy, n = {len(by_seed)}", mean, "%")
        add(f"{role}, half of the 95 % interval", half, "points")
    goals = {BASELINE: 2.05, FIXED: 0.0, RIVAL: 0.0}
    for role, goal in ((role, goal) for role, goal in goals.items() if role in arms):
        difference = paired(arms, CHI, role)
        mean, half = interval(difference)
        add(f"chi control against {role} ({names[role]}), {len(difference)} pairs", mean, "points", goal)
        add(f"chi control against {role}, half of the 95 % interval", half, "points")
    difference = paired(arms, CHI, FIXED)
    bound = difference.mean() - stats.t.ppf(0.95, len(difference) - 1) * stats.sem(difference)
    add("chi control against best fixed, one-sided 95 % bound", bound, "points", -0.3)
    if RIVAL not in arms:
        return table
    difference = paired(arms, CHI, RIVAL)
    t = difference.mean() / stats.sem(difference)
    add(
        "chi control against rival, p of the paired t-test",
        float(2 * stats.t.sf(abs(t), len(difference) - 1)),
        "",
        0.05,
        "lower",
    )
    return table


def plot(every: list[dict], path: str) -> None:
    """The sweep over fixed widths; the final runs, a dot each; and the same arms with another neuron."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4), layout="constrained")
    for lr, colour in ((0.05, "C0"), (0.1, "C1"), (0.2, "C2")):
        runs = [r for r in every if r["stage"] in ("sweep", "rates") and r["lr"] == lr]
        points = sorted((r["width"], 100 * r["accuracy"]) for r in runs if r["arm"].startswith("fixed"))
        if points:
            left.plot(*zip(*points, strict=True), "o-", color=colour, label=f"fixed, rate {lr}")
        for r in runs:
            if r["arm"] == "atan":
                left.axhline(100 * r["accuracy"], color=colour, linestyle=":", linewidth=1)
    left.set_xscale("log", base=2)
    left.set(xlabel="fixed half-width", ylabel="held-out accuracy, %", title="One width for all layers (dotted: atan)")
    left.legend(frameon=False, fontsize=8)
    dots(middle, by_arm([r for r in every if r["stage"] == "final"]))
    middle.set(ylabel="test accuracy, %", title="Final runs; χ from random starting widths")
    carried = by_arm([r for r in every if r["stage"] == "other_neuron"])
    dots(right, {arm.removesuffix(", lif"): by_seed for arm, by_seed in carried.items() if len(by_seed) > 1})
    right.set(ylabel="held-out accuracy, %", title="The same settings with another neuron, LIF")
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def first_picture(every: list[dict], path: str | Path) -> None:
    """Left: accuracy over the starting width, fixed and steered. Right: the final runs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained", width_ratios=(1.35, 1))
    fixed, steered = sweep(every), steered_starts(every)
    half = single_run(every)
    left.errorbar(
        [width for width, _ in fixed], [value for _, value in fixed], half, fmt="o-", capsize=4,
        label="fixed: one width for all layers, one run each\n(bars: the spread of single runs)",
    )  # fmt: skip
    for number, (widths, value) in enumerate(steered):
        name = f"steered by coverage, {len(steered)} runs: each bar spans\nthe widths that its 9 layers started from"
        left.plot([min(widths), max(widths)], [value, value], "|-", color="C3", linewidth=2.5, alpha=0.8,
                  label=None if number else name)  # fmt: skip
    left.set_xscale("log", base=2)
    left.set_xticks([width for width, _ in fixed], [f"{width:g}" for width, _ in fixed])
    left.set_ylim(37, 54)
    left.set(xlabel="width of the surrogate at the start", ylabel="accuracy on held-out images, %")
    left.legend(frameon=False, fontsize=9, loc="lower center")
    left.set_title("Steered runs need no sweep", loc="left", fontsize=11, fontweight="bold")
    arms = by_arm([record for record in every if record["stage"] == "final"])
    shown = {FIXED: "best fixed\nwidth, 1.0", CHI: "steered, from\nany widths", BASELINE: "atan", RIVAL: "MPD-AGL"}
    dots(right, {f"{name}\nn = {len(arms[arm])}": arms[arm] for arm, name in shown.items()}, ["C0", "C3", "0.5", "0.5"])
    right.tick_params(axis="x", labelsize=8.5)
    right.set(ylabel="accuracy on test images, %")
    right.set_title("… and end level with the swept width", loc="left", fontsize=11, fontweight="bold")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def sweep(every: list[dict]) -> list[tuple[float, float]]:
    """Width and held-out accuracy in % of the fixed widths, at the learning rate of the final runs."""
    runs = [r for r in every if r["stage"] == "rates" and r["lr"] == FINAL_RATE and r["arm"].startswith("fixed")]
    return sorted((r["width"], 100 * r["accuracy"]) for r in runs)


def steered_starts(every: list[dict]) -> list[tuple[list[float], float]]:
    """Starting widths by layer and held-out accuracy in % of the runs of the chosen course."""
    from benchmarks.chi_study_run import start_widths

    runs = [r for r in every if r["stage"] == "confirm" and r["arm"] == CHOSEN]
    return [(start_widths(r["seed"], len(r["course"][0]["widths"])), 100 * r["accuracy"]) for r in runs]


def single_run(every: list[dict]) -> float:
    """Half of the interval that holds 95 % of single runs, in points: from the final runs at the best fixed width."""
    values = list(by_arm([record for record in every if record["stage"] == "final"])[FIXED].values())
    return float(stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1))


def dots(axes, arms: dict[str, dict[int, float]], colours: Sequence[str] = ()) -> None:
    """Draws every run of each arm as a dot, with mean and 95 % interval."""
    for place, by_seed in enumerate(arms.values()):
        values = np.array(list(by_seed.values()))
        jitter = np.random.default_rng(0).uniform(-0.12, 0.12, len(values))
        axes.plot(place + jitter, values, "o", alpha=0.5, color=colours[place] if colours else None)
        mean, half = interval(values)
        axes.errorbar(place, mean, half, color="black", capsize=6, marker="_")
    axes.set_xticks(range(len(arms)), list(arms))
