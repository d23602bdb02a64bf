"""What a user sees of a run on one machine: at a real terminal, with the usual ports taken, and at its end."""

import os
import pty
import re
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from launch import local, ports
from launch.cluster.placement import MASTER_PORT
from launch.cluster.processes import NOT_BEGUN
from launch.options import parse
from launch.train import LAUNCHED, alone_without_launcher
from pipeline.data.manifest import Manifest
from pipeline.errors import EXIT_DATA, EXIT_DONE, EXIT_INTERNAL, EXIT_STOPPED, EXIT_USAGE, ConfigError
from pipeline.metrics.exporter import USUAL_PORT
from tests.conftest import ROOT, free_port
from tests.support.training_runs import arguments, rank_of, read_until


def at_a_terminal(command: list[str], until: str) -> tuple[int, str]:
    """Runs `command` at a terminal of its own and types Ctrl-C at the first line that matches; exit code and screen."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.environ.update(TERM="xterm", PYTHONPATH=str(ROOT))
        os.environ.pop("NO_COLOR", None)
        os.execv(command[0], command)
    seen, typed = "", False
    with suppress(OSError):  # raised once no process has the terminal's other side open
        while data := os.read(terminal, 65536):
            seen += data.decode(errors="replace")
            if not typed and re.search(until, seen, re.MULTILINE):
                os.write(terminal, b"\x03")
                typed = True
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), seen.replace("\r\n", "\n")


def test_a_terminal_shows_our_lines_alone_and_ctrl_c_stops_with_a_checkpoint_on_ports_that_are_free(digits, tmp_path):
    run_dir = tmp_path / "run"
    words = arguments(digits, run_dir)
    at = words.index("--metrics.port")
    del words[at : at + 2]
    with ExitStack() as taken:
        for address in (("", MASTER_PORT), ("127.0.0.1", USUAL_PORT)):
            with suppress(OSError):  # another run has it already
                taken.enter_context(socket.create_server(address))
        code, screen = at_a_terminal([sys.executable, "-m", "launch.local", *words], r"^\S+step\S+ +6/")
    assert code == EXIT_STOPPED, screen
    plain = re.sub("\033\\[[0-9;]*m", "", screen)
    assert plain != screen, "a terminal is coloured"
    lines = [line for line in plain.replace("^C", "").splitlines() if line]
    known = (
        r"digits: 2 ranks on \w+, starting DeepSpeed",
        rf"metrics at http://127\.0\.0\.1:\d+/metrics \(port {USUAL_PORT} is taken\)",
        r"widths start at .*, with a coverage of .* training samples",
        r"step +\d+/14  epoch .*",
        r"step +\d+: rank \d is .*",
        r"SIGINT received: the ranks save and stop",
        r"rank 0: SIG(INT|TERM): the run stops within two steps, with a checkpoint; once more \(after 2 s\), at once",
        r"stopped on request after step \d+, checkpoint saved; run again to continue",
    )
    assert [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in known)] == []
    assert re.fullmatch(known[-1], lines[-1])
    assert "\033" not in (run_dir / "logs" / "rank-0.log").read_text()
    assert "rank 1: SIG" in (run_dir / "logs" / "rank-1.log").read_text()


@pytest.mark.faults
@pytest.mark.parametrize("victim", ["group", "launcher"])
def test_ranks_whose_launcher_dies_save_before_the_command_ends(digits, tmp_path, victim):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.local", *arguments(digits, run_dir), "--train.epochs", "30"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    read_until(process, r"^step +6/")
    if victim == "group":
        os.killpg(process.pid, signal.SIGTERM)
    else:
        psutil.Process(rank_of(process, 0).ppid()).kill()
    output, _ = process.communicate(timeout=120)
    said = re.search(r"stopped on request after step (\d+), checkpoint saved", output)
    assert said, output
    assert (run_dir / "checkpoints" / f"step-{int(said[1]):08d}").exists()
    assert process.returncode == (EXIT_STOPPED if victim == "group" else EXIT_INTERNAL), output


@pytest.mark.parametrize(
    ("ended", "signals", "code", "line"),
    [
        (EXIT_USAGE, [], EXIT_USAGE, ""),
        (EXIT_DATA, [], EXIT_DATA, ""),
        (EXIT_STOPPED, [signal.SIGINT], EXIT_STOPPED, ""),
        (NOT_BEGUN, [signal.SIGINT], EXIT_STOPPED, "stopped on request before the first step; run again to continue\n"),
        (EXIT_INTERNAL, [signal.SIGINT, signal.SIGINT], 128 + signal.SIGINT, ""),
        (-signal.SIGTERM, [signal.SIGTERM], 128 + signal.SIGTERM, "stopped on request; run again to go on from"),
        (256 - signal.SIGKILL, [], EXIT_INTERNAL, "a rank was ended by SIGKILL, often for lack of memory; run again"),
        (256 - signal.SIGBUS, [signal.SIGTERM], EXIT_INTERNAL, "a rank was ended by SIGBUS; run again"),
        (-signal.SIGKILL, [], EXIT_INTERNAL, "the launcher was ended by SIGKILL"),
        (EXIT_DONE, [], EXIT_INTERNAL, "rank 0 left no summary.json"),  # the launcher's second process was killed
        (143, [], EXIT_INTERNAL, "exit code 143"),
        (1, [], EXIT_INTERNAL, "error: the run ended early: exit code 1; run again to go on from the newest"),
    ],
)
def test_how_a_run_ended_is_told_where_its_ranks_have_not(ended, signals, code, line, tmp_path, capsys):
    config = parse(["--recipe", "digits", "--run_dir", str(tmp_path)])
    seen = SimpleNamespace(seen=signals, urgent=len(signals) > 1)
    assert local.verdict(config, ended, seen) == code  # pyright: ignore[reportArgumentType]
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == (line != "")
    (tmp_path / "summary.json").touch()
    assert local.verdict(config, ended, seen) == EXIT_DONE  # pyright: ignore[reportArgumentType]


def test_a_mistake_is_one_line_before_anything_is_started(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(local, "Processes", lambda *_, **__: pytest.fail("the launcher is started"))
    hidden = Manifest.load

    def load(path: str, **options) -> Manifest:
        if "hidden" in path:
            raise PermissionError(13, "Permission denied", path)
        return hidden(path, **options)

    monkeypatch.setattr(Manifest, "load", load)
    for words, part in (
        (["--data.path", "hidden"], "hidden/train cannot be used by this user (Permission denied)"),
        (["--data.path", str(tmp_path)], "no shard set in"),
        (["--optim.lr", "-1"], "optim.lr=-1"),
    ):
        assert local.main(["--recipe", "digits", "--run_dir", str(tmp_path / "run"), *words]) == EXIT_USAGE
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert part in said
        assert said.count("\n") == 1


def variables(monkeypatch, **values: str) -> None:
    for name in (
        "RANK",
        "LOCAL_RANK",
        "LOCAL_SIZE",
        "WORLD_SIZE",
        "MASTER_PORT",
        "MASTER_ADDR",
        "CHISPIKE_METRICS_DIR",
    ):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


PEER = "import sys; from launch.options import parse; from launch import ports; import os; ports.prepare(1, parse("
PEER += "['--recipe', 'digits', '--train.timeout_s', '30']), []); print(os.environ['MASTER_PORT'])"


def test_the_ranks_of_a_node_agree_on_a_free_port_where_none_was_named(monkeypatch):
    variables(monkeypatch, LOCAL_SIZE="2", WORLD_SIZE="2", MASTER_PORT=str(MASTER_PORT))
    here = os.getpid()
    monkeypatch.setattr(os, "getppid", lambda: here)  # rank 1 is this process's child
    early = subprocess.Popen([sys.executable, "-c", PEER], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    ports.prepare(0, parse(["--recipe", "digits", "--metrics.port", "0"]), [])
    chosen = os.environ["MASTER_PORT"]
    assert chosen != str(MASTER_PORT)
    assert early.communicate(timeout=60)[0] == f"{chosen}\n"
    socket.create_server(("", int(chosen))).close()


def test_a_port_that_was_named_or_is_of_several_nodes_is_kept_or_refused(monkeypatch):
    config = parse(["--recipe", "digits", "--metrics.port", "0"])
    port = str(free_port())
    variables(monkeypatch, LOCAL_SIZE="1", WORLD_SIZE="1", MASTER_PORT=port)
    ports.prepare(0, config, [])
    assert os.environ["MASTER_PORT"] == port
    with socket.create_server(("", int(port))), pytest.raises(ConfigError, match=rf"^port {port}, .* cannot be opened"):
        ports.prepare(0, config, [])
    variables(monkeypatch, LOCAL_SIZE="1", WORLD_SIZE="2", MASTER_PORT=str(MASTER_PORT))
    assert not ports.chosen_by_rank_0()


def test_ranks_that_were_meant_for_another_machine_are_refused(monkeypatch):
    """What DeepSpeed's launcher sets for `--hostfile H --include n1`, of which it starts the ranks here."""
    config = parse(["--recipe", "digits", "--metrics.port", "0"])
    for address in ("192.0.2.1", "2001:db8::1"):  # addresses that no machine has
        variables(monkeypatch, LOCAL_SIZE="2", WORLD_SIZE="2", MASTER_PORT="4000", MASTER_ADDR=address)
        with pytest.raises(ConfigError, match=rf"MASTER_ADDR={address} is not this machine .*; add --force_multi, or"):
            ports.prepare(0, config, [])
    for environ in (
        {"LOCAL_SIZE": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
        {"LOCAL_SIZE": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"},
        {"LOCAL_SIZE": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "host.invalid"},
        {"LOCAL_SIZE": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1"},  # two nodes, behind an address translation
    ):
        variables(monkeypatch, **environ)
        ports.check_address()


def test_the_usual_metrics_port_gives_way_and_one_that_was_named_does_not(monkeypatch):
    variables(monkeypatch)
    config = parse(["--recipe", "digits"])
    with ExitStack() as taken:
        with suppress(OSError):
            taken.enter_context(socket.create_server(("127.0.0.1", USUAL_PORT)))
        ports.prepare(0, config, [])
        for named in (["--metrics.port", str(USUAL_PORT)], [f"--metrics.port={USUAL_PORT}"]):
            with pytest.raises(ConfigError, match=f"metrics.port={USUAL_PORT} on 127.0.0.1 cannot be opened"):
                ports.prepare(0, config, named)


def test_free_ports_lie_outside_those_of_connections_and_differ():
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = {ports.free_port() for _ in range(5)}
    assert len(found) > 1
    assert all(1024 <= port < first or first < 2048 for port in found)


def test_a_process_that_no_launcher_started_is_the_only_rank():
    environ: dict[str, str] = {}
    alone_without_launcher(environ)
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_SIZE"]) == ("0", "1", "1")
    for name in LAUNCHED:
        started = {name: "3"}
        alone_without_launcher(started)
        assert started == {name: "3"}
