"""How long an epoch takes, from the rate that a run with the same settings measured; never a guess."""

import json
import statistics
from pathlib import Path

from pipeline.config import Config
from pipeline.config.config_json import flatten
from pipeline.errors import ConfigError
from pipeline.metrics.console import rate_decimals
from pipeline.metrics.journal import read_journal
from pipeline.run_dir.run_folder import Stored, read

SAME = ("data.image_size", "data.image_size_start", "data.micro_batch", "train.precision", "train.zero_stage")
"""What a run's speed depends on, beside the network (`model.*`) and the machine."""


def line(config: Config, num_samples: int) -> str:
    """Time of an epoch and of the whole run at the newest measured rate, and its source; or why it is not known."""
    found = newest(config)
    if found is None:
        return f"not known: no run of {config.recipe} beside {config.run_dir} has measured a rate with these settings"
    run, rate = found
    epoch_s, shown = num_samples / rate, f"{rate:,.{rate_decimals(rate)}f}"
    return (
        f"{duration(epoch_s)} an epoch, {duration(epoch_s * config.train.epochs)} in all, at {shown} images/s: the "
        f"median of {run.folder}, on {run.about['world_size']} ranks of its machine ({run.about['cpu']}, "
        f"{run.about['cores']} cores); evaluations and checkpoints come on top"
    )


def newest(config: Config) -> tuple[Stored, float] | None:
    """The newest run with these settings, in this run's folder or beside it, and its median rate in images/s."""
    here = Path(config.run_dir)
    wanted = settings(config)
    journals = [here / "metrics.jsonl", *here.parent.glob("*/metrics.jsonl")]
    for journal in sorted({j for j in journals if j.is_file()}, key=lambda j: j.stat().st_mtime, reverse=True):
        try:
            run = read(journal.parent)
        except ConfigError:  # of another version, or incomplete
            continue
        rates = [record["train_images_per_second"] for record in read_journal(journal) if "train_loss" in record]
        # The first record includes the start-up.
        if run.config.recipe == config.recipe and settings(run.config) == wanted and len(rates) > 1:
            return run, statistics.median(rates[1:])
    return None


def settings(config: Config) -> dict[str, object]:
    flat = flatten(json.loads(json.dumps(config.to_dict())))
    return {name: value for name, value in flat.items() if name in SAME or name.startswith("model.")}


def duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
