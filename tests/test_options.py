"""The command line: what it accepts, and what a mistake looks like to the person who made it."""

import dataclasses
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.devices import main, named_gpus, options
from launch.options import field_docs, parse
from pipeline.config import Config
from pipeline.errors import EXIT_USAGE, ConfigError
from pipeline.schedule import Schedule

ROOT = Path(__file__).parent.parent


def test_overrides_change_their_field_and_nothing_else():
    plain = parse(["--recipe", "digits"])
    changed = parse(["--recipe", "digits", "--train.epochs", "2", "--data.flip", "true", "--run_dir", "runs/x"])
    expected = dataclasses.replace(
        plain,
        run_dir="runs/x",
        train=dataclasses.replace(plain.train, epochs=2.0),
        data=dataclasses.replace(plain.data, flip=True),
    )
    assert changed == expected


def test_every_field_is_documented():
    assert "run_dir" in field_docs(Config)
    for section in vars_of(parse(["--recipe", "digits"])):
        if dataclasses.is_dataclass(section):
            documented = field_docs(type(section))
            assert documented.keys() == {field.name for field in dataclasses.fields(section)}
            assert all(len(text) > 10 for text in documented.values())


def vars_of(config: Config) -> list:
    return [getattr(config, field.name) for field in dataclasses.fields(config)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --recipe"),
        (["--recipe"], "argument --recipe: expected one argument; see --help"),
        (["--recipe", "digit"], "invalid choice: 'digit'"),
        (["--recipe", "digits", "--train.epoch", "2"], "--train.epoch is not an option; did you mean --train.epochs?"),
        (["--recipe", "digits", "--model.T", "0"], "model.T=0 is not allowed; use an integer of at least 1"),
        (["--recipe", "digits", "--model.T", "four"], "argument --model.T: invalid int value: 'four'"),
        (["--recipe", "digits", "--train.precision", "fp8"], "train.precision='fp8' is not allowed; use one of"),
        (["--recipe", "digits", "--optim.lr", "nan"], "optim.lr=nan is not allowed; use a number above 0"),
        (["--recipe", "digits", "--data.global_batch", "100"], "use a multiple of data.micro_batch=16"),
        (["--recipe", "digits", "--train.timeout_s", "0"], "train.timeout_s=0.0 is not allowed; use a number from 1"),
        (["--recipe", "digits", "--train.on_nonfinite", "skip(0)"], "use stop, or skip(k) with k of at least 1"),
        (["--recipe", "digits", "--data.flip", "yes"], "invalid true or false value: 'yes'"),
        (
            ["--recipe", "digits", "--metrics.tls_cert", "a.pem"],
            "metrics.tls_key='' is not allowed; use a file together",
        ),
        (["--recipe", "digits", "--metrics.tls_key", "a.key"], "together with metrics.tls_cert, and none without it"),
        (["--recipe", "digits", "--metrics.tls_client_ca", "a.pem"], "use a file only together with metrics.tls_cert"),
        (["--recipe", "digits", "--model.surrogate", "atan"], "chi.indicator='coverage' is undefined"),
    ],
)
def test_a_mistake_is_named(arguments, message):
    with pytest.raises(ConfigError) as caught:
        parse(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_world_size_that_does_not_divide_the_batch_is_refused_with_those_that_do():
    config = parse(["--recipe", "digits"])
    assert [config.accumulation(ranks) for ranks in (1, 2, 4, 8)] == [8, 4, 2, 1]
    with pytest.raises(ConfigError, match="use 1 or 2 or 4 or 8 ranks, or a global batch of 144"):
        config.accumulation(3)
    assert dataclasses.replace(config, data=dataclasses.replace(config.data, global_batch=144)).accumulation(3) == 3


def test_an_evaluation_is_due_once_the_samples_of_its_epochs_are_used():
    digits = parse(["--recipe", "digits"])

    def due(every: float, *, batch: int, samples: int, steps: int) -> list[int]:
        data = dataclasses.replace(digits.data, global_batch=batch, micro_batch=1)
        train = dataclasses.replace(digits.train, eval_every_epochs=every)
        config = dataclasses.replace(digits, data=data, train=train)
        return [step for step in range(1, steps + 1) if Schedule(config, samples).evaluates(step)]

    assert due(1, batch=30, samples=100, steps=14) == [4, 7, 10, 14]
    assert due(0.1, batch=10, samples=100, steps=3) == [1, 2, 3]
    assert due(0.5, batch=30, samples=100, steps=10) == [2, 4, 5, 7, 9, 10]
    assert due(0.1, batch=30, samples=100, steps=3) == [1, 2, 3], "more often than by step is not"
    assert due(0, batch=30, samples=100, steps=20) == []


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch/train.py"), *arguments], capture_output=True, text=True, cwd=cwd, timeout=60
    )


def assert_one_clear_line(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 64, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def test_a_missing_shard_folder_ends_with_one_line_and_64(tmp_path):
    done = run("--recipe", "digits", "--data.path", str(tmp_path / "nowhere"))
    assert_one_clear_line(done, "no shard set in", "nowhere", "python -m data_prep")


def test_an_unknown_arch_ends_with_one_line_and_64(tmp_path):
    assert_one_clear_line(run("--recipe", "digits", "--model.arch", "resnet"), "model.arch='resnet'", "sew_tiny")


def test_a_taken_port_ends_with_one_line_and_64(tmp_path, digits):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        arguments = ("--recipe", "digits", "--data.path", str(digits), "--run_dir", str(tmp_path / "run"))
        done = run(*arguments, "--metrics.port", port)
    assert_one_clear_line(done, f"metrics.port={port}", "Address already in use", "0 for a free one")


def test_a_certificate_that_cannot_be_read_ends_with_one_line_and_64(tmp_path, digits):
    arguments = ("--recipe", "digits", "--data.path", str(digits), "--run_dir", str(tmp_path / "run"))
    done = run(*arguments, "--metrics.port", "0", "--metrics.tls_cert", "/nowhere", "--metrics.tls_key", "/nowhere")
    assert_one_clear_line(done, "metrics.tls_cert='/nowhere'", "No such file", "files in PEM form")


def test_help_names_the_recipes_and_every_field():
    done = run("--help")
    assert done.returncode == 0
    assert "digits" in done.stdout
    for section in vars_of(parse(["--recipe", "digits"])):
        if dataclasses.is_dataclass(section):
            for field in dataclasses.fields(section):
                assert f".{field.name} " in done.stdout


def test_launcher_options_for_a_machine(capsys):
    assert options("digits", 0) == "--num_accelerators 2"
    assert options("digits", 8) == "--num_gpus 8"
    assert options("digits", 3) == "--num_gpus 2"
    assert "use 2 of 3 GPUs" in capsys.readouterr().err
    assert options("digits", 2, (5, 7)) == "--include localhost:5,7"
    assert options("digits", 3, (4, 5, 7)) == "--include localhost:4,5"


def test_an_unknown_recipe_is_one_line_and_make_goes_no_further(capsys):
    assert main(["digts"]) == EXIT_USAGE
    line = capsys.readouterr().err
    assert line.startswith("error: recipe 'digts' is not allowed; use one of cifar10")
    assert line.count("\n") == 1
    for recipe in ("digits", "cifar10"):
        planned = subprocess.run(["make", "-n", "train", f"RECIPE={recipe}"], cwd=ROOT, capture_output=True, text=True)
        (training,) = [line for line in planned.stdout.splitlines() if "launch/train.py" in line]
        stopped = training.replace(".venv/bin/python -m launch.devices", "false").replace(".venv/bin/deepspeed", "echo")
        assert subprocess.run(["sh", "-c", stopped], capture_output=True).stdout == b""
        assert ("data_prep digits" in planned.stdout) == (recipe == "digits")  # others have data of their own


@pytest.mark.parametrize(
    ("mask", "gpus"),
    [(None, None), ("", ()), ("-1", ()), ("0", (0,)), ("2,3", (2, 3)), (" 7, 1", (7, 1)), ("1,-1,2", (1,))],
)
def test_which_gpus_the_environment_leaves(mask, gpus):
    assert named_gpus({} if mask is None else {"CUDA_VISIBLE_DEVICES": mask}) == gpus


@pytest.mark.parametrize("mask", ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "MIG-GPU-8932f937/1/2", "0,0", "all"])
def test_gpus_that_deepspeeds_launcher_cannot_name_are_refused(mask):
    with pytest.raises(ConfigError, match=r"^CUDA_VISIBLE_DEVICES=.+ is not allowed, since .+; use different indices"):
        named_gpus({"CUDA_VISIBLE_DEVICES": mask})
