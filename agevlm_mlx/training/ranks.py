"""The processes that train together, on one machine or several: data parallel training.

Started by ``mlx.launch`` (or mpirun), every process runs the same command and has a rank. Each
step is one batch, of which every rank computes a part; gradients are summed, so all ranks hold
the same parameters. Rank 0 alone writes the run's folder, and what it has read is what counts:
the recipe, the tokenizer and a checkpoint to go on from reach the others through the network.
"""

import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UserError, one_line
from ..launchers import is_launched
from . import leash
from .leash import Leash

#: Seconds after which the others are taken for lost when they do not answer; the teacher's work at
#: the start may take that long.
PATIENCE = 24 * 3600.0
#: What is said when one is.
LOST = "the connection to another process was lost"
GO_ON = (
    "start all again with `agevlm train --resume` and the run's folder, on any number of machines"
)
#: Bytes of gradients that are sent together.
MESSAGE = 32 * 2**20


class LostRanks(Exception):
    """Another process is gone."""


class Ranks:
    """This process among those that train together; alone unless a launcher started it.

    rank: 0 .. size - 1. All methods but `first` are collective: every rank has to call them in
    the same order.
    """

    def __init__(self, group: Any = None):
        self._group = group
        self._since: float | None = None
        #: Called before the process ends because another one is gone; see `train.Trainer`.
        self.before_end: Callable[[], None] = lambda: None
        self._leash: Leash | None = None
        self.rank: int = group.rank() if group is not None else 0
        self.size: int = group.size() if group is not None else 1

    @classmethod
    def start(cls) -> "Ranks":
        """Join the others. ``UserError`` if a launcher started this process and they are not
        found."""
        if not is_launched(os.environ):
            return cls()
        try:
            group = mx.distributed.init()
        except RuntimeError as error:
            raise UserError(
                f"could not join the other machines ({one_line(error)}); check the host file and "
                "that they reach each other, or train on one machine without mlx.launch"
            ) from None
        ranks = cls(group if group.size() > 1 else None)
        if ranks.size > 1:
            ranks._hold_together()
        return ranks

    def _hold_together(self) -> None:
        host = leash.address() if self.first else ""
        door = leash.listen(host, self.size - 1) if self.first else None
        port = door.getsockname()[1] if door else 0
        host, port, token = self.share([host, port, secrets.token_hex(16)])
        try:
            links = (
                leash.admit(door, self.size - 1, token) if door else leash.join(host, port, token)
            )
        except OSError as error:
            raise UserError(
                f"rank {self.rank}: could not connect to {host}:{port} of rank 0 "
                f"({one_line(error)}); does a firewall refuse it?"
            ) from None
        self._leash = Leash(links, self._waits, PATIENCE, self._give_up)

    def _waits(self) -> float:
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def goodbye(self) -> None:
        """This process ends in order."""
        if self._leash is not None:
            self._leash.goodbye()

    def _give_up(self, reason: str) -> None:
        # The main thread waits inside MLX, where no exception reaches it.
        try:
            self.before_end()
        finally:
            sys.stdout.flush()
            print(f"error: {LOST} ({reason}); {GO_ON}", file=sys.stderr, flush=True)
            os._exit(2)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of every rank's `values`; counts up to 2^24 stay exact."""
        if self.size == 1:
            return [float(v) for v in values]
        with self._answer():
            total = mx.distributed.all_sum(mx.array(list(values), mx.float32), group=self._group)
            return np.array(total).tolist()

    def sum_gradients(self, grads: dict[str, mx.array]) -> dict[str, mx.array]:
        """The sums of every rank's gradients, evaluated; fp32, in messages of tens of MB."""
        if self.size == 1:
            return grads
        summed: dict[str, mx.array] = {}
        for names in _messages(grads):
            whole = mx.concatenate([grads[n].reshape(-1).astype(mx.float32) for n in names])
            mx.eval(whole)
            # The sum and nothing else is evaluated here: when a connection is lost, MLX raises
            # for an array that was to come through it, and waits for ever for one made of that.
            with self._answer():
                whole = mx.distributed.all_sum(whole, group=self._group)
                mx.eval(whole)
            ends = np.cumsum([grads[n].size for n in names])[:-1].tolist()
            for name, part in zip(names, mx.split(whole, ends), strict=True):
                summed[name] = part.reshape(grads[name].shape)
        mx.eval(summed)
        return summed

    def share(self, value: Any, source: int = 0) -> Any:
        """The `value` of rank `source`, anything that JSON can hold."""
        if self.size == 1:
            return value
        mine = self.rank == source
        data = np.frombuffer(json.dumps(value).encode(), np.uint8) if mine else None
        (length,) = self.sum([0 if data is None else len(data)])
        own = np.zeros(int(length), np.int32) if data is None else data.astype(np.int32)
        with self._answer():
            total = mx.distributed.all_sum(mx.array(own), group=self._group)
            return json.loads(np.array(total).astype(np.uint8).tobytes())

    def gather(self, values: list[Any]) -> list[Any]:
        """The values of all ranks, in their order; each anything that JSON can hold."""
        return [value for rank in range(self.size) for value in self.share(values, rank)]

    def share_arrays(self, arrays: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Rank 0's arrays, bit for bit; the others' own are not looked at."""
        if self.size == 1:
            return dict(arrays)
        plan = self.share([[n, list(a.shape), str(a.dtype)] for n, a in arrays.items()])
        shared = {}
        for name, shape, dtype in plan:
            kind = getattr(mx, dtype.removeprefix("mlx.core."))
            own = arrays[name] if self.first else mx.zeros(shape, kind)
            # As bytes: adding zeros would lose the sign of -0, and not every type can be added.
            whole = mx.contiguous(own.reshape(-1) if own.ndim else own.reshape(1))
            whole = whole.view(mx.uint8).astype(mx.int32)
            mx.eval(whole)
            with self._answer():
                whole = mx.distributed.all_sum(whole, group=self._group)
                mx.eval(whole)
            shared[name] = whole.astype(mx.uint8).view(kind).reshape(shape)
            mx.eval(shared[name])
        return shared

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """A block that ends well on all ranks or on none.

        A rank without an error of its own raises ``UserError`` when another one had one.
        """
        failed = 1.0
        try:
            yield
            failed = 0.0
        finally:
            # An error of this rank's own is what is to be told, whatever becomes of the others.
            with contextlib.suppress(*[LostRanks] if failed else []):
                if self.sum([failed])[0] and not failed:
                    raise UserError("another of the processes could not go on, see its message")

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """A block that one rank after the other runs: what makes files that others then find."""
        for turn in range(self.size):
            if turn == self.rank:
                with self.together():
                    yield
            else:
                with self.together():
                    pass

    @contextlib.contextmanager
    def _answer(self) -> Iterator[None]:
        """Turn a lost connection into ``LostRanks``."""
        if self._leash is not None and self._leash.broken.is_set():
            raise LostRanks("it is gone")
        self._since = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            raise LostRanks(one_line(error)) from None
        finally:
            self._since = None


def _messages(grads: Mapping[str, mx.array]) -> Iterator[list[str]]:
    """The names in groups of about `MESSAGE` bytes, in the same order on every rank."""
    names: list[str] = []
    size = 0
    for name in sorted(grads):
        names.append(name)
        size += 4 * grads[name].size
        if size >= MESSAGE:
            yield names
            names, size = [], 0
    if names:
        yield names
