"""The command line: what it accepts, and what a mistake looks like to the person who made it."""

import dataclasses
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.devices import named_gpus
from launch.dry_run import report
from launch.near_misses import ALIASES, answer
from launch.options import field_docs, option_names, parse
from launch.recipes import RECIPES
from launch.train import main as train
from pipeline.config import Config
from pipeline.data.manifest import Manifest
from pipeline.engine.schedule import Schedule
from pipeline.errors import EXIT_DATA, EXIT_USAGE, ConfigError
from pipeline.snn.networks.archs import ARCHS

ROOT = Path(__file__).parents[2]


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
        (
            [],
            "nothing to train; give one of --recipe NAME, --config FILE and --resume RUN (recipes: cifar10, ",
        ),
        (
            ["--recipe", "digits", "--resume", "runs/a"],
            "--recipe and --resume exclude each other; give one of --recipe",
        ),
        (["--config", "c.json", "--resume", "runs/a"], "--config and --resume exclude each other; give one of"),
        (
            ["--config", "/nowhere/c.json"],
            "--config /nowhere/c.json: there is no such file; name the config.json of a run",
        ),
        (["--resume", "/nowhere"], "--resume /nowhere: there is no run (no config.json in it); name a run's folder"),
        (["--resume", "a" * 5000], "cannot be read (File name too long)"),
        (["digits"], "'digits' stands alone; did you mean --recipe digits?"),
        (["--recipe", "digits", "2"], "'2' stands alone; a value follows an option, as in --train.epochs 2"),
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


NEAREST = """
    --lr --learning-rate --learning_rate --base-lr --optimizer.lr --training.lr: --optim.lr
    --data.batch_size --batch-size -b --bs --gradient_accumulation_steps: --data.global_batch or --data.micro_batch
    --per_device_train_batch_size --training.local_batch_size --train_micro_batch_size_per_gpu: --data.micro_batch
    --epochs --num-train-epochs --max_steps --training.steps --train.epoch --trian.epochs: --train.epochs
    --model --arch -a --model.name --modle.arch --backbone --model_name_or_path: --model.arch
    --num-workers -j --workers --dataloader_num_workers: --data.threads
    --amp --fp16 --bf16 --mixed_precision --dtype --precison: --train.precision
    --seed --training.seed --random-seed --initial-seed: --train.seed
    --output-dir --output_dir --out-dir --logging_dir --save-dir --job.dump_folder --rundir: --run_dir
    --resume-from --resume_from_checkpoint --auto-resume --ckpt-path --resme: --resume
    --checkpoint: --resume or --model.checkpoint
    --pretrained --finetune --initial-checkpoint --initfrom: --init_from
    --weight_decay --weight-decay --wd: --optim.weight_decay
    --T -T --time-steps --timesteps --time_step --Model.t: --model.T
    --zero --zero-stage --zero_optimization.stage: --train.zero_stage
    --opt --optimizer: --optim.name
    --sched --lr_scheduler_type: --optim.schedule
    --recount --data.recount --remode: --data.reprob
    --warmup --warmup-epochs --lr-warmup-epochs --lr_scheduler.warmup_steps: --optim.warmup_epochs
    --clip-grad --max_grad_norm --training.max_norm: --optim.clip
    --smoothing --label-smoothing: --train.label_smoothing
    --model-ema --model-ema-decay: --train.ema_decay
    --log-interval --logging_steps --print-freq --metrics.log_freq: --train.log_every
    --save_steps --checkpoint.interval: --train.checkpoint_every
    --sync-bn --sync-batchnorm --sync_batch_norm: --train.sync_bn
    --gradient_checkpointing --grad-checkpointing: --model.checkpoint
    --data --data-dir --data-path --dataset: --data.path
    --img-size --input-size --image-size --data.image-size: --data.image_size
    --hflip --no-flip --data.flips: --data.flip
    --deepspeed --deepspeed.config --ds-config: --deepspeed_config
    --v-threshold --vth: --model.v_th
    --surrogate-function --surrogate_grad: --model.surrogate
    --cnf --connect_f: --model.connect
    --sgd_momentum --momentun: --optim.momentum
    --dryrun --dry_run: --dry-run
    --cfg --config-file: --config
    --preset --recepie: --recipe
    --report_to: --metrics.tensorboard or --metrics.wandb or --metrics.mlflow
"""


@pytest.mark.parametrize("line", NEAREST.strip().splitlines())
def test_an_unknown_option_is_answered_with_the_one_that_was_meant(line):
    words, _, meant = line.rpartition(": ")
    first, *others = words.split()
    for arguments in ([first, "1"], ["--recipe", "digits", f"{first}=1"]):
        with pytest.raises(ConfigError) as caught:
            parse(arguments)
        assert str(caught.value) == f"{first} is not an option; did you mean {meant}?"
    for word in others:
        assert answer(word, option_names()) == meant, word


def test_every_unknown_option_is_named_and_none_is_answered_with_help():
    with pytest.raises(ConfigError) as caught:
        parse(["--recipe", "digits", "--lr", "-1", "--xyzzy", "2", "--hepl", "--gpus", "2", "--num-classes", "10"])
    said = str(caught.value)
    assert said.startswith(
        "--lr is not an option; did you mean --optim.lr? · --xyzzy is not an option; nothing is like it"
    )
    assert "--gpus is not an option; the launcher takes it, in front of launch/train.py" in said
    assert "--num-classes is not an option; the data say the number of classes" in said
    assert "--hepl is not an option" in said
    assert "--help" not in said
    assert "\n" not in said


def test_every_name_of_others_stands_for_an_option_that_there_is():
    assert {field for fields in ALIASES.values() for field in fields} <= set(option_names())
    assert len(ALIASES) > 300


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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("WORLD_SIZE", value) for value in ("many", "0", "-1", "1e3", "", "٣", "9" * 30)),
        ("RANK", "first"),
        ("LOCAL_SIZE", "0"),
        ("MASTER_PORT", "99999"),
    ],
)
def test_a_launchers_variable_that_is_no_number_is_one_line(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    assert train(["--recipe", "digits"]) == EXIT_USAGE
    told = capsys.readouterr().err
    assert told.startswith(f"error: {name}={value!r} in the environment is not allowed; a launcher sets a number from ")
    assert told.count("\n") == 1


def test_a_rank_beyond_their_number_is_one_line(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(["--recipe", "digits"]) == EXIT_USAGE
    assert "RANK=2 in the environment is not allowed with WORLD_SIZE=2" in capsys.readouterr().err


@pytest.mark.parametrize("empty", ["train", "val"])
def test_a_set_without_samples_is_one_line(empty, digits, tmp_path, capsys):
    shutil.copytree(digits, tmp_path / "data")
    manifest = dataclasses.replace(Manifest.load(digits / empty), shards=())
    (tmp_path / "data" / empty / "manifest.json").write_text(manifest.to_json())
    words = ["--recipe", "digits", "--data.path", str(tmp_path / "data"), "--run_dir", str(tmp_path / "run")]
    assert train(words) == EXIT_DATA
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path}/data/{empty}/manifest.json has no samples; make the shards again")
    assert told.count("\n") == 1
    if empty == "train":
        with pytest.raises(ConfigError, match="its split train holds no samples"):
            report(parse(words), 2)


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
    for name, recipe in RECIPES.items():
        _, _, said = done.stdout.partition(f"\n  {name}\n")
        made = re.search(r"python -m data_prep [^\n]*(\\\n[^\n]*)? (data/\w+)\n|the data of (\w+)", said)
        assert made
        assert (made[2] or RECIPES[made[3]]().data.path) == recipe().data.path
    for arch in ARCHS:
        assert re.search(rf"\b{arch}\b", done.stdout)
    for section in vars_of(parse(["--recipe", "digits"])):
        if dataclasses.is_dataclass(section):
            for field in dataclasses.fields(section):
                assert f".{field.name} " in done.stdout


@pytest.mark.parametrize("recipe", ["digits", "cifar10"])
def test_make_packs_the_digits_alone_and_trains_any_recipe_with_any_options(recipe, tmp_path):
    """In a folder that holds nothing else, so that data/ and runs/ of the checkout do not count."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    command = ["make", "-n", "train", f"RECIPE={recipe}", "ARGS=--train.epochs 2"]
    planned = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert f".venv/bin/python -m launch.local --recipe {recipe} --train.epochs 2\n" in planned
    assert ("data_prep digits" in planned) == (recipe == "digits")  # others have data of their own


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
