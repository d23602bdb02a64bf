"""A run's config.json: a run resumes from it, a configuration starts from it, and what does not fit is named."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from launch.options import command, parse
from launch.supervise import main as supervise
from pipeline.config import Config, config_json
from pipeline.errors import ConfigError
from pipeline.run_dir import run_folder
from tests.conftest import ROOT


def stored(folder: Path, *arguments: str) -> Config:
    """A run's folder as it is once the run has begun."""
    config = parse(["--recipe", "digits", "--run_dir", str(folder), *arguments])
    run_folder.admit(config, 2)
    run_folder.describe(config, data_identity="", classes=(), layers=(), num_parameters=0, world_size=2)
    return config


def rewritten(folder: Path, change) -> None:
    """Its config.json with a change."""
    document = json.loads((folder / "config.json").read_text())
    change(document)
    (folder / "config.json").write_text(json.dumps(document))


def message(*arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse([str(word) for word in arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_goes_on_by_its_folder_alone_wherever_it_lies(tmp_path):
    config = stored(tmp_path / "old", "--optim.lr", "0.25", "--optim.schedule", "step", "--optim.milestones", "10,20")
    shutil.move(tmp_path / "old", tmp_path / "new")
    here = dataclasses.replace(config, run_dir=str(tmp_path / "new"))
    assert parse(["--resume", str(tmp_path / "new")]) == here
    assert parse(["--resume", f"{tmp_path}/new/"]) == here
    assert command(["--resume", str(tmp_path / "new"), "--dry-run", "4"]) == (here, 4)
    free = parse(["--resume", str(tmp_path / "new"), "--train.log_every", "3", "--data.path", "elsewhere"])
    assert (free.train.log_every, free.data.path, free.optim) == (3, "elsewhere", config.optim)
    assert run_folder.admit(free, 2) is None
    step = tmp_path / "new" / "checkpoints" / "step-00000005"
    assert f"there is no run (no config.json in it); did you mean --resume {tmp_path}/new?" in message("--resume", step)
    assert "names the run's folder: leave --run_dir out" in message("--resume", tmp_path / "new", "--run_dir", "x")


def test_everything_that_differs_from_the_stored_run_is_told_at_once(tmp_path):
    stored(tmp_path)
    told = message("--resume", tmp_path, "--optim.lr", "0.2", "--model.T", "8", "--train.log_every", "1")
    assert told.startswith(
        f"model.T=8, optim.lr=0.2, but the run in {tmp_path} was started with model.T=4, optim.lr=0.4; use those values"
    )
    assert "log_every" not in told
    assert f"--resume {tmp_path}" in told
    assert f"another --run_dir, from the weights and widths of this one with --init-from {tmp_path}" in told
    with pytest.raises(ConfigError, match=r"^chi\.eta=0\.1, train\.seed=3, but the run"):
        run_folder.admit(
            parse(["--recipe", "digits", "--run_dir", str(tmp_path), "--train.seed", "3", "--chi.eta", "0.1"]), 2
        )


def test_a_configuration_comes_from_a_file_with_overrides(tmp_path):
    config = stored(tmp_path / "a", "--chi.eta", "0.25")
    for file in (tmp_path / "a" / "config.json", tmp_path / "a"):
        got = parse(["--config", str(file), "--run_dir", "runs/b", "--optim.lr", "0.2"])
        optim = dataclasses.replace(config.optim, lr=0.2)
        assert got == dataclasses.replace(config, run_dir="runs/b", optim=optim)


def test_a_configuration_of_another_version_is_refused_by_the_names_of_its_keys(tmp_path):
    stored(tmp_path)

    def age(document: dict) -> None:
        document["chi"]["slope"] = 1
        document["older"] = {"a": 1}
        del document["optim"]["clip"], document["metrics"]["port"]

    rewritten(tmp_path, age)
    keys = "it has chi.slope, older, which this version does not know and it lacks metrics.port, optim.clip"
    for source in ("--resume", "--config"):
        assert keys in message(source, tmp_path)
    assert "go on with the version that wrote it" in message("--resume", tmp_path)
    assert "remove what is not known and add what is missing" in message("--config", tmp_path)
    with pytest.raises(
        ConfigError, match=r"is of another version: it has chi\.slope, older, .*; use the version that wrote"
    ):
        run_folder.read(tmp_path)
    with pytest.raises(ConfigError, match=r"of another version: .* and it lacks optim\.clip; go on with the version"):
        run_folder.admit(parse(["--recipe", "digits", "--run_dir", str(tmp_path)]), 2)
    rewritten(tmp_path, lambda document: (document.pop("older"), document["chi"].pop("slope")))
    assert parse(["--config", str(tmp_path), "--optim.clip", "1", "--metrics.port", "0"]).optim.clip == 1
    rewritten(tmp_path, lambda document: document["optim"].update(clip=0.0))
    assert parse(["--resume", str(tmp_path), "--metrics.port", "0"]).metrics.port == 0, "it changes nothing computed"
    assert run_folder.read(tmp_path).config.metrics.port == 9464


def test_a_run_of_before_augmentation_and_event_data_goes_on(tmp_path):
    config = stored(tmp_path)

    def age(document: dict) -> None:
        for name in config_json.ADDED["data"]:
            del document["data"][name]

    rewritten(tmp_path, age)
    assert parse(["--resume", str(tmp_path)]) == config
    assert parse(["--config", str(tmp_path), "--run_dir", str(tmp_path)]) == config
    assert run_folder.admit(config, 2) is None
    assert "mixup" in message("--resume", tmp_path, "--data.mixup", "0.2")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is not JSON (Expecting value"),
        ("[" * 100_000, "is not JSON (maximum recursion depth"),
        ("[1]", "is not a configuration, which is a JSON object with sections"),
        ('{"data": 3}', "data=3 is not allowed; use a JSON object"),
        ('{"a": 1}', "it has a, which this version does not know and it lacks chi.calibrate, "),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, text, told):
    (tmp_path / "config.json").write_text(text)
    for source in ("--config", "--resume"):
        assert told in message(source, tmp_path)


def test_a_value_in_a_file_that_is_not_allowed_is_told_with_the_file(tmp_path):
    stored(tmp_path)
    rewritten(tmp_path, lambda document: document["optim"].update(lr="fast"))
    assert message("--config", tmp_path) == f"{tmp_path}/config.json: optim.lr='fast' is not allowed; use a number"
    assert (
        message("--config", tmp_path, "--optim.lr", "0")
        == "optim.lr=0.0 is not allowed; use a number above 0, and finite"
    )
    with pytest.raises(ConfigError, match=r"config\.json: optim\.lr='fast' is not allowed"):
        run_folder.read(tmp_path)


def test_a_supervisor_shows_what_goes_on(tmp_path, capfd):
    stored(tmp_path, "--optim.lr", "0.25")
    assert supervise(["--slots", "2", "--dry-run", "--", "--resume", str(tmp_path)]) == 0
    shown = capfd.readouterr().out
    assert f"launch/train.py --resume {tmp_path}" in shown
    assert "  optim.lr = 0.25" in shown


def test_the_page_of_options_names_all_that_may_change_when_a_run_goes_on():
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    for name in run_folder.FREE - {"run_dir"}:
        group = "metrics.*" if name.startswith("metrics.") else "data.cache_*"
        assert f"`{name}`" in page or (name.startswith(group[:-1]) and f"`{group}`" in page), name
