"""A user's own DeepSpeed JSON: what passes, what is refused and with which words, and that a run really uses it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launch.options import parse
from pipeline.engine.deepspeed_settings import deepspeed_settings
from pipeline.errors import ConfigError
from tests.conftest import ROOT

PLAIN = ["--recipe", "digits", "--train.precision", "bf16"]


def settings(tmp_path: Path, document: object, *options: str) -> dict:
    path = tmp_path / "deepspeed.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    config = parse([*PLAIN, "--deepspeed_config", str(path), *options])
    return deepspeed_settings(config, 2, 1000)


def test_what_shows_or_speeds_up_a_run_is_merged_and_the_rest_stays(tmp_path):
    plain = deepspeed_settings(parse(PLAIN), 2, 1000)
    theirs = {
        "wall_clock_breakdown": True,
        "steps_per_print": 10,
        "comms_logger": {"enabled": True, "verbose": False},
        "csv_monitor": {"enabled": True, "output_path": "x"},
        "zero_optimization": {"stage3_prefetch_bucket_size": 1000, "stage3_max_live_parameters": "auto"},
    }
    got = settings(tmp_path, theirs)
    zero = {**plain["zero_optimization"], "stage3_prefetch_bucket_size": 1000}
    assert got == {**plain, **theirs, "zero_optimization": zero}


def test_what_says_the_same_as_ours_passes(tmp_path):
    same = {
        "train_batch_size": 128,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 0.0,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False, "immediate_grad_update": True},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
        "zero_optimization": {"stage": 1, "overlap_comm": False, "offload_optimizer": {"device": "none"}},
    }
    assert settings(tmp_path, same) == deepspeed_settings(parse(PLAIN), 2, 1000)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (
            {"train_batch_size": 256},
            "train_batch_size=256 is not allowed: use --data.global_batch; leave it out of the",
        ),
        (
            {"train_micro_batch_size_per_gpu": 8},
            "train_micro_batch_size_per_gpu=8 is not allowed: use --data.micro_bat",
        ),
        ({"gradient_accumulation_steps": 1}, "gradient_accumulation_steps=1 is not allowed: it follows from"),
        ({"gradient_clipping": 1.0}, "gradient_clipping=1.0 is not allowed: use --optim.clip"),
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage=2 is not allowed: use --train.zero_stage"),
        ({"zero_optimization": 2}, "zero_optimization=2 is not allowed"),
        ({"zero_optimization": {"reduce_scatter": False}}, "zero_optimization.reduce_scatter=False is not allowed: χ"),
        ({"zero_optimization": {"reduce_bucket_size": 5e8}}, "reduce_bucket_size=500000000.0 is not allowed: χ needs"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "offload_optimizer={'device': 'cpu'} is not"),
        ({"bf16": {"enabled": True}}, "bf16={'enabled': True} is not allowed: use --train.precision bf16"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "is not allowed: use --train.precision fp16"),
        (
            {"torch_autocast": {"dtype": "float16"}},
            "torch_autocast.dtype='float16' is not allowed: use --train.precision",
        ),
        ({"optimizer": {"type": "Adam"}}, "optimizer={'type': 'Adam'} is not allowed: use --optim.name"),
        ({"scheduler": {"type": "WarmupLR"}}, "is not allowed: use --optim.schedule"),
        ({"elasticity": {"enabled": True}}, "is not allowed: stop the run and start it again"),
        ({"compression_training": {"weight_quantization": {}}}, "it is not known to leave the run's results alone"),
        ({"comet": {"enabled": True}}, "comet needs comet_ml, which is not installed; install it, or leave comet out"),
        ("{", "is not JSON (Expecting property name"),
        ("[1]", "is not a JSON object but [1]"),
    ],
)
def test_what_contradicts_is_refused_by_name(document, said, tmp_path):
    with pytest.raises(ConfigError) as refusal:
        settings(tmp_path, document)
    assert str(refusal.value).startswith(f"deepspeed_config='{tmp_path}/deepspeed.json'")
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_there_ends_the_command_with_one_line(tmp_path, digits):
    words = ["--recipe", "digits", "--data.path", str(digits), "--run_dir", str(tmp_path / "run")]
    command = [sys.executable, "launch/train.py", *words, "--deepspeed_config", str(tmp_path / "none.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 64
    assert done.stderr == (
        f"error: deepspeed_config='{tmp_path}/none.json' cannot be read (No such file or directory); name a JSON file\n"
    )
