"""Checks of both splits before the first step, and sets of very few samples."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.dry_run import report
from launch.train import QUIET, main
from pipeline.config import Config, DataConfig
from pipeline.data.loader import Loader, evaluation_batches
from pipeline.data.manifest import EVENTS, IMAGES, MANIFEST_NAME, Manifest, Sensor, check_splits, load_manifest
from pipeline.errors import ConfigError, DataError
from tests.conftest import launch
from tests.support.data_servers import serve
from tests.support.data_sets import drawn_jpeg, write_set

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path) -> Path:
    write_set(tmp_path / "train", [drawn_jpeg(n, 8, 8) for n in range(12)], per_shard=4)
    write_set(tmp_path / "val", [drawn_jpeg(n, 8, 8) for n in range(6)], per_shard=4)
    return tmp_path


def change(folder: Path, edit) -> None:
    document = json.loads((folder / MANIFEST_NAME).read_text())
    edit(document)
    (folder / MANIFEST_NAME).write_text(json.dumps(document))


def relabel(folder: Path, name: str, label: int) -> None:
    """Changes the label of the first sample of a shard."""
    records = np.load(folder / f"{name}.npy")
    records["label"][0] = label
    np.save(folder / f"{name}.npy", records)


def resize(folder: Path, size: int) -> None:
    (folder / "train-000001.npy").write_bytes((folder / "train-000001.npy").read_bytes()[:size])


def dangle(folder: Path) -> None:
    (folder / "train-000002.idx").unlink()
    (folder / "train-000002.idx").symlink_to("nowhere")


def empty(document: dict) -> None:
    document["shards"] = []


CLASSES = {
    "fewer": (lambda d: d.update(classes=["c0", "c1"]), "has 2 classes, but train has 4"),
    "more": (lambda d: d["classes"].append("c4"), "has 5 classes, but train has 4"),
    "others": (lambda d: d["classes"].__setitem__(1, "dog"), "has 'dog' as class 1, where train has 'c1'"),
    "another order": (lambda d: d["classes"].reverse(), "has 'c3' as class 0, where train has 'c0'"),
}


def test_sound_splits_pass_and_the_training_splits_manifest_comes_back(folder):
    assert check_splits(DataConfig(path=str(folder))) == Manifest.load(folder / "train")


def test_a_manifest_of_events_says_so_and_one_of_images_does_not():
    events = Manifest(split="train", classes=("a",), shards=(), kind=EVENTS, sensor=Sensor(height=128, width=64))
    document = json.loads(events.to_json())
    assert (document["kind"], document["sensor"]) == ("events", {"height": 128, "width": 64})
    for manifest in (events, replace(events, sensor=None), replace(events, kind=IMAGES, sensor=None)):
        assert Manifest.from_json(manifest.to_json(), "here") == manifest
    assert {"kind", "sensor"}.isdisjoint(json.loads(replace(events, kind=IMAGES, sensor=None).to_json()))
    assert events.identity != replace(events, sensor=Sensor(height=64, width=64)).identity


def test_a_set_whose_classes_tell_left_from_right_is_not_mirrored(folder):
    """Training is refused with the default data.flip; an evaluation mirrors nothing."""
    for split in ("train", "val"):
        change(folder / split, lambda d: d.update(handed=True))
    data = DataConfig(path=str(folder), image_size=8, global_batch=4, micro_batch=4)
    said = rf"^data\.flip=True would give samples wrong labels: {folder}/train has classes .*; use --data\.flip false$"
    config = Config(recipe="one", data=data)
    uses = (
        lambda: check_splits(data),
        lambda: Loader(data, seed=0, rank=0, world_size=1, device=CPU),
        lambda: report(config, 1),
    )
    for use in uses:
        with pytest.raises(ConfigError, match=said):
            use()
    assert sum(len(batch.labels) for batch in evaluation_batches(data, rank=0, world_size=1, device=CPU)) == 8
    straight = replace(data, flip=False)
    assert check_splits(straight).handed
    Loader(straight, seed=0, rank=0, world_size=1, device=CPU).close()
    assert report(replace(config, data=straight), 1)


def test_the_manifest_says_whether_classes_tell_left_from_right():
    plain = Manifest(split="train", classes=("a",), shards=())
    assert "handed" not in json.loads(plain.to_json())
    handed = replace(plain, handed=True)
    assert Manifest.from_json(handed.to_json(), "here") == handed
    with pytest.raises(DataError, match=r"^here gives handed='yes', not true or false; make the shards again"):
        Manifest.from_json(handed.to_json().replace('"handed": true', '"handed": "yes"'), "here")


@pytest.mark.parametrize("kind", CLASSES)
def test_a_validation_split_of_other_classes_is_refused(folder, kind):
    edit, said = CLASSES[kind]
    change(folder / "val", edit)
    with pytest.raises(ConfigError, match=f"^{folder}/val {said}; make both splits with the same classes in the same"):
        check_splits(DataConfig(path=str(folder)))


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (empty, "has no samples; make the shards again"),
        (lambda d: [shard.update(num_samples=0) for shard in d["shards"]], "has no samples; make the shards again"),
        (lambda d: d.update(classes=[]), "names no classes; make the shards again"),
        (lambda d: d.update(classes="abcd"), "gives classes that are not a list of names"),
        (lambda d: d.update(classes=[0, 1, 2, 3]), "gives classes that are not a list of names"),
        (lambda d: d["classes"].__setitem__(0, "\ud800"), "gives classes that are not a list of names"),
        (lambda d: d.update(split=3), "gives split=3, not a name"),
        (lambda d: d.update(kind="films"), "holds 'films'; this program reads images and events"),
        (lambda d: d.update(sensor={"height": 4, "width": 4}), "gives images a sensor of height 4 and width 4"),
        (lambda d: d.update(kind="events", sensor={"height": 0, "width": 4}), "gives events a sensor of height 0"),
        (lambda d: d.update(kind="events", sensor={"height": 4}), "lacks or misspells a field"),
        (lambda d: d["shards"][0].update(num_samples=10**20), "gives num_samples=100000000000000000000 for"),
    ],
)
def test_a_manifest_that_no_run_can_use_is_refused(folder, split, edit, said):
    change(folder / split, edit)
    with pytest.raises(DataError) as caught:
        check_splits(DataConfig(path=str(folder)))
    assert f"{folder}/{split}/manifest.json {said}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "train-000001.npy").unlink(), r"train-000001\.npy is missing, though manifest\.json names it"),
        (lambda f: (f / "train-000001.idx").unlink(), r"train-000001\.idx is missing, though manifest\.json names it"),
        (
            lambda f: [(f / f"train-00000{n}.tar").unlink() for n in (1, 2)],
            r"train-000001\.tar, and 1 more, is missing, though manifest\.json names it; copy the set again",
        ),
        (dangle, r"train-000002\.idx is missing"),
        (lambda f: resize(f, 0), r"train-000001\.npy cannot be read"),
        (lambda f: resize(f, -1), r"train-000001\.npy holds 95 bytes of records, its header says 96; check the set"),
        (
            lambda f: change(f, lambda d: d["shards"][1].update(num_samples=5)),
            r"train-000001\.npy holds \(4,\) of .*, the manifest says 5 samples",
        ),
        (
            lambda f: change(f, lambda d: d["shards"][1].update(num_samples=10**12)),
            r"train-000001\.npy holds \(4,\) of .*, the manifest says 1000000000000 samples",
        ),
        (
            lambda f: change(f, lambda d: d["shards"][1].update(num_bytes=1000)),
            r"train-000001\.npy puts sample 0 outside of train-000001\.tar, which the manifest gives 1000 bytes",
        ),
    ],
)
def test_files_that_are_not_what_the_manifest_says_are_found_at_the_start(folder, damage, said):
    damage(folder / "train")
    with pytest.raises(DataError, match=f"^{folder}/train/{said}") as caught:
        check_splits(DataConfig(path=str(folder)))
    assert "python -m data_prep" in str(caught.value)


@pytest.mark.parametrize("label", [-1, 4, 2**31 - 1])
@pytest.mark.parametrize("split", ["train", "val"])
def test_more_wrong_labels_than_are_allowed_are_found_at_the_start(folder, split, label):
    relabel(folder / split, f"{split}-000001", label)
    total = 12 if split == "train" else 6
    check_splits(DataConfig(path=str(folder), max_bad_ratio=1 / total))  # as the run itself would count it
    with pytest.raises(DataError) as caught:
        check_splits(DataConfig(path=str(folder), max_bad_ratio=0.9 / total))
    assert f"{folder}/{split}: 1 of {total} samples have a label outside of 0 to 3, more than data.max_bad" in str(
        caught.value
    )
    assert f"(sample 0 of {split}-000001.tar has label {label})" in str(caught.value)


@pytest.fixture
def quiet_ranks():
    """What a rank sets of this process's loggers is taken back."""
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in ("pipeline", *QUIET))]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)


def test_every_rank_refuses_before_torch_comes(folder, monkeypatch, capsys, quiet_ranks):
    change(folder / "val", lambda document: document["classes"].reverse())
    words = ["--recipe", "digits", "--run_dir", str(folder / "run"), "--data.path", str(folder)]
    monkeypatch.setattr("launch.train.PATIENCE_S", 0)  # other ranks wait for rank 0 to report
    for name in ("WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.setenv(name, "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert main(words) == ConfigError.exit_code
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert "/val has 'c3' as class 0, where train has 'c0'" in said
    assert not (folder / "run").exists()


@pytest.mark.parametrize("faults", [["busy", "cut", "busy"], ["stalled", "stalled"]])
def test_a_remote_manifest_is_read_with_the_runs_own_retries_and_timeout(folder, tmp_path, faults, monkeypatch):
    monkeypatch.setattr("pipeline.data.remote.FIRST_DELAY_S", 0.001)
    data = {"cache_dir": str(tmp_path / "cache"), "timeout_s": 0.2}
    with serve(folder) as server:

        def use(**fields) -> None:
            server.faults["manifest.json"] = list(faults)
            server.requests.clear()
            config = DataConfig(path=server.url, **data, **fields)
            for read in (
                lambda: check_splits(config),
                lambda: load_manifest(config, "val"),
                lambda: Loader(config, seed=0, rank=0, world_size=1, device=CPU).close(),
                lambda: list(evaluation_batches(config, rank=0, world_size=1, device=CPU)),
            ):
                server.faults["manifest.json"] = list(faults)
                read()

        use(retries=len(faults))
        assert not server.faults["manifest.json"]
        with pytest.raises(DataError, match=f"manifest.json could not be read in {len(faults)} attempts"):
            use(retries=len(faults) - 1)
        assert server.requests["manifest.json"] == len(faults)


@settings(max_examples=12)
@given(
    st.sampled_from([1, 2, 3, 5, 7, 13]),
    st.integers(1, 8),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from([1, 2, 9]),
)
def test_a_few_samples_are_as_good_as_many(tmp_path_factory, total, ranks, micro_batch, accumulation, window, side):
    """Fewer than ranks or a micro-batch, and of one pixel: every step is full, and each sample is evaluated once."""
    folder = tmp_path_factory.mktemp("few")
    for split in ("train", "val"):
        write_set(folder / split, [drawn_jpeg(n, side, side) for n in range(total)], per_shard=2, classes=1)
    batch = {"global_batch": micro_batch * accumulation * ranks, "micro_batch": micro_batch, "window_shards": window}
    data = DataConfig(path=str(folder), image_size=8, threads=1, prefetch=1, **batch)
    check_splits(data)
    steps, seen, evaluated = -(-2 * total // data.global_batch), 0, 0
    for rank in range(ranks):
        one = Loader(data, seed=0, rank=rank, world_size=ranks, device=CPU)
        seen += sum(len(b.labels) for micro_batches in one.steps(0, steps) for b in micro_batches)
        one.close()
        batches = list(evaluation_batches(data, rank=rank, world_size=ranks, device=CPU))
        evaluated += sum(int(batch.valid.sum()) for batch in batches)
    assert seen == steps * data.global_batch
    assert evaluated == total


@pytest.mark.faults
def test_a_run_on_one_sample_of_one_pixel_and_one_class_trains_to_its_end(tmp_path):
    for split in ("train", "val"):
        write_set(tmp_path / split, [drawn_jpeg(0, 1, 1)], per_shard=1, classes=1)
    settings = {"--recipe": "digits", "--run_dir": tmp_path / "run", "--data.path": tmp_path, "--train.epochs": 384}
    done = launch("launch/train.py", *(str(word) for pair in settings.items() for word in pair), "--metrics.port", "0")
    assert done.returncode == 0, done.output
    assert "100.00 % on 1 samples" in done.output
