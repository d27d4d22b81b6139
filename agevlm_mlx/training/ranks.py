"""The processes that train together, on one machine or several: data parallel training.

Started by ``mlx.launch`` (or mpirun), every process runs the same command and has a rank. Each
step is one batch, of which every rank computes a part; gradients are summed, so all ranks hold
the same parameters. Rank 0 alone writes the run's folder, and what it has read is what counts:
the recipe, the tokenizer and a checkpoint to go on from reach the others through the network.
"""

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..errors import UserError, one_line

#: What mlx.launch and the common MPI launchers set in the environment of what they start.
_LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
#: Seconds after which the others are taken for lost when they do not answer in a step.
PATIENCE = 900.0


class LostRanks(Exception):
    """Another process is gone."""


class Ranks:
    """This process among those that train together; alone unless a launcher started it.

    rank: 0 .. size - 1. All methods but `first` are collective: every rank has to call them in
    the same order.
    """

    def __init__(self, group: Any = None):
        self._group = group
        self.rank: int = group.rank() if group is not None else 0
        self.size: int = group.size() if group is not None else 1

    @classmethod
    def start(cls) -> "Ranks":
        """Join the others. ``UserError`` if a launcher started this process and they are not
        found."""
        if not any(name in os.environ for name in _LAUNCHED):
            return cls()
        try:
            group = mx.distributed.init()
        except RuntimeError as error:
            raise UserError(
                f"could not join the other machines ({one_line(error)}); check the host file and "
                "that they reach each other, or train on one machine without mlx.launch"
            ) from None
        return cls(group if group.size() > 1 else None)

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
        with self._answer():
            summed = nn.average_gradients(
                {name: g.astype(mx.float32) * self.size for name, g in grads.items()}, self._group
            )
            # It makes a tree of dotted names.
            flat = dict(cast(list[tuple[str, mx.array]], tree_flatten(summed)))
            mx.eval(flat)
            return flat

    def share(self, value: Any) -> Any:
        """Rank 0's `value`, anything that JSON can hold."""
        if self.size == 1:
            return value
        data = np.frombuffer(json.dumps(value).encode(), np.uint8) if self.first else None
        (length,) = self.sum([0 if data is None else len(data)])
        own = np.zeros(int(length), np.int32) if data is None else data.astype(np.int32)
        total = mx.distributed.all_sum(mx.array(own), group=self._group)
        return json.loads(np.array(total).astype(np.uint8).tobytes())

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
            whole = own.reshape(-1) if own.ndim else own.reshape(1)
            total = mx.distributed.all_sum(
                mx.contiguous(whole).view(mx.uint8).astype(mx.int32), group=self._group
            )
            shared[name] = total.astype(mx.uint8).view(kind).reshape(shape)
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
        """Turn a lost connection into ``LostRanks``, and silence for `PATIENCE` into an end."""
        watch = threading.Timer(PATIENCE, _give_up, (self.rank,))
        watch.daemon = True
        watch.start()
        try:
            yield
        except RuntimeError as error:
            raise LostRanks(one_line(error)) from None
        finally:
            watch.cancel()


def _give_up(rank: int) -> None:
    # The main thread waits inside MLX, where no exception reaches it.
    print(
        f"error: rank {rank}: no answer from the other processes for {PATIENCE / 60:.0f} minutes; "
        "finished checkpoints are kept, start all again with --resume",
        flush=True,
    )
    os._exit(2)
