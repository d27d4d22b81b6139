"""A running mean of the weights, which often does better than any single step's (EMA)."""

from collections.abc import Iterable, Mapping
from typing import cast

import mlx.core as mx


class Average:
    """Exponentially weighted mean of every parameter over the steps that trained it, in fp32.

    A parameter joins with the first step that trains it and begins as a copy of it. From then on
    its mean is sum_i decay^(t-i) w_i / sum_i decay^(t-i): Adam's bias correction, so that the
    first steps do not hang on. One that a later stage freezes goes on towards the value it was
    frozen at, because that is what the others are trained with.
    """

    def __init__(self, decay: float):
        self.decay = decay
        #: "<name>/mean" f32 like the parameter and "<name>/t" i32 [] its steps; for checkpoints.
        self.state: dict[str, mx.array] = {}

    def names(self) -> set[str]:
        """Parameters that have a mean."""
        return {key.removesuffix("/mean") for key in self.state if key.endswith("/mean")}

    def update(self, params: Mapping[str, mx.array], trained: Iterable[str]) -> None:
        """Take in the values after a step that trained the parameters `trained`; lazy.

        `params` holds these and all that have joined before.
        """
        for name in self.names().union(trained):
            value = params[name].astype(mx.float32)
            mean, count = self.state.get(f"{name}/mean"), 1
            if mean is None:
                mean = value
            else:
                count += cast(int, self.state[f"{name}/t"].item())
                share = (1 - self.decay) / (1 - self.decay**count)
                mean = mean + share * (value - mean)
            self.state |= {f"{name}/mean": mean, f"{name}/t": mx.array(count, mx.int32)}

    def averaged(self, params: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """`params` with the means of those that have one, in the same dtypes."""
        means = {name: self.state.get(f"{name}/mean") for name in params}
        return {
            name: value if (mean := means[name]) is None else mean.astype(value.dtype)
            for name, value in params.items()
        }
