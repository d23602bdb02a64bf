"""The χ study: does steering the widths beat every fixed surrogate? Protocol and log: docs/chi_study.md.

    python -m benchmarks.chi_study run STAGE --scratch DIR [--limit N]   do the runs of a stage that are not done yet
    python -m benchmarks.chi_study table STAGE                           show their results by arm
    python -m benchmarks.chi_study report [--json FILE] [--plot FILE]    show the final figures
    python -m benchmarks.chi_study plot [--plot FILE]                    draw the README's picture

DIR holds CIFAR-10 as shards (`python -m data_prep imagefolder cifar10-images.tar.gz DIR/cifar10`) and what the runs
share. Several processes may run the same stage: each takes the next run that is free. Every finished run is a line of
benchmarks/results/chi_study_runs.jsonl.
"""

import argparse
from collections import defaultdict
from pathlib import Path

from benchmarks import study_runs
from benchmarks import table as results
from benchmarks.chi_study_arms import STAGES

RUNS = Path(__file__).parent / "results/chi_study_runs.jsonl"
PICTURE = Path(__file__).parents[1] / "docs/chi-starts.png"


def finished() -> list[dict]:
    """Every run of the study so far."""
    return study_runs.finished(RUNS)


def table(stage: str) -> None:
    rows = defaultdict(list)
    for record in finished():
        if record["stage"] == stage:
            rows[record["arm"], record["lr"]].append(record)
    means = {arm: sum(r["accuracy"] for r in records) / len(records) for arm, records in rows.items()}
    for (arm, lr), mean in sorted(means.items(), key=lambda item: -item[1]):
        records = rows[arm, lr]
        each = " ".join(f"{100 * r['accuracy']:.2f}" for r in sorted(records, key=lambda r: r["seed"]))
        loss = sum(r["train_loss"] for r in records) / len(records)
        print(f"{arm:34} lr {lr:<5} {100 * mean:6.2f}  loss {loss:.3f}  n={len(records)}: {each}")


def report(json_path: str | None, plot_path: str | None) -> None:
    """Shows the table of the final stages; writes it and the plot to the paths, if given."""
    import torch

    from benchmarks import chi_study_report

    every = finished()
    rows = []
    for stage, where in (("final", ""), ("final_quick", "quick control, fp32: "), ("final_32", "32 x 32: ")):
        rows += chi_study_report.rows([record for record in every if record["stage"] == stage], where)
    rows += chi_study_report.carried([record for record in every if record["stage"] == "other_neuron"])
    results.show(rows)
    if json_path:
        results.write(
            json_path,
            rows,
            hardware=f"{results.processor()}, one core a run; no GPU was at hand",
            versions={"torch": torch.__version__},
            command="python -m benchmarks.chi_study report",
            setting="docs/chi_study.md; every run is a line of chi_study_runs.jsonl",
        )
    if plot_path:
        chi_study_report.plot(every, plot_path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("run", "table", "report", "plot"))
    parser.add_argument("stage", nargs="?", choices=tuple(STAGES))
    parser.add_argument("--scratch", type=Path, default=Path("build/chi_study"))
    parser.add_argument("--limit", type=int, help="do at most this many runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write the final figures here")
    parser.add_argument(
        "--plot", metavar="FILE", help="draw here: report the sweep and the final runs, plot the picture"
    )
    arguments = parser.parse_args()
    if arguments.what in ("run", "table") and arguments.stage is None:
        parser.error(f"{arguments.what} needs a stage: {', '.join(STAGES)}")
    if arguments.what == "run":
        import torch

        torch.set_num_threads(arguments.threads)
        settings = STAGES[arguments.stage]
        done = study_runs.do(settings, RUNS, arguments.scratch, arguments.limit, stage=arguments.stage)
        raise SystemExit(0 if done else 3)
    if arguments.what == "table":
        table(arguments.stage)
    if arguments.what == "report":
        report(arguments.json, arguments.plot)
    if arguments.what == "plot":
        from benchmarks import chi_study_report

        chi_study_report.first_picture(finished(), arguments.plot or PICTURE)


if __name__ == "__main__":
    main()
