"""χ control against the best fixed width: more seeds in deep networks, and longer runs. Protocol: docs/chi_study.md.

    python -m benchmarks.chi_long run --scratch DIR [--limit N]    do the runs that are not done yet
    python -m benchmarks.chi_long report [--json FILE]

DIR and several processes: as `benchmarks.chi_regret`, whose settings and arms these are.
Every finished run is a line of benchmarks/results/chi_long_runs.jsonl.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy import stats

from benchmarks import study_runs, table
from benchmarks.chi_regret import CALIBRATED, SETTINGS, SHORT, SWEEP, UNTUNED, accuracies, gain
from benchmarks.chi_study_run import Elsewhere

RUNS = Path(__file__).parent / "results/chi_long_runs.jsonl"
ATAN, BEST = "atan, alpha 2", "triangle 1"
DEEP = ("27 layers, IF, T=2", "27 layers, IAND, LIF, T=2", "57 layers, IF, T=2")
"""Settings of `chi_regret` with 27 layers and more; its sweeps, on seeds 0 to 2, found width 1 best in all of them."""
DEEP_SEEDS = range(3, 13)
"""None of them had a part in the choice of that width."""
_CIFAR100 = {"data": "cifar100", "num_images": 20_000, "epochs": 8}
LONG = {
    "9 layers, CIFAR-100, 10 epochs": {**_CIFAR100, "epochs": 10},
    "9 layers, CIFAR-10, 10 epochs": {"num_images": 40_000, "epochs": 10},
    "21 layers, T=2, CIFAR-100, 8 epochs": {**_CIFAR100, "arch": "sew_cifar20", "T": 2},
    "plain, 13 layers, LIF, CIFAR-100, 8 epochs": {
        **_CIFAR100,
        "arch": "sew_cifar14",
        "connect": "none",
        "neuron": "lif",
    },
}
"""Images of 16 x 16, every image that a run may train on: 8 to 20 times the steps of `chi_regret`'s."""
LONG_SEEDS = range(3)


def settings() -> Iterator[Elsewhere]:
    """Every run, seed by seed, so that what is done is paired at any time."""
    choices = SWEEP | UNTUNED
    for seed in DEEP_SEEDS:
        for where in DEEP:
            for arm in (BEST, CALIBRATED):
                place = {**SHORT, **SETTINGS[where]}
                yield Elsewhere(arm=arm, where=where, lr=0.2, seed=seed, **place, **choices[arm])
    for seed in LONG_SEEDS:
        for where, place in LONG.items():
            for arm in (ATAN, BEST, CALIBRATED):
                yield Elsewhere(arm=arm, where=where, lr=0.2, seed=seed, **place, **choices[arm])


def rows(records: list[dict]) -> list[dict]:
    """Accuracies, and χ minus the others paired by seed, with 95 % intervals by Student's t. In points."""
    lines = []
    for where, arms in accuracies(records).items():
        for arm, by_seed in arms.items():
            lines.append(
                table.row(f"{where}: {arm}, {len(by_seed)} seeds", float(np.mean(list(by_seed.values()))), "%")
            )
        here = [record for record in records if record["where"] == where]
        for other in (BEST, ATAN):
            if len(gain(here, CALIBRATED, other)) > 1:
                lines += compared(f"{where}: χ against {other}", gain(here, CALIBRATED, other))
    deep = gain([record for record in records if record["where"] in DEEP], CALIBRATED, BEST)
    whole = len(deep) == len(DEEP) * len(DEEP_SEEDS)
    if len(deep) > 1:
        lines += compared("27 layers and more: χ against the best fixed width", deep, -0.3 if whole else None)
    return lines


def compared(name: str, gains: list[float], goal: float | None = None) -> list[dict]:
    """The mean of paired differences, half of its 95 % interval, and the one-sided 95 % lower bound."""
    n, mean = len(gains), float(np.mean(gains))
    error = float(np.std(gains, ddof=1)) / n**0.5
    half, one_sided = (float(stats.t.ppf(share, n - 1)) * error for share in (0.975, 0.95))
    return [
        table.row(f"{name}, {n} pairs", mean, f"± {half:.2f} points"),
        table.row(f"{name}, one-sided 95 % bound", mean - one_sided, "points", goal),
    ]


def main() -> None:
    arguments = study_runs.parser(__doc__).parse_args()
    if arguments.what == "run":
        study_runs.do_and_exit(settings(), RUNS, arguments)
    lines = rows(study_runs.finished(RUNS))
    if not lines:
        raise SystemExit(f"{RUNS} has no runs; do some first")
    table.show(lines)
    if arguments.json:
        study_runs.write(arguments.json, lines, "chi_long")


if __name__ == "__main__":
    main()
