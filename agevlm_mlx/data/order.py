"""In which order the images of a data set come: every image once an epoch, none by chance."""

from functools import lru_cache

import numpy as np


class Order:
    """The images of all batches one after another, a pure function of the seed.

    Each epoch is a random order of all images. With `bucket` > 0 the images of so many
    batches are sorted by `lengths` and cut into batches of similar length, which then come in a
    random order. Batches go on from one epoch to the next; the few images of one that lies in
    two epochs stay as they were drawn.
    """

    def __init__(self, lengths: np.ndarray, batch_size: int, seed: int, bucket: int = 0) -> None:
        """lengths: [n] expected length of each image's texts, in any unit."""
        self._lengths, self._batch_size = lengths, batch_size
        self._seed, self._bucket = seed, bucket
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def image(self, place: int, later: int = 0) -> int:
        """The image (0 .. n-1) at `place` of all batches, or the one that comes so much `later`
        in the same epoch, from whose end it goes on at its beginning."""
        n = len(self._lengths)
        epoch, within = divmod(place, n)
        return int(self._epoch(epoch)[(within + later) % n])

    def _make_epoch(self, epoch: int) -> np.ndarray:
        n, size = len(self._lengths), self._batch_size
        order = np.random.default_rng([self._seed, epoch, 77]).permutation(n)
        if not self._bucket:
            return order
        head = min(-epoch * n % size, n)  # the end of a batch that began in the last epoch
        batches = (n - head) // size
        whole = order[head : head + batches * size]
        for start in range(0, len(whole), self._bucket * size):
            window = whole[start : start + self._bucket * size]
            window[:] = window[np.argsort(self._lengths[window], kind="stable")]
        shuffled = np.random.default_rng([self._seed, epoch, 78]).permutation(batches)
        whole[:] = whole.reshape(batches, size)[shuffled].reshape(-1)
        return order
