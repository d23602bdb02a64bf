"""What the final stage of the χ study says: means, intervals, paired tests, the plot."""

from collections import defaultdict

import numpy as np
from scipy import stats

from benchmarks.table import row

CHI, BASELINE, FIXED, RIVAL = "chi", "atan", "best fixed", "rival"


def by_arm(records: list[dict]) -> dict[str, dict[int, float]]:
    """Accuracy in % by arm and seed; the arm's role is the word before the colon."""
    arms: dict[str, dict[int, float]] = defaultdict(dict)
    for record in records:
        arms[record["arm"].split(":")[0]][record["seed"]] = 100 * record["accuracy"]
    return arms


def paired(arms: dict[str, dict[int, float]], first: str, second: str) -> np.ndarray:
    """Differences of the seeds that both have."""
    seeds = sorted(arms[first].keys() & arms[second].keys())
    return np.array([arms[first][seed] - arms[second][seed] for seed in seeds])


def interval(values: np.ndarray) -> tuple[float, float]:
    """Mean and half the width of its 95 % interval by Student's t."""
    return values.mean(), stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def carried(records: list[dict]) -> list[dict]:
    """What the frozen setting gains over other arms with LIF neurons, paired by seed."""
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


def dots(axes, arms: dict[str, dict[int, float]]) -> None:
    """Every run of an arm, with mean and 95 % interval."""
    for place, by_seed in enumerate(arms.values()):
        values = np.array(list(by_seed.values()))
        jitter = np.random.default_rng(0).uniform(-0.12, 0.12, len(values))
        axes.plot(place + jitter, values, "o", alpha=0.5)
        mean, half = interval(values)
        axes.errorbar(place, mean, half, color="black", capsize=6, marker="_")
    axes.set_xticks(range(len(arms)), list(arms))
