"""The first hour on a GPU (benchmarks/gpu_check.py, benchmarks/gpu), simulated: it ends, goes on after failures, and
shows no figure that was not measured."""

import json
import os
import subprocess
import sys
import time
import uuid
from datetime import datetime

import pytest

from benchmarks import gpu_check
from benchmarks.gpu import runner
from benchmarks.gpu.findings import Findings
from benchmarks.gpu.speed import EAGER, GRAPH, PLAIN, STEERED, against
from benchmarks.gpu.steps import STEPS, Step
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    """Code, output and results of tier 1, and of tier 2 without what it needs, where neither DeepSpeed nor DALI is."""
    folder = tmp_path_factory.mktemp("gpu_check")
    for package in ("deepspeed", "nvidia/dali"):
        blocked = folder / package
        blocked.mkdir(parents=True)
        (blocked / "__init__.py").write_text(f"raise ImportError('no {package} on this machine')")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--simulate", "--json", str(folder / "found.json")]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done, json.loads((folder / "found.json").read_text())


def of(report: dict, step: str) -> dict:
    return next(found for found in report["steps"] if found["name"] == step)


@pytest.mark.faults
def test_all_steps_of_tier_1_are_done_without_deepspeed_and_dali(simulated):
    done, report = simulated
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(s["name"], s["outcome"]) for s in report["steps"]] == [
        (step.name, "done" if step.tier == 1 else "skipped") for step in STEPS
    ]
    assert report["failed"] == []
    for step in ("kernels", "traps", "training", "large"):
        assert any(row["passed"] for row in of(report, step)["rows"] if "passed" in row), step
    assert "torch" in report["machine"]["versions"]


@pytest.mark.faults
def test_a_simulated_run_says_so_and_has_no_figures(simulated):
    done, report = simulated
    assert report["simulated"] is True
    rows = [row for step in report["steps"] for row in step["rows"]]
    assert all("value" not in row for row in rows)
    assert all(row["simulated"] for row in rows if "absent" not in row)
    assert "simulated on the CPU: this says nothing about a GPU" in done.stdout
    table = {line.strip() for line in done.stdout.splitlines()}
    assert any(line.startswith("a plain copy") and line.endswith("simulated, not measured") for line in table)


@pytest.mark.faults
def test_every_side_of_the_step_ran(simulated):
    _, report = simulated
    names = {row["name"] for row in of(report, "speed")["rows"]}
    for side in (EAGER, GRAPH, PLAIN, STEERED):
        assert f"batch 2, bf16, {side}, launches a step" in names
    assert "batch 2, bf16, cost of χ" in names
    compared = f"batch 2, bf16, {GRAPH}, speed to the peer's" in names
    assert compared or any(row["name"] == "SpikingJelly" and row["absent"] for row in of(report, "speed")["rows"])


@pytest.mark.faults
def test_tier_2_trains_through_the_launcher_and_resumes_after_a_kill(tmp_path):
    path = tmp_path / "found.json"
    assert gpu_check.main(["--simulate", "--tier", "2", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert [s["name"] for s in report["steps"]] == ["environment", "decoding", "flagship"]
    passed = {row["name"] for step in report["steps"] for row in step["rows"] if row.get("passed")}
    assert passed >= {
        "two ranks get the pixels of one, cpu",
        "resumed after SIGKILL to every process",
        "calibrated widths",
        "every loss is finite",
        "repeated steps have the same losses",
    }
    absent = {row["name"]: row["absent"] for step in report["steps"] for row in step["rows"] if "absent" in row}
    assert absent.keys() == {"decoding, mixed", "fp16"}
    assert all("there is no GPU" in why for why in absent.values())


def failing(name: str, limit_s: float = 300) -> Step:
    return Step(name, 1, "tests.benchmarks.failing_steps", name, f"a step that is {name}", 1, limit_s)


def test_a_step_that_goes_wrong_is_named_and_the_next_ones_go_on(monkeypatch, tmp_path, capsys):
    names = ("raises", "killed", "wrong", "empty")
    monkeypatch.setattr(gpu_check, "STEPS", [*map(failing, names), failing("hangs", 2), failing("fine")])
    path = tmp_path / "found.json"
    assert gpu_check.main(["--simulate", "--json", str(path)]) == 1
    report, said = json.loads(path.read_text()), capsys.readouterr().out
    assert report["failed"] == [
        "raises: ended with code 1",
        "killed: ended by SIGKILL",
        "wrong: 1 check failed",
        "empty: found nothing",
        "hangs: ended at its limit of 2 s",
    ]
    assert of(report, "raises")["log"][-1] == "ValueError: no such kernel"
    assert [row["name"] for row in of(report, "killed")["rows"]] == ["before the kill"]
    assert [row["name"] for row in of(report, "fine")["rows"]] == ["the last one"]
    assert f"FAILED: {'; '.join(report['failed'])}" in said
    assert "FAILED: AssertionError: 3 of 8 spikes differ" in said
    assert "123" not in path.read_text() + said.replace(str(path), "").replace(os.path.relpath(path), "")


def test_a_request_to_stop_ends_the_step_and_leaves_the_results_of_those_before(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_check, "STEPS", [failing("fine"), failing("stops_the_check"), failing("wrong")])
    path = tmp_path / "found.json"
    assert gpu_check.main(["--simulate", "--json", str(path)]) == gpu_check.INTERRUPTED
    report = json.loads(path.read_text())
    assert report["interrupted"] is True
    assert [step["name"] for step in report["steps"]] == ["fine"]


def test_a_step_without_time_left_fails_the_check_by_name(tmp_path):
    report = runner.Report(tmp_path / "found.json", {})
    runner.run([failing("fine")], report, simulated=True, options={}, budget_s=0.5, say=print)
    assert report.content["failed"] == ["fine: left out: 0 s of 0 s are left, and it takes some 1 s"]


def test_a_step_that_cannot_be_started_is_its_own_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    found = runner.run_step(failing("fine"), simulated=True, options={}, limit_s=5)
    assert found["outcome"].startswith("not started: ")


def test_the_end_of_a_step_is_the_end_of_processes_in_other_sessions():
    mark = uuid.uuid4().hex
    code = (
        "import subprocess; child = subprocess.Popen(['sleep', '10000'], start_new_session=True);"
        "print(child.pid, flush=True); child.wait()"
    )
    environment = {**os.environ, runner.MARK: mark}
    step = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert step.stdout is not None
    child = int(step.stdout.readline())
    until = time.monotonic() + 30
    while child not in runner.marked(mark):  # within execve(2) a process has no environment
        assert time.monotonic() < until
        time.sleep(0.01)
    runner.end(step, mark)
    assert runner.marked(mark) == []
    step.stdout.close()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--simulate", "--only", "kernel"], "--only kernel is not a step; use one of environment, kernels, "),
        (["--simulate", "--budget", "0"], "--budget 0 is not allowed; use a number of seconds above 0"),
        (["--simulate", "--budget", "nan"], "--budget nan is not allowed"),
        (["--simulate", "--peer", "/none/python"], "--peer /none/python is not a program"),
        (["--simulate", "--json", str(ROOT / "benchmarks/results/gpu/h200.json")], "that folder has measurements"),
        (["--simulate", "--json", "/proc/none/found.json"], "cannot be written"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(words, says, capsys):
    assert gpu_check.main(words) == gpu_check.UNUSABLE
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert says in said
    assert said.count("\n") == 1


def test_without_a_gpu_only_a_simulation_is_possible(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_check.main([]) == gpu_check.UNUSABLE
    assert "--simulate runs the steps on the CPU" in capsys.readouterr().err


class Turns:
    """A side that has run."""

    def __init__(self, **turn: float) -> None:
        self.turns = [turn]

    def most(self, part: str) -> float | None:
        return self.turns[0].get(part)


def test_ratios_and_goals_come_from_what_was_measured(tmp_path):
    findings = Findings(tmp_path / "found", simulated=False, options={})
    ours, peer = Turns(seconds=1.0, allocated_bytes=3.0), Turns(seconds=2.5, allocated_bytes=10.0, reserved_bytes=20.0)
    against(findings, "x", ours, peer)  # pyright: ignore[reportArgumentType]
    speed, allocated, reserved = runner.read(findings.path)
    assert (speed["value"], speed["goal"], speed["met"]) == (2.5, 2.0, True)
    assert (allocated["value"], allocated["goal"], allocated["met"]) == (pytest.approx(0.3), 0.4, True)
    assert "value" not in reserved
    assert reserved["absent"]


def test_results_are_never_written_over(tmp_path):
    day = datetime(2026, 1, 2)
    first = runner.new_path(tmp_path, "NVIDIA H200 / 141GB", day)
    assert first.name == "nvidia-h200-141gb-2026-01-02.json"
    first.touch()
    assert runner.new_path(tmp_path, "NVIDIA H200 / 141GB", day).name == "nvidia-h200-141gb-2026-01-02-2.json"
