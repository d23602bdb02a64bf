"""The supervisor of one node: where it stands, what it refuses, and that a stop loses nothing."""

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from launch import gather, runner
from launch.hello import Hello, introduce, why_not
from launch.options import parse
from launch.place import Place, first_host, resolve
from launch.runner import command, environment, hostfile, with_ranks
from launch.supervise import ALONE_S, FAREWELL_S, LEASE_S, command_line, main, verdict
from launch.train import PATIENCE_S, refuse
from pipeline import run_folder
from pipeline.errors import EXIT_DATA, EXIT_DONE, EXIT_INTERNAL, EXIT_STOPPED, EXIT_USAGE, ConfigError, LostRankError
from tests.conftest import free_port
from tests.supervised import processes_with, supervise
from tests.test_training import assert_same_result
from tests.training_runs import arguments, read_until

NOTHING = {"nodes": None, "rank": None, "master": None, "port": None, "slots": None}
INDEXED = {"JOB_COMPLETION_INDEX": "1", "CHISPIKE_NODES": "2", "CHISPIKE_MASTER": "train-0.train"}
JOBSET = {"JOB_COMPLETION_INDEX": "1", "CHISPIKE_NODES": "2", "JOBSET_NAME": "js", "REPLICATED_JOB_NAME": "node"}
TRAINER = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "1",
    "PET_MASTER_ADDR": "job-node-0-0.job",
    "PET_MASTER_PORT": "29400",
    "PET_NPROC_PER_NODE": "8",
    "JOB_COMPLETION_INDEX": "1",
}
SLURM = {"SLURM_NNODES": "3", "SLURM_NODEID": "2", "SLURM_JOB_NODELIST": "gpu[07-09]", "SLURM_LOCALID": "0"}
ARGUMENTS = {"nodes": 2, "rank": 1, "master": "a", "port": None, "slots": 4}


@pytest.mark.parametrize(
    ("given", "environ", "place"),
    [
        ({}, {}, (1, 0, "127.0.0.1", 29500, 0)),
        (ARGUMENTS, {}, (2, 1, "a", 29500, 4)),
        ({}, INDEXED, (2, 1, "train-0.train", 29500, 0)),
        ({}, JOBSET, (2, 1, "js-node-0-0.js", 29500, 0)),
        ({}, TRAINER, (2, 1, "job-node-0-0.job", 29400, 8)),
        ({}, {**TRAINER, "PET_NNODES": "2:2", "PET_NPROC_PER_NODE": "auto"}, (2, 1, "job-node-0-0.job", 29400, 0)),
        ({}, SLURM, (3, 2, "gpu07", 29500, 0)),
        ({}, {**SLURM, "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "gpu[08-09]"},
         (2, 1, "gpu08", 29500, 0)),
        ({}, {"SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "gpu1"}, (1, 0, "127.0.0.1", 29500, 0)),
        ({"nodes": 1}, SLURM | {"SLURM_NODEID": "0"}, (1, 0, "127.0.0.1", 29500, 0)),
        ({"master": "b"}, INDEXED, (2, 1, "b", 29500, 0)),
    ],
)  # fmt: skip
def test_the_place_from_every_source(given, environ, place):
    nodes, rank, master, port, slots = place
    expected = Place(nodes=nodes, rank=rank, master=master, port=port, slots=slots)
    assert resolve({**NOTHING, **given}, environ) == expected


@pytest.mark.parametrize(
    ("given", "environ", "message"),
    [
        ({}, {"JOB_COMPLETION_INDEX": "0"}, "the number of nodes is missing beside node-rank;"),
        ({"master": "a"}, {}, "the number of nodes is missing beside master;"),
        ({"nodes": 2, "master": "a"}, {}, "node-rank is missing for 2 nodes"),
        ({"nodes": 2, "rank": 1}, {}, "the master is missing for 2 nodes"),
        ({"nodes": 2, "rank": 2, "master": "a"}, {}, "node-rank among 2 nodes: 2 is not allowed; use 0 to 1"),
        ({"nodes": 0}, {}, "the number of nodes: 0 is not allowed"),
        ({"nodes": 1}, {"JOB_COMPLETION_INDEX": "3"}, "node-rank among 1 nodes: '3' is not allowed; use 0"),
        ({}, {**INDEXED, "CHISPIKE_NODES": "two"}, "the number of nodes: 'two' is not allowed"),
        ({}, {**TRAINER, "PET_NODE_RANK": "0"}, "JOB_COMPLETION_INDEX=1 contradicts PET_NODE_RANK=0; give --node-rank"),
        ({}, {**TRAINER, "CHISPIKE_NODES": "4"}, "CHISPIKE_NODES=4 contradicts PET_NNODES=2; give --nodes"),
        ({}, {**TRAINER, "PET_NNODES": "1:4"}, "PET_NNODES=1:4 is not allowed: a run keeps its number of nodes"),
        ({}, {**TRAINER, "PET_MASTER_PORT": "0"}, "master-port: '0' is not allowed"),
        ({}, {**SLURM, "SLURM_LOCALID": "1"}, "use srun --ntasks-per-node=1"),
        ({}, {**SLURM, "SLURM_JOB_NODELIST": ","}, "the Slurm node list ',' names no node"),
    ],
)
def test_a_contradiction_or_a_missing_part_is_refused_in_one_line(given, environ, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        resolve({**NOTHING, **given}, environ)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[3,7-9],a", "n3"),
        ("r[01-02]n[003-128]-ib", "r01n003-ib"),
        ("gpu-1.cluster", "gpu-1.cluster"),
    ],
)
def test_the_first_host_of_a_slurm_list(nodelist, host):
    assert first_host(nodelist) == host


def test_the_hostfile_is_read_by_deepspeed_as_it_is_meant():
    from deepspeed.launcher.runner import _parse_hostfile

    text = hostfile(Place(nodes=3, rank=1, master="a", port=1, slots=4))
    assert list(_parse_hostfile(text.splitlines()).values()) == [4, 4, 4]


@pytest.mark.parametrize(("nodes", "node"), [(1, "localhost"), (3, "node-1")])
def test_ranks_take_the_gpus_that_the_environment_leaves_them(nodes, node):
    """DeepSpeed's launcher takes CUDA_VISIBLE_DEVICES away and sets it to what it reads here."""
    from deepspeed.launcher.runner import _parse_hostfile, parse_args, parse_inclusion_exclusion

    place = Place(nodes=nodes, rank=nodes // 2, master="a", port=1, slots=2, gpus=(2, 5))
    args = parse_args(command(place, Path("HOSTFILE"), ["--recipe", "digits"])[3:])
    assert (args.num_gpus, args.user_args) == (-1, ["--recipe", "digits"])
    there = {"localhost": 8} if nodes == 1 else _parse_hostfile(hostfile(place).splitlines())
    taken = parse_inclusion_exclusion(there, args.include, args.exclude)
    assert taken[node] == [2, 5]
    assert {host: gpus for host, gpus in taken.items() if host != node} == (
        {} if nodes == 1 else {"node-0": [0, 1], "node-2": [0, 1]}
    )
    assert "CUDA_VISIBLE_DEVICES" not in environment(place, {"CUDA_VISIBLE_DEVICES": "2,5,6"})


def test_hidden_gpus_stay_hidden_and_what_the_launcher_cannot_hide_is_refused(monkeypatch):
    place, config = Place(nodes=1, rank=0, master="a", port=1, slots=2), parse(["--recipe", "digits"])
    assert with_ranks(place, config, {}) == place
    assert with_ranks(place, config, {"CUDA_VISIBLE_DEVICES": "-1"}) == place
    assert environment(place, {"CUDA_VISIBLE_DEVICES": "-1"})["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in environment(place, {})
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES=GPU-8932f937 is not allowed, .* different indices"):
        with_ranks(place, config, {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"})
    monkeypatch.setattr(runner, "count_gpus", lambda: 3)  # this machine may have none
    assert with_ranks(place, config, {"CUDA_VISIBLE_DEVICES": "4,1,0"}).gpus == (4, 1)
    assert with_ranks(replace(place, slots=0), config, {"CUDA_VISIBLE_DEVICES": "4,1,0"}).gpus == (4, 1)
    with pytest.raises(ConfigError, match="--slots 4 is not allowed with CUDA_VISIBLE_DEVICES=4,1,0, which leaves 3"):
        with_ranks(replace(place, slots=4), config, {"CUDA_VISIBLE_DEVICES": "4,1,0"})


def test_a_torch_that_cannot_be_imported_is_one_line_with_its_reason(tmp_path, monkeypatch, capsys):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert main(["--", "--recipe", "digits"]) == EXIT_INTERNAL
    output = capsys.readouterr().err
    assert re.fullmatch(r"error: torch cannot be imported by \S+ \(ImportError: libcudart.+ file\); .+\n", output)


@pytest.mark.parametrize(
    ("ended", "asked", "tries_left", "code"),
    [
        (EXIT_USAGE, False, True, EXIT_USAGE),
        (EXIT_DATA, True, True, EXIT_DATA),
        (EXIT_STOPPED, True, True, EXIT_STOPPED),
        (EXIT_STOPPED, False, False, EXIT_STOPPED),  # another node was asked
        (256 - signal.SIGTERM, True, True, EXIT_STOPPED),  # ended before it had a step to save
        (128 + signal.SIGTERM, True, True, EXIT_INTERNAL),  # asked twice: what it had not saved is lost
        (EXIT_DONE, True, True, EXIT_INTERNAL),
        (EXIT_INTERNAL, True, True, EXIT_INTERNAL),
        (EXIT_INTERNAL, False, True, None),
        (128 + signal.SIGTERM, False, True, None),
        (EXIT_DONE, False, True, None),  # without a result
        (EXIT_INTERNAL, False, False, EXIT_INTERNAL),
    ],
)
def test_what_follows_when_ranks_have_ended_without_a_result(ended, asked, tries_left, code):
    assert verdict(ended, asked=asked, tries_left=tries_left) == code


def test_whoever_waits_for_another_waits_longer_than_that_takes():
    given, _ = command_line(["--", "--recipe", "digits"])
    assert gather.POLL_S < gather.BEAT_S < gather.SILENT_S < gather.LINGER_S < FAREWELL_S
    assert PATIENCE_S < ALONE_S < given.grace
    assert 300 < LEASE_S < given.resolve_timeout  # CephFS takes a dead client's lock away after 300 s


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--slots", "1"], "no recipe: put -- and launch/train.py's options at the end"),
        (["--nods", "2", "--", "--recipe", "digits"], "unrecognized arguments: --nods 2"),
        (["--max-restarts", "-1", "--", "--recipe", "digits"], "--max-restarts -1 is not allowed; use 0 or more"),
        (["--grace", "nan", "--", "--recipe", "digits"], "--grace nan is not allowed"),
        (["--", "--recipe", "digits", "--dry-run"], "--dry-run stands before --"),
        (["--slots", "2", "--", "--recipe", "digits", "--optim.rl", "1"], "--optim.rl is not an option"),
        (["--slots", "3", "--", "--recipe", "digits"], "world_size=3"),
    ],
)
def test_a_mistake_ends_with_64_and_one_line(words, message, capsys):
    assert main(words) == EXIT_USAGE
    output = capsys.readouterr().err
    assert message in output
    assert output.startswith("error: ")
    assert output.count("\n") == 1


def two_nodes(digits: Path, tmp_path: Path, *, slots: str, data: str) -> list[tuple[int, str]]:
    """Exit code and output of two supervisors on this machine; the second has `slots` ranks, and its data at `data`."""
    port, train = str(free_port()), ["--", "--recipe", "digits", "--run_dir", str(tmp_path / "run"), "--data.path"]
    nodes = ["--nodes", "2", "--master", "127.0.0.1", "--master-port", port]
    started = [
        supervise(*nodes, "--node-rank", "0", "--slots", "1", *train, str(digits)),
        supervise(*nodes, "--node-rank", "1", "--slots", slots, *train, data),
    ]
    return [ended(process) for process in started]


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and what it said behind the line that says where its metrics are."""
    output, _ = process.communicate(timeout=120)
    return process.returncode, output.partition("/metrics\n")[2]


def test_nodes_that_do_not_fit_together_all_end_with_the_same_line(digits, tmp_path):
    for code, output in two_nodes(digits, tmp_path, slots="2", data=str(digits)):
        assert code == 64, output
        line = r"error: --slots is 2 on node 1 \(.+\) and 1 on node 0 \(.+\); start every node with the same\n"
        assert re.fullmatch(line, output)


def test_data_that_one_node_lacks_end_all_with_the_reason(digits, tmp_path):
    (first, said), (second, told) = two_nodes(digits, tmp_path, slots="1", data="no")
    assert (first, second) == (EXIT_USAGE, EXIT_USAGE)
    assert said.endswith(f" cannot train: {told.removeprefix('error: ')}")
    assert said.startswith("error: node 1 (")
    assert "no shard set in no/train" in told


def test_a_node_says_that_its_options_are_not_those_of_the_stored_run(digits, tmp_path):
    """So that node 0, whose options are those, does not wait for it in vain."""
    place = Place(nodes=2, rank=1, master="a", port=1, slots=1)
    config = parse(["--recipe", "digits", "--run_dir", str(tmp_path / "run"), "--data.path", str(digits)])
    assert introduce(place, config).problem == ""
    run_folder.write_json(tmp_path / "run/config.json", config.to_dict())
    assert introduce(place, config).problem == ""
    other = introduce(place, replace(config, train=replace(config.train, seed=7)))
    assert other.problem.startswith(f"train.seed=7, but the run in {tmp_path}/run was started with 0;")
    assert other.code == EXIT_USAGE


@pytest.mark.parametrize("refused", ["its options", "its port"])
def test_what_one_node_alone_refuses_ends_the_others_at_once(refused, digits, tmp_path):
    words = ["--recipe", "digits", "--run_dir", str(tmp_path / "run"), "--data.path", str(digits)]
    nodes = ["--nodes", "2", "--slots", "1", "--master", "127.0.0.1", "--master-port", str(free_port())]
    (tmp_path / "run").mkdir()
    run_folder.write_json(tmp_path / "run/config.json", parse(words).to_dict())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = ["--metrics-port", str(taken.getsockname()[1])] if refused == "its port" else []
        more = ["--train.seed", "7"] if refused == "its options" else []
        other = supervise(*nodes, "--node-rank", "0", "--", *words)
        refusing = supervise(*nodes, "--node-rank", "1", *port, "--", *words, *more)
        for process in (other, refusing):
            output, _ = process.communicate(timeout=60)
            assert process.returncode == EXIT_USAGE, output
            assert ("train.seed=7, but the run in" if more else "cannot be opened (Address already in use)") in output


@pytest.mark.parametrize(("local_rank", "waits"), [("1", True), ("0", False)])
def test_only_ranks_beside_rank_0_give_it_time_to_speak(local_rank, waits, monkeypatch, capsys):
    """The signal that ends the wait is there already; who does not wait leaves it where it is."""
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    on_sigterm, end = signal.getsignal(signal.SIGTERM), {signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_BLOCK, end)
    signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
    try:
        assert refuse(LostRankError("another rank is gone"), 1) == EXIT_INTERNAL
        assert signal.sigtimedwait(end, 0) is None if waits else signal.sigtimedwait(end, 0)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, end)
        signal.signal(signal.SIGTERM, on_sigterm)
    assert capsys.readouterr().err == "error on rank 1: another rank is gone\n"


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ([{}], ""),
        ([{"nodes": 4}], "--nodes is 4 on node 1 (b) and 3 on node 0 (a)"),
        ([{"source": "2"}], "code version is 2 on node 1 (b) and 1 on node 0 (a)"),
        ([{"data": "e"}], "data's identity is e on node 1 (b) and d on node 0 (a)"),
        ([{"problem": "no disk"}], "node 1 (b) cannot train: no disk"),
        ([{}, {"host": "c"}], "--node-rank 1 was given to c and to b"),
        ([{"node": 0}], "--node-rank 0 was given to b and to a"),
        ([{"node": 3}], "--node-rank 3 was given to b and to no other"),
    ],
)
def test_why_nodes_cannot_train_together(others, reason):
    own = Hello(node=0, nodes=3, slots=1, source="1", data="d", problem="", host="a")
    assert why_not(own, [replace(own, **{"node": 1, "host": "b", **other}) for other in others]).startswith(reason)
    if not reason:
        assert why_not(own, [replace(own, node=2), replace(own, node=1)]) == ""


@pytest.mark.faults
def test_a_run_folder_that_the_nodes_do_not_share_is_refused(digits, tmp_path):
    port, train = str(free_port()), ["--", "--recipe", "digits", "--data.path", str(digits), "--run_dir"]
    nodes = ["--nodes", "2", "--slots", "1", "--master", "127.0.0.1", "--master-port", port]
    started = [
        supervise(*nodes, "--node-rank", str(rank), *train, str(tmp_path / folder))
        for rank, folder in enumerate(("run", "other"))
    ]
    for process in started:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 64, output
        assert "is not the same folder on node 1" in output


@pytest.mark.faults
def test_data_that_only_the_ranks_of_one_node_find_damaged_end_all_nodes_with_65(digits, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(digits, other)
    for tar in (other / "train").glob("*.tar"):
        tar.unlink()
    (first, said), (second, told) = two_nodes(digits, tmp_path, slots="1", data=str(other))
    assert (first, second) == (EXIT_DATA, EXIT_DATA), said + told
    assert re.search(r"^error: node 1 \(.+\) cannot train: its ranks ended with exit code 65, see there$", said, re.M)
    assert ".tar cannot be opened (No such file or directory)" in told


def test_nodes_that_never_come_are_named(digits, tmp_path):
    words = ["--nodes", "3", "--node-rank", "0", "--master", "127.0.0.1", "--master-port", str(free_port())]
    train = [
        "--slots",
        "1",
        "--resolve-timeout",
        "0.5",
        "--",
        "--recipe",
        "digits",
        "--data.path",
        str(digits),
        "--data.global_batch",
        "96",
    ]
    process = supervise(*words, *train, "--run_dir", str(tmp_path / "run"))
    code, output = ended(process)
    assert code == 70
    assert output == "node 0: after 0.5 s still missing: 2 nodes (1, 2)\n"


def test_a_master_that_does_not_resolve_is_named(digits, tmp_path):
    words = ["--nodes", "2", "--node-rank", "1", "--master", "node-0.invalid", "--slots", "1", "--resolve-timeout", "0"]
    process = supervise(
        *words, "--", "--recipe", "digits", "--data.path", str(digits), "--run_dir", str(tmp_path / "run")
    )
    code, output = ended(process)
    assert code == 70
    assert re.fullmatch(r"node 1: node 0 at node-0.invalid:29500 was not reached within 0 s \(.+\)\n", output)


def test_a_stop_while_it_waits_for_other_nodes(digits, tmp_path):
    """Garbage on the port meanwhile does it no harm."""
    port = free_port()
    words = ["--nodes", "2", "--node-rank", "0", "--master", "127.0.0.1", "--master-port", str(port), "--slots", "1"]
    process = supervise(
        *words, "--", "--recipe", "digits", "--data.path", str(digits), "--run_dir", str(tmp_path / "run")
    )
    mark = tmp_path / "run" / ".node-0"
    while not mark.exists():
        assert process.poll() is None
    for garbage in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\xff" * 5000,
        b"[" * 4000 + b"\n",
        b'{"node": "1"}\n',
        b'{"node": 1}\n[]\n',
        b"",
    ):
        speaking = connected(port)
        speaking.sendall(garbage)
        speaking.close()
    with connected(port) as one_more:
        assert one_more.recv(100) == b'{"chispike": 1}\n'
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == EXIT_STOPPED, output
    assert "stopped on request before the ranks were started" in output
    assert not mark.exists()


def connected(port: int) -> socket.socket:
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=10)
        except ConnectionRefusedError:  # it has written its mark and is about to listen
            continue


def test_a_port_that_is_taken_is_refused(digits, tmp_path):
    with socket.create_server(("", 0)) as holder:
        port = holder.getsockname()[1]
        words = [
            "--slots",
            "2",
            "--master-port",
            str(port),
            "--resolve-timeout",
            "0",
            "--",
            "--recipe",
            "digits",
            "--data.path",
            str(digits),
        ]
        process = supervise(*words, "--run_dir", str(tmp_path / "run"))
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 64
    assert f"error: master-port={port} cannot be opened (Address already in use)" in output


def answer(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_sigterm_saves_and_the_next_start_finishes_as_if_nothing_had_been(digits, straight, tmp_path):
    run_dir = tmp_path / "run"
    words = ["--slots", "2", "--master-port", str(free_port()), "--", *arguments(digits, run_dir)]
    process = supervise(*words)
    _, address = read_until(process, r"metrics at (http://\S+)/metrics")
    assert answer(address[1] + "/healthz") == (200, "ok\n")
    assert answer(address[1] + "/readyz") == (503, "no\n")
    read_until(process, r"^step +6/")
    assert answer(address[1] + "/readyz") == (200, "ok\n")
    status, metrics = answer(address[1] + "/metrics")
    assert status == 200
    assert 'snn_run_restarts_total{node="0",run="run"} 0.0' in metrics
    assert re.search(r'^snn_train_last_step_timestamp_seconds{rank="1",run="run"} ', metrics, re.MULTILINE)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_STOPPED, output
    assert "stopped on request after step" in output
    assert processes_with(str(run_dir)) == []
    again = supervise(*words)
    output, _ = again.communicate(timeout=200)
    assert again.returncode == EXIT_DONE, output
    assert_same_result(run_dir, straight)


def kill_rank(run_dir: Path, local_rank: int) -> None:
    (pid,) = set(processes_with(str(run_dir))) & set(processes_with(f"--local_rank={local_rank}"))
    os.kill(pid, signal.SIGKILL)


@pytest.mark.faults
def test_restarts_are_given_back_by_a_new_checkpoint_and_by_nothing_else(digits, tmp_path):
    run_dir = tmp_path / "run"
    train = [*arguments(digits, run_dir), "--train.epochs", "6", "--train.checkpoint_every", "20"]
    process = supervise("--slots", "2", "--max-restarts", "1", "--master-port", str(free_port()), "--", *train)
    read_until(process, r"^step +7/")
    kill_rank(run_dir, 1)
    read_until(process, r"restart 1 of 1")
    read_until(process, r"^step +45/")  # to save the second checkpoint, after step 40, it has waited for the first
    kill_rank(run_dir, 1)
    read_until(process, r"restart 1 of 1")
    read_until(process, r"^step +(21|41)/")
    kill_rank(run_dir, 1)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == EXIT_INTERNAL, output
    assert "were started again 1 times without a new checkpoint: given up" in output


@pytest.mark.faults
def test_ranks_end_when_their_supervisor_is_killed_and_the_next_one_finishes(digits, straight, tmp_path):
    run_dir = tmp_path / "run"
    words = ["--slots", "2", "--master-port", str(free_port()), "--", *arguments(digits, run_dir)]
    process = supervise(*words)
    read_until(process, r"^step +7/")
    process.kill()
    output, _ = process.communicate(timeout=60)  # until nobody holds its output any more
    assert output.count("the supervisor is gone: leaving at once, without a checkpoint") == 2, output
    again = supervise(*words)
    output, _ = again.communicate(timeout=200)
    assert again.returncode == EXIT_DONE, output
    assert "resumed from the checkpoint after step 5" in output
    assert_same_result(run_dir, straight)
