"""How large is a SAM store of a whole data set, and what do writing and opening it cost?

Made-up labels of a data set of COCO's size (train2017: 118,287 images, 860,001 boxes), on a
24 x 24 grid unless told otherwise. Masks only: the whole store is really written. With features
of 256 channels (SAM's): --sample images are written, the rest is extrapolated and compared with
the forecast of `agevlm teach`. Opening is measured in a new process, memory included.

  python scripts/measure_store.py --out /tmp/store
"""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from agevlm_mlx.sam.jobs import Job, survey
from agevlm_mlx.sam.room import disk
from agevlm_mlx.sam.store import Store, StoreMeta, StoreWriter, file_sha256, prompt_key

GB = 2**30


def jobs(images: int, prompts: int, seed: int = 0) -> Iterator[Job]:
    """`images` jobs with `prompts` boxes in all, keys as long as COCO's."""
    rng = np.random.default_rng(seed)
    ends = np.linspace(0, prompts, images + 1).astype(int)
    for i, n in enumerate(np.diff(ends)):
        corners = rng.integers(0, 64000, (n, 4)) / 100
        boxes = {prompt_key(box): tuple(box) for box in corners.tolist()}
        yield Job(f"train2017/{i:012d}.jpg", Path(__file__), boxes)  # stands for all pictures


def write(out: Path, meta: StoreMeta, images: int, prompts: int) -> tuple[str, float]:
    """Write a store of random labels; what it took, and seconds of the longest `add`."""
    rng = np.random.default_rng(1)
    coverage = rng.random((64, meta.cells), dtype=np.float32)
    iou = rng.random(64, dtype=np.float32)
    features = None
    if meta.feature_channels:
        features = rng.normal(size=(meta.cells, meta.feature_channels)).astype(np.float32)
    sha256 = file_sha256(Path(__file__))
    longest, clock = 0.0, _Clock()
    with StoreWriter(out, meta) as writer:
        for job in jobs(images, prompts):
            n = len(job.keys)
            before = time.perf_counter()
            writer.add(job.key, sha256, job.keys, coverage[:n], iou[:n], features)
            longest = max(longest, time.perf_counter() - before)
    return clock.said(), longest


def opened(out: Path) -> None:
    """In a process of its own: open the store, read from it, say what that took."""
    before, clock = _memory(), _Clock()
    store = Store(out)
    seconds, memory = clock.said(), _memory() - before
    keys = list(store)
    order = np.random.default_rng(2).permutation(len(keys))[:2000]
    clock, read = _Clock(), 0
    for i in order:
        for prompt in store.prompts(keys[i]):
            store.target(keys[i], prompt)
            read += 1
        store.features(keys[i])
    print(
        f"  opened in {seconds}, {memory / 2**20:.0f} MB of memory; {read} masks of {len(order)} "
        f"images read in {clock.said()}"
    )


def _memory() -> int:
    """Bytes that this process has in memory; where the system does not say, its peak."""
    now = Path("/proc/self/statm")
    if now.is_file():
        return int(now.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class _Clock:
    """Time since it was made: on the wall, and what this process had of it."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def said(self) -> str:
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        return f"{wall:.2f} s ({cpu:.2f} s CPU)"


def measure(out: Path, meta: StoreMeta, images: int, prompts: int, sample: int) -> None:
    """Forecast, write `sample` of the images, and say what all of them come to."""
    whole = survey(list(jobs(images, prompts)), meta)
    part = round(prompts * sample / images)
    some = survey(list(jobs(sample, part)), meta)
    took, longest = write(out, meta, sample, part)
    written = disk(out)
    kind = (
        f"features of {meta.feature_channels} channels" if meta.feature_channels else "masks only"
    )
    print(f"{kind}, {meta.grid[0]}x{meta.grid[1]} grid, {images} images, {prompts} prompts:")
    print(f"  forecast {whole.size / GB:.3f} GB")
    print(
        f"  {sample} images written: {written / GB:.3f} GB, forecast {some.size / GB:.3f} GB "
        f"({written / some.size - 1:+.2%}); all: {written * images / sample / GB:.3f} GB"
    )
    print(
        f"  written in {took}, the longest pause {longest:.2f} s; "
        f"index.json {(out / 'index.json').stat().st_size / 2**10:.0f} kB",
        flush=True,
    )
    subprocess.run([sys.executable, __file__, "--out", str(out), "--open"], check=True)
    again = list(jobs(sample, part))
    clock = _Clock()
    with StoreWriter(out, meta) as writer:
        seconds, clock = clock.said(), _Clock()
        left = survey(again, meta, writer)
        print(
            f"  opened again for writing in {seconds}, {len(left.todo)} images left to do, found "
            f"in {clock.said()}\n"
        )
    shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder that is made, filled and deleted")
    add("--images", type=int, default=118_287)
    add("--prompts", type=int, default=860_001)
    add("--grid", type=int, default=24, help="cells per side")
    add("--sample", type=int, default=3000, help="images written with features")
    add("--open", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.open:
        opened(args.out)
        return
    if args.out.exists():
        raise SystemExit(f"{args.out}: is there already; expected the name of a new folder")
    for channels, sample in ((0, args.images), (256, args.sample)):
        meta = StoreMeta(
            teacher="a" * 64,
            preprocessing="b" * 64,
            grid=(args.grid, args.grid),
            feature_channels=channels,
        )
        measure(args.out, meta, args.images, args.prompts, min(sample, args.images))


if __name__ == "__main__":
    main()
