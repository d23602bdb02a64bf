"""A checkpoint on a split by one plain process: the run's own figures, every sample once, and mistakes in one line."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from launch import evaluate, evaluation_table, model_card
from launch.evaluation_table import grid, table
from pipeline.config import ModelConfig
from pipeline.data.manifest import Manifest
from pipeline.data.prefetcher import Batch
from pipeline.engine.evaluate import _answers, evaluate_in_detail
from pipeline.errors import ConfigError, DataError
from pipeline.snn import energy
from pipeline.snn.networks.build import build
from tests.conftest import ROOT
from tests.support.data_sets import drawn_jpeg, write_set
from tests.support.training_runs import STEPS


@pytest.fixture
def run(straight, tmp_path) -> Path:
    """A copy of the finished run."""
    return Path(shutil.copytree(straight.run_dir, tmp_path / "run"))


def command(*arguments: object) -> subprocess.CompletedProcess:
    words = [sys.executable, "-m", "launch.evaluate", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=300)


def test_the_newest_checkpoint_gives_the_figures_of_the_run(run, digits, tmp_path):
    done = command(run, "--json", tmp_path / "result.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    summary = json.loads((run / "summary.json").read_text())
    assert result["step"] == summary["step"] == STEPS
    assert result["eval_accuracy_ratio"] == summary["eval_accuracy_ratio"]
    assert result["eval_loss"] == summary["eval_loss"], (
        "also with two ranks, which add the same losses in another order"
    )
    manifest = Manifest.load(digits / "val")
    confusion = torch.tensor(result["confusion"])
    assert confusion.sum() == result["num_samples"] == manifest.num_samples
    assert confusion.diagonal().sum() / confusion.sum() == pytest.approx(result["eval_accuracy_ratio"])
    assert [kind["name"] for kind in result["classes"]] == list(manifest.classes)
    assert confusion.sum(1).tolist() == [kind["num_samples"] for kind in result["classes"]]
    assert result["eval_accuracy_ratio"] <= result["eval_top5_accuracy_ratio"] <= 1
    for layer in result["energy"]["layers"][:-1]:
        assert 0 < layer["firing_rate_ratio"] < 1
    assert f"top-1    {100 * result['eval_accuracy_ratio']:.2f} %" in done.stdout
    for row, kind in zip(result["confusion"], result["classes"], strict=True):
        cells = [str(count) if count else "·" for count in row]
        assert [kind["name"], *cells] in [line.split()[: len(cells) + 1] for line in done.stdout.splitlines()]
    kept = run / "evaluations" / f"step-{STEPS:08d}-val.json"
    assert json.loads(kept.read_text()) == result
    pair = result["confused"][0]
    wrong = confusion.clone().fill_diagonal_(0)
    assert pair["num_samples"] == wrong.max() == confusion[int(pair["class"]), int(pair["answered"])]
    assert f"<th>{pair['class']} → {pair['answered']}<td>{pair['num_samples']}<" in (run / "report.html").read_text()


def test_a_run_without_its_spikes_gets_them_and_a_later_steps_stay(run, straight):
    own, kept = (json.loads((folder / "spikes.json").read_text()) for folder in (straight.run_dir, run))
    assert kept == own
    (run / "spikes.json").unlink()
    (run / "summary.json").unlink()  # as if it had been killed after its last checkpoint
    evaluate.main([str(run), "--checkpoint", "10"])
    assert json.loads((run / "spikes.json").read_text())["step"] == 10
    evaluate.main([str(run)])
    seen = json.loads((run / "spikes.json").read_text())
    for name in ("step", "weights", "split", "num_steps", "num_images", "sample", "layers", "potentials"):
        assert seen[name] == own[name], name
    for name in ("right", "wrong"):  # one process meets them in another order than two ranks do
        assert len(seen[name]) == len(own[name])
    assert 'class="spike"' in (run / "report.html").read_text()
    written = (run / "spikes.json").stat().st_mtime_ns
    for words in (["--checkpoint", "10"], ["--split", "train"], ["--T", "2"]):
        evaluate.main([str(run), *words])
    assert (run / "spikes.json").stat().st_mtime_ns == written


def test_another_checkpoint_split_number_of_steps_and_size(run, digits, tmp_path, capsys):
    out = tmp_path / "result.json"
    options = ["--checkpoint", "10", "--split", "train", "--T", "2", "--image-size", "8", "--precision", "fp32"]
    evaluate.main([str(run), *options, "--json", str(out)])
    result = json.loads(out.read_text())
    asked = {"step": 10, "split": "train", "T": 2, "image_size": 8, "precision": "fp32"}
    assert result | asked == result
    assert result["num_samples"] == Manifest.load(digits / "train").num_samples
    assert "step 10, averaged weights, on" in capsys.readouterr().out
    assert not (run / "evaluations").exists(), "what the run's settings did not give is not the run's"


def test_samples_that_are_not_valid_count_nowhere():
    torch.manual_seed(0)
    network = build(ModelConfig(T=3), num_classes=4, image_size=8).eval()
    images, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 4
    valid = torch.tensor([True] * 7 + [False] + [True] * 2 + [False] * 2)
    batches = [Batch(images[i : i + 4], labels[i : i + 4], valid[i : i + 4], i) for i in (0, 4, 8)]
    detail = evaluate_in_detail(network, batches, num_classes=4)
    with torch.no_grad():
        logits = network(images[valid]).mean(0)
    expected = torch.zeros(4, 4, dtype=torch.int64)
    for label, answer in zip(labels[valid], logits.argmax(1), strict=True):
        expected[label, answer] += 1
    assert torch.equal(detail.confusion, expected)
    assert detail.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels[valid]).item(), rel=1e-5)
    assert detail.top5 is None
    whole = energy.measure(network, images[valid])
    assert detail.num_measured == detail.num_samples == 9
    assert detail.energy.firing_rates == pytest.approx(whole.firing_rates)
    assert detail.energy.microjoule == pytest.approx(whole.microjoule)
    part = evaluate_in_detail(network, batches, num_classes=4, measure_every=2)
    assert part.num_measured == 4 + 2
    assert torch.equal(part.confusion, expected)


def test_the_sum_of_losses_does_not_depend_on_the_order_of_the_samples():
    generator = torch.Generator().manual_seed(0)
    logits_TNK = 30 * torch.randn(1, 4096, 3, generator=generator)  # losses from 1e-7 to 100
    labels = torch.randint(3, (4096,), generator=generator)
    batch = Batch(torch.empty(0), labels, torch.ones(4096, dtype=torch.bool), 0)
    losses = _answers(logits_TNK, batch)[1]
    exact = torch.nn.functional.cross_entropy(logits_TNK[0], labels, reduction="none").double()
    torch.testing.assert_close(losses, exact, rtol=0, atol=2**-29)
    sums = {sum(losses[torch.randperm(4096, generator=generator)].tolist()) for _ in range(20)}
    assert len(sums) == 1


def test_classes_are_shown_as_they_are_called():
    network = build(ModelConfig(T=1), num_classes=2, image_size=8).eval()
    batch = Batch(torch.randn(2, 3, 8, 8), torch.arange(2), torch.ones(2, dtype=torch.bool), 0)
    manifest = Manifest(split="val", classes=("n01", "n02"), shards=(), display_names=("goldfish", "crane"))
    result = evaluate.numbers(
        evaluate_in_detail(network, [batch], num_classes=2), manifest.classes, evaluate.shown_names(manifest), network
    )
    named = [(kind["name"], kind["display_name"]) for kind in result["classes"]]
    assert named == [("n01", "goldfish"), ("n02", "crane")]
    how = {"data": "d", "split": "val", "T": 1, "image_size": 8, "precision": "fp32", "device": "cpu"}
    text = table({"run": "r", "step": 1, "weights": "last", **how, **result})
    assert "0 goldfish" in text
    assert "n01" not in text
    many = [kind | {"num_samples": 1, "accuracy_ratio": 0.0} for kind in result["classes"] * 11]
    assert "\ngoldfish" in table({"run": "r", "step": 1, "weights": "last", **how, **result, "classes": many})


def test_the_five_best_answers_are_looked_at():
    class Fixed(torch.nn.Linear):
        def forward(self, images):
            return torch.arange(8.0).expand(2, len(images), 8)  # class 7 is the best, 3 the fifth

    batch = Batch(torch.zeros(4, 3, 2, 2), torch.tensor([7, 3, 2, 0]), torch.ones(4, dtype=torch.bool), 0)
    detail = evaluate_in_detail(Fixed(1, 1), [batch], num_classes=8)
    assert (detail.accuracy, detail.top5) == (0.25, 0.5)


def refusal(kind: type[Exception], *arguments: object) -> str:
    with pytest.raises(kind) as caught:
        evaluate.main([str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_mistake_ends_with_one_line_and_64(tmp_path):
    done = command(tmp_path / "nowhere")
    assert done.returncode == 64
    assert done.stderr == f"error: {tmp_path}/nowhere holds no run (no config.json and run.json); name a run folder " \
        "such as runs/digits\n"  # fmt: skip


def test_what_is_not_there_is_named_beside_what_is(run, digits, tmp_path):
    assert "has no checkpoint after step 11; it has 10, 14" in refusal(ConfigError, run, "--checkpoint", 11)
    assert f"{digits} has no split 'test'; use --split train or val" in refusal(ConfigError, run, "--split", "test")
    assert "holds no run" in refusal(ConfigError, run / "config.json")
    assert "name the folder of one with --data DIR" in refusal(ConfigError, run, "--data", tmp_path / "nothing")
    assert "model.T=0 is not allowed" in refusal(ConfigError, run, "--T", 0)
    assert "data.image_size=1 is too small" in refusal(ConfigError, run, "--image-size", 1)
    assert "invalid int value: 'last'; see --help" in refusal(ConfigError, run, "--checkpoint", "last")
    assert "make it first" in refusal(ConfigError, run, "--json", tmp_path / "no" / "x.json")
    shutil.rmtree(run / "checkpoints")
    assert "has no whole checkpoint" in refusal(ConfigError, run)


def test_data_of_other_classes_are_refused(run, tmp_path):
    write_set(tmp_path / "other" / "val", [drawn_jpeg(n) for n in range(3)], per_shard=3, classes=10)
    assert "has 'c0' as class 0, where the run was trained on '0'" in refusal(
        ConfigError, run, "--data", tmp_path / "other"
    )
    write_set(tmp_path / "fewer" / "val", [drawn_jpeg(n) for n in range(3)], per_shard=3, classes=4)
    assert "has 4 classes, but the run was trained on 10" in refusal(ConfigError, run, "--data", tmp_path / "fewer")
    about = json.loads((run / "run.json").read_text())
    del about["classes"]  # as in a run of an older version, which did not keep them
    (run / "run.json").write_text(json.dumps(about))
    assert "has 4 classes, but the network of" in refusal(ConfigError, run, "--data", tmp_path / "fewer")


def test_a_damaged_checkpoint_that_was_asked_for_is_refused(run):
    state = run / "checkpoints" / "step-00000010" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    assert "step-00000010 is damaged (its hash does not match)" in refusal(DataError, run, "--checkpoint", 10)


def test_the_worst_confusions_are_told_by_class_name():
    confusion = torch.tensor([[5, 3, 0], [1, 2, 3], [0, 0, 0]])
    pairs = evaluate.confused(confusion, ("cat", "dog", "owl"))
    assert [(pair["class"], pair["answered"], pair["num_samples"]) for pair in pairs] == [
        ("dog", "owl", 3),  # a larger share of its class than cat → dog
        ("cat", "dog", 3),
        ("dog", "cat", 1),
    ]
    assert [pair["of_class_ratio"] for pair in pairs] == [3 / 6, 3 / 8, 1 / 6]
    assert evaluate.confused(torch.eye(3, dtype=torch.int64), ("cat", "dog", "owl")) == []
    many = evaluate.confused(torch.ones(40, 40, dtype=torch.int64), [f"c{label}" for label in range(40)])
    assert len(many) == evaluate.PAIRS
    kinds = [
        {"name": "n01", "display_name": f"c{label}", "num_samples": 40, "accuracy_ratio": 1 / 40} for label in range(40)
    ]
    text = evaluation_table.classes_of({"classes": kinds, "confusion": None, "confused": many})
    assert ["c19", "40", "2.50", "%"] in [line.split() for line in text.splitlines()]
    assert "n01" not in text
    assert "most often confused\nclass  answer  samples  of the class\nc0         c1" in text


def test_classes_are_called_by_their_display_names():
    named = Manifest(split="val", classes=("n1", "n2", "n3"), shards=(), display_names=("crane", "owl", "crane"))
    shown = evaluate.shown_names(named)
    assert shown == ["crane (n1)", "owl", "crane (n3)"], "ImageNet has two classes of one name"
    plain = Manifest(split="val", classes=("0", "1"), shards=())
    assert evaluate.shown_names(plain) == ["0", "1"]
    confusion = torch.tensor([[5, 0, 3], [0, 2, 0], [0, 1, 4]])
    kinds = [
        {"name": name, "display_name": text, "num_samples": 9, "accuracy_ratio": 0.5}
        for name, text in zip(named.classes, shown, strict=True)
    ]
    text = evaluation_table.classes_of({"classes": kinds, "confusion": confusion.tolist()})
    assert "0 crane (n1)" in text
    assert "1 owl" in text
    about = {"num_classes": 3, "classes": list(named.classes)}
    card = model_card.classes_of(about, {"classes": kinds})
    assert "| 0 | n1: crane (n1) | 9 | 50.00 % |" in card


def test_columns_of_a_table_stand_under_one_another():
    assert grid([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc   d"
