"""A launcher and its ranks as processes, without torch: who is waited for, and whose exit code counts."""

import os
import re
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from launch.cluster.processes import NOT_BEGUN, Processes, attend
from launch.cluster.signals import Signals
from pipeline.errors import EXIT_INTERNAL, EXIT_STOPPED
from tests.support.supervised import processes_with

RANK = """
import os, select, signal, sys, time
trains, pipe, code = sys.argv[1] == "trains", sys.argv[2], int(sys.argv[3])
if trains:  # on a request it saves: it ends once somebody has written to its pipe
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
waited = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
open(pipe + ".up", "w").close()
if trains:
    select.select([waited], [], [])
    os._exit(code)  # no signal finds it half-way out
time.sleep(60)
"""
LAUNCHER = """
import os, subprocess, sys
from pathlib import Path
if sys.argv[1] == "runner":  # DeepSpeed's launcher is two processes
    done = subprocess.run([sys.executable, __file__, "launch", *sys.argv[2:]]).returncode
    sys.exit(max(done, 0))
rank, pipes = sys.argv[2], sys.argv[3]
started = []
for number, (does, code) in enumerate(zip(sys.argv[4::2], sys.argv[5::2])):
    command = [sys.executable, rank, does, f"{pipes}/{number}", code]
    started.append(subprocess.Popen(command, env={**os.environ, "RANK": str(number)}))
for one in started:
    one.wait()
"""


def command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    return ""


class Tree:
    """`attend` in the main thread; `body` in another one, when all ranks are up."""

    def __init__(self, folder: Path, *ranks: tuple[str, int]) -> None:
        self.folder, self.said = folder, []
        self.pipes = [folder / str(number) for number in range(len(ranks))]
        for pipe in self.pipes:
            os.mkfifo(pipe)
        (folder / "rank.py").write_text(RANK)
        (folder / "launcher.py").write_text(LAUNCHER)
        words = [str(word) for rank in ranks for word in rank]
        self.command = [sys.executable, str(folder / "launcher.py"), "runner", str(folder / "rank.py"), str(folder)]
        self.command += words

    def attended(self, body, grace_s: float = 60) -> int:
        signals = Signals()
        try:
            ranks = Processes(self.command, os.environ)
            other = threading.Thread(target=self._when_up, args=(ranks, body))
            other.start()
            code = attend(ranks, signals, grace_s, self._say)
            other.join(timeout=30)
            assert not ranks.living()
            return code
        finally:
            signals.close()

    def _say(self, line: str) -> None:
        self.said.append(line)

    def _when_up(self, ranks: Processes, body) -> None:
        while not all(Path(f"{pipe}.up").exists() for pipe in self.pipes):
            time.sleep(0.01)
        ranks.living()  # seen alive, as real ranks are long before they stop
        body(self)

    def pids(self, pattern: str) -> list[int]:
        return [pid for pid in processes_with(str(self.folder)) if re.search(pattern, command_line(pid))]

    def signal(self, number: int, *patterns: str) -> None:
        for pattern in patterns:
            for pid in self.pids(pattern):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def gone(self, pattern: str) -> None:
        while self.pids(pattern):
            time.sleep(0.01)

    def saved(self) -> None:
        """Lets the ranks end."""
        for pipe in self.pipes:
            with suppress(OSError):  # that rank is gone
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize(("codes", "code"), [((75, 75), EXIT_STOPPED), ((75, 70), EXIT_INTERNAL)])
def test_ranks_save_when_a_stop_reaches_every_process_of_the_tree(tmp_path, number, codes, code):
    def stop(tree: Tree) -> None:
        tree.signal(number, r"launcher\.py runner", r"launcher\.py launch", r"rank\.py")
        tree.gone(r"launcher\.py")  # only then does the request reach this process
        os.kill(os.getpid(), number)
        tree.saved()

    assert Tree(tmp_path, ("trains", codes[0]), ("trains", codes[1])).attended(stop) == code


def test_a_stop_that_reaches_the_tree_before_a_step_is_a_stop(tmp_path):
    def stop(tree: Tree) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        tree.signal(signal.SIGUSR1, r"launcher\.py runner", r"launcher\.py launch", r"rank\.py")

    assert Tree(tmp_path, ("begins", 0)).attended(stop) == NOT_BEGUN


def test_ranks_without_a_launcher_are_killed_when_no_stop_was_asked_for_and_after_the_grace(tmp_path):
    def lose(tree: Tree) -> None:
        tree.signal(signal.SIGKILL, r"launcher\.py launch")

    def stop(tree: Tree) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        tree.signal(signal.SIGKILL, r"launcher\.py launch")

    (tmp_path / "one").mkdir()
    assert Tree(tmp_path / "one", ("trains", 75)).attended(lose) == 0, "as the launcher says, without a result"
    (tmp_path / "other").mkdir()
    tree = Tree(tmp_path / "other", ("trains", 75))
    assert tree.attended(stop, grace_s=0.5) == EXIT_INTERNAL
    assert tree.said[-1] == "killing the ranks; what they had not saved is lost"
