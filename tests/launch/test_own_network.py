"""A network of one's own through the real launcher: trained, resumed, evaluated, exported; and what is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.cluster.handshake import introduce
from launch.cluster.placement import Placement
from launch.dry_run import report
from launch.options import parse
from pipeline.engine import init_from, load_network
from pipeline.errors import EXIT_DONE, EXIT_USAGE, ConfigError
from pipeline.metrics.journal import read_journal
from pipeline.run import require_weights
from pipeline.run_dir import run_folder
from pipeline.run_dir.checkpoint_files import load_newest
from pipeline.snn.networks.build import build
from tests.conftest import ROOT, launch
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
    assert f"with the SHA-256 {digest}" in out.with_suffix(".md").read_text()
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


@pytest.mark.parametrize(("name", "least"), [("vgg", 0.9), ("spikformer", 0.7)])  # of 30 epochs, 99.7 and 98.9 %
def test_the_examples_learn_the_digits(name, least, digits, tmp_path):
    short = ["--train.epochs", "6", "--train.log_every", "20", "--metrics.port", "0"]
    done = launch(
        "launch/train.py",
        *("--recipe", "digits", "--data.path", str(digits), "--run_dir", str(tmp_path / "run")),
        *("--model.arch", f"docs/network_{name}.py:network", *short),
    )
    assert done.returncode == EXIT_DONE, done.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["eval_accuracy_ratio"] > least
