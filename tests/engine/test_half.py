"""fp16 through the command line, two CPU ranks: every ZeRO stage, with an overflow before and after a resume.

The settings are spread over the stages, so that two launches show all of them.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from launch import evaluate
from pipeline.config import ModelConfig
from pipeline.data.manifest import Manifest
from pipeline.engine import load_network
from pipeline.errors import EXIT_DONE
from pipeline.metrics.journal import read_journal
from pipeline.run_dir.checkpoint_files import load_newest
from pipeline.snn.networks import sew_resnet
from tests.conftest import free_port, launch

STEPS, SAVED, BATCH = 6, 3, 16
SETTINGS = {
    0: "--chi.policy ds_atgo --model.scale rms",
    1: "--chi.calibrate true --model.neuron plif --optim.clip 1 --train.ema_decay 0.5",
    2: "--chi.policy ds_atgo --model.connect and --optim.name adamw --optim.lr 0.01",
    3: "--chi.calibrate true --model.scale rms --model.neuron lif --model.connect iand",
}
"""By ZeRO stage."""


def run_all(digits: Path, folder: Path, overflow: str, look: int = 0) -> str:
    """Makes or goes on with a run of every stage in `folder`; returns what the launcher wrote. See half_job.py."""
    epochs = (STEPS - 0.5) * BATCH / Manifest.load(digits / "train").num_samples
    common = (
        f"--recipe digits --data.path {digits} --data.image_size 8 --data.global_batch {BATCH} --data.micro_batch 4 "
        f"--model.T 2 --train.precision fp16 --train.log_every 1 --train.epochs {epochs} --chi.interval 2 "
        f"--metrics.port 0 --train.checkpoint_every {SAVED}"
    ).split()
    runs = []
    for stage, words in SETTINGS.items():
        own = ["--run_dir", str(folder / str(stage)), "--train.zero_stage", str(stage), *words.split()]
        runs.append((free_port(), [*common, *own]))
    done = launch("tests/support/half_job.py", RUNS=json.dumps(runs), OVERFLOW=overflow, LOOK=str(look))
    assert done.returncode == EXIT_DONE, done.output
    return done.output


@pytest.fixture(scope="module")
def whole(digits, tmp_path_factory) -> Path:
    """Runs whose gradient overflowed in steps 2 and 5."""
    folder = tmp_path_factory.mktemp("half")
    output = run_all(digits, folder, "3,9")
    skipped = re.findall(r"^step (\d+) skipped: the fp16 gradient overflowed", output, re.MULTILINE)
    assert skipped == ["2", "5"] * len(SETTINGS), output
    return folder


@pytest.fixture(scope="module")
def resumed(digits, whole, tmp_path_factory) -> Path:
    """The same runs as if they had been killed after step 4: they go on from step 3, after the first overflow.

    And between steps 5 and 6, of which the last decides, the network is looked at: that must change nothing.
    """
    folder = tmp_path_factory.mktemp("resumed")
    for stage in SETTINGS:
        shutil.copytree(whole / str(stage), folder / str(stage))
        (folder / str(stage) / "summary.json").unlink()
        shutil.rmtree(folder / str(stage) / "checkpoints" / f"step-{STEPS:08d}")
    output = run_all(digits, folder, "3", look=5)
    assert output.count("looked after step 5") == len(SETTINGS), output
    assert output.count(f"resumed from the checkpoint after step {SAVED}") == len(SETTINGS), output
    return folder


def records(run_dir: Path, key: str) -> list:
    """Without what the clock says."""
    timed = ("train_last_step_timestamp_seconds", "train_images_per_second", "data_wait_ratio")
    found = [record for record in read_journal(run_dir / "metrics.jsonl") if key in record]
    return [{name: value for name, value in record.items() if name not in timed} for record in found]


@pytest.mark.parametrize("stage", SETTINGS)
def test_an_overflow_lowers_the_scale_and_changes_nothing_else(whole, stage):
    run_dir = whole / str(stage)
    steps = records(run_dir, "train_loss")
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert [record["step"] for record in steps if record["network_chi"] is None] == [2, 5]
    last = load_newest(run_dir)
    assert last is not None
    scale = last["model"]["loss_scale"]
    assert (scale["cur_scale"], scale["cur_iter"], scale["last_overflow_iter"]) == (2**14, STEPS, 4)
    for tensor in (*last["model"]["parameters"].values(), *last["model"]["buffers"].values()):
        assert tensor.isfinite().all()
        assert tensor.dtype in (torch.float32, torch.int64)
    made = [record["decision_log_width"] for record in records(run_dir, "decision_log_width")]
    assert len(made) >= 2
    assert made[0] != made[-1], "the widths were steered"
    assert ("--chi.calibrate" in SETTINGS[stage]) == (len(set(made[0])) > 1), "by layer from the start"
    assert ("rms" in SETTINGS[stage]) == (not torch.all(last["widths"]["amplitudes"] == 1))


@pytest.mark.parametrize("stage", SETTINGS)
def test_a_run_that_goes_on_with_a_lowered_scale_repeats_every_bit(whole, resumed, stage):
    ours, theirs = resumed / str(stage), whole / str(stage)
    for key in ("train_loss", "decision_log_width", "eval_loss"):
        assert records(ours, key) == records(theirs, key) != []
    one, other = load_newest(ours), load_newest(theirs)
    assert one is not None
    assert other is not None
    assert one["model"]["loss_scale"] == other["model"]["loss_scale"]
    assert one["model"]["updates"] == other["model"]["updates"]
    pairs = [(one["model"][part], other["model"][part]) for part in ("parameters", "buffers")]
    pairs += [(one["model"]["optimizer"][slot], of) for slot, of in other["model"]["optimizer"].items()]
    pairs += [(one["ema"][part], of) for part, of in (other["ema"] or {}).items()]
    for tensors, expected in pairs:
        assert tensors.keys() == expected.keys() != set()
        assert all(torch.equal(tensors[name], value) for name, value in expected.items())


@pytest.mark.parametrize("stage", SETTINGS)
def test_every_stage_shows_its_spikes_and_they_are_the_same_after_a_resume(whole, resumed, stage):
    ours, theirs = (json.loads((folder / str(stage) / "spikes.json").read_text()) for folder in (resumed, whole))
    assert ours == theirs
    assert theirs["step"] == STEPS
    assert [len(layer["spikes"]) for layer in theirs["layers"]] == [2] * 6
    assert sum(sum(layer["spikes"]) for layer in theirs["layers"]) > 0
    assert "data:image/png" in (whole / str(stage) / "report.html").read_text().partition("<h2>Samples")[2]


@pytest.mark.parametrize("stage", [0, 1])  # of the weights, and of their moving average
def test_an_evaluation_of_the_checkpoint_gives_the_runs_own_figures(whole, stage, tmp_path):
    evaluate.main([str(whole / str(stage)), "--precision", "fp16", "--json", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    summary = json.loads((whole / str(stage) / "summary.json").read_text())
    assert {name: result[name] for name in summary} == summary
    assert result["precision"] == "fp16"
    assert (whole / str(stage) / "evaluations" / f"step-{STEPS:08d}-val.json").exists()


def test_on_a_cpu_fp32_stands_in_and_is_not_kept_as_the_runs_own(whole, tmp_path, capsys):
    run_dir = Path(shutil.copytree(whole / "0", tmp_path / "run"))
    shutil.rmtree(run_dir / "evaluations", ignore_errors=True)
    evaluate.main([str(run_dir)])
    said = capsys.readouterr()
    assert "fp16 is slow on a CPU: fp32 is used, and the result is not kept with the run" in said.err
    assert "fp32 on cpu" in said.out
    assert not (run_dir / "evaluations").exists()


@pytest.mark.parametrize(
    ("precision", "parameters", "statistics"),
    [
        ("fp16", torch.float16, torch.float32),
        ("bf16", torch.float32, torch.float32),
        ("fp64", torch.float64, torch.float64),
    ],
)
def test_a_network_gets_the_dtypes_of_a_run(precision, parameters, statistics):
    network = sew_resnet.build(ModelConfig(neuron="plif"), num_classes=3, image_size=8)
    load_network.cast(network, precision)
    assert {parameter.dtype for parameter in network.parameters()} == {parameters}
    assert {buffer.dtype for buffer in network.buffers() if buffer.is_floating_point()} == {statistics}
