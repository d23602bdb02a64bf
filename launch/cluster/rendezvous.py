"""The nodes meet before their ranks start, at the first start and after every restart.

Node 0 listens on the port that its ranks will use, so no node can meet it while old ranks are alive, and ranks of two
different starts never find each other. It speaks first, and answers all nodes when every one is there: go, or why not.

    node 0 → node k   {"chispike": 1}               then a newline every BEAT_S
    node k → node 0   {"node": k, "nodes": N, …}    then a newline every BEAT_S
    node 0 → node k   {"refused": "", "code": 0}    go; else the reason and an exit code, and every node ends with both
"""

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from launch.cluster.handshake import Hello, mark, refusal, unshared, why_not
from launch.cluster.placement import MASTER_PORT, Placement
from launch.cluster.signals import Signals
from pipeline.errors import EXIT_DONE, EXIT_USAGE, ConfigError, DataError
from pipeline.run_dir import outages

POLL_S = 0.1
BEAT_S = 1.0
"""Between two heartbeats; several times POLL_S."""
SILENT_S = 5.0
"""A node that is silent for this time has gone; several times BEAT_S."""
SHOWN_S = 10.0
"""How long to look for a file of another node: a network file system may show it only after some seconds."""
LINGER_S = 30.0
"""How long node 0 waits with an error for nodes that come late, so that they hear it too. Longer than SILENT_S, so that
a node that comes again is heard."""
TOLD_EVERY_S = 30.0
LONGEST_LINE = 4096


class MissingNodesError(OSError):
    """The other nodes did not come in time; the message is one line."""


class _Peer:
    """One connection, read and written without blocking."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.connection = connection
        self.hello: Hello | None = None
        self.came = self.heard = self.beat = time.monotonic()
        self._buffer = b""

    def lines(self) -> list[dict]:
        """The messages that have come.

        Raises:
            OSError: the other side has left, is silent, or speaks another protocol.
        """
        now = time.monotonic()
        with suppress(BlockingIOError):
            data = self.connection.recv(LONGEST_LINE)
            if not data:
                raise ConnectionResetError("closed by the other side")
            self._buffer, self.heard = self._buffer + data, now
        if now - self.heard > SILENT_S:
            raise TimeoutError("silent")
        if now - self.beat > BEAT_S:
            self.connection.send(b"\n")
            self.beat = now
        *whole, self._buffer = self._buffer.split(b"\n")
        try:
            messages = [json.loads(line) for line in whole if line]
        except (ValueError, RecursionError):
            raise ConnectionError("speaks another protocol") from None
        if len(self._buffer) > LONGEST_LINE or not all(isinstance(message, dict) for message in messages):
            raise ConnectionError("speaks another protocol")
        return messages

    def say(self, message: dict) -> None:
        self.connection.send(json.dumps(message).encode() + b"\n")


def gather(
    place: Placement, hello: Hello, folder: Path, seconds: float, signals: Signals, say: Callable[[str], None]
) -> None:
    """Returns when every node is here and all agree, or when a signal to stop has come.

    Args:
        hello: what this node says of itself; its token is made here.
        folder: the run's.
        seconds: how long to wait for the others.
        say: called every half minute with a line about the missing nodes.

    Raises:
        ConfigError: the nodes do not fit together; every node raises it.
        DataError: the same, where a node's data are the reason; a StoreError where its store does not answer.
        MissingNodesError: not all nodes came within `seconds`.
    """
    own_mark = mark(folder, place.rank)
    hello = replace(hello, token=secrets.token_hex(8))
    try:
        if place.nodes == 1:
            _alone(place, hello, seconds, signals)
            return
        _leave_mark(own_mark, hello)
        if place.rank == 0:
            _receive(place, hello, folder, seconds, signals, say)
        else:
            _visit(place, hello, seconds, signals, say)
    except (ConfigError, DataError, MissingNodesError):
        if hello.problem:  # without this node's name, which the others read in front
            raise refusal(hello.problem, hello.code) from None
        raise
    finally:
        with suppress(OSError):
            own_mark.unlink()


def _alone(place: Placement, hello: Hello, seconds: float, signals: Signals) -> None:
    """The only node: a port that was named must be free for its ranks; else they choose one (launch/ports.py)."""
    if hello.problem:
        raise refusal(hello.problem, hello.code)
    if place.port != MASTER_PORT:
        _listen(place, seconds, signals).close()


def _leave_mark(path: Path, hello: Hello) -> None:
    """Writes the token for node 0 to find. It need not succeed on a node that has a problem anyway."""
    if hello.problem:
        with suppress(OSError):
            path.write_text(hello.token)
        return
    try:
        outages.outlast(lambda: path.write_text(hello.token), str(path.parent), was_writable=True)
    except InterruptedError:  # asked to stop
        raise
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror})") from None


def _listen(place: Placement, seconds: float, signals: Signals) -> socket.socket:
    """Opens node 0's port; ranks that are just ending may hold it for a moment."""
    end = time.monotonic() + min(seconds, SILENT_S)
    while True:
        try:
            if socket.has_dualstack_ipv6():
                return socket.create_server(("", place.port), family=socket.AF_INET6, dualstack_ipv6=True)
            return socket.create_server(("", place.port))
        except OSError as error:
            if time.monotonic() > end:
                raise ConfigError(
                    f"master-port={place.port} cannot be opened ({os.strerror(error.errno or 0)}); use another on "
                    "every node, or end what holds it"
                ) from None
        signals.wait(POLL_S)


def _receive(
    place: Placement, own: Hello, folder: Path, seconds: float, signals: Signals, say: Callable[[str], None]
) -> None:
    """Node 0: waits until it has heard every other node, then answers all."""
    peers: list[_Peer] = []
    found = gone_at = None
    told, end = time.monotonic(), time.monotonic() + seconds
    with _listen(place, seconds, signals) as server:
        server.setblocking(False)
        try:
            while not signals.seen:
                signals.wait(POLL_S)
                with suppress(BlockingIOError):
                    while True:
                        peers.append(_Peer(server.accept()[0]))
                        peers[-1].say({"chispike": 1})
                peers = [peer for peer in peers if _heard(peer)]
                here, unsure = _sorted_out(peers)
                missing = set(range(1, place.nodes)) - {hello.node for hello in here}
                # Nodes that come late should hear the reason too.
                reason, patience = why_not(own, here), LINGER_S if missing else 0.0
                if not (reason or missing or unsure):
                    try:
                        reason, patience = unshared(here, folder), SHOWN_S
                    except OSError as error:  # its storage is gone
                        gone_at = gone_at or time.monotonic()
                        if time.monotonic() - gone_at > outages.PATIENCE_S:
                            own = own.but(outages.gone(error, str(folder), outages.PATIENCE_S))
                        continue
                    if not reason:
                        return _answer(peers, "", EXIT_DONE)
                found = (found or time.monotonic()) if reason else None
                if found is not None and time.monotonic() - found >= patience:
                    code = next((node.code for node in (own, *here) if node.problem), EXIT_USAGE)
                    _answer(peers, reason, code)
                    raise refusal(reason, code)
                if time.monotonic() > end and not reason:
                    raise MissingNodesError(f"after {seconds:g} s still missing: {_named(missing)}")
                if time.monotonic() - told > TOLD_EVERY_S:
                    told = time.monotonic()
                    say(f"waiting for {_named(missing)}")
        finally:
            for peer in peers:
                peer.connection.close()


def _answer(peers: list[_Peer], reason: str, code: int) -> None:
    for peer in peers:
        with suppress(OSError):
            peer.say({"refused": reason, "code": code})


def _sorted_out(peers: list[_Peer]) -> tuple[list[Hello], bool]:
    """What the peers said, and whether one of them must wait because its number is taken.

    A node that comes again after its machine has died finds its old connection still open, until that is silent for
    SILENT_S. If both stay longer, two nodes were given the same number, and both are returned.
    """
    here, unsure, nodes = [], False, set()
    for peer in peers:  # in the order in which they came
        if peer.hello is None:
            continue
        if peer.hello.node in nodes and time.monotonic() - peer.came < SILENT_S + BEAT_S:
            unsure = True
            continue
        nodes.add(peer.hello.node)
        here.append(peer.hello)
    return here, unsure


def _heard(peer: _Peer) -> bool:
    """Reads what the peer has said; False where it is no node of this job, or has left."""
    try:
        for message in peer.lines():
            peer.hello = Hello(**message)
            if not all(type(getattr(peer.hello, field)) is int for field in ("node", "nodes", "slots", "code")):
                raise TypeError
    except (OSError, TypeError):
        peer.connection.close()
        return False
    return True


def _named(missing: set[int]) -> str:
    shown = ", ".join(map(str, sorted(missing)[:10])) + (", …" if len(missing) > 10 else "")
    return f"node {shown}" if len(missing) == 1 else f"{len(missing)} nodes ({shown})"


def _visit(place: Placement, own: Hello, seconds: float, signals: Signals, say: Callable[[str], None]) -> None:
    """Every other node: looks for node 0 until that has answered."""
    told, end, reason = time.monotonic(), time.monotonic() + seconds, ""
    while not signals.seen:
        try:
            with socket.create_connection((place.master, place.port), timeout=SILENT_S) as connection:
                if _answered(_Peer(connection), own, end, signals):
                    return
                reason = "it does not answer"
        except OSError as error:  # raised also for a name that does not resolve
            reason = str(error)
        where = f"node 0 at {place.master}:{place.port}"
        if time.monotonic() > end:
            raise MissingNodesError(f"{where} was not reached within {seconds:g} s ({reason})")
        if time.monotonic() - told > TOLD_EVERY_S:
            told = time.monotonic()
            say(f"waiting for {where} ({reason})")
        signals.wait(BEAT_S)


def _answered(peer: _Peer, own: Hello, end: float, signals: Signals) -> bool:
    """Whether node 0 has answered to go; False where time is up or a signal has come.

    Raises:
        ConfigError, DataError: node 0 refused.
        OSError: the other side is not node 0's supervisor (old ranks may hold the port), or it has left.
    """
    while not signals.seen and time.monotonic() < end:
        signals.wait(POLL_S)
        for message in peer.lines():
            if "chispike" in message:
                peer.say(asdict(own))
            elif message.get("refused"):
                raise refusal(str(message["refused"]), message.get("code", EXIT_USAGE))
            else:
                return True
    return False
