"""What an untuned choice of surrogate costs, over settings that differ as users' do. Protocol: docs/chi_study.md.

    python -m benchmarks.chi_regret run --scratch DIR [--limit N]    do the runs that are not done yet
    python -m benchmarks.chi_regret report [--json FILE] [--plot FILE]

DIR holds cifar10, cifar100 and digits as shards (`python -m data_prep …`). Several processes may run at the same time.
Every finished run is a line of benchmarks/results/chi_regret_runs.jsonl.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks import study_runs, table
from benchmarks.chi_study_arms import FIXED, chi
from benchmarks.chi_study_run import Elsewhere

RUNS = Path(__file__).parent / "results/chi_regret_runs.jsonl"
SEEDS = 3
SHORT = {"num_images": 5_000, "epochs": 4}
SETTINGS: dict[str, dict] = {
    "9 layers, IF, T=4": {},
    "9 layers, IF, T=2": {"T": 2},
    "9 layers, IF, T=8": {"T": 8},
    "9 layers, LIF, T=4": {"neuron": "lif"},
    "9 layers, PLIF, T=4, v_th=0.5": {"neuron": "plif", "v_th": 0.5},
    "9 layers, IF, T=4, v_th=2": {"v_th": 2.0},
    "9 layers, LIF, T=4, v_th=2": {"neuron": "lif", "v_th": 2.0},
    "27 layers, IF, T=2": {"arch": "sew_cifar26", "T": 2},
    "27 layers, IAND, LIF, T=2": {"arch": "sew_cifar26", "T": 2, "connect": "iand", "neuron": "lif"},
    "57 layers, IF, T=2": {"arch": "sew_cifar56", "T": 2},
    "plain, 13 layers, LIF, T=4": {"arch": "sew_cifar14", "connect": "none", "neuron": "lif"},
    "plain, 19 layers, IF, T=2": {"arch": "sew_cifar20", "T": 2, "connect": "none"},
    "9 layers, IF, T=4, CIFAR-100": {"data": "cifar100", "num_images": 10_000},
    "9 layers, LIF, T=4, digits": {"data": "digits", "neuron": "lif", "num_images": 1_000, "epochs": 10},
}
"""What each setting changes: CIFAR-10 at 16 x 16, sew_cifar8 (9 layers), ADD, IF, T = 4, v_th = 1, 5,000 images."""
SWEEP = {f"triangle {width:g}": {"width": width, "policy": FIXED} for width in (0.25, 0.5, 1.0, 2.0, 4.0)}
CALIBRATED, ANY = "chi, calibrated", "chi, any start"
UNTUNED = {
    "atan, alpha 2": {"surrogate": "atan", "width": 0.31830988618379067, "policy": FIXED},
    "sigmoid, slope 25": {"surrogate": "sigmoid", "width": 0.04, "policy": FIXED},
    "MPD-AGL": {"surrogate": "rectangle", "policy": {"policy": "mpd_agl"}},
    CALIBRATED: {"policy": chi(0.5, 0.3), "calibrated": True},
    ANY: {"policy": chi(0.5, 0.3), "width": None},
}
"""What people use without a sweep, beside triangle 1: SEW-ResNet's default, snnTorch's sigmoid, a rival, and ours."""
SHOWN = {
    "sigmoid, slope 25": "sigmoid, slope 25 (snnTorch)",
    "MPD-AGL": "MPD-AGL",
    "atan, alpha 2": "atan, α = 2 (SEW-ResNet)",
    "triangle 1": "triangle, width 1",
    ANY: "χ control, random start",
    CALIBRATED: "χ control, calibrated start",
}
"""Names in the plot."""


def settings() -> Iterator[Elsewhere]:
    """Every run: the first seed in all settings, then the next."""
    for seed in range(SEEDS):
        for where, change in SETTINGS.items():
            for arm, choice in (SWEEP | UNTUNED).items():
                yield Elsewhere(arm=arm, where=where, lr=0.2, seed=seed, **{**SHORT, **change}, **choice)


def accuracies(records: list[dict]) -> Mapping[str, Mapping[str, dict[int, float]]]:
    """Held-out accuracy in %, by setting, arm and seed."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for record in records:
        found[record["where"]][record["arm"]][record["seed"]] = 100 * record["accuracy"]
    return found


def reference(arms: Mapping[str, dict[int, float]], seed: int) -> float | None:
    """Accuracy, on this seed, of the width that is best on the others; None unless the sweep is whole on two seeds.

    So chance does not favour the sweep: the run that is compared has no part in the choice.
    """
    whole = [s for s in range(SEEDS) if all(s in arms[width] for width in SWEEP)]
    others = [s for s in whole if s != seed]
    if seed not in whole or not others:
        return None
    best = max(SWEEP, key=lambda width: sum(arms[width][s] for s in others))
    return arms[best][seed]


def regrets(records: list[dict]) -> Mapping[str, dict[str, list[float]]]:
    """By arm and setting: best of the sweep minus the arm, in points, for every seed that has both."""
    found: dict = defaultdict(dict)
    for where, arms in accuracies(records).items():
        against = {seed: reference(arms, seed) for seed in range(SEEDS)}
        for arm, by_seed in arms.items():
            differences = [
                best - by_seed[seed] for seed, best in against.items() if best is not None and seed in by_seed
            ]
            if differences:
                found[arm][where] = differences
    return found


def missing(records: list[dict]) -> int:
    """Runs of the protocol that are not among these."""
    done = {(record["where"], record["arm"], record["seed"]) for record in records}
    return sum((setting.where, setting.arm, setting.seed) not in done for setting in settings())


def rows(records: list[dict]) -> list[dict]:
    """The table: regret by arm, and χ against each untuned choice; goals only where no run is missing."""
    by_arm = regrets(records)
    lines, judged = [], not missing(records)

    def add(
        name: str, value: "float | np.floating", goal: float | None = None, better: str = "lower", unit: str = "points"
    ) -> None:
        lines.append(table.row(name, float(value), unit, goal if judged else None, better))

    for arm in (*SWEEP, *UNTUNED):
        means = {where: float(np.mean(values)) for where, values in by_arm.get(arm, {}).items()}
        if not means:
            continue
        ours = arm in (CALIBRATED, ANY)
        worst = max(means, key=means.__getitem__)
        add(f"{arm}: mean regret over {len(means)} settings", np.mean(list(means.values())), 0.3 if ours else None)
        add(f"{arm}: worst regret ({worst})", means[worst], 1.0 if ours else None)
    for arm in ("triangle 1", "atan, alpha 2", "sigmoid, slope 25", "MPD-AGL"):
        gains = gain(records, CALIBRATED, arm)
        if len(gains) > 1:
            add(f"{CALIBRATED} against {arm}: mean over {len(gains)} pairs", np.mean(gains), 0.0, "higher")
            p = float(stats.ttest_1samp(gains, 0.0).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
            add(f"{CALIBRATED} against {arm}: p of the paired t-test", p, 0.05, "lower", "")
    return lines


def gain(records: list[dict], first: str, second: str) -> list[float]:
    """Accuracy of one arm minus that of another, in points, in every setting and seed that has both."""
    return [
        arms[first][seed] - arms[second][seed]
        for arms in accuracies(records).values()
        for seed in sorted(arms[first].keys() & arms[second].keys())
    ]


def plot(records: list[dict], path: str) -> None:
    """Regret of each untuned choice in every setting, a dot each; the bar is the mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    by_arm = regrets(records)
    arms = [arm for arm in ("sigmoid, slope 25", "MPD-AGL", "atan, alpha 2", "triangle 1", ANY, CALIBRATED)
            if by_arm.get(arm)]  # fmt: skip
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for place, arm in enumerate(arms):
        values = np.array([np.mean(seeds) for seeds in by_arm[arm].values()])
        jitter = np.linspace(-0.2, 0.2, len(values))
        colour = "C3" if arm in (CALIBRATED, ANY) else "0.45"
        axes.plot(values, place + jitter, "o", color=colour, alpha=0.6, markersize=5)
        axes.plot([values.mean()] * 2, [place - 0.32, place + 0.32], color=colour, linewidth=3)
    axes.axvline(0, color="0.7", linewidth=1)
    axes.set_yticks(range(len(arms)), [SHOWN[arm] for arm in arms])
    axes.set_xscale("symlog", linthresh=2, linscale=1)
    ticks = [-2, -1, 0, 1, 2, 5, 10, 20, 40]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("points lost against the best of five swept widths (a dot: one setting; bar: mean)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = study_runs.parser(__doc__)
    parser.add_argument("--plot", metavar="FILE", help="draw the regrets here")
    arguments = parser.parse_args()
    if arguments.what == "run":
        study_runs.do_and_exit(settings(), RUNS, arguments)
    records = study_runs.finished(RUNS)
    lines = rows(records)
    if not lines:
        raise SystemExit(f"{RUNS} has no setting with a whole sweep on two seeds; do more runs first")
    if left := missing(records):
        print(f"{left} runs are missing, so no goal is judged")
    table.show(lines)
    if arguments.json:
        study_runs.write(arguments.json, lines, "chi_regret")
    if arguments.plot:
        plot(records, arguments.plot)


if __name__ == "__main__":
    main()
