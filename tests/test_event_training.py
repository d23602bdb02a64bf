"""Training on event data by the real launcher: a resume changes nothing, and its network is shown as what it is."""

import json
import re
import shutil
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
from tests.conftest import launch
from tests.support.data_sets import drawn_jpeg, drawn_recording, write_set
from tests.support.model_cards import run_the_lines

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


def given() -> torch.Tensor:
    return torch.randint(0, 5, (T, 4, 2, SIDE, SIDE), generator=torch.Generator().manual_seed(0)).float()


def logits(run: Path) -> torch.Tensor:
    network = load_network.load(run, read(run).config).network
    with torch.no_grad():
        return network(given()).mean(0)


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


FORMATS = {
    "safetensors": ("net.safetensors", 0, ()),
    "hf": ("net", 0, ()),
    "torch_export": ("net.pt2", 0, ()),
    "onnx": ("net.onnx", 1e-5, ("onnx", "onnxscript", "onnxruntime")),
    "nir": ("net.nir", 1e-5, ("nir",)),
}
"""Of each format: a file's name; how far its logits may be from the run's, as BN is folded; the packages it needs."""


@pytest.mark.parametrize("form", FORMATS)
def test_the_card_says_frames_and_its_lines_give_the_logits_of_the_run(form, whole, tmp_path):
    name, tolerance, needs = FORMATS[form]
    for package in needs:
        pytest.importorskip(package, reason=f"{package} is not installed: it is in the extra dev")
    out = tmp_path / name
    export.main([str(whole), str(out), "--format", form])
    path = out / "README.md" if form == "hf" else tmp_path / f"{name}.md"
    card = path.read_text(encoding="utf-8")
    assert "A spiking network for event data" in card
    assert f"cut into {T} frames of the same duration, as by SpikingJelly's split_by='time'" in card
    assert f"frames ({T}, N, 2, {SIDE}, {SIDE})" in card
    assert "image" not in re.sub(r"image_size|## Configuration.*", "", card, flags=re.DOTALL)
    assert "RGB" not in card
    torch.testing.assert_close(run_the_lines(path, frames=given()), logits(whole), rtol=0, atol=tolerance)


def test_a_file_s_metadata_say_what_its_frames_are(whole, tmp_path):
    export.main([str(whole), str(tmp_path / "net.pt2"), "--format", "torch_export"])
    said = {"about.json": ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=said)
    about = json.loads(said["about.json"])
    assert (about["kind"], about["T"], about["image_size"]) == ("events", str(T), str(SIDE))
    assert f"cut into {T} frames of the same duration" in about["input"]
    export.main([str(whole), str(tmp_path / "net"), "--format", "hf"])
    document = json.loads((tmp_path / "net" / "config.json").read_text())
    assert (document["kind"], document["input"], document["in_channels"]) == ("events", about["input"], 2)


def test_frames_of_the_same_number_of_events_are_told_as_such(whole, tmp_path):
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    config = json.loads((run / "config.json").read_text())
    config["data"]["event_frames"] = "count"
    (run / "config.json").write_text(json.dumps(config))
    export.main([str(run), str(tmp_path / "net.safetensors")])
    card = (tmp_path / "net.safetensors.md").read_text(encoding="utf-8")
    assert f"{T} frames of the same number of events, as by SpikingJelly's split_by='number'" in card


def test_the_hub_s_metadata_have_no_task_of_images(whole, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: it is in the extra export")
    export.main([str(whole), str(tmp_path / "net"), "--format", "hf"])
    data = hub.ModelCard.load(tmp_path / "net" / "README.md").data
    (result,) = data.eval_results
    assert (data.pipeline_tag, result.task_type) == ("other", "other")
    assert data.tags == ["spiking-neural-network", "event-camera", "sew_tiny"]


def test_a_dry_run_counts_the_memory_of_frames(recordings, tmp_path):
    config = parse(words(recordings, tmp_path / "run"))
    report = dry_run.report(config, 2)
    with torch.device("meta"):
        network = sew_resnet.build(config.model, num_classes=CLASSES, in_channels=2, image_size=SIDE)
    kept = memory_estimate.of(network, (T, 16, 2, SIDE, SIDE), 4 if config.train.precision == "fp32" else 2).kept_bytes
    (line,) = [line for line in report if "activations kept" in line]
    assert line.split()[-2] == f"{kept / 2**20:.1f}"
    assert f"parameters  {sum(p.numel() for p in network.parameters()):,} ({CLASSES} classes)" in report
