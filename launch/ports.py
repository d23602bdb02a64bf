"""The two ports of a run: of its metrics, and of the rendezvous of its ranks.

A port that the user names is used, or refused where it cannot be opened. Otherwise several runs can share a machine:
for metrics a free port replaces the usual one where that is taken, and the ranks of a single node meet on a free port
that rank 0 chooses. The launcher gives the other ranks MASTER_PORT and nothing else, so rank 0 sends them its choice
through an abstract Unix socket, which is named after their launcher and needs no file.
"""

import errno
import os
import random
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from launch.cluster.placement import MASTER_PORT
from pipeline.config import Config
from pipeline.errors import ConfigError, LostRankError
from pipeline.metrics import exporter

LOOK_S = 0.1
TRIES = 100


def prepare(rank: int, config: Config, arguments: Sequence[str]) -> None:
    """Checks both ports on rank 0, and sets every rank's MASTER_PORT to the port of the rendezvous.

    Raises:
        ConfigError: a port that the user named cannot be opened, a certificate cannot be read, or the ranks were
            started on another machine than they were meant for.
        LostRankError: rank 0 sent no port within train.timeout_s.
    """
    chosen = chosen_by_rank_0()
    if rank == 0:
        check_address()
    if rank != 0:
        if chosen:
            os.environ["MASTER_PORT"] = _heard(config.train.timeout_s)
        return
    supervised = os.environ.get(exporter.FOLDER_VARIABLE)
    if not supervised:
        check_metrics(config, arguments)
    if chosen:
        os.environ["MASTER_PORT"] = str(free_port())
        tell_others(int(os.environ["WORLD_SIZE"]) - 1)
    elif not supervised:
        check_named()


def check_address() -> None:
    """Refuses ranks that were to run on another machine: they would wait for one another at its address.

    DeepSpeed's launcher starts the ranks here where a filter (--include, --exclude, --num_nodes) leaves a single host.
    """
    address = os.environ.get("MASTER_ADDR")
    if not address or os.environ.get("LOCAL_SIZE") != os.environ.get("WORLD_SIZE"):
        return
    try:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
    except OSError:  # the ranks will say so
        return
    for family, kind, protocol, _, at in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(at)
            return
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:
                return
    raise ConfigError(
        f"MASTER_ADDR={address} is not this machine ({socket.gethostname()}), on which all ranks were started: "
        "deepspeed does so where --include, --exclude or --num_nodes leaves a single host of the hostfile; add "
        "--force_multi, or run the command on that host without --hostfile"
    )


def check_metrics(config: Config, arguments: Sequence[str]) -> None:
    named = any(word.partition("=")[0] == "--metrics.port" for word in arguments)
    or_any = not named and config.metrics.port == exporter.USUAL_PORT
    exporter.listen(config.metrics.host, config.metrics.port, or_any=or_any).close()
    if tls := exporter.tls_of(config.metrics):
        tls.context()


def check_named() -> None:
    """Refuses the port of the rendezvous if it cannot be opened: the launcher's option, or that of several nodes."""
    port = os.environ.get("MASTER_PORT")
    if port is None or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agent listens on it
        return
    try:
        socket.create_server(("", int(port))).close()
    except OSError as error:
        raise ConfigError(
            f"port {port}, on which the ranks meet, cannot be opened ({os.strerror(error.errno or 0)}), as where "
            "another training runs; give the launcher a free one, the same on every node: deepspeed --master_port "
            "PORT … (on a single node leave the option out, and a free one is taken)"
        ) from None


def chosen_by_rank_0() -> bool:
    """Whether rank 0 may choose the port: all ranks are on one node, and MASTER_PORT is the launchers' default."""
    one_node = os.environ.get("LOCAL_SIZE") == os.environ.get("WORLD_SIZE")
    return one_node and os.environ.get("MASTER_PORT") == str(MASTER_PORT)


def tell_others(others: int) -> None:
    """Sends MASTER_PORT to `others` ranks of this node as they connect, from a thread."""
    if not others:
        return
    server = socket.socket(socket.AF_UNIX)
    try:
        server.bind(meeting())
    except OSError as error:
        raise ConfigError(
            f"the ranks cannot agree on a port ({os.strerror(error.errno or 0)}); name a free one: deepspeed "
            "--master_port PORT …"
        ) from None
    server.listen(others)
    threading.Thread(target=_tell, args=(server, others), name="port", daemon=True).start()


def _tell(server: socket.socket, others: int) -> None:
    with server:
        for _ in range(others):
            connection, _ = server.accept()
            with connection, suppress(OSError):  # that rank has ended
                connection.sendall(os.environ["MASTER_PORT"].encode())


def _heard(seconds: float) -> str:
    end = time.monotonic() + seconds
    while True:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as connection:  # rank 0 is not there yet
            connection.connect(meeting())
            if port := connection.recv(16).decode():
                return port
        if time.monotonic() > end:
            raise LostRankError("rank 0 has not begun within train.timeout_s; look for its own error above")
        time.sleep(LOOK_S)


def meeting() -> str:
    """The socket's name. No other launcher process has it, in any container of the machine."""
    parent = os.getppid()
    began = Path(f"/proc/{parent}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    return f"\0chispike {os.readlink('/proc/self/ns/pid')} {parent} {began}"


def free_port() -> int:
    """A free port below those that the system gives to outgoing connections: it is still free some seconds later, when
    the ranks have imported torch and open it.
    """
    with suppress(OSError, ValueError):
        first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
        below = range(max(1024, first - 16384), first)
        for port in random.SystemRandom().sample(below, min(TRIES, len(below))):
            with suppress(OSError), socket.create_server(("", port)):
                return port
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
