"""A network of one's own through the real launcher: trained, resumed, evaluated, exported; and what is refused."""

import hashlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.cluster.handshake import introduce
from launch.cluster.placement import Placement
from launch.dry_run import report
from launch.options import parse
from pipeline.data.manifest import Manifest
from pipeline.engine import init_from, load_network
from pipeline.errors import EXIT_DONE, EXIT_USAGE, ConfigError
from pipeline.metrics.journal import read_journal
from pipeline.run import require_weights
from pipeline.run_dir import run_folder
from pipeline.run_dir.checkpoint_files import load_newest
from pipeline.snn.networks.build import build
from tests.conftest import ROOT, free_port, launch
from tests.support.training_runs import STEPS, arguments

# The spikformer of the docs with dropout, whose random numbers a resumed run must draw again.
DROPOUT = ("self.blocks(tokens).mean(2)", "nn.functional.dropout(self.blocks(tokens).mean(2), 0.3, self.training)")


def losses(run_dir: Path) -> dict[int, float]:
    return {r["step"]: r["train_loss"] for r in read_journal(run_dir / "metrics.jsonl") if "train_loss" in r}


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory) -> tuple[Path, str]:
    """A finished run on two ranks, and its `model.arch`, a file."""
    folder = tmp_path_factory.mktemp("own")
    text = (ROOT / "docs/network_spikformer.py").read_text()
    assert DROPOUT[0] in text
    (folder / "mine.py").write_text(text.replace(*DROPOUT).replace("BLOCKS = 64, 4, 2", "BLOCKS = 16, 2, 1"))
    arch = f"{folder / 'mine.py'}:network"
    done = launch("launch/train.py", *words(digits, folder / "run", arch))
    assert done.returncode == EXIT_DONE, done.output
    return folder / "run", arch


def words(digits: Path, run_dir: Path, arch: str) -> list[str]:
    # Attention's layers get a size of their own: the images do not grow.
    sizes = ["--data.image_size_start", "0", "--data.image_size_ramp", ""]
    return [*arguments(digits, run_dir), *sizes, "--model.arch", arch]


def test_every_layer_is_measured_and_steered_but_for_the_chi_of_a_product(trained):
    run_dir, _ = trained
    layers = json.loads((run_dir / "run.json").read_text())["layers"]
    last = [record for record in read_journal(run_dir / "metrics.jsonl") if "train_loss" in record][-1]
    product = layers.index("blocks.0.attention.neurons")
    for name in ("layer_chi", "layer_participation_ratio", "layer_gradient_norm"):
        assert [at for at, value in enumerate(last[name]) if value is None] == [product]
    for name in ("layer_coverage_ratio", "layer_firing_rate_ratio", "layer_surrogate_width"):
        assert all(0 < value < 100 for value in last[name]), name
    assert last["train_grad_norm"] > 0
    assert len(set(last["layer_surrogate_width"])) == len(layers), "each has its own width"
    assert (run_dir / "report.html").exists()


def test_a_killed_run_repeats_the_same_losses_bit_for_bit_with_its_dropout(digits, trained, tmp_path):
    straight, arch = trained
    run_dir = tmp_path / "run"
    launch("tests/faults/fault_job.py", *words(digits, run_dir, arch), FAULT="0 SIGKILL save 2")
    again = launch("launch/train.py", "--resume", str(run_dir))
    assert again.returncode == EXIT_DONE, again.output
    assert "resumed from the checkpoint after step 5" in again.output
    assert losses(run_dir) == losses(straight)
    ours, theirs = load_newest(run_dir), load_newest(straight)
    assert ours is not None
    assert theirs is not None
    for name, value in theirs["model"]["parameters"].items():
        assert torch.equal(ours["model"]["parameters"][name], value), name


def test_a_run_of_two_ranks_goes_on_with_one(digits, trained, tmp_path):
    straight, arch = trained
    run_dir = tmp_path / "run"
    shutil.copytree(straight, run_dir)
    (run_dir / "summary.json").unlink()
    shutil.rmtree(run_dir / "checkpoints" / f"step-{STEPS:08d}")
    again = launch("launch/train.py", *words(digits, run_dir, arch), ranks=1)
    assert again.returncode == EXIT_DONE, again.output
    # The same micro-batches, and the same dropout in each; only the sum of their losses is taken in another order.
    assert losses(run_dir)[11] == pytest.approx(losses(straight)[11], rel=1e-6)


@pytest.fixture
def without_the_file(trained, tmp_path):
    """The run, moved, while the file that it was trained from is gone."""
    run_dir, arch = trained
    file = Path(arch.rpartition(":")[0])
    shutil.copytree(run_dir, tmp_path / "run")
    kept = file.read_bytes()
    file.unlink()
    yield tmp_path / "run"
    file.write_bytes(kept)


def command(*arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_checkpoint_is_evaluated_and_exported_from_the_run_folder_alone(digits, without_the_file, tmp_path):
    run_dir = without_the_file
    done = command("launch.evaluate", run_dir, "--data", digits, "--json", tmp_path / "result.json")
    assert done.returncode == EXIT_DONE, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    (evaluated,) = [r for r in read_journal(run_dir / "metrics.jsonl") if "eval_loss" in r]
    assert result["eval_accuracy_ratio"] == pytest.approx(evaluated["eval_accuracy_ratio"], abs=0.01)
    layers = {layer["layer"]: layer for layer in result["energy"]["layers"]}
    assert layers["blocks.0.attention.out.weight"]["neurons"] == "blocks.0.attention.out.neurons"
    assert layers["blocks.0.attention.out.weight"]["acs"] > 0
    assert layers["patches.0.0"]["macs"] > 0
    out = tmp_path / "out.safetensors"
    done = command("launch.export", run_dir, out)
    assert done.returncode == EXIT_DONE, done.stderr
    trained = load_network.load(run_dir, run_folder.read(run_dir).config)
    weights = load_file(out)
    for name, value in trained.network.state_dict().items():
        assert torch.equal(weights[name], value), name
    digest = json.loads((run_dir / "run.json").read_text())["network_sha256"]
    assert f"with the SHA-256 {digest}" in (tmp_path / "out.safetensors.md").read_text()
    done = command("launch.export", run_dir, out, "--force", "--names", "original")
    assert done.returncode == EXIT_USAGE
    assert "they are of the original SEW-ResNet code; use --names ours" in done.stderr
    done = command("launch.export", run_dir, out.with_suffix(""), "--format", "hf")
    assert done.returncode == EXIT_USAGE
    assert "--format hf is not allowed for a network of your own" in done.stderr
    with (run_dir / run_folder.NETWORK).open("a") as code:
        code.write("# changed\n")
    done = command("launch.evaluate", run_dir, "--data", digits)
    assert done.returncode == EXIT_USAGE
    assert "is not the code that" in done.stderr


def test_a_node_without_the_file_is_told_in_a_line(digits, without_the_file):
    done = launch("launch/train.py", "--resume", str(without_the_file), ranks=1)
    assert done.returncode == EXIT_USAGE
    assert "mine.py on this machine; every node needs it at this path" in done.output
    assert "Traceback" not in done.output
    config = parse(["--resume", str(without_the_file)])
    hello = introduce(Placement(nodes=2, rank=1, master="127.0.0.1", port=1, slots=1), config)
    assert "every node needs it at this path" in hello.problem
    assert hello.code == EXIT_USAGE


def test_changed_code_is_not_resumed(digits, trained):
    run_dir, arch = trained
    file = Path(arch.rpartition(":")[0])
    config, before = parse(["--resume", str(run_dir)]), file.read_text()
    place = Placement(nodes=2, rank=1, master="127.0.0.1", port=1, slots=1)
    same = introduce(place, config)
    assert same.problem == ""
    file.write_text(before + "\n# another\n")
    try:
        done = command("launch.local", "--resume", run_dir)
        assert introduce(place, config).network != same.network
    finally:
        file.write_text(before)
    assert done.returncode == EXIT_USAGE
    assert "its code has changed since the run in" in done.stderr
    assert f"put the old code back ({run_dir}/network.py holds it)" in done.stderr
    assert (run_dir / "network.py").read_text() == before


def test_a_dry_run_shows_parameters_and_memory(digits, trained, tmp_path):
    _, arch = trained
    lines = report(parse(words(digits, tmp_path / "run", arch)), 2)
    network = build(parse(words(digits, tmp_path / "run", arch)).model, num_classes=10, image_size=16)
    assert f"parameters  {sum(p.numel() for p in network.parameters()):,} (10 classes)" in lines
    (kept,) = [line for line in lines if "activations kept" in line]
    assert float(kept.split()[-2]) > 0.1


def test_a_run_starts_from_its_weights_with_another_number_of_classes(trained):
    run_dir, arch = trained
    config = parse(["--recipe", "digits", "--model.arch", arch, "--init-from", str(run_dir)])
    network = build(config.model, num_classes=4, image_size=16)
    said, widths = init_from.load(network, config)
    assert "; the classifier starts anew, from 10 classes to 4" in said
    assert widths is not None
    ema = load_newest(run_dir)["ema"]["parameters"]  # pyright: ignore[reportOptionalSubscript]
    assert torch.equal(network.get_parameter("patches.0.0.weight"), ema["patches.0.0.weight"])
    other = build(parse(["--recipe", "digits"]).model, num_classes=10, image_size=16)
    with pytest.raises(ConfigError, match="these weights do not fit the network"):
        init_from.load(other, config)


def test_an_indicator_of_weights_cannot_steer_a_layer_without(trained):
    _, arch = trained
    config = parse(["--recipe", "digits", "--model.arch", arch, "--chi.indicator", "participation"])
    layers = build(config.model, num_classes=10, image_size=16).spiking_layers()
    said = r"chi\.indicator='participation' is undefined for blocks\.0\.attention\.neurons, which no weight feeds; use"
    with pytest.raises(ConfigError, match=said):
        require_weights(config, layers)


def test_an_error_of_the_user_s_code_is_theirs_alone(digits, trained, tmp_path):
    (tmp_path / "broken.py").write_text("def network(num_classes):\n    return num_classes.size\n")
    done = launch("launch/train.py", *words(digits, tmp_path / "run", f"{tmp_path}/broken.py:network"), ranks=1)
    assert done.returncode == EXIT_USAGE
    assert "network() failed with AttributeError: 'int' object has no attribute 'size'" in done.output
    assert f'File "{tmp_path}/broken.py", line 2, in network' in done.output
    assert "Traceback" not in done.output


def learning(digits: Path, run_dir: Path, example: str) -> list[str]:
    """Six epochs of an example of the docs."""
    short = ["--train.epochs", "6", "--train.log_every", "1", "--train.checkpoint_every", "60", "--metrics.port", "0"]
    data = ["--recipe", "digits", "--data.path", str(digits), "--run_dir", str(run_dir)]
    return [*data, "--model.arch", f"docs/network_{example}", *short]


def accuracy(run_dir: Path) -> float:
    return json.loads((run_dir / "summary.json").read_text())["eval_accuracy_ratio"]


@pytest.mark.parametrize(
    ("example", "least"),  # of 30 epochs, 99.7, 98.9 and 98.9 %
    [
        ("vgg.py:network", 0.9),
        pytest.param("spikformer.py:network", 0.7, marks=pytest.mark.faults),  # long
        pytest.param("psn.py:sliding", 0.9, marks=pytest.mark.faults),
    ],
)
def test_the_examples_learn_the_digits(example, least, digits, tmp_path):
    done = launch("launch/train.py", *learning(digits, tmp_path / "run", example))
    assert done.returncode == EXIT_DONE, done.output
    assert accuracy(tmp_path / "run") > least


@pytest.fixture(scope="module")
def psn(digits, tmp_path_factory) -> Path:
    """A finished run of parallel spiking neurons."""
    run_dir = tmp_path_factory.mktemp("psn") / "run"
    done = launch("launch/train.py", *learning(digits, run_dir, "psn.py:network"))
    assert done.returncode == EXIT_DONE, done.output
    return run_dir


@pytest.mark.faults
def test_parallel_spiking_neurons_learn_the_digits_with_steered_widths(psn):
    assert accuracy(psn) > 0.9
    layers = json.loads((psn / "run.json").read_text())["layers"]
    assert layers == [*(f"features.{n}.neurons.surrogate" for n in range(3)), "hidden.neurons.surrogate"]
    last = [record for record in read_journal(psn / "metrics.jsonl") if "train_loss" in record][-1]
    assert all(0.9 < chi <= 1 for chi in last["layer_chi"])
    for coverage in last["layer_coverage_ratio"]:
        assert coverage == pytest.approx(0.3, abs=0.1), "the widths bring it to the target"
    assert len(set(last["layer_surrogate_width"])) == len(layers)


@pytest.mark.faults
def test_a_run_of_parallel_spiking_neurons_is_resumed_bit_for_bit(digits, psn, tmp_path):
    run_dir = shutil.copytree(psn, tmp_path / "run")
    (run_dir / "summary.json").unlink()
    *earlier, last = sorted((run_dir / "checkpoints").glob("step-*"))
    shutil.rmtree(last)
    again = launch("launch/train.py", *learning(digits, run_dir, "psn.py:network"))
    assert again.returncode == EXIT_DONE, again.output
    assert f"resumed from the checkpoint after step {int(earlier[-1].name.removeprefix('step-'))}" in again.output
    assert losses(run_dir) == losses(psn)
    ours, theirs = load_newest(run_dir), load_newest(psn)
    assert ours is not None
    assert theirs is not None
    assert theirs["model"]["parameters"]["features.0.neurons.weight"].shape == (4, 4)
    for name, value in theirs["model"]["parameters"].items():
        assert torch.equal(ours["model"]["parameters"][name], value), name


PARTS = """
from torch import nn
from pipeline.snn import neurons

class Hidden(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.linear, self.bn, self.sn = nn.Linear(8, 8), nn.BatchNorm1d(8), neurons.from_config(model)

    def forward(self, x):
        return self.sn(self.bn(self.linear(x).flatten(0, 1)).unflatten(0, x.shape[:2]))
"""
# A buffer stays fp32 while DeepSpeed casts the weights to fp16.
MINE = """
import torch
from torch import nn
from my_parts import Hidden
from pipeline.snn import neurons

class Net(nn.Module):
    def __init__(self, model, num_classes):
        super().__init__()
        self.T, self.conv, self.bn, self.sn = model.T, nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), neurons.from_config(model)
        self.register_buffer("gain", torch.full((8,), 1.5))
        self.hidden, self.fc = Hidden(model), nn.Linear(8, num_classes)

    def forward(self, images):
        spikes = self.sn(self.bn(self.conv(images))[None], num_steps=self.T)
        return self.fc(self.hidden(spikes.mean((3, 4)) * self.gain))

def network(model, num_classes):
    return Net(model, num_classes)
"""
STAGES = range(4)


@pytest.fixture(scope="module")
def half(digits, tmp_path_factory) -> Path:
    """A folder with a run in fp16 for each ZeRO stage, and the network's two files."""
    folder = tmp_path_factory.mktemp("half")
    (folder / "mine.py").write_text(MINE)
    (folder / "my_parts.py").write_text(PARTS)
    epochs = 3.5 * 16 / Manifest.load(digits / "train").num_samples
    common = (
        f"--recipe digits --data.path {digits} --data.image_size 8 --data.global_batch 16 --data.micro_batch 4 "
        f"--model.T 2 --model.arch {folder}/mine.py:network --train.precision fp16 --train.epochs {epochs} "
        "--train.log_every 1 --train.checkpoint_every 2 --chi.interval 2 --metrics.port 0"
    ).split()
    runs = [
        (free_port(), [*common, "--run_dir", str(folder / str(stage)), "--train.zero_stage", str(stage)])
        for stage in STAGES
    ]
    done = launch("tests/support/half_job.py", RUNS=json.dumps(runs), OVERFLOW="", LOOK="0")
    assert done.returncode == EXIT_DONE, done.output
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_network_of_one_s_own_trains_in_fp16(half, stage):
    run_dir = half / str(stage)
    assert sorted(losses(run_dir)) == [1, 2, 3, 4]
    assert all(math.isfinite(loss) for loss in losses(run_dir).values())
    last = [record for record in read_journal(run_dir / "metrics.jsonl") if "train_loss" in record][-1]
    assert all(0 < chi <= 1 for chi in last["layer_chi"])
    saved = load_newest(run_dir)
    assert saved is not None
    for name in ("bn.running_var", "hidden.bn.running_var"):
        statistics = saved["model"]["buffers"][name]
        assert statistics.dtype == torch.float32
        assert statistics.isfinite().all()
        assert (statistics != 1).all()
    assert (run_dir / "spikes.json").exists()


def test_its_checkpoint_is_evaluated_in_fp16_as_in_the_run(half):
    done = command("launch.evaluate", half / "1", "--precision", "fp16", "--json", half / "result.json")
    assert done.returncode == EXIT_DONE, done.stderr
    result = json.loads((half / "result.json").read_text())
    summary = json.loads((half / "1" / "summary.json").read_text())
    assert {name: result[name] for name in summary} == summary


def test_a_changed_file_that_the_network_imports_is_treated_as_the_file_itself(half):
    run_dir, parts = half / "1", half / "my_parts.py"
    config = parse(["--resume", str(run_dir)])
    place = Placement(nodes=2, rank=1, master="127.0.0.1", port=1, slots=1)
    assert introduce(place, config).problem == ""
    about = json.loads((run_dir / "run.json").read_text())
    assert about["network_imports"] == {"my_parts.py": hashlib.sha256(PARTS.encode()).hexdigest()}
    parts.write_text(PARTS + "\n# another\n")
    try:
        for said in (command("launch.local", "--resume", run_dir), command("launch.evaluate", run_dir)):
            assert said.returncode == EXIT_USAGE
            assert "Traceback" not in said.stderr
            assert f"{parts}" in said.stderr
        problem = introduce(place, config).problem
        assert f"{parts}, which it imports, has changed since the run in {run_dir} was started; put the" in problem
        with pytest.raises(ConfigError, match=rf"{parts} is not the code that .* was trained with"):
            load_network.load(run_dir, config)
        parts.unlink()
        with pytest.raises(ConfigError, match=rf"{parts} is not the code"):
            load_network.load(run_dir, config)
        parts.write_text(PARTS + "\n# another\n")
        # A run of before these files were watched goes on.
        del about["network_imports"]
        shutil.copytree(run_dir, half / "older")
        (half / "older" / "run.json").write_text(json.dumps(about))
        older = replace(config, run_dir=str(half / "older"))
        assert introduce(place, older).problem == ""
        assert load_network.load(half / "older", older).num_classes == 10
    finally:
        parts.write_text(PARTS)


def test_the_card_of_an_exported_network_names_what_it_imports(half, tmp_path):
    done = command("launch.export", half / "1", tmp_path / "out.safetensors")
    assert done.returncode == EXIT_DONE, done.stderr
    digest = hashlib.sha256(PARTS.encode()).hexdigest()
    assert f"; it imports my_parts.py {digest}." in (tmp_path / "out.safetensors.md").read_text()


def test_ranks_that_import_different_files_do_not_train(digits, half, tmp_path):
    (tmp_path / "mine.py").write_text(f"import os\nif os.environ.get('RANK') == '1':\n    import my_other\n{MINE}")
    (tmp_path / "my_parts.py").write_text(PARTS)
    (tmp_path / "my_other.py").write_text("")
    done = launch("launch/train.py", *words(digits, tmp_path / "run", f"{tmp_path}/mine.py:network"))
    assert done.returncode == EXIT_USAGE
    assert "the ranks do not agree: model.arch=" in done.output
    assert "imports different code; put the same files on all nodes" in done.output
