"""The main job through the real launcher, two ranks: what it shows, what it leaves, and that a kill costs nothing."""

import json
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from pipeline.data.loader import evaluation_batches
from pipeline.data.manifest import Manifest
from pipeline.engine import load_network
from pipeline.errors import EXIT_DONE, EXIT_STOPPED
from pipeline.metrics.journal import read_journal
from pipeline.run_dir import run_folder
from pipeline.run_dir.checkpoint_files import load_newest
from pipeline.snn.neurons import Neuron
from tests.conftest import ROOT, launch, start
from tests.support.tracked import tensorboard_curve
from tests.support.training_runs import STEPS, Finished, arguments, read_until


def decisions(run_dir: Path) -> list[dict]:
    return [record for record in read_journal(run_dir / "metrics.jsonl") if "decision_log_width" in record]


def losses(run_dir: Path) -> dict[int, float]:
    return {r["step"]: r["train_loss"] for r in read_journal(run_dir / "metrics.jsonl") if "train_loss" in r}


def assert_same_result(run_dir: Path, straight: Finished) -> None:
    """The same losses, bit for bit, each step once; the same final weights, momentum and widths."""
    assert losses(run_dir) == losses(straight.run_dir)
    assert list(losses(run_dir)) == list(range(1, STEPS + 1))
    assert decisions(run_dir) == decisions(straight.run_dir) != []
    ours, theirs = load_newest(run_dir), load_newest(straight.run_dir)
    assert ours is not None
    assert theirs is not None
    assert ours["step"] == theirs["step"] == STEPS
    for kept in (
        lambda run: run["model"]["parameters"],
        lambda run: run["model"]["optimizer"]["momentum_buffer"],
        lambda run: run["ema"]["parameters"],
    ):
        assert kept(ours).keys() == kept(theirs).keys() != set()
        for name, value in kept(theirs).items():
            assert torch.equal(kept(ours)[name], value), name
    # A save averages the running statistics over ranks: with an extra save, as before a stop, they round differently.
    for name, value in theirs["ema"]["buffers"].items():
        torch.testing.assert_close(ours["ema"]["buffers"][name], value, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours["widths"]["log_width"], theirs["widths"]["log_width"])
    assert torch.unique(ours["widths"]["log_width"]).numel() > 1, "the widths were steered"


def test_the_metrics_port_serves_what_prometheus_reads(straight):
    families = {family.name: family for family in text_string_to_metric_families(straight.scraped)}
    layers = json.loads((straight.run_dir / "run.json").read_text())["layers"]
    for name in ("chi", "participation_ratio", "coverage_ratio", "surrogate_width", "firing_rate_ratio"):
        samples = families[f"snn_layer_{name}"].samples
        assert [sample.labels["layer"][3:] for sample in samples] == layers
        assert all(sample.value >= 0 for sample in samples)
    assert families["snn_train_steps"].samples[0].value >= 3
    assert families["snn_train_image_size_pixels"].samples[0].value == 8
    assert families["snn_network_chi"].samples[0].value > 0
    assert families["snn_run_finished"].samples[0].value == 0
    journal = read_journal(straight.run_dir / "metrics.jsonl")
    assert families["snn_train_loss"].samples[0].value in [record.get("train_loss") for record in journal]


def test_the_console_shows_progress_and_the_layers(digits, straight):
    line = next(line for line in straight.output.splitlines() if line.startswith("step 10/"))
    for part in ("epoch", "loss", "acc", "χ", "cov", "width", "8²", "img/s", "ETA"):
        assert part in line
    assert re.search("^step 13/.*  16²  ", straight.output, re.MULTILINE)
    start = np.exp(decisions(straight.run_dir)[0]["decision_log_width"])
    said = f"widths start at {start.min():.3g} to {start.max():.3g}"
    said += ", with a coverage of 0.50 to 0.50 on 16 training samples\n"
    assert said in straight.output
    assert start.min() < start.max()
    training = [r for r in read_journal(straight.run_dir / "metrics.jsonl") if "train_loss" in r]
    assert [r["train_image_size_pixels"] for r in training] == [8] * 12 + [16] * 2
    num_samples = Manifest.load(digits / "val").num_samples
    assert re.search(rf"validation after step 14: [\d.]+ % of {num_samples} samples", straight.output)
    assert re.search(r"^00-\S+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+$", straight.output, re.MULTILINE)


def test_the_widths_follow_from_the_journal_alone(straight):
    command = [sys.executable, "-m", "pipeline.report", str(straight.run_dir), "--replay"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == EXIT_DONE, done.stdout + done.stderr
    last = load_newest(straight.run_dir)
    assert last is not None
    widths = " ".join(f"{width:.4f}" for width in last["widths"]["log_width"].exp().tolist())
    lines = done.stdout.splitlines()
    made = len(decisions(straight.run_dir)) - 1
    assert lines[-2].endswith(widths)
    assert lines[-1] == f"{made} decisions made again, 0 differ from the run's"
    assert made > 1


def test_the_run_folder_holds_what_is_needed_to_repeat_and_read_the_run(straight):
    folder = straight.run_dir
    assert json.loads((folder / "config.json").read_text())["train"]["seed"] == 0
    run = json.loads((folder / "run.json").read_text())
    assert run["versions"]["torch"] == version("torch")
    assert run["world_size"] == 2
    page = (folder / "report.html").read_text()
    assert page.count("<img alt=") == 4 + 6  # curves, and maps of the layers
    assert "http://" not in page
    assert "https://" not in page
    records = read_journal(folder / "metrics.jsonl")
    assert 0 < records[-1]["eval_accuracy_ratio"] <= 1


def test_the_report_shows_what_the_trained_network_does(digits, straight):
    """Answers and spikes of samples of the run's own last evaluation, by two ranks, against the checkpoint's."""
    seen = json.loads((straight.run_dir / "spikes.json").read_text())
    assert (seen["step"], seen["weights"], seen["split"], seen["num_steps"]) == (STEPS, "ema", "val", 4)
    config = run_folder.read(straight.run_dir).config
    network = load_network.load(straight.run_dir, config).network
    batches = list(evaluation_batches(config.data, rank=0, world_size=1, device=torch.device("cpu")))
    images = torch.cat([batch.images[batch.valid] for batch in batches])
    labels = torch.cat([batch.labels[batch.valid] for batch in batches])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
        shares = network(images).float().mean(0).softmax(1)
    answers = shares.argmax(1)
    assert len(seen["right"]) == 6
    assert len(seen["wrong"]) == min(6, int((answers != labels).sum()))
    for name in ("right", "wrong"):
        classes = {sample["class"] for sample in seen[name]}
        possible = labels[(answers == labels) == (name == "right")]
        assert len(classes) == min(len(seen[name]), len(possible.unique())), "as many classes as there are"
        for sample in seen[name]:
            number = sample["number"]
            assert sample["class"] == str(labels[number].item())
            assert sample["answer"] == str(answers[number].item())
            assert (sample["class"] == sample["answer"]) == (name == "right")
            assert sample["confidence_ratio"] == pytest.approx(shares[number].max().item(), abs=0.02)
    rates: list[float] = []
    for layer in network.spiking_layers():
        assert isinstance(layer.neuron, Neuron)
        layer.neuron.watch = rates.append
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=config.train.precision == "bf16"):
        network(images[seen["sample"]["number"]][None])
    counted = [sum(layer["spikes"]) / layer["num_neurons"] / 4 for layer in seen["layers"]]
    # A shortcut's neurons run before those of its branch.
    assert counted == pytest.approx([*rates[:3], *rates[4:], rates[3]], abs=0.003)
    assert min(counted) > 0


def test_a_finished_run_says_so_and_trains_nothing(digits, straight):
    before = (straight.run_dir / "metrics.jsonl").read_bytes()
    done = launch("launch/train.py", *arguments(digits, straight.run_dir))
    assert done.returncode == EXIT_DONE
    assert "has finished" in done.output
    assert (straight.run_dir / "metrics.jsonl").read_bytes() == before


def test_another_configuration_in_its_folder_is_refused(digits, straight):
    done = launch("launch/train.py", "--resume", str(straight.run_dir), "--optim.lr", "0.2", "--model.T", "2")
    assert done.returncode == 64
    differing = f"model.T=2, optim.lr=0.2, but the run in {straight.run_dir} was started with model.T=4, optim.lr=0.4;"
    assert f"error: {differing}" in done.output
    assert done.output.count("error: ") == 1
    assert "Traceback" not in done.output


def test_a_run_killed_and_started_again_repeats_the_same_losses_bit_for_bit(digits, straight, tmp_path):
    run_dir = tmp_path / "run"
    # SIGKILL to rank 0 with the second checkpoint half written; the launcher ends the other.
    ended = launch("tests/faults/fault_job.py", *arguments(digits, run_dir), FAULT="0 SIGKILL save 2")
    assert ended.returncode == 256 - signal.SIGKILL, ended.output
    assert ".step-00000010.tmp" in [folder.name for folder in (run_dir / "checkpoints").iterdir()]
    assert "step-00000005" in [folder.name for folder in (run_dir / "checkpoints").iterdir()]
    own = tmp_path / "deepspeed.json"
    own.write_text(json.dumps({"wall_clock_breakdown": True, "steps_per_print": 1, "comms_logger": {"enabled": True}}))
    # Options that only watch a run do not change what it computes.
    watched = ["--metrics.tensorboard", "true", "--train.profile_steps", "2", "--deepspeed_config", str(own)]
    run_dir = run_dir.rename(tmp_path / "moved")
    again = launch("launch/train.py", "--resume", str(run_dir), *watched)
    assert again.returncode == EXIT_DONE, again.output
    assert "resumed from the checkpoint after step 5" in again.output
    assert_same_result(run_dir, straight)
    assert "bwd_allreduce" in again.output, "DeepSpeed's own times"
    assert tensorboard_curve(run_dir / "tensorboard", "train_loss") == pytest.approx(losses(run_dir), rel=1e-6)
    recorded = json.loads((run_dir / "profile" / "steps-11-12.json").read_text())["traceEvents"]
    names = [event.get("name") for event in recorded]
    assert {"ProfilerStep#5", "ProfilerStep#6", "aten::convolution"} <= set(names)
    assert "ProfilerStep#7" not in names
    assert "Self CPU" in (run_dir / "profile" / "steps-11-12.txt").read_text()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(digits, straight, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight.run_dir, run_dir)
    (run_dir / "summary.json").unlink()
    state = run_dir / "checkpoints" / f"step-{STEPS:08d}" / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    again = launch("launch/train.py", *arguments(digits, run_dir))
    assert again.returncode == EXIT_DONE, again.output
    assert f"step-{STEPS:08d} is damaged" in again.output
    assert "resumed from the checkpoint after step 10" in again.output
    assert_same_result(run_dir, straight)


def test_a_run_of_two_ranks_goes_on_with_one(digits, straight, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(straight.run_dir, run_dir)
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS:08d}")
    # As if it was killed between the checkpoint after step 10 and the evaluation that was due there.
    every = 9.5 * 128 / Manifest.load(digits / "train").num_samples
    config = json.loads((run_dir / "config.json").read_text())
    config["train"]["eval_every_epochs"] = every
    (run_dir / "config.json").write_text(json.dumps(config))
    # Step 13 meets a NaN, and is skipped.
    words = [*arguments(digits, run_dir), "--train.on_nonfinite", "skip(1)", "--train.eval_every_epochs", str(every)]
    again = launch("tests/faults/fault_job.py", *words, ranks=1, FAULT="0 NAN forward 17")
    assert again.returncode == EXIT_DONE, again.output
    assert "resumed from the checkpoint after step 10" in again.output
    assert (
        len(
            re.findall(
                "^step 13: the gradient of .* is not finite; .*; skipped, 1 of 1 in a row$", again.output, re.MULTILINE
            )
        )
        == 1
    )
    assert [r["step"] for r in read_journal(run_dir / "metrics.jsonl") if "eval_loss" in r] == [10, STEPS]
    ours, theirs = losses(run_dir), losses(straight.run_dir)
    assert list(ours) == list(theirs)
    # From the same weights, the same micro-batches give the same losses; only their sum is taken in another order.
    assert ours[11] == pytest.approx(theirs[11], rel=1e-6)


@pytest.mark.faults
def test_potentials_are_looked_at_before_each_decision_and_after_a_resume(digits, tmp_path):
    """ds_atgo's widths and the amplitudes of scale rms, through the loop; step 3 lies between two decisions."""
    run_dir = tmp_path / "run"
    settings = {
        "--chi.policy": "ds_atgo",
        "--model.scale": "rms",
        "--train.epochs": 5.5 * 128 / Manifest.load(digits / "train").num_samples,
        "--train.checkpoint_every": 3,
    }
    words = [*arguments(digits, run_dir), *(str(word) for pair in settings.items() for word in pair)]
    done = launch("launch/train.py", *words, ranks=1)
    assert done.returncode == EXIT_DONE, done.output
    assert "widths start from model.width=1: chi.calibrate is for policy chi with indicator coverage\n" in done.output
    made = decisions(run_dir)[1:]
    assert [record["step"] for record in made] == [2, 4, 6]
    spreads = [record["decision_spread"] for record in made]
    assert all(0.2 < spread < 5 for layers in spreads for spread in layers), "root mean squares of h - v_th = -1 ± 1"
    first = load_newest(run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step-00000006")
    (run_dir / "summary.json").unlink()
    again = launch("launch/train.py", *words, ranks=1)
    assert again.returncode == EXIT_DONE, again.output
    assert "resumed from the checkpoint after step 3" in again.output
    assert decisions(run_dir)[1:] == made
    second = load_newest(run_dir)
    assert first is not None
    assert second is not None
    assert torch.equal(first["widths"]["amplitudes"], second["widths"]["amplitudes"])
    assert not torch.all(first["widths"]["amplitudes"] == 1)


def test_sigterm_to_one_rank_stops_all_with_a_checkpoint(digits, tmp_path):
    run_dir = tmp_path / "run"
    process = start("launch/train.py", *arguments(digits, run_dir))
    read_until(process, r"^step +6/")
    ranks = [p for p in psutil.Process(process.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
    ranks[0].send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, output
    said = re.search(r"stopped on request after step (\d+)", output)
    assert said, output
    assert (run_dir / "checkpoints" / f"step-{int(said[1]):08d}").exists()  # test_supervise.py resumes from one


def test_a_run_starts_from_the_weights_of_another(digits, straight, tmp_path):
    """With AdamW and TET, for two tiny steps: the weights must be the average that the run started from.

    The widths start where the other run's ended.
    """
    settings = {
        "--init-from": straight.run_dir,
        "--train.epochs": 1.5 * 128 / Manifest.load(digits / "train").num_samples,
        "--train.loss": "tet",
        "--optim.name": "adamw",
        "--optim.lr": 1e-12,
        "--optim.weight_decay": 0.01,
    }
    words = [str(word) for pair in settings.items() for word in pair]
    done = launch("launch/train.py", *arguments(digits, tmp_path / "run"), *words, ranks=1)
    assert done.returncode == EXIT_DONE, done.output
    ours, theirs = load_newest(tmp_path / "run"), load_newest(straight.run_dir)
    assert ours is not None
    assert theirs is not None
    given, taken = theirs["ema"]["parameters"], ours["model"]["parameters"]
    total = len(given) + len(ours["model"]["buffers"])
    last = theirs["widths"]["log_width"].exp()
    said = f"widths {last.min():.3g} to {last.max():.3g}, with which that run ended, and chi.calibrate is left out\n"
    assert done.output.count(f"init_from: {total} of {total} tensors from {straight.run_dir}; {said}") == 1
    torch.testing.assert_close(ours["widths"]["start"], theirs["widths"]["log_width"])
    for name, tensor in given.items():
        assert torch.allclose(taken[name], tensor, rtol=0, atol=1e-9), name
    assert {slot: of.keys() for slot, of in ours["model"]["optimizer"].items()} == {
        "exp_avg": given.keys(),
        "exp_avg_sq": given.keys(),
    }
    assert ours["model"]["updates"] == {"step": 2.0}
