"""Folders of the Hugging Face hub: the same network comes back, and what is no such folder is refused."""

import json
from pathlib import Path

import pytest
import torch

from pipeline.config import ModelConfig
from pipeline.errors import ConfigError
from pipeline.snn import state_dicts
from pipeline.snn.exchange import hub
from tests.snn.exchange.nets import digits, frames, network
from tests.support import hub_server

MODEL = {"arch": "sew_tiny", "neuron": "plif", "tau": 1.5, "v_th": 0.7, "connect": "iand", "reset": "soft", "T": 3}


@pytest.fixture
def folder(tmp_path) -> Path:
    net = network(**MODEL)
    classes = [f"digit {label}" for label in range(10)]
    said = hub.config(net, ModelConfig(**MODEL), image_size=16, classes=classes, kind="images", described="RGB")
    (tmp_path / "config.json").write_text(json.dumps(said))
    state_dicts.save_safetensors(net, tmp_path / "model.safetensors")
    return tmp_path


def test_the_network_comes_back_with_its_neurons_and_its_dtype(folder):
    net, back = network(**MODEL), hub.load_pretrained(folder)
    assert not back.training
    with torch.no_grad():
        ours = net(digits(4))
        assert torch.equal(back(digits(4)), ours)
        for name, value in (("v_th", 0.9), ("reset", "hard"), ("connect", "add"), ("T", 4)):
            edit(folder, model={**MODEL, name: value})
            theirs = hub.load_pretrained(folder)(digits(4))
            assert theirs.shape != ours.shape or not torch.equal(theirs, ours), f"{name} is not read"


def test_a_network_of_event_frames_comes_back_and_takes_frames_alone(tmp_path):
    net = network(events=True, **MODEL)
    classes = [str(label) for label in range(10)]
    said = hub.config(net, ModelConfig(**MODEL), image_size=16, classes=classes, kind="events", described="frames")
    assert (said["kind"], said["input"], said["in_channels"]) == ("events", "frames", 2)
    (tmp_path / "config.json").write_text(json.dumps(said))
    state_dicts.save_safetensors(net, tmp_path / "model.safetensors")
    back = hub.load_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(back(frames(4, 3)), net(frames(4, 3)))
    with pytest.raises(ValueError, match=r"\(3, 2, 16, 16\) are not allowed; use \(T, N, 2, H, W\) for event frames$"):
        back(frames(4, 3)[:, 0])  # one recording, which would pass for three images
    with pytest.raises(ValueError, match=r"\(3, 4, 3, 16, 16\) are not allowed; use \(T, N, 2, H, W\)"):
        back(torch.zeros(3, 4, 3, 16, 16))
    edit(tmp_path, in_channels=3)
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be loaded \(these weights do not fit"):
        hub.load_pretrained(tmp_path)


def edit(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model_type": "bert"}, r"config\.json: model_type='bert' is not chispike; name a folder"),
        ({"model": {"arch": "sew_tiny", "gain": 2}}, r"model\.gain is not known to this version; install the version"),
        (
            {"model": {"arch": "own.py:net"}},
            r"model\.arch='own\.py:net' is a network of its own, which a folder of the hub",
        ),
        ({"model": 3}, r"model is no JSON object"),
        ({"model": {"T": 0}}, r"config\.json: model\.T=0 is not allowed"),
        ({"num_labels": 0}, r"num_labels=0 is not allowed; use a whole number of at least 1"),
        ({"image_size": "16"}, r"image_size='16' is not allowed"),
        ({"num_labels": 7}, r"model\.safetensors cannot be loaded \(these weights do not fit .*fc\.weight is"),
        ({"model": {**MODEL, "neuron": "if"}}, r"unknown .*w and \d+ more"),
    ],
)
def test_a_folder_that_says_something_else_is_refused(folder, fields, said):
    edit(folder, **fields)
    with pytest.raises(ConfigError, match=said) as caught:
        hub.load_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_damaged_and_absent_files_are_refused(folder):
    (folder / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be loaded \(.*\); export it again"):
        hub.load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors cannot be loaded"):
        hub.load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"holds no config\.json; name a folder"):
        hub.load_pretrained(folder)


def test_what_is_neither_a_folder_nor_a_repository_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"no folder, and no repository of the hub; name one as OWNER/NAME"):
        hub.load_pretrained(tmp_path / "no")
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: it is in the extra export")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"^me/net cannot be loaded from the Hugging Face hub \(.*refused"):
        hub.load_pretrained("me/net")


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (
            (404, "RepoNotFound"),
            r"the hub has none of this name, or does not show it to you\); check the name, or log in",
        ),
        (
            (401, "RepoNotFound"),
            r"the hub has none of this name, or does not show it to you\); check the name, or log in",
        ),
        ((404, "RevisionNotFound"), r"it has no revision 'v2'\); name a branch, tag or commit of it$"),
        ((404, "EntryNotFound"), r"it lacks a file\); name a repository that launch\.export --push made$"),
        (
            (403, "GatedRepo"),
            r"it is gated\); ask its owner for access at https://huggingface\.co/me/net, then log in by",
        ),
        ((401, ""), r".*401 Unauthorized.*\); log in by `hf auth login` with a token that may do this$"),
        ((503, ""), r".*503 Service Unavailable.*\); try again later$"),
    ],
    ids=lambda value: f"{value[0]} {value[1]}" if isinstance(value, tuple) else "",
)
def test_why_the_hub_refuses_is_said_with_the_cure(refusal, said, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: it is in the extra export")
    with (
        hub_server.hub(monkeypatch, tmp_path, refusal=refusal),
        pytest.raises(ConfigError, match=rf"^me/net cannot be loaded from the Hugging Face hub \({said}") as caught,
    ):
        hub.load_pretrained("me/net", revision="v2")
    assert "\n" not in str(caught.value)


def test_an_upload_of_weights_that_breaks_off_is_told_in_a_line(folder, tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed: it is in the extra export")
    (folder / "README.md").write_text("# A card")
    with hub_server.hub(monkeypatch, tmp_path), pytest.raises(ConfigError) as caught:
        hub.push(folder, "me/net")
    said = str(caught.value)
    why = "(Error while uploading 'model.safetensors' to the Hub: 403 Forbidden"
    assert said.startswith(f"{folder} is written, and cannot be pushed to me/net {why}")
    assert said.endswith(
        f"); log in by `hf auth login` with a token that may do this, then run `hf upload me/net {folder}`"
    )
    assert "\n" not in said
