"""How the nodes of a job meet, and what each of them says when they cannot train together."""

import os
import re
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from launch.cluster.handshake import Hello, introduce, unshared, why_not
from launch.cluster.placement import Placement
from launch.options import parse
from pipeline.errors import EXIT_DATA, EXIT_INTERNAL, EXIT_STOPPED, EXIT_USAGE
from pipeline.run_dir import run_folder
from tests.conftest import ROOT, free_port
from tests.support.lost_storage import Lost
from tests.support.supervised import ended, supervise


def two_nodes(digits: Path, tmp_path: Path, *, slots: str, data: str) -> list[tuple[int, str]]:
    """Exit code and output of two supervisors on this machine; the second has `slots` ranks, and its data at `data`."""
    port, train = str(free_port()), ["--", "--recipe", "digits", "--run_dir", str(tmp_path / "run"), "--data.path"]
    nodes = ["--nodes", "2", "--master", "127.0.0.1", "--master-port", port]
    started = [
        supervise(*nodes, "--node-rank", "0", "--slots", "1", *train, str(digits)),
        supervise(*nodes, "--node-rank", "1", "--slots", slots, *train, data),
    ]
    return [ended(process) for process in started]


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
    """Node 0, which has the right options, must not wait for this node in vain."""
    place = Placement(nodes=2, rank=1, master="a", port=1, slots=1)
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


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        ([{}], ""),
        ([{"nodes": 4}], "--nodes is 4 on node 1 (b) and 3 on node 0 (a)"),
        ([{"source": "2"}], "code version is 2 on node 1 (b) and 1 on node 0 (a)"),
        ([{"data": "e"}], "data's identity is e on node 1 (b) and d on node 0 (a)"),
        ([{"network": "n"}], "the code of model.arch is n on node 1 (b) and none on node 0 (a)"),
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
        os.truncate(tar, 0)  # a missing one would be found before the ranks start
    (first, said), (second, told) = two_nodes(digits, tmp_path, slots="1", data=str(other))
    assert (first, second) == (EXIT_DATA, EXIT_DATA), said + told
    assert re.search(r"^error: node 1 \(.+\) cannot train: its ranks ended with exit code 65, see there$", said, re.M)
    assert re.search(r"error on rank 1: .+\.tar:.+ is unreadable, and so are all that could stand in for it", told)


def test_a_node_that_gives_up_tells_the_others_at_once(digits, tmp_path):
    """Node 1 has no restarts left when its ranks die, node 0 has."""
    breaking = tmp_path / "breaking"
    breaking.mkdir()
    (breaking / "deepspeed.py").write_text("raise SystemExit('this installation is broken')\n")
    train = ["--", "--recipe", "digits", "--run_dir", str(tmp_path / "run"), "--data.path", str(digits)]
    nodes = ["--nodes", "2", "--slots", "1", "--master", "127.0.0.1", "--master-port", str(free_port())]
    jobs = [
        supervise(*nodes, "--node-rank", str(rank), "--max-restarts", restarts, *train, PYTHONPATH=f"{breaking}:{ROOT}")
        for rank, restarts in enumerate("50")
    ]
    outputs = [process.communicate(timeout=60)[0] for process in jobs]
    assert [process.returncode for process in jobs] == [EXIT_INTERNAL, EXIT_INTERNAL], outputs
    assert "node 1: the ranks ended (exit code 1) and were started again 0 times without a new" in outputs[1]
    assert re.search(
        r"^error: node 1 \(.+\) cannot train: the ranks ended \(exit code 1\) and were started again 0 times without a "
        r"new checkpoint: given up$",
        outputs[0],
        re.M,
    ), outputs[0]


def test_a_run_folder_whose_storage_is_lost_before_the_nodes_have_met_is_another_matter_than_another_folder(tmp_path):
    own = Hello(node=0, nodes=2, slots=1, source="1", data="d", problem="", host="a")
    (tmp_path / ".node-1").write_text("token")
    other, lost = replace(own, node=1, token="token"), Lost(tmp_path)
    try:
        lost.go()
        with pytest.raises(OSError, match="not connected"):
            unshared([other], tmp_path)
        lost.come_back()
        assert unshared([other], tmp_path) == ""
    finally:
        lost.come_back()


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
