"""Training on event data by the real launcher: a resume changes nothing, and its network is shown as what it is."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch import dry_run, evaluate, export
from launch.options import parse
from pipeline.engine import load_network
from pipeline.errors import EXIT_DONE, EXIT_STOPPED, ConfigError
from pipeline.metrics.journal import read_journal
from pipeline.run_dir.checkpoint_files import load_newest
from pipeline.run_dir.run_folder import read
from pipeline.snn import memory_estimate
from pipeline.snn.networks import sew_resnet
from tests.conftest import ROOT, launch
from tests.support.data_sets import drawn_jpeg, drawn_recording, write_set

STEPS = 10
T, SIDE, CLASSES = 3, 10, 4


def words(data: Path, run_dir: Path) -> list[str]:
    settings = {
        "--recipe": "digits_dvs",
        "--data.path": data,
        "--run_dir": run_dir,
        "--data.image_size": SIDE,
        "--data.event_shift": 1,
        "--data.event_drop": 0.2,
        "--data.flip": "true",
        "--data.window_shards": 2,
        "--data.max_bad_ratio": 1,
        "--data.global_batch": 32,
        "--data.micro_batch": 16,
        "--model.T": T,
        "--model.arch": "sew_tiny",
        "--chi.calibrate": "true",
        "--train.epochs": 2,
        "--train.eval_every_epochs": 0,
        "--train.log_every": 1,
        "--train.checkpoint_every": 4,
        "--metrics.port": 0,
    }
    return [str(word) for pair in settings.items() for word in pair]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """160 recordings, two of them damaged: ten steps of 32 are two epochs. And 33 to evaluate."""
    folder = tmp_path_factory.mktemp("recordings")
    samples = [drawn_recording(n, 20, 20, 600) for n in range(160)]
    samples[7], samples[80] = samples[7][:-3], drawn_jpeg(0)
    write_set(folder / "train", samples, per_shard=40)
    write_set(folder / "val", [drawn_recording(1000 + n, 20, 20, 600) for n in range(33)], per_shard=40)
    return folder


@pytest.fixture(scope="module")
def whole(recordings, tmp_path_factory) -> Path:
    """The folder of a run of two ranks that nothing disturbed."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    done = launch("launch/train.py", *words(recordings, run_dir))
    assert done.returncode == EXIT_DONE, done.output
    assert len(re.findall(r"bad sample train-00000\d\.tar:0000(07|80)\.events: undecodable", done.output)) >= 2
    return run_dir


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    journal = read_journal(run_dir / "metrics.jsonl")
    return [(r["step"], r["train_loss"], r["train_accuracy_ratio"]) for r in journal if "train_loss" in r]


def test_a_run_that_was_stopped_and_resumed_is_the_same_to_the_bit(recordings, whole, tmp_path):
    run_dir = tmp_path / "run"
    stopped = launch("tests/faults/fault_job.py", *words(recordings, run_dir), FAULT="1 SIGTERM forward 5")
    assert stopped.returncode == EXIT_STOPPED, stopped.output
    assert 5 <= len(losses(run_dir)) < STEPS
    again = launch("launch/train.py", "--resume", str(run_dir))
    assert again.returncode == EXIT_DONE, again.output
    assert [step for step, _, _ in losses(whole)] == list(range(1, STEPS + 1))
    assert losses(run_dir) == losses(whole)
    ends = [load_newest(folder) for folder in (run_dir, whole)]
    assert ends[0] is not None
    assert ends[1] is not None
    assert ends[0]["step"] == STEPS
    for name, value in ends[1]["model"]["parameters"].items():
        assert torch.equal(ends[0]["model"]["parameters"][name], value), name
    assert ends[0]["loader"]["bad_count"] == ends[1]["loader"]["bad_count"] >= 4


def test_one_rank_meets_the_same_frames_as_two(recordings, whole, tmp_path):
    """From the same weights the first loss is that of two ranks; only its sum is taken in another order."""
    alone = launch("launch/train.py", *words(recordings, tmp_path / "run"), "--train.epochs", "0.4", ranks=1)
    assert alone.returncode == EXIT_DONE, alone.output
    ours, theirs = losses(tmp_path / "run"), losses(whole)
    assert ours[0][1] == pytest.approx(theirs[0][1], rel=1e-6)
    assert ours[1][1] == pytest.approx(theirs[1][1], rel=1e-2)


def test_an_evaluation_finds_what_the_run_found_and_counts_frames_as_analog_input(recordings, whole, tmp_path):
    (record,) = [r for r in read_journal(whole / "metrics.jsonl") if "eval_loss" in r]
    result = tmp_path / "result.json"
    evaluate.main([str(whole), "--json", str(result)])
    found = json.loads(result.read_text())
    assert found["num_samples"] == 33
    assert found["eval_accuracy_ratio"] == record["eval_accuracy_ratio"]
    stem = found["energy"]["layers"][0]
    assert stem["acs"] == 0
    inside = (3 * SIDE - 2) ** 2  # pairs of a cell and one that a 3x3 kernel with padding reaches
    assert stem["macs"] == T * 2 * 16 * inside


def test_data_of_the_other_kind_are_refused(whole, tmp_path):
    write_set(tmp_path / "val", [drawn_jpeg(n) for n in range(4)], per_shard=4)
    with pytest.raises(
        ConfigError, match=r"holds images, 3 channels, but the network of .* takes 2; use data of the same"
    ):
        evaluate.main([str(whole), "--data", str(tmp_path)])


def test_the_card_says_frames_and_its_lines_load_the_network(whole, tmp_path):
    out = tmp_path / "net.safetensors"
    export.main([str(whole), str(out)])
    card = out.with_suffix(".md").read_text(encoding="utf-8")
    assert "A spiking network for event data" in card
    assert f"cut into {T} frames of the same duration" in card
    assert "RGB" not in card
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code
    frames = torch.randint(0, 5, (T, 4, 2, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).float()
    torch.save(frames, tmp_path / "frames.pt")
    lines = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport torch; images = torch.load('frames.pt')\n"
    subprocess.run(
        [sys.executable, "-c", lines + code[1] + "torch.save(logits.detach(), 'logits.pt')"], check=True, cwd=tmp_path
    )
    network = load_network.load(whole, read(whole).config).network
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), network(frames).mean(0))


def test_a_network_of_one_s_own_trains_on_event_frames_and_is_evaluated(recordings, tmp_path):
    run_dir, own = tmp_path / "run", ["--model.arch", "docs/network_psn.py:sliding", "--train.epochs", "0.8"]
    done = launch("launch/train.py", *words(recordings, run_dir), *own)
    assert done.returncode == EXIT_DONE, done.output
    assert len(losses(run_dir)) == 4
    last = [r for r in read_journal(run_dir / "metrics.jsonl") if "train_loss" in r][-1]
    assert all(0 < p < 1 for p in last["layer_coverage_ratio"])
    evaluate.main([str(run_dir), "--json", str(tmp_path / "result.json")])
    found = json.loads((tmp_path / "result.json").read_text())
    (record,) = [r for r in read_journal(run_dir / "metrics.jsonl") if "eval_loss" in r]
    assert found["eval_accuracy_ratio"] == record["eval_accuracy_ratio"]
    stem = found["energy"]["layers"][0]
    assert (stem["macs"], stem["acs"]) == (T * 2 * 16 * (3 * SIDE - 2) ** 2, 0)
    report = dry_run.report(parse([*words(recordings, run_dir), *own]), 2)
    (line,) = [line for line in report if line.startswith("parameters")]
    assert line.endswith(f"({CLASSES} classes)")


def test_formats_that_are_for_images_are_refused(whole, tmp_path):
    with pytest.raises(
        ConfigError, match=r"--format torch_export is not allowed for a run of event data.* safetensors"
    ):
        export.main([str(whole), str(tmp_path / "net.pt2"), "--format", "torch_export"])


def test_a_dry_run_counts_the_memory_of_frames(recordings, tmp_path):
    config = parse(words(recordings, tmp_path / "run"))
    report = dry_run.report(config, 2)
    with torch.device("meta"):
        network = sew_resnet.build(config.model, num_classes=CLASSES, in_channels=2, image_size=SIDE)
    kept = memory_estimate.of(network, (T, 16, 2, SIDE, SIDE), 4 if config.train.precision == "fp32" else 2).kept_bytes
    (line,) = [line for line in report if "activations kept" in line]
    assert line.split()[-2] == f"{kept / 2**20:.1f}"
    assert f"parameters  {sum(p.numel() for p in network.parameters()):,} ({CLASSES} classes)" in report
