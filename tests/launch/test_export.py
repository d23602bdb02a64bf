"""Exported weights: the file says what it holds, its card's code loads it, nothing is overwritten without --force."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from launch import export
from pipeline.engine import load_network
from pipeline.errors import ConfigError
from pipeline.run_dir.run_folder import evaluation_path, read, write_json
from tests.conftest import ROOT
from tests.support.model_cards import run_the_lines
from tests.support.training_runs import STEPS


@pytest.fixture
def run(straight, tmp_path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(straight.run_dir, tmp_path / "run"))


def images() -> torch.Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def logits(run: Path, step: int) -> torch.Tensor:
    """Logits of the run's own checkpoint, for images that are the same in every test."""
    network = load_network.load(run, read(run).config, step=step).network
    with torch.no_grad():
        return network(images()).mean(0)


def test_the_cards_lines_load_the_weights_and_the_header_says_what_they_are(run, tmp_path, capsys):
    out = tmp_path / "net.safetensors"
    export.main([str(run), str(out)])
    said = capsys.readouterr()
    assert said.out.split() == [str(out), str(tmp_path / "net.safetensors.md")]
    assert "python -m launch.evaluate" in said.err, "nobody has evaluated it"
    assert torch.equal(run_the_lines(tmp_path / "net.safetensors.md", images=images()), logits(run, STEPS))
    about, summary = read(run), json.loads((run / "summary.json").read_text())
    with safe_open(out, "pt") as file:
        header = file.metadata()
    assert (header["recipe"], header["step"], header["T"]) == ("digits", str(STEPS), "4")
    assert json.loads(header["classes"]) == [str(digit) for digit in range(10)]
    assert header["data_identity"] == about.about["data_identity"]
    assert json.loads(header["metrics"])["eval_accuracy_ratio"] == summary["eval_accuracy_ratio"]
    assert json.loads(header["versions"]) == about.about["versions"]
    assert json.loads(header["config"])["train"]["seed"] == 0
    card = (tmp_path / "net.safetensors.md").read_text(encoding="utf-8")
    assert f"| {100 * summary['eval_accuracy_ratio']:.2f} % |" in card
    assert all(f"| {layer} |" in card for layer in about.about["layers"])
    assert not list(tmp_path.glob(".*.tmp"))


def test_an_older_checkpoint_under_the_original_names_loads_the_same_way(run, tmp_path):
    out = tmp_path / "net.safetensors"
    export.main([str(run), str(out), "--checkpoint", "10", "--names", "original"])
    with safe_open(out, "pt") as file:
        assert "layer1.0.conv1.module.0.weight" in file.keys()  # noqa: SIM118
        assert "eval_loss" not in json.loads(file.metadata()["metrics"])
    assert torch.equal(run_the_lines(tmp_path / "net.safetensors.md", images=images()), logits(run, 10))
    assert "not evaluated after this step" in (tmp_path / "net.safetensors.md").read_text(encoding="utf-8")


def test_the_card_tells_of_the_evaluation_that_was_made(run, tmp_path):
    names = read(run).about["layers"]
    layers = [
        {"neurons": name, "firing_rate_ratio": 0.125 + i / 100, "energy_nanojoule": 10.0 + i}
        for i, name in enumerate(names)
    ]
    evaluation = {
        "num_samples": 359,
        "precision": "bf16",
        "device": "cpu",
        "eval_accuracy_ratio": 0.75,
        "eval_top5_accuracy_ratio": 0.9,
        "eval_loss": 0.5,
        "classes": [{"name": str(i), "num_samples": 36, "accuracy_ratio": 0.5 + i / 100} for i in range(10)],
        "energy": {"microjoule": 2.1, "num_samples": 359, "layers": layers},
    }
    evaluation["classes"][8]["display_name"] = "eight"  # evaluations of older versions have none
    path = evaluation_path(run, STEPS, "val")
    path.parent.mkdir()
    write_json(path, evaluation)
    export.main([str(run), str(tmp_path / "net.safetensors")])
    card = (tmp_path / "net.safetensors.md").read_text(encoding="utf-8")
    for row in (
        "| 75.00 % |",
        "| 90.00 % |",
        "| 2.100 µJ |",
        "| 8 | 8: eight | 36 | 58.00 % |",
        "| 9 | 9 | 36 | 59.00 % |",
        "| 0.1250 | 10.0 |",
    ):
        assert row in card


def refusal(*arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        export.main([str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_commands_of_the_docs_run_in_order_and_their_files_are_as_open_as_others(run, tmp_path, monkeypatch):
    for name in ("nir", "onnx", "onnxscript"):
        pytest.importorskip(name, reason=f"{name} is not installed: it is in the extra export")
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    lines = text.partition("```\n")[2].partition("```")[0].splitlines()
    assert len(lines) == len(export.FORMATS)
    monkeypatch.chdir(tmp_path)
    before = os.umask(0o027)
    try:
        for line in lines:
            python, m, module, of, *arguments = re.split(r"  +", line)[0].split()
            assert (python, m, module, of) == ("python", "-m", "launch.export", "RUN")
            export.main([str(run), *arguments])
    finally:
        os.umask(before)
    made = [path for path in tmp_path.rglob("*") if path.is_file() and run not in path.parents]
    files = [f"OUT.{ending}" for ending in ("safetensors", "nir", "onnx", "pt2")]
    cards = [f"{name}.md" for name in files]
    assert {str(path.relative_to(tmp_path)) for path in made} == {
        *files,
        *cards,
        *(f"OUT/{name}" for name in ("model.safetensors", "config.json", "README.md")),
    }
    assert {path.stat().st_mode & 0o777 for path in made} == {0o640}


def test_nothing_is_overwritten_unless_asked_for(run, tmp_path):
    out, card = tmp_path / "net.safetensors", tmp_path / "net.safetensors.md"
    card.write_text("mine")
    assert f"{card} is there already" in refusal(run, out)
    assert (card.read_text(), out.exists()) == ("mine", False)
    export.main([str(run), str(out), "--force"])
    assert card.read_text() != "mine"
    assert f"{out} is there already; choose another name, or replace it with --force" in refusal(run, out)


def test_mistakes_are_named(run, tmp_path):
    assert "use a name that ends in .safetensors" in refusal(run, tmp_path / "net.pt")
    assert "make it first" in refusal(run, tmp_path / "no" / "net.safetensors")
    assert "holds no run" in refusal(tmp_path, tmp_path / "net.safetensors")
    assert "it has 10, 14" in refusal(run, tmp_path / "net.safetensors", "--checkpoint", "3")
    assert "the following arguments are required: OUT; see --help" in refusal(run)


def test_a_graph_of_nir_gives_the_logits_of_the_run(run, tmp_path):
    nir = pytest.importorskip("nir", reason="nir is not installed: it is in the extra export")
    out = tmp_path / "net.nir"
    export.main([str(run), str(out), "--format", "nir", "--dt", "0.001"])
    # BN is folded: fp32 rounds elsewhere. A spike that differs would change a logit by more than 1e-4.
    torch.testing.assert_close(
        run_the_lines(tmp_path / "net.nir.md", images=images()), logits(run, STEPS), rtol=0, atol=1e-5
    )
    said = nir.read(out).metadata
    assert (said["recipe"], said["T"], said["dt"], said["step"]) == ("digits", 4, 0.001, str(STEPS))
    assert "the shorter side resized to 16 pixels" in said["input"]


def test_a_model_of_onnx_gives_the_logits_of_the_run(run, tmp_path):
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"{name} is not installed: it is in the extra dev")
    import onnx

    export.main([str(run), str(tmp_path / "net.onnx"), "--format", "onnx"])
    # As for NIR: the runtime folds BN.
    torch.testing.assert_close(
        run_the_lines(tmp_path / "net.onnx.md", images=images()), logits(run, STEPS), rtol=0, atol=1e-5
    )
    model = onnx.load(tmp_path / "net.onnx")
    onnx.checker.check_model(model, full_check=True)
    said = {one.key: one.value for one in model.metadata_props}
    assert (said["recipe"], json.loads(said["config"])["train"]["seed"]) == ("digits", 0)


def test_a_program_of_torch_export_gives_the_bits_of_the_run_without_this_package(run, tmp_path):
    export.main([str(run), str(tmp_path / "net.pt2"), "--format", "torch_export"])
    without = "sys.modules['pipeline'] = None"
    with torch.no_grad():
        assert torch.equal(run_the_lines(tmp_path / "net.pt2.md", without, images=images()), logits(run, STEPS))
    said = {"about.json": ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=said)
    assert json.loads(said["about.json"])["recipe"] == "digits"


def test_options_of_other_formats_are_named(run, tmp_path):
    assert "use a name that ends in .nir" in refusal(run, tmp_path / "net.safetensors", "--format", "nir")
    nir = (run, tmp_path / "net.nir", "--format", "nir")
    assert "--names original is not allowed with --format nir; leave it out" in refusal(*nir, "--names", "original")
    assert "--dt 1 is not allowed with --format safetensors" in refusal(run, tmp_path / "net.safetensors", "--dt", "1")
    assert "dt=-1.0 is not allowed; use seconds above 0" in refusal(*nir, "--dt", "-1")
    assert not list(tmp_path.glob("net.*"))


def test_a_package_that_is_absent_is_named_with_the_cure(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    said = refusal(run, tmp_path / "net.nir", "--format", "nir")
    assert said == '--format nir needs nir, not installed; run: pip install -c constraints.txt -e ".[export]"'


def test_a_folder_of_the_hub_gives_the_bits_of_the_run(run, tmp_path, capsys):
    folder = tmp_path / "net"
    export.main([str(run), str(folder), "--format", "hf"])
    assert capsys.readouterr().out.split() == [str(folder / "model.safetensors"), str(folder / "README.md")]
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert torch.equal(run_the_lines(folder / "README.md", images=images()), logits(run, STEPS))
    said = json.loads((folder / "config.json").read_text())
    assert said["id2label"] == {str(digit): str(digit) for digit in range(10)}
    assert (said["model"]["arch"], said["image_size"], said["dtype"]) == ("sew_tiny", 16, "float32")
    assert f"{folder / 'config.json'} is there already" in refusal_of_the_last(run, folder)
    export.main([str(run), str(folder), "--format", "hf", "--force"])


def refusal_of_the_last(run: Path, folder: Path) -> str:
    """What is said where config.json alone is there."""
    for name in ("model.safetensors", "README.md"):
        (folder / name).unlink()
    return refusal(run, folder, "--format", "hf")


def test_the_hub_reads_the_card_s_metadata(run, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: it is in the extra export")
    export.main([str(run), str(tmp_path / "net"), "--format", "hf"])
    data = hub.ModelCard.load(tmp_path / "net" / "README.md").data
    (result,) = data.eval_results
    summary = json.loads((run / "summary.json").read_text())
    assert (result.task_type, result.metric_type) == ("image-classification", "accuracy")
    assert result.metric_value == summary["eval_accuracy_ratio"]
    assert (data.library_name, data.pipeline_tag) == ("chispike", "image-classification")


def test_a_push_without_a_hub_says_that_the_folder_is_there(run, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: it is in the extra export")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    folder = tmp_path / "net"
    said = refusal(run, folder, "--format", "hf", "--push", "me/net")
    assert f"{folder} is written, and cannot be pushed to me/net ([Errno 111] Connection refused)" in said
    assert said.endswith(f"; see whether this machine reaches the hub, then run `hf upload me/net {folder}`")
    assert (folder / "README.md").exists()


def test_mistakes_with_folders_and_repositories_are_named(run, tmp_path, monkeypatch):
    hf = (run, tmp_path / "net", "--format", "hf")
    assert "is the run's own folder" in refusal(run, run, "--format", "hf", "--force")
    assert "'me' is no repository of the hub; name one as OWNER/NAME" in refusal(*hf, "--push", "me")
    assert "--push a/b is not allowed with --format safetensors" in refusal(run, tmp_path / "n", "--push", "a/b")
    (tmp_path / "file").touch()
    assert "file is a file; --format hf writes a folder" in refusal(run, tmp_path / "file", "--format", "hf")
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    assert refusal(*hf, "--push", "me/net").startswith("--push needs huggingface_hub, not installed; run: pip install")
    assert not (tmp_path / "net").exists()
