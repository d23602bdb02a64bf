"""Where a node stands in its job, and which ranks it starts on which GPUs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from launch.cluster import launcher
from launch.cluster.launcher import command, environment, hostfile, with_ranks
from launch.cluster.placement import Placement, first_host, resolve
from launch.options import parse
from launch.supervise import main
from pipeline.errors import EXIT_INTERNAL, ConfigError

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
    expected = Placement(nodes=nodes, rank=rank, master=master, port=port, slots=slots)
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
    ("master", "host", "port"),
    [
        ("node-0", "node-0", 29500),
        ("node_0.cluster.local.", "node_0.cluster.local.", 29500),
        ("10.0.0.1", "10.0.0.1", 29500),
        ("node-0:4000", "node-0", 4000),
        ("10.0.0.1:4000", "10.0.0.1", 4000),
        ("::1", "::1", 29500),
        ("fe80::1%eth0", "fe80::1%eth0", 29500),
        ("[::1]", "::1", 29500),
        ("[fd00::1]:4000", "fd00::1", 4000),
    ],
)
def test_the_forms_of_a_master(master, host, port):
    place = resolve({**NOTHING, "nodes": 2, "rank": 1, "master": master}, {})
    assert (place.master, place.port) == (host, port)
    assert resolve({**NOTHING, "nodes": 2, "rank": 1}, {"CHISPIKE_MASTER": master}).master == host


@pytest.mark.parametrize(
    "master",
    ["user@node-0", "tcp://node-0:1", "ssh://u@n", "node 0", "", "node-0:", ":4000", "node-0:x", "[node-0]", "[::1",
     "-o", "node-0/", "1::2::3", "[10.0.0.1]", "a,b", "node-0\n", ".node", "näme"],
)  # fmt: skip
def test_what_names_no_host_is_refused_at_once(master):
    with pytest.raises(ConfigError, match=r"^master=.* is not allowed: the nodes meet by TCP") as refused:
        resolve({**NOTHING, "nodes": 2, "rank": 1, "master": master}, {})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("master", "port", "message"), [("a:0", None, "the port of the master"), ("a:1", 2, "give one")]
)
def test_a_port_beside_the_master_is_one_and_possible(master, port, message):
    with pytest.raises(ConfigError, match=message):
        resolve({**NOTHING, "nodes": 2, "rank": 1, "master": master, "port": port}, {})
    same = resolve({**NOTHING, "nodes": 2, "rank": 1, "master": "a:2", "port": 2}, {})
    assert (same.master, same.port) == ("a", 2)


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

    text = hostfile(Placement(nodes=3, rank=1, master="a", port=1, slots=4))
    assert list(_parse_hostfile(text.splitlines()).values()) == [4, 4, 4]


@pytest.mark.parametrize(("nodes", "node"), [(1, "localhost"), (3, "node-1")])
def test_ranks_take_the_gpus_that_the_environment_leaves_them(nodes, node):
    """DeepSpeed's launcher removes CUDA_VISIBLE_DEVICES and sets it by what it reads here."""
    from deepspeed.launcher.runner import _parse_hostfile, parse_args, parse_inclusion_exclusion

    place = Placement(nodes=nodes, rank=nodes // 2, master="a", port=1, slots=2, gpus=(2, 5))
    args = parse_args(command(place, Path("HOSTFILE"), ["--recipe", "digits"])[3:])
    assert (args.num_gpus, args.user_args) == (-1, ["--recipe", "digits"])
    there = {"localhost": 8} if nodes == 1 else _parse_hostfile(hostfile(place).splitlines())
    taken = parse_inclusion_exclusion(there, args.include, args.exclude)
    assert taken[node] == [2, 5]
    assert {host: gpus for host, gpus in taken.items() if host != node} == (
        {} if nodes == 1 else {"node-0": [0, 1], "node-2": [0, 1]}
    )
    assert "CUDA_VISIBLE_DEVICES" not in environment(place, {"CUDA_VISIBLE_DEVICES": "2,5,6"})


def test_hidden_gpus_stay_hidden_and_what_the_launcher_cannot_hide_is_refused(monkeypatch, capsys):
    place, config = Placement(nodes=1, rank=0, master="a", port=1, slots=2), parse(["--recipe", "digits"])
    cpu = {"DS_ACCELERATOR": "cpu"}
    assert with_ranks(place, config, cpu) == with_ranks(place, config, cpu | {"CUDA_VISIBLE_DEVICES": "-1"}) == place
    assert environment(place, {"CUDA_VISIBLE_DEVICES": "-1"})["DS_ACCELERATOR"] == "cpu"
    assert "DS_ACCELERATOR" not in environment(place, {})
    monkeypatch.setattr(launcher, "count_gpus", lambda: 0)
    monkeypatch.setattr(launcher, "NVIDIA", Path("/nowhere"))
    for slots in (0, 2):  # else DeepSpeed would warn of it in every process
        found = with_ranks(replace(place, slots=slots), config, {})
        assert (found.slots, environment(found, {})["DS_ACCELERATOR"]) == (2, "cpu")
    with pytest.raises(ConfigError, match=r"CUDA_VISIBLE_DEVICES=GPU-8932f937 is not allowed, .* different indices"):
        with_ranks(place, config, {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"})
    monkeypatch.setattr(launcher, "count_gpus", lambda: 3)  # this machine may have none
    assert with_ranks(replace(place, slots=0), config, {}).slots == 2
    assert "8 micro-batches a step use 2 of 3 GPUs" in capsys.readouterr().err
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
