"""Bad data under two real ranks: all stop at the same step, with the code of bad data and the whole list."""

from tests.conftest import launch
from tests.data_sets import drawn_jpeg, write_set

BAD = {3: "label out of range", 40: "truncated", 77: "undecodable", 101: "truncated"}


def test_both_ranks_stop_at_the_same_step_with_65_and_the_list(tmp_path):
    images = [drawn_jpeg(n, 16, 16) for n in range(128)]
    images[40], images[101] = images[40][:-9], images[101][:-9]
    images[77] = b"\xff\xd8" + bytes(200) + b"\xff\xd9"
    write_set(tmp_path / "data/train", images, per_shard=32, labels={3: -1})
    write_set(tmp_path / "data/val", images[:16], per_shard=8)
    settings = {
        "--recipe": "digits",
        "--run_dir": tmp_path / "run",
        "--data.path": tmp_path / "data",
        "--data.global_batch": 64,
        "--data.max_bad_ratio": 0.03,  # three of an epoch's 128 pass, the fourth does not
        "--train.epochs": 3,
        "--metrics.port": 0,
    }
    done = launch("launch/train.py", *(str(word) for pair in settings.items() for word in pair))
    assert done.returncode == 65, done.output
    refusal = next(line for line in done.output.splitlines() if "samples were bad" in line)
    assert "4 of 128 samples were bad, more than data.max_bad_ratio=0.03" in refusal  # after step 2 of both ranks
    for number, reason in BAD.items():
        name = f"train-{number // 32:06d}.tar:{number:06d}.jpg"
        assert f"{name} ({reason})" in refusal  # also what the other rank met
        assert f"bad sample {name}: {reason}; train-" in done.output
    assert "Traceback" not in done.output
