"""Whether the other processes of a run are still there.

MLX tells of a broken ring only where a sum is under way when it breaks; one that begins later
waits for ever. So every process also holds a connection to rank 0 through which nothing is said:
when it ends without a goodbye, somebody is gone, and all learn of it.
"""

import contextlib
import hmac
import json
import os
import select
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

_GOODBYE = b"."
#: Seconds that the processes have to find each other.
_MEET = 60.0
#: Seconds between looks at whether somebody waits in vain.
_LOOK = 2.0


def address() -> str:
    """Where the others reach this machine, rank 0's, by what the launcher has told us."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        hosts = json.loads(Path(os.environ["MLX_HOSTFILE"]).read_text("utf-8"))
        return str(hosts[0][0]).rpartition(":")[0]
    for name in ("MLX_JACCL_COORDINATOR", "NCCL_HOST_IP"):
        if os.environ.get(name):
            return os.environ[name].partition(":")[0]
    return socket.gethostbyname(socket.gethostname())


def listen(host: str, others: int) -> socket.socket:
    """Rank 0's door: a port of the system's choice on `host`."""
    door = socket.create_server((host, 0), backlog=others)
    door.settimeout(_MEET)
    return door


def admit(door: socket.socket, others: int, token: str) -> list[socket.socket]:
    """The connections of `others` processes that know the token; then the door is closed."""
    found: list[socket.socket] = []
    with door:
        while len(found) < others:
            guest, _ = door.accept()
            guest.settimeout(_MEET)
            said = b""
            while len(said) < len(token) and (more := guest.recv(len(token) - len(said))):
                said += more
            if hmac.compare_digest(said, token.encode()):
                found.append(_steady(guest))
            else:
                guest.close()
    return found


def join(host: str, port: int, token: str) -> list[socket.socket]:
    """The connection to rank 0."""
    link = socket.create_connection((host, port), timeout=_MEET)
    link.sendall(token.encode())
    return [_steady(link)]


def _steady(link: socket.socket) -> socket.socket:
    """A connection that lasts, and that notices within minutes when the other machine is off."""
    link.settimeout(None)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))
    for option, value in ((idle, 30), (getattr(socket, "TCP_KEEPINTVL", None), 10)):
        if option is not None:
            link.setsockopt(socket.IPPROTO_TCP, option, value)
    return link


class Leash:
    """Watches the connections in a thread.

    waits: seconds for which the main thread has been waiting for the others, 0 if it is not. When
    a connection broke and the main thread waits nevertheless, or has waited for `patience`
    seconds, `give_up` is called in the watching thread, with the reason; it has to end the process.
    """

    def __init__(
        self,
        links: Sequence[socket.socket],
        waits: Callable[[], float],
        patience: float,
        give_up: Callable[[str], None],
    ):
        self._links, self._waits, self._patience = list(links), waits, patience
        self._give_up = give_up
        #: Whether somebody has gone without a goodbye.
        self.broken = threading.Event()
        threading.Thread(target=self._watch, name="leash", daemon=True).start()

    def goodbye(self) -> None:
        """This process ends in order: the others need not stop."""
        for link in self._links:
            with contextlib.suppress(OSError):
                link.sendall(_GOODBYE)

    def _watch(self) -> None:
        links = list(self._links)
        while True:
            waited = self._waits()
            if self.broken.is_set() and waited > 2 * _LOOK:
                self._give_up("it is gone")
            if waited > self._patience:
                self._give_up(f"no answer for {self._patience / 60:.0f} minutes")
            for link in select.select(links, [], [], _LOOK)[0]:
                said = b""
                with contextlib.suppress(OSError):
                    said = link.recv(1)
                links.remove(link)
                if said != _GOODBYE:
                    self.broken.set()
            if self.broken.is_set() and links:
                for link in links:  # so that the others learn of it
                    with contextlib.suppress(OSError):
                        link.shutdown(socket.SHUT_RDWR)
                links = []
